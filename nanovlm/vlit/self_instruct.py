"""Self-instruct: a language model reads the description of a picture and writes a conversation about the picture.

The system prompt (in prompts.json) is the review's (Appendix A.2.2) word for word, with its nine requirements as lines
that a plan switches. The plans are the kinds of conversation that its Sec. 4.2.2 asks for. Before the description stand
two of ten examples drawn at random ("about 10 generated samples through manual writing, randomly select 2 of them"),
and behind it the key points once more ("redundantly", Sec. 4.2.2). The examples (examples.json) are described pictures
that we imagined, each with a conversation that shows what the plans it serves ask for.

Differs from the paper: it prints the prompt for regions only; what a plan without a region says instead, the extra line
of several rounds, the examples and the key points are ours.
"""

import json
import random
from dataclasses import dataclass

from nanovlm.vlit.annotations import Annotation, Picture
from nanovlm.vlit.descriptions import FORMS
from nanovlm.vlit.replies import PROMPTS, Chat, digest
from nanovlm.vlit.words import load_table

_prompts = PROMPTS["self-instruct"]
REQUIREMENTS = {int(place): words for place, words in _prompts["requirements"].items()}
REMINDERS = {int(place): words for place, words in _prompts["reminders"].items()}  # of some requirements
NUM_EXAMPLES = 2


@dataclass(frozen=True)
class Plan:
    """A kind of conversation.

    lines: of REQUIREMENTS. task: as in the review's Table 5. granularity: "region" is about a marked object.
    rounds: at least so many; 0 = not said.
    """

    name: str
    lines: list[int]
    task: str
    granularity: str = "global"
    rounds: int = 0


PLANS = {name: Plan(name, **plan) for name, plan in _prompts["plans"].items()}


@dataclass(frozen=True)
class Example:
    """plans: names of those it fits. region: the marked Annotation, or None. turns: (question, answer) each."""

    plans: list
    picture: Picture
    region: Annotation | None
    turns: list


def _example(plans, annotations, turns, region=None):
    """An entry of examples.json; region: id of an annotation."""
    notes = {note["id"]: Annotation(**note) for note in annotations}
    return Example(plans, Picture("example", annotations=list(notes.values())), notes.get(region), turns)


EXAMPLES = [_example(**entry) for entry in load_table("examples.json")]


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

    region: Annotation that is marked, for a plan that is about one. form: of descriptions.FORMS. lines: as above.
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
