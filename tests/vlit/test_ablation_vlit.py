"""The study of data quality: its table, its sets with controlled defects, and one small run of everything."""

import json
from collections import Counter

import pytest
import torch
from ablations import ablation_vlit as study, review
from PIL import Image

from nanovlm.vlit import annotations
from nanovlm.vlit.correctness import facts_of, known, verify
from nanovlm.vlit.samples import read


def samples(folder):
    return [sample for _, sample in read(folder / "samples.jsonl")]


def wrong(folder):
    """Share of samples that their annotations contradict; every one is decided."""
    facts = facts_of(annotations.read([folder / "annotations.jsonl"]).pictures.values())
    verdicts = [verify(*sample.pairs[0], known(sample, facts)) for sample in samples(folder)]
    assert None not in verdicts
    return verdicts.count(False) / len(verdicts)


def test_sets_have_the_defects_they_are_named_after(tmp_path):
    made = {}
    sets = study.Defects("clean"), study.Defects("wrong", wrong=0.5), study.Defects("x", crowded=0.8, repeated=5)
    for place, defects in enumerate(sets):
        folder = made[defects.name] = tmp_path / str(place)
        folder.mkdir()
        study.write_set(folder, defects, 200, seed=3)
        assert len(samples(folder)) == 200 and Image.open(folder / "0.png").size == (study.IMAGE_SIZE,) * 2
    assert wrong(made["clean"]) == 0 and wrong(made["x"]) == 0
    assert 0.3 < wrong(made["wrong"]) <= 0.6  # places in the same half are taken for right
    kinds = {name: Counter(sample.task for sample in samples(folder)) for name, folder in made.items()}
    assert min(kinds["clean"].values()) > 30 and kinds["x"]["color"] > 120
    assert len({sample.pairs[0] + sample.images for sample in samples(made["x"])}) <= 40


def test_filter_mends_a_pool(tmp_path):
    study.write_set(tmp_path, study.Defects("all", wrong=0.4, crowded=0.6, repeated=2), 320, seed=0)
    study.filter_set(tmp_path, 40)
    kept = samples(tmp_path)
    assert Counter(sample.task for sample in kept) == dict.fromkeys(study.KINDS, 10)
    assert wrong(tmp_path) == 0 and len({sample.images for sample in kept}) == 40
    assert len(json.loads((tmp_path / "filtered" / "report.json").read_text())["dropped"]) == 3


@pytest.mark.slow
def test_one_small_run_of_everything(tmp_path):
    settings = study.Settings(tower_steps=2, caption_steps=2, samples=40, pool=320, steps=3, batch=4, exam=20)
    sets = (study.SETS[0], study.SETS[2], study.Defects("all", wrong=0.4, crowded=0.6, repeated=2, filtered=True))
    before = {name: tensor.clone() for name, tensor in study.start(settings)[0].state_dict().items()}
    results = list(study.run((0, 1), settings, sets))
    assert [(one.name, one.seed) for one in results] == [(each.name, seed) for seed in (0, 1) for each in sets]
    assert all(one.samples == 40 and (one.C == 100) == (one.name != "50% wrong") for one in results)
    after = study.start(settings)[0].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)  # every run starts from the same model
    study.ablation_table.write(tmp_path / "table.csv", "how it came about", [*vars(results[0])], map(vars, results))
    note, again = study.read(tmp_path / "table.csv")
    assert note == "how it came about" and [one.name for one in again] == [one.name for one in results]
    assert again[0].accuracy == pytest.approx(results[0].accuracy, abs=1e-4)
    study.plot(results, tmp_path / "table.png", note)
    assert Image.open(tmp_path / "table.png").width > 1000


def test_the_table_is_complete_and_bears_out_what_is_concluded():
    note, results = study.read()
    assert note.startswith("python notebooks/ablations/ablation_vlit.py, 20") and "CPU-seconds, seeds 0 to 2" in note
    assert [(one.seed, one.name) for one in results] == [(seed, each.name) for seed in (0, 1, 2) for each in study.SETS]
    shares = {each.name: [one.accuracy for one in results if one.name == each.name] for each in study.SETS}
    filtered = min(shares["all defects, filtered"])
    assert filtered > max(shares["all defects"]) and filtered > max(shares["50% wrong"])
    assert min(shares["clean"]) > max(shares["50% wrong"] + shares["repeated"] + shares["all defects"])


def test_the_review_is_reproduced_but_for_what_it_misprints():
    """The printed numbers are in the review's Tables 4 and 15; three of the four rows of ICC follow from Table 3."""
    for name, values in review.agreement().items():
        close = [abs(mine - printed) < 5e-5 for mine, printed in zip(values, review.ICC_PRINTED[name])]
        assert close == [name != "Ours"] * 2
    assert [round(value, 4) for value in review.agreement()["Ours"]] == [0.284, 0.5434]
    told = review.differences()
    assert len(told) == 4 and [sum(words in line for line in told) for words in ("'Ours'", "with VR")] == [2, 2]
    for values in review.correlations().values():
        assert [p for _, p in values] == pytest.approx([1 - abs(r) for r, _ in values], abs=1e-6)  # four data sets
    assert review.correlations()["B"][0][0] == pytest.approx(0.377, abs=0.02)  # smaller is better, says the text
    text = "\n".join(review.lines())
    assert all(words in text for words in ("0.2840", "0.3028", "0.5434", "0.5658", "not as printed", "0.116"))
