import numpy
import pytest
from PIL import Image

from nanovlm.generation import sampler
from nanovlm.generation.answer import DESCRIBE, PromptTooLong
from nanovlm.generation.chat import Assistant, Chat
from nanovlm.data.records import Turn
from nanovlm.data.templates import NANO, Template
from nanovlm.data.tokenizer import train_tokenizer
from nanovlm.generation.sampler import Decoding, generate
from tiny import random_vlm

TEXT = ["user: what color is the circle?\nbot: red\nuser: describe the image.\nbot: a blue star"]
IMAGE = [-1] * 4
RED = Image.new("RGB", (8, 8), "red")
BLUE = Image.new("RGB", (9, 7), "blue")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXT * 3, 300)


@pytest.fixture(scope="module")
def model(tokenizer):
    return random_vlm(tokenizer.vocab_size, context_length=60)


def chat_with(model, tokenizer, template=NANO, **options):
    return Chat(Assistant(model, tokenizer, template, 8), Decoding(**{"max_new_tokens": 6} | options))


@pytest.fixture
def script(monkeypatch, tokenizer):
    """The model says what the list `answers` holds; `calls` keeps what it was asked."""
    answers, calls = [], []

    def say(model, prompt, decoding, visual_inputs, generator, workspace):
        calls.append((prompt, decoding, visual_inputs, generator))
        return tokenizer.encode(answers.pop(0))

    monkeypatch.setattr(sampler, "stream", lambda *args: iter(say(*args)))
    monkeypatch.setattr(
        sampler, "generate",
        lambda model, prompts, decoding, inputs, generator, workspace: [
            say(model, prompts[0], decoding, inputs[0], generator, workspace)
        ],
    )
    return answers, calls


def test_an_answer_is_that_of_the_sampler_and_a_picture_encoded_once(model, tokenizer):
    chat = chat_with(model, tokenizer)
    pieces = list(chat.stream("What color?", [RED]))
    ids = [*IMAGE, tokenizer.bos, *tokenizer.encode("user: what color?\nbot:")]
    decoding = Decoding(max_new_tokens=6, eos_ids=(tokenizer.eos,))
    new = generate(model, [ids], decoding, [chat.prompt.visual_inputs])[0]
    assert new and "".join(pieces) == tokenizer.decode(new).removeprefix(" ")
    assert chat.prompt.row.ids == ids and chat.answer == new
    assert chat.prompt.row.images == [(0, 0, 4)]
    (pixels,) = chat.prompt.visual_inputs
    assert pixels.shape == (1, 3, 8, 8) and pixels[0, 0].mean() > 1 and pixels[0, 2].mean() < 0, "red"
    chat = chat_with(model, tokenizer)
    chat.ask("a", [RED, BLUE])
    assert chat.workspace.num_images == 2
    chat.ask("b", decoding=Decoding(max_new_tokens=2, num_beams=2))
    assert chat.workspace.num_images == 2 and len(chat.workspace.pictures) == 2
    again = chat.answer
    chat.workspace.pictures.clear()
    chat.turns = chat.turns[:2]
    chat.ask("b", decoding=Decoding(max_new_tokens=2, num_beams=2))
    assert chat.answer == again and chat.workspace.num_images == 4
    chat.reset()
    assert not chat.workspace.pictures


def test_history_grows_by_whole_exchanges(model, tokenizer, script):
    answers, calls = script
    answers += [" a red circle", "blue", " no"]
    generator = object()
    chat = Chat(Assistant(model, tokenizer, NANO, 8), Decoding(max_new_tokens=6, eos_ids=(3,)), generator)
    assert chat.answer is None
    asked = ("What is it?", [RED], "a red circle"), ("Color?", [], "blue"), ("And this?", [BLUE], "no")
    assert all(chat.ask(question, shown) == want for question, shown, want in asked)
    said = [(0, "What is it?"), ("a red circle",), ("Color?",), ("blue",), (1, "And this?"), ("no",)]
    assert chat.turns == [*map(Turn, ["user", "assistant"] * 3, said)] and chat.forgotten == 0
    text = ["user: what is it?\nbot:", " a red circle", "\nuser: color?\nbot:", " blue", "\nuser: and this?\nbot:"]
    q1, a1, q2, a2, q3 = map(tokenizer.encode, text)
    head, end = [tokenizer.bos, *q1], [tokenizer.eos]
    assert [call[0] for call in calls] == [
        [*IMAGE, *head], [*IMAGE, *head, *a1, *end, *q2], [*IMAGE, *IMAGE, *head, *a1, *end, *q2, *a2, *end, *q3]]
    first, second = calls[2][2]
    assert first is calls[0][2][0] is calls[1][2][0], "a picture is made into pixels once"
    assert first[0, 0].mean() > 1 and second[0, 2].mean() > 1
    assert all(call[1].eos_ids == (3,) and call[3] is generator for call in calls)
    chat.reset()
    assert chat.turns == [] and chat.visuals == [] and not chat.pixels and chat.answer is None


def test_pictures_stand_where_the_template_puts_them(model, tokenizer, script):
    answers, calls = script
    answers += ["one", "two"]
    chat = chat_with(model, tokenizer, Template(image_place="inline", turn_prefix="\n"))
    chat.ask("a", [RED, BLUE])
    chat.ask("b", [RED])
    ids = calls[1][0]
    assert calls[0][0][0] == tokenizer.bos
    places = [place for place, token in enumerate(ids) if token == -1]
    assert places[:8] == list(range(places[0], places[0] + 8)) and places[8] > places[7] + 1
    assert len(calls[1][2]) == 3
    assert chat.turns[0].parts == (0, 1, "a") and chat.turns[2].parts == (2, "b")


def test_the_oldest_exchanges_without_picture_are_forgotten_whole(tokenizer, script):
    answers, calls = script

    def four_questions(context_length):
        """A picture is shown with the second one."""
        answers[:] = ["first answer", "second", "third", "fourth"]
        chat = chat_with(random_vlm(tokenizer.vocab_size, context_length), tokenizer)
        for question in ("one?", "two?", "three?", "four?"):
            chat.ask(question, [RED] if question == "two?" else [])
        return chat, len(calls[-1][0])

    _, whole = four_questions(200)
    chat, length = four_questions(whole + 6)
    assert chat.forgotten == 0 and length == whole, "what fits exactly is kept"
    chat, length = four_questions(whole + 5)
    assert str(chat.forgotten) == "1" and length < whole and calls[-1][0][:4] == IMAGE
    assert [turn.text for turn in chat.turns[::2]] == ["two?", "three?", "four?"]
    assert chat.turns[0].parts == (0, "two?")
    words = tokenizer.decode([token for token in calls[-1][0] if token >= 0])
    assert words.startswith("user: two?") and "first" not in words
    answers += ["fifth"]
    question = "what color is the circle above the star?"
    chat.ask(question)
    assert [turn.text for turn in chat.turns[::2]] == ["two?", "four?", question], "the picture stays"
    assert chat.turns[0].parts == (0, "two?") and chat.forgotten == 2


def test_pictures_that_do_not_fit_are_an_error_and_change_nothing(model, tokenizer, script):
    answers, calls = script
    answers += ["a"]
    chat = chat_with(model, tokenizer)
    chat.ask("one?", [RED])
    turns = list(chat.turns)
    with pytest.raises(PromptTooLong, match="the context has 60"):
        chat.ask("two?", [RED] * 12)
    assert chat.turns == turns and len(chat.visuals) == 1 == len(calls) and {*chat.pixels} == {"picture 1", ("picture 1", "ids")}
    with pytest.raises(PromptTooLong, match="the context has 60"):
        chat.ask("one?", decoding=Decoding(max_new_tokens=60))


def test_an_exchange_is_remembered_only_when_it_is_complete(model, tokenizer, script):
    answers, calls = script
    answers += ["red circle is", "blue"]
    chat = chat_with(model, tokenizer)
    pieces = chat.stream("one?", [RED])
    next(pieces)
    assert chat.turns == [] and chat.visuals == []
    pieces.close()
    assert chat.turns == [] and chat.answer is None
    assert chat.ask("two?") == "blue"
    assert all(call[1].eos_ids == (tokenizer.eos,) for call in calls), "unless the decoding says otherwise"
    assert [turn.text for turn in chat.turns] == ["two?", "blue"]


def test_bad_questions_and_pictures(model, tokenizer, tmp_path):
    chat = chat_with(model, tokenizer)
    for question in ("", "  \n"):
        with pytest.raises(ValueError, match="the question is empty"):
            chat.ask(question)
    with pytest.raises(FileNotFoundError, match="no such image"):
        chat.ask("what?", [tmp_path / "nothing.png"])


def test_text_streams_as_it_is_made_without_the_gap_before_it(model, tokenizer, script, monkeypatch):
    answers, _ = script
    answers += [" red circle is", "red", " ", "", "  two", "né"]
    chat = chat_with(model, tokenizer)
    ids = tokenizer.encode(" red circle is")
    pieces = list(chat.stream("a"))
    assert 1 < len(pieces) <= len(ids) and "".join(pieces) == "red circle is" and "" not in pieces
    assert [chat.ask("a") for _ in range(5)] == ["red", "", "", "two", "né"] and chat.turns[-1].text == "né"
    ids = tokenizer.encode("né")[:-1]  # which ends within a character
    monkeypatch.setattr(sampler, "stream", lambda *args: iter(ids))
    assert chat.ask("a") == tokenizer.decode(ids) and "n" in tokenizer.decode(ids)


def test_describe_first_answers_in_the_history_of_its_own_description(model, tokenizer, script):
    answers, calls = script
    answers += [" a blue star", " blue"]
    chat = chat_with(model, tokenizer)
    own = Decoding(max_new_tokens=9, num_beams=2, eos_ids=(5,))
    description, pieces = chat.describe_first("What color?", [BLUE], own)
    assert description == "a blue star" and "".join(pieces) == "blue"
    assert calls[0][1] == own and calls[1][1].max_new_tokens == 6
    assert [turn.text for turn in chat.turns] == [DESCRIBE, "a blue star", "What color?", "blue"]
    want = f"user: {DESCRIBE}\nbot: a blue star\nuser: what color?\nbot:"
    assert tokenizer.decode([token for token in calls[1][0] if token >= 0]) == want
    assert calls[1][0][:4] == IMAGE and calls[1][2] == calls[0][2]
    answers += [" x", " y"]
    chat.describe_first("And?", [RED], own, describe="list the objects.")
    assert chat.turns[4].text == "list the objects."


def test_one_line_answers_a_question_or_several(tokenizer, model, tmp_path):
    assistant = Assistant(model, tokenizer, NANO, 8, decodings={"default": Decoding(max_new_tokens=6)})
    chat = assistant.chat()
    want = chat.ask("What color?", [RED])
    assert chat.answer and assistant.ask("What color?", images=[RED]) == want
    RED.save(tmp_path / "a.png")
    for same in (str(tmp_path / "a.png"), tmp_path / "a.png", numpy.asarray(RED)):
        assert assistant.ask("What color?", [same]) == assistant.ask("What color?", same) == want
    assert assistant.ask("a?", None) == assistant.ask("a?")
    for question, shown, message in (("", RED, "question is empty"), (["a?", " "], RED, "question is empty"),
                                     ("a?", numpy.zeros((4, 4, 5)), r"float64\[4, 4, 5\] is no picture"),
                                     ("a?", [3], "int is no picture"), ("a?", [[RED, None]], "NoneType is no picture")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            assistant.ask(question, shown)
    several = assistant.ask(["What color?", "a?", "What color?"], [RED])
    assert several == [want, assistant.ask("a?", [RED]), want] and assistant.ask([]) == []
    clip = [RED, RED.rotate(90)]
    assert assistant.ask("a?", [clip]) == assistant.ask("a?", [numpy.stack(clip)]) == assistant.chat().ask("a?", [clip])
    drawn = [assistant.ask(["a?"] * 3, (), Decoding(6, do_sample=True, temperature=3.0), seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) > 1
    with pytest.raises(ValueError, match="unknown preset 'defalt'. Did you mean 'default'"):
        assistant.preset("defalt")
