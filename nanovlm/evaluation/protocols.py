"""The five ways in which benchmarks question a model, each one function.

    short_answer   a few words, compared with what people said      VQAv2, GQA, TextVQA, VizWiz, video QA, easy-VQA
    caption        a sentence, compared with several references     COCO, Flickr30k
    yes_no         one of two words                                 POPE, MME
    choice         one of several options, by likelihood or letter  SEED-Bench, MMBench, ScienceQA, MMLU, ARC
    judged         free words that another model judges             Open-VQA, MM-Vet

Each takes items, a Speaker and the Task, and yields one prediction per item in batches:
    {"id", "kind", "group", "question", "answers", "prediction", "score": 0 to 1 or None, …}
so that a run can be written down, stopped and taken up again. `tasks.TASKS` says which benchmark is put how.
"""

import dataclasses
import itertools
from pathlib import Path

from nanovlm.evaluation import choice as choices
from nanovlm.evaluation.judge import GRADED, IMPLIES, WITH_SCORE, judge_prompt, parse_score, parse_share, parse_verdict
from nanovlm.evaluation.short_answer import exact_match
from nanovlm.evaluation.speaker import Asked
from nanovlm.evaluation.vqa_accuracy import vqa_accuracy

SCORES = {  # name -> function (prediction str, answers) -> float between 0 and 1
    "vqa": vqa_accuracy,
    "vqa_official": lambda said, answers: vqa_accuracy(said, answers, "official"),
    "exact": lambda said, answers: float(any(exact_match(said, answer) for answer in answers)),
    "lower": lambda said, answers: float(any(said.strip().lower() == answer.strip().lower() for answer in answers)),
}


def put(item, task):
    """The words of a question in the form of the task: Asked."""
    words = {"question": item.question, "options": choices.listed(item.options)} | item.extra
    text = task.prompt
    pieces = []
    while text:  # one pass, so that braces in a question are words
        before, brace, rest = text.partition("{")
        name, _, text = rest.partition("}")
        pieces += [before, str(words.get(name, "")) if brace else ""]
    return Asked(item.id, "".join(pieces).strip(), item.media, item.is_clip, item.kind)


def batches(items, size):
    """Lists of at most `size` items."""
    items = iter(items)
    return iter(lambda: list(itertools.islice(items, size)), [])


def prediction(item, text, score, **more):
    """What is written down about an answer: dict."""
    told = {
        "id": item.id,
        "kind": item.kind,
        "group": item.group,
        "question": item.question,
        "answers": list(item.answers),
    }
    media = [str(one) for one in item.media if isinstance(one, Path)]
    submit = {} if item.submit is None else {"submit": item.submit}
    return told | {"prediction": text, "score": score, "media": media} | submit | more


def short_answer(items, speaker, task, batch_size=16):
    """A few words, scored by `task.score` of SCORES; without human answers (a test split) there is no score."""
    score = SCORES[task.score]
    for batch in batches(items, batch_size):
        for item, said in zip(batch, speaker.replies([put(item, task) for item in batch])):
            yield prediction(item, said, score(said, item.answers) if item.answers else None)


def caption(items, speaker, task, batch_size=16):
    """A sentence about a picture; CIDEr and the like need the whole corpus, so there is no score yet."""
    for batch in batches(items, batch_size):
        for item, said in zip(batch, speaker.replies([put(item, task) for item in batch])):
            yield prediction(item, said, None)


def yes_no(items, speaker, task, batch_size=16):
    """Yes or no, read by `task.parse`; "said" is "yes", "no" or "other"."""
    for batch in batches(items, batch_size):
        for item, text in zip(batch, speaker.replies([put(item, task) for item in batch])):
            said = task.parse(text)
            yield prediction(item, text, float(said == item.answers[0]), said=said)


def choice(items, speaker, task, batch_size=16):
    """One of several options; item.answers holds the place of the right one.

    task.way: "likelihood" (of the option's words, summed over tokens), "likelihood_mean", "likelihood_letter" (of the
    letter that stands before the option), or "letter", which the model writes and `task.parse` reads.
    "said" is the place of the option, None if none could be read.
    """
    for batch in batches(items, batch_size):
        asked = [put(item, task) for item in batch]
        if task.way == "letter":
            found = [(text, task.parse(text, item.options)) for text, item in zip(speaker.replies(asked), batch)]
            found = [(text, place, {}) for text, place in found]
        else:
            column = 1 if task.way == "likelihood_mean" else 0
            options = [choices.LETTERS[: len(one.options)] for one in batch]
            if task.way != "likelihood_letter":
                options = [one.options for one in batch]
            losses = [[one[column] for one in several] for several in speaker.losses(asked, options)]
            places = [several.index(min(several)) for several in losses]
            found = [(one.options[p], p, {"losses": several}) for one, p, several in zip(batch, places, losses)]
        for item, (text, place, more) in zip(batch, found):
            score = float(place == item.answers[0]) if item.answers else None
            yield prediction(item, text, score, said=place, options=list(item.options), **more)


def judged(items, speaker, task, batch_size=16, judge=None):
    """Free words and what a judge says about them.

    judge: function list of prompts -> list of its answers; None = the prompts are written down for a later judgement.
    """
    for batch in batches(items, batch_size):
        replies = speaker.replies([put(item, task) for item in batch])
        done = [
            prediction(item, said, None, judge_prompt=ask_judge(item, said, task)) for item, said in zip(batch, replies)
        ]
        yield from done if judge is None else judge_all(done, task, judge)


def ask_judge(item, said, task):
    """The judge's prompt, or "" where there is no true answer (OwlEval)."""
    form = {"score": WITH_SCORE, "share": GRADED}.get(task.way, IMPLIES)
    return judge_prompt(item.question, said, " or ".join(item.answers), form) if item.answers else ""


def judge_all(predictions, task, judge):
    """Predictions with the judge's words, verdict and score; what was judged already stays as it is: list of dict."""
    open_ones = [one for one in predictions if one["judge_prompt"] and "judgement" not in one]
    words = iter(judge([one["judge_prompt"] for one in open_ones]) if open_ones else ())
    found = []
    for one in predictions:
        if one["judge_prompt"] and "judgement" not in one:
            text = next(words)
            one = one | {"judgement": text} | judgement(text, task.way)
        found.append(one)
    return found


def judgement(text, way):
    """What a judge's words mean: {"verdict": True, False or None = unreadable, "mark": number or None, "score": 0 to 1}."""
    if way == "share":
        share = parse_share(text)
        return {"verdict": None if share is None else share == 1, "mark": share, "score": share or 0.0}
    verdict, mark = parse_score(text) if way == "score" else (parse_verdict(text), None)
    return {"verdict": verdict, "mark": mark, "score": float(verdict is True)}


def rotated(items):
    """Every question as many times as it has options, each rotated by one more: circular evaluation. List of Item."""
    return [
        dataclasses.replace(item, id=f"{item.id}#{turn}", options=tuple(options), answers=(place,), group=item.id)
        for item in items
        for turn, (options, place) in enumerate(
            choices.rotations(list(item.options), item.answers[0] if item.answers else 0)
        )
    ]


def once(items):
    """Every question once: list of Item."""
    return list(items)
