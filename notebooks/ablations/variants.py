"""The papers' ablations at nano scale, as data (variants.json): what is compared, and what the paper found.

Every variant is an ordinary `train.py` run of ablation_recipe.py, from a tower and a decoder that all variants of a seed
share; ablation_runs.py trains them, ablation_report.py makes tables and pictures. Variants that stand in several ablations
are trained once. A decay of 0.3 over two blocks is what 0.9 is over 24.
"""

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Variant:
    """One way to train.

    name: what the table calls it. size: how the model is built, a size of ablation_recipe.py. start: "instructed" = the
    decoder has learned to answer questions about texts; "raw" = it only continues texts. flags: of train.py.
    """

    name: str
    size: str = "mam"
    start: str = "instructed"
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ablation:
    """What is compared. columns: measures of ablation_exam.MEASURES, and "text before", the start's "text"."""

    question: str
    source: str  # the paper's table
    found: str  # what the paper says
    variants: tuple[Variant, ...]
    columns: tuple[str, ...] = ("pictures", "text before", "text", "text beside a picture")


def as_variant(told):
    """A Variant of the file, which lists train.py's settings without their flag."""
    settings = tuple(word for setting in told.pop("set", ()) for word in ("--set", setting))
    return Variant(**told | {"flags": (*told.get("flags", ()), *settings)})


def as_ablation(told):
    """An Ablation of the file."""
    columns = {"columns": tuple(told["columns"])} if "columns" in told else {}
    return Ablation(**told | columns | {"variants": tuple(map(as_variant, told["variants"]))})


FILE = json.loads(Path(__file__).with_name("variants.json").read_text(encoding="utf-8"))
ABLATIONS = {name: as_ablation(told) for name, told in FILE.items()}
