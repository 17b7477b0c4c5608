"""Annotation adaption: an annotation as it is becomes the response, an instruction from a pool asks for it.

The pools (in prompts.json) are the seeds of Lynx (arXiv:2307.02469, Table 13; at least three for each task), and ours
where it has fewer. A language model may lengthen them through Lynx's meta prompt (Sec. 2.3). Short answers get "Give a
short answer.", or are written out as a sentence by a language model (the review, Sec. 3.2.1, against overfitting to
single words).
"""

import random
import re

from nanovlm.vlit.replies import PROMPTS, digest, prompt
from nanovlm.vlit.samples import make_item
from nanovlm.vlit.self_instruct import SEVERAL, counts, listed, question
from nanovlm.vlit.words import plural

POOLS = PROMPTS["adaption"]["pools"]  # kind -> instructions; [QUESTION], [OBJECT]: of the annotation
TASKS = PROMPTS["adaption"]["tasks"]  # kind -> name in the review's Table 5
SHORT_KINDS = ("count", "vqa", "region")
ITEM = re.compile(r"\d+\s*[).:]\s*(.+?)\s*(?=;?\s*\b\d+\s*[).:]\s|;?\s*$|;?\s*\n)")
SLOT = re.compile(r"\[(?:QUESTION|OBJECT)\]")


def meta_chat(kind):
    """What asks for more instructions of a kind: replies.Chat."""
    seeds = " ".join(f"{place}) {words};" for place, words in enumerate(POOLS[kind], start=1))
    return prompt("more instructions", seeds=seeds)


def sentence_chat(kind, slot, response, annotation_ids):
    """What asks for one of `responses` as a sentence: replies.Chat."""
    asked = slot if kind == "vqa" else POOLS[kind][0].replace("[OBJECT]", slot)
    return prompt("write out", question=asked, answer=response)


def more_instructions(kind, reply):
    """The new instructions in a reply to `meta_chat` that have the same slots as the seeds: list of str."""
    slots = {tuple(SLOT.findall(words)) for words in POOLS[kind]}
    known = {words.lower() for words in POOLS[kind]}
    found = dict.fromkeys(words.strip().strip('"') for words in ITEM.findall(reply))
    return [words for words in found if words and words.lower() not in known and tuple(SLOT.findall(words)) in slots]


def responses(picture):
    """What a picture's annotations answer: list of (kind, what goes into the slot, response, annotation ids)."""
    objects, texts = picture.of_kind("object"), picture.of_kind("ocr")
    found = [("caption", "", one.value, [one.id]) for one in picture.of_kind("caption")]
    if objects:
        found.append(("object", "", listed(counts(objects)), [one.id for one in objects]))
    for name, number in counts(objects).items():
        if number != SEVERAL:
            found.append(("count", plural(name), str(number), [one.id for one in objects if one.value == name]))
    for one in objects:
        told = picture.attributes(one)
        if told and counts(objects)[one.value] == 1:
            found.append(("attribute", one.value, ", ".join(note.value for note in told), [note.id for note in told]))
    if texts:
        found.append(("ocr", "", ", ".join(one.value for one in texts), [one.id for one in texts]))
    return found + [("vqa", question(one), one.value, [one.id]) for one in picture.of_kind("vqa")]


def adapt(kind, slot, response, annotation_ids, id, image, pools, seed, sentence=None):
    """One of `responses` as a sample: LLaVA's item (dict).

    id: of the sample; with the seed it draws an instruction from pools (kind -> list). image: as it stands in the file.
    sentence: the response written out by a language model, which needs no "Give a short answer."; None = short.
    """
    instruction = SLOT.sub(lambda _: slot, random.Random(digest([seed, id])).choice(pools[kind]))
    if kind in SHORT_KINDS and sentence is None:
        instruction = f"{instruction} {PROMPTS['adaption']['short']}"
    origin = {"generator": "annotations", "plan": kind, "prompt_sha": digest(instruction), "seed": seed,
              "annotation_ids": annotation_ids}  # fmt: skip
    granularity = "region" if kind == "region" else "global"
    return make_item(id, image, [instruction, sentence or response], TASKS[kind], "AA", granularity, origin)
