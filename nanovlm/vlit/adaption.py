"""Annotation adaption: an annotation as it is becomes the response, an instruction from a pool asks for it.

The pools are the seeds of Lynx (arXiv:2307.02469, Table 13; at least three for each task), and ours where it has fewer.
A language model may lengthen them through Lynx's meta prompt (Sec. 2.3). Short answers get "Give a short answer.", or
are written out as a sentence by a language model (the review, Sec. 3.2.1, against overfitting to single words).
"""

import random
import re

from nanovlm.vlit.categories import plural
from nanovlm.vlit.descriptions import SEVERAL, counts, named_region, question
from nanovlm.vlit.generators import Chat, digest
from nanovlm.vlit.samples import IMAGE, Sample
from nanovlm.vlit.template import Rounds

SHORT = "Give a short answer."
META = (
    "Here are some instructions that define a visual-language task. Continue to write 15 instructions with the same "
    "meaning: {seeds}"
)
WRITE_OUT = (
    "Question about a picture: {question}\nShort answer: {answer}\nWrite the short answer out as one complete sentence that "
    "says the same and nothing more. Reply with the sentence alone."
)
POOLS = {  # kind -> instructions; [QUESTION] and [OBJECT] stand for what the annotation brings
    "caption": (
        "Describe the image briefly.",
        "Describe the image.",
        "Write a relevant description to pair with the image.",
    ),
    "object": (
        "List the objects in the image.",
        "Which objects does the image contain?",
        "Name everything that can be seen in the image.",
    ),
    "count": (
        "How many [OBJECT] are there in the image?",
        "What is the number of [OBJECT] in the image?",
        "Count the [OBJECT] in the image.",
    ),
    "attribute": (
        "What is the [OBJECT] in the image like?",
        "Describe the [OBJECT] in the image.",
        "Which attributes does the [OBJECT] have?",
    ),
    "ocr": (
        "Read the texts in the image.",
        "What is written in the image?",
        "Which characters can be recognized in the image?",
    ),
    "vqa": (
        "[QUESTION]",
        "Answer the question about the image. [QUESTION]",
        "Look at the image and answer: [QUESTION]",
    ),
    "region": (
        "What is in the square box in the image?",
        "What does the square box mark?",
        "Name the object in the square box.",
    ),
}
TASKS = {  # names of the review's Table 5
    "caption": "image captioning", "object": "object detection", "count": "visual question answering",
    "attribute": "visual question answering", "ocr": "OCR", "vqa": "visual question answering", "region": "region caption",
}  # fmt: skip
SHORT_KINDS = ("count", "vqa", "region")
ITEM = re.compile(r"\d+\s*[).:]\s*(.+?)\s*(?=;?\s*\b\d+\s*[).:]\s|;?\s*$|;?\s*\n)")
SLOT = re.compile(r"\[(?:QUESTION|OBJECT)\]")


def meta_chat(kind):
    """What asks for more instructions of a kind: generators.Chat."""
    seeds = " ".join(f"{place}) {words};" for place, words in enumerate(POOLS[kind], start=1))
    return Chat((("user", META.format(seeds=seeds)),))


def more_instructions(kind, reply):
    """The new instructions in a reply to `meta_chat` that have the same slots as the seeds: list of str."""
    slots = {tuple(SLOT.findall(words)) for words in POOLS[kind]}
    found = [words.strip().strip('"') for words in ITEM.findall(reply)]
    known = {words.lower() for words in POOLS[kind]}
    return [
        words
        for words in dict.fromkeys(found)
        if words and words.lower() not in known and tuple(SLOT.findall(words)) in slots
    ]


def write_out_chat(asked, answer):
    """What asks for a short answer as a sentence: generators.Chat."""
    return Chat((("user", WRITE_OUT.format(question=asked, answer=answer)),))


def responses(picture):
    """What a picture's annotations answer: list of (kind, what goes into the slot, response, annotation ids)."""
    objects = picture.of_kind("object")
    found = [("caption", "", one.value, [one.id]) for one in picture.of_kind("caption")]
    if objects:
        ((_, listed),) = Rounds(picture, None, random.Random(0)).names()
        found.append(("object", "", listed, [one.id for one in objects]))
    for name, number in counts(objects).items():
        if number != SEVERAL:
            ids = [one.id for one in objects if one.value == name]
            found.append(("count", plural(name), str(number), ids))
    for one in objects:
        told = [note for note in picture.of_kind("attribute") if note.of == one.id]
        if told and counts(objects)[one.value] == 1:
            words = ", ".join(note.value for note in told)
            found.append(("attribute", one.value, words, [note.id for note in told]))
    if texts := picture.of_kind("ocr"):
        found.append(("ocr", "", ", ".join(one.value for one in texts), [one.id for one in texts]))
    found += [("vqa", question(one), one.value, [one.id]) for one in picture.of_kind("vqa")]
    return found


def adapt(kind, slot, response, annotation_ids, id, image, pools, seed, sentence=None):
    """One annotation as a sample.

    Args:
      kind, slot, response, annotation_ids: of `responses`. id: of the sample. image: as it stands in the file.
      pools: kind -> list of instructions. seed: int, draws one of them together with the id.
      sentence: the response written out by a language model, which needs no "Give a short answer."; None = short.
    Returns: samples.Sample.
    """
    asked = SLOT.sub(lambda _: slot, random.Random(digest([seed, id])).choice(pools[kind]))
    short = kind in SHORT_KINDS and sentence is None
    instruction = f"{asked} {SHORT}" if short else asked
    return Sample(
        id, (image,), (("user", f"{IMAGE}\n{instruction}"), ("assistant", sentence or response)), TASKS[kind], "AA",
        "region" if kind == "region" else "global",
        {"generator": "annotations", "plan": kind, "prompt_sha": digest(instruction), "seed": seed, "annotation_ids": annotation_ids},
    )  # fmt: skip


def region_response(picture, region):
    """What is in a marked box, as `responses` has it."""
    ids = [region.id, *(note.id for note in picture.of_kind("attribute") if note.of == region.id)]
    return "region", "", named_region(picture, region), ids
