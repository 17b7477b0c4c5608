"""What people have noted about pictures, in one form whatever file it came from (see annotation_files.py).

The kinds are those of the review (Sec. 4.2.1): caption, object, attribute, OCR and visual question answering; a region is
an object or a text that is marked.
"""

from collections import Counter
from dataclasses import dataclass, field

from nanovlm.data.json_files import elements, records


@dataclass(frozen=True)
class Annotation:
    """One note about one picture.

    id: unique, "KIND/…". value: the sentence, the category, the attribute, the characters or the answer.
    question: of kind vqa. box: left, top, right, bottom as shares of the picture, or None.
    of: the object's id, of an attribute. is_crowd: an object that stands for a group of unknown number.
    """

    id: str
    kind: str
    value: str
    question: str = ""
    box: tuple[float, float, float, float] | None = None
    of: str = ""
    is_crowd: bool = False


@dataclass
class Picture:
    """One picture and the notes about it. width, height: pixels, 0 = not stated."""

    id: str
    file_name: str = ""
    width: int = 0
    height: int = 0
    annotations: list = field(default_factory=list)

    def of_kind(self, kind):
        """Its annotations of a kind: list of Annotation."""
        return [one for one in self.annotations if one.kind == kind]


@dataclass
class Collection:
    """What came out of the files.

    pictures: dict id -> Picture. problems: one line for every record that could not be read. skipped: Counter of what
    was read and left out, by reason.
    """

    pictures: dict = field(default_factory=dict)
    problems: list = field(default_factory=list)
    skipped: Counter = field(default_factory=Counter)
    objects: dict = field(default_factory=dict)  # COCO's id of an instance -> (Picture, Annotation)
    questions: dict = field(default_factory=dict)  # question id -> (picture id, question), until it is answered

    def picture(self, id, file_name="", width=0, height=0):
        """The picture of an id, made if there is none yet; what is known about it is added up."""
        id = str(int(id)) if str(id).isdigit() else str(id)
        one = self.pictures.setdefault(id, Picture(id))
        one.file_name, one.width, one.height = one.file_name or file_name, one.width or width, one.height or height
        return one

    def each(self, path, key, add):
        """Call `add(record, where)` for the records of a file; what it raises becomes a problem."""
        try:
            for element in records(path) if key is None else elements(path, key):
                try:
                    if isinstance(element.value, ValueError):
                        raise element.value
                    add(element, element.where)
                except (ValueError, TypeError, KeyError, AttributeError) as error:
                    words = str(error)
                    self.problems.append(words if words.startswith(str(path)) else f"{element.where}: {words}")
        except ValueError as error:  # the file breaks off: what stood before is kept
            if str(error) not in self.problems:  # met once for the pictures, once for the records
                self.problems.append(str(error))


def share_box(box, picture):
    """A box as shares of a picture, cut off at its edges.

    Args:
      box: [left, top, width, height] in pixels. picture: Picture.
    Returns: (left, top, right, bottom). Raises: ValueError.
    """
    if len(box) != 4 or not all(isinstance(side, (int, float)) for side in box):
        raise ValueError(f"bbox must be left, top, width and height in pixels, found {box!r}")
    if not picture.width or not picture.height:
        raise ValueError(f"the size of picture {picture.id} is not stated in any file, so its boxes cannot be placed")
    left, top, width, height = box
    sides = left / picture.width, top / picture.height, (left + width) / picture.width, (top + height) / picture.height
    return checked_box([min(1.0, max(0.0, side)) for side in sides])


def checked_box(box):
    """(left, top, right, bottom) in shares, if they are some. Raises: ValueError."""
    if len(box) != 4 or not all(isinstance(side, (int, float)) and 0 <= side <= 1 for side in box):
        raise ValueError(f"a box must be left, top, right and bottom as shares from 0 to 1, found {box!r}")
    if box[0] >= box[2] or box[1] >= box[3]:
        raise ValueError(f"box {box!r} has no area")
    return tuple(box)
