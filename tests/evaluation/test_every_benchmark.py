"""Every task from its files, as they are published, to report and submission: a tiny model answers two or three questions."""

import base64
import io
import json
import shutil

import pytest
from PIL import Image

from nanovlm.evaluation import protocols, report, runner
from nanovlm.evaluation.__main__ import parse
from nanovlm.evaluation.tasks import TASKS

TEN = [{"answer": "red", "answer_id": n} for n in range(10)]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def lines(*records):
    return "\n".join(map(json.dumps, records)) + "\n"


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 8), "red").save(path)


def film(path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def vqa(folder):
    picture(folder / "COCO_val2014_000000000042.jpg")
    write(folder / "v2_val_questions.json", {"questions": [{"question_id": n, "image_id": 42, "question": "what?"} for n in (1, 2)]})
    notes = [{"question_id": n, "image_id": 42, "answers": TEN, "answer_type": "other"} for n in (1, 2)]
    write(folder / "v2_val_annotations.json", {"annotations": notes})


def text_vqa(folder):
    picture(folder / "i.jpg")
    asked = {"question_id": 5, "image_id": "i", "question": "what?", "answers": ["red"] * 10}
    write(folder / "TextVQA_0.5.1_val.json", {"data": [asked, asked | {"question_id": 6}]})
    write(folder / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": [{"image_id": "i", "ocr_tokens": ["stop"]}]})


def vizwiz(folder):
    for name in ("a.jpg", "b.jpg"):
        picture(folder / name)
    asked = [{"image": name, "question": "what?", "answers": TEN, "answer_type": "other"} for name in ("a.jpg", "b.jpg")]
    write(folder / "val.json", asked)


def gqa(folder):
    picture(folder / "n1.jpg")
    one = {"imageId": "n1", "question": "what?", "answer": "red", "types": {"structural": "query"}}
    write(folder / "testdev_balanced_questions.json", {"7": one, "8": one})


def video_qa(folder):
    film(folder / "video3.gif")
    write(folder / "test_qa.json", [{"id": n, "question": "what?", "answer": "red", "video_id": 3} for n in (1, 2)])


def coco_caption(folder):
    picture(folder / "a.jpg")
    notes = [{"image_id": 1, "caption": text} for text in ("a red square", "red all over")]
    images = [{"id": n, "file_name": "a.jpg"} for n in (1, 2)]
    write(folder / "captions_val2014.json", {"images": images, "annotations": notes + [{"image_id": 2, "caption": "red"}]})


def flickr30k(folder):
    picture(folder / "a.jpg")
    images = [{"filename": "a.jpg", "imgid": n, "split": "test", "sentences": [{"raw": "a red square"}]} for n in (1, 2)]
    write(folder / "dataset_flickr30k.json", {"images": images})


def pope(folder):
    picture(folder / "val2014" / "a.jpg")
    for split in ("random", "popular", "adversarial"):
        asked = {"question_id": 1, "image": "a.jpg", "text": "Is there a dog?", "label": "no"}
        write(folder / f"coco_pope_{split}.json", lines(asked))


def mme(folder):
    picture(folder / "color" / "images" / "a.jpg")
    write(folder / "color" / "questions_answers_YN" / "a.txt", "Is it red?\tYes\nIs it blue?\tNo\n")


def seed_bench(folder):
    picture(folder / "i.jpg")
    one = {"question_id": "1_0", "question": "what?", "answer": "B", "data_id": "i.jpg", "data_type": "image", "question_type_id": 1}
    one |= {f"choice_{letter}": word for letter, word in zip("abcd", ("red", "blue", "yes", "no"))}
    write(folder / "SEED-Bench.json", {"questions": [one, one | {"question_id": "1_1"}], "question_type": {"Scene": 1}})


def mmbench(folder):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "BMP")
    text = base64.b64encode(file.getvalue()).decode()
    head = "index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage\n"
    write(folder / "mmbench_dev.tsv", f"{head}4\twhat?\tnan\tred\tblue\t\tnan\tB\tcolor\t{text}\n")


def science_qa(folder):
    picture(folder / "test" / "5" / "image.png")
    one = {"question": "what?", "choices": ["red", "blue"], "answer": 1, "image": "image.png", "hint": "see", "subject": "s", "grade": "grade2"}
    write(folder / "problems.json", {"5": one, "6": one | {"image": None}})
    write(folder / "pid_splits.json", {"test": ["5", "6"]})


def q_bench(folder):
    picture(folder / "i.jpg")
    one = {"img_path": "i.jpg", "question": "what?", "candidates": ["red", "blue"], "correct_ans": "red", "concern": 0}
    write(folder / "llvisionqa_dev.json", [one, one | {"question": "why?"}, one])


def mmlu(folder):
    write(folder / "test" / "anatomy_test.csv", "what?,red,blue,yes,no,B\nwho?,red,blue,yes,no,A\n")
    write(folder / "test" / "law_test.csv", "what?,red,blue,yes,no,C\n")
    write(folder / "dev" / "anatomy_dev.csv", "how?,red,blue,yes,no,D\n")
    write(folder / "dev" / "law_dev.csv", "when?,red,blue,yes,no,B\n")


def arc(folder):
    one = {"question": {"stem": "what?", "choices": [{"text": word, "label": n} for n, word in zip("12", ("red", "blue"))]}, "answerKey": "2"}
    write(folder / "ARC-Challenge-Test.jsonl", lines(one | {"id": "a"}, one | {"id": "b"}))


def open_vqa(folder):
    picture(folder / "a.jpg")
    film(folder / "v.gif")
    one = {"question": "what?", "answer": ["red"], "class": "Color"}
    write(folder / "Open_VQA_images.jsonl", lines(*(one | {"index": n, "image": "a.jpg"} for n in (1, 2))))
    write(folder / "Open_VQA_videos.jsonl", lines(*(one | {"index": n, "video": "v.gif"} for n in (1, 2))))


def mm_vet(folder):
    picture(folder / "a.png")
    one = {"imagename": "a.png", "question": "what?", "answer": "red<OR>crimson", "capability": ["rec", "ocr"]}
    write(folder / "mm-vet.json", {"v1_0": one, "v1_1": one | {"capability": ["rec"]}})


def owleval(folder):
    picture(folder / "1.jpg")
    write(folder / "questions.jsonl", lines(*({"image": "1.jpg", "question_id": n, "question": "what?", "category": ["k"]} for n in (1, 2))))


def visit_bench(folder):
    picture(folder / "a.png")
    row = '"[""http://x/a.png"", ""http://x/a.png""]",which?,k,red\n'
    rows = f"{row}{row.replace('which', 'why')}{row}"  # some of its tables have a row per answer that people compared
    write(folder / "visit_bench_multi_images.csv", f"images,instruction,instruction_category,reference_output\n{rows}")


FILES = {  # task -> (what writes its files, questions that are asked)
    "vqav2": (vqa, 2), "vqav2_official": (vqa, 2), "ok_vqa": (vqa, 2), "textvqa": (vqa, 2), "vizwiz": (vqa, 2),
    "textvqa_own": (text_vqa, 2), "textvqa_ocr": (text_vqa, 2), "vizwiz_own": (vizwiz, 2), "gqa": (gqa, 2),
    "video_qa": (video_qa, 2), "coco_caption": (coco_caption, 2), "flickr30k": (flickr30k, 2), "pope": (pope, 3),
    "pope_strict": (pope, 3), "mme": (mme, 2), "seed_bench": (seed_bench, 2), "seed_bench_mean": (seed_bench, 2),
    "mmbench": (mmbench, 2), "science_qa": (science_qa, 2), "q_bench": (q_bench, 2), "mmlu": (mmlu, 3), "mmlu_text": (mmlu, 3),
    "arc": (arc, 2), "open_vqa": (open_vqa, 2), "open_vqa_video": (open_vqa, 2), "mm_vet": (mm_vet, 2),
    "video_qa_score": (video_qa, 2), "owleval": (owleval, 2), "visit_bench": (visit_bench, 2),
    "easy_vqa": (lambda folder: None, 2), "scenes": (lambda folder: None, 2),  # bring their own
}  # fmt: skip
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
    "vqav2": {"id": "1", "kind": "other", "answers": TEN}, "textvqa_own": {"id": "5", "answers": ["red"] * 10},
    "vizwiz_own": {"id": "a.jpg", "kind": "other", "answers": TEN}, "gqa": {"id": "7", "kind": "query", "answers": ["red"]},
    "video_qa": {"id": "1", "answers": ["red"]}, "coco_caption": {"answers": ["a red square", "red all over"]},
    "flickr30k": {"answers": ["a red square"]}, "pope": {"kind": "adversarial", "group": "a.jpg", "answers": ["no"]},
    "mme": {"id": "color/a/0", "kind": "color", "group": "color/a", "question": "Is it red?", "answers": ["yes"]},
    "seed_bench": {"id": "1_0", "kind": "Scene", "answers": [1], "options": ["red", "blue", "yes", "no"]},
    "mmbench": {"id": "4#0", "kind": "color", "group": "4", "answers": [1], "options": ["red", "blue"]},
    "science_qa": {"id": "5", "kind": "s", "group": "grade2", "answers": [1]}, "q_bench": {"kind": "0", "answers": [0]},
    "mmlu": {"id": "anatomy/0", "kind": "anatomy", "answers": [1]}, "arc": {"id": "a", "answers": [1], "options": ["red", "blue"]},
    "open_vqa": {"id": "1", "kind": "Color", "answers": ["red"]}, "open_vqa_video": {"id": "1", "answers": ["red"]},
    "mm_vet": {"id": "v1_0", "kind": "ocr+rec", "answers": ["red<OR>crimson"]}, "owleval": {"kind": "k", "answers": []},
    "visit_bench": {"id": "a.png, a.png: which?", "kind": "k", "answers": ["red"]},
}  # fmt: skip


@pytest.fixture
def run(loaded, tmp_path, monkeypatch):
    """Run a task on its files: (predictions, report, a function that reads another file of the output)."""
    monkeypatch.setattr(report, "bars", lambda rows, path, title: None)  # drawn in test_evaluation_cli
    monkeypatch.setattr(report, "worst", lambda *args: False)

    def run(task, *flags, limit=3):
        data, out = tmp_path / task, tmp_path / f"{task} out {len(flags)}"
        data.mkdir(exist_ok=True)
        FILES[task][0](data)
        command = [task, "--model", "tiny", "--data", str(data), "--out", str(out), "--limit", str(limit), "--batch-size", "4"]
        judge = (lambda prompts: ["Yes, 0.5"] * len(prompts)) if TASKS[task].protocol is protocols.judged else None
        runner.run(parse([*command, *flags]), loaded, judge)
        predictions = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()[1:]]
        return predictions, json.loads((out / "report.json").read_text()), lambda name: (out / name).read_text()

    return run


def test_every_task_has_files_here():
    assert FILES.keys() == TASKS.keys()


@pytest.mark.parametrize("task", TASKS)
def test_from_files_to_report(task, run):
    number = FILES[task][1]
    predictions, told, text = run(task, limit=2 if task in ("easy_vqa", "scenes") else 3)
    assert (len(predictions), told["answered"], told["missing"]) == (number, number, {})
    assert len(told["problems"]) == (task in ("q_bench", "visit_bench"))  # a row that stands there twice is one question
    assert told["scores"] and all(isinstance(one["prediction"], str) for one in predictions)
    assert predictions[0] == predictions[0] | FIRST.get(task, {})
    if TASKS[task].protocol is protocols.judged and any(one["answers"] for one in predictions):
        assert told["scores"]["all"] == (0.5 if task == "mm_vet" else 1.0)
    name, record = SUBMITTED.get(task, ("", None))
    for one in predictions if name else ():
        content = text(name.format(**one))
        assert record(one) in (json.loads(content) if name.endswith(".json") else list(map(json.loads, content.splitlines())))


def test_what_an_operating_system_puts_beside_the_data_is_no_data(run, tmp_path):
    """A copy by a Mac to another disk has a ._NAME beside every file, an archive of it a folder __MACOSX."""
    for task in ("vqav2", "pope", "mme", "mmlu", "gqa"):
        FILES[task][0](tmp_path / task)
        for path in [path for path in (tmp_path / task).rglob("*") if path.is_file()]:
            path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7\0")
            path.with_name(".DS_Store").write_bytes(b"\0\0\0\1Bud1")
        (tmp_path / task / "__MACOSX").mkdir()
        (tmp_path / task / "__MACOSX" / "a.txt").write_bytes(b"\0\5\x16\7\0")
        predictions, told, _ = run(task)
        assert (len(predictions), told["missing"], told["problems"]) == (FILES[task][1], {}, [])


def test_pictures_are_found_by_bare_names_only_where_none_can_be_taken_for_another(run, tmp_path):
    """Open-VQA names them with the folders of the data sets that they come from."""
    def asked(*names, there):
        data = tmp_path / "open_vqa"
        shutil.rmtree(data, ignore_errors=True)
        shutil.rmtree(tmp_path / "open_vqa out 0", ignore_errors=True)
        for name in there:
            picture(data / name)
        one = {"question": "what?", "answer": ["red"], "class": "Color"}
        write(data / "Open_VQA_images.jsonl", lines(*(one | {"index": n, "image": name} for n, name in enumerate(names))))
        with monkeypatch.context() as patch:
            patch.setitem(FILES, "open_vqa", (lambda folder: None, 0))
            return [one["media"] for one in run("open_vqa")[0]]

    monkeypatch, folder = pytest.MonkeyPatch(), str(tmp_path / "open_vqa")
    with pytest.warns(UserWarning, match="by their bare names"):
        assert asked("coco/1.jpg", "gqa/2.jpg", there=["1.jpg", "2.jpg"]) == [[f"{folder}/1.jpg"], [f"{folder}/2.jpg"]]
    assert asked("coco/1.jpg", "gqa/1.jpg", there=["1.jpg"]) == []  # one file for two pictures
    assert asked("coco/1.jpg", "gqa/2.jpg", there=["coco/1.jpg", "2.jpg"]) == [[f"{folder}/coco/1.jpg"]]  # a structured folder


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


def test_a_description_stands_before_a_choice_by_likelihood(run):
    (first, *_), *_ = run("seed_bench")
    (described, *_), *_ = run("seed_bench", "--describe-first")
    assert first["losses"] != described["losses"]
