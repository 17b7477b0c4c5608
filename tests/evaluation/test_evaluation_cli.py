"""`python -m nanovlm.evaluation`: from files to report, stopped and taken up again, with what is missing or broken named."""

import dataclasses
import json
import sys
from types import SimpleNamespace

import pytest
from loopback import completion, serving
from PIL import Image

from nanovlm.evaluation import __main__ as cli
from nanovlm.evaluation import pairwise, protocols, report, runner
from nanovlm.evaluation.items import Item
from nanovlm.evaluation.tasks import TASKS


@pytest.fixture
def start(loaded, monkeypatch, capsys, tmp_path):
    """Run the command line on the loaded model: (code, what it printed, what it complained)."""

    def start(task, *arguments, model=loaded):
        monkeypatch.setattr(cli.recipes, "load_by_flags", lambda folder, args: model)
        code = cli.main([task, "--model", "folder/tiny", "--out", str(tmp_path / "out"), "--data", str(tmp_path), *arguments])
        return SimpleNamespace(code=code, folder=tmp_path / "out", **dict(zip(("out", "err"), capsys.readouterr())))

    return start


@pytest.fixture
def pope(tmp_path):
    """Six questions about three pictures, one of which is missing; a broken line."""
    for name in "ab":
        Image.new("RGB", (9, 9), "red").save(tmp_path / f"{name}.png")
    lines = [
        json.dumps({"question_id": n, "image": f"{'abc'[n // 2]}.png", "text": "Is there a dog?", "label": ("no", "yes")[n % 2]})
        for n in range(6)
    ]
    (tmp_path / "coco_pope_random.json").write_text("\n".join([*lines[:3], "{oh", *lines[3:]]) + "\n")
    return tmp_path


def read(path):
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def test_a_report_with_what_is_missing_and_broken(start, pope):
    done = start("pope")
    assert done.code == 0 and "NOT ASKED: 2 questions" in done.out and "c.png" in done.out and "NOT READ OR PUT: 1 records" in done.out
    told = json.loads((done.folder / "report.json").read_text())
    assert told["missing"] == {f"random/{n}": [str(pope / "c.png")] for n in (4, 5)} and told["answered"] == 4
    assert "line 4" in told["problems"][0] and told["preset"] == "vqa" and told["scores"]["random accuracy"] == 0.5
    assert [row["class"] for row in told["classes"]] == ["all", "random"] and told["classes"][0]["answers"] == 4
    assert (done.folder / "report.txt").read_text().splitlines() == done.out.splitlines()[:-1]
    with Image.open(done.folder / "classes.png") as bars, Image.open(done.folder / "worst.png") as sheet:
        assert bars.size[0] == 800 and sheet.size[0] > 800
    head, *predictions = read(done.folder / "predictions.jsonl")
    assert head["settings"]["task"] == "pope" and [one["id"] for one in predictions] == [f"random/{n}" for n in range(4)]


def test_a_stopped_run_goes_on_where_it_stopped(start, pope, monkeypatch):
    whole = read(start("pope").folder / "predictions.jsonl")
    path = pope / "out" / "predictions.jsonl"
    lines = path.read_text().split("\n")
    path.write_text("\n".join(lines[:3]) + "\n" + lines[3][:20])  # two answers, and the run ended inside the third
    asked, replies = [], protocols.Asker.replies
    monkeypatch.setattr(protocols.Asker, "replies", lambda self, several: asked.extend(several) or replies(self, several))
    assert start("pope").code == 0
    assert [one.id for one in asked] == ["random/2", "random/3"] and read(path) == whole


def test_an_interrupted_run_keeps_its_answers(start, pope, monkeypatch):
    replies = protocols.Asker.replies

    def once(self, several):
        if several[0].id != "random/0":
            raise KeyboardInterrupt
        return replies(self, several)

    monkeypatch.setattr(protocols.Asker, "replies", once)
    done = start("pope", "--batch-size", "2")
    assert done.code == 130 and "goes on" in done.err and len(read(done.folder / "predictions.jsonl")) == 3


def test_other_settings_are_refused(start, pope):
    start("pope", "--limit", "2")
    assert start("pope").code == 0  # a limit is no setting
    again = start("pope", "--seed", "1")
    assert again.code == 2 and "seed 0, now 1" in again.err
    (pope / "out" / "predictions.jsonl").write_text("no json\n")
    assert "predictions.jsonl, line 1" in start("pope").err


def test_shots_are_shown_and_not_asked(start, pope, monkeypatch):
    told = {}
    monkeypatch.setattr(runner, "Asker", lambda *args: told.update(args=args) or protocols.Asker(*args))
    done = start("pope", "--shots", "1", "--describe-first", "--prompt", "see: {question}", "--preset", "default")
    loaded, decoding, describe, shots, *_ = told["args"]
    assert [(asked.question, answer) for asked, answer in shots[""]] == [("see: Is there a dog?", "no")]
    assert decoding == loaded.decodings["default"] and describe == loaded.decodings["describe"]
    assert [one["id"] for one in read(done.folder / "predictions.jsonl")[1:]] == ["random/1", "random/2", "random/3"]


def test_a_damaged_picture_or_a_question_too_long_stops_nothing(start, pope):
    (pope / "b.png").write_bytes((pope / "b.png").read_bytes()[:45])
    long = {"question_id": 6, "image": "a.png", "text": "dog? " * 400, "label": "no"}
    with open(pope / "coco_pope_random.json", "a") as file:
        file.write(json.dumps(long) + "\n")
    done = start("pope")
    problems = json.loads((done.folder / "report.json").read_text())["problems"]
    assert done.code == 0 and "2 answers" in done.out and len(problems) == 4  # and the broken line
    assert all(any(word in problem for problem in problems) for word in ("random/2: ", "b.png", "random/6: ", "tokens"))
    (pope / "a.png").write_bytes(b"")
    (pope / "out" / "predictions.jsonl").unlink()
    nothing = start("pope")
    assert nothing.code == 2 and "no question of pope could be put" in nothing.err and "a.png" in nothing.err


def test_nothing_can_be_asked_without_media(start, pope):
    for name in "ab":
        (pope / f"{name}.png").unlink()
    done = start("pope")
    assert done.code == 1 and "0 answers" in done.out and "NOT ASKED: 6 questions" in done.out and "--images" in done.out


def write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def open_vqa(folder, *questions):
    Image.new("RGB", (9, 9), "red").save(folder / "a.png")
    lines = [{"index": n, "question": q, "answer": ["red"], "image": "a.png", "class": "Color"} for n, q in enumerate(questions)]
    write(folder / "Open_VQA_images.jsonl", lines)


def test_judgements_now_later_and_by_a_model(start, tmp_path):
    open_vqa(tmp_path, *["what?"] * 3)
    done = start("open_vqa")
    prompts = read(done.folder / "judge_prompts.jsonl")
    assert [one["id"] for one in prompts] == ["0", "1", "2"] and 'imply the answer "red"' in prompts[0]["prompt"]
    assert json.loads((done.folder / "report.json").read_text())["scores"]["all"] is None and not (done.folder / "classes.png").exists()
    said = tmp_path / "said.jsonl"
    said.write_text('{"id": "0", "judgement": "Yes."}\n{"id": "1", "judgement": "Hm"}\n')
    scores = json.loads((start("open_vqa", "--judgements", str(said)).folder / "report.json").read_text())["scores"]
    assert (scores["all"], scores["judged"], scores["unparsed"]) == (0.5, 2, 1)
    done = start("open_vqa", "--judgements", str(said), "--judge", "folder")  # only the third is left
    assert [one["id"] for one in read(done.folder / "judgements.jsonl")] == ["2"] and not read(done.folder / "judge_prompts.jsonl")
    start("open_vqa", "--judge", "folder")
    assert sorted(one["id"] for one in read(done.folder / "judgements.jsonl")) == ["0", "1", "2"]
    said.write_text('{"id": "0"}\n')
    assert "no object with id and judgement" in start("open_vqa", "--judgements", str(said)).err
    assert "no such file" in start("open_vqa", "--judgements", "nowhere").err


def test_an_endpoint_judges_and_one_that_fails_leaves_a_run_that_goes_on(start, tmp_path, monkeypatch):
    def reply(body, number):  # breaks down at the third request, and never answers the second question
        (message,) = body["messages"]
        assert (body["model"], body["temperature"]) == ("gpt-x", 0) and 'imply the answer "red"' in message["content"]
        if number == 2:
            return 401, {}, b"the server is gone"
        return (400, {}, b"too long") if "second" in message["content"] else completion("Yes.")

    open_vqa(tmp_path, "first?", "second?", "third?")
    with serving(reply) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        broken, done = (start("open_vqa", "--judge-endpoint", "gpt-x", "--batch-size", "2") for _ in range(2))
        assert broken.code == 2 and "does not judge: Error code: 401" in broken.err
        assert done.code == 0 and len(server.bodies) == 4  # what was judged is not judged again
    scores = json.loads((done.folder / "report.json").read_text())["scores"]
    assert (scores["all"], scores["judged"], scores["unparsed"]) == (pytest.approx(2 / 3), 3, 1)
    monkeypatch.setitem(sys.modules, "openai", None)
    assert "pip install openai" in start("open_vqa", "--judge-endpoint", "gpt-x").err


@pytest.mark.parametrize(("arguments", "words"), [
    (["pop", "--model", "x"], "Did you mean 'pope'"), (["attenton"], "Did you mean 'attention'"), (["pope"], "--model is needed"),
    (["pope", "--model", "x", "--shot", "2"], "Did you mean '--shots'"), (["pope", "--model", "x", "--judge", "y"], "not judged"),
    (["pope", "--model", "x", "--batch-size", "0"], "must be 1 or more"),
])  # fmt: skip
def test_bad_flags(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_bad_input(start, tmp_path, pope):
    assert "Did you mean 'default'" in start("pope", "--preset", "defaul").err
    assert start("gqa").code == 2
    (tmp_path / "coco_pope_random.json").write_text("{oh\n")
    empty = start("pope")
    assert empty.code == 2 and "line 1" in empty.err


def test_the_table_lists_every_task(capsys):
    assert cli.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(TASKS)
    assert {task.protocol for task in TASKS.values()} == {
        protocols.short_answer, protocols.caption, protocols.yes_no, protocols.choice, protocols.judged
    }  # fmt: skip
    predictions = [{"id": str(n), "kind": "k" if n else "", "score": float(n < 3)} for n in range(4)]
    (everything, alone) = report.classes(predictions + [{"id": "x", "kind": "k", "score": None}])
    assert everything[:3] == ("all", 4, 0.75) and alone[:3] == ("k", 3, pytest.approx(2 / 3))
    assert everything[3][0] < 0.75 < everything[3][1]
    lines = report.table({"all": 0.75, "none": None, "unparsed": 2}, [everything])
    assert lines[0].split() == ["all", "0.7500"] and lines[1].split() == ["none", "-"] and lines[2].split() == ["unparsed", "2"]


def test_an_unrelated_image_goes_with_questions_of_text_alone(start, tmp_path):
    (tmp_path / "biology_test.csv").write_text("what?,red,blue,yes,no,B\n")
    Image.new("RGB", (9, 9), "red").save(tmp_path / "x.png")
    alone = read(start("mmlu").folder / "predictions.jsonl")[1]
    other = str(tmp_path / "with")
    assert start("mmlu", "--unrelated-image", str(tmp_path / "x.png"), "--out", other).code == 0
    (_, shown) = read(tmp_path / "with" / "predictions.jsonl")
    assert alone["media"] == [] and shown["media"] == [str(tmp_path / "x.png")] and alone["losses"] != shown["losses"]
    assert "no such image" in start("mmlu", "--unrelated-image", "nowhere.png").err


def answers_of(folder, answers):
    lines = ({"id": str(n), "question": "q?", "prediction": text, "media": []} for n, text in enumerate(answers))
    write(folder / "predictions.jsonl", [{"settings": {}}, *lines])
    return str(folder)


def test_two_runs_are_compared_question_by_question(tmp_path, capsys):
    for name, scores in (("x", (1, 1, 0, 0, 1, None)), ("y", (0, 1, 0, 1, 0.5, 1))):
        lines = ({"id": str(n), "kind": "ab"[n % 2], "score": score} for n, score in enumerate(scores))
        write(tmp_path / name / "predictions.jsonl", [{"settings": {}}, *lines])
    folders = str(tmp_path / "x"), str(tmp_path / "y")
    assert cli.main(["compare", *folders]) == 0
    head, _, whole, *kinds = capsys.readouterr().out.splitlines()
    assert head == "first: x, second: y"
    assert whole.split()[:5] == ["all", "5", "60.0%", "50.0%", "-10.0%"] and whole.endswith("2, 1")
    low, high = (float(words.strip("%+")) for words in whole.split("  ")[-2].split("   ")[0].split(" to "))
    assert -100 < low < -10 < high < 100
    assert [line.split()[:5] for line in kinds] == [["a", "3", "66.7%", "16.7%", "-50.0%"], ["b", "2", "50.0%", "100.0%", "+50.0%"]]
    write(tmp_path / "y" / "predictions.jsonl", [{"settings": {}}, {"id": "5", "score": 1}])
    assert cli.main(["compare", *folders]) == 2 and "scored in both" in capsys.readouterr().err


def test_models_are_ranked_by_comparing_both_orders(tmp_path, capsys, monkeypatch):
    folders = [answers_of(tmp_path / name / "task", [text] * 6) for name, text in (("x", "good"), ("y", "bad"), ("z", "bad"))]
    judged = []

    def judge(prompts):  # prefers "good", and of two equal ones the first
        judged.extend(prompts)
        return ["B" if "Answer B: good" in prompt else "Answer A." for prompt in prompts]

    monkeypatch.setattr(cli, "open_judge", lambda args: judge)
    assert cli.main(["rank", *folders, "--out", str(tmp_path / "r")]) == 0
    told = json.loads((tmp_path / "r" / "ranking.json").read_text())
    assert list(told["models"])[0] == "x/task" and len(judged) == 36 and (told["games"], told["unread"]) == (18, 0)
    good, bad = told["models"]["x/task"], told["models"]["y/task"]
    assert (good["wins"], bad["wins"]) == (12, 3)  # a preference for the first place makes ties
    assert good["bradley-terry interval"][0] > bad["bradley-terry"] and good["elo interval"][0] > bad["elo interval"][1]
    assert cli.main(["rank", *folders, "--out", str(tmp_path / "r")]) == 0 and len(judged) == 36  # nothing is judged twice
    monkeypatch.setattr(cli, "open_judge", lambda args: None)
    assert cli.main(["rank", *folders[:2], "--out", str(tmp_path / "s")]) == 0 and "12 prompts wait" in capsys.readouterr().out
    assert cli.main(["rank", folders[0], "--out", str(tmp_path / "s")]) == 2 and "two at least" in capsys.readouterr().err


def test_sheets_of_marks(tmp_path, capsys):
    folders = [answers_of(tmp_path / name, ["a", "b"]) for name in ("x", "y", "z")]
    sheet = tmp_path / "ann.csv"
    assert cli.main(["rank", *folders, "--sheet", str(sheet)]) == 0
    lines = sheet.read_text().splitlines()
    assert len(lines) == 7 and lines[1] == "0,x,q?,,a,"
    sheet.write_text("\n".join([lines[0], *(line + mark for line, mark in zip(lines[1:], "555421"))]))
    capsys.readouterr()
    assert cli.main(["rank", *folders, "--marks", str(sheet)]) == 0
    *means, breach = capsys.readouterr().out.splitlines()
    assert [line.split() for line in means] == [["x", "4.50"], ["y", "3.50"], ["z", "3.00"]] and "3 models tied" in breach


def test_a_judge_of_pairs_is_read_by_its_first_word():
    assert [pairwise.parse_which(text) for text in ("A", "b.", "Answer B", "Tie", "Both", "")] == [1.0, 0.0, 0.0, 0.5, None, None]
    assert [pairwise.parse_which(text) for text in ("A tie.", "Answer: B", "a")] == [0.5, 0.0, 1.0]
    words = {"QUESTION": "q", "ANSWER_A": "ANSWER_B", "ANSWER_B": "y"}
    assert "Answer A: ANSWER_B\n" in protocols.fill("\n".join(protocols.PROMPTS["which"]), words)
    item = Item("1", "q", (1,), options=("red", "blue"))
    assert runner.shot_answer(item, TASKS["mmbench"]) == "B" and runner.shot_answer(item, TASKS["mmlu_text"]) == "blue"
    assert runner.shot_answer(item, TASKS["mmlu"]) == "B"
    assert runner.shot_answer(Item("1", "q", ({"answer": "x"}, {"answer": "y"})), TASKS["vqav2"]) == "x"
    assert runner.shot_answer(Item("1", "q", ("z",)), TASKS["gqa"]) == "z"
    with pytest.raises(ValueError, match="cannot be a shot"):
        runner.shot_answer(Item("1", "q"), TASKS["gqa"])


def test_a_model_that_cannot_be_asked_is_refused(start, loaded):
    tower = dataclasses.replace(loaded, model=loaded.model.vision)
    assert "ViT alone writes no text" in start("mmlu", model=tower).err
