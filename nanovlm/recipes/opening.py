"""Open a folder that holds a model, whoever wrote it: `nanovlm.recipes.load`."""

import sys
from pathlib import Path

import torch

from nanovlm.files import digest
from nanovlm.machine import DEVICES, DTYPES, check_device, default_device, slow_line
from nanovlm.published.adapters import is_adapter
from nanovlm.published.hub import find as locate
from nanovlm.published.load import BARE, family_of, open_published, open_trained, read_config
from nanovlm.published.parts import open_adapter
from nanovlm.recipes import RECIPES, find, folder_of, smolvlm
from nanovlm.recipes.recipe import from_file

OF_FAMILY = {recipe.published.family: recipe for recipe in RECIPES.values() if recipe.published}
FAMILIES = BARE | {family: recipe.published for family, recipe in OF_FAMILY.items()}  # whose weights can be read


def recipe_of(folder, config, recipe=None):
    """The Recipe of a folder that train.py wrote, of its config.json. What the folder itself names is never run.

    recipe: str or Path of the file it was trained from; not needed for a recipe of this package.
    Raises: ValueError if a file is needed; FileNotFoundError.
    """
    name = str(config["recipe"])
    if not name.endswith(".py"):
        return smolvlm.FORMER if name == "small" else find(name)
    if recipe is None:
        raise ValueError(f"{folder} was trained from a recipe file, which is run only if you name it yourself: "
                         f"--recipe {Path(name).name}, or recipe= in Python (it was {name})")
    if digest(recipe) != config.get("recipe_sha256", digest(recipe)):
        print(f"({recipe} has changed since {folder} was trained from it)", file=sys.stderr)
    return from_file(recipe)


def load(folder, dtype=torch.float32, device="cpu", image_size=None, recipe=None):
    """Open a model.

    Args:
      folder: str or Path, the output folder of train.py or of `convert`, a published model's, or a LoRA adapter's whose
        base is found; or a name, where no folder is called so: "nano", which comes along, or `owner/name[@revision]`,
        which is fetched.
      dtype: of the weights. device: where they go.
      image_size: pixels, of a published model: another size than its own; the position table is resized.
      recipe: str or Path of the recipe file that a folder was trained from; other folders need none.
    Returns: generation.chat.Assistant, its model in evaluation mode; a language model alone is a VLM without vision.
    Raises: FileNotFoundError or ValueError, in words for the user; nothing half-loaded is returned.
    """
    folder = locate(folder_of(folder))
    if is_adapter(folder):
        return open_adapter(folder, FAMILIES, OF_FAMILY, dtype, device)
    config = read_config(folder)
    if "recipe" in config:
        return open_trained(folder, config, recipe_of(folder, config, recipe), dtype, device)
    family = family_of(config, str(folder / "config.json"), FAMILIES)
    return open_published(folder, config, FAMILIES[family], OF_FAMILY.get(family), dtype, device, image_size)


def model_flags(parser):
    """Add the flags that say how a command line loads its models."""
    parser.add_argument("--recipe", metavar="FILE.py", help="the recipe file that a model was trained from")
    parser.add_argument("--device", default=default_device(), help=DEVICES)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")


def load_by_flags(folder, args):
    """As `load`, by the flags of `model_flags`; what is unusual or differs is said on stderr."""
    check_device(args.device)
    if line := slow_line(args.dtype, args.device):
        print(f"({line})", file=sys.stderr)
    loaded = load(folder, dtype=DTYPES[args.dtype], device=args.device, recipe=args.recipe)
    for line in loaded.differs:
        print(f"({line})", file=sys.stderr)
    return loaded
