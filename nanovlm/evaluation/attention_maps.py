"""Where an answer's tokens looked: attention drawn as heat over the picture.

For every token of the answer, the decoder's attention from the place that predicted it to the image tokens, averaged
over heads and layers. If the bridge is a resampler, an image token is a latent that looked at the patches itself, so
both are multiplied: heat(token, patch) = sum over latents of decoder(token, latent) * resampler(latent, patch).
A map shows where information was read from, not why the answer came out as it did.

n answer tokens, L image tokens of a picture, N patches, M pictures, H heads
"""

import math

import torch
from matplotlib.figure import Figure

from nanovlm.attention import causal_rows
from nanovlm.data.images import to_square
from nanovlm.vlm import IMAGE_TOKEN

PANEL, MIN_WIDTH = 2.2, 5.0  # inches: side of one picture; of the figure, so that its title fits


@torch.no_grad()
def answer_heat(model, row, answer, visual_inputs):
    """Attention of each answer token to each place of the pictures.

    Args:
      model: vlm.VLM. row: data.templates.Row of the prompt. answer: list of n ids.
      visual_inputs: float32[1, 3, S, S] in the order of row.images.
    Returns: list of one float32[n, side, side] per picture, a cell per patch or per square of merged patches; the
      cells of a map add up to the share of the token's attention that went to this picture (less what a class token,
      or latents among themselves, took).
    Raises: ValueError for an empty answer, no picture, or a clip.
    """
    if not answer:
        raise ValueError("the answer has no token, so there is no attention to draw")
    if not visual_inputs or any(len(pixels) > 1 for pixels in visual_inputs):
        raise ValueError("attention is drawn over still images; show one")
    out = {}
    looks = answer_attention(model, row, answer, visual_inputs, out=out).mean(dim=(0, 1))  # n T
    heat, image_size = [], visual_inputs[0].shape[-1]  # pixels
    for (_, start, stop), latents in zip(row.images, latent_attention(out, len(visual_inputs), looks)):
        seen = looks[:, start:stop]  # n L
        if latents is None:  # an image token is a patch or a square of patches, behind a class token perhaps
            side = math.isqrt(stop - start)
            first = stop - start - side * side
        else:
            seen = seen @ latents  # n N
            side = math.isqrt(model.vision.num_patches(image_size))
            first = model.vision.num_tokens(image_size) - side * side
        heat.append(seen[:, first : first + side * side].unflatten(1, (side, side)).cpu())
    return heat


@torch.no_grad()
def answer_attention(model, row, answer, visual_inputs, as_text=False, out=None):
    """What the place that predicted each answer token looked at, in every layer and head.

    Args:
      model: vlm.VLM. row: data.templates.Row of the prompt. answer: list of n ids.
      visual_inputs: float32[f, 3, S, S] each, f frames, in the order of row.images.
      as_text: the decoder takes image tokens for words: modality-adaptive layers use the text's norms, keys and values.
      out: dict that receives the maps of decoder and bridge as they come; None = not wanted.
    Returns: float32[L, H, n, T] over L layers and T = prompt and answer but for its last token, which predicts nothing.
    Raises: ValueError for a model that reads pictures by cross-attention, where they stand in no row.
    """
    if model.media_token is not None:
        raise ValueError("this model reads its pictures by cross-attention: its words cannot look at image tokens")
    out = {} if out is None else out
    weight = model.decoder.embedding.weight
    frames = torch.tensor([len(pixels) for pixels in visual_inputs], dtype=torch.long)
    image_tokens = []
    if visual_inputs:
        image_tokens = model.encode(torch.cat(visual_inputs).to(weight.device, weight.dtype), frames, out)
    ids = torch.tensor([row.ids + answer[:-1]], device=weight.device)
    embeddings = model.embed(ids, image_tokens, range(len(image_tokens)))
    positions = torch.arange(ids.shape[1], device=weight.device)[None]
    modality = (ids == IMAGE_TOKEN).long() * (not as_text)
    model.decoder(embeddings, positions, causal_rows(1, ids.shape[1], weight.device), modality, out=out)
    return torch.stack([maps[0, :, len(row.ids) - 1 :] for maps in out["attention"]]).float()


def latent_attention(out, num_pictures, like):
    """What the latents of a resampler looked at, averaged over heads and layers.

    Returns: list of M float32[L, N], or of None where image tokens are the patches themselves.
    """
    if "latents" not in out:
        return [None] * num_pictures
    return list(torch.stack(out["latents"]).to(like).mean(dim=(0, 2)))


def draw(path, pictures, heat, words, image_size, fit, title):
    """Save one panel per answer token and picture.

    Args:
      path: of the PNG. pictures: list of PIL RGB images. heat: as `answer_heat` gives it.
      words: text of each answer token. image_size, fit: how the pictures were shown to the model.
      title: what stands above all panels.
    """
    figure = Figure(figsize=(max(PANEL * len(words) + 1, MIN_WIDTH), PANEL * len(pictures) + 1), layout="constrained")
    axes = figure.subplots(len(pictures), len(words), squeeze=False)
    hottest = max(float(maps.max()) for maps in heat)
    for line, picture, maps in zip(axes, pictures, heat):
        shown = to_square(picture, image_size, fit)
        for panel, word, cells in zip(line, words, maps.numpy()):
            panel.imshow(shown, extent=(0, image_size, image_size, 0))
            drawn = panel.imshow(
                cells, extent=(0, image_size, image_size, 0), cmap="inferno", vmin=0, vmax=hottest,
                alpha=0.6 * cells / hottest,  # the picture stays visible where nothing was read
            )  # fmt: skip
            panel.set_title(f"{word.strip() or repr(word)}\n{cells.sum():.0%} on the picture", fontsize=8, parse_math=False)
            panel.set_xlabel("x, pixels", fontsize=7)
            panel.set_ylabel("y, pixels", fontsize=7)
            panel.tick_params(labelsize=6)
    figure.colorbar(drawn, ax=axes).set_label("share of the token's attention, per cell", fontsize=7)
    figure.suptitle(title, fontsize=9, parse_math=False)
    figure.savefig(path, format="png", dpi=120)
