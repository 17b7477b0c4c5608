"""lynx_mini, each question asked as its data set asks it: what do many wordings bring?

    python train.py notebooks/ablations/lynx_mini_one_wording.py --init language=FOLDER
"""

import dataclasses

from nanovlm.recipes import lynx_mini


def plain(make):
    """How a source is made (function of a seed) -> the same without other wordings."""
    return lambda seed: make(seed).source


sources = {name: make if name == "rehearsal" else plain(make) for name, make in lynx_mini.SOURCES.items()}
RECIPE = dataclasses.replace(lynx_mini.RECIPE, name="lynx_mini_one_wording", sources=sources)
