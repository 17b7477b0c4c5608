"""One evaluation from files to report, resumable at every step."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from nanovlm.evaluation import protocols, report
from nanovlm.evaluation.protocols import LETTERS, Asker, put
from nanovlm.evaluation.tasks import TASKS
from nanovlm.files import JsonLines
from nanovlm.generation.answer import check_speaks

JUDGE_TOKENS = 32  # a verdict, or a verdict and a mark
JUDGE_REQUESTS = 4  # under way at once


def run(args, loaded, judge=None):
    """Ask everything that has no answer yet, then write the report: (list of str to print, int number of answers).

    args: the flags of `python -m nanovlm.evaluation TASK`. loaded: chat.Assistant.
    judge: function list of prompts -> list of texts, for `protocols.judged`; None = only args.judgements.
    Raises: FileNotFoundError or ValueError, in words for the user, before anything is asked.
    """
    task, name, out = TASKS[args.task], args.task, Path(args.out)
    check_speaks(loaded.model)
    preset = args.preset or next((preset for preset in task.presets if preset in loaded.decodings), "default")
    decoding, form = loaded.preset(preset), None
    if task.protocol in (protocols.short_answer, protocols.caption) and preset in loaded.forms:
        form = loaded.forms[preset]
        loaded, task = replace(loaded, template=form.template), replace(task, prompt=form.prompt)
    if args.prompt is not None:
        task = replace(task, prompt=args.prompt)
    reading = read(task, args, args.split)
    number, there = args.shots or (form.text_shots if form else 0), [item for item in reading.items if not item.missing]
    shots, items = choose_shots(there, task, args, number)
    items = task.prepare(items[: args.limit])
    if unrelated := args.unrelated_image:
        if not Path(unrelated).exists():
            raise FileNotFoundError(f"{unrelated}: no such image")
        items = [item if item.media else replace(item, media=(Path(unrelated),)) for item in items]
    told = {}  # kind -> [(Item, answer)]; shots of the form come without their pictures
    for kind, several in shots.items():
        several = several if args.shots else [replace(item, media=()) for item in several]
        told[kind] = [(put(item, task), shot_answer(item, task)) for item in several]
    names = ("task", "data", "split", "describe_first", "num_frames", "seed", "unrelated_image")
    settings = {name: vars(args)[name] for name in names} | {
        "model": Path(args.model).name, "prompt": task.prompt, "preset": preset, "decoding": asdict(decoding),
        "shots": sorted({item.id for several in shots.values() for item in several}),
    }  # fmt: skip
    describe = loaded.decodings.get("describe", decoding) if args.describe_first else None
    asker = Asker(loaded, decoding, describe, told, args.num_frames, args.seed, task.border, form.stop if form else ())

    out.mkdir(parents=True, exist_ok=True)
    file = JsonLines(out / "predictions.jsonl", {"settings": settings})
    done = {one["id"] for one in file}
    left = [item for item in items if item.id not in done]
    with tqdm(desc=name, total=len(items), initial=len(items) - len(left), disable=None, unit="question") as bar:
        for start in range(0, len(left), args.batch_size):
            batch = left[start : start + args.batch_size]
            file.add(*answers(batch, asker, task, reading.problems))
            bar.update(len(batch))
    asked = {item.id for item in items}
    predictions = [one for one in file if one["id"] in asked]
    if items and not predictions:
        raise ValueError(f"no question of {name} could be put; the first problem: {reading.problems[-len(items)]}")
    if task.protocol is protocols.judged:
        prompts = {one["id"]: one["judge_prompt"] for one in predictions if one["judge_prompt"]}
        said = protocols.ask_judge(prompts, judge, args.judgements, out, args.batch_size)
        for one in (one for one in predictions if prompts.get(one["id"]) and one["id"] in said):
            one |= {"judgement": said[one["id"]]} | protocols.judgement(said[one["id"]], task.way)
    return report.write(out, settings, task, predictions, reading, items), len(predictions)


def read(task, args, split):
    """The benchmark's files as the flags name them: items.Reading. Raises: ValueError if they hold no question."""
    pictures = args.images or args.data
    reading = task.read(args.data, pictures, split).with_pictures(pictures)
    if not reading.items:
        first = f"; the first of {len(reading.problems)} problems: {reading.problems[0]}" if reading.problems else ""
        raise ValueError(f"{args.data} holds no question of {args.task}{first}")
    return reading


def choose_shots(items, task, args, number):
    """What stands before the questions: ({kind: list of Item}, "" = of every other kind; the items left to ask)."""
    if not (number and args.shots_split):
        return {"": items[:number]}, items[number:]
    other = read(task, args, args.shots_split).items
    other = [item for item in other if item.answers and not item.missing]
    if len(other) < number:
        found = f"the split {args.shots_split!r} has {len(other)} questions with answer and media"
        raise ValueError(f"--shots {number}: {found}")
    kinds = {kind: [item for item in other if item.kind == kind][:number] for kind in {item.kind for item in other}}
    return {"": other[:number]} | {kind: several for kind, several in kinds.items() if len(several) == number}, items


def shot_answer(item, task):
    """What a shot says: the right option or its letter, or the first human answer."""
    if not item.answers:
        raise ValueError(f"question {item.id!r} has no answer and cannot be a shot")
    answer = item.answers[0]
    if item.options:
        return LETTERS[answer] if "letter" in task.way else item.options[answer]
    return answer["answer"] if isinstance(answer, dict) else answer


def answers(batch, asker, task, problems):
    """Predictions of a batch. If it breaks, its items are asked alone; those that break alone become problems."""
    try:
        return protocols.predictions(batch, asker, task)
    except ValueError as error:
        if len(batch) == 1:
            problems.append(f"{batch[0].id}: {error}")
            return []
    return [one for item in batch for one in answers([item], asker, task, problems)]


def endpoint_judge(name):
    """A model behind $OPENAI_BASE_URL as the judge: function list of prompts -> list of texts, at temperature 0.

    A prompt that the server refuses (too long, filtered) gets no words, which no parser reads: it counts as unparsed.
    """
    try:
        import openai
    except ImportError as error:
        raise ImportError("--judge-endpoint needs the package openai: pip install openai") from error
    client = openai.OpenAI(api_key=os.environ.get("OPENAI_API_KEY", "none"), max_retries=5)

    def ask(prompt):
        asked = {"model": name, "messages": [{"role": "user", "content": prompt}]}
        try:
            found = client.chat.completions.create(**asked, temperature=0, max_tokens=JUDGE_TOKENS, seed=0)
            return found.choices[0].message.content or ""
        except (openai.BadRequestError, openai.UnprocessableEntityError):
            return ""
        except openai.OpenAIError as error:
            raise OSError(f"{client.base_url} does not judge: {error}") from error

    def judge(prompts):
        with ThreadPoolExecutor(JUDGE_REQUESTS) as pool:
            return list(pool.map(ask, prompts))

    return judge
