"""construct: from annotation files to samples that train.py reads, through failures and kills."""

import hashlib
import json
import re
from pathlib import Path

import numpy
import pytest
from loopback import completion, serving
from PIL import Image
from vlit_data import GOLDEN, PHOTOS, lines, vlit

from nanovlm.data.datasets import LlavaJson
from nanovlm.decoder import Decoder
from nanovlm.published.language import LLAMA, llama_config
from nanovlm.vlit import adaption
from nanovlm.vlit.annotations import read
from nanovlm.vlit.construct import COLOR, find_pictures, marked
from nanovlm.vlit.samples import defects, sample
from nanovlm.vlit.self_instruct import written
from tests.published_folders import LLAMA_SIZES, folder_with
from tests.random_models import randomise

PLANS = {"global", "region", "negative", "multi-round", "knowledge"}


def construct(out, *flags, annotations=PHOTOS, images=GOLDEN / "photos", code=0):
    """The items that the command writes."""
    where = ["--images", images] if images else []
    vlit("construct", "--annotations", *annotations, *where, "--out", out, *flags, code=code)
    return lines(out / "samples.jsonl") if code == 0 else []


def failures(out):
    return [(one["kind"], one["what"]) for one in lines(out / "failures.jsonl")]


def report(out):
    return json.loads((out / "report.json").read_text())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("construct") / "vlit"
    return out, construct(out)


# What comes out


def test_every_sample_is_whole_marked_read_by_train_and_counted_in_the_report(made):
    out, items = made
    assert len({item["id"] for item in items}) == len(items) > 80
    known = {note.id for picture in read(PHOTOS).pictures.values() for note in picture.annotations}
    for item in items:
        assert defects(sample(item), out) == []  # pictures included: paths start at the file
        origin = item["provenance"]
        assert known >= set(origin["annotation_ids"]) != set()
        assert (item["type"] == "SI") == (origin["generator"] == "template")
    plans = {(item["type"], item["provenance"]["plan"]) for item in items}
    assert plans == {("SI", plan) for plan in PLANS} | {("AA", kind) for kind in adaption.POOLS}
    source = LlavaJson(out / "samples.jsonl")
    assert len(source) == len(items)
    assert all(Path(source.record(n).visuals[0].key).is_file() for n in range(len(source)))
    for item in items:
        assert item["image"].startswith("marked/") == (item["granularity"] == "region")
    images = [Image.open(out / item["image"]) for item in items if item["granularity"] == "region"]
    assert images and all((numpy.asarray(image) == COLOR).all(axis=-1).mean() > 0.01 for image in images)
    told = report(out)
    assert sum(told["samples"].values()) == len(items) and told["pictures"] == 4
    # nothing to deny or to know about the rocket, nor to know about a person
    assert told["failures"] == {"refused": 4} and len(failures(out)) == 4
    assert told["annotations"] == {"caption": 8, "object": 5, "attribute": 3, "ocr": 1, "vqa": 5}
    assert told["settings"]["temperature"] == 0.8


def test_the_same_command_makes_the_same_file_and_asks_nothing_again(made, capsys):
    out, items = made
    assert construct(out) == items
    assert "requests asked" not in capsys.readouterr().out
    assert construct(out, "--seed", "1") != items == construct(out)


def test_plans_methods_and_limits_choose(tmp_path):
    flags = ("--method", "self-instruct", "--plans")
    items = construct(tmp_path / "a", *flags, "negative,region", "--limit", "1", "-n", "2")
    assert [item["provenance"]["plan"] for item in items] == ["negative", "negative", "region", "region"]
    assert {item["type"] for item in construct(tmp_path / "b", "--method", "adapt")} == {"AA"}
    items = construct(tmp_path / "c", *flags, "region", "--regions", "3", "-n", "1")
    # the person and the text, the cup and the spoon; cat and table fill their pictures
    assert len({tuple(item["provenance"]["region"]) for item in items}) == 4


@pytest.mark.parametrize(("flags", "words"), (
    (["--plans", "globl"], "Did you mean 'global'"), (["-n", "0"], "n is 0; it must be 1 or more"),
    (["--generator", "endpoint"], "needs --model"), (["--answers", "sentences"], "need a language model"),
    (["--lines", "1,11"], "no requirement 11"), (["--generator", "local", "--model", "."], "config.json"),
    (["--images", "absent"], "absent: no such folder of pictures"), (["--images", "."], "the last of 4 problems: "),
))  # fmt: skip
def test_bad_input_ends_with_a_message(tmp_path, capsys, flags, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    construct(tmp_path / "out", *flags, code=2)
    assert words in capsys.readouterr().err


def test_missing_and_damaged_pictures_and_bad_records_are_counted_and_named(tmp_path):
    folder, captions = tmp_path / "photos", json.loads(Path(PHOTOS[0]).read_text())
    folder.mkdir()
    (folder / "astronaut.jpg").write_bytes((GOLDEN / "photos" / "astronaut.jpg").read_bytes())
    (folder / "coffee.jpg").write_bytes(b"damaged")
    captions["annotations"][0]["caption"] = None
    (tmp_path / "captions.json").write_text(json.dumps(captions, indent=1))
    items = construct(tmp_path / "out", annotations=[tmp_path / "captions.json", *PHOTOS[1:]], images=folder)
    told = failures(tmp_path / "out")
    for kind, words in (
        ("unreadable record", "captions.json, line"), ("unreadable record", "'caption' must be a str"),
        ("unreadable picture", "coffee.jpg"), ("missing picture", "chelsea.jpg"), ("missing picture", "rocket.jpg"),
    ):  # fmt: skip
        assert [what for its, what in told if its == kind and words in what], words
    assert not [item for item in items if "coffee" in item["image"] or item["id"].startswith("3/")]


def test_without_a_folder_pictures_are_named_as_the_annotations_do(tmp_path):
    items = construct(tmp_path / "out", annotations=[GOLDEN / "caps_boxes.jsonl"], images=None)
    assert not (tmp_path / "out" / "marked").exists()
    names = {item["image"]: int(item["id"].split("/")[0]) for item in items if item["granularity"] == "global"}
    assert names and all(image == f"{number:012d}.jpg" for image, number in names.items())
    (tmp_path / "val2014").mkdir()
    path = tmp_path / "val2014" / "COCO_val2014_000000296284.jpg"
    Image.new("RGB", (4, 4)).save(path)
    found, failed = find_pictures(read([GOLDEN / "caps_boxes.jsonl"]), tmp_path)
    assert [place for _, place in found] == [str(path)] and [kind for kind, _ in failed] == ["missing picture"] * 19


# Parts


def test_the_box_surrounds_what_it_marks():
    image = Image.new("RGB", (100, 60), (10, 20, 30))
    red = (numpy.asarray(marked(image, (0.2, 0.5, 0.6, 0.9))) == COLOR).all(axis=-1)
    expected = numpy.zeros((60, 100), bool)
    expected[28:56, 18:62] = True
    expected[30:54, 20:60] = False
    assert (red == expected).all()
    edge = (numpy.asarray(marked(image, (0, 0, 1, 1))) == COLOR).all(axis=-1)
    assert edge[[0, -1]].all() and edge[:, [0, -1]].all()  # no room outside: inside


def test_instruction_pools_grow_through_the_meta_prompt():
    asked = adaption.meta_chat("caption").messages[-1][1]
    assert "Continue to write 15" in asked and "meaning: 1) Describe the image briefly.; 2) Describe the image.; 3)" in asked
    reply = "4) Tell shortly what is there.; 5) describe the image.; 6. \"Sum up the image.\"\n7) Say it in 2 words."
    new = ["Tell shortly what is there.", "Sum up the image.", "Say it in 2 words."]
    assert adaption.more_instructions("caption", reply) == new
    reply = "4) Tell me: [QUESTION]; 5) Answer it; 6) [QUESTION] [QUESTION]"
    assert adaption.more_instructions("vqa", reply) == ["Tell me: [QUESTION]"]
    made = [adaption.adapt("caption", "", "A cat.", ["1"], str(n), "a.jpg", adaption.POOLS, 0) for n in range(40)]
    assert len({one["conversations"][0]["value"] for one in made}) == len(adaption.POOLS["caption"])


def test_a_local_language_model_writes_through_the_command(tmp_path):
    """A random one, whose words nobody understands: everything is counted as such, and kept for the next run."""
    sizes = LLAMA_SIZES | {"max_position_embeddings": 16384}
    decoder, config = randomise(Decoder(llama_config(sizes))), sizes | {"model_type": "llama", "rope_theta": 10000.0}
    folder = folder_with(tmp_path / "model", config, LLAMA, decoder.state_dict())
    flags = "--method self-instruct --plans global --limit 2 -n 2 --max-tokens 5 --lines 9".split()
    assert construct(tmp_path / "out", "--generator", "local", "--model", folder, *flags) == []
    answers = lines(tmp_path / "out/replies.jsonl")
    assert [(one["generator"], len(one["replies"])) for one in answers] == [("local model", 2)] * 2
    assert {kind for kind, _ in failures(tmp_path / "out")} == {"unparsed: no conversation"}


# With an endpoint


ENDPOINT = ("--generator", "endpoint", "--model", "m", "--method")


def answered(body, number):
    """Conversations that depend on the request alone, and replies to the two other kinds of request."""
    asked = body["messages"][-1]["content"]
    sha = hashlib.sha256(f"{asked}{body['seed']}".encode()).hexdigest()[:8]
    if "Continue to write 15" in asked:
        return completion(f"4) Tell about the image {sha}; 5) [QUESTION] {sha}; 6) How many [OBJECT] {sha}?")
    if "Short answer:" in asked:
        return completion("" if "evening" in asked else f"Written out: {sha}.")
    return completion(*(written([(f"What is {sha}?", f"It is number {n} in the box.")]) for n in range(body["n"])))


def test_pools_and_short_answers_by_a_language_model(tmp_path):
    out, flags = tmp_path / "out", ("adapt", "--more-instructions", "--answers", "sentences", "--base-url")
    with serving(answered) as server:
        items = construct(out, *ENDPOINT, *flags, server.url)
        assert report(out)["usage"]["requests"] == len(server.bodies)
    vqa = [item["conversations"] for item in items if item["provenance"]["plan"] == "vqa"]
    said = {reply["value"]: "Give a short answer" in asked["value"] for asked, reply in vqa}
    assert said.pop("evening")  # an empty reply leaves it short
    assert said and all(re.fullmatch(r"Written out: \w{8}\.", reply) and not short for reply, short in said.items())
    assert report(out)["notes"]["instructions added"] == 7  # each reply has one that fits its kind's slots


def test_unparsed_cut_and_repeated_answers_are_counted(tmp_path):
    good, cut = written([("a?", "The box.")]), '{"User": "a?", "AI": "The box.", "User": "c?'
    turns = ("look at <image>?", "box"), ("a?", "According to the caption, it is not clear.")
    bad = ["I cannot.", *(written([turn]) for turn in turns)]
    flags = ("self-instruct", "--plans", "global", "--limit", "1", "-n", "6", "--base-url")
    with serving(lambda body, number: completion(good, good, cut, *bad)) as server:
        items = construct(tmp_path / "out", *ENDPOINT, *flags, server.url)
    assert [item["provenance"]["index"] for item in items] == [0, 2, 5]
    assert items[2]["flags"] == ["source", "hedge"] and "flags" not in items[0]
    assert report(tmp_path / "out")["failures"] == {"unparsed: no conversation": 1, "unusable": 1}
    assert report(tmp_path / "out")["notes"] == {
        "requests asked": 1, "answers drawn twice": 1, "parsed although malformed": 1, "parsed although cut": 1,
        "flagged source": 1, "flagged hedge": 1,
    }  # fmt: skip


def test_an_endpoint_that_fails_leaves_a_run_that_goes_on(tmp_path, capsys):
    flags, out = (*ENDPOINT, "self-instruct", "--workers", "2", "--base-url"), tmp_path / "out"
    with serving(answered) as server:
        whole = construct(tmp_path / "whole", *flags, server.url)
        needed = len(server.bodies)
    spent = (401, {}, b"no credit left")
    with serving(lambda body, number: spent if number >= 7 else answered(body, number)) as server:
        construct(out, *flags, server.url, code=2)
    told = capsys.readouterr().err
    assert "no credit left" in told and "7 answers are in" in told and "the same command goes on" in told
    assert not (out / "samples.jsonl").exists()
    with serving(answered) as server:
        assert construct(out, *flags, server.url) == whole
        assert len(server.bodies) == needed - 7
    replay = ["--generator", "replay", "--replies", out / "replies.jsonl", "--method", "self-instruct"]
    again = construct(tmp_path / "again", *replay)
    assert [item["conversations"] for item in again] == [item["conversations"] for item in whole]
