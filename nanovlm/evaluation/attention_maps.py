"""Where an answer's tokens looked: attention drawn as heat over the picture.

For every token of the answer, the decoder's attention from the place that predicted it to the image tokens, averaged
over heads and layers. If the bridge is a resampler, an image token is a latent that looked at the patches itself, so
both are multiplied: heat(token, patch) = sum over latents of decoder(token, latent) * resampler(latent, patch).
A map shows where information was read from, not why the answer came out as it did.

n answer tokens, L image tokens of a picture, N patches, M pictures, H heads
"""

import argparse
import dataclasses
import math
import sys
from pathlib import Path

import numpy
import torch
from matplotlib.figure import Figure

from nanovlm import recipes
from nanovlm.data import images
from nanovlm.data.images import to_square
from nanovlm.data.scene_questions import parse_scene
from nanovlm.data.scenes import render
from nanovlm.generation.chat import Chat
from nanovlm.machine import default_device, DEVICES
from nanovlm.names import nearest
from nanovlm.recipes.nano_tests import readable
from nanovlm.vlm import Batch, IMAGE_TOKEN, VLM


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
    ids = torch.tensor([row.ids + answer[:-1]], device=weight.device)
    positions, shown = torch.arange(ids.shape[1], device=weight.device)[None], torch.arange(len(frames))
    pixels = torch.cat(visual_inputs).to(weight.device, weight.dtype) if visual_inputs else None
    batch = Batch(ids, ids, torch.zeros_like(ids), positions, pixels, frames, shown, torch.zeros_like(shown))
    model.hidden(batch, out, modality=torch.zeros_like(ids) if as_text else None)
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


# How much of the attention goes to the picture and how much to the words, layer by layer.
#
#     python -m nanovlm.evaluation attention out/nano --ask "what color is the star?" --draw "red star"
#     python -m nanovlm.evaluation attention WITH_MAM WITHOUT_MAM --ask "what is 3 plus 4?" --image unrelated.jpg
#
# mPLUG-Owl2, arXiv:2311.04257, Figures 4 and 5: maps of the tokens of an answer over what stands before them, with and
# without the modality-adaptive module. The paper compares two trained models, as two folders do here; --as-text shows, beside
# each model, the same weights when image tokens are taken for words, which no training has prepared for.
#
# n answer tokens, L layers, H heads, T tokens of prompt and answer


COLORS = {"picture": "#ee6677", "prompt": "#4477aa", "answer": "#bbbbbb"}
LONGEST = 46  # characters of a model's name over its map


@dataclasses.dataclass(frozen=True)
class Looks:
    """Where one model looked while it answered.

    name, answer: str. words: n str, the answer's tokens. maps: float32[L, n, T], averaged over heads. is_image: bool[T].
    num_prompt: tokens of the prompt.
    """

    name: str
    answer: str
    words: list
    maps: torch.Tensor
    is_image: torch.Tensor
    num_prompt: int

    def shares(self):
        """Attention on image tokens, on the prompt's words, and on the answer so far: {name: float32[L]}, adding up to 1."""
        total = self.maps.mean(1)  # L T
        in_answer = torch.arange(len(self.is_image)) >= self.num_prompt
        chosen = {"picture": self.is_image, "prompt": ~self.is_image & ~in_answer, "answer": in_answer}
        return {name: total[:, columns].sum(1) for name, columns in chosen.items()}

    def even(self):
        """What the picture would get if every token looked at all before it alike: float."""
        seen = self.num_prompt + torch.arange(self.maps.shape[1])  # tokens that each of the n may look at
        return float((self.is_image.sum() / seen).mean())


def look(name, loaded, question, pictures, as_text=False, max_new_tokens=None):
    """Ask a model and see where it looked.

    Args:
      name: str. loaded: recipes.Loaded. question: str. pictures: list of PIL images, perhaps none.
      as_text: as of `answer_attention`. max_new_tokens: of the answer; None = the default preset's.
    Returns: Looks.
    Raises: ValueError, for example for an empty answer.
    """
    if not isinstance(loaded.model, VLM):
        raise ValueError(f"{name} holds a {type(loaded.model).__name__} alone, and no vision-language model")
    decoding = loaded.decodings["default"]
    if max_new_tokens is not None:
        decoding = dataclasses.replace(decoding, max_new_tokens=max_new_tokens)
    chat = Chat(loaded, decoding, torch.Generator(loaded.model.decoder.embedding.weight.device).manual_seed(0))
    answer = "".join(chat.ask(question, pictures))
    said = chat.last
    if not said.answer:
        raise ValueError(f"{name} answered nothing, so there is no attention to draw")
    maps = answer_attention(loaded.model, said.row, said.answer, said.visual_inputs, as_text)
    ids = torch.tensor(said.row.ids + said.answer[:-1])
    words = [loaded.tokenizer.decode([token]) for token in said.answer]
    return Looks(name, answer, words, maps.mean(1).cpu(), ids == IMAGE_TOKEN, len(said.row.ids))


def table(looks):
    """Shares layer by layer in words: list of str."""
    lines = []
    for one in looks:
        lines += [f"{one.name}: {readable(one.answer)}", f"{'layer':<8}{'picture':>9}{'prompt':>9}{'answer':>9}"]
        for layer, shares in enumerate(zip(*(one.shares()[name] for name in COLORS))):
            lines.append(f"{layer:<8}" + "".join(f"{float(share):>9.1%}" for share in shares))
        lines.append(f"{'evenly':<8}{one.even():>9.1%}")
    return lines


def draw_by_layer(looks, question, path):
    """Save a PNG: a row per Looks, with maps of the first, middle and last layer, and shares of all layers."""
    from matplotlib.figure import Figure  # takes a second to import

    columns = max(len(shown_layers(one)) for one in looks)
    heights = [1.6 + 0.16 * max(len(one.words), 8) for one in looks]
    figure = Figure(figsize=(4 * columns + 4, 0.6 + sum(heights)), layout="constrained")
    grid = figure.subplots(
        len(looks), columns + 1, squeeze=False, width_ratios=[3] * columns + [2.4], height_ratios=heights
    )
    for panels, one in zip(grid, looks):
        for panel in panels[:-1]:
            panel.set_axis_off()
        for panel, layer in zip(panels, shown_layers(one)):
            draw_map(panel, one, layer)
        draw_shares(panels[-1], one)
    title = f"Where each token of the answer to {question!r} looked; brightness: square root of the weight, 0 to 1"
    figure.suptitle(title, parse_math=False, fontsize="medium")
    figure.savefig(path, format="png", dpi=100)


def shown_layers(one):
    """First, middle and last layer, as in the paper: list of int."""
    return sorted({0, len(one.maps) // 2, len(one.maps) - 1})


def draw_map(panel, one, layer):
    """The attention of every answer token over all that stands before it; the picture's tokens are marked."""
    panel.set_axis_on()
    panel.imshow(one.maps[layer].sqrt().numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    places = one.is_image.nonzero().flatten().tolist()
    runs = [place for place in places if place - 1 not in places]
    for start in runs:
        stop = next(place for place in range(start, len(one.is_image) + 1) if place not in places)
        panel.plot([start - 0.5, stop - 0.5], [-0.62, -0.62], color=COLORS["picture"], linewidth=5, clip_on=False)
    panel.axvline(one.num_prompt - 0.5, color="white", linewidth=0.8, linestyle="--")
    name = one.name if len(one.name) <= LONGEST else f"…{one.name[1 - LONGEST :]}"
    panel.set_title(f"{name}\nlayer {layer}", fontsize="small", parse_math=False, pad=10)
    panel.set_xlabel("token that is looked at (red: picture; dashed: answer begins)", fontsize="small")
    panel.set_yticks(range(len(one.words)), [readable(word) for word in one.words], fontsize=6, parse_math=False)
    panel.tick_params(axis="x", labelsize=7)


def draw_shares(panel, one):
    """Shares of every layer, one bar each."""
    left = torch.zeros(len(one.maps))
    for name, shares in one.shares().items():
        panel.barh(range(len(shares)), shares.numpy(), left=left.numpy(), color=COLORS[name], label=name, height=0.8)
        left = left + shares
    panel.axvline(one.even(), color="black", linestyle=":", label="picture, if looked at evenly")
    panel.invert_yaxis()
    panel.set(xlim=(0, 1), xlabel="share of attention", ylabel="layer")
    panel.set_yticks(shown_layers(one))
    panel.legend(fontsize="x-small", loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)


def is_adaptive(model):
    """bool, whether a model has modality-adaptive layers."""
    return isinstance(model, VLM) and any(options.modality_adaptive for options in model.decoder.config.layers)


def make_parser():
    """The command line, as an argparse parser."""
    parser = argparse.ArgumentParser(
        prog="python -m nanovlm.evaluation attention", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("folders", nargs="+", metavar="MODEL", help="one model, or several that are compared")
    parser.add_argument("--ask", required=True, metavar="QUESTION")
    parser.add_argument("--image", action="append", default=[], metavar="PATH", help="shown with the question; repeatable")
    parser.add_argument("--draw", metavar="TEXT", help='a drawn scene in place of a file: "red star left of blue ring"')
    parser.add_argument("--as-text", action="store_true", help="MAM models also with image tokens taken for words")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="of the answer")
    parser.add_argument("--out", type=Path, default=Path("attention.png"), metavar="PNG")
    parser.add_argument("--recipe", metavar="FILE.py", help="the recipe file that a model was trained from")
    parser.add_argument("--device", default=default_device(), help=DEVICES)
    return parser


def main(arguments):
    """Run the command line: exit code."""
    parser = make_parser()
    wishes, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(f"unknown flag {unknown[0]!r}.{nearest(unknown[0], parser._option_string_actions)}")
    if not wishes.image and wishes.draw is None:
        parser.error("a picture is needed: give --image or --draw")
    try:
        looks = []
        for folder in wishes.folders:
            loaded = recipes.load(folder, device=wishes.device, recipe=wishes.recipe)
            shown = [images.load(path) for path in wishes.image]
            if wishes.draw is not None:
                rng = numpy.random.default_rng(0)
                shown.append(render(parse_scene(wishes.draw, rng, loaded.image_size), rng))
            for as_text in (False, True) if wishes.as_text and is_adaptive(loaded.model) else (False,):
                name = f"{folder}, image tokens as words" if as_text else folder
                looks.append(look(name, loaded, wishes.ask, shown, as_text, wishes.max_new_tokens))
        draw_by_layer(looks, wishes.ask, wishes.out)
    except (ValueError, OSError) as error:
        print(f"python -m nanovlm.evaluation attention: {error}", file=sys.stderr)
        return 2
    print("\n".join([*table(looks), f"drawn: {wishes.out}"]))
    return 0
