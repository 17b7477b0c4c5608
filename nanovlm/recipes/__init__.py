"""The recipes: one file per paper, and `load`, which opens what training wrote."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from nanovlm import checkpoint, lora
from nanovlm.data.templates import Template
from nanovlm.data.tokenizer import Tokenizer, check_vocabulary
from nanovlm.names import nearest
from nanovlm.recipes import llava_phi, lynx, mplug_owl2, nano, nano_resampler
from nanovlm.recipes.recipe import from_file
from nanovlm.vlm import VLM

RECIPES = {
    "nano": nano.RECIPE,
    "nano_resampler": nano_resampler.RECIPE,
    "lynx": lynx.RECIPE,
    "mplug_owl2": mplug_owl2.RECIPE,
    "llava_phi": llava_phi.RECIPE,
}


def find(name):
    """The recipe of a name, or of a Python file that defines RECIPE.

    Raises: ValueError with the nearest known name; FileNotFoundError.
    """
    if name.endswith(".py"):
        return from_file(name)
    if name not in RECIPES:
        raise ValueError(f"there is no recipe {name!r}.{nearest(name, RECIPES)}")
    return RECIPES[name]


@dataclass(frozen=True)
class Loaded:
    """A trained model and all that is needed to talk to it."""

    model: VLM
    tokenizer: Tokenizer
    template: Template
    decodings: dict  # preset name -> sampler.Decoding
    image_size: int  # pixels
    image_fit: str  # how a picture becomes square, as in images.to_pixels
    remark: str  # what to say beside an answer about a picture unlike the training's; "" = nothing


def load(folder, dtype=torch.float32, device="cpu"):
    """Open a trained model.

    Args:
      folder: str or Path, the output folder of train.py.
      dtype: of the weights. device: where they go.
    Returns: Loaded, in evaluation mode.
    Raises: FileNotFoundError or ValueError, in words for the user; nothing half-loaded is returned.
    """
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} holds no config.json; give the output folder of train.py, for example out/nano")
    if not (folder / "model.safetensors").exists():
        raise FileNotFoundError(f"{folder} holds no model.safetensors: its training has not finished; go on with --resume")
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: not JSON ({error}); train again or restore the file") from error
    missing = [key for key in ("recipe", "size", "image_size", "stages") if key not in config]
    if missing:
        raise ValueError(f"{folder / 'config.json'} lacks {', '.join(missing)}; it is not what train.py wrote")
    recipe = find(config["recipe"])
    tokenizer = Tokenizer(folder / "tokenizer.json")
    model = recipe.build(config["size"], tokenizer.vocab_size)
    model.vision.resize(config["image_size"])
    if "lora" in config:
        lora.add(model, **config["lora"])
    try:
        checkpoint.load_file_into(model.state_dict(), folder / "model.safetensors")
    except checkpoint.CheckpointError as error:
        raise ValueError(f"{folder} does not fit recipe {recipe.name!r}: {error}") from error
    lora.merge(model)
    check_vocabulary(tokenizer, model.decoder.config.vocab_size)
    return Loaded(
        model=model.to(device, dtype).eval(),
        tokenizer=tokenizer,
        template=recipe.template,
        decodings=recipe.decodings,
        image_size=config["image_size"],
        image_fit=list(config["stages"].values())[-1]["image_fit"],
        remark=recipe.remark,
    )
