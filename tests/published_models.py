"""Comparing whole models with transformers': rows of words and pictures as batches, gradients under our names."""

import torch
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence

from nanovlm import recipes
from nanovlm.data.tokenizer import train_tokenizer
from nanovlm.recipes.__main__ import main
from nanovlm.vlm import Batch, IGNORE, IMAGE_TOKEN
from nanovlm.published.weights import to_ours
from parity import close


def make_batch(model, rows, side="right", pad=0):
    """Put rows side by side.

    Args:
      model: vlm.VLM. rows: list of lists whose items are ids, or pictures and clips: float[f, 3, H, W].
      side: where padding stands. pad: id of the padding.
    Returns: vlm.Batch; every word is trained, image tokens and padding are not.
    """
    written = [torch.tensor([id for item in row for id in write(model, item)]) for row in rows]
    ids = pad_sequence(written, True, pad, side)
    real = pad_sequence([torch.ones_like(row) for row in written], True, 0, side)
    visuals = [(number, item) for number, row in enumerate(rows) for item in row if torch.is_tensor(item)]
    none = torch.zeros(0, dtype=torch.long)
    return Batch(
        ids=ids,
        labels=torch.where((real == 1) & (ids >= 0), ids, IGNORE),
        segments=real - 1,
        positions=(real.cumsum(1) - 1).clamp(min=0),
        pixels=torch.cat([item for _, item in visuals]) if visuals else None,
        frames=torch.tensor([len(item) for _, item in visuals]) if visuals else none,
        shown=torch.arange(len(visuals)),
        owner=torch.tensor([number for number, _ in visuals]) if visuals else none,
    )


def write(model, item):
    """The ids of one item of a row: list of int."""
    if not torch.is_tensor(item):
        return [item]
    if model.media_token is not None:
        return [model.media_token]
    return [IMAGE_TOKEN] * model.num_image_tokens(item.shape[-1], len(item))


def real_logits(model, batch):
    """Scores where no padding stands: list over rows of float[t, V]."""
    return [logits[segments >= 0] for logits, segments in zip(model(batch), batch.segments)]


def as_published(batch, image_token):
    """A batch as transformers takes it: keyword arguments without the pictures; image tokens have an id there."""
    ids = torch.where(batch.ids == IMAGE_TOKEN, image_token, batch.ids)
    return dict(input_ids=ids, attention_mask=(batch.segments >= 0).long())


def same_gradients(ours, theirs, layout, folder=None, unused=()):
    """Every parameter of ours has the gradient of theirs; those under `unused` have none.

    Args:
      ours: a model of ours. theirs: one of transformers. layout: rename table. folder: None if it knows the names of their
        parameters; else an empty one: their gradients are saved there as if they were weights. unused: our prefixes.
    """
    weights = {name: parameter.data for name, parameter in theirs.named_parameters()}
    expected = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in theirs.named_parameters()}
    if folder is not None:
        for name, parameter in theirs.named_parameters():
            parameter.data = expected[name]
        theirs.save_pretrained(folder)
        expected = load_file(folder / "model.safetensors")
        for name, parameter in theirs.named_parameters():
            parameter.data, parameter.grad = weights[name], None
    expected = to_ours(layout, expected, ours.state_dict())
    for name, parameter in ours.named_parameters():
        assert (parameter.grad is None) == name.startswith(tuple(unused)), name
        if parameter.grad is not None:
            atol = 1e-5 * max(1.0, float(expected[name].abs().max()))
            close(parameter.grad, expected[name], atol, msg=lambda text: f"{name}: {text}")


def there_and_back(theirs, folder):
    """Save a model of transformers in shards, open it, convert it to our folder and back.

    Args:
      theirs: a model of transformers of at least 320 words. folder: an empty one.
    Returns: (generation.chat.Assistant, their model read from what was converted back).
    """
    theirs.save_pretrained(folder / "published", max_shard_size="60KB")
    assert len(list((folder / "published").glob("*.safetensors"))) > 2
    train_tokenizer(["what is in the picture? a red circle"] * 9, 320).save(folder / "published" / "tokenizer.json")
    assert main(["convert", str(folder / "published"), str(folder / "ours")]) == 0
    assert main(["convert", "--to", "published", str(folder / "ours"), str(folder / "back")]) == 0
    back, loading = type(theirs).from_pretrained(folder / "back", config=theirs.config, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading
    return recipes.load(folder / "published"), back.eval()
