"""How much an instruction asks for: the things it speaks of, and how hard it is.

O/G  semantic elements of an instruction. The review takes them from a dependency tool (HanLP); here they are the
     different names of things, marked regions, numbers and spatial relations in it, under the name elements_lexical.
I    a language model's mark from 1 to 10, after scored examples. Without one a proxy, declared as such: length,
     clauses, reasoning words and turns.
"""

import re

from nanovlm.vlit.generators import Chat
from nanovlm.vlit.words import COCO, COLORS, MORE_OBJECTS, RELATIONS, named, number, tokens

LEXICON = COCO | MORE_OBJECTS
BOX = re.compile(r"\[\s*[\d.]+(?:\s*,\s*[\d.]+)+\s*\]|<box>.*?</box>")  # coordinates
MARKED = re.compile(r"\b(?:boxed|circled|marked|highlighted|outlined)\b", re.IGNORECASE)
RELATION = re.compile(rf"\b(?:{'|'.join(sorted(RELATIONS, key=len, reverse=True))})\b")
REASONING = re.compile(
    r"\b(?:why|how|explain|reason|compare|infer|imply|suggest|might|could|would|if|because|purpose)\b"
)
CLAUSE = re.compile(r"[,;:]|\b(?:and|or|but|while|which|that|because|if|when|who|where)\b")
MARK_ASKED = (
    "Rate how complex this instruction about a picture is, from 1 (one look is enough) to 10 (many steps, outside "
    "knowledge).\nExamples:\n"
    '"What color is the car?" Answer: "Red." Mark: 1\n'
    '"How many people sit at the table, and what are they eating?" Answer: "Three people; soup and bread." Mark: 4\n'
    '"Why might the street be empty at this hour, and what would you check to be sure?" Answer: "…" Mark: 8\n'
    'Instruction: "{instruction}"\nAnswer: "{response}"\nMark:'
)


def elements(instruction, lexicon=LEXICON):
    """The number of semantic elements, elements_lexical: int.

    lexicon: names of things that count, in the singular.
    """
    regions = len(BOX.findall(instruction)) or bool(MARKED.search(instruction))
    words = tokens(BOX.sub(" ", instruction))
    things = set(named(words, lexicon))
    numbers = {value for word in words if (value := number(word)) is not None}
    relations = set(RELATION.findall(instruction.lower()))
    return len(things) + len(numbers) + len(relations) + regions + len(COLORS & set(words))


def proxy(instruction, turns=1):
    """A stand-in for a mark, from 1 to 10: float. Hard-wired weights, no judgement.

    turns: of the user in the whole conversation.
    """
    text = instruction.lower()
    points = (
        1
        + len(tokens(text)) / 10
        + len(CLAUSE.findall(text)) / 2
        + 1.5 * len(REASONING.findall(text))
        + (turns - 1) / 2
    )
    return min(10.0, points)


def parse_mark(reply):
    """The first whole number from 1 to 10 in a reply: int, or None."""
    for found in re.findall(r"(?<![\d.])\d+(?![\d]|\.\d)", reply):
        if 1 <= int(found) <= 10:
            return int(found)
    return None


def marks(generator, pairs, seed=0):
    """A language model's marks: list of int or None. pairs: list of (instruction, response)."""
    chats = [Chat((("user", MARK_ASKED.format(instruction=one, response=other)),)) for one, other in pairs]
    replies = generator.generate(chats, n=1, temperature=0.0, max_tokens=8, seed=seed, stop=())
    return [parse_mark(" ".join(several)) for several in replies]
