"""The benchmarks' files as they are published, read into items. One function per format.

Each takes the folder (or file) of the questions, the folder of the pictures, and the split, and gives a Reading.
"""

import csv
import functools
import io
import json
from pathlib import Path

from nanovlm.data import images
from nanovlm.data.easy_vqa import EasyVQA
from nanovlm.data.scene_questions import Scenes
from nanovlm.evaluation.items import coco_picture, find, Item, picture, read_json, read_records, read_text, Reading
from nanovlm.files import listing

csv.field_size_limit(1 << 30)  # a picture in base64 is one field


def rows(path, make=csv.DictReader, **form):
    """(where, row) pairs of a table; make, form: of Python's csv."""
    return [(f"{path}, record {n}", row) for n, row in enumerate(make(io.StringIO(read_text(path)), **form), 1)]


def members(path):
    """(where, (id, question)) pairs of one object of questions by id."""
    return [(f"{path}, question {id}", (id, one)) for id, one in read_json(path).items()]


def reads(*patterns, split="", records=read_records):
    """Makes a reader of one file from what makes an item of one of its records.

    patterns: of the file's name, {0} being the split, {1} with a capital; the first that fits counts. split: the usual.
    records: function path -> (where, record) pairs.
    """

    def reader(make):
        @functools.wraps(make)
        def read(data, pictures, wanted):
            name = wanted or split
            path = find(data, *(pattern.format(name, name.capitalize()) for pattern in patterns), split=wanted)
            return Reading().collect(records(path), lambda one, place: make(one, place, pictures))

        return read

    return reader


# A few words, or a sentence


def vqa(data, pictures, split):
    """VQA format: `questions`, and `annotations` with ten answers each, in two files; TextVQA, VizWiz come so too."""
    questions = read_json(find(data, "*questions*.json*", "*[Qq]uestions*", split=split))["questions"]
    try:
        annotations = read_json(find(data, "*annotations*.json*", split=split))["annotations"]
    except FileNotFoundError:
        annotations = []  # a test split
    truths = {one["question_id"]: one for one in annotations}

    def make(one, place):
        id, image = one["question_id"], one["image_id"]
        if truths and id not in truths:
            raise ValueError(f"question {id} has no annotation")
        truth = truths.get(id, {})
        if isinstance(image, int):
            path = coco_picture(pictures, image, split or "val")
        else:
            path = picture(pictures, image, f"{image}.jpg", f"{image}.png")
        kind = truth.get("answer_type") or truth.get("question_type", "")
        return Item(str(id), one["question"], tuple(truth.get("answers") or ()), kind, media=(path,), submit=id)

    return Reading().collect(questions, make, "question")


def text_vqa(data, pictures, split):
    """TextVQA's own file, {"data": [...]}; beside it, if there, the Rosetta OCR tokens."""
    questions = read_json(find(data, "TextVQA_0*.json", split=split))["data"]
    try:
        rosetta = read_json(find(data, "TextVQA_Rosetta*.json", split=split))["data"]
    except (FileNotFoundError, KeyError):
        rosetta = []  # the task without OCR tokens needs none
    ocr = {one["image_id"]: one.get("ocr_tokens", []) for one in rosetta}

    def make(one, place):
        id, image, answers = one["question_id"], one["image_id"], tuple(one.get("answers") or ())
        extra = {"ocr": ", ".join(one.get("ocr_tokens") or ocr.get(image, []))}
        path = picture(pictures, f"{image}.jpg", f"{image}.png")
        return Item(str(id), one["question"], answers, media=(path,), extra=extra, submit=id)

    return Reading().collect(questions, make, "question")


@reads("{0}.json", "*.json", split="val")
def vizwiz(one, place, pictures):
    """VizWiz's own file: a list of {image, question, answers}."""
    image, answers = one["image"], tuple(one.get("answers") or ())
    media = (picture(pictures, image),)
    return Item(image, one["question"], answers, one.get("answer_type", ""), media=media, submit=image)


@reads("*{0}_balanced_questions.json", "*questions*.json", split="testdev", records=members)
def gqa(pair, place, pictures):
    """GQA: an object of questions by id."""
    id, one = pair
    answers, kind = (one["answer"],) if "answer" in one else (), one.get("types", {}).get("structural", "")
    return Item(id, one["question"], answers, kind, media=(picture(pictures, f"{one['imageId']}.jpg"),), submit=id)


@reads("*{0}*.json*", "*.json*", split="test")
def video_qa(one, place, pictures):
    """MSVD-QA and MSRVTT-QA: a list of {id, question, answer, video | video_id | video_name}."""
    name = str(one.get("video") or one.get("video_name") or one["video_id"])
    names = [f"{stem}{ending}" for stem in (name, f"video{name}") for ending in (".mp4", ".avi", ".gif")]
    media = (picture(pictures, name, *names),)
    id = str(one.get("id", f"{name}: {one['question']}"))
    return Item(id, one["question"], (one["answer"],), media=media, is_clip=True)


def captions(data, pictures, split):
    """COCO's `images` and `annotations`, or Karpathy's `images` with `sentences` (dataset_coco, dataset_flickr30k)."""
    content = read_json(find(data, "dataset_*.json", "*captions*.json", split=split))
    references = {}
    for one in content.get("annotations", ()):
        references.setdefault(one["image_id"], []).append(one["caption"])

    def make(one, place):
        sentences = [sentence["raw"] for sentence in one.get("sentences", ())] or references.get(one.get("id"), ())
        if not sentences:
            raise ValueError(f"picture {one.get('id', place)} has no caption")
        name = one.get("filename") or one["file_name"]
        id = one.get("cocoid", one.get("id", one.get("imgid", name)))
        media = (picture(pictures, name, f"{one.get('filepath', '')}/{name}"),)
        return Item(str(id), "", tuple(sentences), media=media, submit=id)

    split = split or "test"
    chosen = [one for one in content["images"] if one.get("split", split) == split]
    return Reading().collect(chosen, make, "picture")


def easy_vqa(data, pictures, split):
    """easy-VQA's test questions, from its package."""
    return from_source(EasyVQA(split or "test"))


def scenes(data, pictures, split):
    """A thousand held-out drawn scenes: "new", "unseen_pairs" or "reading"."""
    return from_source(Scenes(split or "new", length=1000))


def from_source(source):
    """The first epoch of a source of records: Reading."""
    reading = Reading()
    for record in map(source.record, range(len(source))):
        media = tuple(visual.frames[0] for visual in record.visuals)
        for place, (kind, turns) in enumerate(zip(record.kinds, record.conversations)):
            question, answer = turns[-2].text, turns[-1].text
            reading.items.append(Item(f"{record.id}/{place}", question, (answer,), kind, media=media))
    return reading


# Yes or no


def pope(data, pictures, split):
    """POPE: three files of JSON lines named .json; the kind is the split of the objects."""
    folder, reading = Path(data), Reading()
    paths = [path for path in listing(folder, "*pope_*.json*") if split in path.name]
    for path in [folder] if folder.is_file() else paths:
        kind = next((name for name in ("random", "popular", "adversarial") if name in path.name), path.stem)

        def make(one, place):
            label, image = one["label"].strip().lower(), one["image"]
            if label not in ("yes", "no"):
                raise ValueError(f"label {label!r} is neither yes nor no")
            media = (picture(pictures, image, f"val2014/{image}"),)
            return Item(f"{kind}/{one['question_id']}", one["text"], (label,), kind, image, media)

        reading.collect(read_records(path), make)
    return reading


def mme(data, pictures, split):
    """MME: a folder per task; there or in `questions_answers_YN`, a text per picture: question TAB Yes|No, twice."""
    reading = Reading()
    for folder in filter(Path.is_dir, listing(data)):
        base = folder if Path(pictures) == Path(data) else Path(pictures, folder.name)
        for file in listing(folder, "questions_answers_YN/*.txt") or listing(folder, "*.txt"):
            names = [f"{sub}{file.stem}{end}" for sub in ("images/", "") for end in (".jpg", ".png", ".jpeg")]
            media, group = (picture(base, *names),), f"{folder.name}/{file.stem}"

            def make(line, place):
                question, _, truth = line.rstrip("\r").rpartition("\t")
                truth = truth.strip().lower()
                if truth not in ("yes", "no"):
                    raise ValueError(f"no question, tabulator and Yes or No: {line!r}")
                return Item(f"{group}/{place}", question, (truth,), folder.name, group, media)

            lines = [line for line in read_text(file).split("\n") if line.strip()]
            reading.collect([(f"{file}, line {n}", line) for n, line in enumerate(lines, 1)], make)
    return reading


# Free answers for a judge


@reads("*{0}*.jsonl*", "*.jsonl*", split="images")
def open_vqa(one, place, pictures):
    """Open-VQA, pictures or videos: JSON lines whose answer is a list."""
    answers, is_clip = one["answer"], "video" in one
    if not isinstance(answers, list):
        raise ValueError(f"answer {answers!r} is no list")
    media = (picture(pictures, one["video" if is_clip else "image"]),)
    return Item(str(one["index"]), one["question"], tuple(answers), one.get("class", ""), media=media, is_clip=is_clip)


def open_vqa_video(data, pictures, split):
    """The videos of Open-VQA."""
    return open_vqa(data, pictures, split or "videos")


@reads("mm-vet.json", "*.json", records=members)
def mm_vet(pair, place, pictures):
    """MM-Vet: an object of questions by id; <AND> and <OR> stand between parts of an answer."""
    id, one = pair
    kind, media = "+".join(sorted(one.get("capability", ()))), (picture(pictures, one["imagename"]),)
    return Item(id, one["question"], (one["answer"],), kind, media=media, submit=id)


@reads("*questions*.jsonl", "*.jsonl")
def owl_eval(one, place, pictures):
    """OwlEval: JSON lines {image, question_id, question, category: list}; there is no true answer."""
    kind, media = "+".join(one.get("category", ())), (picture(pictures, one["image"]),)
    return Item(str(one["question_id"]), one["question"], (), kind, media=media)


@reads("*multi_images*.csv", "*.csv", records=rows)
def visit_bench(row, place, pictures):
    """VisIT-Bench: a table; one address of a picture, or a list in JSON. Pictures are looked up by their names."""
    links = row.get("images") or row.get("image_url") or row["image"]
    links = json.loads(links) if links.startswith("[") else [links]
    media = tuple(picture(pictures, link.rpartition("/")[2]) for link in links)
    truth = row.get("reference_output") or row.get("output_human_annotated")
    id = f"{', '.join(one.name for one in media)}: {row['instruction']}"  # some of its tables have a row per answer
    return Item(id, row["instruction"], (truth,) if truth else (), row["instruction_category"], media=media)


# Multiple choice: an item's `answers` holds the place of the right option


def right(letter, letters):
    """(the place of the right option,), () where the file tells none. Raises: ValueError for what is no such letter."""
    found = str(letter or "nan").strip().upper()
    if found == "NAN":
        return ()
    if len(found) != 1 or found not in letters:
        raise ValueError(f"answer {letter!r} is none of the letters {letters}")
    return (letters.index(found),)


def seed_bench(data, pictures, split):
    """SEED-Bench: `questions` with choice_a … choice_d, and the names of their types."""
    content = read_json(find(data, "SEED-Bench*.json", "*.json", split=split))
    kinds = {number: name for name, number in content.get("question_type", {}).items()}

    def make(one, place):
        name, kind = str(one["data_id"]), one["question_type_id"]
        return Item(
            str(one["question_id"]), one["question"], right(one["answer"], "ABCD"), kinds.get(kind, str(kind)),
            media=(picture(pictures, name, *(name + ending for ending in (".jpg", ".mp4", ".webm"))),),
            is_clip=one.get("data_type", "image") != "image",
            options=tuple(str(one[f"choice_{letter}"]) for letter in "abcd"),
        )  # fmt: skip

    return Reading().collect(content["questions"], make, "question")


ROTATED = 1_000_000  # MMBench's circular files: question n rotated by k options has the index n + k · ROTATED


def mmbench(data, pictures, split):
    """MMBench: a table with tabulators; the picture stands in it, or is named by the index of its question."""
    path = find(data, "*.tsv", split=split)
    found = rows(path, delimiter="\t")
    encoded = {row["index"]: row["image"] for _, row in found if len(row.get("image") or "") > 64}
    decoded = functools.cache(images.from_base64)  # rotations of a question share its picture
    is_circular = any(row["index"].partition(".")[0].isdigit() and float(row["index"]) >= ROTATED for _, row in found)

    def make(row, place):
        index, image = int(float(row["index"])), row.get("image")
        turn, question = divmod(index, ROTATED)
        hint = (row.get("hint") or "").strip()
        return Item(
            f"{question}#{turn}" if is_circular else str(index), row["question"],
            right(row.get("answer"), "ABCDE"), row.get("category", ""),
            group=str(question) if is_circular else "", media=(decoded(encoded.get(image, image)),) if image else (),
            options=tuple(row[letter] for letter in "ABCDE" if (row.get(letter) or "").strip() not in ("", "nan")),
            extra={"hint": f"{hint}\n" if hint not in ("", "nan") else ""}, submit=index,
        )  # fmt: skip

    return Reading().collect(found, make)


def science_qa(data, pictures, split):
    """ScienceQA: problems.json by id, pid_splits.json; half of the questions have no picture."""
    problems, split = read_json(find(data, "problems.json")), split or "test"
    ids = read_json(find(data, "pid_splits.json"))[split] if Path(data).is_dir() else problems

    def make(id, place):
        one = problems[id]
        image, hint = one.get("image"), (one.get("hint") or "").strip()
        media = (picture(pictures, f"{split}/{id}/{image}", f"{id}/{image}"),) if image else ()
        return Item(
            id, one["question"], (one["answer"],), one.get("subject", ""), one.get("grade", ""), media,
            options=tuple(one["choices"]), extra={"hint": f"Context: {hint}\n" if hint else ""}, submit=id,
        )  # fmt: skip

    return Reading().collect([(f"problem {id}", id) for id in ids], make)


@reads("*{0}*.json", "*.json", split="dev")
def q_bench(one, place, pictures):
    """Q-Bench (LLVisionQA): a list of {img_path, question, candidates, correct_ans, concern | type}."""
    options, truth = tuple(one["candidates"]), one.get("correct_ans")
    answers, kind = () if truth is None else (options.index(truth),), str(one.get("concern", one.get("type", "")))
    media = (picture(pictures, one["img_path"]),)
    return Item(f"{one['img_path']}: {one['question']}", one["question"], answers, kind, media=media, options=options)


def mmlu(data, pictures, split):
    """MMLU: tables without head, question, A, B, C, D, letter; one file per subject."""
    folder, split, reading = Path(data), split or "test", Reading()
    paths = listing(folder / split, "*.csv") or listing(folder, "*.csv")
    for path in [folder] if folder.is_file() else paths:
        subject = path.stem.removesuffix(f"_{split}")

        def make(row, place):
            question, *options, letter = row
            return Item(f"{subject}/{place}", question, right(letter, "ABCD"), subject, options=tuple(options[-4:]))

        reading.collect(rows(path, csv.reader), make)
    return reading


@reads("*{1}*.jsonl", "*.jsonl", split="test")
def arc(one, place, pictures):
    """ARC: JSON lines, {id, question: {stem, choices: [{text, label}]}, answerKey}; labels are letters or digits."""
    choices = one["question"]["choices"]
    answers = ([option["label"] for option in choices].index(one["answerKey"]),)
    return Item(one["id"], one["question"]["stem"], answers, options=tuple(option["text"] for option in choices))
