"""Which task an instruction sets: by rule, by the nearest example, or by a language model.

The review assigns labels with TagGPT (arXiv:2304.03022): a language model proposes labels from a sample, those that
cover much and repeat no other are kept, and every instruction is given one of them. `propose` and `assign` do that with
any generator. Without one, `tag` knows the tasks of tasks.json, whose names are those of the review's Table 5, unified
as it says; of their rules on the lower-case instruction the first that fits decides.
"""

import math
import re
from collections import Counter
from difflib import SequenceMatcher

import numpy

from nanovlm.vlit.clustering import grams
from nanovlm.vlit.replies import prompt
from nanovlm.vlit.words import load_table

OTHER = "other"
NEAREST = 0.25  # cosine below which no example is near enough
COVERAGE = 0.02  # of the sample, of a label that is kept
SIMILAR = 0.8  # two names alike
TOGETHER = 20  # instructions in a prompt
TASKS = load_table("tasks.json")
RULES = {name: re.compile("|".join(task["rules"])) for name, task in TASKS.items()}


def _unit(text):
    """Grams of a text as {gram: share}, of length 1."""
    counts = Counter(grams(text))
    length = math.hypot(*counts.values())
    return {gram: count / length for gram, count in counts.items()}


EXAMPLES = {name: _unit(task["example"]) for name, task in TASKS.items()}


def tag(instruction):
    """The task of an instruction: str, a name of TASKS, or OTHER where neither rule nor example fits."""
    text = instruction.lower().strip()
    for name, rule in RULES.items():
        if rule.search(text):
            return name
    words = _unit(text)
    near = {name: sum(words[gram] * share for gram, share in example.items() if gram in words)
            for name, example in EXAMPLES.items()}  # fmt: skip
    best = max(near, key=near.get)
    return best if near[best] >= NEAREST else OTHER


def task_of(sample, instruction, own):
    """The task of one of a sample's instructions: str. own: the sample's field `task` is taken where there is one."""
    return sample.task if own and sample.task else tag(instruction)


def propose(judge, instructions, seed=0):
    """Labels for some instructions: list of str, those alike to a commoner one merged. Raises: ValueError for none."""
    groups = [instructions[begin : begin + TOGETHER] for begin in range(0, len(instructions), TOGETHER)]
    chats = [prompt("propose tasks", instructions="\n".join(f"- {one}" for one in group)) for group in groups]
    lines = "\n".join(sum(judge.ask(chats, 1, 0.0, 128, seed), [])).lower().split("\n")
    counts = Counter(name for line in lines if 0 < len(name := re.sub(r"^[\W\d]+|[\W]+$", "", line)) <= 40)
    kept = []
    for name, _ in counts.most_common():
        if all(SequenceMatcher(None, name, other).ratio() < SIMILAR for other in kept):
            kept.append(name)
    if not kept:
        raise ValueError(f"{judge.name} named no task for {len(instructions)} instructions")
    return kept


def assign(judge, instructions, tags, seed=0):
    """One of the labels for every instruction: list of str, OTHER where the answer names none of them."""
    chats = [prompt("assign task", instruction=one, tags="\n".join(tags)) for one in instructions]
    replies = [" ".join(several).lower() for several in judge.ask(chats, 1, 0.0, 16, seed, ("\n",))]
    return [max((name for name in tags if name in reply), key=len, default=OTHER) for reply in replies]


def covering(assigned):
    """The labels that enough of a sample was given: {label: count}; the rest is counted as OTHER."""
    counts = Counter(assigned)
    kept = {name: count for name, count in counts.items() if name != OTHER and count >= COVERAGE * len(assigned)}
    rest = len(assigned) - sum(kept.values())
    return kept | ({OTHER: rest} if rest else {})


def balance(counts):
    """How evenly samples are spread over tasks, from {task: samples}.

    Returns: {"variance": of the shares in percent², "entropy": nats, "gini": 0 even to 1, "largest": share}.
    """
    shares = numpy.sort(numpy.array(list(counts.values()), dtype=float))
    shares /= shares.sum()
    ranks, filled = numpy.arange(1, len(shares) + 1), shares[shares > 0]
    return {
        "variance": float((100 * shares).var()),
        "entropy": float(-(filled * numpy.log(filled)).sum()),
        "gini": float((2 * (ranks * shares).sum() - (len(shares) + 1)) / len(shares)),
        "largest": float(shares[-1]),
    }
