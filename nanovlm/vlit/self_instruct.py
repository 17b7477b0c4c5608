"""Self-instruct: a language model reads the description of a picture and writes a conversation about the picture.

The system prompt (in prompts.json) is the review's (Appendix A.2.2) word for word, with its nine requirements as lines
that a plan switches. The plans are the kinds of conversation that its Sec. 4.2.2 asks for. Before the description stand
two of ten examples drawn at random ("about 10 generated samples through manual writing, randomly select 2 of them"),
and behind it the key points once more ("redundantly", Sec. 4.2.2). The examples (examples.json) are described pictures
that we imagined, each with a conversation that shows what the plans it serves ask for.

A picture is described in one of two forms: `sentences`, the review's template (Appendix A.2.2, as in its printed
example), and `boxes`, LLaVA's captions and boxes with their coordinates (arXiv:2304.08485, Sec. 3). Kinds that it lacks
drop out.

Differs from the paper: it prints the prompt for regions only; what a plan without a region says instead, the extra line
of several rounds, the examples and the key points are ours.
"""

import json
import random
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace

from nanovlm.vlit.annotations import Annotation, Picture
from nanovlm.vlit.replies import PROMPTS, Chat, digest
from nanovlm.vlit.words import GROUP_OF, counted, load_table, one_of

_prompts = PROMPTS["self-instruct"]
REQUIREMENTS = {int(place): words for place, words in _prompts["requirements"].items()}
REMINDERS = {int(place): words for place, words in _prompts["reminders"].items()}  # of some requirements
NUM_EXAMPLES = 2
SEVERAL = "several"  # of a crowd, whose members nobody counted


# Annotations as text, so that a language model that sees no picture can write about it


def sentences(picture, region=None):
    """The review's description: one paragraph. region: the Annotation that is circled by a square box, or None."""
    captions, objects, pairs, texts = (picture.of_kind(kind) for kind in ("caption", "object", "vqa", "ocr"))
    grouped = {name: f"{GROUP_OF[name]}_{name}" if name in GROUP_OF else name for name in counts(objects)}
    groups = [f"{number} {grouped[name]}" for name, number in counts(objects).items()]
    attributes = [described(picture, one) for one in objects if picture.attributes(one)]
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

    things = [placed(described(picture, one), one.box) for one in picture.of_kind("object")]
    things += [placed(f'text "{one.value}"', one.box) for one in picture.of_kind("ocr")]
    pairs = [f"Question: {question(one)} Answer: {one.value}" for one in picture.of_kind("vqa")]
    marked = [placed(f"circled by a square box: {named_region(picture, region)}", region.box)] if region else []
    blocks = ([one.value for one in picture.of_kind("caption")], things, pairs, marked)
    return "\n\n".join("\n".join(block) for block in blocks if block)


FORMS = {"sentences": sentences, "boxes": boxes}


def counts(objects):
    """How many there are of each category: dict name -> int or SEVERAL, in order of appearance."""
    return dict(Counter(one.value for one in objects)) | {one.value: SEVERAL for one in objects if one.is_crowd}


def listed(numbers):
    """All of `counts` in a sentence: "There are two dogs and one cat."."""
    told = [counted(name, number) for name, number in numbers.items()]
    words = " and ".join(filter(None, (", ".join(told[:-1]), told[-1])))
    return f"There {'is' if told[0].startswith('one ') else 'are'} {words}."


def named_region(picture, region):
    """What is in the box: "a tie that is striped", or "the text 'STOP'": str."""
    if region.kind == "ocr":
        return f"the text '{region.value}'"
    names = " and ".join(note.value for note in picture.attributes(region))
    return one_of(region.value) + (f" that is {names}" if names else "")


def question(annotation):
    """A question with the mark that some lack (as Lynx adds it, Table 13): str."""
    words = annotation.question.strip()
    return words if words.endswith(("?", ".")) else words + "?"


def described(picture, thing):
    """An object with its attributes: "person (smiling, standing)"."""
    names = ", ".join(note.value for note in picture.attributes(thing))
    return thing.value + (f" ({names})" if names else "")


def stopped(words):
    """Words with a full stop, unless they end a sentence already."""
    return words if words.endswith((".", "?", "!")) else words + "."


# What is asked about it


@dataclass(frozen=True)
class Plan:
    """A kind of conversation."""

    name: str
    lines: list[int]  # of REQUIREMENTS
    task: str  # as in the review's Table 5
    granularity: str = "global"  # "region" is about a marked object
    rounds: int = 0  # at least so many; 0 = not said


PLANS = {name: Plan(name, **plan) for name, plan in _prompts["plans"].items()}


EXAMPLES = []  # with plans: names of those it fits; picture; region: Annotation or None; turns: (question, answer) each
for _entry in load_table("examples.json"):
    _notes = {note["id"]: Annotation(**note) for note in _entry["annotations"]}
    _made = {"picture": Picture("example", annotations=[*_notes.values()]), "region": _notes.get(_entry.get("region"))}
    EXAMPLES.append(SimpleNamespace(**_entry | _made))


def written(turns):
    """A conversation in the form of requirement 9, with its repeated keys: str. turns: (question, answer) each."""
    pairs = [(name, words) for turn in turns for name, words in zip(("User", "AI"), turn)]
    return "{" + ", ".join(f'"{name}": {json.dumps(words, ensure_ascii=False)}' for name, words in pairs) + "}"


def chosen_lines(plan, lines=None):
    """The requirements that a plan states, or `lines` instead; the second only about a region. Raises: ValueError."""
    if unknown := set(lines or ()) - set(REQUIREMENTS):
        raise ValueError(f"there is no requirement {unknown.pop()}; they are numbered from 1 to {len(REQUIREMENTS)}")
    return tuple(number for number in lines or plan.lines if number != 2 or plan.granularity == "region")


def system_prompt(plan, lines=None):
    """What the language model is told first: str. Args: as of `chosen_lines`; the lines are numbered anew."""
    told = [REQUIREMENTS[number] for number in chosen_lines(plan, lines)]
    told += [_prompts["rounds"].format(rounds=plan.rounds)] if plan.rounds else []
    numbered = " ".join(f"{place}. {words}" for place, words in enumerate(told, start=1))
    return f"{_prompts['opening'].format(subject=_prompts['subjects'][plan.granularity])} {numbered}"


def chat(picture, plan, region=None, form="sentences", lines=None, seed=0, image=""):
    """What is asked about one picture: replies.Chat.

    region: Annotation that is marked, for a plan that is about one. form: of FORMS. lines: as above.
    seed: int; with the picture and the plan it decides which examples are shown. image: path, for those who look at it.
    """
    fitting = [one for one in EXAMPLES if plan.name in one.plans]
    messages = [("system", system_prompt(plan, lines))]
    for one in random.Random(digest([seed, picture.id, plan.name])).sample(fitting, NUM_EXAMPLES):
        messages += [("user", _given(FORMS[form](one.picture, one.region))), ("assistant", written(one.turns))]
    reminders = " ".join(REMINDERS[number] for number in sorted(chosen_lines(plan, lines)) if number in REMINDERS)
    messages.append(("user", _given(FORMS[form](picture, region), reminders)))
    return Chat(tuple(messages), image, (plan, picture, region))


def _given(description, reminders=""):
    """The words around a description, as in the review's example."""
    return "\n".join(filter(None, (f"Given textual description: {description}", reminders, "Generated conversation:")))
