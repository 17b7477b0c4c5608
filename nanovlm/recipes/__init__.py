"""The recipes: one file per paper, and `load`, which opens what training wrote and what others have published."""

from pathlib import Path

import torch

from nanovlm.names import nearest
from nanovlm.recipes import blip2, llava, llava_phi, lynx, mplug_owl2, nano, nano_resampler, open_flamingo, small
from nanovlm.published.load import BARE
from nanovlm.published.load import Loaded, family_of, open_published, open_trained, read_config
from nanovlm.recipes.recipe import from_file

__all__ = ["FAMILIES", "OF_FAMILY", "RECIPES", "Loaded", "find", "load"]

RECIPES = {
    "nano": nano.RECIPE,
    "nano_resampler": nano_resampler.RECIPE,
    "lynx": lynx.RECIPE,
    "mplug_owl2": mplug_owl2.RECIPE,
    "llava_phi": llava_phi.RECIPE,
    "llava": llava.RECIPE,
    "blip2": blip2.RECIPE,
    "open_flamingo": open_flamingo.RECIPE,
    "small": small.RECIPE,
}

OF_FAMILY = {recipe.published.family: recipe for recipe in RECIPES.values() if recipe.published}
FAMILIES = BARE | {family: recipe.published for family, recipe in OF_FAMILY.items()}  # whose weights can be read


def find(name):
    """The recipe of a name, or of a Python file that defines RECIPE.

    Raises: ValueError with the nearest known name; FileNotFoundError.
    """
    if name.endswith(".py"):
        return from_file(name)
    if name not in RECIPES:
        raise ValueError(f"there is no recipe {name!r}.{nearest(name, RECIPES)}")
    return RECIPES[name]


def load(folder, dtype=torch.float32, device="cpu", image_size=None):
    """Open a model.

    Args:
      folder: str or Path, the output folder of train.py or of `convert`, or a published model's.
      dtype: of the weights. device: where they go.
      image_size: pixels, of a published model: another size than its own; the position table is resized.
    Returns: Loaded, in evaluation mode.
    Raises: FileNotFoundError or ValueError, in words for the user; nothing half-loaded is returned.
    """
    folder = Path(folder)
    config = read_config(folder)
    if "recipe" in config:
        return open_trained(folder, config, find(config["recipe"]), dtype, device)
    family = family_of(config, str(folder / "config.json"), FAMILIES)
    return open_published(folder, config, FAMILIES[family], OF_FAMILY.get(family), dtype, device, image_size)
