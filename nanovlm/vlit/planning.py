"""Which conversations are to be made from which picture, with the pictures found and the boxes drawn."""

import os
import random
from dataclasses import dataclass
from pathlib import Path

from nanovlm.data.images import ImageError, opened
from nanovlm.evaluation.items import coco_picture
from nanovlm.evaluation.items import picture as picture_path
from nanovlm.vlit import self_instruct
from nanovlm.vlit.annotations import Annotation, Picture
from nanovlm.vlit.asking import Request
from nanovlm.vlit.generators import digest
from nanovlm.vlit.marking import write_marked

LEAST_AREA, MOST_AREA = 0.01, 0.8  # of the picture, of an object worth a box
LEAST_TEXT_AREA = 0.001  # of the picture, of a text worth a box


@dataclass(frozen=True)
class Shown:
    """A picture as a sample shows it.

    image: as it stands in the samples' file. path: where it lies, "" if pictures are not looked at. region: what is
    marked on it, or None.
    """

    picture: Picture
    image: str
    path: str = ""
    region: Annotation | None = None


def find_pictures(collection, folder, limit=None):
    """The pictures that have annotations.

    Args:
      collection: annotations.Collection. folder: where the files lie, or None = they are not looked for.
      limit: int, pictures at most; None = all.
    Returns: (list of (Picture, path str or ""), list of (kind, words) of those that are missing or no pictures). Only
      headers are read here; what is damaged behind them, `lint` and `filter` find.
    """
    found, failed = [], []
    for one in collection.pictures.values():
        if limit is not None and len(found) == limit:
            break
        if not one.annotations:
            continue
        path = "" if folder is None else str(_path(one, folder))
        try:
            if path:
                with opened(path):
                    pass
        except FileNotFoundError as error:
            failed.append(("missing picture", str(error)))
        except ImageError as error:
            failed.append(("unreadable picture", str(error)))
        else:
            found.append((one, path))
    return found, failed


def _path(picture, folder):
    """Where a picture lies: Path. COCO's numbers are found under the names of 2014 and 2017."""
    if picture.file_name and (path := picture_path(folder, picture.file_name)).is_file():
        return path
    if picture.id.isdigit():
        for split in ("train", "val"):
            if (path := coco_picture(folder, picture.id, split)).is_file():
                return path
    return Path(folder) / (picture.file_name or f"{picture.id}.jpg")


def regions(picture, number, seed):
    """Annotations of a picture that are worth a box, drawn at random: list of Annotation, `number` at most."""
    fitting = [
        one for one in picture.of_kind("object") if not one.is_crowd and LEAST_AREA <= area(one.box) <= MOST_AREA
    ]
    fitting += [one for one in picture.of_kind("ocr") if LEAST_TEXT_AREA <= area(one.box) <= MOST_AREA]
    return random.Random(digest([seed, picture.id, "regions"])).sample(fitting, min(number, len(fitting)))


def area(box):
    """Of a box, as a share of the picture."""
    return (box[2] - box[0]) * (box[3] - box[1])


def shown(picture, path, out):
    """A whole picture: Shown. out: folder of the samples' file, from where its path goes."""
    return Shown(picture, os.path.relpath(path, out) if path else picture.file_name or f"{picture.id}.jpg", path)


def marked(picture, path, region, out):
    """A picture with a box around a region, drawn into out/marked: Shown; without a path, only its name is made.

    Raises: images.ImageError.
    """
    name = f"marked/{picture.id}_{region.id.replace('/', '_')}.png"
    if path:
        write_marked(path, region.box, Path(out) / name)
    return Shown(picture, name, str(Path(out) / name) if path else "", region)


def conversations(picture, path, plans, regions, wishes):
    """The self-instruct requests about one picture.

    Args:
      picture: annotations.Picture. path: where it lies, or "". plans: list of self_instruct.Plan.
      regions: list of Shown with a region. wishes: flags of construct: out, description, lines, seed.
    Yields: asking.Request, what = (Plan, Shown).
    """
    for plan in plans:
        for one in regions if plan.granularity == "region" else [shown(picture, path, wishes.out)]:
            chat = self_instruct.chat(
                picture, plan, one.region, wishes.description, wishes.lines, wishes.seed, one.path
            )
            place = f"/{one.region.id}" if one.region else ""
            yield Request(f"{picture.id}/SI/{plan.name}{place}", chat, (plan, one))
