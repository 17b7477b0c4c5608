"""An endpoint as a generator, held against a server on this machine."""

import pytest
from loopback import completion, serving
from PIL import Image

from nanovlm.vlit.endpoint import OpenAICompatible
from nanovlm.vlit.generators import Chat, GeneratorError, Refused

HELLO = Chat((("system", "be brief"), ("user", "hello")))


def endpoint(server, **options):
    return OpenAICompatible("m", server.url, "secret", first_wait=0.001, **options)


def test_an_endpoint_is_asked_in_the_known_form():
    with serving(lambda body, number: completion("a", "b")) as server:
        found = endpoint(server).generate([HELLO], n=2, temperature=0.8, max_tokens=9, seed=5, stop=("X",))
    assert found == [["a", "b"]]
    assert server.bodies == [{
        "model": "m", "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}],
        "temperature": 0.8, "max_tokens": 9, "n": 2, "seed": 5, "stop": ["X"],
    }]  # fmt: skip
    assert server.headers["path"] == "/v1/chat/completions" and server.headers["Authorization"] == "Bearer secret"


def test_servers_that_give_one_answer_at_a_time_are_asked_again_with_other_seeds():
    with serving(lambda body, number: completion(f"text {body['seed']}")) as server:
        assert endpoint(server).generate([HELLO], n=3) == [["text 0", "text 1", "text 2"]]
    assert [body["n"] for body in server.bodies] == [3, 2, 1]


def test_what_passes_is_tried_again_and_counted():
    troubles = [(429, {"Retry-After": "0"}, b"slow down"), (503, {}, b""), (200, {}, b"<html>"), (200, {}, b'{"error": 1}')]
    with serving(lambda body, number: troubles[number] if number < len(troubles) else completion("a")) as server:
        generator = endpoint(server)
        assert generator.generate([HELLO]) == [["a"]]
    assert generator.usage == {"requests": 5, "retries": 4, "prompt_tokens": 7, "completion_tokens": 3}


def test_what_does_not_pass_is_refused_or_stops_the_run():
    with serving(lambda body, number: (400, {}, b"context too long")) as server:
        with pytest.raises(Refused, match="HTTP 400: context too long"):
            endpoint(server).generate([HELLO])
    assert len(server.bodies) == 1
    with serving(lambda body, number: (401, {}, b"wrong key")) as server:
        with pytest.raises(GeneratorError, match="HTTP 401: wrong key") as caught:
            endpoint(server).generate([HELLO])
    assert len(server.bodies) == 1 and "secret" not in str(caught.value)
    with serving(lambda body, number: (500, {}, b"broken")) as server:
        with pytest.raises(GeneratorError, match="failed 3 times, lastly with HTTP 500: broken"):
            endpoint(server, attempts=3).generate([HELLO])
    with pytest.raises(GeneratorError, match="failed 2 times, lastly with URLError"):
        endpoint(server, attempts=2).generate([HELLO])  # the server is gone
    with serving(lambda body, number: completion()) as server:
        with pytest.raises(Refused, match="without a choice"):
            endpoint(server).generate([HELLO])


def test_waits_double_and_the_server_may_ask_for_its_own(monkeypatch):
    waits = []
    monkeypatch.setattr("nanovlm.vlit.endpoint.time.sleep", lambda seconds: waits.append(seconds) if seconds else None)
    answers = [(503, {}, b""), (503, {}, b""), (429, {"Retry-After": "7"}, b""), (429, {"Retry-After": "9999"}, b""), completion("a")]
    with serving(lambda body, number: answers[number]) as server:
        OpenAICompatible("m", server.url, first_wait=1.0).generate([HELLO])
    assert 0.5 <= waits[0] <= 1 and 1 <= waits[1] <= 2 and waits[2:] == [7, 60]


def test_the_rate_of_requests_is_held(monkeypatch):
    waits = []
    monkeypatch.setattr("nanovlm.vlit.endpoint.time.sleep", waits.append)
    monkeypatch.setattr("nanovlm.vlit.endpoint.time.monotonic", lambda: 100.0)
    with serving(lambda body, number: completion("a")) as server:
        generator = endpoint(server, per_minute=30)
        generator.generate([HELLO] * 3)
    assert waits == [0, 2, 4]


def test_pictures_go_along_where_wanted(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (2, 2)).save(path)
    asked = Chat(HELLO.messages, str(path))
    with serving(lambda body, number: completion("a")) as server:
        endpoint(server, send_images=True).generate([asked])
        endpoint(server).generate([asked])
    words, image = server.bodies[0]["messages"][1]["content"]
    assert words == {"type": "text", "text": "hello"} and image["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
    assert server.bodies[1]["messages"][1]["content"] == "hello"


def test_address_and_key_come_from_the_environment(monkeypatch):
    with serving(lambda body, number: completion("a")) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url + "/")
        monkeypatch.setenv("OPENAI_API_KEY", "from outside")
        assert OpenAICompatible("m").generate([HELLO]) == [["a"]]
        assert server.headers["Authorization"] == "Bearer from outside"
        monkeypatch.delenv("OPENAI_API_KEY")
        OpenAICompatible("m").generate([HELLO])
        assert "Authorization" not in server.headers
    with pytest.raises(ValueError, match="must begin with http"):
        OpenAICompatible("m", "localhost:1")
