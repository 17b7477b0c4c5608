"""Our models with the official implementations' weights give the official outputs, through recipe and rename table.

tests/golden/: lynx_tiny from bytedance/lynx-llm 24680d1; mplug_owl2_tiny from X-PLUG/mPLUG-Owl 0f3068f; llava_phi_tiny
from zhuyiche/llava-phi 2b42029; openflamingo_tiny from mlfoundations/open_flamingo 655f693. Random weights, float32.
Here the batches are those that training builds; `compare` lines the rows up by itself (test_compare.py).
"""

import functools
from pathlib import Path

import pytest
import torch

from nanovlm import recipes
from compare import verdicts
from golden import read
from nanovlm.vlm import Batch, IGNORE, IMAGE_TOKEN
from nanovlm.published.weights import to_ours, to_published

GOLDEN = Path(__file__).parents[1] / "golden"
close = functools.partial(torch.testing.assert_close, atol=1e-5, rtol=0)
FILES = {"lynx": "lynx_tiny", "mplug_owl2": "mplug_owl2_tiny", "llava_phi": "llava_phi_tiny", "open_flamingo": "openflamingo_tiny",
         "smolvlm": "smolvlm_tiny"}
BACKENDS = pytest.mark.parametrize("backend", ["reference", "sdpa"])


@functools.cache
def opened(family):
    """The golden file of a family, its recipe's model with the file's weights, and the rename table."""
    golden, published = read(GOLDEN / f"{FILES[family]}.safetensors"), recipes.FAMILIES[family]
    model, table = published.build(golden.config), published.layout(golden.config)
    model.load_state_dict(to_ours(table, golden.weights, model.state_dict()))
    return golden, model.eval(), table


def batch_of(ids, labels=None, pixels=None, num_frames=1, positions=None, segments=None, shown=None, owner=None):
    """A Batch: what is not given is one picture a row, or none, and one document a row."""
    shown = torch.arange(0 if pixels is None else len(ids)) if shown is None else shown
    return Batch(
        ids=ids,
        labels=torch.full_like(ids, IGNORE) if labels is None else labels,
        segments=torch.zeros_like(ids) if segments is None else segments,
        positions=torch.arange(ids.shape[1]).expand_as(ids) if positions is None else positions,
        pixels=pixels, frames=torch.full((len(shown),), num_frames), shown=shown, owner=shown if owner is None else owner,
    )  # fmt: skip


def lynx_batch(golden, pixels, num_frames):
    """Image tokens first, then the text; pads between them move to the front, real tokens keep official positions."""
    image = torch.full((2, golden.config["bridge"]["num_latents"]), IMAGE_TOKEN)
    ids = torch.cat([image, golden.inputs["input_ids"]], dim=1)
    real = torch.cat([torch.ones_like(image), golden.inputs["attention_mask"]], dim=1)
    order = real.argsort(dim=1, stable=True)  # pads first
    segments = real.gather(1, order) - 1
    batch = batch_of(ids.gather(1, order), None, pixels, num_frames, positions=order, segments=segments)
    return batch, order.argsort(dim=1), real.bool()


def spliced(golden, num_image_tokens):
    """Each -200 becomes a picture's image tokens, whose labels are ignored."""
    ids, labels = [], []
    for row, row_labels in zip(golden.inputs["input_ids"].tolist(), golden.inputs["labels"].tolist()):
        at = row.index(-200)
        ids.append(row[:at] + [IMAGE_TOKEN] * num_image_tokens + row[at + 1 :])
        labels.append(row_labels[:at] + [IGNORE] * num_image_tokens + row_labels[at + 1 :])
    return batch_of(torch.tensor(ids), torch.tensor(labels), golden.inputs["pixel_values"])


def encoded(model, batch):
    """Image tokens of all visual inputs: float[M, N, W]."""
    return torch.stack(model.encode(batch.pixels, batch.frames))


def check_language(model, golden, batch):
    """Logits and loss of a batch are the official ones."""
    close(model(batch), golden.outputs["logits"])
    loss, trained = model.loss(batch)
    close(loss / trained, golden.outputs["loss"][0])


@BACKENDS
def test_lynx(backend):
    golden, model, _ = opened("lynx")
    model.set_backend(backend)
    image, video = golden.inputs["pixel_values"], golden.inputs["video"]
    close(model.vision(image), golden.outputs["vision_features"])
    for pixels, num_frames, tokens, logits in (
        (image, 1, "visual_tokens", "logits"),
        (video.flatten(0, 1), 3, "video_tokens", "video_logits"),
    ):
        batch, columns, real = lynx_batch(golden, pixels, num_frames)
        close(encoded(model, batch), golden.outputs[tokens])
        found = model(batch)[torch.arange(2)[:, None], columns]
        assert real.sum() == 2 * 14 - 3  # the logits of the three pads mean nothing
        close(found[real], golden.outputs[logits][real])


@BACKENDS
def test_mplug_owl2(backend):
    golden, model, _ = opened("mplug_owl2")
    model.set_backend(backend)
    pixels = golden.inputs["pixel_values"]
    close(model.vision(pixels), golden.outputs["vision_features"])
    batch = spliced(golden, model.num_image_tokens(pixels.shape[-1]))
    close(encoded(model, batch), golden.outputs["visual_tokens"])
    check_language(model, golden, batch)
    text = golden.inputs["text_ids"]
    close(model(batch_of(text)), golden.outputs["text_logits"])


@BACKENDS
def test_llava_phi(backend):
    golden, model, _ = opened("llava_phi")
    model.set_backend(backend)
    batch = spliced(golden, model.num_image_tokens(golden.inputs["pixel_values"].shape[-1]))
    close(encoded(model, batch), golden.outputs["visual_tokens"])
    check_language(model, golden, batch)


@BACKENDS
def test_open_flamingo(backend):
    golden, model, _ = opened("open_flamingo")
    model.set_backend(backend)
    features, ids = golden.inputs["vision_features"], golden.inputs["input_ids"]  # 2 rows of 2 pictures of 1 frame
    tokens = torch.stack(model.encode_features(features.flatten(0, 2), torch.ones(4, dtype=torch.long)))
    close(tokens.unflatten(0, (2, 2)), golden.outputs["visual_tokens"])
    hidden = model.hidden(batch_of(ids, shown=torch.arange(4), owner=torch.tensor([0, 0, 1, 1])), image_tokens=list(tokens))
    close(model.decoder.logits(hidden), golden.outputs["logits"])


def test_smolvlm():
    """Features, image tokens, logits, loss and greedy text of all its cases: one square, tiles, a batch, a mask, text."""
    found = verdicts(opened("smolvlm")[0])
    assert len(found) == 24 and all(agrees for agrees, _ in found), found


@pytest.mark.parametrize("family", FILES)
def test_what_is_read_can_be_written_again(family):
    """Bit for bit, and without what is computed or tied."""
    golden, model, table = opened(family)
    written = to_published(table, model.state_dict())
    for name, tensor in written.items():
        assert torch.equal(tensor, golden.weights[name]), name
    left = {name for name in golden.weights.keys() - written.keys() if not name.endswith(("inv_freq", "_pos_embed"))}
    assert left <= {"lang_encoder.lm_head.weight"}  # OPT's head is its embedding
