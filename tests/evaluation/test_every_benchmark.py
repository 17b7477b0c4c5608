"""Every task from its files, as they are published, to report and submission: a tiny model answers some questions."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from nanovlm.evaluation import protocols, report, runner
from nanovlm.evaluation.__main__ import parse
from nanovlm.evaluation.tasks import TASKS

SETS = json.loads((Path(__file__).parents[1] / "golden/evaluation/benchmarks.json").read_text())  # {file: content} each
TWO = [{"answer": "red", "answer_id": n} for n in range(2)]


def files_of(task):
    """{file: content} of a task, under its own name or its reader's."""
    reader = TASKS[task].read.__name__
    return next((SETS[name] for name in (task, reader, reader.removesuffix("_video")) if name in SETS), {})


def write(folder, files):
    """Write files from {name: text, JSON value, or None for a red picture (.gif: a film)}."""
    for path, content in ((folder / name, content) for name, content in files.items()):
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            frames = [Image.new("RGB", (9, 8), color) for color in ("red", "blue")]
            frames[0].save(path, **{"save_all": True, "append_images": frames[1:]} if path.suffix == ".gif" else {})
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))


SUBMITTED = {  # task -> (file, function prediction -> its record there)
    "vqav2": ("submission.json", lambda one: {"question_id": int(one["id"]), "answer": one["prediction"]}),
    "textvqa_ocr": ("submission.json", lambda one: {"question_id": int(one["id"]), "answer": one["prediction"]}),
    "vizwiz_own": ("submission.json", lambda one: {"image": one["id"], "answer": one["prediction"]}),
    "gqa": ("submission.json", lambda one: {"questionId": one["id"], "prediction": one["prediction"]}),
    "coco_caption": ("submission.json", lambda one: {"image_id": int(one["id"]), "caption": one["prediction"]}),
    "pope": ("submission_{kind}.jsonl", lambda one: {"question": "Is there a dog?", "answer": one["prediction"]}),
    "seed_bench": ("submission.jsonl", lambda one: {"question_id": one["id"], "prediction": "ABCD"[one["said"]]}),
}
FIRST = {  # task -> what stands in its first prediction
    "vqav2": {"id": "1", "kind": "other", "answers": TWO}, "textvqa_own": {"id": "5", "answers": ["red", "red"]},
    "vizwiz_own": {"id": "a.jpg", "kind": "other", "answers": TWO}, "gqa": {"id": "7", "kind": "query"},
    "video_qa": {"id": "1", "answers": ["red"]}, "coco_caption": {"answers": ["a red square", "red all over"]},
    "flickr30k": {"answers": ["a red square"]}, "pope": {"kind": "adversarial", "group": "a.jpg", "answers": ["no"]},
    "mme": {"id": "color/a/0", "kind": "color", "group": "color/a", "question": "Is it red?", "answers": ["yes"]},
    "seed_bench": {"id": "1_0", "kind": "Scene", "answers": [1], "options": ["red", "blue", "yes", "no"]},
    "mmbench": {"id": "4#0", "kind": "color", "group": "4", "answers": [1], "options": ["red", "blue"]},
    "science_qa": {"id": "5", "kind": "s", "group": "grade2", "answers": [1]}, "q_bench": {"kind": "0", "answers": [0]},
    "mmlu": {"id": "anatomy/0", "kind": "anatomy", "answers": [1]}, "arc": {"id": "a", "answers": [1]},
    "open_vqa": {"id": "1", "kind": "Color", "answers": ["red"]}, "open_vqa_video": {"id": "1", "answers": ["red"]},
    "mm_vet": {"id": "v1_0", "kind": "ocr+rec", "answers": ["red<OR>crimson"]}, "owleval": {"kind": "k", "answers": []},
    "visit_bench": {"id": "a.png, a.png: which?", "kind": "k", "answers": ["red"]},
}  # fmt: skip


@pytest.fixture
def run(loaded, tmp_path, monkeypatch):
    """Run a task on its files: (predictions, report, a function that reads another file of the output)."""
    monkeypatch.setattr(report, "bars", lambda rows, path, title: None)  # drawn in test_evaluation_cli
    monkeypatch.setattr(report, "worst", lambda *args: False)

    def run(task, *flags, limit=3, data=None):
        out = tmp_path / f"{task} out {len(flags)}"
        if data is None:
            data = tmp_path / task
            write(data, files_of(task))
        command = f"{task} --model tiny --data {data} --limit {limit} --batch-size 4 --out".split() + [str(out)]
        judge = (lambda prompts: ["Yes, 0.5"] * len(prompts)) if TASKS[task].protocol is protocols.judged else None
        runner.run(parse([*command, *flags]), loaded, judge)
        predictions = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()[1:]]
        return predictions, json.loads((out / "report.json").read_text()), lambda name: (out / name).read_text()

    return run


def num_questions(task):
    return 3 if TASKS[task].read.__name__ in ("pope", "mmlu") else 2


def test_every_task_has_files_here():
    assert {task for task in TASKS if not files_of(task)} == {"easy_vqa", "scenes"}  # which bring their own


@pytest.mark.parametrize("task", TASKS)
def test_from_files_to_report(task, run):
    number = num_questions(task)
    predictions, told, text = run(task, limit=2 if task in ("easy_vqa", "scenes") else 3)
    assert (len(predictions), told["answered"], told["missing"]) == (number, number, {})
    assert len(told["problems"]) == (task in ("q_bench", "visit_bench"))  # rows of one question
    assert told["scores"] and all(isinstance(one["prediction"], str) for one in predictions)
    assert predictions[0] == predictions[0] | FIRST.get(task, {})
    if TASKS[task].protocol is protocols.judged and any(one["answers"] for one in predictions):
        assert told["scores"]["all"] == (0.5 if task == "mm_vet" else 1.0)
    name, record = SUBMITTED.get(task, ("", None))
    for one in predictions if name else ():
        content = text(name.format(**one))
        assert record(one) in (json.loads(content) if name.endswith(".json") else map(json.loads, content.splitlines()))


def test_what_an_operating_system_puts_beside_the_data_is_no_data(run, tmp_path):
    """A copy by a Mac to another disk has a ._NAME beside every file, an archive of it a folder __MACOSX."""
    for task in ("vqav2", "pope", "mme", "mmlu", "gqa"):
        write(tmp_path / task, files_of(task))
        for path in [path for path in (tmp_path / task).rglob("*") if path.is_file()]:
            path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7\0")
            path.with_name(".DS_Store").write_bytes(b"\0\0\0\1Bud1")
        (tmp_path / task / "__MACOSX").mkdir()
        (tmp_path / task / "__MACOSX" / "a.txt").write_bytes(b"\0\5\x16\7\0")
        predictions, told, _ = run(task)
        assert (len(predictions), told["missing"], told["problems"]) == (num_questions(task), {}, [])


def test_pictures_are_found_by_bare_names_only_where_none_can_be_taken_for_another(run, tmp_path):
    """Open-VQA names them with the folders of the data sets that they come from."""
    def asked(*names, there):
        data = tmp_path / "data"
        for folder in (data, tmp_path / "open_vqa out 0"):
            shutil.rmtree(folder, ignore_errors=True)
        one = {"question": "what?", "answer": ["red"], "class": "Color"}
        questions = "\n".join(json.dumps(one | {"index": n, "image": name}) for n, name in enumerate(names))
        write(data, dict.fromkeys(there) | {"Open_VQA_images.jsonl": questions})
        return [path.removeprefix(f"{data}/") for one in run("open_vqa", data=data)[0] for path in one["media"]]

    with pytest.warns(UserWarning, match="by their bare names"):
        assert asked("coco/1.jpg", "gqa/2.jpg", there=["1.jpg", "2.jpg"]) == ["1.jpg", "2.jpg"]
    assert asked("coco/1.jpg", "gqa/1.jpg", there=["1.jpg"]) == []  # one file for two pictures
    assert asked("coco/1.jpg", "gqa/2.jpg", there=["coco/1.jpg", "2.jpg"]) == ["coco/1.jpg"]  # a structured folder


def test_files_for_official_programs(run):
    done = {task: run(task)[::2] for task in ("mme", "mmbench", "science_qa", "mm_vet")}
    answers, text = done["mme"]
    first, second = text("submission_color.txt").split("\n")[:2]
    assert first.split("\t")[:3] == ["a.jpg", "Is it red?", "Yes"] and second.split("\t")[:3] == ["a.jpg", "Is it blue?", "No"]
    answers, text = done["mmbench"]
    head, row = text("submission.tsv").splitlines()
    assert head.split("\t")[0] == "index" and row.split("\t")[:4] == ["4", "what?", "red", "blue"] and len(head.split("\t")) == len(row.split("\t"))
    answers, text = done["science_qa"]
    chosen = json.loads(text("submission.json"))["results"]
    assert chosen == {one["id"]: -1 if one["said"] is None else one["said"] for one in answers}
    answers, text = done["mm_vet"]
    assert answers[0]["judge_prompt"].endswith(f"Ground truth: red<OR>crimson\nPrediction: {answers[0]['prediction']}\nGrade:")
    assert json.loads(text("submission.json")) == {one["id"]: one["prediction"] for one in answers}
    told = json.loads(text("report.json"))["scores"]
    assert told["capability rec"] == told["capability ocr"] == 0.5 and told["ocr+rec"] == 0.5


def test_shots_of_another_split_are_those_of_the_questions_kind(run, monkeypatch):
    seen, talk = [], protocols.Asker._talk

    def look(self, item):
        turns, visuals = talk(self, item)
        seen.append([turn.text for turn in turns])
        return turns, visuals

    monkeypatch.setattr(protocols.Asker, "_talk", look)
    _, told, _ = run("mmlu", "--shots", "1", "--shots-split", "dev")
    assert told["answered"] == 3 and told["shots"] == ["anatomy/0", "law/0"]
    letters = "\nA. red\nB. blue\nC. yes\nD. no\nAnswer:"
    assert seen[0] == [f"how?{letters}", "D", f"what?{letters}"] and seen[2] == [f"when?{letters}", "B", f"what?{letters}"]
    with pytest.raises(ValueError, match="--shots 3: the split 'dev' has 2 questions"):
        run("mmlu", "--shots", "3", "--shots-split", "dev")


def test_letters_are_judged_by_likelihood(run, monkeypatch):
    asked, losses = [], protocols.Asker.losses
    monkeypatch.setattr(protocols.Asker, "losses", lambda self, items, options: asked.extend(options) or losses(self, items, options))
    predictions, *_ = run("mmlu")
    assert asked == ["ABCD"] * 3 and all(one["prediction"] == one["options"][one["said"]] for one in predictions)
    (first, *_), *_ = run("seed_bench")
    (described, *_), *_ = run("seed_bench", "--describe-first")
    assert first["losses"] != described["losses"]
