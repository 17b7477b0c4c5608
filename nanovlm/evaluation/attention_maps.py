"""Where an answer's tokens looked: attention as heat over the picture, and shared out among picture and words.

    python -m nanovlm.evaluation attention out/nano --ask "what color is the star?" --draw "red star"
    python -m nanovlm.evaluation attention WITH_MAM WITHOUT_MAM --ask "what is 3 plus 4?" --image unrelated.jpg

Heat is the decoder's attention to the image tokens from the place that predicted a token of the answer, averaged over
heads and layers. If an image token is a resampler's latent, which looked at the patches itself, both are multiplied:
heat(token, patch) = sum over latents of decoder(token, latent) * resampler(latent, patch).

Maps and shares by layer are those of mPLUG-Owl2, arXiv:2311.04257, Figures 4 and 5: models with and without the
modality-adaptive module. --as-text shows beside each model the same weights when image tokens are taken for words,
which no training has prepared for. A map shows where information was read from, not why the answer came out as it did.

n answer tokens, T tokens of prompt and answer, I image tokens of a picture, N patches, M pictures, L layers, H heads
"""

import dataclasses
import math

import torch
from matplotlib.figure import Figure

from nanovlm.data.images import to_square
from nanovlm.recipes.nano_tests import readable
from nanovlm.vlm import IMAGE_TOKEN, VLM, Batch

PANEL, MIN_WIDTH = 2.2, 5.0  # inches: side of one picture; of the figure, so that its title fits
COLORS = {"picture": "#ee6677", "prompt": "#4477aa", "answer": "#bbbbbb"}
LONGEST = 46  # last characters of a model's name over its map


@torch.no_grad()
def answer_attention(model, prompt, answer, as_text=False, out=None):
    """What the place that predicted each answer token looked at, in every layer and head.

    Args:
      model: vlm.VLM. prompt: answer.Prompt. answer: list of n ids.
      as_text: the decoder takes image tokens for words: modality-adaptive layers use the text's norms, keys and values.
      out: dict that receives the maps of decoder and bridge as they come; None = not wanted.
    Returns: float32[L, H, n, T], T without the answer's last token, which predicts nothing.
    Raises: ValueError for a model that reads pictures by cross-attention, where they stand in no row.
    """
    if model.media_token is not None:
        raise ValueError("this model reads its pictures by cross-attention: its words cannot look at image tokens")
    out, weight, inputs = {} if out is None else out, model.decoder.embedding.weight, prompt.visual_inputs
    ids = torch.tensor([prompt.row.ids + answer[:-1]], device=weight.device)
    frames, shown = torch.tensor(list(map(len, inputs))).long(), torch.arange(len(inputs))
    pixels = torch.cat(inputs).to(weight) if inputs else None
    positions = torch.arange(ids.shape[1], device=weight.device)[None]
    batch = Batch(ids, ids, torch.zeros_like(ids), positions, pixels, frames, shown, torch.zeros_like(shown))
    model.hidden(batch, out, modality=torch.zeros_like(ids) if as_text else None)
    return torch.stack([maps[0, :, len(prompt.row.ids) - 1 :] for maps in out["attention"]]).float()


def answer_heat(model, prompt, answer):
    """Attention of each answer token to each place of the pictures; args as of `answer_attention`.

    Returns: list of one float32[n, side, side] per picture, a cell per patch or per square of merged patches; the
      cells of a map add up to the share of the token's attention that went to this picture (less what a class token,
      or latents among themselves, took).
    Raises: ValueError for an empty answer, no picture, or a clip.
    """
    if not answer:
        raise ValueError("the answer has no token, so there is no attention to draw")
    inputs = prompt.visual_inputs
    if not inputs or any(len(pixels) > 1 for pixels in inputs):
        one = "show one, without tiles (--tiles 0)"
        raise ValueError(f"attention is drawn over still images, each in one square; {one}")
    out, heat, image_size = {}, [], inputs[0].shape[-1]  # pixels
    looks = answer_attention(model, prompt, answer, out=out).mean(dim=(0, 1))  # n T
    for picture, (_, start, stop) in enumerate(prompt.row.images):
        seen = looks[:, start:stop]  # n I
        side, columns = math.isqrt(stop - start), stop - start  # an image token is a patch or a square of patches
        if "latents" in out:
            latents = torch.stack(out["latents"]).to(looks).mean(dim=(0, 2))  # M I N
            seen = seen @ latents[picture]  # n N
            side, columns = math.isqrt(model.vision.num_patches(image_size)), model.vision.num_tokens(image_size)
        first = columns - side * side  # behind a class token perhaps
        heat.append(seen[:, first : first + side * side].unflatten(1, (side, side)).cpu())
    return heat


def draw(path, pictures, heat, words, image_size, fit, title):
    """Save one panel per answer token and picture, as a PNG.

    Args:
      pictures: list of PIL RGB images. heat: as of `answer_heat`. words: text of each answer token.
      image_size, fit: how the pictures were shown to the model. title: what stands above all panels.
    """
    figure = Figure(figsize=(max(PANEL * len(words) + 1, MIN_WIDTH), PANEL * len(pictures) + 1), layout="constrained")
    axes = figure.subplots(len(pictures), len(words), squeeze=False)
    hottest, extent = max(float(maps.max()) for maps in heat), (0, image_size, image_size, 0)
    for line, picture, maps in zip(axes, pictures, heat):
        shown = to_square(picture, image_size, fit)
        for panel, word, cells in zip(line, words, maps.numpy()):
            panel.imshow(shown, extent=extent)
            alpha = 0.6 * cells / hottest  # the picture stays visible where nothing was read
            drawn = panel.imshow(cells, extent=extent, cmap="inferno", vmin=0, vmax=hottest, alpha=alpha)
            share = f"{cells.sum():.0%} on the picture"
            panel.set_title(f"{word.strip() or repr(word)}\n{share}", fontsize=8, parse_math=False)
            panel.set_xlabel("x, pixels", fontsize=7)
            panel.set_ylabel("y, pixels", fontsize=7)
            panel.tick_params(labelsize=6)
    figure.colorbar(drawn, ax=axes).set_label("share of the token's attention, per cell", fontsize=7)
    figure.suptitle(title, fontsize=9, parse_math=False)
    figure.savefig(path, format="png", dpi=120)


@dataclasses.dataclass(frozen=True)
class Looks:
    """Where one model looked while it answered: maps, averaged over heads."""

    name: str
    answer: str
    words: list  # n str, the answer's tokens
    maps: torch.Tensor  # float32[L, n, T]
    is_image: torch.Tensor  # bool[T]
    num_prompt: int  # tokens

    def shares(self):
        """Attention on image tokens, the prompt's words, and the answer so far: {name: float32[L]}, adding up to 1."""
        in_answer = torch.arange(len(self.is_image)) >= self.num_prompt
        chosen = self.is_image, ~self.is_image & ~in_answer, in_answer
        return {name: self.maps.mean(1)[:, columns].sum(1) for name, columns in zip(COLORS, chosen)}

    def even(self):
        """What the picture would get if every token looked at all before it alike: float."""
        seen = self.num_prompt + torch.arange(self.maps.shape[1])  # tokens that each of the n may look at
        return float((self.is_image.sum() / seen).mean())

    def shown_layers(self):
        """First, middle and last layer, as in the paper: list of int."""
        return sorted({0, len(self.maps) // 2, len(self.maps) - 1})


def look(name, loaded, question, pictures, as_text=False, max_new_tokens=None):
    """Ask a model (chat.Assistant) about PIL images, perhaps none, and see where it looked: Looks.

    as_text: as of `answer_attention`. max_new_tokens: of the answer; None = the default preset's.
    """
    decoding = loaded.preset("default")
    if max_new_tokens is not None:
        decoding = dataclasses.replace(decoding, max_new_tokens=max_new_tokens)
    chat = loaded.chat(decoding)
    text, ids = chat.ask(question, pictures), chat.prompt.row.ids
    if not chat.answer:
        raise ValueError(f"{name} answered nothing, so there is no attention to draw")
    maps = answer_attention(loaded.model, chat.prompt, chat.answer, as_text).mean(1).cpu()
    words = [loaded.tokenizer.decode([token]) for token in chat.answer]
    return Looks(name, text, words, maps, torch.tensor(ids + chat.answer[:-1]) == IMAGE_TOKEN, len(ids))


def is_adaptive(model):
    """bool, whether a model has modality-adaptive layers."""
    return isinstance(model, VLM) and any(options.modality_adaptive for options in model.decoder.config.layers)


def table(looks):
    """Shares layer by layer in words: list of str."""
    lines = []
    for one in looks:
        lines += [f"{one.name}: {readable(one.answer)}", f"{'layer':<8}{'picture':>9}{'prompt':>9}{'answer':>9}"]
        for layer, shares in enumerate(zip(*one.shares().values())):
            lines.append(f"{layer:<8}" + "".join(f"{float(share):>9.1%}" for share in shares))
        lines.append(f"{'evenly':<8}{one.even():>9.1%}")
    return lines


def draw_by_layer(looks, question, path):
    """Save a PNG: a row per Looks, with maps of the first, middle and last layer, and shares of all layers.

    A map is the attention of every answer token over all that stands before it; the picture's tokens are marked.
    """
    columns = max(len(one.shown_layers()) for one in looks)
    heights = [1.6 + 0.16 * max(len(one.words), 8) for one in looks]
    figure = Figure(figsize=(4 * columns + 4, 0.6 + sum(heights)), layout="constrained")
    ratios = {"width_ratios": [3] * columns + [2.4], "height_ratios": heights}
    for (*panels, last), one in zip(figure.subplots(len(looks), columns + 1, squeeze=False, **ratios), looks):
        for panel in panels[len(one.shown_layers()) :]:
            panel.set_axis_off()
        edges = torch.nn.functional.pad(one.is_image.int(), (1, 1)).diff().nonzero().flatten().tolist()
        for panel, layer in zip(panels, one.shown_layers()):
            weights = one.maps[layer].sqrt().numpy()
            panel.imshow(weights, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
            for start, stop in zip(edges[::2], edges[1::2]):
                line = {"color": COLORS["picture"], "linewidth": 5, "clip_on": False}
                panel.plot([start - 0.5, stop - 0.5], [-0.62, -0.62], **line)
            panel.axvline(one.num_prompt - 0.5, color="white", linewidth=0.8, linestyle="--")
            panel.set_title(f"{one.name[-LONGEST:]}\nlayer {layer}", fontsize="small", parse_math=False, pad=10)
            panel.set_xlabel("token that is looked at (red: picture; dashed: answer begins)", fontsize="small")
            panel.set_yticks(range(len(one.words)), list(map(readable, one.words)), fontsize=6, parse_math=False)
            panel.tick_params(axis="x", labelsize=7)
        left = 0
        for name, shares in one.shares().items():
            last.barh(range(len(shares)), shares.numpy(), left=left, color=COLORS[name], label=name, height=0.8)
            left = left + shares.numpy()
        last.axvline(one.even(), color="black", linestyle=":", label="picture, if looked at evenly")
        last.invert_yaxis()
        last.set(xlim=(0, 1), xlabel="share of attention", ylabel="layer", yticks=one.shown_layers())
        last.legend(fontsize="x-small", loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    title = f"Where each token of the answer to {question!r} looked; brightness: square root of the weight, 0 to 1"
    figure.suptitle(title, parse_math=False, fontsize="medium")
    figure.savefig(path, format="png", dpi=100)
