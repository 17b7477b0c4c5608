"""easy-VQA: 5,000 pictures of one coloured shape and 48,248 questions about them, from the PyPI package `easy-vqa`.

The official split is used as it is: 4,000 pictures with 38,575 questions to train, 1,000 with 9,673 to test.
Source: Victor Zhou, github.com/vzhou842/easy-VQA (MIT licence).
"""

import numpy as np
from PIL import Image

from nanovlm.data.records import Record, Turn, Visual, permutation
from nanovlm.data.scene_questions import NAME_PROMPT, SHORT_CAPTION_PROMPTS
from nanovlm.data.scenes import pick
from nanovlm.names import check_known

COLORS = ("red", "green", "blue", "yellow", "gray", "teal", "black", "brown")
SHAPES = ("circle", "rectangle", "triangle")


def _load(split):
    """(questions, answers, image ids) in the package's order, and {image id: path}."""
    try:
        import easy_vqa

        return getattr(easy_vqa, f"get_{split}_questions")(), getattr(easy_vqa, f"get_{split}_image_paths")()
    except (ImportError, FileNotFoundError) as error:
        raise type(error)(f"no data ({error}); run: pip install --force-reinstall easy-vqa") from error


def kind_of(answer):
    """"yes_no", "color" or "shape"."""
    if answer in ("yes", "no"):
        return "yes_no"
    return "color" if answer in COLORS else "shape"


def is_denial(question):
    """Whether a question asks after what is not there."""
    return not {"not", "no"}.isdisjoint(question.rstrip("?").split())


def reveal(asked):
    """What questions and their answers say about the one object of a picture, exclusions included.

    Args:
      asked: iterable of (question, answer).
    Returns: (colour or None, shape or None), None where more than one remains possible.
    """
    colors, shapes = set(COLORS), set(SHAPES)
    for question, answer in asked:
        words = question.rstrip("?").split()
        if kind_of(answer) == "yes_no" and (answer == "yes") == is_denial(question):
            colors -= set(words)
            shapes -= set(words)
        else:
            named = {*words, answer}
            colors = colors & named or colors
            shapes = shapes & named or shapes
    return tuple(values.pop() if len(values) == 1 else None for values in (colors, shapes))


def caption_of(color, shape):
    """What is known of the object, in words: "blue rectangle", "rectangle", "blue shape" or "shape"."""
    return f"{color or ''} {shape or 'shape'}".strip()


def centre_of(pixels):
    """The centre of what is not background, as shares (x, y) of a picture uint8[H, W, 3] of one plain background."""
    rows, columns = (pixels != np.median(pixels, axis=(0, 1))).any(-1).nonzero()
    height, width, _ = pixels.shape
    return float(columns.mean() + 0.5) / width, float(rows.mean() + 0.5) / height


class EasyVQA:
    """Source with one record per picture: its questions as independent conversations, or one caption."""

    def __init__(self, split="train", kind="questions", seed=0, questions_per_picture=None):
        """
        Args:
          split: "train" or "test".
          kind: "questions"; or "denials", those with "not" or "no", of the pictures where one of them is false (of all,
            seven in ten are true); or "balanced", one question each for colour and shape and, with and without "not",
            one that is answered by yes and one by no; or "captions" such as "blue rectangle", made from what the split's
            answers reveal (not always both); or "names", such a caption and its words alone, each a conversation of its
            own with the object's centre as region; or "texts", the questions put to such a caption in place of the
            picture, where it tells both.
          seed: int, 0 or more; gives the order of every epoch and the sample of questions.
          questions_per_picture: how many questions of each picture a record holds, drawn anew each epoch; None = all.
        Raises: ValueError for a name that does not exist; ImportError or FileNotFoundError, with what to install,
          if the package or its data is missing.
        """
        check_known("unknown split", split, ("train", "test"))
        check_known("unknown kind", kind, ("questions", "denials", "balanced", "captions", "names", "texts"))
        self.name = f"easy_vqa_{split}"
        self.kind, self.seed, self.questions_per_picture = kind, seed, questions_per_picture
        (questions, answers, image_ids), self.paths = _load(split)
        self.asked = {image_id: [] for image_id in sorted(self.paths)}  # image id -> its (question, answer)
        for question, answer, image_id in zip(questions, answers, image_ids):
            self.asked[image_id].append((question, answer))
        self.captions = {}
        for image_id, asked in self.asked.items():
            if kind == "denials":
                denials = [one for one in asked if is_denial(one[0])]
                self.asked[image_id] = denials if "no" in {answer for _, answer in denials} else []
            elif kind not in ("questions", "balanced"):
                words = reveal(asked)
                self.captions[image_id] = caption_of(*words)
                if kind == "texts" and None in words:
                    self.asked[image_id] = []
        self.image_ids = [image_id for image_id, asked in self.asked.items() if asked]
        self.pixels = {}  # image id -> uint8[64, 64, 3], filled as pictures are first asked for

    def __len__(self):
        return len(self.image_ids)

    def record(self, n):
        """Record n, n >= 0; every epoch is a new permutation of all pictures."""
        epoch, place = divmod(n, len(self))
        image_id = self.image_ids[permutation(self.seed, epoch, length=len(self))[place]]
        rng = np.random.default_rng((self.seed, epoch, image_id))
        if self.kind == "captions":
            asked, kinds = [(pick(rng, SHORT_CAPTION_PROMPTS), self.captions[image_id])], ("short_caption",)
        elif self.kind == "names":
            caption = self.captions[image_id]
            known = [word for word in caption.split() if word != "shape"] or [caption]
            asked = [(NAME_PROMPT, name) for name in dict.fromkeys((" ".join(known), *known))]
            kinds = ("name",) * len(asked)
        else:
            asked = self.asked[image_id]
            if self.kind == "balanced":
                sorts = {}
                for question, answer in asked:
                    sort = kind_of(answer), answer == "yes", is_denial(question)
                    sorts.setdefault(sort, []).append((question, answer))
                asked = [pick(rng, sort) for sort in sorts.values()]
            if self.questions_per_picture is not None and self.questions_per_picture < len(asked):
                asked = [asked[i] for i in rng.permutation(len(asked))[: self.questions_per_picture]]
            kinds = tuple(kind_of(answer) for _, answer in asked)
        name, shown, pictures = f"{self.name}/{image_id}", f"{self.captions.get(image_id)}. ", ()
        if self.kind != "texts":
            if image_id not in self.pixels:
                with Image.open(self.paths[image_id]) as image:
                    self.pixels[image_id] = np.asarray(image.convert("RGB"))
            shown, pictures = 0, (Visual(name, (Image.fromarray(self.pixels[image_id]),)),)
        regions = (centre_of(self.pixels[image_id]),) * len(asked) if self.kind == "names" else ()
        turns = tuple((Turn("user", (shown, question)), Turn("assistant", (answer,))) for question, answer in asked)
        return Record(name, pictures, turns, kinds, regions=regions)
