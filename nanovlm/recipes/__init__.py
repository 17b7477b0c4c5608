"""The recipes: one file per paper, and `load`, which opens what training wrote and what others have published."""

import importlib
from collections.abc import Mapping
from pathlib import Path

from nanovlm.names import check_known
from nanovlm.recipes.recipe import from_file

NAMES = ("nano", "nano_resampler", "lynx_mini", "lynx", "mplug_owl2", "llava_phi", "llava", "blip2", "open_flamingo",
         "smolvlm")
ALIASES = {"small": "smolvlm"}  # former names
COME_ALONG = {"nano": Path(__file__).with_name("nano_weights")}  # name -> folder of a trained model
OPENING = ("FAMILIES", "load", "load_by_flags", "model_flags", "recipe_of")
LATE = dict.fromkeys(OPENING, "opening") | {"compare": "against"}  # names of files that training nano does not need


class Recipes(Mapping):
    """Name -> Recipe; a recipe's file is imported when it is asked for, so that training nano reads no other."""

    def __getitem__(self, name):
        name = ALIASES.get(name, name)
        if name not in NAMES:
            raise KeyError(name)
        return importlib.import_module(f"nanovlm.recipes.{name}").RECIPE

    def __iter__(self):
        return iter(NAMES)

    def __len__(self):
        return len(NAMES)


RECIPES = Recipes()


def find(name):
    """The recipe of a name, or of a Python file that defines RECIPE.

    Raises: ValueError with the nearest known name; FileNotFoundError.
    """
    if name.endswith(".py"):
        return from_file(name)
    check_known("there is no recipe", name, RECIPES)
    return RECIPES[name]


def folder_of(name):
    """Path of a model's folder: as named or, where there is none, of the model of that name that comes along."""
    return Path(name) if Path(name).exists() else COME_ALONG.get(str(name), Path(name))


def __getattr__(name):
    if name in LATE:
        return getattr(importlib.import_module(f"nanovlm.recipes.{LATE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
