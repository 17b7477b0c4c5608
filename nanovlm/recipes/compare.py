"""Does the port give what the official code gave? A golden file, run through the recipe and compared tensor by tensor.

    python -m nanovlm.recipes compare GOLDEN.safetensors

A golden file (golden.py) is a small model of any size with random weights under their published names, inputs, and the
outputs of the official code. The model is built from the file's config by the recipe, its weights go through the
recipe's rename table, and every output must agree to 1e-5: float32 on another machine moves a correct port by less
than half of that. Weights and outputs that are missing, left over or of another shape end the comparison as well.

B rows, T tokens, M pictures, W width
"""

import sys

import torch
import torch.nn.functional as F

from nanovlm.abstractor import patch_positions
from nanovlm.cross_attention import Media, latest_picture
from nanovlm.names import nearest
from nanovlm.recipes import llava_phi, lynx, mplug_owl2, open_flamingo
from nanovlm.recipes.golden import GoldenError, read
from nanovlm.recipes.golden_sizes import settle
from nanovlm.vit import sincos
from nanovlm.vlm import IGNORE, IMAGE_TOKEN, visible_rows
from nanovlm.weights import plan, to_ours

TOLERANCE = 1e-5  # largest difference of a value
PLACEHOLDER = -200  # stands in the ids where LLaVA's descendants put a picture
RECIPES = {"lynx": lynx, "mplug_owl2": mplug_owl2, "llava_phi": llava_phi, "open_flamingo": open_flamingo}


def build(golden):
    """The model of a golden file with its weights, float32, in evaluation mode.

    Args:
      golden: golden.Golden.
    Returns: (vlm.VLM, dict: the completed config).
    Raises: ValueError (GoldenError, WeightsError) for sizes or weights that do not fit.
    """
    recipe = RECIPES[golden.family]
    config = settle(golden.family, getattr(recipe, "nested", dict)(golden.config), golden.weights)
    try:
        model = recipe.build(config)
    except (TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise GoldenError(f"config: a value has the wrong type, or makes no sense ({type(error).__name__}: {error})") from error
    state = model.state_dict()
    renamed = to_ours(recipe.LAYOUT(config), golden.weights, state, "weights/")
    model.load_state_dict({name: tensor.float() for name, tensor in renamed.items()})
    found = plan(recipe.LAYOUT(config), {name: tuple(tensor.shape) for name, tensor in golden.weights.items()}, 
                 {name: tuple(tensor.shape) for name, tensor in state.items()})
    for name in found.computed:
        check_computed(name, golden.weights[name].float(), model)
    return model.eval(), config


def check_computed(name, tensor, model):
    """Raise GoldenError for a table in the file that is not the one that the model computes."""
    config = model.decoder.config
    if name.endswith("inv_freq"):
        expected = config.rope_base ** (-torch.arange(0, config.num_rotary, 2) / config.num_rotary)
    elif name.endswith("q_pos_embed"):
        expected = sincos(*model.bridge.queries.shape)
    elif name.endswith("k_pos_embed"):
        expected = patch_positions(model.vision.num_tokens(model.vision.image_size), model.vision.config.width)
    else:
        return
    if tensor.shape != expected.shape or bool((tensor - expected).abs().max() > TOLERANCE):
        raise GoldenError(f"weights/{name} is no parameter but a table, and not the one that the model computes")


def take(inputs, name, kind, num_axes):
    """An input: Tensor. Raises: GoldenError if it is absent or not of the kind ("pixels", "ids") and number of axes."""
    if name not in inputs:
        raise GoldenError(f"in/{name} is missing; there are {', '.join(inputs)}")
    tensor = inputs[name]
    if tensor.ndim not in num_axes or tensor.is_floating_point() != (kind == "pixels"):
        raise GoldenError(f"in/{name} is {tensor.dtype} {list(tensor.shape)}; {kind} with {num_axes} axes were expected")
    return tensor.float() if kind == "pixels" else tensor.long()


def attended(inputs, ids):
    """bool[B, T], which ids may be attended to: in/attention_mask, or all."""
    if "attention_mask" not in inputs:
        return torch.ones_like(ids, dtype=torch.bool)
    return beside(take(inputs, "attention_mask", "ids", (2,)), ids, "attention_mask").bool()


def beside(tensor, ids, name):
    """A tensor that stands beside the ids. Raises: GoldenError if its shape is another."""
    if tensor.shape != ids.shape:
        raise GoldenError(f"in/{name} is {list(tensor.shape)}, in/input_ids {list(ids.shape)}; the shapes must be equal")
    return tensor


class Rows:
    """Rows of ids with pictures among them, as the official code lines them up.

    ids: int[B, T], IMAGE_TOKEN where an image token stands. labels: int[B, T]. real: bool[B, T], may be attended to.
    positions: int[B, T]. shown: list of int, which picture stands at each appearance.
    """

    def __init__(self, ids, real, labels=None, positions=None, shown=()):
        self.ids, self.real, self.shown = ids, real, list(shown)
        self.labels = torch.full_like(ids, IGNORE) if labels is None else labels
        self.positions = torch.arange(ids.shape[1]).expand_as(ids) if positions is None else positions

    def logits(self, model, image_tokens=(), media=None):
        """float[B, T, V] in the rows' own order.

        A mask is one interval of keys, so whatever may not be attended to is moved to the front of its row; positions
        go along, and the logits come back to where they belong.
        """
        order = self.real.long().argsort(dim=1, stable=True)
        segments = self.real.long().gather(1, order) - 1
        embeddings = model.embed(self.ids, image_tokens, self.shown)
        moved = embeddings.gather(1, order[..., None].expand_as(embeddings))
        if media is not None:
            is_media = self.ids.gather(1, order) == model.media_token
            media = Media(media.flatten(1, 2), latest_picture(is_media, segments, media.shape[2]))
            media.visible.check(media.tokens.shape[1])
        modality = (self.ids == IMAGE_TOKEN).long().gather(1, order)
        positions = self.positions.gather(1, order)
        hidden = model.decoder(moved, positions, visible_rows(segments), modality, media=media)
        back = order.argsort(dim=1)[..., None].expand_as(hidden)
        return model.decoder.logits(hidden.gather(1, back))

    def loss(self, logits):
        """float[1], mean cross-entropy of the labelled tokens, each predicted by the logits before it."""
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), self.labels[:, 1:].flatten(), ignore_index=IGNORE)[None]


def image_first(ids, real, num_image_tokens):
    """Lynx: image tokens in front of every row, whose padding then lies between them and the text: Rows."""
    image = torch.full((len(ids), num_image_tokens), IMAGE_TOKEN)
    return Rows(
        torch.cat([image, ids], dim=1), torch.cat([torch.ones_like(image, dtype=torch.bool), real], dim=1),
        shown=range(len(ids)),
    )  # fmt: skip


def spliced(ids, real, labels, num_pictures, num_image_tokens):
    """mPLUG-Owl2 and LLaVA-Phi: every placeholder becomes a picture's image tokens; shorter rows are padded: Rows.

    Raises: GoldenError if the pictures are not as many as the placeholders.
    """
    rows, row_labels, shown, used = [], [], [], 0
    for one, its_labels in zip(ids.tolist(), labels.tolist()):
        row, new_labels = [], []
        for token, label in zip(one, its_labels):
            picture = token == PLACEHOLDER
            row += [IMAGE_TOKEN] * num_image_tokens if picture else [token]
            new_labels += [IGNORE] * num_image_tokens if picture else [label]
        count = one.count(PLACEHOLDER)
        shown += range(used, used + count)
        used += count or 1  # a row without a placeholder has a picture all the same, which it does not show
        rows.append(row)
        row_labels.append(new_labels)
    if used != num_pictures:
        raise GoldenError(f"in/pixel_values has {num_pictures} pictures, but the rows of in/input_ids ask for {used}")
    width = max(map(len, rows))
    new_real = torch.zeros(len(rows), width, dtype=torch.bool)
    for place, row in enumerate(rows):
        # the official code puts all that a row gains in front of its mask, wherever the pictures stand
        new_real[place, : len(row)] = torch.cat([torch.ones(len(row) - ids.shape[1], dtype=torch.bool), real[place]])
    padded, padded_labels = (
        torch.tensor([row + [pad] * (width - len(row)) for row in some]) for some, pad in ((rows, 0), (row_labels, IGNORE))
    )
    return Rows(padded, new_real, padded_labels, shown=shown)


def text_rows(golden):
    """in/text_ids, rows without pictures: Rows."""
    ids = take(golden.inputs, "text_ids", "ids", (2,))
    return Rows(ids, torch.ones_like(ids, dtype=torch.bool))


def run_lynx(model, golden):
    """All outputs of a Lynx file: {name: (Tensor, bool mask of what counts, or None)}."""
    inputs = golden.inputs
    ids = take(inputs, "input_ids", "ids", (2,))
    rows = image_first(ids, attended(inputs, ids), model.bridge.num_latents)
    pixels, video = take(inputs, "pixel_values", "pixels", (4,)), take(inputs, "video", "pixels", (5,))
    for name, pictures in (("pixel_values", pixels), ("video", video)):
        if len(pictures) != len(ids):
            raise GoldenError(f"in/{name} has {len(pictures)} visual inputs for {len(ids)} rows of in/input_ids")
    results = {"vision_features": (model.vision(pixels), None)}
    frames = torch.ones(len(ids), dtype=torch.long)
    for pictures, count, tokens, logits in (
        (pixels, 1, "visual_tokens", "logits"), (video.flatten(0, 1), video.shape[1], "video_tokens", "video_logits"),
    ):  # fmt: skip
        found = model.encode(pictures, frames * count)
        results[tokens] = torch.stack(found), None
        results[logits] = rows.logits(model, found), rows.real
    return results


def run_spliced(model, golden):
    """All outputs of an mPLUG-Owl2 or LLaVA-Phi file; as `run_lynx`."""
    inputs = golden.inputs
    ids = take(inputs, "input_ids", "ids", (2,))
    pixels = take(inputs, "pixel_values", "pixels", (4, 5))  # 5: several pictures at one placeholder
    labels = beside(take(inputs, "labels", "ids", (2,)), ids, "labels")
    per_place = pixels.shape[1] if pixels.ndim == 5 else 1
    features = model.vision(pixels.flatten(0, -4))
    frames = torch.full((len(features) // per_place,), per_place)
    tokens = model.encode_features(features, frames)
    rows = spliced(ids, attended(inputs, ids), labels, len(tokens), len(tokens[0]))
    logits = rows.logits(model, tokens)
    results = {"vision_features": (features, None), "visual_tokens": (torch.stack(tokens), None),
               "logits": (logits, rows.real), "loss": (rows.loss(logits), None)}
    if "text_ids" in inputs:
        results["text_logits"] = text_rows(golden).logits(model), None
    return results


def run_open_flamingo(model, golden):
    """All outputs of an OpenFlamingo file, which starts from the tower's features; as `run_lynx`."""
    inputs = golden.inputs
    ids = take(inputs, "input_ids", "ids", (2,))
    features = take(inputs, "vision_features", "pixels", (5,))  # B, pictures, frames, features, W
    if len(features) != len(ids):
        raise GoldenError(f"in/vision_features has {len(features)} rows, in/input_ids {len(ids)}")
    most = int((ids == model.media_token).sum(dim=1).max())
    if most > features.shape[1]:
        raise GoldenError(f"a row has {most} media tokens (id {model.media_token}), but there are {features.shape[1]} pictures")
    tokens = model.bridge(features.flatten(2, 3).flatten(0, 1)).unflatten(0, features.shape[:2])
    real = attended(inputs, ids)
    positions = (real.long().cumsum(dim=1) - 1).clamp(min=0)  # OPT counts without the padding
    labels = beside(take(inputs, "labels", "ids", (2,)), ids, "labels") if "labels" in inputs else None
    rows = Rows(ids, real, labels, positions)
    logits = rows.logits(model, media=tokens)
    results = {"visual_tokens": (tokens, None), "logits": (logits, real)}
    return results | ({"loss": (rows.loss(logits), None)} if labels is not None else {})


# family: (how it runs, inputs it knows, outputs that its files must have)
FAMILIES = {
    "lynx": (run_lynx, ("pixel_values", "video", "input_ids", "attention_mask"),
             ("vision_features", "visual_tokens", "video_tokens", "logits", "video_logits")),
    "mplug_owl2": (run_spliced, ("pixel_values", "input_ids", "attention_mask", "labels", "text_ids"),
                   ("vision_features", "visual_tokens", "logits", "loss", "text_logits")),
    "llava_phi": (run_spliced, ("pixel_values", "input_ids", "attention_mask", "labels", "text_ids"),
                  ("visual_tokens", "logits", "loss")),
    "open_flamingo": (run_open_flamingo, ("vision_features", "input_ids", "attention_mask", "labels"),
                      ("visual_tokens", "logits")),
}  # fmt: skip


@torch.no_grad()
def run(golden):
    """Run a golden file's inputs.

    Args:
      golden: golden.Golden.
    Returns: {output name: (Tensor, bool mask over its first axes of what counts, or None for everything)}.
    Raises: ValueError (GoldenError, WeightsError) for what cannot be run.
    """
    execute, known, _ = FAMILIES[golden.family]
    for name in golden.inputs:
        if name not in known:
            raise GoldenError(f"in/{name} is unknown to {golden.family}.{nearest(name, known)}")
    model, _ = build(golden)
    for name in ("input_ids", "text_ids"):
        if name in golden.inputs:
            check_ids(take(golden.inputs, name, "ids", (2,)), name, model.decoder.config.vocab_size)
    return execute(model, golden)


def check_ids(ids, name, vocab_size):
    """Raise GoldenError for ids outside the vocabulary that are no placeholder."""
    wrong = ids[((ids < 0) & (ids != PLACEHOLDER)) | (ids >= vocab_size)].tolist()
    if wrong:
        raise GoldenError(f"in/{name} holds {wrong[0]}, which is no id of the {vocab_size} in the vocabulary")


def verdicts(golden, results):
    """One line per output: list of (bool agrees, str).

    Args:
      golden: golden.Golden. results: as `run` returns.
    """
    lines = []
    for name, expected in golden.outputs.items():
        found, mask = results.get(name, (None, None))
        if found is None:
            lines.append((False, f"{name:16} unknown: {golden.family} gives {', '.join(results)}"))
        elif found.shape != expected.shape:
            lines.append((False, f"{name:16} misshapen: the file has {list(expected.shape)}, the model gives {list(found.shape)}"))
        else:
            difference = (found - expected.float()).abs()
            largest = float((difference if mask is None else difference[mask]).max())
            agrees = largest <= TOLERANCE  # false for NaN
            lines.append((agrees, f"{name:16} largest difference {largest:.1e}  {'agrees' if agrees else 'DIFFERS'}"))
    for name in FAMILIES[golden.family][2]:
        if name not in golden.outputs:
            lines.append((False, f"{name:16} missing: a file of {golden.family} has it"))
    return lines


def main(path):
    """Compare a file and print what came out.

    Args:
      path: str or Path of a golden file.
    Returns: int, the exit code: 0 if every output agrees, otherwise 1.
    """
    try:
        golden = read(path)
        lines = verdicts(golden, run(golden))
    except (ValueError, RuntimeError) as error:
        print(f"{path}: cannot be compared. {error}", file=sys.stderr)
        return 1
    print(f"{path}: {golden.family}")
    print("\n".join(line for _, line in lines))
    return 0 if all(agrees for agrees, _ in lines) else 1
