"""Does the port give what the official code gave? A golden file, run through the recipe and compared tensor by tensor.

    python tests/official/compare.py FILE.safetensors …

A golden file (golden.py) is a small model of any size with random weights under their published names, inputs, and the
outputs of the official code. The model is built from the file's config by the recipe, its weights go through the
recipe's rename table, and every output must agree to 1e-5: float32 on another machine moves a correct port by less
than half of that. Weights and outputs that are missing, left over or of another shape end the comparison as well.

A file's ids are those before pictures are put in: Lynx has none and puts its image tokens in front, mPLUG-Owl2 and
LLaVA-Phi hold a placeholder, OpenFlamingo an ordinary media token. Where a file has attention_mask, what it hides counts
neither as a key nor in the comparison. SmolVLM's files hold several cases, each with inputs and outputs of its own; tiles
of zeros are none, and patches that a mask hides move behind the others, positions spread over the whole table.

B rows, T tokens, M pictures, W width
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F

from golden import GoldenError, read, settled
from nanovlm.abstractor import patch_positions
from nanovlm.attention import sincos, Visible
from nanovlm.cross_attention import Media, latest_picture
from nanovlm.generation.sampler import Decoding, generate
from nanovlm.published.weights import plan, shapes_of, to_ours
from nanovlm.recipes import llava_phi, lynx, mplug_owl2, open_flamingo, smolvlm
from nanovlm.vlm import IGNORE, IMAGE_TOKEN

TOLERANCE = 1e-5  # largest difference of a value; of SmolVLM twice that
PLACEHOLDER = -200  # stands in the ids where LLaVA's descendants put a picture
RECIPES = {"lynx": lynx, "mplug_owl2": mplug_owl2, "llava_phi": llava_phi, "open_flamingo": open_flamingo, "smolvlm": smolvlm}


def build(golden):
    """The model of a golden file with its weights: vlm.VLM, float32. Raises: ValueError for what does not fit."""
    recipe = RECIPES[golden.family]
    config = settled(golden, getattr(recipe, "nested", dict)(golden.config))
    model, table = recipe.build(config), recipe.LAYOUT(config)
    renamed = to_ours(table, golden.weights, model.state_dict())
    model.load_state_dict({name: tensor.float() for name, tensor in renamed.items()})
    for name in plan(table, {name: tensor.shape for name, tensor in golden.weights.items()}, shapes_of(model)).skipped:
        check_computed(name, golden.weights[name].float(), model)
    return model.eval()


def check_computed(name, tensor, model):
    """Raise GoldenError for a table in the file that is not the one that the model computes."""
    config, tower = model.decoder.config, model.vision
    if name.endswith("inv_freq"):
        expected = config.rope_base ** (-torch.arange(0, config.num_rotary, 2) / config.num_rotary)
    elif name.endswith("q_pos_embed"):
        expected = sincos(*model.bridge.queries.shape)
    elif name.endswith("k_pos_embed"):
        expected = patch_positions(tower.num_tokens(tower.image_size), tower.config.width)
    else:
        return
    if tensor.shape != expected.shape or bool((tensor - expected).abs().max() > TOLERANCE):
        raise GoldenError(f"weights/{name} is no parameter but a table, and not the one that the model computes")


class Rows:
    """Rows of ids with pictures among them, as the official code lines them up.

    ids: int[B, T], IMAGE_TOKEN where an image token stands. labels: int[B, T]. real: bool[B, T], may be attended to.
    positions: int[B, T]. shown: list of int, which picture stands at each appearance.
    """

    def __init__(self, ids, real, labels=None, positions=None, shown=()):
        self.ids, self.real, self.labels, self.shown = ids, real, labels, list(shown)
        self.positions = torch.arange(ids.shape[1]).expand_as(ids) if positions is None else positions

    def results(self, model, image_tokens=(), media=None, text_ids=None):
        """What every file may have: {"logits", "loss", "text_logits"}, as `run_lynx`; text_ids: rows without pictures."""
        logits = self.logits(model, image_tokens, media)
        found = {"logits": (logits, self.real)}
        if self.labels is not None:  # each predicted by the logits before it
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), self.labels[:, 1:].flatten(), ignore_index=IGNORE)
            found["loss"] = loss[None], None
        if text_ids is not None:
            found["text_logits"] = Rows(text_ids, torch.ones_like(text_ids, dtype=torch.bool)).logits(model), None
        return found

    def logits(self, model, image_tokens=(), media=None):
        """float[B, T, V] in the rows' own order.

        A mask is one interval of keys, so whatever may not be attended to is moved to the front of its row, and every
        token sees what is real from there on up to its own place; then the logits come back to where they belong.
        """
        order = self.real.long().argsort(dim=1, stable=True)
        embeddings = model.embed(self.ids, image_tokens, self.shown)
        hidden_keys = (~self.real).sum(dim=1, keepdim=True)
        seen = self.real.long().cumsum(dim=1).gather(1, order)  # B T
        visible = Visible(hidden_keys.expand_as(seen), hidden_keys + seen).check(seen.shape[1])
        if media is not None:
            latest = latest_picture(self.ids == model.media_token, torch.zeros_like(self.ids), media.shape[2])
            latest = Visible(latest.first.gather(1, order), latest.stop.gather(1, order))
            media = Media(media.flatten(1, 2), latest.check(media.shape[1] * media.shape[2]))
        moved = embeddings.gather(1, order[..., None].expand_as(embeddings))
        modality = (self.ids == IMAGE_TOKEN).long().gather(1, order)
        hidden = model.decoder(moved, self.positions.gather(1, order), visible, modality, media=media)
        return model.decoder.logits(hidden.gather(1, order.argsort(dim=1)[..., None].expand_as(hidden)))


def run_lynx(model, pixel_values, video, input_ids, real, labels=None, text_ids=None):
    """All outputs of a Lynx file: {name: (Tensor, bool mask over its first axes of what counts, or None for all)}.

    Image tokens stand in front of every row, whose padding then lies between them and the text.
    """
    image = torch.full((len(input_ids), model.bridge.num_latents), IMAGE_TOKEN)
    labels = None if labels is None else torch.cat([torch.full_like(image, IGNORE), labels], dim=1)
    rows = Rows(torch.cat([image, input_ids], dim=1), torch.cat([image == IMAGE_TOKEN, real], dim=1), labels,
                shown=range(len(input_ids)))
    features, clips = model.vision(pixel_values), model.vision(video.flatten(0, 1))
    if video.shape[1] == 1:  # of one frame, but a clip: the bridge takes it for a picture and does not mark it
        clips = clips + model.bridge.frame_embedding[0]
    frames = torch.ones(len(input_ids), dtype=torch.long)
    tokens, video_tokens = model.encode_features(features, frames), model.encode_features(clips, frames * video.shape[1])
    results = {"vision_features": (features, None), "visual_tokens": (torch.stack(tokens), None),
               "video_tokens": (torch.stack(video_tokens), None), "video_logits": (rows.logits(model, video_tokens), rows.real)}
    return results | rows.results(model, tokens, text_ids=text_ids)


def run_spliced(model, pixel_values, input_ids, real, labels=None, text_ids=None):
    """All outputs of an mPLUG-Owl2 or LLaVA-Phi file: placeholders become image tokens, shorter rows are padded."""
    per_place = pixel_values.shape[1] if pixel_values.ndim == 5 else 1  # several pictures at one placeholder
    features = model.vision(pixel_values.flatten(0, -4))
    tokens = model.encode_features(features, torch.full((len(features) // per_place,), per_place))
    labels = torch.full_like(input_ids, IGNORE) if labels is None else labels
    rows, shown, used = [], [], 0
    for ids, row_labels, mask in zip(input_ids.tolist(), labels.tolist(), real.tolist()):
        row = []
        for id, label in zip(ids, row_labels):
            row += [(IMAGE_TOKEN, IGNORE)] * len(tokens[0]) if id == PLACEHOLDER else [(id, label)]
        count = ids.count(PLACEHOLDER)
        shown += range(used, used + count)
        used += count or 1  # a row without a placeholder has a picture all the same, which it does not show
        # the official code puts all that a row gains in front of its mask, wherever the pictures stand
        rows.append([(*both, seen) for both, seen in zip(row, [True] * (len(row) - len(ids)) + mask)])
    if used != len(tokens):
        raise GoldenError(f"in/pixel_values has {len(tokens)} pictures, but the rows of in/input_ids ask for {used}")
    width = max(map(len, rows))
    ids, labels, real = torch.tensor([row + [(0, IGNORE, False)] * (width - len(row)) for row in rows]).unbind(-1)
    results = {"vision_features": (features, None), "visual_tokens": (torch.stack(tokens), None)}
    return results | Rows(ids, real.bool(), labels, shown=shown).results(model, tokens, text_ids=text_ids)


def run_open_flamingo(model, vision_features, input_ids, real, labels=None, text_ids=None):
    """All outputs of an OpenFlamingo file, which starts from the tower's features: [B, pictures, frames, features, W]."""
    if (input_ids == model.media_token).sum(dim=1).max() > vision_features.shape[1]:
        raise GoldenError(f"a row has more media tokens than there are pictures, {vision_features.shape[1]}")
    tokens = model.bridge(vision_features.flatten(2, 3).flatten(0, 1)).unflatten(0, vision_features.shape[:2])
    positions = (real.long().cumsum(dim=1) - 1).clamp(min=0)  # OPT counts without the padding
    rows = Rows(input_ids, real, labels, positions)
    return {"visual_tokens": (tokens, None)} | rows.results(model, media=tokens, text_ids=text_ids)


def seen_patches(vision, tiles, mask):
    """(embeddings, features), float[F, N, W] each, of tiles of which mask, int[F, S, S], shows a part."""
    patch, side = vision.config.patch_size, math.isqrt(len(vision.positions))
    real = F.max_pool2d(mask.float(), patch) > 0  # F rows columns
    edges = torch.arange(1 / side, 1, 1 / side)
    rows, columns = (torch.bucketize((torch.arange(side) * (1 / count[:, None])).clamp(max=1 - 1e-6), edges, right=True)
                     for count in (real[:, :, 0].sum(1), real[:, 0].sum(1)))
    places = (rows[:, :, None] * side + columns[:, None]) * real
    x = vision.patch_embedding(tiles).flatten(2).transpose(1, 2) + vision.positions[places.flatten(1)]
    order = real.flatten(1).long().argsort(dim=1, descending=True, stable=True)[..., None].expand_as(x)
    stop = real.sum((1, 2))[:, None].expand(-1, x.shape[1])
    features = x.gather(1, order)
    for block in vision.blocks:
        features = block(features, Visible(torch.zeros_like(stop), stop), vision.backend)
    return x, vision.post_norm(features).gather(1, order.argsort(1))


def run_smolvlm(model, input_ids, real, image_token, pixel_values=None, pixel_attention_mask=None, labels=None, prompt_ids=None):
    """All outputs of a case of a SmolVLM file; image_token: the id that stands where an image token does."""
    found, tokens, tiles = {}, [], torch.empty(0)
    if pixel_values is not None:
        tiles, mask = pixel_values.flatten(0, 1), torch.ones_like(pixel_values[:, :, 0])
        mask = (mask if pixel_attention_mask is None else pixel_attention_mask).flatten(0, 1)
        shown = tiles.flatten(1).any(1)
        tiles, mask = tiles[shown], mask[shown]
        embeddings, features = seen_patches(model.vision, tiles, mask)
        if mask.all():
            features = model.vision(tiles)
        tokens = model.encode_features(features, torch.ones(len(tiles), dtype=torch.long))
        found = {"vision_embeddings": (embeddings, None), "vision_features": (features, None),
                 "image_tokens": (torch.stack(tokens), None)}
    ids = torch.where(input_ids == image_token, IMAGE_TOKEN, input_ids)
    if prompt_ids is not None:
        prompts = torch.where(prompt_ids == image_token, IMAGE_TOKEN, prompt_ids).tolist()
        visual_inputs = [[tiles]] if len(tiles) else [[]]
        found["greedy_ids"] = torch.tensor(generate(model, prompts, Decoding(max_new_tokens=12), visual_inputs)), None
    return found | Rows(ids, real, labels, shown=range(len(tokens))).results(model, tokens)


FAMILIES = {  # how it runs, outputs that its files must have
    "lynx": (run_lynx, ("vision_features", "visual_tokens", "video_tokens", "logits", "video_logits")),
    "mplug_owl2": (run_spliced, ("vision_features", "visual_tokens", "logits", "loss", "text_logits")),
    "llava_phi": (run_spliced, ("visual_tokens", "logits", "loss")),
    "open_flamingo": (run_open_flamingo, ("visual_tokens", "logits")),
    "smolvlm": (run_smolvlm, ("logits",)),
}


@torch.no_grad()
def verdicts(golden):
    """One line per output: list of (bool agrees, str). Raises: ValueError and others for what cannot be run."""
    model, lines = build(golden), []
    for case in sorted({name.rpartition("/")[0] for name in (*golden.inputs, *golden.outputs)}):
        inputs, outputs = ({name.rpartition("/")[2]: tensor for name, tensor in tensors.items() if name.rpartition("/")[0] == case}
                           for tensors in (golden.inputs, golden.outputs))
        lines += verdicts_of(golden, model, inputs, outputs, f"{case}/" * bool(case))
    return lines


def verdicts_of(golden, model, inputs, outputs, case=""):
    """The `verdicts` on inputs and outputs, {name: Tensor} each, of one case."""
    execute, wanted = FAMILIES[golden.family]
    inputs = {name: tensor.float() if tensor.is_floating_point() else tensor.long() for name, tensor in inputs.items()}
    ids, lines, tolerance = inputs["input_ids"], [], TOLERANCE
    inputs["real"] = inputs.pop("attention_mask", torch.ones_like(ids)).bool()
    if golden.family == "smolvlm":
        inputs["image_token"], tolerance = golden.config["image_token_id"], 2 * TOLERANCE
    for name in ("real", "labels"):
        if name in inputs and inputs[name].shape != ids.shape:
            raise GoldenError(f"what stands beside in/input_ids {list(ids.shape)} must be equal in shape")
    results = execute(model, **inputs)
    for name in [*outputs, *(name for name in wanted if name not in outputs)]:
        expected, (found, mask) = outputs.get(name), results.get(name, (None, None))
        expected = expected[None] if expected is not None and expected.ndim == 0 else expected  # a loss
        if found is None or expected is None:
            lines.append((False, f"{case}{name:16} {'unknown' if found is None else 'missing'}"))
        elif found.shape != expected.shape:
            shapes = f"the file has {list(expected.shape)}, the model gives {list(found.shape)}"
            lines.append((False, f"{case}{name:16} misshapen: {shapes}"))
        else:
            difference = (found - expected.float()).abs()
            largest = float((difference if mask is None else difference[mask]).max())
            agrees = largest <= tolerance  # false for NaN
            lines.append((agrees, f"{case}{name:16} largest difference {largest:.1e}  {'agrees' if agrees else 'DIFFERS'}"))
    return lines


def main(path):
    """Compare a file and print what came out: int, the exit code, 0 if every output agrees, otherwise 1."""
    try:
        golden = read(path)
        lines = verdicts(golden)
    except (ValueError, RuntimeError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        print(f"{path}: cannot be compared. {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(f"{path}: {golden.family}")
    print("\n".join(line for _, line in lines))
    return 0 if all(agrees for agrees, _ in lines) else 1


if __name__ == "__main__":
    sys.exit(max(main(path) for path in sys.argv[1:]))
