"""construct: from annotation files to samples that train.py reads, through failures and kills."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from loopback import completion, serving
from PIL import Image

from nanovlm.data.datasets import LlavaJson
from nanovlm.decoder import Decoder
from nanovlm.published.language import LLAMA, llama_config
from nanovlm.vlit import __main__ as command_line
from nanovlm.vlit import adaption
from nanovlm.vlit.annotations import read
from nanovlm.vlit.annotations import Annotation, Picture
from nanovlm.vlit.self_instruct import written
from nanovlm.vlit.samples import defects
from nanovlm.vlit.construct import COLOR, marked
from nanovlm.vlit.construct import find_pictures, regions
from nanovlm.vlit.samples import sample
from tests.published_folders import LLAMA_SIZES, folder_with
from tests.random_models import randomise

GOLDEN = Path(__file__).parents[1] / "golden" / "vlit"
PHOTOS = [str(path) for path in sorted(GOLDEN.glob("*_photos.json"))]


def construct(out, *flags, annotations=PHOTOS, images=GOLDEN / "photos", code=0):
    where = ["--images", str(images)] if images else []
    assert command_line.main(["construct", "--annotations", *map(str, annotations), *where, "--out", str(out), *flags]) == code
    return lines(out / "samples.jsonl") if code == 0 else []


def lines(path):
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def failures(out):
    return [(one["kind"], one["what"]) for one in lines(out / "failures.jsonl")]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("construct") / "vlit"
    return out, construct(out)


# What comes out ---------------------------------------------------------------------------------------------------------


def test_every_sample_is_whole_and_says_where_it_comes_from(made):
    out, items = made
    ids = [item["id"] for item in items]
    assert len(set(ids)) == len(ids) > 80
    known = {note.id for picture in read(PHOTOS).pictures.values() for note in picture.annotations}
    for item in items:
        assert defects(sample(item), out) == []  # pictures included: paths start at the file
        origin = item["provenance"]
        assert set(origin["annotation_ids"]) <= known and origin["annotation_ids"]
        assert (item["type"] == "SI") == (origin["generator"] == "template")
    assert {item["provenance"]["plan"] for item in items if item["type"] == "SI"} == {
        "global", "region", "negative", "multi-round", "knowledge",
    }  # fmt: skip
    assert {item["provenance"]["plan"] for item in items if item["type"] == "AA"} == set(adaption.POOLS)


def test_train_reads_the_samples(made):
    out, items = made
    source = LlavaJson(out / "samples.jsonl")
    assert len(source) == len(items)
    assert all(Path(source.record(n).visuals[0].key).is_file() for n in range(len(source)))


def test_region_samples_show_marked_pictures(made):
    out, items = made
    marked_items = [item for item in items if item["granularity"] == "region"]
    assert marked_items and all(item["image"].startswith("marked/") for item in marked_items)
    assert not any(item["image"].startswith("marked/") for item in items if item["granularity"] == "global")
    for item in marked_items:
        assert share_of_red(Image.open(out / item["image"])) > 0.01


def share_of_red(image):
    return (numpy.asarray(image.convert("RGB")) == COLOR).all(axis=-1).mean()


def test_the_report_counts_samples_failures_and_what_was_skipped(made):
    out, items = made
    report = json.loads((out / "report.json").read_text())
    assert sum(report["samples"].values()) == len(items) and report["pictures"] == 4
    assert report["failures"] == {"refused": 4}  # nothing to deny or to know about the rocket, nor to know about a person
    assert len(failures(out)) == 4
    assert report["skipped"]["illegible texts"] == 1
    assert report["annotations"] == {"caption": 8, "object": 5, "attribute": 3, "ocr": 1, "vqa": 5}
    assert report["settings"]["temperature"] == 0.8 and report["settings"]["n"] == 5


def test_the_same_command_makes_the_same_file_and_asks_nothing_again(made, capsys):
    out, _ = made
    before = (out / "samples.jsonl").read_bytes()
    construct(out)
    assert (out / "samples.jsonl").read_bytes() == before
    assert "requests asked" not in capsys.readouterr().out
    construct(out, "--seed", "1")
    assert (out / "samples.jsonl").read_bytes() != before
    construct(out)


def test_plans_methods_and_limits_choose(tmp_path):
    items = construct(tmp_path / "a", "--plans", "negative,region", "--method", "self-instruct", "--limit", "1", "-n", "2")
    assert [item["provenance"]["plan"] for item in items] == ["negative", "negative", "region", "region"]
    assert {item["type"] for item in construct(tmp_path / "b", "--method", "adapt")} == {"AA"}
    items = construct(tmp_path / "c", "--plans", "region", "--method", "self-instruct", "--regions", "3", "-n", "1")
    places = [tuple(item["provenance"]["region"]) for item in items]
    assert len(set(places)) == 4  # the person and the text, the cup and the spoon; cat and table fill their pictures


def test_bad_input_ends_with_a_message(tmp_path, capsys):
    for flags, words in (
        (["--plans", "globl"], "Did you mean 'global'"),
        (["-n", "0"], "n is 0; it must be 1 or more"),
        (["--temperature", "-1"], "temperature is -1"),
        (["--generator", "endpoint"], "needs --model"),
        (["--generator", "replay"], "needs --replies"),
        (["--answers", "sentences"], "need a language model"),
        (["--lines", "1,11"], "no requirement 11"),
        (["--generator", "local", "--model", str(tmp_path)], "config.json"),
    ):
        construct(tmp_path / "out", *flags, code=2)
        assert words in capsys.readouterr().err
    construct(tmp_path / "out", images=tmp_path / "absent", code=2)
    assert "no such folder of pictures" in capsys.readouterr().err
    construct(tmp_path / "out", images=tmp_path, code=2)
    assert f"the last of 4 problems: {tmp_path}" in capsys.readouterr().err


def test_missing_and_damaged_pictures_and_bad_records_are_counted_and_named(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("astronaut", "coffee"):
        (folder / f"{name}.jpg").write_bytes((GOLDEN / "photos" / f"{name}.jpg").read_bytes())
    (folder / "coffee.jpg").write_bytes(b"damaged")
    captions = json.loads(Path(PHOTOS[0]).read_text())
    captions["annotations"][0]["caption"] = None
    (tmp_path / "captions.json").write_text(json.dumps(captions, indent=1))
    items = construct(tmp_path / "out", annotations=[tmp_path / "captions.json", *PHOTOS[1:]], images=folder)
    kinds = dict(failures(tmp_path / "out"))
    assert "captions.json, line" in kinds["unreadable record"] and "'caption' must be a str" in kinds["unreadable record"]
    assert "coffee.jpg" in kinds["unreadable picture"]
    missing = [what for kind, what in failures(tmp_path / "out") if kind == "missing picture"]
    assert [Path(what.partition(":")[0]).name for what in missing] == ["chelsea.jpg", "rocket.jpg"]
    assert not [item for item in items if "coffee" in item["image"] or item["id"].startswith("3/")]


def test_without_a_folder_pictures_are_named_as_the_annotations_do(tmp_path):
    items = construct(tmp_path / "out", annotations=[GOLDEN / "caps_boxes.jsonl"], images=None)
    assert not (tmp_path / "out" / "marked").exists()
    assert {item["image"] for item in items if item["granularity"] == "global"} == {
        f"{int(item['id'].split('/')[0]):012d}.jpg" for item in items
    }


def test_coco_pictures_are_found_under_the_names_of_2014(tmp_path):
    (tmp_path / "val2014").mkdir()
    path = tmp_path / "val2014" / "COCO_val2014_000000296284.jpg"
    Image.new("RGB", (4, 4)).save(path)
    found, failed = find_pictures(read([GOLDEN / "caps_boxes.jsonl"]), tmp_path)
    assert [place for _, place in found] == [str(path)] and [kind for kind, _ in failed] == ["missing picture"] * 19


# Parts ------------------------------------------------------------------------------------------------------------------


def test_the_box_surrounds_what_it_marks():
    image = Image.new("RGB", (100, 60), (10, 20, 30))
    pixels = numpy.asarray(marked(image, (0.2, 0.5, 0.6, 0.9)))
    red = (pixels == COLOR).all(axis=-1)
    assert pixels.shape == (60, 100, 3) and not red[30:54, 20:60].any()
    assert red[28:30, 18:62].all() and red[54:56, 18:62].all() and red[28:56, 18:20].all() and red[28:56, 60:62].all()
    assert red.sum() == 28 * 44 - 24 * 40
    edge = (numpy.asarray(marked(image, (0, 0, 1, 1))) == COLOR).all(axis=-1)
    assert edge[0].all() and edge[-1].all() and edge[:, 0].all() and edge[:, -1].all()  # no room outside: inside


def test_regions_are_worth_a_box():
    boxes = {"tiny": (0, 0, 0.05, 0.05), "good": (0.1, 0.1, 0.5, 0.5), "whole": (0, 0, 1, 1)}
    notes = [Annotation(f"object/{name}", "object", name, box=box) for name, box in boxes.items()]
    notes.append(Annotation("object/crowd", "object", "crowd", box=boxes["good"], is_crowd=True))
    notes.append(Annotation("ocr/1", "ocr", "STOP", box=boxes["tiny"]))
    assert {one.value for one in regions(Picture("1", annotations=notes), 9, seed=0)} == {"good", "STOP"}


def test_instruction_pools_grow_through_the_meta_prompt():
    asked = adaption.meta_chat("caption").messages[-1][1]
    assert asked == (
        "Here are some instructions that define a visual-language task. Continue to write 15 instructions with the same "
        "meaning: 1) Describe the image briefly.; 2) Describe the image.; 3) Write a relevant description to pair with the image.;"
    )
    reply = "4) Give a short account of the picture.; 5) describe the image.; 6. \"Sum up the image.\"\n7) Say it in 2 words."
    assert adaption.more_instructions("caption", reply) == [
        "Give a short account of the picture.", "Sum up the image.", "Say it in 2 words.",
    ]  # fmt: skip
    reply = "4) Tell me: [QUESTION]; 5) Answer it; 6) [QUESTION] [QUESTION]"
    assert adaption.more_instructions("vqa", reply) == ["Tell me: [QUESTION]"]
    assert all(len(pool) >= 3 for pool in adaption.POOLS.values())


def test_short_answers_ask_for_one():
    told = ("vqa", "Is it red?", "yes", ["vqa/1"])
    short = adaption.adapt(*told, "1/AA/vqa/0", "a.jpg", adaption.POOLS, 0)
    assert short.turns[0][1].endswith("Is it red? Give a short answer.") and short.turns[1] == ("assistant", "yes")
    long = adaption.adapt(*told, "1/AA/vqa/0", "a.jpg", adaption.POOLS, 0, sentence="Yes, it is red.")
    assert long.turns[0][1].endswith("Is it red?") and long.turns[1] == ("assistant", "Yes, it is red.")
    drawn = {adaption.adapt("caption", "", "A cat.", ["c"], str(n), "a", adaption.POOLS, 0).turns[0][1] for n in range(40)}
    assert len(drawn) == len(adaption.POOLS["caption"])


def test_a_local_language_model_writes_through_the_command(tmp_path):
    """A random one, whose words nobody understands: everything is counted as such, and kept for the next run."""
    sizes = LLAMA_SIZES | {"max_position_embeddings": 16384}
    decoder, config = randomise(Decoder(llama_config(sizes))), sizes | {"model_type": "llama", "rope_theta": 10000.0}
    folder = folder_with(tmp_path / "model", config, LLAMA, decoder.state_dict())
    flags = ["--generator", "local", "--model", str(folder), "--method", "self-instruct", "--plans", "global", "--limit", "2"]
    assert construct(tmp_path / "out", *flags, "-n", "2", "--max-tokens", "5", "--lines", "9") == []
    answers = lines(tmp_path / "out/replies.jsonl")
    assert [one["generator"] for one in answers] == ["local model"] * 2 and all(len(one["replies"]) == 2 for one in answers)
    assert {kind for kind, _ in failures(tmp_path / "out")} == {"unparsed: no conversation"}


# With an endpoint -------------------------------------------------------------------------------------------------------


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
    flags = ["--generator", "endpoint", "--model", "m", "--method", "adapt", "--more-instructions", "--answers", "sentences"]
    with serving(answered) as server:
        items = construct(tmp_path / "out", *flags, "--base-url", server.url)
    vqa = [item["conversations"] for item in items if item["provenance"]["plan"] == "vqa"]
    said = {reply["value"]: "Give a short answer" in asked["value"] for asked, reply in vqa}
    assert said.pop("evening")  # an empty reply leaves it short
    assert said and all(re.fullmatch(r"Written out: \w{8}\.", reply) and not short for reply, short in said.items())
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["notes"]["instructions added"] == 7  # each reply has one that fits its kind's slots
    assert report["usage"]["requests"] == len(server.bodies)


def test_unparsed_cut_and_repeated_answers_are_counted(tmp_path):
    good, cut = written([("a?", "The box.")]), '{"User": "a?", "AI": "The box.", "User": "c?'
    bad = ["I cannot.", written([("look at <image>?", "box")]), written([("a?", "According to the caption, it is not clear.")])]
    flags = ["--generator", "endpoint", "--model", "m", "--method", "self-instruct", "--plans", "global", "--limit", "1", "-n", "6"]
    with serving(lambda body, number: completion(good, good, cut, *bad)) as server:
        items = construct(tmp_path / "out", *flags, "--base-url", server.url)
    assert [item["provenance"]["index"] for item in items] == [0, 2, 5]
    assert items[2]["flags"] == ["source", "hedge"] and "flags" not in items[0]
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["failures"] == {"unparsed: no conversation": 1, "unusable": 1}
    assert report["notes"] == {"requests asked": 1, "answers drawn twice": 1, "parsed although malformed": 1,
                               "parsed although cut": 1, "flagged source": 1, "flagged hedge": 1}  # fmt: skip


def test_an_endpoint_that_fails_leaves_a_run_that_goes_on(tmp_path, capsys):
    flags = ["--generator", "endpoint", "--model", "m", "--method", "self-instruct", "--workers", "2"]
    with serving(answered) as server:
        construct(tmp_path / "whole", *flags, "--base-url", server.url)
        needed = len(server.bodies)
    with serving(lambda body, number: (401, {}, b"no credit left") if number >= 7 else answered(body, number)) as server:
        construct(tmp_path / "out", *flags, "--base-url", server.url, code=2)
    told = capsys.readouterr().err
    assert "no credit left" in told and "7 answers are in" in told and "the same command goes on" in told
    assert not (tmp_path / "out/samples.jsonl").exists()
    with serving(answered) as server:
        construct(tmp_path / "out", *flags, "--base-url", server.url)
        assert len(server.bodies) == needed - 7
    assert (tmp_path / "out/samples.jsonl").read_bytes() == (tmp_path / "whole/samples.jsonl").read_bytes()
    replay = ["--generator", "replay", "--replies", str(tmp_path / "out/replies.jsonl"), "--method", "self-instruct"]
    again = construct(tmp_path / "again", *replay)
    assert [item["conversations"] for item in again] == [item["conversations"] for item in lines(tmp_path / "out/samples.jsonl")]


def test_an_interruption_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def interrupted(self, chats, **drawing):
        raise KeyboardInterrupt

    monkeypatch.setattr("nanovlm.vlit.template.Template.generate", interrupted)
    construct(tmp_path / "out", code=130)
    assert "the same command goes on" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_killed_at_any_moment_goes_on(tmp_path):
    """The server kills its client with SIGKILL at the first and at the tenth request; the last start finishes."""
    moments, running = [0, 9], []

    def reply(body, number):
        if number in moments:
            os.kill(running[-1].pid, signal.SIGKILL)
        return answered(body, number)

    flags = ["--generator", "endpoint", "--model", "m", "--workers", "2"]
    with serving(answered) as server:
        construct(tmp_path / "whole", *flags, "--base-url", server.url)
        needed = len(server.bodies)
    with serving(reply) as server:
        command = [sys.executable, "-m", "nanovlm.vlit", "construct", "--annotations", *PHOTOS, "--images", str(GOLDEN / "photos"),
                   "--out", str(tmp_path / "out"), *flags, "--base-url", server.url]  # fmt: skip
        codes = []
        for _ in range(len(moments) + 1):
            running.append(subprocess.Popen(command, cwd=Path(__file__).parents[2], stderr=subprocess.PIPE, stdout=subprocess.PIPE))
            running[-1].communicate(timeout=600)
            codes.append(running[-1].returncode)
        assert codes == [-signal.SIGKILL] * len(moments) + [0]
        assert needed <= len(server.bodies) <= needed + 2 * len(moments)  # what was under way is asked again, nothing else
    assert (tmp_path / "out/samples.jsonl").read_bytes() == (tmp_path / "whole/samples.jsonl").read_bytes()
