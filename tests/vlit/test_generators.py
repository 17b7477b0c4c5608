"""The four generators behind one interface, and the putting of requests to them."""

import re
import sys
import threading
from collections import Counter

import pytest
import tiny_recipe
import torch
from loopback import completion, serving
from PIL import Image
from vlit_data import GOLDEN, PHOTOS, lines

from nanovlm.data.templates import NANO
from nanovlm.generation.chat import Assistant
from nanovlm.vlit import generators
from nanovlm.vlit.annotations import Picture, read
from nanovlm.vlit.construct import regions
from nanovlm.vlit.generators import Local, OpenAICompatible
from nanovlm.vlit.parsing import parse
from nanovlm.vlit.replies import Chat, Drawing, GeneratorError, Recorded, Refused, Replay, Replies, in_parallel
from nanovlm.vlit.self_instruct import PLANS, chat
from nanovlm.vlit.template import Template
from nanovlm.vlit.words import NUMBERS, singular
from nanovlm.vlm import VLM

HELLO = Chat((("system", "be brief"), ("user", "hello")))


# Template


@pytest.fixture(scope="module")
def pictures():
    return [*read([GOLDEN / "caps_boxes.jsonl"]).pictures.values(), *read(PHOTOS).pictures.values()]


def conversations(pictures, plan):
    """(picture, marked region, list of (question, answer)) of three drafts for each picture that a plan fits."""
    for picture in pictures:
        for region in regions(picture, 1, 0) if plan.granularity == "region" else [None]:
            try:
                (texts,) = Template().generate([chat(picture, plan, region)], n=3)
            except Refused:
                continue
            for turns in (parse(text).turns for text in texts):
                yield picture, region, [(asked, answer) for (_, asked), (_, answer) in zip(turns[::2], turns[1::2])]


def test_what_the_template_tells_and_denies_follows_from_the_annotations(pictures):
    told = Counter()
    for picture, _, rounds in conversations(pictures, PLANS["negative"]):
        objects = Counter(one.value for one in picture.of_kind("object"))
        for _, answer in rounds:
            if found := re.fullmatch(r"No, there is no ([\w ]+) in the picture\.", answer):
                told["denied"] += 1
                assert found[1] not in " ".join([*objects, *(one.value.lower() for one in picture.annotations)])
            elif found := re.fullmatch(r"(?:No, there|There) (?:is|are) (\w+) ([\w ]+)\.", answer):
                name, number = singular(found[2]), NUMBERS.get(found[1], found[1])
                if name in objects and str(number).isdigit():
                    told["counted"] += 1
                    assert objects[name] == int(number), answer
    for picture, _, rounds in conversations(pictures, PLANS["multi-round"]):
        assert len({asked for asked, _ in rounds}) == len(rounds) >= PLANS["multi-round"].rounds
        centre = {one.value: (one.box[0] + one.box[2]) / 2 for one in picture.of_kind("object")}
        for asked, answer in rounds:
            if found := re.fullmatch(r"Is the (.+) to the (left|right) of the (.+)\?", asked):
                told["sides"] += 1
                is_left = centre[found[1]] < centre[found[3]]
                assert answer.startswith("Yes" if is_left == (found[2] == "left") else "No"), (asked, answer)
    assert told["denied"] > 40 and told["counted"] > 40 and told["sides"] > 10
    for _, region, ((_, first), *_) in conversations(pictures, PLANS["region"]):
        assert region.value in first and "box" in first


def test_the_template_is_deterministic_its_drafts_differ_and_it_refuses_what_it_knows_nothing_of(pictures):
    asked = chat(pictures[0], PLANS["global"])
    first, again, other = (Template().generate([asked], n=5, seed=seed)[0] for seed in (3, 3, 4))
    assert first == again != other and len(set(first)) > 1
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


def test_a_local_text_depends_on_its_chat_seed_and_draft_alone_and_ends_at_stop_words(local):
    chats, how = [Chat((("user", word),)) for word in ("red", "green", "blue")], {"temperature": 1.0, "max_tokens": 6}
    together = local.generate(chats, n=2, seed=1, **how)
    assert together == [local.generate([one], n=2, seed=1, **how)[0] for one in chats]
    assert together != local.generate(chats, n=2, seed=2, **how)
    assert list(map(len, together)) == [2] * 3 and len({text for texts in together for text in texts}) > 3
    ((whole, second),) = local.generate([HELLO], n=2, temperature=0.0, max_tokens=12)
    assert whole == second  # greedy
    stop = whole[len(whole) // 2]
    assert local.generate([HELLO], max_tokens=12, stop=(stop,)) == [[whole[: whole.index(stop)].strip()]]


def test_the_local_model_looks_at_the_picture_and_hears_the_system(local, tmp_path):
    path = tmp_path / "red.png"
    Image.new("RGB", (8, 8), (220, 30, 30)).save(path)
    seen, bare = (local._prompt(chat, 4) for chat in (Chat(HELLO.messages, str(path)), HELLO))
    assert seen.row.ids.count(-1) == 4 and len(seen.visual_inputs) == 1  # 8 pixels, patches of 4
    assert bare.visual_inputs == []
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


# An endpoint, held against a server on this machine


SOON = {"retry-after-ms": "1"}


@pytest.fixture
def endpoint(monkeypatch):
    """The endpoint of a server; its key comes from the environment."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setattr(generators, "RETRIES", 3)
    return lambda server, **options: OpenAICompatible("m", server.url, **options)


def test_an_endpoint_is_asked_in_the_known_form(endpoint, tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    with serving(lambda body, number: completion("a", "b")) as server:
        found = endpoint(server).generate([HELLO], n=2, temperature=0.8, max_tokens=9, seed=5, stop=("X",))
        for sees in (True, False):
            endpoint(server, send_images=sees).generate([Chat(HELLO.messages, str(tmp_path / "a.png"))])
    assert found == [["a", "b"]]
    assert server.bodies[0] == {
        "model": "m", "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}],
        "temperature": 0.8, "max_tokens": 9, "n": 2, "seed": 5, "stop": ["X"],
    }  # fmt: skip
    assert server.headers["path"] == "/v1/chat/completions" and server.headers["authorization"] == "Bearer secret"
    (words, image), bare = (body["messages"][1]["content"] for body in server.bodies[1:])
    assert words == {"type": "text", "text": "hello"} and bare == "hello"
    assert image["image_url"]["url"].startswith("data:image/png;base64,iVBOR")


def test_one_answer_at_a_time_what_passes_and_the_rate_of_requests(endpoint, monkeypatch):
    with serving(lambda body, number: completion(f"text {body['seed']}")) as server:
        assert endpoint(server).generate([HELLO], n=3) == [["text 0", "text 1", "text 2"]]
    assert [body["n"] for body in server.bodies] == [3, 2, 1]
    troubles = [(status, SOON, b"slow down") for status in (429, 503, 408)]
    with serving(lambda body, number: troubles[number] if number < len(troubles) else completion("a")) as server:
        generator = endpoint(server)
        assert generator.generate([HELLO]) == [["a"]]
    assert generator.usage == {"requests": 4, "retries": 3, "prompt_tokens": 7, "completion_tokens": 3}
    waits = []
    monkeypatch.setattr(generators.time, "sleep", waits.append)
    monkeypatch.setattr(generators.time, "monotonic", lambda: 100.0)
    with serving(lambda body, number: completion("a")) as server:
        endpoint(server, per_minute=30).generate([HELLO] * 3)
    assert waits == [0, 2, 4]


@pytest.mark.parametrize(("answer", "error", "words", "requests"), [
    ((400, {}, b"context too long"), Refused, "HTTP 400: context too long", 1),
    (completion(), Refused, "without a choice", 1),
    ((401, {}, b"wrong key"), GeneratorError, "HTTP 401: wrong key", 1),
    ((500, SOON, b"broken"), GeneratorError, "HTTP 500: broken", 4),
    ((200, {}, b"<html>"), GeneratorError, "no chat completion", 1),
    ((200, {"Content-Type": "application/json"}, b'{"error": 1}'), GeneratorError, "no chat completion", 1),
])  # fmt: skip
def test_what_does_not_pass_is_refused_or_stops_the_run(endpoint, answer, error, words, requests):
    with serving(lambda body, number: answer) as server, pytest.raises(error, match=words) as caught:
        endpoint(server).generate([HELLO])
    assert len(server.bodies) == requests and "secret" not in str(caught.value)


def test_address_and_key_come_from_the_environment_and_what_is_missing_is_named(endpoint, monkeypatch):
    with serving(lambda body, number: completion("a")) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url + "/")
        assert OpenAICompatible("m").generate([HELLO]) == [["a"]]
        monkeypatch.delenv("OPENAI_API_KEY")
        OpenAICompatible("m").generate([HELLO])
        assert "authorization" not in server.headers
    monkeypatch.setattr(generators, "RETRIES", 0)
    with pytest.raises(GeneratorError, match="APIConnectionError"):
        OpenAICompatible("m", "http://localhost:1").generate([HELLO])
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match="pip install openai"):
        OpenAICompatible("m", "http://localhost")


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
    counts, answers = put("aabcdea", Scripted("c", batch_size=batch_size, workers=workers), path, n=2)
    assert counts == {"asked": 4, "refused": 1, "recorded": 2}
    assert answers == ["id c: not c" if word == "c" else [f"{word} 0", f"{word} 1"] for word in "aabcdea"]
    assert put("abcde", again, path, n=2)[0]["recorded"] == 4 and again.calls == [["c"]]
    assert put("a", again, path, n=3)[0]["asked"] == 1  # another drawing is another answer
    path.write_bytes(b'{"key": 1}\n' + path.read_bytes())
    with pytest.raises(ValueError, match="replies.jsonl, line 1: no recorded answer"):
        Replies(path)


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
    def sha(folder, color):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (8, 8), color).save(tmp_path / folder / "1.png")
        return Chat(HELLO.messages, str(tmp_path / folder / "1.png")).sha

    train, val, copy = sha("train", "red"), sha("val", "blue"), sha("copy", "red")
    assert train == copy != val and HELLO.sha not in (train, val)
    assert Chat(HELLO.messages, "here/x.png").sha == Chat(HELLO.messages, "there/x.png").sha  # recorded elsewhere
