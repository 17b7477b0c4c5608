"""The five protocols with a model that is told what to say, a real tiny one, and every trap of the benchmarks' files."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from nanovlm.data.batching import build_batch
from nanovlm.data.images import from_base64
from nanovlm.data.records import Record, Turn, Visual
from nanovlm.data import templates
from nanovlm.data.templates import NANO
from nanovlm.evaluation import protocols, readers, report
from nanovlm.evaluation.items import Item, Reading, find, read_json, read_records
from nanovlm.evaluation.protocols import Asker
from nanovlm.evaluation.tasks import TASKS
from nanovlm.generation.sampler import Decoding, generate

GOLDEN = Path(__file__).parents[1] / "golden" / "evaluation"


class Parrot:
    """Stands for an Asker: says what it is told, remembers what it was asked."""

    def __init__(self, *answers, losses=()):
        self.answers, self.told, self.asked = list(answers), list(losses), []

    def replies(self, asked):
        self.asked += asked
        return [self.answers.pop(0) for _ in asked]

    def losses(self, asked, options):
        self.asked += asked
        return [self.told.pop(0) for _ in asked]


def run(task, items, *answers, **options):
    task = TASKS[task]
    return protocols.predictions(task.prepare(items), Parrot(*answers, **options), task)


def test_questions_are_put_in_one_pass_and_answers_and_captions_scored():
    items = [Item("1", "what {is} it?", ({"answer": "Cat"},) * 3 + ({"answer": "dog"},) * 7, "other", submit=1), Item("2", "x", ("y",))]
    one, two = run("vqav2", items, "a cat.", "y")
    assert one["score"] == pytest.approx(0.9) and two["score"] == 1.0 and (one["submit"], "submit" in two) == (1, False)
    assert run("gqa", [Item("1", "q", ("Left",))], " left ")[0]["score"] == 1.0
    assert run("vqav2", [Item("1", "q")], "x")[0]["score"] is None  # a test split
    item = Item("1", "what is {options}?", options=("a", "b"), extra={"hint": "{question} "})
    assert protocols.put(item, TASKS["mmbench"]).question.startswith("{question} what is {options}?\nA. a\nB. b\nAnswer")
    assert protocols.put(Item("1", "q"), TASKS["easy_vqa"]).question == "q"
    items = [Item(name, "", (f"a {name} dog on grass", f"the {name} dog is on the grass")) for name in ("red", "blue")]
    predictions = run("coco_caption", items, "A red dog on grass.", "a cat")
    scores = report.captions(predictions)
    assert [one["score"] for one in predictions] == [None, None] and 0.3 < scores["BLEU-1"] < 0.9 and scores["CIDEr"] > 1


def test_yes_no_with_pope_and_mme():
    items = [Item(str(n), "q", (truth,), "random", "a") for n, truth in enumerate(("yes", "no"))]
    predictions = run("pope", items, "No!", "no, it is not")
    assert [one["said"] for one in predictions] == ["yes", "no"] and report.pope(predictions)["random accuracy"] == 1.0
    assert [one["said"] for one in run("pope_strict", items, "No!", "Hm")] == ["no", "other"]
    scores = report.mme(run("mme", items, "Yes", "it is"))
    assert scores == {"random score": 50.0, "unparsed": 0.5}


@pytest.mark.parametrize("task, summarise", [("pope", report.pope), ("pope_strict", report.pope), ("mme", report.mme)])
def test_the_share_of_answers_without_yes_or_no_is_told(task, summarise):
    items = [Item(str(n), "q", ("yes",), "random", str(n // 2)) for n in range(4)]
    assert summarise(run(task, items, "Yes.", "no", "a red bus", "I cannot know"))["unparsed"] == 0.5
    assert summarise(run(task, items, *["a nobleman yesterday"] * 4))["unparsed"] == 1.0


def test_choice_by_likelihood_takes_the_sum_or_the_mean():
    item = Item("1", "q", (1,), options=("a", "b b b"))
    losses = [[(2.0, 1), (3.0, 3)]]
    (summed,) = run("seed_bench", [item], losses=[*losses])
    (mean,) = run("seed_bench_mean", [item], losses=[*losses])
    assert (summed["said"], summed["score"], mean["said"], mean["score"]) == (0, 0.0, 1, 1.0)
    items = [
        Item("1", "q", (0,), "social", "grade3", (Path("a.png"),), options=("x", "y")),
        Item("2", "q", (1,), "natural", "grade8", options=("x", "y")),
    ]
    scores = report.science_qa(run("science_qa", items, "A", "hm"))
    assert (scores["all"], scores["with picture"], scores["grades 1-6"], scores["grades 7-12"], scores["unparsed"]) == (0.5, 1, 1, 0, 0.5)
    assert report.lettered(run("q_bench", items, "A", "hm")) == {"all": 0.5, "social": 1.0, "natural": 0.0, "unparsed": 0.5}


def test_circular_evaluation_wants_every_rotation_right():
    items = [Item("1", "q", (1,), "k", options=("w", "x", "y")), Item("2", "q", (0,), "k", options=("w", "x"))]
    predictions = run("mmbench", items, "B", "A. x", "y", "A", "B")
    assert [one["id"] for one in predictions] == ["1#0", "1#1", "1#2", "2#0", "2#1"]
    assert [one["score"] for one in predictions] == [1, 1, 0, 1, 1]  # "y" is an option, not the letter of x
    scores = report.circular(predictions)
    assert scores == {"all": 0.5, "single": 0.8, "k": 0.5, "unparsed": 0.0}
    assert report.circular(predictions[:4])["all"] == 0.0  # an unfinished question is not counted
    always_a = run("mmbench", items, *"AAAAA")
    assert report.circular(always_a)["all"] == 0.0
    assert report.circular(run("mmbench", [Item("1", "q", options=("w", "x"))], "A", "B")) == {"all": None, "single": None}


def test_answers_are_put_to_a_judge_once(tmp_path):
    items = [Item("1", "Is GROUND_TRUTH it?", ("cat", "kitten"), "Others"), Item("2", "why?", (), "")]
    one, other = run("open_vqa", items, "a cat", "so")
    assert one["judge_prompt"] == (  # the paper's, filled in one pass
        'Given the question "Is GROUND_TRUTH it?", does the answer "a cat" imply the answer "cat or kitten"? Answer with Yes or No.'
    )
    assert one["score"] is None and other["judge_prompt"] == ""  # nothing true to compare with
    asked = []

    def judge(prompts):
        asked.extend(prompts)
        return ["Yes."] * len(prompts)

    for _ in range(2):
        assert protocols.ask_judge({"1": one["judge_prompt"]}, judge, "", tmp_path, 16) == {"1": "Yes."} and len(asked) == 1
    done = [one | {"judgement": "Yes."} | protocols.judgement("Yes.", "implies"), other]
    assert report.judged(done) == {"all": 1.0, "Others": 1.0, "unparsed": 0, "judged": 1}
    marked = run("video_qa_score", items[:1], "a")[0] | {"judgement": ""} | protocols.judgement("{'pred': 'no', 'score': 2}", "score")
    assert (marked["score"], marked["mark"], report.judged([marked])["mean mark"]) == (0.0, 2, 2)


# the Asker, with a real model


@pytest.fixture
def red(tmp_path):
    return picture(tmp_path, "a.png", "red")


@pytest.fixture
def blue(tmp_path):
    return picture(tmp_path, "b.png", "blue")


def picture(tmp_path, name, color):
    Image.new("RGB", (9, 8), color).save(tmp_path / name)
    return tmp_path / name


def test_replies_are_those_of_generate_alone(loaded, red, blue):
    asked = [Item("1", "what color is this?", media=(red,)), Item("2", "red or blue?", media=(blue, red)), Item("3", "what?")]
    asker = Asker(loaded, loaded.decodings["default"])
    together = asker.replies(asked)
    assert together == [asker.replies([one])[0] for one in asked]
    row = templates.write(templates.prompt((Turn("user", ("what?",)),), NANO), loaded.tokenizer, [])
    (ids,) = generate(loaded.model, [row.ids], Decoding(max_new_tokens=5, eos_ids=(loaded.tokenizer.eos,)))
    assert together[2] == loaded.tokenizer.decode(ids).strip()
    asked = [Item(str(n), "what color is this?") for n in range(4)]
    decoding = Decoding(max_new_tokens=5, do_sample=True, temperature=2.0)
    asker = Asker(loaded, decoding)
    assert asker.replies(asked) == [asker.replies([one])[0] for one in asked]
    assert len(set(asker.replies(asked))) > 1 and Asker(loaded, decoding, seed=1).replies(asked) != asker.replies(asked)


def test_shots_and_descriptions_stand_before_the_question(loaded, red, blue):
    default, shots = loaded.decodings["default"], [(Item("s", "what color is this?", media=(red,)), "red")]
    turns, visuals = Asker(loaded, default, shots={"": shots})._talk(Item("1", "and this?", media=(blue,)), "it is blue")
    assert [turn.parts for turn in turns] == [
        (0, "what color is this?"), ("red",), (1, "describe the image."), ("it is blue",), ("and this?",)
    ]  # fmt: skip
    assert [visual.frames for visual in visuals] == [(red,), (blue,)]
    turns, _ = Asker(loaded, default, shots={"": shots, "k": []})._talk(Item("1", "this?", kind="k"))
    assert [turn.parts for turn in turns] == [("this?",)]
    asked = [Item("1", "what?", media=(blue,)), Item("2", "what?")]
    (description,) = Asker(loaded, Decoding(max_new_tokens=3)).replies([Item("1", "describe the image.", media=(blue,))])
    described = [(Item("x", "describe the image.", media=(blue,)), description)]
    (wanted,) = Asker(loaded, default, shots={"": described}).replies([Item("1", "what?")])
    plain = Asker(loaded, default).replies(asked[1:])
    assert Asker(loaded, default, Decoding(max_new_tokens=3)).replies(asked) == [wanted, *plain]


def test_losses_are_those_of_the_training_row(loaded, red):
    (found,) = Asker(loaded, loaded.decodings["default"]).losses([Item("1", "what color?", media=(red,))], [("red", "blue blue")])
    for option, (total, length) in zip(("red", "blue blue"), found):
        turns = (Turn("user", (0, "what color?")), Turn("assistant", (option,)))
        record = Record("r", (Visual("v", (red,)),), (turns,))
        batch = build_batch([record], NANO, loaded.tokenizer, loaded.model.num_image_tokens, 8, "crop", 100)
        batch.labels[batch.labels == loaded.tokenizer.eos] = -100  # the text of the option alone is scored
        with torch.no_grad():
            loss, number = loaded.model.loss(batch)
        assert total == pytest.approx(float(loss), abs=1e-4) and length == number


def test_a_border_and_films(loaded, tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    asker = Asker(loaded, loaded.decodings["default"], num_frames=2, border=8)
    (shown,) = asker._visual(picture(tmp_path, "w.png", "white"), False).frames
    assert shown.size == (25, 24) and shown.getpixel((0, 0)) == (0, 0, 0) and shown.getpixel((12, 12)) == (255, 255, 255)
    assert len(asker._visual(tmp_path / "film.gif", True).frames) == 2
    assert isinstance(asker.replies([Item("1", "what?", media=(tmp_path / "film.gif",), is_clip=True)])[0], str)


# files as they are published, and their traps


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_files_are_found_read_as_far_as_they_go_and_broken_places_named(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"question": "one"}\n{"q": 1,\n{"q": 2}\n{"question": "last"}\n')
    reading = Reading().collect(read_records(path), lambda record, place: Item(str(place), record["question"]))
    assert [item.question for item in reading.items] == ["one", "last"]
    assert [f"line {n}" in problem for n, problem in zip((2, 3), reading.problems, strict=True)] == [True, True]
    assert reading.problems[1].endswith("lacks 'question'")
    _, (_, error) = read_records(write(tmp_path / "x.json", '{\n"a": 1\n}\n{oh'))
    assert isinstance(error, ValueError) and "line 4" in str(error)
    (tmp_path / "x.gz").write_bytes(gzip.compress(b'\xef\xbb\xbf{"a": 1}'))
    assert read_json(tmp_path / "x.gz") == {"a": 1}
    for text, words in (('{\n"a"}', "y.json: .*line 2"), ('{"a": 1, "a": 2}', "'a' stands twice")):
        with pytest.raises(ValueError, match=words):
            read_json(write(tmp_path / "y.json", text))
    write(tmp_path / "v2_val_questions.json", {})
    assert find(tmp_path, "*annotations*", "*questions*").name == "v2_val_questions.json"
    write(tmp_path / "v2_train_questions.json", {})
    assert find(tmp_path, "*questions*", split="train").name == "v2_train_questions.json"
    with pytest.raises(ValueError, match="several files"):
        find(tmp_path, "*questions*")
    with pytest.raises(FileNotFoundError, match="none of"):
        find(tmp_path, "*.tsv")
    with pytest.raises(FileNotFoundError, match="--data"):
        find(tmp_path / "nowhere", "*")


TRAPS = (  # reader, its files, the problem that one of their records is
    ("vqa", {"q_questions.json": {"questions": [{"question_id": 9, "image_id": 1, "question": "?"}]},
             "q_annotations.json": {"annotations": [{"question_id": 7}]}}, "question 0: question 9 has no annotation"),
    ("captions", {"captions_val.json": {"images": [{"id": 2, "file_name": "b.jpg"}]}}, "picture 2 has no caption"),
    ("pope", {"coco_pope_x.json": '{"label": "maybe", "image": "a"}'}, "label 'maybe' is neither yes nor no"),
    ("mme", {"color/b.txt": "blue? no\n"}, "b.txt, line 1: no question, tabulator"),
    ("open_vqa", {"o.jsonl": '{"index": 1, "question": "q", "image": "i", "answer": "x"}'}, "answer 'x' is no list"),
    ("seed_bench", {"SEED-Bench.json": {"questions": [{"question_id": "2"}]}}, "question 0: lacks 'data_id'"),
    ("science_qa", {"problems.json": {}, "pid_splits.json": {"test": ["7"]}}, "problem 7: lacks '7'"),
    ("mmlu", {"test/law_test.csv": "broken,1,2,3,4,E\n"}, "record 1: answer 'E' is none of the letters"),
)  # fmt: skip


@pytest.mark.parametrize("reader, files, problem", TRAPS, ids=[name for name, *_ in TRAPS])
def test_a_broken_record_is_a_problem(tmp_path, reader, files, problem):
    for name, content in files.items():
        write(tmp_path / name, content)
    (found,) = getattr(readers, reader)(tmp_path, tmp_path, "").problems
    assert problem in found


def test_what_else_published_files_hold(tmp_path):
    questions = [{"question_id": n, "image_id": id, "question": "what?"} for n, id in enumerate((42, "x1"))]
    write(tmp_path / "q_questions.json", {"questions": questions})
    (tmp_path / "x1.jpg").touch()
    seven, eight = readers.vqa(tmp_path, tmp_path, "").items  # a test split has no annotations
    assert seven.missing == [tmp_path / "COCO_val2014_000000000042.jpg"] and eight.missing == []
    item = Item("1", "q", extra={"ocr": "dog, 7"})
    assert protocols.put(item, TASKS["textvqa_ocr"]).question.split("\n")[1] == "Reference OCR token: dog, 7"
    images = [{"filename": "a.jpg", "imgid": split, "split": split, "sentences": [{"raw": "x"}]} for split in ("train", "test")]
    assert len(readers.captions(write(tmp_path / "dataset_f.json", {"images": images}), tmp_path, "").items) == 1
    one = "image_url,instruction_category,instruction,output_human_annotated\nhttp://x/c.png,k,do,done\n"
    assert readers.visit_bench(write(tmp_path / "one.csv", one), tmp_path, "").items[0].media[0].name == "c.png"
    head, image = "index\tquestion\thint\tA\tB\tanswer\timage\n", "x" * 80
    table = f"{head}4\tq\tnan\tw\tx\tB\t{image}\n1000004\tq\tsee\tx\tw\tA\t4\n"
    first, second = readers.mmbench(write(tmp_path / "m.tsv", table), tmp_path, "").items
    assert second.media == (from_base64(image),)  # the picture of the question that it names
    one = {"question": "q", "choices": ["a"], "answer": 0, "hint": "h"}
    (other,) = readers.science_qa(write(tmp_path / "problems.json", {"6": one}), tmp_path, "").items
    assert [item.extra["hint"] for item in (first, second, other)] == ["", "see\n", "Context: h\n"]
    one = {"question_id": "1", "question": "q", "answer": "C", "data_id": "i", "data_type": "video"}
    one |= {f"choice_{letter}": letter for letter in "abcd"} | {"question_type_id": 2}
    reading = readers.seed_bench(write(tmp_path / "SEED-Bench.json", {"questions": [one, one]}), tmp_path, "")
    assert reading.items[0].is_clip and "twice" in reading.problems[0]


def test_pope_and_open_vqa_as_published(tmp_path):
    for path in (GOLDEN / "pope").glob("*.gz"):
        (tmp_path / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    reading = readers.pope(tmp_path, tmp_path, "")
    assert len(reading.items) == 9000 and reading.problems == [] and {item.kind for item in reading.items} == {"random", "popular", "adversarial"}
    predictions = run("pope", reading.items, *["Yes"] * 9000)
    assert report.pope(predictions)["mean f1"] == pytest.approx(2 / 3)
    images, videos = readers.open_vqa(GOLDEN / "open_vqa", tmp_path, ""), readers.open_vqa_video(GOLDEN / "open_vqa", tmp_path, "")
    assert (len(images.items), len(videos.items)) == (302, 148) and videos.items[0].is_clip and not images.problems + videos.problems


def test_a_file_that_holds_the_rotations_is_not_rotated_again(tmp_path):
    colors, animals = ["red", "blue", "green", "teal"], ["cat", "dog"]
    rows = [
        "\t".join([str(n + k * 1_000_000), "what?", *(options[k:] + options[:k] + ["", ""])[:4], "ABCD"[-k % len(options)], "kind"])
        for n, options in ((7, colors), (8, animals)) for k in range(len(options))
    ]  # fmt: skip
    path = write(tmp_path / "m.tsv", "\n".join(["index\tquestion\tA\tB\tC\tD\tanswer\tcategory", *rows]) + "\n")
    items = readers.mmbench(path, tmp_path, "").items
    predictions = run("mmbench", items, *["red"] * 4, *["dog"] * 2)
    assert [one["id"] for one in predictions] == ["7#0", "7#1", "7#2", "7#3", "8#0", "8#1"]
    assert report.circular(predictions) == {"all": 0.5, "single": 4 / 6, "kind": 0.5, "unparsed": 0.0}
    assert report.mmbench(predictions)["submission.tsv"].count("\n") == 3  # head and the unturned questions


def test_sources_become_items():
    pytest.importorskip("easy_vqa")
    items = readers.scenes("", "", "").items[:20]
    assert all(item.answers and item.kind and isinstance(item.media[0], Image.Image) for item in items)
    assert len({item.id for item in items}) == 20
    letters = {"B": (1,), " b ": (1,), "": (), None: (), "nan": (), float("nan"): ()}
    assert {letter: readers.right(letter, "ABCD") for letter in letters} == letters
    for letter in ("E", "AB", "answer", 2):
        with pytest.raises(ValueError, match=f"answer {letter!r} is none of the letters ABCD"):
            readers.right(letter, "ABCD")


def test_null_is_no_answer(tmp_path):
    """Test splits write null, an empty list or nothing where others have the answers."""
    asked = [{"image": f"{n}.jpg", "question": "q"} | more for n, more in enumerate(({}, {"answers": None}, {"answers": []}))]
    (tmp_path / "val.json").write_text(json.dumps(asked))
    (tmp_path / "mm-vet.json").write_text(json.dumps({"v": {"imagename": "a.jpg", "question": "q", "answer": None}}))
    (tmp_path / "x.tsv").write_text("index\tquestion\tA\tB\tanswer\timage\n7.0\tq\ta\tb\tnan\taGkh\n1000007.0\tq\tb\ta\tB\taGkh\n")
    read = [reader(tmp_path, tmp_path, "") for reader in (readers.vizwiz, readers.mm_vet, readers.mmbench)]
    assert [[item.answers for item in one.items] for one in read] == [[(), (), ()], [()], [(), (1,)]]
    assert [one.problems for one in read] == [[], [], []] and [item.group for item in read[2].items] == ["7", "7"]
