"""Records and the reader of LLaVA-style files: what a good file becomes."""

import json
import pickle

import pytest
from PIL import Image

from nanovlm.data.datasets import LlavaJson
from nanovlm.data.records import Record, Turn, Visual, check_order, permutation
from vlit_data import asked


@pytest.fixture
def folder(tmp_path):
    """A folder with the pictures a.png and sub/b.png."""
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "sub/b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    return tmp_path


def write(folder, items):
    (folder / "some.json").write_text(json.dumps(items))
    return folder / "some.json"


def only(folder, item):
    return LlavaJson(write(folder, [item])).record(0)


A, B = "a.png", "sub/b.png"


@pytest.mark.parametrize("item, parts, images", [
    ({"image": A, "conversations": asked("<image>\nWhat?", "a cat")}, [(0, "\nWhat?"), ("a cat",)], [A]),
    ({"image": [A, B, A], "conversations": asked("<image> or <image>?", "the first") + asked("and\n<image>", "no")},
     [(0, " or ", 1, "?"), ("the first",), ("and\n", 2), ("no",)], [A, B, A]),
    ({"image": None, "conversations": asked("hi", "hello")}, [("hi",), ("hello",)], []),
    ({"image": [], "conversations": [{"from": "user", "value": "hi"}, {"from": "assistant", "value": "hello"}]},
     [("hi",), ("hello",)], []),
    ({"conversations": asked("which tag?", "<image>")}, [("which tag?",), ("<image>",)], []),  # of a reply it is text
    ({"conversations": [{"from": "gpt", "value": "once upon a time"}]}, [("once upon a time",)], []),
    ({"image": [A, B], "conversations": asked("What?", "a cat")}, [(0, "\n", 1, "\nWhat?"), ("a cat",)], [A, B]),  # as LLaVA
    ({"image": "sub\\b.png", "conversations": asked("<image>", "a cat")}, [(0,), ("a cat",)], [B]),
    ({"conversations": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
     [("hi",), ("hello",)], []),
    ({"images": [A], "messages": [{"role": "User", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
                                  {"role": "GPT", "content": "a cat"}]}, [(0, "What?"), ("a cat",)], [A]),
])
def test_items(folder, item, parts, images):
    record = only(folder, {"id": 7, "kind": "colour", "model": "m", **item})
    paths = [str(folder / name) for name in images]
    assert record.visuals == tuple(Visual(path, (path,)) for path in paths)
    (turns,) = record.conversations
    assert [turn.parts for turn in turns] == parts and (record.id, record.kinds) == ("7", ("colour",))
    assert [turn.role for turn in turns] == (["user", "assistant"] * 2)[-len(turns) :]


def test_image_folder_is_the_files_own_unless_given(folder):
    (folder / "lists").mkdir()
    item = {"id": "x", "image": "a.png", "conversations": asked("<image>", "a")}
    path = write(folder / "lists", [item])
    assert LlavaJson(path, folder).record(0).visuals[0].key == str(folder / "a.png")
    with pytest.raises(FileNotFoundError, match="1 of 1 images"):
        LlavaJson(path)
    path = write(folder, [{"id": n, "conversations": asked("q" * 500, "a" * 500)} for n in range(100)])
    assert len(pickle.dumps(LlavaJson(path))) < 5000 < path.stat().st_size / 20


def test_every_epoch_holds_every_record_once_in_its_own_order(folder):
    path = write(folder, [{"id": n, "conversations": asked("q", "a")} for n in range(20)])
    source, again, other = LlavaJson(path, seed=3), LlavaJson(path, seed=3), LlavaJson(path, seed=4)
    assert len(source) == 20
    epochs = [[source.record(20 * epoch + n).id for n in range(20)] for epoch in range(3)]
    assert all(sorted(map(int, epoch)) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs} | {tuple(map(str, range(20)))}) == 4
    backwards = [again.record(n).id for n in reversed(range(60))]  # a pure function of (seed, n)
    assert backwards[::-1] == epochs[0] + epochs[1] + epochs[2]
    assert [other.record(n).id for n in range(20)] != epochs[0] and LlavaJson(path).seed == 0
    one, *others = (permutation(*seed, length=9).tolist() for seed in ((1, 2), (2, 2), (1, 1), (1, 2, 3)))
    assert sorted(one) == list(range(9)) and one not in others


@pytest.mark.parametrize("roles, last", [
    ("", "assistant"), ("uu", "assistant"), ("uaa", "assistant"), ("u", "assistant"), ("ua", "user"), ("aua", "assistant"),
    ("au", "user"),
])
def test_order_of_turns(roles, last):
    roles = [{"u": "user", "a": "assistant"}[role] for role in roles]
    with pytest.raises(ValueError, match=f"by {', '.join(roles) or 'nobody'}; .* to the {last}"):
        check_order(roles, last)


def test_records_refuse_what_makes_no_sense():
    picture = Image.new("RGB", (2, 2))
    talk = ((Turn("assistant", ("a",)),),)
    for rest in (((),), (talk, ("x", "y")), (talk, (), (), (None, (0.5, 0.5)))):
        with pytest.raises(ValueError, match="record 'r' has [01] conversations, [02] kinds and [02] regions"):
            Record("r", (), *rest)
    for number in (1, -1):
        with pytest.raises(ValueError, match=rf"mentions visual inputs \[{number}\]; it has 1"):
            Record("r", (Visual("v", (picture,)),), ((Turn("user", (number,)),),))
    Record("r", (Visual("v", (picture,)),), ((Turn("user", (0,)),),), ("x",), regions=((0, 0.99),))
