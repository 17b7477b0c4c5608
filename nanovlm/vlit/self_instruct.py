"""Self-instruct: a language model reads the description of a picture and writes a conversation about the picture.

The system prompt is the review's (Appendix A.2.2) word for word, with its nine requirements as lines that a plan
switches. The plans are the kinds of conversation that its Sec. 4.2.2 asks for. Before the description stand two of ten
examples, drawn at random, and behind it the key points once more ("redundantly", Sec. 4.2.2).

Differs from the paper: it prints the prompt for regions only; what a plan without a region says instead, the extra line
of several rounds, the examples and the key points are ours.
"""

import random
from dataclasses import dataclass

from nanovlm.names import nearest
from nanovlm.vlit.annotations import Annotation, Picture
from nanovlm.vlit.descriptions import describe
from nanovlm.vlit.examples import EXAMPLES, written
from nanovlm.vlit.generators import Chat, digest

OPENING = (
    "You are an artificial intelligence assistant. You'll be given a text describing an image, and based on that text "
    "you'll be asked to generate a conversation around {subject}. The conversation context is a question-and-answer "
    "session between the visual AI assistant and the user around the image. Specifically, the generated dialogue needs "
    "to meet the following requirements:"
)
REGION, WHOLE = "the object circled by a square box in the image", "the image"
REQUIREMENTS = {
    1: "Answer confidently to the content described in the text.",
    2: "The conversation must be about the object in the circle.",
    3: "The visual artificial assistant's tone is that it sees the picture, not the text description.",
    4: "It is necessary to ask more complex questions about the content in the image, appropriately combine it with "
       "external knowledge that does not appear in the image, and expand the discussion on the people, places, brands, "
       "and other information known to the public in the image.",
    5: "The answers in the conversation need to be as detailed as possible, and examples or reasoning steps need to be "
       "given when necessary to make the answer more convincing.",
    6: "A certain number of negative answers need to be included in the generated dialogue, such as questions about "
       "non-occurring objects, and misdescriptions.",
    7: "The generated conversation starts with the user asking a question.",
    8: 'Don\'t have anything like "the description", or "the given text" in the generated conversation.',
    9: 'The format of the output dialogue must refer to {"User": "Question?", "AI": "Answer."}.',
}  # fmt: skip
ROUNDS = "The conversation has at least {rounds} rounds, and later questions follow up on earlier answers."
REMINDERS = {  # key points, repeated
    1: "Do not generate uncertain content and avoid fuzzy answers.",
    2: "Ask about the object in the square box only.",
    3: "Speak as somebody who sees the picture.",
    6: "Some questions must be answered with no.",
    8: "Never speak of a description or a text.",
}
NUM_EXAMPLES = 2


@dataclass(frozen=True)
class Plan:
    """A kind of conversation.

    lines: of REQUIREMENTS. task: as in the review's Table 5. granularity: "region" is about a marked object.
    rounds: at least so many; 0 = not said.
    """

    name: str
    lines: tuple[int, ...]
    task: str
    granularity: str = "global"
    rounds: int = 0


PLANS = {
    "global": Plan("global", (1, 3, 5, 7, 8, 9), "conversation"),
    "region": Plan("region", (1, 2, 3, 4, 5, 6, 7, 8, 9), "single-region reasoning", "region"),
    "negative": Plan("negative", (1, 3, 6, 7, 8, 9), "visual question answering"),
    "multi-round": Plan("multi-round", (1, 3, 5, 7, 8, 9), "conversation", rounds=5),
    "knowledge": Plan("knowledge", (1, 3, 4, 5, 7, 8, 9), "complex reasoning"),
}


@dataclass(frozen=True)
class Material:
    """What a chat was made from: for generators that work from annotations instead of words."""

    plan: Plan
    picture: Picture
    region: Annotation | None = None


def find_plan(name):
    """A plan by its name. Raises: ValueError with the nearest known one."""
    if name not in PLANS:
        raise ValueError(f"unknown plan {name!r}.{nearest(name, PLANS)}")
    return PLANS[name]


def chosen_lines(plan, lines=None):
    """Numbers of the requirements that a plan states: tuple of int; the second only about a region.

    lines: instead of the plan's own. Raises: ValueError for a number that is none.
    """
    lines = plan.lines if lines is None else lines
    for number in lines:
        if number not in REQUIREMENTS:
            raise ValueError(f"there is no requirement {number}; they are numbered from 1 to {max(REQUIREMENTS)}")
    return tuple(number for number in lines if number != 2 or plan.granularity == "region")


def system_prompt(plan, lines=None):
    """What the language model is told first: str. Args: as of `chosen_lines`; the lines are numbered anew."""
    told = [REQUIREMENTS[number] for number in chosen_lines(plan, lines)]
    told += [ROUNDS.format(rounds=plan.rounds)] if plan.rounds else []
    numbered = " ".join(f"{place}. {words}" for place, words in enumerate(told, start=1))
    return f"{OPENING.format(subject=REGION if plan.granularity == 'region' else WHOLE)} {numbered}"


def chat(picture, plan, region=None, form="sentences", lines=None, seed=0, image=""):
    """What is asked about one picture.

    Args:
      picture: annotations.Picture. plan: Plan. region: Annotation that is marked, for a plan that is about one.
      form: of descriptions.FORMS. lines: as of `chosen_lines`.
      seed: int; with the picture and the plan it decides which examples are shown.
      image: path of the picture (marked), for generators that look at it.
    Returns: generators.Chat.
    """
    fitting = [one for one in EXAMPLES if plan.name in one.plans]
    drawn = random.Random(digest([seed, picture.id, plan.name])).sample(fitting, NUM_EXAMPLES)
    messages = [("system", system_prompt(plan, lines))]
    for one in drawn:
        messages += [("user", _given(describe(one.picture, form, one.region))), ("assistant", written(one.turns))]
    stated = chosen_lines(plan, lines)
    reminders = " ".join(words for number, words in REMINDERS.items() if number in stated)
    messages.append(("user", _given(describe(picture, form, region), reminders)))
    return Chat(tuple(messages), image, Material(plan, picture, region))


def _given(description, reminders=""):
    """The words around a description, as in the review's example."""
    return "\n".join(filter(None, (f"Given textual description: {description}", reminders, "Generated conversation:")))
