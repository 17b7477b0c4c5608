"""filter, compare and duplicates: nothing is lost, every reason is right, a kill costs nothing."""

import json
import random
from collections import Counter

import pytest
from PIL import Image
from vlit_data import Says, item, lines, notes, vlit, write_lines

from nanovlm.evaluation.items import short_names
from nanovlm.vlit import filtering
from nanovlm.vlit.filtering import duplicates, signature
from nanovlm.vlit.samples import sample


def about(id, question, answer, image="a.png", **more):
    return item(id, f"<image>\n{question}", answer, image=image, **more)


LONG = "A dog and a cat sit on the green grass beside the old wooden fence of a quiet farm and look at the sky together"
RECORDS = [
    about(0, "How many dogs are there?", "Two dogs."),  # kept
    about("1", "How many dogs are there?", "Five dogs."),  # wrong
    about(2, "How many dogs are there?", "two  DOGS!"),  # repeats the first
    about(3, "Describe the image.", LONG),  # kept
    about(4, "Describe the image.", LONG + " now"),  # nearly the same
    about(5, "Describe the image.", LONG, image="b.png"),  # another picture
    about(6, "What is there?", "The description does not mention it."),  # rule 8
    about(7, "What is there?", "A dog.", image="none.png"),
    about(8, "What is there?", "A dog.", image="broken.png"),
    item(9, "Hello.", "", roles=("gpt", "human")),
    about(10, "What is there? <image>", "A dog."),  # two placeholders, one picture
    about(11, "Is there a zebra?", "No.", kind="extra", id_of_nothing=[1, {"a": None}]),  # kept, with all it holds
]
BROKEN = '{"id": 12, "conversations": [{"from": "human"'


@pytest.fixture
def folder(tmp_path):
    for name in "ab":
        Image.new("RGB", (8, 8), (120, 80, 20)).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nothing")
    write_lines(tmp_path / "data.jsonl", [*RECORDS, BROKEN])
    write_lines(tmp_path / "notes.jsonl", notes(*"ab"))
    return tmp_path


def filtered(folder, *flags, records=None, out="out", code=0):
    """(kept records, dropped lines) of the command."""
    path = folder / "data.jsonl" if records is None else write_lines(folder / "many.jsonl", records)
    files = ("--annotations", folder / "notes.jsonl", "--out", folder / out)
    vlit("filter", path, *files, "--without-report", *flags, code=code)
    return [lines(folder / out / f"{name}.jsonl") for name in ("kept", "dropped")]


def test_every_record_is_kept_or_dropped_with_its_reasons(folder, capsys):
    kept, dropped = filtered(folder)
    assert kept == [RECORDS[place] for place in (0, 3, 5, 11)]  # unchanged, in their order
    assert [one.get("record") for one in dropped] == [RECORDS[place] for place in (1, 2, 4, 6, 7, 8, 9, 10)] + [None]
    reasons = {int(one["where"].rpartition("line ")[2]): one["reasons"] for one in dropped}
    assert reasons[2] == ["wrong: round 1, by rule"]
    assert reasons[3] == ["duplicate: exact duplicate of record 1"]
    assert reasons[5] == ["duplicate: near duplicate of record 4"]
    for line, words in ((7, "defect: source"), (8, "none.png"), (9, "broken.png"), (10, "says nothing"), (10, "turns are by"),
                        (11, "defect: placeholders: 2 <image>"), (13, "unreadable: ")):  # fmt: skip
        assert any(words in why for why in reasons[line]), line
    assert dropped[-1]["text"] == BROKEN
    report = json.loads((folder / "out" / "report.json").read_text())
    assert (report["records"], report["kept"]) == (13, 4)
    assert report["dropped"] == {"unreadable": 1, "defect": 5, "duplicate": 2, "wrong": 1}
    assert "kept 4 of 13" in capsys.readouterr().out


def test_pictures_that_are_elsewhere_are_named(folder, tmp_path):
    (folder / "photos").mkdir()
    (folder / "a.png").rename(folder / "photos" / "a.png")
    with pytest.raises(SystemExit) as left:
        filtered(folder, records=RECORDS[:4])
    assert f"4 pictures are not in {folder}" in left.value.code and "--images" in left.value.code
    assert "a.png" in left.value.code and not (folder / "out" / "kept.jsonl").exists()
    kept, _ = filtered(folder, "--images", folder / "photos", records=RECORDS[:4])
    assert len(kept) == 2


def test_a_filter_that_keeps_nothing_ends_with_status_1(folder, capsys):
    with pytest.raises(SystemExit) as left:
        filtered(folder, records=[RECORDS[6], RECORDS[10]])
    assert "kept 0 of 2" in left.value.code and "2  defect" in left.value.code and "'The description does'" in left.value.code
    assert len(lines(folder / "out" / "dropped.jsonl")) == 2


def test_what_is_dropped_anyway_makes_no_duplicate(folder):
    (folder / "broken.png").unlink()
    images = ("broken.png", "broken.png", "a.png", "a.png")
    records = [about(n, "What is it?", LONG, image=name) for n, name in enumerate(images)]
    kept, dropped = filtered(folder, records=records)
    assert [one["id"] for one in kept] == [2] and [len(one["reasons"]) for one in dropped] == [1, 1, 1]
    assert dropped[2]["reasons"] == ["duplicate: exact duplicate of record 3"]


def test_caps_draw_evenly_and_spare_what_is_complex(folder):
    asked = "How many dogs are there?", "Why might the dogs wait here, and what would happen if it rained?"
    records = [about(n, asked[n % 2], f"Two. {n}") for n in range(40)]
    records += [about(n, f"Is there a zebra number {n}?", "No.") for n in range(40, 50)]

    def capped(out, *flags):
        """({kind: kept}, first reasons)."""
        kept, dropped = filtered(folder, "--exact-only", *flags, records=records, out=out)
        counts = Counter(one["id"] % 2 if one["id"] < 40 else "zebra" for one in kept)
        return counts, {one["reasons"][0].split(":")[0] for one in dropped}, [one["id"] for one in kept]

    first, again, other = (capped(f"s{place}", "--per-task", 5, "--seed", seed) for place, seed in enumerate((0, 0, 1)))
    assert first[:2] == ({0: 5, 1: 5, "zebra": 5}, {"task cap"}) and first == again and first[2] != other[2]
    assert capped("complex", "--per-task", 5, "--keep-complex", 5)[0][1] == 20
    assert capped("said", "--per-response", 3)[:2] == ({0: 20, 1: 20, "zebra": 3}, {"response cap"})


def test_the_least_matching_go(folder, monkeypatch):
    class Encoder:
        name = "MD (own encoder)"

        def match(self, pictures, responses):
            return [float(text.split()[-1]) for text in responses]

    records = [about(n, "What is there?", f"A dog and its number {n}") for n in range(20)]
    monkeypatch.setattr("nanovlm.vlit.quality.load_encoder", lambda folder, recipe: Encoder())
    _, dropped = filtered(folder, "--encoder", "x", "--matching-percentile", "25", "--exact-only", records=records)
    assert [one["record"]["id"] for one in dropped] == [0, 1, 2, 3, 4]
    assert "matching degree 0.00 below 4.75, percentile 25" in dropped[0]["reasons"][0]


def test_a_judges_majority_decides(folder, monkeypatch):
    judge = Says(lambda chat, n: ["No", "No", "Yes"] if "odd" in chat.messages[-1][1] else "Yes")
    records = [about(n, "What is there?", f"An {('even', 'odd')[n % 2]} thing {n}") for n in range(6)]
    monkeypatch.setattr("nanovlm.vlit.quality.open_generator", lambda args: judge)
    kept, dropped = filtered(folder, "--generator", "local", "--model", "x", "-n", "3", records=records)
    assert [one["id"] for one in kept] == [0, 2, 4]
    assert all(one["reasons"] == ["wrong: round 1, by the judge's majority"] for one in dropped)


def test_scores_are_kept_for_the_same_settings_alone(folder, monkeypatch, capsys):
    first = filtered(folder)
    scores = folder / "out" / "scores.jsonl"
    whole = scores.read_bytes()
    scores.write_bytes(whole[: whole.rindex(b"\n", 0, len(whole) // 2) + 9])  # killed in the middle of a line
    seen, real = [], filtering.score_batch
    monkeypatch.setattr(filtering, "score_batch", lambda batch, *rest: seen.extend(batch) or real(batch, *rest))
    assert filtered(folder) == first
    assert scores.read_bytes() == whole and 0 < len(seen) < 13
    vlit("filter", folder / "data.jsonl", "--out", folder / "out", "--without-report", code=2)
    assert "annotations" in capsys.readouterr().err


def test_a_file_that_changes_meanwhile_replaces_nothing(folder, monkeypatch, capsys):
    first, real = filtered(folder), filtering.decide
    (folder / "out" / "scores.jsonl").unlink()
    write_lines(folder / "data.jsonl", [*RECORDS, BROKEN, about(99, "What is there?", "A cat.")])
    monkeypatch.setattr(filtering, "decide", lambda scores, args: real(scores[:-1], args))
    assert filtered(folder, code=2) == first
    assert "has changed" in capsys.readouterr().err


def test_before_and_after_stand_in_the_report(folder):
    out = folder / "out"
    vlit("filter", folder / "data.jsonl", "--annotations", folder / "notes.jsonl", "--out", out)
    report = json.loads((out / "report.json").read_text())
    assert report["before"]["C"] < report["after"]["C"] == 100
    assert (out / "after" / "report.png").exists()


@pytest.mark.parametrize("share", (0.2, 0.6, 0.9))
def test_minhash_estimates_jaccard(share):
    rng, errors = random.Random(1), []
    for _ in range(30):
        words = [f"w{rng.random()}" for _ in range(120)]
        other = words[: int(120 * share)] + [f"v{rng.random()}" for _ in range(120 - int(120 * share))]
        one, two = ({" ".join(text[i : i + 3]) for i in range(118)} for text in (words, other))
        errors.append((signature(words) == signature(other)).mean() - len(one & two) / len(one | two))
    assert abs(sum(errors) / 30) < 0.05


def test_near_duplicates_are_found_among_many():
    rng = random.Random(2)
    texts = [[f"w{rng.randrange(500)}" for _ in range(60)] for _ in range(60)]
    texts += [*([*text[:-1], "end"] for text in texts[:20]), texts[30], texts[0][::-1]]
    samples = [sample(item(1, " ".join(text), roles=("gpt",))) for text in texts]
    assert duplicates(samples, 0.8) == {60 + n: (n, "near duplicate") for n in range(20)} | {80: (30, "exact duplicate")}


def test_compare_is_at_equal_size(folder, capsys):
    few = write_lines(folder / "few.jsonl", [about(n, f"What is {n}?", f"It is {n}.") for n in range(6)])
    twice = ("<image>\nWhat is it?", "A dog.", "<image>\n?", "A dog.")
    more = write_lines(folder / "more.jsonl", [item(n, *twice, image="a.png") for n in range(30)])
    out = folder / "out"
    vlit("compare", few, more, "--images", folder, "--out", out)
    report = json.loads((out / "compare.json").read_text())
    told = {name: {one["key"]: one for one in rows} for name, rows in report["data sets"].items()}
    assert report["size"] == 6 and list(told) == ["few", "more"]
    assert [one[key]["measured"] for key in ("O/G", "R") for one in told.values()] == [6, 12, 6, 12]
    assert "2 draws of 6" in told["more"]["R"]["computation"]
    assert told["more"]["R"]["value"] == 0 < told["few"]["R"]["value"]
    text = (out / "compare.txt").read_text()
    assert text in capsys.readouterr().out and "30.7" in text and "as printed" in text
    assert Image.open(out / "compare.png").width > 600
    vlit("compare", few, few, "--out", out, code=2)
    assert "the same twice" in capsys.readouterr().err
    assert short_names([folder / "a" / "x", folder / "b" / "x"]) == ["a/x", "b/x"]
