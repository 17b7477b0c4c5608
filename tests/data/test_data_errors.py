"""A user's own files: everything that can be wrong in them is named, with file and place."""

import json

import pytest
from PIL import Image

from nanovlm.data.datasets import LlavaJson

GOOD = {"id": "good", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}


def turns(*values):
    return [{"from": speaker, "value": value} for speaker, value in values]


@pytest.fixture
def read(tmp_path):
    """Write items after one good one and read them; pictures a.png and b.png are there."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (2, 2)).save(tmp_path / name)

    def read(*items, ending=".json"):
        path = tmp_path / f"some{ending}"
        items = [GOOD, *items]
        path.write_text(json.dumps(items) if ending == ".json" else "\n".join(map(json.dumps, items)))
        return LlavaJson(path)

    return read


HUMAN, GPT = ("human", "q"), ("gpt", "a")


@pytest.mark.parametrize("item, message", [
    ("words", r"item 2: an object with id was expected, found str"),
    ({"conversations": turns(HUMAN, GPT)}, r"item 2: field 'id' is missing; found 'conversations'"),
    ({"id": None, "conversations": turns(HUMAN, GPT)}, r"item 2: field 'id' must be a str or int, found None"),
    ({"id": "x", "conversations": {}}, r"item 2 .*: field 'conversations' must be a list, found \{\}"),
    ({"id": "x", "conversations": []}, r"item 2 \(id 'x'\): the turns are by nobody"),
    ({"id": 5, "conversations": ["q"]}, r"item 2 \(id 5\), turn 1: an object with role or from was expected, found str"),
    ({"id": "x", "conversations": [{"value": "q"}]}, r"item 2 .*turn 1: field 'role' or 'from' is missing"),
    ({"id": "x", "conversations": [{"from": "human"}]}, r"item 2 .*turn 1: field 'content' or 'value' is missing"),
    ({"id": "x", "conversations": turns(HUMAN, ("gpt", 3))}, r"item 2 .*turn 2: field 'value' must be a str or list"),
    ({"id": "x", "conversations": turns(HUMAN, ("gtp", "a"))}, r"item 2 .*turn 2: unknown speaker 'gtp'. Did you mean"),
    ({"id": "x", "conversations": turns(HUMAN, GPT, ("system", "s"), HUMAN, GPT)}, r"item 2 .*unknown speaker 'system'"),
    ({"id": "x", "conversations": turns(HUMAN, ("gpt", " \n"))}, r"item 2 .*turn 2: the assistant says nothing"),
    ({"id": "x", "conversations": turns(HUMAN, ("gpt", "a\ud83d"))}, r"item 2 .*turn 2: not text: .* position 1: surr"),
    ({"id": "x", "conversations": turns(HUMAN, HUMAN, GPT)}, r"item 2 \(id 'x'\): the turns are by user, user, assistant"),
    ({**GOOD, "kind": 3}, r"item 2 \(id 'good'\): field 'kind' must be a str, found 3"),
    ({**GOOD, "image": "https://a.org/a.png"}, r"item 2 .*this machine, found 'https://a.org/a.png'"),
    ({**GOOD, "image": f"data:image/png;base64,{'A' * 5000}"}, r"item 2 .*in base64 \(data:image/png;base64,A{8}…\)"),
    ({**GOOD, "image": 3}, r"item 2 \(id 'good'\): field 'image' must be a path .*, found 3"),
    ({**GOOD, "image": ["a.png", ""]}, r"item 2 .*field 'image' must be a path .*, found ''"),
    *(({"id": "x", "image": image, "conversations": turns(("human", question), GPT)},
       rf"item 2 \(id 'x'\): {placeholders} placeholder\(s\) <image> .* but {images} image\(s\)")
      for image, question, placeholders, images in (
          ("a.png", "<image> or <image>?", 2, 1), (["a.png", "b.png"], "<image>", 1, 2), (None, "what is <image>?", 1, 0))),
])
def test_malformed_items(read, item, message):
    with pytest.raises(ValueError, match=f"some.json, line 1, {message}"):
        read(item)


def test_missing_images_unusable_items_and_files_are_named_all_at_once(read, tmp_path):
    def wants(*names):
        return {"id": "x", "image": list(names), "conversations": turns(("human", "<image>" * len(names)), GPT)}

    with pytest.raises(FileNotFoundError) as caught:
        read(wants("c.png", "a.png"), wants("d.png", "c.png", "b.png"))
    assert str(caught.value).splitlines() == [
        f"{tmp_path / 'some.json'}: 2 of 4 images are missing:", f"  {tmp_path / 'c.png'}", f"  {tmp_path / 'd.png'}",
    ]  # fmt: skip
    with pytest.raises(FileNotFoundError) as caught:
        read(wants(*(f"{n}.png" for n in range(25))))
    assert str(caught.value).count(".png") == 20 and "and 5 more" in str(caught.value)
    with pytest.raises(ValueError, match="3 item") as caught:
        read({"id": "x", "conversations": turns(HUMAN, ("gpt", ""))}, GOOD, {}, "words", ending=".jsonl")
    message = str(caught.value)
    assert "nanovlm.data convert llava" in message
    assert [f"line {n}" in message for n in (1, 2, 3, 4, 5)] == [False, True, False, True, True]
    with pytest.raises(FileNotFoundError, match="none.json: no such file"):
        LlavaJson(tmp_path / "none.json")
    for content, message in ((b"{}", ", line 1: field 'id' is missing"), (b"[]", ": holds no item"), (b"\n", ": holds no item"),
                             (b'["\xff"]', ", line 1, item 1: .*can't decode"), (b"\x1f\x8b", ": packed by gzip")):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(ValueError, match=f"a.json{message}"):
            LlavaJson(tmp_path / "a.json")


PART = {"type": "image", "image": "b.png"}
@pytest.mark.parametrize("item, files, first", [
    ({"images": ["a.png"], "image": None}, ["a.png"], (0, "\nq")),  # one of the two is enough
    ({"image": "", "images": ["a.png", "b.png"]}, ["a.png", "b.png"], (0, "\n", 1, "\nq")),
    ({"messages": [PART, {"type": "text", "text": "q"}]}, ["b.png"], (0, "q")),
    ({"messages": [{"type": "image_url", "image_url": {"url": "a.png"}}, PART, {"type": "text", "text": "q"}]}, ["a.png", "b.png"], (0, 1, "q")),
    ({"messages": [{"type": "image"}, {"type": "text", "text": "q"}], "image": "a.png"}, ["a.png"], (0, "q")),
    ({"image": "a.png", "answer": "an <image>"}, ["a.png"], (0, "\nq")),  # what the assistant writes is text
])  # fmt: skip
def test_pictures_are_found_wherever_an_item_names_them(read, item, files, first, tmp_path):
    content, answer = item.pop("messages", "q"), item.pop("answer", "a")
    source = read({"id": "x", **item, "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]})
    record = next(record for record in map(source.record, range(2)) if record.id == "x")
    assert [visual.frames for visual in record.visuals] == [(str(tmp_path / name),) for name in files]
    assert [turn.parts for turn in record.conversations[0]] == [first, (answer,)]


@pytest.mark.parametrize("said, want", [
    ([("system", "Be brief."), HUMAN, GPT], [(0, "\nBe brief.\n\nq"), ("a",)]),
    ([("System", "One."), ("system", " "), ("system", "Two."), HUMAN, GPT], [(0, "\nOne.\n\nTwo.\n\nq"), ("a",)]),
    ([("system", ""), HUMAN, GPT], [(0, "\nq"), ("a",)]),
    ([("system", "Look."), ("human", "<image>\nq"), GPT], [("Look.\n\n", 0, "\nq"), ("a",)]),
    ([("system", "Describe it."), GPT, HUMAN, GPT], [(0, "\nDescribe it."), ("a",), ("q",), ("a",)]),
])  # fmt: skip
def test_what_the_system_says_first_stands_in_front_of_the_first_question(read, said, want):
    source = read({"id": "x", "image": "a.png", "conversations": turns(*said)})
    (conversation,) = next(record for record in map(source.record, range(len(source))) if record.id == "x").conversations
    assert [turn.parts for turn in conversation] == want


@pytest.mark.parametrize("empty", [float("nan"), "", None, [], [None], [""]])
def test_an_empty_cell_of_a_table_is_no_picture(read, empty):
    source = read({**GOOD, "image": empty, "video": empty})
    assert len(source) == 2 and not source.record(0).visuals


@pytest.mark.parametrize("names, there, missing", [
    (["train/1.png", "val/1.png"], ["1.png", "train/1.png"], ["val/1.png"]),  # a structured folder
    (["train/1.png", "val/1.png"], ["1.png"], ["train/1.png", "val/1.png"]),  # two items would fall on one file
    (["1.png", "val/1.png"], ["1.png"], ["val/1.png"]),
    (["val/1.png", "val/2.png"], ["1.png"], ["val/1.png", "val/2.png"]),
    (["val/1.png", "val/2.png"], ["1.png", "2.png"], []),  # the only case in which none can be taken for another
])
def test_a_picture_is_never_taken_for_another(names, there, missing, tmp_path):
    for name in there:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    items = [{"id": name, "image": name, "conversations": turns(("human", "<image>"), GPT)} for name in names]
    (tmp_path / "some.json").write_text(json.dumps(items))
    if missing:
        with pytest.raises(FileNotFoundError) as caught:
            LlavaJson(tmp_path / "some.json")
        assert str(caught.value).splitlines()[1:] == [f"  {tmp_path / name}" for name in missing]
        return
    with pytest.warns(UserWarning, match="by their bare names"):
        source = LlavaJson(tmp_path / "some.json")
    records = [source.record(n) for n in range(2)]
    assert {one.visuals[0].key for one in records} == {str(tmp_path / name) for name in there}
