"""How each family turns the inputs of a golden file into its outputs, lined up as the official code does.

A file's ids are those before pictures are put in: Lynx has none and puts its image tokens in front, mPLUG-Owl2 and
LLaVA-Phi hold a placeholder, OpenFlamingo an ordinary media token. Where a file has attention_mask, what it hides counts
neither as a key nor in the comparison.

B rows, T tokens, M pictures, W width
"""

import torch
import torch.nn.functional as F

from nanovlm.attention import Visible
from nanovlm.cross_attention import Media, latest_picture
from golden import GoldenError
from nanovlm.vlm import IGNORE, IMAGE_TOKEN

PLACEHOLDER = -200  # stands in the ids where LLaVA's descendants put a picture


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

    def loss(self, logits):
        """float[1], mean cross-entropy of the labelled tokens, each predicted by the logits before it."""
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), self.labels[:, 1:].flatten(), ignore_index=IGNORE)[None]


def image_first(ids, real, num_image_tokens, labels=None):
    """Lynx: image tokens in front of every row, whose padding then lies between them and the text: Rows."""
    image = torch.full((len(ids), num_image_tokens), IMAGE_TOKEN)
    labels = ids * 0 + IGNORE if labels is None else labels
    return Rows(
        torch.cat([image, ids], dim=1), torch.cat([torch.ones_like(image, dtype=torch.bool), real], dim=1),
        torch.cat([torch.full_like(image, IGNORE), labels], dim=1), shown=range(len(ids)),
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


def on_the_side(model, inputs, rows, logits):
    """What a file may have besides: the loss of in/labels, and text_logits of in/text_ids, rows without pictures."""
    results = {}
    if "labels" in inputs:
        results["loss"] = rows.loss(logits), None
    if "text_ids" in inputs:
        ids = take(inputs, "text_ids", "ids", (2,))
        results["text_logits"] = Rows(ids, torch.ones_like(ids, dtype=torch.bool)).logits(model), None
    return results


def labels_of(inputs, ids):
    """in/labels, or None."""
    return beside(take(inputs, "labels", "ids", (2,)), ids, "labels") if "labels" in inputs else None


def run_lynx(model, golden):
    """All outputs of a Lynx file.

    Args:
      model: vlm.VLM with the file's weights. golden: golden.Golden.
    Returns: {name: (Tensor, bool mask over its first axes of what counts, or None for everything)}.
    Raises: GoldenError for inputs that are missing or do not go together.
    """
    inputs = golden.inputs
    ids = take(inputs, "input_ids", "ids", (2,))
    rows = image_first(ids, attended(inputs, ids), model.bridge.num_latents, labels_of(inputs, ids))
    pixels, video = take(inputs, "pixel_values", "pixels", (4,)), take(inputs, "video", "pixels", (5,))
    for name, pictures in (("pixel_values", pixels), ("video", video)):
        if len(pictures) != len(ids):
            raise GoldenError(f"in/{name} has {len(pictures)} visual inputs for {len(ids)} rows of in/input_ids")
    results = {"vision_features": (model.vision(pixels), None)}
    frames = torch.ones(len(ids), dtype=torch.long)
    clips = model.vision(video.flatten(0, 1))
    if video.shape[1] == 1:  # of one frame, but a clip: the bridge takes it for a picture and does not mark it
        clips = clips + model.bridge.frame_embedding[0]
    for features, count, tokens, logits in (
        (results["vision_features"][0], 1, "visual_tokens", "logits"), (clips, video.shape[1], "video_tokens", "video_logits"),
    ):  # fmt: skip
        found = model.encode_features(features, frames * count)
        results[tokens] = torch.stack(found), None
        results[logits] = rows.logits(model, found), rows.real
    return results | on_the_side(model, inputs, rows, results["logits"][0])


def run_spliced(model, golden):
    """All outputs of an mPLUG-Owl2 or LLaVA-Phi file; as `run_lynx`."""
    inputs = golden.inputs
    ids = take(inputs, "input_ids", "ids", (2,))
    pixels = take(inputs, "pixel_values", "pixels", (4, 5))  # 5: several pictures at one placeholder
    labels = labels_of(inputs, ids)
    per_place = pixels.shape[1] if pixels.ndim == 5 else 1
    features = model.vision(pixels.flatten(0, -4))
    frames = torch.full((len(features) // per_place,), per_place)
    tokens = model.encode_features(features, frames)
    labels = ids * 0 + IGNORE if labels is None else labels
    rows = spliced(ids, attended(inputs, ids), labels, len(tokens), len(tokens[0]))
    logits = rows.logits(model, tokens)
    results = {"vision_features": (features, None), "visual_tokens": (torch.stack(tokens), None), "logits": (logits, rows.real)}
    return results | on_the_side(model, inputs, rows, logits)


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
    rows = Rows(ids, real, labels_of(inputs, ids), positions)
    logits = rows.logits(model, media=tokens)
    return {"visual_tokens": (tokens, None), "logits": (logits, real)} | on_the_side(model, inputs, rows, logits)


# family: (how it runs, inputs it knows, outputs that its files must have)
ROWS = ("input_ids", "attention_mask", "labels", "text_ids")
FAMILIES = {
    "lynx": (
        run_lynx, ("pixel_values", "video", *ROWS),
        ("vision_features", "visual_tokens", "video_tokens", "logits", "video_logits"),
    ),
    "mplug_owl2": (
        run_spliced, ("pixel_values", *ROWS), ("vision_features", "visual_tokens", "logits", "loss", "text_logits"),
    ),
    "llava_phi": (run_spliced, ("pixel_values", *ROWS), ("visual_tokens", "logits", "loss")),
    "open_flamingo": (run_open_flamingo, ("vision_features", *ROWS), ("visual_tokens", "logits")),
}  # fmt: skip
