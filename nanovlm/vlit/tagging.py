"""Which task an instruction sets: by rule, by the nearest example, or by a language model.

The review assigns labels with TagGPT (arXiv:2304.03022): a language model proposes labels from a sample, those that
cover much and repeat no other are kept, and every instruction is given one of them. `propose` and `assign` do that with
any generator. Without one, `tag` knows the tasks below; their names are those of the review's Table 5, unified as it
says.
"""

import re
from collections import Counter
from difflib import SequenceMatcher

import numpy

from nanovlm.vlit.embedding import bucket, grams
from nanovlm.vlit.generators import Chat

OTHER = "other"
NEAREST = 0.25  # cosine below which no example is near enough
WH = r"\b(?:what|which|who|whose|where|when|how)\b"
TASKS = {  # name -> (rule on the lower-case instruction, examples); the first rule that fits decides
    "region understanding": (r"\b(?:box(?:ed)?|circled|marked|highlighted|outlined|region)\b|\[\d", "describe the marked region"),
    "object localization": (r"\b(?:bounding box|coordinates|locate|localize|detect|point (?:to|out))\b|^where\b", "find the dog"),
    "text recognition": (
        r"\b(?:ocr|read|written|transcribe|spell)\b|\b(?:text|word|letters|sign|label|title|caption) says?\b"
        r"|\bwhat (?:is the|does the) (?:text|word|number on|name on|brand)\b|\bwhat brand\b", "read the characters",
    ),
    "instance counting": (r"\bhow many\b|\bcount\b|\bnumber of\b", "count the cars"),
    "comparison": (r"\bdifferences?\b|\bcompared? (?:to|with)?\b|\bboth (?:images|pictures)\b|\bsimilarities\b", "spot the difference"),
    "visual storytelling": (r"\b(?:story|poem|tale|dialogue|song|lyrics|advertisement)\b", "write a story about it"),
    "complex reasoning": (
        r"\bwhy\b|\bhow (?:could|might|would|can|should|does|do)\b|\bwhat (?:might|could|would|can|if|should)\b"
        r"|\b(?:explain|infer|reason|imply|implies|suggests?|potential|possible|purpose|benefits?|challenges?|consequences?"
        r"|likely|predict|happen(?:ed|s)? (?:next|before)|precautions)\b", "explain what may have led to this situation",
    ),
    "detailed description": (
        r"\b(?:in detail|detailed|comprehensive|thorough(?:ly)?|elaborate|in-depth|as much as possible|analy[sz]e)\b",
        "characterize everything at length",
    ),
    "image captioning": (
        r"\b(?:describe|description|caption|summari[sz]e|depict|list the objects|name the objects|what objects)\b"
        r"|\bwhat(?:'s| is| do you see| can you see) (?:happening |shown |going on )?in (?:the|this) (?:image|picture|photo|scene)\b"
        r"|^what do you see|tell me (?:more )?about", "portray the picture briefly",
    ),
    "spatial relation": (
        r"\b(?:left of|right of|above|below|behind|in front of|next to|beside|on top of|under|underneath|between|relative to"
        r"|position(?:ed)?|located|relationship)\b", "relate the two objects in space",
    ),
    "instance attribute": (
        r"\bcolou?rs?\b|\bwhat (?:shape|size|material|pattern|texture|type of pattern)\b|\bwhat is the \w+ shape\b|\bmade (?:of|from)\b"
        r"|\bbig or small\b|\b(?:appearance|condition|wearing)\b", "name the colour",
    ),
    "action recognition": (r"\b(?:doing|action|activity|activities|playing|holding|engaged)\b", "recognize the activity"),
    "existence": (r"^(?:is|are) there\b|\b(?:do|can) you see (?:an?|any)\b|\b(?:present|visible|contain) in\b", "say whether it is there"),
    "image classification": (r"\bwhat (?:kind|type|sort|category|breed|species|sport|animal)\b|\bclassify\b", "name the category"),
    "scene understanding": (r"\b(?:weather|season|time of (?:day|year)|setting|location|environment|atmosphere|indoors?|outdoors?|place)\b",
                            "name the season and the surroundings"),
    "verification": (r"^(?:is|are|was|were|does|do|did|has|have|can|could|will|would)\b", "say yes or no"),
    "visual question answering": (rf"{WH}|\?", "answer the question"),
}  # fmt: skip
RULES = {name: re.compile(rule) for name, (rule, _) in TASKS.items()}


def _sparse(text):
    """Hashed grams of a text as {bucket: share}, of length 1."""
    counts = Counter(bucket(gram) for gram in grams(text))
    length = sum(count * count for count in counts.values()) ** 0.5
    return {place: count / length for place, count in counts.items()}


CENTRES = {name: _sparse(example) for name, (_, example) in TASKS.items()}


def tag(instruction):
    """The task of an instruction: str, a name of TASKS, or OTHER where neither rule nor example fits."""
    text = instruction.lower().strip()
    for name, rule in RULES.items():
        if rule.search(text):
            return name
    words = _sparse(text)
    near = {
        name: sum(share * centre.get(place, 0.0) for place, share in words.items()) for name, centre in CENTRES.items()
    }
    best = max(near, key=near.get)
    return best if near[best] >= NEAREST else OTHER


PROPOSE = (
    "Here are instructions about pictures:\n{instructions}\n"
    "Name the kinds of task that they set, at most ten, one short name on each line and nothing else."
)
ASSIGN = 'Here is an instruction about a picture: "{instruction}"\nWhich of these tasks does it set?\n{tags}\nAnswer with one name of the list.'
COVERAGE, SIMILAR, TOGETHER = (
    0.02,
    0.8,
    20,
)  # share of the sample a label covers; likeness of two names; instructions per prompt


def propose(generator, instructions, seed=0):
    """Labels for a sample of instructions, as TagGPT makes them.

    Args:
      generator: as in generators.py. instructions: list of str. seed: int.
    Returns: list of str; names alike to a commoner one are merged into it.
    Raises: ValueError if the generator names none.
    """
    groups = [instructions[begin : begin + TOGETHER] for begin in range(0, len(instructions), TOGETHER)]
    chats = [_chat(PROPOSE.format(instructions="\n".join(f"- {one}" for one in group))) for group in groups]
    replies = generator.generate(chats, n=1, temperature=0.0, max_tokens=128, seed=seed, stop=())
    lines = [line for several in replies for reply in several for line in reply.lower().split("\n")]
    counts = Counter(name for line in lines if 0 < len(name := re.sub(r"^[\W\d]+|[\W]+$", "", line)) <= 40)
    kept = []
    for name, _ in counts.most_common():
        if all(SequenceMatcher(None, name, other).ratio() < SIMILAR for other in kept):
            kept.append(name)
    if not kept:
        raise ValueError(f"{generator.name} named no task for {len(instructions)} instructions")
    return kept


def assign(generator, instructions, tags, seed=0):
    """One of the labels for every instruction: list of str, OTHER where the answer names none of them."""
    chats = [_chat(ASSIGN.format(instruction=one, tags="\n".join(tags))) for one in instructions]
    replies = generator.generate(chats, n=1, temperature=0.0, max_tokens=16, seed=seed, stop=("\n",))
    found = []
    for several in replies:
        named = [name for name in tags if name in " ".join(several).lower()]
        found.append(max(named, key=len) if named else OTHER)
    return found


def _chat(text):
    return Chat((("user", text),))


def covering(assigned):
    """The labels that enough of a sample was given: {label: count}; the rest is counted as OTHER."""
    counts = Counter(assigned)
    kept = {name: count for name, count in counts.items() if name != OTHER and count >= COVERAGE * len(assigned)}
    rest = len(assigned) - sum(kept.values())
    return kept | ({OTHER: rest} if rest else {})


def balance(counts):
    """How evenly samples are spread over tasks.

    Args:
      counts: {task: samples}, at least one.
    Returns: {"variance": of the shares in percent², "entropy": nats, "gini": 0 even to 1, "largest": share}.
    """
    shares = numpy.sort(numpy.array(list(counts.values()), dtype=float))
    shares /= shares.sum()
    ranks = numpy.arange(1, len(shares) + 1)
    filled = shares[shares > 0]
    return {
        "variance": float((100 * shares).var()),
        "entropy": float(-(filled * numpy.log(filled)).sum()),
        "gini": float((2 * (ranks * shares).sum() - (len(shares) + 1)) / len(shares)),
        "largest": float(shares[-1]),
    }
