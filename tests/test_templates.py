"""Templates: what is written, what is trained, and that a prompt ends exactly where the reply begins."""

import dataclasses
import random

import pytest

from nanovlm.data.records import Turn
from nanovlm.data.templates import NANO, Row, Segment, Template, prompt, segments, write
from nanovlm.data.tokenizer import train_tokenizer
from nanovlm.vlm import IGNORE, IMAGE_TOKEN

# The forms of the papers, as data: nothing but these fields is needed to write them.
SYSTEM = "A chat between a user and an assistant. "
LYNX = Template(image_place="row", turn_prefix="\n", lower_case=("user", "assistant"))
VICUNA = Template("USER: ", " ", "ASSISTANT:", system=SYSTEM, image_place="turn", image_suffix="\n")
MPLUG_OWL2 = Template("USER: ", " ", "ASSISTANT:", image_place="turn")
PHI = Template("USER: ", " ", "ASSISTANT:", system=SYSTEM, begin_with_bos=False)
PLAIN = Template("", "", "", "", "\n", begin_with_bos=False, end_with_eos=False, image_place="turn")
TEMPLATES = {"nano": NANO, "lynx": LYNX, "vicuna": VICUNA, "owl": MPLUG_OWL2, "phi": PHI, "plain": PLAIN}
COUNTS = (3, 1, 4)  # image tokens of the visual inputs 0, 1, 2

CHAT = (
    Turn("user", ("What is\n", 0, "\n here?")),
    Turn("assistant", ("A Cat",)),
    Turn("user", (1, "\nAnd this?")),
    Turn("assistant", ("No",)),
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["user: what is this?\nbot: a cat"] * 20, 290)


def shown(rendered):
    """A rendered conversation as one string: <0> a visual input, [..] what is trained."""
    names = {"bos": "<s>", "eos": "</s>"}
    text = ""
    for segment in rendered:
        piece = segment.text if segment.special is None else names[segment.special]
        piece = piece if segment.visual is None else f"<{segment.visual}>"
        text += f"[{piece}]" if segment.trained else piece
    return text


@pytest.mark.parametrize(
    "name, expected",
    [
        ("nano", "<0><1><s>user: what is here?\nbot:[ A Cat][</s>]\nuser: and this?\nbot:[ No][</s>]"),
        ("lynx", "<0><1><s>user: what is here?\nbot:[ a cat][</s>]\nuser: and this?\nbot:[ no][</s>]"),
        (
            "vicuna",
            f"<s>{SYSTEM}USER: <0>\nWhat is here? ASSISTANT:[ A Cat][</s>]USER: <1>\nAnd this? ASSISTANT:[ No][</s>]",
        ),
        ("owl", "<s>USER: <0>What is here? ASSISTANT:[ A Cat][</s>]USER: <1>And this? ASSISTANT:[ No][</s>]"),
        (
            "phi",
            f"{SYSTEM}USER: What is\n<0>\n here? ASSISTANT:[ A Cat][</s>]USER: <1>\nAnd this? ASSISTANT:[ No][</s>]",
        ),
        ("plain", "<0>What is here?[A Cat\n]<1>And this?[No\n]"),
    ],
)
def test_the_forms_of_the_papers(name, expected):
    assert shown(segments(CHAT, TEMPLATES[name])) == expected


@pytest.mark.parametrize(
    "name, expected",
    [
        ("nano", "<0><1><s>user: what is here?\nbot:[ A Cat][</s>]\nuser: and this?\nbot:"),
        ("vicuna", f"<s>{SYSTEM}USER: <0>\nWhat is here? ASSISTANT:[ A Cat][</s>]USER: <1>\nAnd this? ASSISTANT:"),
        ("plain", "<0>What is here?[A Cat\n]<1>And this?"),
    ],
)
def test_prompts_end_where_the_assistant_speaks(name, expected):
    assert shown(prompt(CHAT[:3], TEMPLATES[name])) == expected


def test_templates_cannot_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        NANO.system = "other"


def test_defaults():
    rendered = segments((Turn("user", (0, "\nHi", 1)), Turn("assistant", ("Yo",))), Template())
    assert shown(rendered) == "<s>user: <0>\nHi<1>\nbot:[ Yo][</s>]"


@pytest.mark.parametrize(
    "name, expected",
    [("nano", "<s>[Once upon][</s>]"), ("plain", "[Once upon\n]"), ("vicuna", "<s>[Once upon][</s>]")],
)
def test_one_reply_alone_is_plain_text(name, expected):
    assert shown(segments((Turn("assistant", ("Once upon",)),), TEMPLATES[name])) == expected


def test_pictures_in_a_reply_are_not_trained():
    talk = (Turn("user", ("q",)), Turn("assistant", ("see ", 0, " there")))
    assert shown(segments(talk, PHI)) == f"{SYSTEM}USER: q ASSISTANT:[ see ]<0>[ there][</s>]"
    assert shown(segments(talk, NANO)) == "<0><s>user: q\nbot:[ see there][</s>]"
    assert shown(segments(talk, VICUNA)) == f"<s>{SYSTEM}USER: q ASSISTANT:[ ]<0>\n[see there][</s>]"


def test_words_without_pictures_keep_their_blanks():
    assert shown(segments((Turn("user", ("  a ", " b ")), Turn("assistant", (" c ",))), NANO)) == (
        "<s>user:   a  b \nbot:[  c ][</s>]"
    )


def test_neighbouring_texts_become_one_segment():
    rendered = segments((Turn("user", ("a", "b")), Turn("assistant", ("c", "d"))), NANO)
    assert rendered == [
        Segment(special="bos"),
        Segment("user: ab\nbot:"),
        Segment(" cd", trained=True),
        Segment(special="eos", trained=True),
    ]


def test_ids_and_labels_in_one_pass(tokenizer):
    row = write(segments(CHAT, VICUNA), tokenizer, COUNTS)
    bos, eos, encode = tokenizer.bos, tokenizer.eos, tokenizer.encode
    parts = [
        ([bos], False), (encode(SYSTEM + "USER: "), False), ([IMAGE_TOKEN] * 3, False),
        (encode("\nWhat is here? ASSISTANT:"), False), (encode(" A Cat"), True), ([eos], True),
        (encode("USER: "), False), ([IMAGE_TOKEN], False), (encode("\nAnd this? ASSISTANT:"), False),
        (encode(" No"), True), ([eos], True),
    ]  # fmt: skip
    assert row.ids == [id for ids, _ in parts for id in ids]
    assert row.labels == [id if trained else IGNORE for ids, trained in parts for id in ids]
    starts = [place for place, id in enumerate(row.ids) if id == IMAGE_TOKEN]
    assert row.images == [(0, starts[0], starts[0] + 3), (1, starts[3], starts[3] + 1)]
    assert row.num_trained == len(encode(" A Cat") + encode(" No")) + 2


def test_the_first_token_is_never_trained():
    assert Row([5, 6], [5, IGNORE]).num_trained == 0
    assert Row([5, 6], [5, 6]).num_trained == 1
    assert Row().num_trained == 0


def test_special_strings_in_text_stay_text(tokenizer):
    talk = (Turn("user", ("<image> </s> <s>",)), Turn("assistant", ("</s>",)))
    row = write(segments(talk, NANO), tokenizer, ())
    assert IMAGE_TOKEN not in row.ids
    assert row.ids.count(tokenizer.eos) == 1 == row.ids.count(tokenizer.bos)
    assert tokenizer.decode(row.ids) == "user: <image> </s> <s>\nbot: </s>"


def random_chat(rng):
    """1 to 3 exchanges with visual inputs at several places, the same one twice now and then."""
    words = ["what", "is", "This", "é漢", "</s>", "\n", " ", "<image>", "user:", "12"]

    def parts(most):
        texts = ["".join(rng.choices(words, k=rng.randrange(1, 5))) for _ in range(rng.randrange(most) + 1)]
        placed = [rng.choice([(text,), (rng.randrange(3), text), (text, rng.randrange(3))]) for text in texts]
        return tuple(part for parts in placed for part in parts)

    turns = []
    for _ in range(rng.randrange(1, 4)):
        turns += [Turn("user", parts(3)), Turn("assistant", ("".join(rng.choices(words, k=2)),))]
    return tuple(turns)


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_and_reply_are_the_training_row(tokenizer, name):
    """At every turn: ids of the prompt + ids of the reply = ids of the row, and exactly the reply is trained last."""
    rng, template = random.Random(0), TEMPLATES[name]
    for _ in range(60):
        chat = random_chat(rng)
        for stop in range(2, len(chat) + 1, 2):
            asked = write(prompt(chat[: stop - 1], template), tokenizer, COUNTS)
            words = chat[stop - 1].text
            words = words.lower() if "assistant" in template.lower_case else words
            reply = tokenizer.encode(template.answer_prefix + words + template.answer_suffix)
            reply += [tokenizer.eos] if template.end_with_eos else []
            row = write(segments(chat[:stop], template), tokenizer, COUNTS)
            assert asked.ids + reply == row.ids
            assert asked.labels + reply == row.labels
            assert asked.images == row.images
            for visual, start, end in row.images:
                assert row.ids[start:end] == [IMAGE_TOKEN] * COUNTS[visual]
            assert row.ids.count(IMAGE_TOKEN) == sum(end - start for _, start, end in row.images)
            order = [part for turn in chat[:stop] for part in turn.parts if not isinstance(part, str)]
            assert [visual for visual, _, _ in row.images] == order


def test_turns_out_of_order():
    with pytest.raises(ValueError, match="ends with the user"):
        segments(CHAT[:3], NANO)
    with pytest.raises(ValueError, match="ends with the assistant"):
        prompt(CHAT, NANO)
    with pytest.raises(ValueError, match="empty"):
        segments((), NANO)


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown image_place 'rows'. Did you mean 'row'"):
        Template(image_place="rows")
    with pytest.raises(ValueError, match="unknown role 'users'. Did you mean 'user'"):
        Template(lower_case=("users",))
