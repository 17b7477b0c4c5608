"""Sources from the command line: one file, or a file that lists several."""

import json

import pytest
from PIL import Image

from nanovlm.data.datasets import LlavaJson, command_line_sources, listed_sources, prompted
from nanovlm.data.records import Record, Turn, Visual


@pytest.fixture
def folder(tmp_path):
    """Two files of items and a folder of pictures below sub/."""
    (tmp_path / "sub" / "pictures").mkdir(parents=True)
    Image.new("RGB", (2, 2)).save(tmp_path / "sub" / "pictures" / "a.png")
    talk = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a"}]
    shown = [{"id": n, "image": "a.png", "conversations": talk} for n in range(20)]
    (tmp_path / "sub" / "shown.json").write_text(json.dumps(shown))
    words = [{"id": n, "conversations": [{"from": "gpt", "value": "words"}]} for n in range(20)]
    (tmp_path / "sub" / "words.json").write_text(json.dumps(words))
    return tmp_path


SHOWN = {"reader": "llava", "path": "shown.json", "images": "pictures"}
WORDS = {"reader": "llava", "path": "words.json"}


def listed(folder, content):
    path = folder / "sub" / "sets.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_listed_sources(folder):
    sources, missing = listed_sources(listed(folder, {"words": WORDS, "pictures": SHOWN}), seed=5)
    assert not missing
    assert list(sources) == ["words", "pictures"] == [source.name for source in sources.values()]
    record = sources["pictures"].record(0)
    assert record.visuals[0].key == str(folder / "sub" / "pictures" / "a.png")
    assert sources["words"].record(0).conversations == ((Turn("assistant", ("words",)),),)
    for seed, source in ((5, sources["words"]), (0, listed_sources(folder / "sub" / "sets.json")[0]["words"])):
        plain = LlavaJson(folder / "sub" / "words.json", seed=seed)
        assert [source.record(n).id for n in range(20)] == [plain.record(n).id for n in range(20)]
    lists = {"own": {**SHOWN, "prompts": ["a {question}"]}, "none": {**SHOWN, "prompts": []}, "brought": SHOWN, "other": SHOWN}
    sources, missing = listed_sources(listed(folder, lists), prompts=dict.fromkeys(("own", "none", "brought"), ["b {question}"]))
    found = {name: source.record(3).conversations[0][0].text for name, source in sources.items()}
    assert found == {"own": "\na what?", "none": "\nwhat?", "brought": "\nb what?", "other": "\nwhat?"} and not missing


@pytest.mark.parametrize("content, message", [
    ("[", r"sets.json: malformed JSON: .* column 2"),
        ("[]", r"sets.json: an object of name -> .* was expected"),
        ("{}", r"sets.json: an object of name -> .* at least one"),
        ({"x": "words.json"}, r"sets.json, dataset 'x': .*an object with reader was expected, found str"),
        ({"x": {**WORDS, "image": "pictures"}}, r"dataset 'x': unknown key 'image'. Did you mean 'images'"),
        ({"x": {**WORDS, "reader": "lava"}}, r"dataset 'x': unknown reader 'lava'. Did you mean 'llava'"),
        ({"x": {"path": "words.json"}}, r"dataset 'x': .*field 'reader' is missing"),
        ({"x": {"reader": "llava"}}, r"dataset 'x': .*field 'path' is missing"),
        ({"x": {**WORDS, "path": 3}}, r"dataset 'x': .*field 'path' must be a str, found 3"),
        ({"x": {**WORDS, "prompts": "{question}"}}, r"dataset 'x': .*field 'prompts' must be a list"),
        ({"x": {**WORDS, "prompts": [" "]}}, r"sets.json, dataset 'x': prompt ' ' must be words with {question} or"),
        ({"x": {**WORDS, "prompts": ["{question} {question?}"]}}, r"at most once"),
        ({"x": {**WORDS, "prompts": ["{question}", 3]}}, r"prompt 3 must be words"),
    ],
)
def test_malformed_lists(folder, content, message):
    with pytest.raises(ValueError, match=message):
        listed_sources(listed(folder, content))


def test_command_line_and_everything_missing_is_listed_at_once(folder):
    data, images = folder / "sub" / "shown.json", folder / "sub" / "pictures"
    sets = listed(folder, {"words": WORDS})
    assert command_line_sources() == ({}, {})
    assert list(command_line_sources(datasets=sets)[0]) == ["words"]
    sources, missing = command_line_sources(data, images, sets, seed=2)
    assert missing == {}
    assert list(sources) == ["data", "words"] and sources["data"].name == "data"
    expected = LlavaJson(data, images, seed=2)
    assert [sources["data"].record(n).id for n in range(20)] == [expected.record(n).id for n in range(20)]
    assert command_line_sources(data, images)[0]["data"].seed == 0
    assert command_line_sources(datasets=sets, seed=2)[0]["words"].seed == 2
    with pytest.raises(ValueError, match="--images is the image folder of --data"):
        command_line_sources(images=images)
    with pytest.raises(ValueError, match="the name 'data' is taken"):
        command_line_sources(data, images, listed(folder, {"data": WORDS}))
    (folder / "sub" / "pictures" / "a.png").unlink()
    lists = {
        "one": {"reader": "llava", "path": "none.json"},
        "words": WORDS,
        "two": {**SHOWN, "images": "nowhere"},
        "three": SHOWN,
    }
    sources, missing = listed_sources(listed(folder, lists))
    assert list(sources) == ["words"] and list(missing) == ["one", "two", "three"]
    for name, fact in (("one", "none.json"), ("two", "nowhere"), ("three", "pictures/a.png")):
        assert fact in missing[name]


class Fixed:
    """A source of one record."""

    name = "fixed"

    def __init__(self, *parts):
        visual = Visual("v", ("a.png",))
        talk = (Turn("user", parts), Turn("assistant", ("{question}",)))
        self.only = Record("r", (visual,), (talk, talk), ("x", "y"))

    def __len__(self):
        return 7

    def record(self, n):
        return self.only


@pytest.mark.parametrize("slot, parts, expected", [
    ("{question}", ("what?",), ("say: what? briefly.",)),
    ("{question}", (0, "\nwhat?\n"), (0, "\nsay: what? briefly.")),
    ("{question}", ("what?\n", 0), ("say: what? briefly.", 0)),
    ("{question}", ("in ", 0, " what?"), ("say: in ", 0, " what? briefly.")),
    ("{question}", (0, "\n"), (0, "say:  briefly.")),
    ("{question?}", ("what.\n",), ("say: what? briefly.",)),
    ("{question?}", ("what ", 0), ("say: what? briefly.", 0)),
    ("{question?}", (0, "\nwhat?"), (0, "\nsay: what? briefly.")),
    ("{question?}", (0,), (0, "say:  briefly.")),
])
def test_questions_in_other_words(slot, parts, expected):
    source = prompted(Fixed(*parts), [f"say: {slot} briefly."])
    record = source.record(4)
    assert [tuple(turn.parts for turn in turns) for turns in record.conversations] == [(expected, ("{question}",))] * 2
    assert record.kinds == ("x", "y") and record.visuals == source.source.only.visuals
    assert source.name == "fixed" and len(source) == 7


def test_prompts_are_drawn_per_record_and_need_a_place_for_words():
    prompts = ["a {question}", "b {question}", "c {question}"]
    sources = (prompted(Fixed("?"), prompts, *seed) for seed in ((1,), (1,), (0,), ()))
    one, same, other, default = ([source.record(n).conversations[0][0].text for n in range(60)] for source in sources)
    assert one == same != other == default
    assert all(one.count(prompt.replace("{question}", "?")) > 8 for prompt in prompts)
    assert prompted(Fixed(0), ["Describe it."]).record(0).conversations[0][0].parts == (0, "Describe it.")
    with pytest.raises(ValueError, match=r"record 'r' of 'fixed': it asks 'what\?', for which the prompt 'Describe it.' has no"):
        prompted(Fixed(0, "what?"), ["Describe it."]).record(0)
