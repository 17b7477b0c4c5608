"""Open a folder that holds a model, whoever wrote it: `nanovlm.recipes.load`."""

import sys
from pathlib import Path

import torch

from nanovlm.files import digest
from nanovlm.published.load import BARE, Loaded, family_of, open_published, open_trained, read_config
from nanovlm.recipes import RECIPES, find
from nanovlm.recipes.recipe import from_file

__all__ = ["FAMILIES", "Loaded", "load", "recipe_of"]

OF_FAMILY = {recipe.published.family: recipe for recipe in RECIPES.values() if recipe.published}
FAMILIES = BARE | {family: recipe.published for family, recipe in OF_FAMILY.items()}  # whose weights can be read


def recipe_of(folder, config, recipe=None):
    """The Recipe of a folder that train.py wrote. What the folder itself names is never run.

    Args:
      folder: Path. config: dict of its config.json.
      recipe: str or Path of the file it was trained from; not needed for a recipe of this package.
    Raises: ValueError if a file is needed; FileNotFoundError.
    """
    name = str(config["recipe"])
    if not name.endswith(".py"):
        return find(name)
    if recipe is None:
        raise ValueError(f"{folder} was trained from a recipe file, which is run only if you name it yourself: --recipe "
                         f"{Path(name).name}, or recipe= in Python (it was {name})")
    if digest(recipe) != config.get("recipe_sha256", digest(recipe)):
        print(f"({recipe} has changed since {folder} was trained from it)", file=sys.stderr)
    return from_file(recipe)


def load(folder, dtype=torch.float32, device="cpu", image_size=None, recipe=None):
    """Open a model.

    Args:
      folder: str or Path, the output folder of train.py or of `convert`, or a published model's.
      dtype: of the weights. device: where they go.
      image_size: pixels, of a published model: another size than its own; the position table is resized.
      recipe: str or Path of the recipe file that a folder was trained from; other folders need none.
    Returns: Loaded, in evaluation mode.
    Raises: FileNotFoundError or ValueError, in words for the user; nothing half-loaded is returned.
    """
    folder = Path(folder)
    config = read_config(folder)
    if "recipe" in config:
        return open_trained(folder, config, recipe_of(folder, config, recipe), dtype, device)
    family = family_of(config, str(folder / "config.json"), FAMILIES)
    return open_published(folder, config, FAMILIES[family], OF_FAMILY.get(family), dtype, device, image_size)
