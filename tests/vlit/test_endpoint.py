"""An endpoint as a generator, held against a server on this machine."""

import sys

import pytest
from loopback import completion, serving
from PIL import Image

from nanovlm.vlit.generators import OpenAICompatible
from nanovlm.vlit.replies import Chat, GeneratorError, Refused

HELLO = Chat((("system", "be brief"), ("user", "hello")))
SOON = {"retry-after-ms": "1"}


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setattr("nanovlm.vlit.generators.RETRIES", 3)


def endpoint(server, **options):
    return OpenAICompatible("m", server.url, **options)


def test_an_endpoint_is_asked_in_the_known_form():
    with serving(lambda body, number: completion("a", "b")) as server:
        found = endpoint(server).generate([HELLO], n=2, temperature=0.8, max_tokens=9, seed=5, stop=("X",))
    assert found == [["a", "b"]]
    assert server.bodies == [{
        "model": "m", "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}],
        "temperature": 0.8, "max_tokens": 9, "n": 2, "seed": 5, "stop": ["X"],
    }]  # fmt: skip
    assert server.headers["path"] == "/v1/chat/completions" and server.headers["authorization"] == "Bearer secret"


def test_servers_that_give_one_answer_at_a_time_are_asked_again_with_other_seeds():
    with serving(lambda body, number: completion(f"text {body['seed']}")) as server:
        assert endpoint(server).generate([HELLO], n=3) == [["text 0", "text 1", "text 2"]]
    assert [body["n"] for body in server.bodies] == [3, 2, 1]


def test_what_passes_is_tried_again_and_counted():
    troubles = [(status, SOON, b"slow down") for status in (429, 503, 408)]
    with serving(lambda body, number: troubles[number] if number < len(troubles) else completion("a")) as server:
        generator = endpoint(server)
        assert generator.generate([HELLO]) == [["a"]]
    assert generator.usage == {"requests": 4, "retries": 3, "prompt_tokens": 7, "completion_tokens": 3}


@pytest.mark.parametrize(
    ("answer", "error", "words", "requests"),
    [
        ((400, {}, b"context too long"), Refused, "HTTP 400: context too long", 1),
        (completion(), Refused, "without a choice", 1),
        ((401, {}, b"wrong key"), GeneratorError, "HTTP 401: wrong key", 1),
        ((500, SOON, b"broken"), GeneratorError, "HTTP 500: broken", 4),
        ((200, {}, b"<html>"), GeneratorError, "no chat completion", 1),
        ((200, {"Content-Type": "application/json"}, b'{"error": 1}'), GeneratorError, "no chat completion", 1),
    ],
)
def test_what_does_not_pass_is_refused_or_stops_the_run(answer, error, words, requests):
    with serving(lambda body, number: answer) as server, pytest.raises(error, match=words) as caught:
        endpoint(server).generate([HELLO])
    assert len(server.bodies) == requests and "secret" not in str(caught.value)


def test_a_server_that_is_not_there(monkeypatch):
    monkeypatch.setattr("nanovlm.vlit.generators.RETRIES", 0)
    for url in ("http://localhost:1", "localhost:1"):
        with pytest.raises(GeneratorError, match="APIConnectionError"):
            OpenAICompatible("m", url).generate([HELLO])


def test_the_rate_of_requests_is_held(monkeypatch):
    waits = []
    monkeypatch.setattr("nanovlm.vlit.generators.time.sleep", waits.append)
    monkeypatch.setattr("nanovlm.vlit.generators.time.monotonic", lambda: 100.0)
    with serving(lambda body, number: completion("a")) as server:
        endpoint(server, per_minute=30).generate([HELLO] * 3)
    assert waits == [0, 2, 4]


def test_pictures_go_along_where_wanted(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    asked = Chat(HELLO.messages, str(tmp_path / "a.png"))
    with serving(lambda body, number: completion("a")) as server:
        endpoint(server, send_images=True).generate([asked])
        endpoint(server).generate([asked])
    words, image = server.bodies[0]["messages"][1]["content"]
    assert words == {"type": "text", "text": "hello"}
    assert image["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
    assert server.bodies[1]["messages"][1]["content"] == "hello"


def test_address_and_key_come_from_the_environment(monkeypatch):
    with serving(lambda body, number: completion("a")) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url + "/")
        monkeypatch.setenv("OPENAI_API_KEY", "from outside")
        assert OpenAICompatible("m").generate([HELLO]) == [["a"]]
        assert server.headers["authorization"] == "Bearer from outside"
        monkeypatch.delenv("OPENAI_API_KEY")
        OpenAICompatible("m").generate([HELLO])
        assert "authorization" not in server.headers


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match="pip install openai"):
        OpenAICompatible("m", "http://localhost")
