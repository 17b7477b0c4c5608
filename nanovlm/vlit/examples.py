"""Ten examples, written by hand, of a described picture and a conversation about it.

Two of them stand before every request (the review, Appendix A.2.2: "about 10 generated samples through manual writing,
randomly select 2 of them"). Each shows what the plans that it serves ask for: a negative example denies something, one
of knowledge tells more than can be seen, one of several rounds follows up, one of a region stays with the marked object.
The pictures are imagined; they go through the same description as real ones.
"""

import json
from dataclasses import dataclass

from nanovlm.vlit.annotations import Annotation, Picture


@dataclass(frozen=True)
class Example:
    """plans: names of those it fits. picture: Picture. turns: (question, answer) each. region: the marked Annotation."""

    plans: tuple[str, ...]
    picture: Picture
    turns: tuple[tuple[str, str], ...]
    region: Annotation | None = None


def written(turns):
    """A conversation in the form of requirement 9, with its repeated keys: str.

    turns: (question, answer) each.
    """
    pairs = [(name, words) for turn in turns for name, words in zip(("User", "AI"), turn)]
    return "{" + ", ".join(f'"{name}": {json.dumps(words, ensure_ascii=False)}' for name, words in pairs) + "}"


def _example(plans, captions, objects, turns, asked=(), characters=(), attributes=(), region=None):
    """An Example. objects, characters: (words, box). asked: (question, answer). attributes: (object's place, words)."""
    notes = [Annotation(f"caption/{n}", "caption", words) for n, words in enumerate(captions)]
    notes += [Annotation(f"object/{n}", "object", words, box=box) for n, (words, box) in enumerate(objects)]
    notes += [
        Annotation(f"attribute/{n}", "attribute", words, of=f"object/{owner}")
        for n, (owner, words) in enumerate(attributes)
    ]
    notes += [Annotation(f"vqa/{n}", "vqa", answer, question) for n, (question, answer) in enumerate(asked)]
    notes += [Annotation(f"ocr/{n}", "ocr", words, box=box) for n, (words, box) in enumerate(characters)]
    marked = next((one for one in notes if one.id == region), None)
    return Example(plans, Picture("example", annotations=notes), tuple(turns), marked)


EXAMPLES = (
    _example(
        ("global", "multi-round"),
        ["A brown dog sits on a kitchen floor beside an empty bowl.", "A dog waits to be fed next to an oven."],
        [("dog", (0.3, 0.35, 0.62, 0.95)), ("bowl", (0.64, 0.82, 0.8, 0.95)), ("oven", (0.05, 0.1, 0.4, 0.8))],
        [
            (
                "What is the dog doing?",
                "The dog is sitting on the kitchen floor beside a bowl, with the oven behind it.",
            ),
            (
                "What is in the bowl next to it?",
                "Nothing: the bowl is empty, which is why the dog seems to be waiting for food.",
            ),
            ("Which side of the dog is that bowl on?", "It stands to the right of the dog."),
            ("And what is on the other side?", "On the left, behind the dog, there is an oven."),
            ("So which room is this?", "The oven shows that it is a kitchen."),
        ],
        asked=[("What color is the dog?", "brown")],
    ),
    _example(
        ("global", "knowledge"),
        ["A red double-decker bus passes a stop sign at a street corner.", "A bus with two floors in a narrow street."],
        [("bus", (0.2, 0.15, 0.8, 0.9)), ("stop sign", (0.85, 0.3, 0.95, 0.45)), ("person", (0.02, 0.5, 0.1, 0.9))],
        [
            ("What kind of vehicle can be seen?", "A red bus with two floors is driving past a street corner."),
            (
                "Why would a town use buses with two floors?",
                "They carry about twice as many passengers on the same length of road. In a narrow street like this one a "
                "longer bus would have trouble turning, so building upwards is the simpler way.",
            ),
            (
                "What does the sign at the corner ask of drivers?",
                "It reads STOP: every driver has to halt and give way before going on.",
            ),
        ],
        characters=[("STOP", (0.86, 0.35, 0.94, 0.4))],
    ),
    _example(
        ("global", "negative"),
        ["A man carries a white surfboard across a beach.", "A surfer walks towards the waves under a grey sky."],
        [("person", (0.4, 0.3, 0.55, 0.85)), ("surfboard", (0.35, 0.4, 0.7, 0.55))],
        [
            ("What is the man holding?", "He is carrying a white surfboard under his arm."),
            ("Is he riding a wave?", "No, he is still walking across the beach towards the water."),
            (
                "Can you see an umbrella on the beach?",
                "No, there is no umbrella. Only the man and his surfboard are on the sand.",
            ),
        ],
        asked=[("Is the sun shining?", "no")],
    ),
    _example(
        ("negative", "multi-round"),
        ["A grey cat lies on a desk in front of a laptop.", "A cat is stretched out between a keyboard and a cup."],
        [("cat", (0.2, 0.5, 0.7, 0.85)), ("laptop", (0.3, 0.1, 0.75, 0.55)), ("cup", (0.8, 0.55, 0.9, 0.75))],
        [
            ("Where is the cat?", "It is lying on a desk, in front of a laptop."),
            ("Is it asleep?", "No, its eyes are open."),
            ("What stands to the right of the animal?", "A cup stands there."),
            ("Is there a dog as well?", "No, the cat is the only animal on the desk."),
            ("Could somebody type on the laptop now?", "No, the cat is stretched out right in front of it."),
        ],
        asked=[("Are the cat's eyes closed?", "no")],
    ),
    _example(
        ("knowledge", "multi-round"),
        ["A steam train waits at platform 7.", "Smoke rises from an old black train in a station."],
        [("train", (0.15, 0.2, 0.9, 0.8)), ("person", (0.02, 0.45, 0.08, 0.75)), ("clock", (0.45, 0.02, 0.55, 0.12))],
        [
            ("What is waiting at the platform?", "An old black steam train is waiting, with smoke rising from it."),
            (
                "What makes such a train move?",
                "Coal heats water in its boiler. The steam pushes pistons back and forth, and rods turn that movement into "
                "the turning of the wheels.",
            ),
            (
                "Why are they rare today?",
                "Electric and diesel engines need far less work and fuel, so steam is mostly kept for special trips.",
            ),
            ("Which platform is it?", "The sign says 7, so it is platform 7."),
            ("How could travellers know whether they are late?", "A clock hangs above the platform."),
        ],
        characters=[("7", (0.05, 0.1, 0.08, 0.16))],
        attributes=[(0, "old")],
    ),
    _example(
        ("global", "negative", "knowledge"),
        ["Two children fly kites on a meadow.", "Kites of many colors over a green hill."],
        [
            ("person", (0.3, 0.6, 0.36, 0.85)),
            ("person", (0.45, 0.6, 0.5, 0.83)),
            ("kite", (0.2, 0.1, 0.3, 0.2)),
            ("kite", (0.6, 0.05, 0.75, 0.2)),
        ],
        [
            ("How many children are there?", "There are two children on the meadow."),
            (
                "Why does it have to be windy for this?",
                "A kite is held up by air that streams past it. Its line keeps it at an angle to the wind, so that the air "
                "pushes it upwards; without wind it would fall unless somebody ran with it.",
            ),
            ("Are they in a town?", "No, they are on a green hill, and no building can be seen."),
        ],
    ),
    _example(
        ("region",),
        ["A pizza with olives on a wooden table.", "A table laid for two with a pizza and glasses of wine."],
        [
            ("pizza", (0.25, 0.4, 0.75, 0.85)),
            ("wine glass", (0.05, 0.1, 0.2, 0.6)),
            ("wine glass", (0.8, 0.1, 0.95, 0.6)),
        ],
        [
            ("What is in the square box?", "The box marks a pizza with olives on a wooden table."),
            (
                "Where does this dish come from?",
                "Pizza as we know it comes from Naples in Italy, where it was baked in very hot wood-fired ovens.",
            ),
            ("Is anybody eating the marked pizza?", "No, the pizza is whole and nobody is eating it yet."),
        ],
        region="object/0",
    ),
    _example(
        ("region",),
        [
            "A girl in a yellow coat stands in the rain with an umbrella.",
            "A child under a red umbrella on a wet street.",
        ],
        [("person", (0.35, 0.3, 0.65, 0.95)), ("umbrella", (0.2, 0.1, 0.8, 0.4)), ("car", (0.8, 0.5, 1.0, 0.7))],
        [
            ("What is marked in the picture?", "The box marks a red umbrella that a girl is holding over her head."),
            (
                "What is it good for here?",
                "It keeps the rain off her: the street is wet, so it has been raining for a while.",
            ),
            ("Does the marked object touch the car?", "No, the car stands further right and away from it."),
        ],
        attributes=[(1, "wet")],
        region="object/1",
    ),
    _example(
        ("region",),
        ["A shop front with a sign above the door.", "A small bakery at the corner of a street."],
        [("bicycle", (0.1, 0.6, 0.3, 0.9)), ("person", (0.6, 0.5, 0.68, 0.9))],
        [
            ("What does the box mark?", "It marks the word BAKERY on the sign above the door."),
            (
                "What could I buy behind that sign?",
                "A bakery sells bread, rolls and cakes, usually baked on the same morning.",
            ),
            (
                "Is the marked sign on the bicycle?",
                "No, it hangs above the door; the bicycle leans against the wall further down.",
            ),
        ],
        characters=[("BAKERY", (0.35, 0.15, 0.7, 0.25))],
        region="ocr/0",
    ),
    _example(
        ("region",),
        ["A giraffe stands among zebras.", "Zebras and one giraffe at a water hole."],
        [("giraffe", (0.4, 0.1, 0.6, 0.9)), ("zebra", (0.05, 0.5, 0.3, 0.9)), ("zebra", (0.7, 0.5, 0.95, 0.9))],
        [
            ("Which animal is in the box?", "A giraffe is in the box. It stands between two zebras."),
            (
                "Why is its neck so long?",
                "It lets the animal reach leaves high up in trees that no other grazer can eat, and it helps to see lions early.",
            ),
            (
                "Is the animal in the box striped?",
                "No, it is not striped: the zebras on both sides are, but a giraffe has patches.",
            ),
        ],
        region="object/0",
    ),
)
