"""Does a published checkpoint fit? Its manifest, names and shapes alone, against the model on the meta device.

    python -m nanovlm.recipes coverage MANIFEST.json

A manifest is a JSON object with `family`, `config` and `tensors` {name: shape}; `computed_or_extra_tensors` may list
what some files carry beside them. Every tensor is consumed, computed by the model, or unused for a reason.
"""

import collections
import json
import math
from dataclasses import dataclass
from pathlib import Path

from nanovlm.names import nearest
from nanovlm.recipes import FAMILIES
from nanovlm.recipes.opening import build_on_meta
from nanovlm.weight_errors import WeightsError, explain
from nanovlm.weights import Plan, plan

ASIDE = {("siglip", "pool."): "attention pooling, which serves SigLIP's own loss"}  # (family, our prefix) -> reason


@dataclass
class Coverage:
    """What became of every tensor of a manifest.

    name, family: str. found: Plan. shapes: {published name: shape}. ours: {our name: shape}.
    unused: {published name: reason}, what the towers keep for themselves included. stated: total_params or None.
    """

    name: str
    family: str
    found: Plan
    shapes: dict
    ours: dict
    unused: dict
    stated: object

    def lines(self):
        """The report: list of str."""
        consumed = [name for name in self.found.consumed if name not in self.unused]
        computed = self.found.computed | dict.fromkeys(self.found.twice, "a second copy of a tied tensor")
        zeros = sum(
            names.count(None) * count(self.shapes[name]) // len(names)
            for name, (_, names) in self.found.consumed.items()
        )
        model = count_all(self.ours.values()) + zeros
        note = f" ({zeros:,} of them zeros, which only the file holds)" if zeros else ""
        lines = [f"{self.name}: family {self.family}"]
        for title, names in (("consumed", consumed), ("computed", computed), ("unused", self.unused)):
            numbers = count_all(self.shapes[name] for name in names)
            lines.append(f"  {title:9} {len(names):5,} tensors {numbers:15,} numbers")
            if title != "consumed":
                reasons = collections.Counter((computed if title == "computed" else self.unused).values())
                lines += [f"             {number} x {reason}" for reason, number in reasons.items()]
        file = count_all(shape for name, shape in self.shapes.items() if name not in computed)
        lines += [f"  parameters of the file  {file:15,}", f"  parameters of the model {model:15,}{note}"]
        if self.stated not in (None, file):
            lines.append(f"  note: the manifest states total_params {self.stated}")
        return lines


def count(shape):
    """Numbers in a tensor of this shape."""
    return math.prod(shape)


def count_all(shapes):
    """Numbers in tensors of these shapes."""
    return sum(map(count, shapes))


def find_family(name):
    """The Published of a family. Raises: WeightsError with the nearest known name."""
    if not isinstance(name, str) or name not in FAMILIES:
        raise WeightsError(f"unknown family {name!r}.{nearest(name, FAMILIES)}")
    return FAMILIES[name]


def read_json(path):
    """A JSON object: dict. Raises: WeightsError naming the file."""
    try:
        content = json.loads(Path(path).read_text())
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds no JSON object")
    return content


def read_shapes(content, key, path):
    """{name: tuple} under a key of a manifest; lists of whole numbers, or nothing. Raises: WeightsError."""
    tensors = content.get(key) or {}
    if not isinstance(tensors, dict):
        raise WeightsError(f"{path}: {key} is no object of names and shapes")
    wrong = [name for name, shape in tensors.items()
             if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in shape)]
    if wrong:
        raise WeightsError(f"{path}: {wrong[0]} has the shape {tensors[wrong[0]]!r}, expected a list of whole numbers")
    return {name: tuple(shape) for name, shape in tensors.items()}


def check(path):
    """Compare a manifest with the model that it describes.

    Args:
      path: str or Path of the JSON file.
    Returns: Coverage, of a manifest that fits.
    Raises: WeightsError naming everything that is left over, missing or mis-shaped, or what is wrong with the file.
    """
    content = read_json(path)
    absent = [key for key in ("family", "config", "tensors") if key not in content]
    if absent:
        raise WeightsError(f"{path} lacks {', '.join(absent)}; it is no manifest")
    published = find_family(content["family"])
    if not isinstance(content["config"], dict):
        raise WeightsError(f"{path}: config is no object")
    shapes = read_shapes(content, "tensors", path) | read_shapes(content, "computed_or_extra_tensors", path)
    model, table = build_on_meta(published, content["config"])
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = plan(table, shapes, ours)
    if not found.fits:
        raise WeightsError(explain(found, str(path)))
    unused = found.unused | {
        name: reason
        for (family, prefix), reason in ASIDE.items()
        for name, (_, names) in found.consumed.items()
        if family == published.family and not hasattr(model, "text") and names[0].startswith(prefix)
    }
    name = content.get("name", Path(path).stem)
    return Coverage(name, published.family, found, shapes, ours, unused, content.get("total_params"))
