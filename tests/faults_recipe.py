"""The recipe of many_recipe.py with a checkpoint every third step, for processes that are killed."""

import dataclasses

import many_recipe

RECIPE = dataclasses.replace(many_recipe.RECIPE, name="faults", save_every=3)
