"""The four generators behind one interface, and the putting of requests to them."""

import re
import threading
from collections import Counter

import pytest
import tiny_recipe
import torch
from PIL import Image
from vlit_data import GOLDEN, PHOTOS, lines

from nanovlm.data.templates import NANO
from nanovlm.generation.chat import Assistant
from nanovlm.vlit.annotations import Picture, read
from nanovlm.vlit.construct import regions
from nanovlm.vlit.generators import Local
from nanovlm.vlit.parsing import parse
from nanovlm.vlit.replies import Chat, Drawing, GeneratorError, Recorded, Refused, Replay, Replies, in_parallel
from nanovlm.vlit.self_instruct import PLANS, chat
from nanovlm.vlit.template import Template
from nanovlm.vlm import VLM
from nanovlm.vlit.words import NUMBERS, singular

HELLO = Chat((("system", "be brief"), ("user", "hello")))


# Template


@pytest.fixture(scope="module")
def pictures():
    return [*read([GOLDEN / "caps_boxes.jsonl"]).pictures.values(), *read(PHOTOS).pictures.values()]


def conversations(pictures, plan):
    """(picture, marked region, turns) of three drafts for each picture that has what the plan needs."""
    for picture in pictures:
        for region in regions(picture, 1, 0) if plan.granularity == "region" else [None]:
            try:
                (texts,) = Template().generate([chat(picture, plan, region)], n=3)
            except Refused:
                continue
            yield from ((picture, region, parse(text).turns) for text in texts)


def objects(picture):
    return Counter(one.value for one in picture.of_kind("object"))


def answers(pictures, plan, pattern):
    """(picture, match) of the plan's answers."""
    for picture, _, turns in conversations(pictures, PLANS[plan]):
        yield from ((picture, found) for _, answer in turns[1::2] if (found := re.fullmatch(pattern, answer)))


def test_numbers_that_the_template_tells_are_those_of_the_boxes(pictures):
    checked = 0
    for picture, found in answers(pictures, "negative", r"(?:No, there|There) (?:is|are) (\w+) ([\w ]+)\."):
        name, number = singular(found[2]), NUMBERS.get(found[1], found[1])
        if name in objects(picture) and str(number).isdigit():
            assert objects(picture)[name] == int(number), found[0]
            checked += 1
    assert checked > 40


def test_what_the_template_denies_is_not_there(pictures):
    denied = list(answers(pictures, "negative", r"No, there is no ([\w ]+) in the picture\."))
    assert len(denied) > 40
    for picture, found in denied:
        told = " ".join(one.value.lower() for one in picture.annotations)
        assert found[1] not in objects(picture) and found[1] not in told


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
    for _, _, turns in conversations(pictures, PLANS["multi-round"]):
        assert len({asked for role, asked in turns if role == "user"}) == len(turns) // 2 >= PLANS["multi-round"].rounds
    for _, region, turns in conversations(pictures, PLANS["region"]):
        assert region.value in turns[1][1] and "box" in turns[1][1]


def test_the_template_is_deterministic_and_its_drafts_differ(pictures):
    asked = chat(pictures[0], PLANS["global"])
    first, again, other = (Template().generate([asked], n=5, seed=seed)[0] for seed in (3, 3, 4))
    assert first == again != other and len(set(first)) > 1


def test_the_template_refuses_what_it_has_no_annotation_for():
    for asked, words in ((chat(Picture("1"), PLANS["global"]), "no annotation"), (HELLO, "needs a language model")):
        with pytest.raises(Refused, match=words):
            Template().generate([asked])


# A local model


def local_of(build):
    torch.manual_seed(0)
    tokenizer = tiny_recipe.RECIPE.tokenizer()
    return Local(Assistant(build("full", tokenizer.vocab_size).eval(), tokenizer, NANO, 8), "tiny")


@pytest.fixture(scope="module")
def local():
    return local_of(tiny_recipe.build)


def test_a_local_text_depends_on_its_chat_seed_and_draft_alone(local):
    chats, how = [Chat((("user", word),)) for word in ("red", "green", "blue")], {"temperature": 1.0, "max_tokens": 6}
    together = local.generate(chats, n=2, seed=1, **how)
    assert together == [local.generate([one], n=2, seed=1, **how)[0] for one in chats]
    assert together != local.generate(chats, n=2, seed=2, **how)
    assert list(map(len, together)) == [2] * 3 and len({text for texts in together for text in texts}) > 3
    ((first, second),) = local.generate([HELLO], n=2, temperature=0.0, max_tokens=6)
    assert first == second  # greedy


def test_the_local_model_looks_at_the_picture_and_hears_the_system(local, tmp_path):
    path = tmp_path / "red.png"
    Image.new("RGB", (8, 8), (220, 30, 30)).save(path)
    seen, bare = (local._prompt(chat, 4) for chat in (Chat(HELLO.messages, str(path)), HELLO))
    assert seen.row.ids.count(-1) == 4 and len(seen.visual_inputs) == 1 and bare.visual_inputs == []  # 8 pixels, patches of 4
    assert local.loaded.tokenizer.decode([token for token in bare.row.ids if token >= 0]).count("be brief\nhello") == 1
    with pytest.raises(FileNotFoundError):
        local._prompt(Chat(HELLO.messages, "absent.png"), 4)
    with pytest.raises(Refused, match="tokens"):  # too long
        local.generate([Chat((("user", "colour? " * 100),))], max_tokens=4)


def test_a_bare_language_model_speaks_and_sees_nothing():
    bare = local_of(lambda *sizes: VLM(None, None, tiny_recipe.build(*sizes).decoder))
    asked = Chat(HELLO.messages, "absent.png")
    assert not bare.accepts_images and len(bare.generate([asked], n=2, temperature=0.8, max_tokens=4)[0]) == 2
    with pytest.raises(ValueError, match="writes no text"):
        local_of(lambda *sizes: torch.nn.Linear(1, 1))


def test_stopping_words_end_a_local_text(local):
    ((whole,),) = local.generate([HELLO], max_tokens=12)
    stop = whole[len(whole) // 2]
    assert local.generate([HELLO], max_tokens=12, stop=(stop,)) == [[whole[: whole.index(stop)].strip()]]


# Recorded answers, and asking


class Scripted:
    """A generator that writes the question back, and refuses or fails where it is told to."""

    name, accepts_images = "scripted", False

    def __init__(self, refuses="", fails="", batch_size=1, workers=1):
        self.refuses, self.fails, self.batch_size, self.workers, self.calls = refuses, fails, batch_size, workers, []

    def generate(self, chats, *, n=1, **how):
        words = [one.messages[-1][1] for one in chats]
        self.calls.append(words)
        for word in words:
            if word in self.fails:
                raise GeneratorError("down")
            if word in self.refuses:
                raise Refused(f"not {word}")
        return [[f"{word} {draft}" for draft in range(n)] for word in words]


def put(words, generator, path, **drawing):
    """(Counter of what happened, list of answers) of requests of one letter each, written to a file."""
    recorded, requests = Recorded(generator, path), ((Chat((("user", word),)), f"id {word}") for word in words)
    answers = list(recorded.stream(requests, Drawing(**{"n": 1} | drawing)))
    return recorded.counts, [answer if isinstance(answer, list) else f"{id}: {answer}" for (_, id), answer in answers]


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 1), (2, 1), (1, 3), (2, 2)])
def test_every_request_is_asked_once_and_refusals_are_named(tmp_path, batch_size, workers):
    path, again = tmp_path / "replies.jsonl", Scripted(refuses="c")
    counts, answers = put("abcdea", Scripted("c", batch_size=batch_size, workers=workers), path, n=2)
    assert counts == {"asked": 4, "refused": 1, "recorded": 1}
    assert answers == ["id c: not c" if word == "c" else [f"{word} 0", f"{word} 1"] for word in "abcdea"]
    assert put("abcde", again, path, n=2)[0]["recorded"] == 4 and again.calls == [["c"]]
    assert put("a", again, path, n=3)[0]["asked"] == 1  # another drawing is another answer


def test_the_same_words_are_asked_once_even_within_a_batch(tmp_path):
    generator = Scripted(batch_size=3)
    counts, answers = put("aabab", generator, tmp_path / "replies.jsonl")
    assert generator.calls == [["a", "b"]] and counts == {"asked": 2, "recorded": 3}
    assert answers == [[f"{word} 0"] for word in "aabab"]


@pytest.mark.parametrize("workers", [1, 3])
def test_a_failure_stops_the_run_and_keeps_what_was_answered(tmp_path, workers):
    path, words = tmp_path / "replies.jsonl", "abcdefghijklmnop"
    with pytest.raises(GeneratorError, match="down"):
        put(words, Scripted(fails="d", workers=workers), path)
    answered = len(Replies(path).places)
    assert 3 <= answered < 15
    assert put(words, Scripted(workers=workers), path)[0] == {"recorded": answered, "asked": 16 - answered}


def test_no_more_is_taken_than_the_threads_can_hold():
    taken, release = [], threading.Event()
    items = (taken.append(number) or number for number in range(100))
    running = in_parallel(lambda number: release.wait(10) and number, items, 3)
    release.set()
    assert next(running)[0] == 0 and len(taken) <= 4


def test_a_line_that_a_kill_cut_off_is_removed_and_others_are_named(tmp_path):
    path = tmp_path / "replies.jsonl"
    put("ab", Scripted(), path)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"key": "x", "chat"')
    assert len(Replies(path).places) == 2
    put("c", Scripted(), path)
    assert len(Replies(path).places) == 3 and path.read_bytes().startswith(whole)
    path.write_bytes(b'{"key": 1}\n' + whole)
    with pytest.raises(ValueError, match="replies.jsonl, line 1: no recorded answer"):
        Replies(path)


def test_recorded_answers_are_replayed_whoever_gave_them(tmp_path):
    path, chats = tmp_path / "replies.jsonl", [Chat((("user", word),)) for word in "ba"]
    put("ab", Scripted(), path, n=3, seed=9)
    assert Replay(path).generate(chats, n=2) == [["b 0", "b 1"], ["a 0", "a 1"]]
    for asked, n, words in ((chats, 4, "3 of the 4"), ([HELLO], 1, "0 of the 1")):
        with pytest.raises(Refused, match=words):
            Replay(path).generate(asked, n=n)
    with pytest.raises(FileNotFoundError):
        Replay(tmp_path / "absent.jsonl")
    assert lines(path)[0]["generator"] == "scripted"


def test_pictures_of_one_name_are_not_answered_for_one_another(tmp_path):
    for folder, color in (("train", "red"), ("val", "blue"), ("copy", "red")):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (8, 8), color).save(tmp_path / folder / "1.png")
    train, val, copy = (Chat(HELLO.messages, str(tmp_path / folder / "1.png")).sha for folder in ("train", "val", "copy"))
    assert train == copy != val and HELLO.sha not in (train, val)
    assert Chat(HELLO.messages, "here/x.png").sha == Chat(HELLO.messages, "there/x.png").sha  # recorded elsewhere
