"""Ablations: what they vary, that finished runs are kept, what the tables and pictures say."""

import json
import re
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from nanovlm.training.checkpoint import replace_tensors
from ablations import ablate, ablation_exam, ablation_recipe, ablation_report, ablation_runs
from ablations.ablation_recipe import RECIPE
from ablations.variants import ABLATIONS, Ablation, Variant
from nanovlm.recipes import from_file, lynx_mini
from nanovlm.recipes.nano_tests import Answer
from nanovlm.training.start import add_lora, build_models, check_stages, choose_stages
from nanovlm.vlm import Batch
from parity import close

VARIANTS = {(name, one.name): one for name, ablation in ABLATIONS.items() for one in ablation.variants}


def test_every_variant_is_a_command_that_train_accepts_and_measures_exist():
    parser = ablation_runs.command_line().make_parser()
    for variant in dict.fromkeys(VARIANTS.values()):
        wishes = parser.parse([RECIPE.name, "--size", variant.size, "--stages", "align,instruct", *variant.flags])
        stages = choose_stages(RECIPE, wishes)
        with torch.device("meta"):
            model, contrastive = build_models(RECIPE, wishes.size, 300, 0)
            add_lora(model, stages, wishes.lora)
        check_stages(RECIPE, stages, model, contrastive)
        assert set(stages[-1].mixture) <= RECIPE.sources.keys() and variant.start in ablation_runs.STARTS
    for ablation in ABLATIONS.values():
        folders = {ablation_runs.named(one.start, ablation_runs.flags_of(one)) for one in ablation.variants}
        assert len(folders) == len(ablation.variants)
        assert set(ablation.columns) <= ablation_exam.MEASURES.keys() | {ablation_runs.BEFORE}
        assert len({one.name for one in ablation.variants}) == len(ablation.variants)


# the engine, with a training that only pretends

SMALL = Ablation("q?", "s", "f", (Variant("a"), Variant("b", "plain"), Variant("c", start="raw")))
OTHER = Ablation("r?", "s", "f", (Variant("z", "plain"), Variant("y", flags=("--lora", "2"))))


class Pretend:
    """Stands for `train`: writes what a run leaves behind; breaks at call number `stop`."""

    def __init__(self, stop=None):
        self.calls, self.stop = [], stop

    def __call__(self, arguments):
        self.calls.append(arguments)
        value = lambda flag: arguments[arguments.index(flag) + 1]
        out = Path(value("--out"))
        out.mkdir(parents=True, exist_ok=True)
        model, _ = build_models(RECIPE, value("--size"), 300, 1)
        (out / "config.json").write_text(json.dumps({"size": value("--size"), "image_size": 48}))
        if len(self.calls) == self.stop:
            raise KeyboardInterrupt
        (out / "tokenizer.json").write_text("{}")
        replace_tensors(out / "model.safetensors", model.state_dict())
        share = 0.25 + 0.5 * ("starts/raw-" in str(out))
        (out / "results.json").write_text(json.dumps(dict.fromkeys(ablation_exam.MEASURES, share) | {"parameters": 5, "cpu_seconds": 900}))

    def runs(self):
        return [Path(one[one.index("--out") + 1]) for one in self.calls]


def run(tmp_path, ablations, seeds, train):
    return dict(ablation_runs.run(ablations, seeds, tmp_path / "out", tmp_path / "tables", train=train))


def test_starts_are_trained_once_per_seed_and_equal_variants_once(tmp_path):
    train = Pretend()
    done = run(tmp_path, {"small": SMALL, "other": OTHER}, [0, 1], train)
    folders = [folder.relative_to(tmp_path / "out").parts for folder in train.runs()]
    starts = [(parts[1].split("-")[0], parts[2]) for parts in folders if parts[0] == "starts"]
    assert sorted(starts) == [(name, seed) for name in ("instructed", "raw", "tower") for seed in "01"]
    assert len(folders) == len(set(folders)) == 6 + 2 * 4  # z is b
    for call, folder in zip(train.calls, train.runs()):
        assert call[0] == "notebooks/ablations/ablation_recipe.py" and call[call.index("--seed") + 1] == folder.name
        if "runs" in folder.parts:
            init = Path(call[call.index("--init") + 1])
            assert json.loads((init / "config.json").read_text())["size"] == call[call.index("--size") + 1]
    (head, names, *rows) = done["small"].read_text().splitlines()
    assert names == "variant,seed,pictures,text before,text,text beside a picture,parameters,cpu_seconds"
    assert [row.split(",")[:6] for row in rows][-2:] == [["c", "0", "0.25", "0.75", "0.25", "0.25"], ["c", "1", "0.25", "0.75", "0.25", "0.25"]]
    assert float(rows[0].split(",")[-1]) < 900  # the run's own, not those of the whole process
    assert head.startswith("# python notebooks/ablations/ablate.py small --seeds 0,1; commit ") and str(date.today()) in head


def test_a_stopped_ablation_trains_only_what_is_missing(tmp_path):
    first = Pretend(stop=5)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, {"small": SMALL}, [0, 1], first)
    (table,) = (tmp_path / "tables").iterdir()
    assert len(table.read_text().splitlines()) == 3  # what had finished is in the table already
    second = Pretend()
    done = run(tmp_path, {"small": SMALL}, [0, 1], second)
    assert set(second.runs()) & set(first.runs()) == {first.runs()[-1]} and "--resume" in second.calls[0]
    assert not any("--resume" in call for call in second.calls[1:])
    assert len(done["small"].read_text().splitlines()) == 8
    for path in (tmp_path / "out" / "runs").glob("*/0/results.json"):  # of an earlier day
        path.write_text(json.dumps(json.loads(path.read_text()) | {"trained": "commit early; long ago"}))
    third = Pretend()
    run(tmp_path, {"small": SMALL}, [0, 1], third)
    assert third.calls == []
    head = done["small"].read_text().splitlines()[0]
    assert head.startswith("# python notebooks/ablations/ablate.py small --seeds 0,1; commit early; long ago; commit ") and str(date.today()) in head


def test_a_run_of_other_settings_is_another(tmp_path, monkeypatch):
    train = Pretend()
    run(tmp_path, {"small": SMALL}, [0], train)
    number = len(train.calls)
    dict(ablation_runs.run({"small": SMALL}, [0], tmp_path / "out", tmp_path / "tables", smoke=True, train=train))
    assert len(train.calls) == 2 * number  # what a smoke run leaves is no start of a real one
    longer = replace(RECIPE, stages=lambda size, smoke: tuple(replace(one, steps=one.steps + 1) for one in RECIPE.stages(size, smoke)))
    monkeypatch.setattr(ablation_runs, "RECIPE", longer)
    run(tmp_path, {"small": SMALL}, [0], train)
    assert len(train.calls) == 3 * number
    assert len({str(folder) for folder in train.runs()}) == len(train.calls)


def test_a_graft_keeps_tower_and_language_and_changes_no_word(tmp_path):
    Pretend()(["--size", "plain", "--out", str(tmp_path / "start")])
    ablation_runs.graft(tmp_path / "start", "queries_4", 3, tmp_path / "graft")
    start, graft = (load_file(tmp_path / name / "model.safetensors") for name in ("start", "graft"))
    models = []
    for size, weights in (("plain", start), ("queries_4", graft)):
        model, _ = build_models(RECIPE, size, 300, 9)
        model.load_state_dict(weights)
        models.append(model)
    ids = torch.tensor([[4, 7, 9, 11]])
    none = torch.zeros(0).long()
    batch = Batch(ids, ids, torch.zeros_like(ids), torch.arange(4)[None], None, none, none, none)
    close(*(model(batch) for model in models))
    pixels = torch.randn(1, 3, 48, 48)
    close(*(model.vision(pixels) for model in models))
    adaptive = {name for name in graft if ".vision." in name}
    assert adaptive and all(torch.equal(graft[name], graft[name.replace(".vision.", ".text.")]) for name in adaptive)
    fresh, _ = build_models(RECIPE, "queries_4", 300, 3)
    assert torch.equal(graft["bridge.queries"], fresh.bridge.queries)  # of the seed


# what is asked


def test_the_exam_puts_the_same_questions_in_other_ways():
    asked, texts = ablation_exam.picture_questions(3), ablation_exam.text_questions(5)
    other = [ablation_exam.in_wordings(record, ("a {}", "b {}"), n) for n, record in enumerate(asked)]
    for n, (plain, new) in enumerate(zip(asked, other)):
        for place, (turns, changed) in enumerate(zip(plain.conversations, new.conversations)):
            assert changed[-1] == turns[-1] and changed[0].parts[0] == 0
            assert changed[0].text == f"{'ab'[(n + place) % 2]} {turns[0].text}"
    shown = ablation_exam.beside(texts, asked)
    assert [one.visuals for one in shown] == [asked[n].visuals for n in (0, 1, 2, 0, 1)]
    for plain, new in zip(texts, shown):
        assert new.conversations[0][0].parts == (0, *plain.conversations[0][0].parts) and new.kinds == plain.kinds
    assert set(ablation_exam.UNSEEN_WORDINGS).isdisjoint(ablation_recipe.WORDINGS)
    clean = ablation_recipe.captions(3)
    noisy = ablation_recipe.Changed(clean, ablation_recipe.mismatched)
    for n in range(4):
        record, told = clean.record(n), noisy.record(n)
        assert told.visuals[0].key == record.visuals[0].key
        assert told.conversations == clean.record(n + n % 2).conversations
    assert (noisy.name, len(noisy)) == (clean.name, len(clean))
    assert ablation_recipe.reworded(clean, 1).conversations[0][0].text.startswith("look at the image. ")


def test_one_wording_is_the_data_sets_own():
    recipe = from_file(Path(ablate.__file__).with_name("lynx_mini_one_wording.py"))
    asked, reminded = recipe.sources["easy_vqa"](0), recipe.sources["rehearsal"](0)
    own = {question for questions in asked.asked.values() for question, _ in questions}
    assert {talk[-2].text for n in range(20) for talk in asked.record(n).conversations} <= own
    assert reminded.record(0) == lynx_mini.SOURCES["rehearsal"](0).record(0) and recipe.sources.keys() == lynx_mini.SOURCES.keys()


def test_descriptions_become_history(monkeypatch):
    asked = ablation_exam.picture_questions(2)
    told = [Answer(record.id, 0, "caption", "", "", f"picture {n}") for n, record in enumerate(asked)]
    monkeypatch.setattr(ablation_exam, "ask", lambda model, records, max_new_tokens: told)
    for n, record in enumerate(ablation_exam.described(None, asked)):
        for turns, plain in zip(record.conversations, asked[n].conversations):
            assert [turn.role for turn in turns] == ["user", "assistant", "user", "assistant"]
            assert turns[0].parts[0] == 0 and turns[1].text == f"picture {n}"
            assert turns[2].parts == plain[0].parts[1:] and turns[3] == plain[1]


# tables and pictures


def table_file(folder, rows, head="# python x; commit y; z"):
    path = folder / "mam_and_data.csv"
    names = "variant,seed,pictures,text before,text,text beside a picture,parameters,cpu_seconds"
    path.write_text("\n".join([head, names, *rows]) + "\n")
    return path


def test_a_table_has_means_and_ranges_and_a_picture(tmp_path, capsys):
    path = table_file(tmp_path, ["a,0,0.5,0.7,0.6,0.1,1,1", "a,2,0.6,0.7,0.8,0.3,1,1", '"b, c",0,1.0,0.7,0.0,0.2,1,1'])
    table = ablation_report.read(path, ABLATIONS["mam_and_data"])
    assert ablation_report.markdown(table) == [
        "| | pictures | text before | text | text beside a picture |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| a | 55.0% (50.0 - 60.0) | 70.0% (70.0 - 70.0) | 70.0% (60.0 - 80.0) | 20.0% (10.0 - 30.0) |",
        "| b, c | 100.0% (100.0 - 100.0) | 70.0% (70.0 - 70.0) | 0.0% (0.0 - 0.0) | 20.0% (20.0 - 20.0) |",
    ]
    assert ablate.main(["mam_and_data", "--draw", "--tables", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "seeds 0, 2; python x; commit y; z" in told and ABLATIONS["mam_and_data"].source in told
    with Image.open(path.with_suffix(".png")) as drawn:
        assert drawn.size[0] > 800


@pytest.mark.parametrize(("rows", "head", "words"), [
    (["a,0,0.5"], "# x", "line 3: no row with pictures"), ([], "# x", "holds no run"),
    (["a,0,0.5,0.7,0.6,0.1,1,1"], "no head", "line 1"),
])  # fmt: skip
def test_a_broken_table_is_named(tmp_path, rows, head, words):
    path = table_file(tmp_path, rows, head)
    with pytest.raises(ValueError, match=words):
        ablation_report.read(path, ABLATIONS["mam_and_data"])


@pytest.mark.parametrize("path", sorted(ablate.TABLES.glob("*.csv")), ids=lambda path: path.stem)
def test_committed_tables_say_where_they_come_from_and_have_three_seeds(path, tmp_path):
    table = ablation_report.read(path, ABLATIONS[path.stem])
    command, *stamps = re.split("; (?=commit )", table.note)
    assert re.fullmatch(rf"python (-m nanovlm.evaluation ablate|notebooks/ablations/ablate.py) {path.stem} --seeds \d+(,\d+)*", command)
    assert stamps and all(re.fullmatch(r"commit [0-9a-f]{10}; .+, \d+ cores; torch [\d.]+\S*; 20\d\d-\d\d-\d\d", one) for one in stamps)
    assert [one.name for one in ABLATIONS[path.stem].variants] == ablation_report.variants(table)
    for row in table.rows:
        assert all(0 <= row[column] <= 1 for column in table.columns)
    assert len(table.seeds) >= 3 and len(table.rows) == len(table.seeds) * len(ABLATIONS[path.stem].variants)
    ablation_report.draw(table, ABLATIONS[path.stem], tmp_path / "drawn.png")
    with Image.open(tmp_path / "drawn.png") as new, Image.open(path.with_suffix(".png")) as committed:
        assert new.size == committed.size  # the picture was drawn from such a table


def test_bad_flags(capsys, tmp_path):
    for wrong, words in ((["querys"], "Did you mean 'queries'"), (["queries", "--seeds", "a"], "whole numbers")):
        with pytest.raises(SystemExit):
            ablate.main(wrong)
        assert words in capsys.readouterr().err
    assert ablate.main(["queries", "--draw", "--tables", str(tmp_path)]) == 2 and "queries.csv" in capsys.readouterr().err


@pytest.mark.slow
def test_an_ablation_from_beginning_to_end(tmp_path, capsys):
    """Real runs of a few steps: two starts, two variants, table and picture; then nothing is left to train."""
    arguments = ["language_start", "--seeds", "0", "--smoke", "--out", str(tmp_path / "out"), "--tables", str(tmp_path / "tables")]
    assert ablate.main(arguments) == 0
    told = capsys.readouterr().out
    assert "| instructed |" in told and "| raw |" in told and (tmp_path / "tables" / "language_start.png").exists()
    folders = sorted((tmp_path / "out" / "runs").glob("*/0"))
    configs = [json.loads((folder / "config.json").read_text()) for folder in folders]
    assert [config["stage_names"] for config in configs] == [["align", "instruct"]] * 2 and all(config["smoke"] for config in configs)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("results.json")}
    assert len(before) == 5  # tower, instructed, raw and the two variants
    assert ablate.main(arguments) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("results.json")}
