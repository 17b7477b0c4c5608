"""The four generators behind one interface, and the putting of requests to them."""

import json
import re
import threading
from pathlib import Path

import pytest
import tiny_recipe
import torch
from PIL import Image

from nanovlm.data.templates import NANO
from nanovlm.published.load import Loaded
from nanovlm.vlit import replies as asking
from nanovlm.vlit.annotations import read
from nanovlm.vlit.annotations import Picture
from nanovlm.vlit.replies import Request, in_parallel
from nanovlm.vlit.words import USES
from nanovlm.vlit.replies import Chat, Drawing, GeneratorError, Refused
from nanovlm.vlit.generators import Local
from nanovlm.vlit.parsing import parse
from nanovlm.vlit.construct import regions
from nanovlm.vlit.replies import Replay, Replies
from nanovlm.vlit.self_instruct import PLANS, chat
from nanovlm.vlit.template import Template, place_of

GOLDEN = Path(__file__).parents[1] / "golden" / "vlit"
HELLO = Chat((("system", "be brief"), ("user", "hello")))


@pytest.fixture(scope="module")
def pictures():
    return [*read([GOLDEN / "caps_boxes.jsonl"]).pictures.values(), *read(GOLDEN.glob("*_photos.json")).pictures.values()]


def conversations(pictures, plan, n=3):
    for picture in pictures:
        marked = regions(picture, 1, 0) if plan.granularity == "region" else [None]
        for region in marked:
            try:
                (texts,) = Template().generate([chat(picture, plan, region)], n=n)
            except Refused:
                continue
            for text in texts:
                yield picture, region, parse(text).turns


# Template -----------------------------------------------------------------------------------------------------------


def counted_by_hand(picture):
    names = [one.value for one in picture.of_kind("object")]
    return {name: names.count(name) for name in names}


def test_numbers_that_the_template_tells_are_those_of_the_boxes(pictures):
    words = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10,
             "eleven": 11, "twelve": 12}  # fmt: skip
    checked = 0
    for picture, _, turns in conversations(pictures, PLANS["negative"]):
        for _, answer in turns[1::2]:
            if found := re.fullmatch(r"(?:No, there|There) (?:is|are) (\w+) ([\w ]+)\.", answer):
                number = words.get(found[1]) or (int(found[1]) if found[1].isdigit() else 0)
                truth = counted_by_hand(picture)
                same = [name for name in truth if name[:3] == found[2][:3] or (name, found[2]) == ("person", "people")]
                assert number == 0 or any(truth[name] == number for name in same), (answer, truth)
                checked += number > 0
    assert checked > 40


def test_what_the_template_denies_is_not_there(pictures):
    denied = 0
    for picture, _, turns in conversations(pictures, PLANS["negative"]):
        for _, answer in turns[1::2]:
            if found := re.fullmatch(r"No, there is no ([\w ]+) in the picture\.", answer):
                denied += 1
                told = " ".join(one.value.lower() for one in picture.annotations)
                assert found[1] not in counted_by_hand(picture) and found[1] not in told
    assert denied > 40


def test_sides_that_the_template_tells_follow_from_the_boxes(pictures):
    told = 0
    for picture, _, turns in conversations(pictures, PLANS["multi-round"]):
        centre = {one.value: (one.box[0] + one.box[2]) / 2 for one in picture.of_kind("object")}
        for (_, asked), (_, answer) in zip(turns[::2], turns[1::2]):
            if found := re.fullmatch(r"Is the (.+) to the (left|right) of the (.+)\?", asked):
                told += 1
                is_left = centre[found[1]] < centre[found[3]]
                assert answer.startswith("Yes" if is_left == (found[2] == "left") else "No"), (asked, answer)
    assert told > 10


def test_plans_of_the_template(pictures):
    for picture, _, turns in conversations(pictures, PLANS["multi-round"]):
        assert len(turns) >= 2 * PLANS["multi-round"].rounds
        assert len({asked for role, asked in turns if role == "user"}) == len(turns) // 2
    for _, region, turns in conversations(pictures, PLANS["region"]):
        assert region.value in turns[1][1] and "box" in turns[1][1]
    for picture, _, turns in conversations(pictures, PLANS["knowledge"]):
        told = " ".join(words for _, words in turns)
        assert any(USES[name] in told for name in counted_by_hand(picture) if name in USES)


def test_the_template_is_deterministic_and_its_drafts_differ(pictures):
    asked = chat(pictures[0], PLANS["global"])
    first, again = (Template().generate([asked], n=5, seed=3)[0] for _ in range(2))
    assert first == again and len(set(first)) > 1
    assert first != Template().generate([asked], n=5, seed=4)[0]


def test_the_template_refuses_what_it_has_no_annotation_for():
    with pytest.raises(Refused, match="no annotation"):
        Template().generate([chat(Picture("1"), PLANS["global"])])
    with pytest.raises(Refused, match="needs a language model"):
        Template().generate([HELLO])


def test_places_in_words():
    assert place_of((0.4, 0.4, 0.6, 0.6)) == "in the middle of the picture"
    assert place_of((0.0, 0.0, 0.2, 0.2)) == "at the top left of the picture"
    assert place_of((0.4, 0.8, 0.6, 1.0)) == "at the bottom of the picture"
    assert place_of((0.8, 0.4, 1.0, 0.6)) == "at the right of the picture"


# A local model ------------------------------------------------------------------------------------------------------


def loaded(model):
    tokenizer = tiny_recipe.RECIPE.tokenizer()
    return Loaded(model(tokenizer.vocab_size), tokenizer, NANO, {}, 8, "crop", "")


@pytest.fixture(scope="module")
def local():
    torch.manual_seed(0)
    return Local(loaded(lambda size: tiny_recipe.build("full", size).eval()), "tiny")


def test_a_local_text_depends_on_its_chat_seed_and_draft_alone(local, tmp_path):
    chats = [Chat((("user", word),)) for word in ("red", "green", "blue")]
    together = local.generate(chats, n=2, temperature=1.0, max_tokens=6, seed=1)
    alone = [local.generate([one], n=2, temperature=1.0, max_tokens=6, seed=1)[0] for one in chats]
    assert together == alone and all(len(texts) == 2 for texts in together)
    assert together != local.generate(chats, n=2, temperature=1.0, max_tokens=6, seed=2)
    assert len({text for texts in together for text in texts}) > 3


def test_without_temperature_every_draft_is_the_greedy_one(local):
    ((first, second),) = local.generate([HELLO], n=2, temperature=0.0, max_tokens=6)
    assert first == second


def test_the_local_model_looks_at_the_picture_and_hears_the_system(local, tmp_path):
    path = tmp_path / "red.png"
    Image.new("RGB", (8, 8), (220, 30, 30)).save(path)
    ids, pixels = local._prompt(Chat(HELLO.messages, str(path)), 4)
    bare, none = local._prompt(HELLO, 4)
    assert ids.count(-1) == 4 and len(pixels) == 1 and none == []  # 8 pixels in patches of 4
    assert local.loaded.tokenizer.decode([token for token in bare if token >= 0]).count("be brief\nhello") == 1
    with pytest.raises(FileNotFoundError):
        local._prompt(Chat(HELLO.messages, "absent.png"), 4)


def test_a_bare_language_model_speaks_and_sees_nothing(tmp_path):
    bare = Local(loaded(lambda size: tiny_recipe.build("full", size).eval().decoder), "bare")
    assert not bare.accepts_images
    assert len(bare.generate([Chat(HELLO.messages, "absent.png")], n=2, temperature=0.8, max_tokens=4)[0]) == 2
    with pytest.raises(ValueError, match="writes no text"):
        Local(loaded(lambda size: torch.nn.Linear(1, 1)), "other")


def test_a_prompt_that_is_too_long_is_refused_alone(local):
    long = Chat((("user", "colour? " * 100),))
    with pytest.raises(Refused, match="tokens"):
        local.generate([long], max_tokens=4)


def test_stopping_words_end_a_local_text(local):
    (whole,), = local.generate([HELLO], max_tokens=12)
    middle = whole[len(whole) // 2]
    (cut,), = local.generate([HELLO], max_tokens=12, stop=(middle,))
    assert whole and cut == whole[: whole.index(middle)].strip()


# Recorded answers, and asking -----------------------------------------------------------------------------------------


class Scripted:
    """A generator that writes the question back, and refuses or fails where it is told to."""

    name, accepts_images = "scripted", False

    def __init__(self, refuses=(), fails=(), batch_size=1, workers=1):
        self.refuses, self.fails, self.batch_size, self.workers, self.calls = refuses, fails, batch_size, workers, []

    def generate(self, chats, *, n=1, temperature=0.0, max_tokens=0, seed=0, stop=()):
        words = [one.messages[-1][1] for one in chats]
        self.calls.append(words)
        if set(words) & set(self.fails):
            raise GeneratorError("down")
        if refused := set(words) & set(self.refuses):
            raise Refused(f"not {min(refused)}")
        return [[f"{word} {draft}" for draft in range(n)] for word in words]


def requests(*words):
    return [Request(f"id {word}", Chat((("user", word),))) for word in words]


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 1), (2, 1), (1, 3), (2, 2)])
def test_every_request_is_asked_once_and_refusals_are_named(tmp_path, batch_size, workers):
    replies = Replies(tmp_path / "replies.jsonl")
    generator = Scripted(refuses=("c",), batch_size=batch_size, workers=workers)
    counts, refused = asking.ask(requests(*"abcdea"), generator, Drawing(n=2), replies)
    assert counts == {"asked": 4, "refused": 1, "recorded": 1} and refused == [("id c", "not c")]
    again = Scripted(refuses=("c",))
    counts, _ = asking.ask(requests(*"abcde"), again, Drawing(n=2), Replies(tmp_path / "replies.jsonl"))
    assert again.calls == [["c"]] and counts["recorded"] == 4
    assert asking.ask(requests("a"), again, Drawing(n=3), replies)[0]["asked"] == 1  # another drawing is another answer


def test_the_same_words_are_asked_once_even_within_a_batch(tmp_path):
    generator = Scripted(batch_size=3)
    counts, _ = asking.ask(requests(*"aabab"), generator, Drawing(n=1), Replies(tmp_path / "replies.jsonl"))
    assert generator.calls == [["a", "b"]] and counts == {"asked": 2, "recorded": 3}


@pytest.mark.parametrize("workers", [1, 3])
def test_a_failure_stops_the_run_and_keeps_what_was_answered(tmp_path, workers):
    replies = Replies(tmp_path / "replies.jsonl")
    with pytest.raises(GeneratorError, match="down"):
        asking.ask(requests(*"abcdefghijklmnop"), Scripted(fails=("d",), workers=workers), Drawing(n=1), replies)
    answered = Replies(tmp_path / "replies.jsonl")
    assert 3 <= len(answered) < 15
    counts, _ = asking.ask(requests(*"abcdefghijklmnop"), Scripted(workers=workers), Drawing(n=1), answered)
    assert counts == {"recorded": len(replies), "asked": 16 - len(replies)}


def test_no_more_is_taken_than_the_threads_can_hold():
    taken, release = [], threading.Event()

    def items():
        for number in range(100):
            taken.append(number)
            yield number

    running = in_parallel(lambda number: release.wait(10) and number, items(), 3)
    release.set()
    assert next(running)[0] in (0, 1, 2) and len(taken) <= 4


def test_a_line_that_a_kill_cut_off_is_removed_and_others_are_named(tmp_path):
    path = tmp_path / "replies.jsonl"
    replies = Replies(path)
    asking.ask(requests("a", "b"), Scripted(), Drawing(n=1), replies)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"key": "x", "chat"')
    assert len(Replies(path)) == 2
    asking.ask(requests("c"), Scripted(), Drawing(n=1), Replies(path))
    assert len(Replies(path)) == 3 and path.read_bytes().startswith(whole)
    path.write_bytes(b'{"key": 1}\n' + whole)
    with pytest.raises(ValueError, match="replies.jsonl, line 1: no recorded answer"):
        Replies(path)


def test_recorded_answers_are_replayed_whoever_gave_them(tmp_path):
    path = tmp_path / "replies.jsonl"
    asking.ask(requests("a", "b"), Scripted(), Drawing(n=3, seed=9), Replies(path))
    chats = [one.chat for one in requests("b", "a")]
    assert Replay(path).generate(chats, n=2) == [["b 0", "b 1"], ["a 0", "a 1"]]
    with pytest.raises(Refused, match="3 of the 4"):
        Replay(path).generate(chats, n=4)
    with pytest.raises(Refused, match="0 of the 1"):
        Replay(path).generate([HELLO], n=1)
    with pytest.raises(FileNotFoundError):
        Replay(tmp_path / "absent.jsonl")
    assert json.loads(path.read_text().split("\n")[0])["generator"] == "scripted"
