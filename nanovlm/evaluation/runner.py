"""One evaluation from files to report, resumable at every step."""

import dataclasses
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from nanovlm.evaluation import protocols, report
from nanovlm.evaluation.items import read_records
from nanovlm.evaluation.protocols import Asked, Speaker
from nanovlm.generation.sampler import Decoding
from nanovlm.names import nearest
from nanovlm.vlit.generators import Chat, Refused
from nanovlm.vlm import VLM


JUDGE_TOKENS = 32  # a verdict, or a verdict and a mark


@dataclasses.dataclass(frozen=True)
class Wishes:
    """How a task is run; what is None or empty follows the task and the model's recipe.

    data, images: paths; images = where the pictures lie, by default the data. split: word for the benchmark's split.
    preset: name of a decoding. shots: items of the same data that stand before every question, and are not asked.
    shots_split: split from which the shots are taken instead; a question has those of its own kind, if it holds enough of
      them, as MMLU's five from "dev".
    limit: items asked at most, the first ones. judgements: path of a file {"id", "judgement"} a line.
    unrelated_image: path of a picture that goes with every question that has none: how much does it disturb the text
      (mPLUG-Owl2, arXiv:2311.04257, Table 5)?
    """

    data: str = "."
    images: str = ""
    split: str = ""
    out: str = ""
    prompt: str | None = None
    preset: str = ""
    describe_first: bool = False
    shots: int = 0
    shots_split: str = ""
    limit: int | None = None
    batch_size: int = 16
    num_frames: int = 4
    seed: int = 0
    judgements: str = ""
    unrelated_image: str = ""


def choose_preset(loaded, task, wanted=""):
    """Name of a decoding of the model's recipe: the wanted one, or the task's first that there is."""
    if wanted and wanted not in loaded.decodings:
        raise ValueError(f"unknown preset {wanted!r}.{nearest(wanted, loaded.decodings)}")
    return wanted or next((name for name in task.presets if name in loaded.decodings), "default")


def shot_answer(item, task):
    """What a shot says: the right option or its letter, or the first human answer."""
    if not item.answers:
        raise ValueError(f"question {item.id!r} has no answer and cannot be a shot")
    if item.options:
        place = item.answers[0]
        return protocols.choices.LETTERS[place] if "letter" in task.way else item.options[place]
    answer = item.answers[0]
    return answer["answer"] if isinstance(answer, dict) else answer


def choose_shots(items, task, wishes):
    """What stands before the questions.

    Returns: ({kind: list of Item}, "" = of every kind that is not named; the items that are left to ask).
    Raises: ValueError if wishes.shots_split holds too few.
    """
    number = wishes.shots
    if not (number and wishes.shots_split):
        return {"": items[:number]}, items[number:]
    other = task.read(wishes.data, wishes.images or wishes.data, wishes.shots_split).items
    other = [item for item in other if item.answers and not item.missing]
    if len(other) < number:
        raise ValueError(f"--shots {number}: the split {wishes.shots_split!r} has {len(other)} questions with answer and media")
    kinds = {kind: [item for item in other if item.kind == kind][:number] for kind in {item.kind for item in other}}
    return {"": other[:number]} | {kind: several for kind, several in kinds.items() if len(several) == number}, items


def make_speaker(loaded, task, wishes, shots, preset):
    """The Speaker of a run; shots: of `choose_shots`."""
    if not isinstance(loaded.model, VLM):
        raise ValueError(f"a {type(loaded.model).__name__} cannot be asked; give the folder of a vision-language model")
    describe = loaded.decodings.get("describe", loaded.decodings[preset]) if wishes.describe_first else None
    said = {
        kind: tuple((protocols.put(item, task), shot_answer(item, task)) for item in several) for kind, several in shots.items()
    }
    return Speaker(
        loaded, loaded.decodings[preset], describe, said.pop(""), wishes.num_frames, wishes.seed, task.border, said
    )


def disturbed(items, path):
    """Items with a picture that has nothing to do with them, where they have none; path "" = as they are."""
    if path and not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such image")
    return [item if item.media or not path else dataclasses.replace(item, media=(Path(path),)) for item in items]


def answers(batch, speaker, task, problems):
    """Predictions of a batch. If it breaks, its items are asked alone, and those that break become problems.

    problems: list of str, which receives a damaged picture or a question that is too long.
    """
    try:
        return list(task.protocol(batch, speaker, task, len(batch)))
    except ValueError as error:
        if len(batch) == 1:
            problems.append(f"{batch[0].id}: {error}")
            return []
    return [one for item in batch for one in answers([item], speaker, task, problems)]


def run(name, task, loaded, model_name, wishes, judge=None):
    """Ask everything that has no answer yet, then write the report.

    Args:
      name, task: of tasks.TASKS. loaded: recipes.Loaded. model_name: str for the report.
      judge: function list of prompts -> list of texts, for `protocols.judged`; None = only wishes.judgements.
    Returns: list of str, what to print.
    Raises: FileNotFoundError or ValueError, in words for the user, before anything is asked.
    """
    task = task if wishes.prompt is None else dataclasses.replace(task, prompt=wishes.prompt)
    reading = task.read(wishes.data, wishes.images or wishes.data, wishes.split)
    if not reading.items:
        words = f"; the first of {len(reading.problems)} problems: {reading.problems[0]}" if reading.problems else ""
        raise ValueError(f"{wishes.data} holds no question of {name}{words}")
    there = [item for item in reading.items if not item.missing]
    shots, rest = choose_shots(there, task, wishes)
    missing = {item.id: [str(path) for path in item.missing] for item in reading.items if item.missing}
    items = disturbed(task.prepare(rest[: wishes.limit]), wishes.unrelated_image)
    preset = choose_preset(loaded, task, wishes.preset)
    settings = {
        "task": name, "model": model_name, "data": str(wishes.data), "split": wishes.split, "prompt": task.prompt,
        "preset": preset, "decoding": dataclasses.asdict(loaded.decodings[preset]), "describe_first": wishes.describe_first,
        "shots": sorted({item.id for several in shots.values() for item in several}), "num_frames": wishes.num_frames, "seed": wishes.seed,
        "unrelated_image": wishes.unrelated_image,
    }  # fmt: skip
    settings = json.loads(json.dumps(settings))  # as they come back from the file
    speaker = make_speaker(loaded, task, wishes, shots, preset) if items else None
    out = Path(wishes.out)
    out.mkdir(parents=True, exist_ok=True)
    file = PredictionFile(out / "predictions.jsonl", settings)
    done = file.done()
    left = [item for item in items if item.id not in done]
    with tqdm(desc=name, total=len(items), initial=len(items) - len(left), disable=None, unit="question") as bar:
        for batch in protocols.batches(left, wishes.batch_size):
            for one in answers(batch, speaker, task, reading.problems):
                file.add(one)
            bar.update(len(batch))
    if items and not file.predictions:
        raise ValueError(f"no question of {name} could be put; the first problem: {reading.problems[-len(items)]}")
    asked = {item.id for item in items}
    predictions = [one for one in file.predictions if one["id"] in asked]
    if task.protocol is protocols.judged:
        predictions = judge_answers(predictions, task, judge, out / "judgements.jsonl", wishes)
    pictures = {item.id: item.media[0] for item in items if item.media and not item.is_clip}
    return report.write(out, settings, task, predictions, missing, reading.problems, pictures)


def judge_answers(predictions, task, judge, path, wishes):
    """Predictions with their judgements; those already in the file, or in wishes.judgements, are not asked for again.

    Answers without a judgement stay without a score; their prompts go to judge_prompts.jsonl beside the file.
    """
    sources = [source for source in (wishes.judgements, path) if source and Path(source).exists()]
    if wishes.judgements and not Path(wishes.judgements).exists():
        raise FileNotFoundError(f"{wishes.judgements}: no such file of judgements")
    told = {}
    for source in sources:
        for where, record in read_records(source):
            if not isinstance(record, dict) or not {"id", "judgement"} <= record.keys():
                raise ValueError(f"{where}: no object with id and judgement")
            told[record["id"]] = record["judgement"]
    found = []
    for batch in protocols.batches(predictions, wishes.batch_size):
        known = [one for one in batch if one["id"] in told]
        new = [one for one in batch if one["id"] not in told]
        known = protocols.judge_all(
            known, task, lambda prompts, known=known: [told[o["id"]] for o in known if o["judge_prompt"]]
        )
        if judge is not None:
            new = protocols.judge_all(new, task, judge)
            with open(path, "a") as file:
                file.writelines(
                    json.dumps({"id": o["id"], "judgement": o["judgement"]}) + "\n" for o in new if "judgement" in o
                )
        judged = {one["id"]: one for one in known + new}
        found += [judged[one["id"]] for one in batch]
    waiting = [one for one in found if one["judge_prompt"] and "judgement" not in one]
    lines = [json.dumps({"id": one["id"], "prompt": one["judge_prompt"]}) + "\n" for one in waiting]
    (path.parent / "judge_prompts.jsonl").write_text("".join(lines))
    return found


def generator_judge(generator):
    """Any generator of vlit/generators.py as the judge: function list of prompts -> list of texts, at temperature 0.

    A prompt that it refuses gets no words, which no parser reads: it is counted as unparsed.
    """

    def ask(prompt):
        chat = Chat((("user", prompt),))
        try:
            return generator.generate([chat], n=1, temperature=0.0, max_tokens=JUDGE_TOKENS, seed=0, stop=())[0][0]
        except Refused:
            return ""

    def judge(prompts):
        with ThreadPoolExecutor(generator.workers) as pool:
            return list(pool.map(ask, prompts))

    return judge


def local_judge(loaded):
    """A model of this project as the judge: function list of prompts -> list of texts, greedy."""
    speaker = Speaker(loaded, Decoding(max_new_tokens=JUDGE_TOKENS))
    return lambda prompts: speaker.replies([Asked(str(place), text) for place, text in enumerate(prompts)])


# predictions.jsonl: what a model answered, one line each, so that a run can be stopped at any time and taken up again.


class PredictionFile:
    """Predictions on disk. The first line holds the settings; a run with other settings is refused.

    Args:
      path: Path. settings: dict, all that the answers depend on.
    Raises: ValueError if the file belongs to other settings, naming the first that differs, or if a line is broken.
    """

    def __init__(self, path, settings):
        self.path, self.predictions = path, []
        if not path.exists():
            path.write_text(json.dumps({"settings": settings}) + "\n")
            return
        text = path.read_text()
        lines = text.split("\n")
        if lines[-1]:  # the run ended while it wrote this line
            os.truncate(path, len(text.encode()) - len(lines[-1].encode()))
        try:
            head, *self.predictions = [json.loads(line) for line in lines[:-1]]
            found = head["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no file of predictions ({error}); give another --out, or delete it") from error
        for name in settings.keys() | found.keys():
            if settings.get(name) != found.get(name):
                raise ValueError(
                    f"{path} was made with {name} {found.get(name)!r}, now it is {settings.get(name)!r}; give another --out"
                )

    def done(self):
        """Ids that have an answer: set of str."""
        return {one["id"] for one in self.predictions}

    def add(self, prediction):
        """Write one down; it is in the file when this returns."""
        self.predictions.append(prediction)
        with open(self.path, "a") as file:
            file.write(json.dumps(prediction, ensure_ascii=True) + "\n")
