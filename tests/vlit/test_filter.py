"""filter, compare, review and duplicates: nothing is lost, every reason is right, a kill costs nothing."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
from PIL import Image

from nanovlm.vlit import filtering, quality
from nanovlm.vlit.__main__ import Parser, main
from nanovlm.vlit.duplicates import HASHES, Index, signature
from nanovlm.vlit.samples import sample


def item(id, question, answer, image="a.png", **more):
    said = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": id, "image": image, "conversations": said} | more


LONG = "A dog and a cat sit on the green grass beside the old wooden fence of a quiet farm and look at the sky together"
RECORDS = [
    item(0, "How many dogs are there?", "Two dogs."),  # kept
    item("1", "How many dogs are there?", "Five dogs."),  # wrong
    item(2, "How many dogs are there?", "two  DOGS!"),  # repeats the first
    item(3, "Describe the image.", LONG),  # kept
    item(4, "Describe the image.", LONG + " now"),  # nearly the same
    item(5, "Describe the image.", LONG, image="b.png"),  # another picture
    item(6, "What is there?", "The description does not mention it."),  # rule 8
    item(7, "What is there?", "A dog.", image="none.png"),
    item(8, "What is there?", "A dog.", image="broken.png"),
    {"id": 9, "conversations": [{"from": "gpt", "value": "Hello."}, {"from": "human", "value": ""}]},
    item(10, "What is there? <image>", "A dog."),  # two placeholders, one picture
    item(11, "Is there a zebra?", "No.", kind="extra", id_of_nothing=[1, {"a": None}]),  # kept, with all it holds
]
BROKEN = '{"id": 12, "conversations": [{"from": "human"'
NOTES = [
    {"id": name, "image": f"{name}.png", "captions": [], "instances": [{"category": "dog", "bbox": [0, 0, 1, 1]}] * 2}
    for name in "ab"
]


@pytest.fixture
def folder(tmp_path):
    for name in "ab":
        Image.new("RGB", (8, 8), (120, 80, 20)).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nothing")
    (tmp_path / "data.jsonl").write_text("\n".join([json.dumps(one) for one in RECORDS] + [BROKEN]))
    (tmp_path / "notes.jsonl").write_text("\n".join(map(json.dumps, NOTES)))
    return tmp_path


def filtered(folder, *flags, file="data.jsonl", out="out"):
    """(kept records, dropped lines) of the command."""
    arguments = ["filter", str(folder / file), "--annotations", str(folder / "notes.jsonl"), "--out", str(folder / out)]
    assert main([*arguments, "--without-report", *flags]) == 0
    return lines(folder / out / "kept.jsonl"), lines(folder / out / "dropped.jsonl")


def lines(path):
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def test_every_record_is_kept_or_dropped_with_its_reasons(folder, capsys):
    kept, dropped = filtered(folder)
    assert kept == [RECORDS[place] for place in (0, 3, 5, 11)]  # unchanged, in their order
    assert [one["record"] for one in dropped if "record" in one] == [
        RECORDS[place] for place in (1, 2, 4, 6, 7, 8, 9, 10)
    ]
    reasons = {one["where"].rpartition("line ")[2]: one["reasons"] for one in dropped}
    assert reasons["2"] == ["wrong: round 1, by rule"]
    assert reasons["3"] == ["duplicate: exact duplicate of record 1"]
    assert reasons["5"] == ["duplicate: near duplicate of record 4"]
    for line, words in (
        ("7", "defect: source"),
        ("8", "none.png"),
        ("9", "broken.png"),
        ("11", "defect: placeholders: 2 <image>"),
    ):
        assert any(words in why for why in reasons[line]), line
    assert any("begins with" in why or "ends with" in why for why in reasons["10"]) and any(
        "says nothing" in why for why in reasons["10"]
    )
    assert dropped[-1]["text"] == BROKEN and dropped[-1]["where"].endswith("data.jsonl, line 13")
    assert dropped[-1]["reasons"][0].startswith("unreadable: ")
    report = json.loads((folder / "out" / "report.json").read_text())
    assert report["records"] == 13 and report["kept"] == 4
    assert report["dropped"] == {"unreadable": 1, "defect": 5, "duplicate": 2, "wrong": 1}
    assert "kept 4 of 13" in capsys.readouterr().out


def test_what_is_dropped_anyway_makes_no_duplicate(folder):
    records = [item(0, "What is it?", LONG, image="broken.png"), item(1, "What is it?", LONG, image="broken.png"),
               item(2, "What is it?", LONG), item(3, "What is it?", LONG)]  # fmt: skip
    (folder / "broken.png").unlink()
    (folder / "many.jsonl").write_text("\n".join(map(json.dumps, records)))
    kept, dropped = filtered(folder, file="many.jsonl")
    assert [one["id"] for one in kept] == [2]
    assert [len(one["reasons"]) for one in dropped] == [1, 1, 1] and dropped[2]["reasons"] == [
        "duplicate: exact duplicate of record 3"
    ]


def test_near_duplicates_can_stay(folder):
    kept, _ = filtered(folder, "--exact-only")
    assert RECORDS[4] in kept and RECORDS[2] not in kept


def test_caps_draw_evenly_and_spare_what_is_complex(folder):
    asked = [
        ("How many dogs are there?", "Two."),
        ("Why might the dogs wait here, and what would happen if it rained?", "Two."),
    ]
    records = [item(n, asked[n % 2][0], f"Two. {n}") for n in range(40)]
    records += [item(n, f"Is there a zebra number {n}?", "No.") for n in range(40, 50)]
    (folder / "many.jsonl").write_text("\n".join(map(json.dumps, records)))
    flags = ("--exact-only", "--per-task", "5")
    kept, dropped = filtered(folder, *flags, file="many.jsonl")
    assert Counter(one["id"] % 2 if one["id"] < 40 else "zebra" for one in kept) == {0: 5, 1: 5, "zebra": 5}
    assert all(one["reasons"][0].startswith("task cap: ") for one in dropped)
    chosen = {
        seed: {one["id"] for one in filtered(folder, *flags, "--seed", seed, file="many.jsonl", out=f"s{seed}")[0]}
        for seed in "01"
    }
    assert chosen["0"] == {one["id"] for one in kept} != chosen["1"]
    kept, _ = filtered(folder, *flags, "--keep-complex", "5", file="many.jsonl", out="complex")
    assert sum(one["id"] % 2 for one in kept if one["id"] < 40) == 20
    kept, dropped = filtered(folder, "--exact-only", "--per-response", "3", file="many.jsonl", out="said")
    assert sum(one["id"] >= 40 for one in kept) == 3 and len(kept) == 43
    assert all("response cap" in one["reasons"][0] for one in dropped)


def test_the_least_matching_go(folder, monkeypatch):
    class Encoder:
        name = "MD (own encoder)"

        def match(self, pictures, responses):
            return [float(text.split()[-1]) for text in responses]

    records = [item(n, "What is there?", f"A dog and its number {n}") for n in range(20)]
    (folder / "many.jsonl").write_text("\n".join(map(json.dumps, records)))
    monkeypatch.setattr("nanovlm.vlit.quality.load_encoder", lambda folder, recipe: Encoder())
    kept, dropped = filtered(folder, "--encoder", "x", "--matching-percentile", "25", "--exact-only", file="many.jsonl")
    assert [one["record"]["id"] for one in dropped] == [0, 1, 2, 3, 4]
    assert "matching degree 0.00 below 4.75, percentile 25" in dropped[0]["reasons"][0]


def test_a_judges_majority_decides(folder, monkeypatch):
    class Judge:
        name, accepts_images, batch_size, workers = "judge", False, 4, 1

        def generate(self, chats, *, n, **how):
            return [["No", "No", "Yes"] if "odd" in chat.messages[-1][1] else ["Yes"] * n for chat in chats]

    records = [item(n, "What is there?", f"An {('even', 'odd')[n % 2]} thing {n}") for n in range(6)]
    (folder / "many.jsonl").write_text("\n".join(map(json.dumps, records)))
    monkeypatch.setattr("nanovlm.vlit.quality.open_generator", lambda wishes: Judge())
    kept, dropped = filtered(folder, "--generator", "local", "--model", "x", "-n", "3", file="many.jsonl")
    assert [one["id"] for one in kept] == [0, 2, 4]
    assert all(one["reasons"] == ["wrong: round 1, by the judge's majority"] for one in dropped)


def test_scores_of_other_settings_are_refused(folder, capsys):
    filtered(folder)
    arguments = ["filter", str(folder / "data.jsonl"), "--out", str(folder / "out"), "--without-report"]
    assert main(arguments) == 2
    assert "annotations" in capsys.readouterr().err


def test_what_was_scored_is_not_scored_again(folder, monkeypatch):
    first = filtered(folder)
    scores = folder / "out" / "scores.jsonl"
    whole = scores.read_bytes()
    scores.write_bytes(whole[: whole.rindex(b"\n", 0, len(whole) // 2) + 9])  # killed in the middle of a line
    seen = []
    monkeypatch.setattr(
        filtering, "score_batch", lambda batch, *rest, real=filtering.score_batch: seen.extend(batch) or real(batch, *rest)
    )
    assert filtered(folder) == first
    assert scores.read_bytes() == whole and 0 < len(seen) < 13


def test_a_file_that_changes_meanwhile_replaces_nothing(folder, monkeypatch, capsys):
    first = filtered(folder)
    (folder / "out" / "scores.jsonl").unlink()
    with open(folder / "data.jsonl", "a") as file:
        file.write("\n" + json.dumps(item(99, "What is there?", "A cat.")))
    real = filtering.decide
    monkeypatch.setattr(filtering, "decide", lambda scores, args: real(scores[:-1], args))
    assert main(["filter", str(folder / "data.jsonl"), "--out", str(folder / "out"), "--without-report"]) == 2
    assert "has changed" in capsys.readouterr().err
    assert (lines(folder / "out" / "kept.jsonl"), lines(folder / "out" / "dropped.jsonl")) == first


@pytest.mark.slow
def test_a_killed_run_goes_on(folder):
    rng = random.Random(0)
    records = [
        item(n, "How many dogs are there?", f"{rng.choice(('Two', 'Five'))} {rng.random()}") for n in range(3000)
    ]
    (folder / "many.jsonl").write_text("\n".join(map(json.dumps, records)))
    expected = filtered(folder, "--exact-only", file="many.jsonl", out="whole")
    command = [sys.executable, "-m", "nanovlm.vlit", "filter", str(folder / "many.jsonl"), "--annotations", str(folder / "notes.jsonl"),
               "--out", str(folder / "killed"), "--exact-only", "--without-report"]  # fmt: skip
    scores = folder / "killed" / "scores.jsonl"
    for size in (2_000, 60_000):
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while run.poll() is None and (not scores.exists() or scores.stat().st_size < size):
            time.sleep(0.01)
        os.kill(run.pid, signal.SIGKILL) if run.poll() is None else None
        run.wait()
        assert not (folder / "killed" / "kept.jsonl").exists()
    assert filtered(folder, "--exact-only", file="many.jsonl", out="killed") == expected


@pytest.mark.parametrize(
    "flags, words",
    (
        (["--per-task", "0"], "--per-task is 0"), (["--per-response", "-1"], "--per-response is -1"),
        (["--near", "0"], "between 0 and 1"), (["--matching-percentile", "100"], "from 0 to below 100"),
    ),
)  # fmt: skip
def test_bad_flags_end_with_a_message(folder, capsys, flags, words):
    assert main(["filter", str(folder / "data.jsonl"), "--out", str(folder / "out"), *flags]) == 2
    assert words in capsys.readouterr().err


def test_before_and_after_stand_in_the_report(folder, capsys):
    assert (
        main(
            [
                "filter",
                str(folder / "data.jsonl"),
                "--annotations",
                str(folder / "notes.jsonl"),
                "--out",
                str(folder / "out"),
            ]
        )
        == 0
    )
    report = json.loads((folder / "out" / "report.json").read_text())
    assert report["before"]["C"] < report["after"]["C"] == 100
    assert (folder / "out" / "after" / "report.png").exists()


def said(*words):
    return sample({"id": 1, "image": "a.png", "conversations": [{"from": "gpt", "value": " ".join(words)}]})


def test_minhash_estimates_jaccard():
    rng = random.Random(1)
    for share in (0.2, 0.6, 0.9):
        errors = []
        for _ in range(30):
            words = [f"w{rng.random()}" for _ in range(120)]
            other = words[: int(120 * share)] + [f"v{rng.random()}" for _ in range(120 - int(120 * share))]
            one, two = ({" ".join(text[i : i + 3]) for i in range(118)} for text in (words, other))
            errors.append((signature(words) == signature(other)).mean() - len(one & two) / len(one | two))
        assert abs(sum(errors) / 30) < 0.05
    assert len(signature(["one"])) == HASHES


def test_near_duplicates_are_found_among_many():
    rng, index = random.Random(2), Index(0.8)
    texts = [[f"w{rng.randrange(500)}" for _ in range(60)] for _ in range(60)]
    for text in texts + [text[:-1] + ["end"] for text in texts[:20]] + [texts[30]]:
        index.add(said(*text))
    found = index.duplicates()
    assert found == {60 + n: (n, "near duplicate") for n in range(20)} | {80: (30, "exact duplicate")}
    assert Index().duplicates() == {}


def test_order_and_pictures_matter():
    index = Index(0.5)
    index.add(said("a", "b", "c", "d"))
    index.add(sample({"id": 1, "image": "b.png", "conversations": [{"from": "gpt", "value": "a b c d"}]}))
    index.add(said("d", "c", "b", "a"))
    assert index.duplicates() == {}


def test_compare_is_at_equal_size(folder, capsys):
    (folder / "few.jsonl").write_text("\n".join(json.dumps(item(n, f"What is {n}?", f"It is {n}.")) for n in range(6)))
    (folder / "more.jsonl").write_text(
        "\n".join(
            json.dumps(
                item(n, "What is it?", "A dog.") | {"conversations": 2 * item(n, "?", "A dog.")["conversations"]}
            )
            for n in range(30)
        )
    )
    files = [str(folder / name) for name in ("few.jsonl", "more.jsonl")]
    assert main(["compare", *files, "--images", str(folder), "--out", str(folder / "out")]) == 0
    report = json.loads((folder / "out" / "compare.json").read_text())
    assert report["size"] == 6
    told = {name: {one["key"]: one for one in rows} for name, rows in report["data sets"].items()}
    assert list(told) == ["few", "more"] and [one["O/G"]["measured"] for one in told.values()] == [6, 12]
    assert [one["R"]["measured"] for one in told.values()] == [6, 12] and "2 draws of 6" in told["more"]["R"][
        "computation"
    ]
    assert told["more"]["R"]["value"] == 0 < told["few"]["R"]["value"]
    text = (folder / "out" / "compare.txt").read_text()
    assert text in capsys.readouterr().out and "30.7" in text and "as printed" in text
    assert Image.open(folder / "out" / "compare.png").width > 600
    assert main(["compare", files[0], "--out", str(folder / "out")]) == 2
    assert main(["compare", files[0], files[0], "--out", str(folder / "out")]) == 2
    assert "same file twice" in capsys.readouterr().err


def test_names_tell_files_apart(tmp_path):
    assert quality.labels([tmp_path / "a" / "x.json", tmp_path / "b" / "x.jsonl"]) == ["a/x", "b/x"]


def test_every_command_explains_itself(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    for name in ("quality", "filter", "compare"):
        assert f"\n{name} " in text
    parser = Parser()
    filtering.add_flags(parser)
    assert "--per-task" in parser.format_help()
