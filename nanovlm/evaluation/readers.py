"""The benchmarks' files as they are published, read into items. One function per format; choice_readers.py has more.

Each takes the folder (or file) of the questions, the folder of the pictures, and the split, and gives a Reading.
"""

import csv
import io
import json
from pathlib import Path

from nanovlm.data.easy_vqa import EasyVQA
from nanovlm.data.scene_questions import Scenes
from nanovlm.evaluation.items import (
    coco_picture, Encoded, find, Item, numbered, picture, read_json, read_records, read_text, Reading,
)


def vqa(data, pictures, split):
    """VQA format: `questions`, and `annotations` with ten answers each, in two files; TextVQA and VizWiz come so as well."""
    questions = read_json(find(data, "*questions*.json*", "*[Qq]uestions*", split=split))["questions"]
    try:
        annotations = read_json(find(data, "*annotations*.json*", split=split))["annotations"]
    except FileNotFoundError:
        annotations = []  # a test split
    by_id = {one["question_id"]: one for one in annotations}

    def make(one, place):
        truth = by_id.get(one["question_id"], {})
        if by_id and not truth:
            raise ValueError(f"question {one['question_id']} has no annotation")
        image = one["image_id"]
        if isinstance(image, int):
            path = coco_picture(pictures, image, split or "val")
        else:
            path = picture(pictures, str(image), f"{image}.jpg", f"{image}.png")
        answers = tuple(truth.get("answers", ()))
        return Item(
            str(one["question_id"]),
            one["question"],
            answers,
            truth.get("answer_type") or truth.get("question_type", ""),
            media=(path,),
            submit=one["question_id"],
        )

    return Reading().collect(numbered(questions, "question"), make)


def text_vqa(data, pictures, split):
    """TextVQA's own file, {"data": [...]}; beside it, if there, the Rosetta OCR tokens."""
    reading, ocr = read_json(find(data, "TextVQA_0*.json", split=split))["data"], {}
    try:
        ocr = {
            one["image_id"]: one["ocr_tokens"]
            for one in read_json(find(data, "TextVQA_Rosetta*.json", split=split))["data"]
        }
    except (FileNotFoundError, KeyError):
        pass  # the task without OCR tokens needs none

    def make(one, place):
        tokens = one.get("ocr_tokens") or ocr.get(one["image_id"], [])
        path = picture(pictures, f"{one['image_id']}.jpg", f"{one['image_id']}.png")
        return Item(
            str(one["question_id"]),
            one["question"],
            tuple(one.get("answers", ())),
            media=(path,),
            extra={"ocr": ", ".join(tokens)},
            submit=one["question_id"],
        )

    return Reading().collect(numbered(reading, "question"), make)


def vizwiz(data, pictures, split):
    """VizWiz's own file: a list of {image, question, answers}."""

    def make(one, place):
        return Item(
            one["image"],
            one["question"],
            tuple(one.get("answers", ())),
            one.get("answer_type", ""),
            media=(picture(pictures, one["image"]),),
            submit=one["image"],
        )

    return Reading().collect(read_records(find(data, f"{split or 'val'}.json", "*.json", split=split)), make)


def gqa(data, pictures, split):
    """GQA: an object of questions by id."""
    path = find(data, f"*{split or 'testdev'}_balanced_questions.json", "*questions*.json", split=split)

    def make(pair, place):
        id, one = pair
        return Item(
            id,
            one["question"],
            (one["answer"],) if "answer" in one else (),
            one.get("types", {}).get("structural", ""),
            media=(picture(pictures, f"{one['imageId']}.jpg"),),
            submit=id,
        )

    return Reading().collect([(f"{path}, question {id}", (id, one)) for id, one in read_json(path).items()], make)


def video_qa(data, pictures, split):
    """MSVD-QA and MSRVTT-QA: a list of {id, question, answer, video | video_id | video_name}."""

    def make(one, place):
        name = str(one.get("video") or one.get("video_name") or one["video_id"])
        names = (name, *(f"{stem}{ending}" for stem in (name, f"video{name}") for ending in (".mp4", ".avi", ".gif")))
        return Item(
            str(one.get("id", place)),
            one["question"],
            (one["answer"],),
            media=(picture(pictures, *names),),
            is_clip=True,
        )

    return Reading().collect(read_records(find(data, f"*{split or 'test'}*.json*", "*.json*")), make)


def captions(data, pictures, split):
    """COCO's `images` and `annotations`, or Karpathy's `images` with `sentences` (dataset_coco, dataset_flickr30k)."""
    content = read_json(find(data, "dataset_*.json", "*captions*.json", split=split))
    references = {}
    for one in content.get("annotations", ()):
        references.setdefault(one["image_id"], []).append(one["caption"])

    def make(one, place):
        said = (
            [sentence["raw"] for sentence in one["sentences"]] if "sentences" in one else references.get(one["id"], [])
        )
        if not said:
            raise ValueError(f"picture {one.get('id', place)} has no caption")
        name = one.get("filename") or one["file_name"]
        id = one.get("cocoid", one.get("id", one.get("imgid", name)))
        return Item(
            str(id), "", tuple(said), media=(picture(pictures, name, f"{one.get('filepath', '')}/{name}"),), submit=id
        )

    chosen = [one for one in content["images"] if one.get("split", split or "test") == (split or "test")]
    return Reading().collect(numbered(chosen, "picture"), make)


def pope(data, pictures, split):
    """POPE: three files of JSON lines named .json; the kind is the split of the objects."""
    folder = Path(data)
    paths = (
        [folder] if folder.is_file() else [path for path in sorted(folder.glob("*pope_*.json*")) if split in path.name]
    )
    if not paths:
        raise FileNotFoundError(f"{data} holds no coco_pope_*.json")
    reading = Reading()
    for path in paths:
        kind = next((name for name in ("random", "popular", "adversarial") if name in path.name), path.stem)

        def make(one, place, kind=kind):
            if one["label"] not in ("yes", "no"):
                raise ValueError(f"label {one['label']!r} is neither yes nor no")
            return Item(
                f"{kind}/{one['question_id']}",
                one["text"],
                (one["label"],),
                kind,
                one["image"],
                (picture(pictures, one["image"], f"val2014/{one['image']}"),),
            )

        reading.collect(read_records(path), make)
    return reading


def mme(data, pictures, split):
    """MME: a folder per task; in it or in `questions_answers_YN`, a text file per picture: question TAB Yes|No, twice."""
    reading, folders = Reading(), sorted(path for path in Path(data).iterdir() if path.is_dir())
    for folder in folders:
        for file in sorted(folder.glob("questions_answers_YN/*.txt")) or sorted(folder.glob("*.txt")):
            lines = [line for line in read_text(file).split("\n") if line.strip()]
            base = Path(pictures) / folder.name if Path(pictures) != Path(data) else folder
            path = picture(
                base, *(f"{sub}{file.stem}{end}" for sub in ("images/", "") for end in (".jpg", ".png", ".jpeg"))
            )

            def make(line, place, folder=folder, file=file, path=path):
                question, _, truth = line.rstrip("\r").rpartition("\t")
                if truth.strip().lower() not in ("yes", "no"):
                    raise ValueError(f"no question, tabulator and Yes or No: {line!r}")
                name = f"{folder.name}/{file.stem}"
                return Item(f"{name}/{place}", question, (truth.strip().lower(),), folder.name, name, (path,))

            reading.collect([(f"{file}, line {n}", line) for n, line in enumerate(lines, 1)], make)
    return reading


def open_vqa(data, pictures, split):
    """Open-VQA, pictures or videos: JSON lines whose answer is a list."""

    def make(one, place):
        if not isinstance(one["answer"], list):
            raise ValueError(f"answer {one['answer']!r} is no list")
        is_clip = "video" in one
        path = picture(pictures, one["video"] if is_clip else one["image"])
        return Item(
            str(one["index"]),
            one["question"],
            tuple(one["answer"]),
            one.get("class", ""),
            media=(path,),
            is_clip=is_clip,
        )

    return Reading().collect(read_records(find(data, f"*{split or 'images'}*.jsonl*", "*.jsonl*", split=split)), make)


def open_vqa_video(data, pictures, split):
    """The videos of Open-VQA."""
    return open_vqa(data, pictures, split or "videos")


def mm_vet(data, pictures, split):
    """MM-Vet: an object of questions by id; <AND> and <OR> stand between parts of an answer."""
    path = find(data, "mm-vet.json", "*.json")

    def make(pair, place):
        id, one = pair
        kind = "+".join(sorted(one.get("capability", ())))
        return Item(
            id, one["question"], (one["answer"],), kind, media=(picture(pictures, one["imagename"]),), submit=id
        )

    return Reading().collect([(f"{path}, question {id}", (id, one)) for id, one in read_json(path).items()], make)


def owl_eval(data, pictures, split):
    """OwlEval: JSON lines {image, question_id, question, category: list}; there is no true answer."""

    def make(one, place):
        kind = "+".join(one.get("category", ()))
        return Item(str(one["question_id"]), one["question"], (), kind, media=(picture(pictures, one["image"]),))

    return Reading().collect(read_records(find(data, "*questions*.jsonl", "*.jsonl")), make)


def visit_bench(data, pictures, split):
    """VisIT-Bench: a table; one address of a picture, or a list of them in JSON. Pictures are looked up by their names."""
    path = find(data, "*multi_images*.csv", "*.csv", split=split)

    def make(row, place):
        links = row.get("images") or row.get("image_url") or row["image"]
        links = json.loads(links) if links.startswith("[") else [links]
        truth = row.get("reference_output") or row.get("output_human_annotated") or ""
        media = tuple(picture(pictures, link.rpartition("/")[2]) for link in links)
        return Item(str(place), row["instruction"], (truth,) if truth else (), row["instruction_category"], media=media)

    rows = csv.DictReader(io.StringIO(read_text(path)))
    return Reading().collect([(f"{path}, record {n}", row) for n, row in enumerate(rows, 1)], make)


def easy_vqa(data, pictures, split):
    """easy-VQA's test questions, from its package."""
    return from_source(EasyVQA(split or "test"))


def scenes(data, pictures, split):
    """A thousand held-out drawn scenes: "new", "unseen_pairs" or "reading"."""
    return from_source(Scenes(split or "new", length=1000))


def from_source(source):
    """The first epoch of a source of records: Reading."""
    reading = Reading()
    for n in range(len(source)):
        record = source.record(n)
        media = tuple(visual.frames[0] for visual in record.visuals)
        for place, turns in enumerate(record.conversations):
            reading.items.append(
                Item(f"{record.id}/{place}", turns[-2].text, (turns[-1].text,), record.kinds[place], media=media)
            )
    return reading


# Multiple-choice benchmarks' files as they are published, read into items; see readers.py.
#
# An item's `answers` holds the place of the right option.


csv.field_size_limit(1 << 30)  # a picture in base64 is one field


def seed_bench(data, pictures, split):
    """SEED-Bench: `questions` with choice_a … choice_d, and the names of their types."""
    content = read_json(find(data, "SEED-Bench*.json", "*.json", split=split))
    kinds = {number: name for name, number in content.get("question_type", {}).items()}

    def make(one, place):
        options = tuple(str(one[f"choice_{letter}"]) for letter in "abcd")
        is_clip = one.get("data_type", "image") != "image"
        names = (str(one["data_id"]), f"{one['data_id']}.jpg", f"{one['data_id']}.mp4", f"{one['data_id']}.webm")
        kind = kinds.get(one["question_type_id"], str(one["question_type_id"]))
        return Item(
            str(one["question_id"]),
            one["question"],
            ("ABCD".index(one["answer"]),),
            kind,
            media=(picture(pictures, *names),),
            is_clip=is_clip,
            options=options,
        )

    return Reading().collect(numbered(content["questions"], "question"), make)


def mmbench(data, pictures, split):
    """MMBench: a table with tabulators; the picture stands in it, or is named by the index of the question that has it."""
    path = find(data, "*.tsv", split=split)
    rows = list(csv.DictReader(io.StringIO(read_text(path)), delimiter="\t"))
    encoded = {row["index"]: row["image"] for row in rows if len(row.get("image") or "") > 64}

    def make(row, place):
        options = tuple(row[letter] for letter in "ABCDE" if (row.get(letter) or "").strip() not in ("", "nan"))
        image = row.get("image") or ""
        media = (Encoded(encoded.get(image, image)),) if image else ()
        hint = (row.get("hint") or "").strip()
        return Item(
            row["index"],
            row["question"],
            ("ABCDE".index(row["answer"]),) if row.get("answer") else (),
            row.get("category", ""),
            media=media,
            options=options,
            extra={"hint": "" if hint == "nan" or not hint else hint + "\n"},
            submit=int(row["index"]),
        )

    return Reading().collect([(f"{path}, row {n}", row) for n, row in enumerate(rows, 2)], make)


def science_qa(data, pictures, split):
    """ScienceQA: problems.json by id, pid_splits.json; half of the questions have no picture."""
    problems = read_json(find(data, "problems.json"))
    ids = read_json(find(data, "pid_splits.json"))[split or "test"] if Path(data).is_dir() else list(problems)

    def make(id, place):
        one = problems[id]
        path = (
            (picture(pictures, f"{split or 'test'}/{id}/{one['image']}", f"{id}/{one['image']}"),)
            if one.get("image")
            else ()
        )
        hint = (one.get("hint") or "").strip()
        return Item(
            id,
            one["question"],
            (one["answer"],),
            one.get("subject", ""),
            one.get("grade", ""),
            path,
            options=tuple(one["choices"]),
            extra={"hint": f"Context: {hint}\n" if hint else ""},
            submit=id,
        )

    return Reading().collect([(f"problem {id}", id) for id in ids], make)


def q_bench(data, pictures, split):
    """Q-Bench (LLVisionQA): a list of {img_path, question, candidates, correct_ans, concern | type}."""

    def make(one, place):
        truth = one.get("correct_ans")
        return Item(
            str(place),
            one["question"],
            (one["candidates"].index(truth),) if truth is not None else (),
            str(one.get("concern", one.get("type", ""))),
            media=(picture(pictures, one["img_path"]),),
            options=tuple(one["candidates"]),
        )

    return Reading().collect(read_records(find(data, f"*{split or 'dev'}*.json", "*.json")), make)


def mmlu(data, pictures, split):
    """MMLU: tables without head, question, A, B, C, D, letter; one file per subject."""
    folder, reading = Path(data), Reading()
    for path in (
        [folder]
        if folder.is_file()
        else sorted((folder / (split or "test")).glob("*.csv")) or sorted(folder.glob("*.csv"))
    ):
        subject = path.stem.removesuffix(f"_{split or 'test'}")

        def make(row, place, subject=subject):
            question, *options, letter = row
            return Item(
                f"{subject}/{place}", question, ("ABCD".index(letter.strip()),), subject, options=tuple(options[-4:])
            )

        rows = csv.reader(io.StringIO(read_text(path)))
        reading.collect([(f"{path}, row {n}", row) for n, row in enumerate(rows, 1)], make)
    return reading


def arc(data, pictures, split):
    """ARC: JSON lines, {id, question: {stem, choices: [{text, label}]}, answerKey}; labels are letters or digits."""

    def make(one, place):
        options = one["question"]["choices"]
        labels = [option["label"] for option in options]
        return Item(
            one["id"],
            one["question"]["stem"],
            (labels.index(one["answerKey"]),),
            options=tuple(option["text"] for option in options),
        )

    name = (split or "test").capitalize()
    return Reading().collect(read_records(find(data, f"*{name}*.jsonl", "*.jsonl")), make)
