"""What a sample breaks, as far as it can be checked without a model.

    python -m nanovlm.vlit lint FILE [--images FOLDER]

Defects make a sample bad to train on: no order of turns, empty ones, other pictures than placeholders, remains of the
format, and talk about the text that the writer saw instead of the picture (requirements 3 and 8 of the review's system
prompt; its own printed samples break them). Remarks are softer: hedging (requirement 1), questions about a marked region
that never speak of it (2), a negative plan without a negative answer (6). `filter` drops for defects alone.
"""

import re
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from nanovlm.data.images import ImageError, load
from nanovlm.data.records import check_order
from nanovlm.evaluation.items import Encoded
from nanovlm.vlit.samples import IMAGE, picture, read

SHOWN = 20  # samples named one by one

DESCRIPTION = r"(?:descriptions?|captions?|annotations?)"
KNOWLEDGE = rf"(?:{DESCRIPTION}|information|text|context|details)"
PICTURE = r"(?:image|picture|photo|photograph|scene)"
SOURCE = re.compile(  # requirement 8: "the description", "the given text"; a picture cannot mention anything either
    rf"""\b(?:
    (?:according\ to|based\ (?:solely\ |only\ )?on|from|judging\ by)\ (?:the|this|your)\ (?:{PICTURE}(?:'s)?\ |textual\ )?{DESCRIPTION}
    | the\ (?:{PICTURE}(?:'s)?\ |textual\ )?{DESCRIPTION}\ (?:of\ the\ {PICTURE}\ )?
      (?:does|do|did|says?|states?|mentions?|indicates?|provides?|describes?|specifies|specify|suggests?)\b
    | (?:the|this|your)\ (?:given|provided|available|supplied)\ {KNOWLEDGE}
    | (?:information|text|context|details?|{DESCRIPTION})\ (?:that\ (?:is|are|was|were)\ )?(?:given|provided|supplied|available\ to\ me)\b
    | (?:mentioned|specified|stated|described|provided|given)\ (?:in|by)\ the\ (?:textual\ )?{DESCRIPTION}
    | textual\ description
    | {PICTURE}\ (?:does\ not|doesn't|doesn’t|did\ not)\ mention
    )""",
    re.VERBOSE | re.IGNORECASE,
)
FORMAT = re.compile(r'"(?:User|AI)"\s*:|```|^\s*[{\[]\s*"', re.IGNORECASE)  # requirement 9's form where words should be
HEDGE = re.compile(
    r"\b(?:(?:not|n't|n’t) (?:\w+ )?(?:clear|certain|sure|possible to (?:tell|say|determine))|unclear|uncertain"
    r"|(?:cannot|can't|can’t|could not|couldn't|difficult to|hard to|impossible to) (?:\w+ )?(?:determine|identify|tell|say|confirm)"
    r"|(?:specific|enough|clear) information)\b",
    re.IGNORECASE,
)
REGION = re.compile(
    r"\b(?:box|boxed|square|rectangle|circle[ds]?|frame[ds]?|outlined|marked|highlighted|region|area)\b", re.IGNORECASE
)
NEGATIVE = re.compile(r"^\W*no\b|\b(?:not|n't|n’t|no|none|neither|never|cannot|without)\b", re.IGNORECASE)


def defects(sample, root=None):
    """What makes a sample bad to train on.

    Args:
      sample: has turns ((role, text) each) and images (as the file names them).
      root: folder where its image paths start; None = pictures are not looked at.
    Returns: list of (rule, words) str; rule is "turns", "placeholders", "source", "format" or "image".
    """
    found = []
    try:
        check_order([role for role, _ in sample.turns if role != "system"])
    except ValueError as error:
        found.append(("turns", str(error)))
    for place, (role, text) in enumerate(sample.turns, start=1):
        words = text.replace(IMAGE, " ").strip() if role == "user" else text.strip()
        if not words:
            found.append(("turns", f"turn {place}: the {role} says nothing"))
        for rule, pattern in (("source", SOURCE), ("format", FORMAT)):
            if broken := pattern.search(words) if role != "system" else None:
                found.append((rule, f"turn {place}: {broken[0]!r}"))
    placeholders = sum(text.count(IMAGE) for role, text in sample.turns if role == "user")
    if placeholders != len(sample.images):
        found.append(("placeholders", f"{placeholders} {IMAGE} in the user's turns, {len(sample.images)} image(s)"))
    for name in sample.images if root is not None else ():
        try:
            found_at = picture(name, root)
            found_at.open() if isinstance(found_at, Encoded) else load(found_at)
        except (ImageError, OSError) as error:
            found.append(("image", str(error)))
    return found


def remarks(sample, granularity="", plan=""):
    """What might be better: list of (rule, words) str; rule is "hedge", "region" or "negative".

    granularity, plan: of the sample's provenance; the rules about them are checked where they are known.
    """
    found = []
    said = [text for role, text in sample.turns if role == "assistant"]
    for place, (role, text) in enumerate(sample.turns, start=1):
        if role == "assistant" and (broken := HEDGE.search(text)):
            found.append(("hedge", f"turn {place}: {broken[0]!r}"))
    if granularity == "region" and not any(REGION.search(text) for _, text in sample.turns):
        found.append(("region", "nobody speaks of the marked region"))
    if plan == "negative" and not any(NEGATIVE.search(text) for text in said):
        found.append(("negative", "no answer denies anything"))
    return found


def add_flags(parser):
    """The flags of `lint`."""
    parser.add_argument("file", metavar="FILE", help="LLaVA-style .json or .jsonl")
    parser.add_argument("--images", metavar="FOLDER", help="where image paths start (default: the folder of FILE)")


def run(wishes):
    """Check every sample of a file: list of str, what to print."""
    root = Path(wishes.file).parent if wishes.images is None else Path(wishes.images)
    counts, shown, total, broken = Counter(), [], 0, 0
    for where, sample in tqdm(read(wishes.file), desc="lint", unit="sample", disable=None):
        total += 1
        if isinstance(sample, ValueError):
            found = [("unreadable", str(sample))]
        else:
            found = defects(sample, root)
            counts.update(rule for rule, _ in remarks(sample, sample.granularity, sample.provenance.get("plan", "")))
        broken += bool(found)
        counts.update({rule for rule, _ in found})
        shown += [f"{where}: {rule}: {words}" for rule, words in found][: max(0, SHOWN - len(shown))]
    kinds = ", ".join(f"{rule} {count}" for rule, count in counts.most_common())
    return [*shown, f"{total} samples, {broken} with defects" + (f"; samples by rule: {kinds}" if kinds else "")]
