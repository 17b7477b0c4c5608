"""The five ways in which benchmarks question a model, each one function.

    short_answer   a few words, compared with what people said      VQAv2, GQA, TextVQA, VizWiz, video QA, easy-VQA
    caption        a sentence, compared with several references     COCO, Flickr30k
    yes_no         one of two words                                 POPE, MME
    choice         one of several options, by likelihood or letter  SEED-Bench, MMBench, ScienceQA, MMLU, ARC
    judged         free words that another model judges             Open-VQA, MM-Vet

Each takes an item, what the model said to it, and the Task, and gives (score between 0 and 1 or None, dict of what else
is written down). `tasks.TASKS` says which benchmark is put how.
"""

import json
import re
import string
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import ImageOps

from nanovlm.data import images, templates
from nanovlm.data.records import Turn, Visual
from nanovlm.data.video import Clip
from nanovlm.evaluation.items import read_records
from nanovlm.evaluation.vqa_accuracy import vqa_accuracy
from nanovlm.files import JsonLines, replace_text
from nanovlm.generation.answer import DESCRIBE, make_prompt, reply
from nanovlm.generation.sampler import Decoding, score_choices
from nanovlm.recipes.nano_tests import exact_match

LETTERS = string.ascii_uppercase
SCORES = {  # name -> function (prediction str, answers) -> float between 0 and 1
    "vqa": vqa_accuracy,
    "vqa_official": lambda said, answers: vqa_accuracy(said, answers, official=True),
    "exact": lambda said, answers: float(any(exact_match(said, answer) for answer in answers)),
    "lower": lambda said, answers: float(any(said.strip().lower() == answer.strip().lower() for answer in answers)),
}


def fill(form, words):
    """A text with words replaced, {word: replacement}, all in one pass: what is put in stays as it is."""
    return re.sub("|".join(map(re.escape, words)), lambda found: words[found[0]], form)


def put(item, task):
    """An item whose question stands in the form of the task: Item."""
    options = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, item.options))
    words = {"question": item.question, "options": options, "hint": "", "ocr": ""} | item.extra
    text = fill(task.prompt, {f"{{{name}}}": text for name, text in words.items()})
    return replace(item, question=text.strip())


def predictions(items, asker, task):
    """Ask a batch of items: list of {"id", "kind", "group", "question", "answers", "prediction", "score", "media", …}.

    task.way of a choice: "letter", which the model writes and `task.parse` reads; "likelihood" of the option's words,
    summed over tokens; "likelihood_mean"; or "likelihood_letter", of the letter that stands before the option.
    """
    asked = [put(item, task) for item in items]
    if task.way.startswith("likelihood"):
        letters, found = task.way == "likelihood_letter", []
        options = [LETTERS[: len(item.options)] if letters else item.options for item in items]
        for item, several in zip(items, asker.losses(asked, options)):
            losses = [total / number if task.way == "likelihood_mean" else total for total, number in several]
            place = losses.index(min(losses))
            found.append((item.options[place], *chosen(item, place, losses=losses)))
    else:
        found = [(text, *task.protocol(item, text, task)) for item, text in zip(items, asker.replies(asked))]
    told = []
    for item, (text, score, more) in zip(items, found):
        media = [str(source) for source in item.media if isinstance(source, Path)]
        one = {name: getattr(item, name) for name in ("id", "kind", "group", "question", "answers")}
        one |= {"prediction": text, "score": score, "media": media}
        told.append(one | ({} if item.submit is None else {"submit": item.submit}) | more)
    return told


def short_answer(item, text, task):
    """A few words, scored by `task.score` of SCORES; without human answers (a test split) there is no score."""
    return SCORES[task.score](text, item.answers) if item.answers else None, {}


def caption(item, text, task):
    """A sentence about a picture; CIDEr and the like need the whole corpus, so there is no score yet."""
    return None, {}


def yes_no(item, text, task):
    """Yes or no, read by `task.parse`; "said" is "yes", "no" or "other"."""
    said = task.parse(text)
    return float(said == item.answers[0]), {"said": said}


def choice(item, text, task):
    """One of several options; "said" is its place, None if none could be read; item.answers holds the right place."""
    return chosen(item, task.parse(text, item.options))


def chosen(item, place, **more):
    """(score, what was said); place: of the option, None = unread; the score is None without a right answer."""
    score = float(place == item.answers[0]) if item.answers else None
    return score, {"said": place, "options": item.options, **more}


def judged(item, text, task):
    """Free words, and what a judge is asked about them: "" where there is no true answer (OwlEval)."""
    words = {"QUESTION": item.question, "PREDICTION": text, "GROUND_TRUTH": " or ".join(item.answers)}
    return None, {"judge_prompt": fill("\n".join(PROMPTS[task.way]), words) if item.answers else ""}


def rotated(items):
    """Circular evaluation (MMBench, arXiv:2307.06281): a question for every rotation of its options: list of Item.

    Those of a group were rotated in the benchmark's file already.
    """
    if any(item.group for item in items):
        return items
    found = []
    for item in items:
        for turn in range(len(item.options)):
            answers = tuple((place - turn) % len(item.options) for place in item.answers)
            options = item.options[turn:] + item.options[:turn]
            found.append(replace(item, id=f"{item.id}#{turn}", options=options, answers=answers, group=item.id))
    return found


@dataclass(frozen=True)
class Asker:
    """Puts items to a model in the form of its own template."""

    loaded: Any  # chat.Assistant
    decoding: Decoding
    describe: Decoding | None = None  # of a description that goes before every question about a picture
    shots: dict = field(default_factory=dict)  # {kind: [(Item, answer)]} before a question of this kind, "" = any other
    num_frames: int = 4  # of a film
    seed: int = 0  # of sampling; an answer depends on it and the item's id alone
    border: int = 0  # pixels of black around every picture (OwlEval as Lynx shows it: 8)
    stop: tuple[str, ...] = ()  # words before which an answer ends

    def replies(self, items):
        """Answers: list of str."""
        return self._reply(items, self._talks(items), self.decoding)

    def losses(self, items, options):
        """How unlikely each option, a list of str per item, is as the answer: of `score_choices`."""
        template, tokenizer, talks, choices = self.loaded.template, self.loaded.tokenizer, self._talks(items), []
        for (turns, _), several in zip(talks, options):
            last = templates.prompt(turns, template)[-1]
            continues = last.visual is None and last.special is None
            choices.append([tokenizer.encode(template.answer_prefix + one, continues=continues) for one in several])
        prompts = self._prompts(talks, max(len(ids) for several in choices for ids in several))
        inputs = [prompt.visual_inputs for prompt in prompts]
        return score_choices(self.loaded.model, [prompt.row.ids for prompt in prompts], choices, inputs)

    def _reply(self, items, talks, decoding):
        prompts = self._prompts(talks, decoding.max_new_tokens)
        return reply(self.loaded, prompts, decoding, [f"{self.seed}/{item.id}" for item in items], self.stop)

    def _prompts(self, talks, max_new_tokens):
        """Talks as the model reads them: list of answer.Prompt; a picture that several show is one tensor."""
        pixels = {}
        return [make_prompt(self.loaded, turns, visuals, max_new_tokens, pixels) for turns, visuals in talks]

    def _talks(self, items):
        """Of each item what `_talk` gives, behind a description where one is wanted and there is a picture: list."""
        if self.describe is None:
            return list(map(self._talk, items))
        shown = [replace(item, id=f"{item.id}/description", question=DESCRIBE) for item in items if item.media]
        told = iter(self._reply(shown, map(self._talk, shown), self.describe))
        return [self._talk(item, next(told) if item.media else None) for item in items]

    def _talk(self, item, description=None):
        """(turns, visuals of all of them) of a question behind the shots and a description."""
        exchanges = [*self.shots.get(item.kind, self.shots.get("", ()))]
        if description is not None:
            exchanges.append((replace(item, question=DESCRIBE), description))
            item = replace(item, media=())
        turns, visuals = [], []
        for asked, answer in (*exchanges, (item, None)):
            places = range(len(visuals), len(visuals) + len(asked.media))
            visuals += [self._visual(one, asked.is_clip) for one in asked.media]
            turns.append(Turn("user", (*places, asked.question)))
            turns += [] if answer is None else [Turn("assistant", (answer,))]
        return turns, visuals

    def _visual(self, source, is_clip):
        key = str(source) if isinstance(source, Path) else f"{id(source)}"
        if is_clip:
            return Visual(key, Clip(str(source), self.num_frames))
        return Visual(key, (ImageOps.expand(images.load(source), self.border) if self.border else source,))


# Yes or no, as the programs of MME (arXiv:2306.13394) and POPE (arXiv:2305.10355) read it, and strictly


def parse_mme(text):
    """"yes", "no" or "other", by the first four characters."""
    start = text.strip().lower()[:4]
    return next((word for word in ("yes", "no") if word in start), "other")


def parse_pope(text):
    """"no" if a word of the first sentence, without commas and cut at spaces, denies; else "yes", to "No!" too."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if any(word in ("No", "not", "no") for word in words) else "yes"


def parse_strict(text):
    """The first word alone decides: "yes", "no" or "other"."""
    first = re.match(r"\W*(\w+)", text.lower())
    return first[1] if first and first[1] in ("yes", "no") else "other"


# Answers to multiple choice


def parse_letter(text, options):
    """Which option an answer names: int, or None.

    A letter alone or marked as one ("b", "**B**", "(B)", "B. two dogs", "answer: B"), else the one option that it says
    in whole words (an option within a longer one that was said does not count), else the one letter that a phrase such
    as "it is B" or "B is correct" chooses.
    """
    letter = f"[{LETTERS[: len(options)]}]"
    small, reason = f"(?i:{letter})(?=\\W*$)", "because|since|as"  # reason: what may follow A, which is a word as well
    no_word = rf"(?!(?<=A) (?!(?:{reason})\b)[a-z])"
    found = (
        re.match(rf"\W*({letter}|{small})(?:[).:,*\]\n]|\W*$| (?:{reason})\b)", text)
        or re.search(rf"(?i:answer|option|choice)(?: is)?[: ]\W*({letter}|{small})\b{no_word}", text)
    )  # fmt: skip
    if found:
        return LETTERS.index(found[1].upper())

    def says(words, option):
        return option.strip() and re.search(rf"(?<!\w){re.escape(option.lower().strip('. '))}(?!\w)", words.lower())

    named = [place for place, option in enumerate(options) if says(text, option)]
    named = [one for one in named if not any(other != one and says(options[other], options[one]) for other in named)]
    if named or re.search(r"\b(?i:not|neither|nor|or)\b|n't\b", text):
        return named[0] if len(named) == 1 else None
    lead = r"\b(?i:is|be|choose|pick|select|think|go with|ans)\W+|[{>]"
    alone = re.findall(rf"(?:{lead})({letter})\b(?!(?<=A) [a-z])|\b({letter}) is (?:the|my|correct|right)\b", text)
    places = {LETTERS.index(one or other) for one, other in alone}
    return places.pop() if len(places) == 1 else None


def parse_science_qa(text, options):
    """Place of the option in ScienceQA's form, or None: a bare letter, "B. …", or one "The answer is B."."""
    bare = re.match(r"\s*([A-Z])(?:\s*$|\. )", text)
    letters = [bare[1]] if bare else re.findall(r"The answer is ([A-Z])\.", text)
    place = LETTERS.index(letters[0]) if len(letters) == 1 else len(options)
    return place if place < len(options) else None


# Free answers judged by a language model: any function from a list of prompts to the list of its answers.
#
# "implies" is Open-VQA's question, word for word (Lynx, arXiv:2307.02469, Sec. 3.1). "score" asks for yes or no and a
# mark (Video-ChatGPT, arXiv:2306.05424), "share" for a grade (MM-Vet, arXiv:2308.02490, Sec. 3.3), in our wording.

PROMPTS = json.loads(Path(__file__).with_name("prompts.json").read_text())  # lists of lines


def ask_judge(asked, judge, judgements, out, batch_size):
    """What the judge says: {id: text}. What it has said before, or the file `judgements` tells, is not asked for again.

    asked: {id: prompt}; those that stay without a judgement are written to judge_prompts.jsonl.
    judge: function list of prompts -> list of texts, or None. judgements: path of a file {"id", "judgement"} a line,
      or "". out: Path of the folder of judgements.jsonl.
    """
    file, told = JsonLines(out / "judgements.jsonl"), {}
    for where, record in read_records(judgements) if judgements else ():
        if not isinstance(record, dict) or not {"id", "judgement"} <= record.keys():
            raise ValueError(f"{where}: no object with id and judgement")
        told[record["id"]] = record["judgement"]
    told |= {record["id"]: record["judgement"] for record in file}
    left = [id for id in asked if id not in told]
    for start in range(0, len(left) if judge else 0, batch_size):
        batch = left[start : start + batch_size]
        new = dict(zip(batch, judge([asked[id] for id in batch])))
        file.add(*({"id": id, "judgement": text} for id, text in new.items()))
        told |= new
    waiting = [json.dumps({"id": id, "prompt": prompt}) + "\n" for id, prompt in asked.items() if id not in told]
    replace_text(out / "judge_prompts.jsonl", "".join(waiting))
    return told


def judgement(text, way):
    """What a judge's words mean: {"verdict": bool or None = unreadable, "mark": number or None, "score": 0 to 1}."""
    if way == "share":
        numbers = map(float, re.findall(r"(?<![\d.])\d+(?:\.\d+)?", text))
        share = next((number for number in numbers if number <= 1), None)
        return {"verdict": None if share is None else share == 1, "mark": share, "score": share or 0.0}
    verdict, mark = parse_verdict(text), None
    if way == "score":  # yes or no anywhere, for GPT's dictionaries. The paper says 1 to 5, its script 0 to 5
        said = re.search(r"\b(yes|no)\b", text.lower())
        verdict, mark = said and said[1] == "yes", whole_number(text, 0, 5)
    return {"verdict": verdict, "mark": mark, "score": float(verdict is True)}


def parse_verdict(text):
    """What the judge said: True, False, or None where the first word is neither yes nor no."""
    return {"yes": True, "no": False}.get(parse_strict(text))


def whole_number(text, least, most):
    """The first whole number of a text from `least` to `most`: int, or None."""
    numbers = map(int, re.findall(r"(?<![\d.])\d+(?!\d|\.\d)", text))
    return next((number for number in numbers if least <= number <= most), None)
