"""Templates: what is written, what is trained, and that a prompt ends exactly where the reply begins."""

import dataclasses
import random

import pytest

from nanovlm.data.records import Turn
from nanovlm.data import templates
from nanovlm.data.templates import NANO, PHI, Row, Segment, Template, VICUNA, end_ids, prompt, rounds, segments, write
from nanovlm.data.tokenizer import Tokenizer, train_tokenizer
from nanovlm.vlm import IGNORE, IMAGE_TOKEN

SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
          "detailed, and polite answers to the user's questions. ")
NAMES = ("NANO", "LYNX", "VICUNA", "LLAVA", "MPLUG_OWL2", "LLAVA_PHI", "PHI", "PLAIN", "BLIP2", "BLIP2_CAPTION",
         "OPEN_FLAMINGO", "OPEN_FLAMINGO_VQA", "CHATML", "CHATML_SMOLLM2", "CHATML_QWEN")  # fmt: skip
TEMPLATES = {name: getattr(templates, name) for name in NAMES}
ADDED = ("<image>", "<|endofchunk|>", "<|im_start|>", "<|im_end|>")  # special tokens of the published tokenizers
COUNTS = (3, 1, 4)  # image tokens of the visual inputs 0, 1, 2

CHAT = (Turn("user", ("What is\n", 0, "\n here?")), Turn("assistant", ("A Cat",)),
        Turn("user", (1, "\nAnd this?")), Turn("assistant", ("No",)))


@pytest.fixture(scope="module")
def tokenizer():
    trained = train_tokenizer(["user: what is this?\nbot: a cat"] * 20, 290)
    trained.backend.add_special_tokens(list(ADDED))
    return Tokenizer(trained.backend)


def shown(rendered):
    """A rendered conversation as one string: <0> a visual input, {..} a special token, [..] what is trained."""
    names = {"bos": "<s>", "eos": "</s>"}
    text = ""
    for segment in rendered:
        piece = segment.text if segment.special is None else names.get(segment.special, f"{{{segment.special}}}")
        if segment.visual is not None:
            piece = f"<{segment.visual}>" + (f"={segment.special}" if segment.special else "")
        text += f"[{piece}]" if segment.trained else piece
    return text


LLAVA = "USER: <0>\nWhat is here? ASSISTANT:[ A Cat][</s>]USER: <1>\nAnd this? ASSISTANT:[ No][</s>]"
USER, BOT, END = "{<|im_start|>}user\n", "{<|im_start|>}assistant\n", "{<|im_end|>}"


@pytest.mark.parametrize("name, expected", [
    ("NANO", "<0><1><s>user: what is here?\nbot:[ A Cat][</s>]\nuser: and this?\nbot:[ No][</s>]"),
    ("LYNX", "<0><1><s>user: what is here?\nbot: a cat\nuser: and this?\nbot:[ no][</s>]"),
    ("VICUNA", f"<s>{SYSTEM}{LLAVA}"), ("LLAVA", f"<s>{LLAVA}"), ("LLAVA_PHI", f"{SYSTEM}{LLAVA}"),
    ("MPLUG_OWL2", "<s>USER: <0>What is here? ASSISTANT:[ A Cat][</s>]USER: <1>And this? ASSISTANT:[ No][</s>]"),
    ("PHI", "Instruct: <0>\nWhat is here?\nOutput:[ A Cat][</s>]Instruct: <1>\nAnd this?\nOutput:[ No][</s>]"),
    ("PLAIN", "<s><0>[A Cat\n]<1>[No\n]"),
    ("BLIP2", "<0><1><s>Question: What is here? Answer:[ A Cat\n]Question: And this? Answer:[ No\n]"),
    ("BLIP2_CAPTION", "<0><1><s>[A Cat\nNo\n]"),
    ("OPEN_FLAMINGO", "<s><0>=<image>What is here?[A Cat][{<|endofchunk|>}]<1>=<image>And this?[No][{<|endofchunk|>}]"),
    ("OPEN_FLAMINGO_VQA", "<s><0>=<image>Question:What is here? Short answer:[A Cat][{<|endofchunk|>}]"
                          "\n<1>=<image>Question:And this? Short answer:[No][{<|endofchunk|>}]"),
    ("CHATML", f"{USER}<0>What is here?{END}\n{BOT}[A Cat][{END}]\n{USER}<1>And this?{END}\n{BOT}[No][{END}]"),
])
def test_the_forms_of_the_papers(name, expected):
    assert shown(segments(CHAT, TEMPLATES[name])) == expected


@pytest.mark.parametrize("name, system", [
    ("CHATML_SMOLLM2", "You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
    ("CHATML_QWEN", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
])
def test_system_turns_of_chatml(name, system):
    said = shown(prompt((Turn("user", ("Hi",)),), TEMPLATES[name]))
    assert said == f"{{<|im_start|>}}system\n{system}{END}\n{USER}Hi{END}\n{BOT}"


def test_turns_of_a_picture_alone_pictures_in_a_reply_and_blanks():
    turns = (Turn("user", (1, " ")), Turn("assistant", ("yes",)))
    assert shown(segments(turns, VICUNA)) == f"<s>{SYSTEM}USER: <1> ASSISTANT:[ yes][</s>]"
    assert shown(segments(turns, TEMPLATES["PLAIN"])) == "<s><1>[yes\n]"
    talk = (Turn("user", ("q",)), Turn("assistant", ("see ", 0, " there")))
    inline = dataclasses.replace(PHI, image_place="inline", image_suffix="")
    assert shown(segments(talk, inline)) == "Instruct: q\nOutput:[ see ]<0>[ there][</s>]"
    assert shown(segments(talk, NANO)) == "<0><s>user: q\nbot:[ see there][</s>]"
    assert shown(segments(talk, VICUNA)) == f"<s>{SYSTEM}USER: q ASSISTANT:[ ]<0>\n[see there][</s>]"
    assert shown(segments((Turn("user", ("  a ", " b ")), Turn("assistant", (" c ",))), NANO)) == (
        "<s>user:   a  b \nbot:[  c ][</s>]"
    )


def test_rounds_and_what_ends_a_reply(tokenizer):
    assert rounds(CHAT, NANO) == [CHAT]
    assert rounds(CHAT, TEMPLATES["LYNX"]) == [CHAT[:2], CHAT]
    alone = CHAT[1:2]
    assert rounds(alone, TEMPLATES["LYNX"]) == [alone]
    eos, chunk, end = tokenizer.eos, *(tokenizer.special_id(name) for name in ("<|endofchunk|>", "<|im_end|>"))
    newline = tokenizer.encode("\n")[-1]
    ends = {"NANO": (eos,), "OPEN_FLAMINGO": (eos, chunk), "CHATML": (eos, end), "PLAIN": (eos, newline)}
    assert {name: end_ids(TEMPLATES[name], tokenizer) for name in ends} == ends


def test_special_tokens_and_media_tokens_are_single_ids(tokenizer):
    row = write(segments(CHAT[:2], TEMPLATES["OPEN_FLAMINGO"]), tokenizer, COUNTS)
    media, chunk = tokenizer.special_id("<image>"), tokenizer.special_id("<|endofchunk|>")
    answer = [*tokenizer.encode("A Cat"), chunk]
    assert row.ids == [tokenizer.bos, media, *tokenizer.encode("What is here?"), *answer]
    assert row.labels == [IGNORE] * (len(row.ids) - len(answer)) + answer
    assert row.images == [(0, 1, 2)]
    row = write(prompt((Turn("user", ("<|im_end|>",)),), TEMPLATES["CHATML"]), tokenizer, ())
    assert [row.ids.count(tokenizer.special_id(name)) for name in ("<|im_end|>", "<|im_start|>")] == [1, 2]
    talk = (Turn("user", ("<image> </s> <s>",)), Turn("assistant", ("</s>",)))
    row = write(segments(talk, NANO), tokenizer, ())
    assert IMAGE_TOKEN not in row.ids
    assert row.ids.count(tokenizer.eos) == 1 == row.ids.count(tokenizer.bos)
    assert tokenizer.decode(row.ids) == "user: <image> </s> <s>\nbot: </s>"


def test_names_that_nobody_knows():
    with pytest.raises(ValueError, match="unknown image_place 'rows'. Did you mean 'row'"):
        Template(image_place="rows")
    plain = train_tokenizer(["a"], 259)
    with pytest.raises(ValueError, match="no special token '<|im_start|>'.* Known: '</s>', '<pad>', '<s>'"):
        write(prompt((Turn("user", ("Hi",)),), TEMPLATES["CHATML"]), plain, ())


class Spaced:
    """As SentencePiece's tokenizers do, a text begins with a blank of its own unless it continues another."""

    bos, eos, add_bos = 1, 2, False

    def encode(self, text, continues=False):
        return [ord(letter) for letter in ("" if continues else "_") + text]


def test_a_text_behind_a_picture_or_special_token_begins_anew():
    row = write(segments((Turn("user", ("q", 0, "r")), Turn("assistant", ("a",))), Template()), Spaced(), [1])
    letters = [id if id < 9 else chr(id) for id in row.ids]
    assert letters == [*"_user: q", IMAGE_TOKEN, *"_r\nbot:", *" a", 2]  # and no BOS where the tokenizer adds none
    row = write(segments(CHAT, TEMPLATES["MPLUG_OWL2"]), Spaced(), [1, 1])
    assert "".join(chr(id) for id in row.ids if id > 9) == (
        "_USER: _What is here? ASSISTANT: A Cat_USER: _And this? ASSISTANT: No"
    )


@pytest.mark.parametrize("name, expected", [
    ("NANO", "<s>[Once upon][</s>]"), ("PLAIN", "<s>[Once upon\n]"), ("LYNX", "<s>[once upon][</s>]")])
def test_one_reply_alone_is_plain_text(name, expected):
    assert shown(segments((Turn("assistant", ("Once upon",)),), TEMPLATES[name])) == expected


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
    assert Row([5, 6], [5, IGNORE]).num_trained == 0
    assert Row([5, 6], [5, 6]).num_trained == 1
    assert Row().num_trained == 0


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
    """At every turn: ids of the prompt + ids of the reply = ids of the row, with the same labels."""
    rng, template = random.Random(0), TEMPLATES[name]
    for _ in range(60):
        chat = random_chat(rng)
        for stop in range(2, len(chat) + 1, 2):
            asked = write(prompt(chat[: stop - 1], template), tokenizer, COUNTS)
            words = chat[stop - 1].text
            words = words.lower() if "assistant" in template.lower_case else words
            end = [Segment(special="eos")] if template.end_with_eos else []
            if template.answer_suffix in template.specials:
                end = [Segment(special=template.answer_suffix)]
            else:
                words += template.answer_suffix
            reply = write([Segment(template.answer_prefix + words), *end], tokenizer, ()).ids
            row = write(segments(chat[:stop], template), tokenizer, COUNTS)
            if template is templates.BLIP2_CAPTION and stop > 2:
                continue  # captions behind one another are one text
            assert (asked.ids + reply, asked.labels + reply, asked.images) == (row.ids, row.labels, row.images)
            media = tokenizer.special_id("<image>") if template.media_token else IMAGE_TOKEN
            for visual, start, end in row.images:
                assert row.ids[start:end] == [media] * (1 if template.media_token else COUNTS[visual])
            assert row.ids.count(media) == sum(end - start for _, start, end in row.images)
            order = [part for turn in chat[:stop] for part in turn.parts if not isinstance(part, str)]
            assert [visual for visual, _, _ in row.images] == order
