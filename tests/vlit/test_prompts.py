"""What a generator is told: both descriptions, the review's prompt with its switchable lines, examples, reminders."""

import os
import re
from pathlib import Path

import pytest
from vlit_data import PHOTOS

from nanovlm.vlit.annotations import Annotation, Picture, read
from nanovlm.vlit.parsing import parse
from nanovlm.vlit.samples import Sample, defects, remarks
from nanovlm.vlit.self_instruct import EXAMPLES, PLANS, REQUIREMENTS, boxes, chat, sentences, system_prompt, written

SHARED = Path(os.environ.get("NANOVLM_SHARED", "absent"))
BOX = (0.1, 0.2, 0.5, 0.6)


def notes(kind, *values, **fields):
    return [Annotation(f"{kind}/{n}", kind, value, box=BOX, **fields) for n, value in enumerate(values)]


@pytest.fixture(scope="module")
def photos():
    return read(PHOTOS).pictures


def test_the_reviews_own_example_of_a_description():
    """Appendix A.2.2 of the review: COCO's annotations of one kitchen, word for word (shortened by three sentences)."""
    captions = [
        "Two women preparing food in a kitchen, one at the sink and one at the table.",
        "A set table with silverware, glasses and a bottle of wine.",
    ]
    objects = ["bottle"] * 2 + ["dining table"] + ["person"] * 2 + ["cup"] * 5 + ["banana"]
    asked = [("IS there flowers on the table?", "no"), ("How many bottles are on the table?", "2")]
    annotations = notes("caption", *captions) + notes("object", *objects) + notes("ocr", "BARDOLING")
    annotations += [Annotation(f"vqa/{n}", "vqa", answer, question) for n, (question, answer) in enumerate(asked)]
    assert sentences(Picture("1", annotations=annotations)) == (
        "This is a picture which can be described as Two women preparing food in a kitchen, one at the sink and one at "
        "the table. A set table with silverware, glasses and a bottle of wine. The image contains 2 kitchen_bottle, 1 "
        "furniture_dining table, 2 person_person, 5 kitchen_cup, 1 food_banana. The image also contains a number of "
        "question and answer pairs: 'Q: IS there flowers on the table? A: no.', 'Q: How many bottles are on the table? "
        "A: 2.'. The following characters can be recognized in the image: BARDOLING."
    )


def test_empty_kinds_drop_out_and_regions_are_named(photos):
    rocket, astronaut, coffee = photos["4"], photos["1"], photos["3"]
    assert "image contains" not in sentences(rocket) and sentences(Picture("0")) == ""
    for picture, kind, place, words in (
        (astronaut, "object", 0, "a person that is smiling."), (coffee, "object", 1, "a spoon that is shiny."),
        (astronaut, "ocr", 0, "the text 'COLLINS'."),
    ):  # fmt: skip
        told = sentences(picture, picture.of_kind(kind)[place])
        assert told.endswith(f"circled by a square box is {words}")
    assert "person (smiling)" in sentences(astronaut)
    annotations = notes("caption", "A man with a tie.", "A tie.") + notes("object", "tie", "person")
    picture = Picture("1", annotations=annotations)
    expected = "A man with a tie.\nA tie.\n\ntie: [0.1, 0.2, 0.5, 0.6]\nperson: [0.1, 0.2, 0.5, 0.6]"
    assert boxes(picture) == expected


@pytest.mark.skipif(not SHARED.exists(), reason="LLaVA's prompt files are not copied here")
def test_llavas_own_prompt_file_comes_out():
    text = (SHARED / "data/llava_eval/playground/prompts/complex_reasoning/000_caps.txt").read_text()
    captions, lines = text.strip().split("\n\n")
    annotations = notes("caption", *captions.split("\n"))
    for line in lines.split("\n"):
        name, numbers = line.split(": ")
        box = tuple(float(number) for number in numbers.strip("[]").split(", "))
        annotations.append(Annotation(f"object/{len(annotations)}", "object", name, box=box))
    assert boxes(Picture("1", annotations=annotations)) == text.strip()


@pytest.mark.skipif(not SHARED.exists(), reason="the review is not copied here")
def test_the_prompt_about_a_region_is_the_reviews_word_for_word():
    paper = (SHARED / "papers/vlit_review.txt").read_text()
    assert system_prompt(PLANS["region"]) in paper


def test_lines_are_switched_and_numbered_anew(photos):
    prompt = system_prompt(PLANS["global"], lines=(1, 2, 6, 9))
    assert re.findall(r"(\d)\. (\w+)", prompt) == [("1", "Answer"), ("2", "A"), ("3", "The")]  # 2 needs a region
    assert REQUIREMENTS[2] not in prompt and REQUIREMENTS[6] in prompt and "around the image. The" in prompt
    assert REQUIREMENTS[2] in system_prompt(PLANS["region"], lines=(2,))
    with pytest.raises(ValueError, match="no requirement 10"):
        system_prompt(PLANS["global"], lines=(10,))
    last = chat(photos["1"], PLANS["negative"]).messages[-1][1]
    assert last.startswith("Given textual description: This is a picture") and last.endswith("Generated conversation:")
    assert "avoid fuzzy answers" in last and "answered with no" in last and "square box" not in last
    assert "fuzzy" not in chat(photos["1"], PLANS["negative"], lines=(9,)).messages[-1][1]


def test_two_fitting_examples_stand_before_the_request_and_the_seed_draws_them(photos):
    shown = set()
    for seed in range(30):
        asked = chat(photos["1"], PLANS["negative"], seed=seed)
        roles = [role for role, _ in asked.messages]
        assert roles == ["system", "user", "assistant", "user", "assistant", "user"]
        answers = {asked.messages[2][1], asked.messages[4][1]}
        assert len(answers) == 2
        shown |= answers
    assert shown == {written(one.turns) for one in EXAMPLES if "negative" in one.plans}
    assert chat(photos["1"], PLANS["negative"], seed=3) == chat(photos["1"], PLANS["negative"], seed=3)


def test_ten_examples_keep_the_rules_that_they_teach():
    assert len(EXAMPLES) == 10 and all(sum(name in one.plans for one in EXAMPLES) >= 3 for name in PLANS)
    for one in EXAMPLES:
        parsed = parse(written(one.turns))
        assert not parsed.notes and len(parsed.turns) == 2 * len(one.turns)
        plan = "negative" if "negative" in one.plans else ""
        sample = Sample("example", (), parsed.turns, granularity="region" if one.region else "", plan=plan)
        assert defects(sample) + remarks(sample) == [] and ("region" in one.plans) == (one.region is not None)
        assert "multi-round" not in one.plans or len(one.turns) >= PLANS["multi-round"].rounds
