"""Annotations as text, so that a language model that sees no picture can write about it.

Two representations: `sentences`, the review's template (Appendix A.2.2, as in its printed example), and `boxes`,
LLaVA's captions and boxes with their coordinates (arXiv:2304.08485, Sec. 3). Kinds that a picture lacks drop out.
"""

from collections import Counter

from nanovlm.vlit.words import GROUP_OF, one_of

SEVERAL = "several"  # of a crowd, whose members nobody counted


def sentences(picture, region=None):
    """The review's description: one paragraph. region: the Annotation that is circled by a square box, or None."""
    captions, objects, pairs, texts = (picture.of_kind(kind) for kind in ("caption", "object", "vqa", "ocr"))
    names = {one.id: one.value for one in objects}
    numbers = counts(objects).items()
    groups = [f"{number} {GROUP_OF[name] + '_' if name in GROUP_OF else ''}{name}" for name, number in numbers]
    attributes = [f"{names[owner]} ({', '.join(told)})" for owner, told in _by_owner(picture).items() if owner in names]
    asked = [f"'Q: {question(one)} A: {stopped(one.value)}'" for one in pairs]
    parts = (
        ("This is a picture which can be described as {}", " ".join(stopped(one.value) for one in captions)),
        ("The image contains {}.", ", ".join(groups)),
        ("The following attributes can be seen: {}.", ", ".join(attributes)),
        ("The image also contains a number of question and answer pairs: {}.", ", ".join(asked)),
        ("The following characters can be recognized in the image: {}.", ", ".join(one.value for one in texts)),
        ("The object circled by a square box is {}.", "" if region is None else named_region(picture, region)),
    )
    return " ".join(sentence.format(words) for sentence, words in parts if words)


def boxes(picture, region=None):
    """LLaVA's captions, empty line, "category: [left, top, right, bottom]" in shares; then what it lacks: str."""
    def placed(words, box):
        return f"{words}: {[round(side, 3) for side in box]}"

    owned = _by_owner(picture)
    things = [placed(one.value + (f" ({', '.join(owned[one.id])})" if one.id in owned else ""), one.box)
              for one in picture.of_kind("object")]  # fmt: skip
    things += [placed(f'text "{one.value}"', one.box) for one in picture.of_kind("ocr")]
    pairs = [f"Question: {question(one)} Answer: {one.value}" for one in picture.of_kind("vqa")]
    marked = [placed(f"circled by a square box: {named_region(picture, region)}", region.box)] if region else []
    blocks = ([one.value for one in picture.of_kind("caption")], things, pairs, marked)
    return "\n\n".join("\n".join(block) for block in blocks if block)


FORMS = {"sentences": sentences, "boxes": boxes}


def counts(objects):
    """How many there are of each category: dict name -> int or SEVERAL, in order of appearance."""
    return dict(Counter(one.value for one in objects)) | {one.value: SEVERAL for one in objects if one.is_crowd}


def named_region(picture, region):
    """What is in the box: "a tie that is striped", or "the text 'STOP'": str."""
    if region.kind == "ocr":
        return f"the text '{region.value}'"
    names = _by_owner(picture).get(region.id)
    return one_of(region.value) + (f" that is {' and '.join(names)}" if names else "")


def question(annotation):
    """A question with the mark that some lack (as Lynx adds it, Table 13): str."""
    words = annotation.question.strip()
    return words if words.endswith(("?", ".")) else words + "?"


def _by_owner(picture):
    """Attributes of each object: dict id -> list of str."""
    found = {}
    for one in picture.of_kind("attribute"):
        found.setdefault(one.of, []).append(one.value)
    return found


def stopped(words):
    """Words with a full stop, unless they end a sentence already."""
    return words if words.endswith((".", "?", "!")) else words + "."
