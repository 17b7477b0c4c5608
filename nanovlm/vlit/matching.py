"""Matching degree: how close a response is to its picture in the space of a contrastive model.

    MD = mean over samples of 100 · cos(E_image, E_text(response))          VLIT review, Sec. 4.2.3

A response longer than the text tower reads is cut into sentences, whose cosines are averaged; of several pictures the
closest counts. With a CLIP folder the number is the review's MD (30.7 to 34.1 in its Table 4); with the towers of a
model trained here it is named "MD (own encoder)" and compares with nothing else.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch

from nanovlm.data.images import CLIP, Preprocessing, load, to_pixels
from nanovlm.data.tokenizer import Tokenizer
from nanovlm.recipes import load as load_model, recipe_of
from nanovlm.training.start import build_models, load_weights

SENTENCE = re.compile(r"(?<=[.!?])\s+")
BEGIN, END = "<|startoftext|>", "<|endoftext|>"  # CLIP's
BATCH = 32  # pictures and responses encoded at once


@dataclass(frozen=True)
class Encoder:
    """Two towers and what leads to them. name: of the indicator. ids: str -> list of int, begin and end included."""

    name: str
    model: Any  # contrastive.TwoTowers
    ids: Callable
    image_size: int
    image_fit: str = "crop"
    preprocessing: Preprocessing = CLIP

    @torch.no_grad()
    def images(self, pictures):
        """list of N sources of images.load -> float[N, V, E] of length 1, see contrastive.TwoTowers.views."""
        pixels = [to_pixels(load(one), self.image_size, self.image_fit, self.preprocessing) for one in pictures]
        return self.model.views(torch.stack(pixels))

    @torch.no_grad()
    def texts(self, texts):
        """list of N str -> float[N, E] of length 1; what is longer than the tower reads is cut behind."""
        room = self.model.text.context_length
        rows = [ids if len(ids) <= room else [*ids[: room - 1], ids[-1]] for ids in map(self.ids, texts)]
        longest = max(map(len, rows))
        padded = torch.tensor([row + [row[-1]] * (longest - len(row)) for row in rows])
        return self.model.embed_texts(padded, torch.tensor(list(map(len, rows))))

    def pieces(self, response):
        """A response as the tower can read it: itself, or its sentences; a list of str."""
        whole = len(self.ids(response)) <= self.model.text.context_length
        return [response] if whole else [one for one in SENTENCE.split(response) if one.strip()]

    def match(self, pictures, responses):
        """100 · cosine of each response, none empty, and its list of pictures: list of float."""
        cut = [self.pieces(response) for response in responses]
        images, texts = self.images(sum(pictures, [])), self.texts(sum(cut, []))
        pairs = zip(images.split(list(map(len, pictures))), texts.split(list(map(len, cut))))
        return [100 * (image @ text.T).amax(1).mean(1).max().item() for image, text in pairs]


def load_encoder(folder, recipe=None):
    """The towers of a folder: Encoder.

    Args:
      folder: of a published CLIP (config.json, model.safetensors, tokenizer.json), or an output folder of train.py of a
        recipe with a contrastive stage; its ViT is as the last stage left it, its text tower as the first did.
      recipe: as in recipes.load.
    Raises: FileNotFoundError; ValueError if the folder holds no two towers.
    """
    folder = Path(folder)
    path = folder / "config.json"
    if path.is_file() and "recipe" in (config := json.loads(path.read_text())):
        recipe, tokenizer = recipe_of(folder, config, recipe), Tokenizer(folder / "tokenizer.json")
        model, towers = build_models(recipe, config["size"], tokenizer.vocab_size, 0, config.get("architecture"))
        if towers is None or not (folder / "text_tower.safetensors").is_file():
            raise ValueError(f"{folder} has no text tower: recipe {config['recipe']!r} ran without a contrastive stage")
        load_weights(folder, model, towers)
        *_, last = config["stages"].values()
        return own_encoder(towers.eval(), tokenizer, config["image_size"], last["image_fit"])
    loaded = load_model(folder)
    if not hasattr(loaded.model, "embed_texts"):
        raise ValueError(f"{folder} holds {type(loaded.model).__name__}, not a pair of towers; give a CLIP folder")
    backend = tokenizers.Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
    begin, end = map(backend.token_to_id, (BEGIN, END))
    if None in (begin, end):
        raise ValueError(f"{folder / 'tokenizer.json'} lacks {BEGIN} or {END}; it is not CLIP's")
    ids = lambda text: [begin, *backend.encode(text, add_special_tokens=False).ids, end]
    return Encoder("MD", loaded.model.eval(), ids, loaded.image_size, loaded.image_fit, loaded.preprocessing)


def own_encoder(towers, tokenizer, image_size, image_fit="crop"):
    """The Encoder of towers trained here. towers: contrastive.ContrastiveModel. tokenizer: data.tokenizer.Tokenizer."""
    ids = lambda text: [tokenizer.bos, *tokenizer.encode(text), tokenizer.eos]
    return Encoder("MD (own encoder)", towers, ids, image_size, image_fit)
