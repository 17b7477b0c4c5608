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
import math
import re
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from nanovlm.attention import Visible
from nanovlm.cross_attention import Media
from nanovlm.data import images
from nanovlm.data.images import CLIP, Preprocessing
from nanovlm.data.records import Turn, Visual
from nanovlm.data.templates import prompt
from nanovlm.data.video import Clip
from nanovlm.evaluation.items import Encoded
from nanovlm.evaluation.vqa_accuracy import vqa_accuracy
from nanovlm.generation.answer import Assistant, DESCRIBE, make_prompt, reply
from nanovlm.generation.prefill import encode, Rows
from nanovlm.generation.sampler import Decoding


SCORES = {  # name -> function (prediction str, answers) -> float between 0 and 1
    "vqa": vqa_accuracy,
    "vqa_official": lambda said, answers: vqa_accuracy(said, answers, "official"),
    "exact": lambda said, answers: float(any(exact_match(said, answer) for answer in answers)),
    "lower": lambda said, answers: float(any(said.strip().lower() == answer.strip().lower() for answer in answers)),
}


def put(item, task):
    """The words of a question in the form of the task: Asked."""
    words = {"question": item.question, "options": listed(item.options)} | item.extra
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
            options = [LETTERS[: len(one.options)] for one in batch]
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
            rotations(list(item.options), item.answers[0] if item.answers else 0)
        )
    ]


def once(items):
    """Every question once: list of Item."""
    return list(items)


# A model under examination: it answers questions about pictures in batches, and says how likely it finds an answer.


@dataclasses.dataclass(frozen=True)
class Asked:
    """One question as it is put. media, is_clip, kind: as of items.Item. id: decides the random numbers of sampling."""

    id: str
    text: str
    media: tuple = ()
    is_clip: bool = False
    kind: str = ""


class Speaker:
    """Puts questions to a model in the form of its own template.

    Args:
      loaded: recipes.Loaded.
      decoding: sampler.Decoding, one sequence; without eos_ids, what ends a reply in this form does.
      describe: sampler.Decoding of a description that goes before every question about a picture; None = none.
      shots: tuple of (Asked, answer str) that stand before every question as if they had been asked.
      num_frames: frames of a film. seed: of sampling; an item's answer depends on it and the item's id alone.
      border: pixels of black around every picture (OwlEval as Lynx shows it: 8).
      kind_shots: {kind: shots}, which questions of this kind have in front instead.
    """

    def __init__(self, loaded, decoding, describe=None, shots=(), num_frames=4, seed=0, border=0, kind_shots=None):
        if decoding.num_return_sequences > 1:
            raise ValueError("one answer per question is measured; use num_return_sequences=1")
        self.loaded, self.num_frames, self.seed, self.border = loaded, num_frames, seed, border
        self.shots, self.kind_shots = tuple(shots), kind_shots or {}
        self.decoding, self.describe = decoding, describe

    def replies(self, asked):
        """Answers: list of Asked -> list of str, without the template's end."""
        return self._reply(asked, self._descriptions(asked), self.decoding)

    def _descriptions(self, asked):
        """What is said before each question: a tuple of (request, description), empty without `describe` or a picture."""
        shown = [one for one in asked if one.media] if self.describe else []
        questions = [dataclasses.replace(one, id=f"{one.id}/description", text=DESCRIBE) for one in shown]
        told = dict(zip((one.id for one in shown), self._reply(questions, [()] * len(shown), self.describe)))
        return [((DESCRIBE, told[one.id]),) if one.id in told else () for one in asked]

    def losses(self, asked, options):
        """How unlikely each option is as the answer.

        Args:
          asked: list of Asked. options: per question a list of str.
        Returns: per question a list of (sum, mean) float, see choice.score_choices.
        """
        before = self._descriptions(asked)
        prompts = self._prompts(asked, before, 0)
        template, tokenizer = self.loaded.template, self.loaded.tokenizer
        ids = []
        for one, said, several in zip(asked, before, options):
            last = prompt(self._conversation(one, said)[0], template)[-1]
            continues = last.visual is None and last.special is None
            ids.append([tokenizer.encode(template.answer_prefix + option, continues=continues) for option in several])
        rows, inputs = [one.row.ids for one in prompts], [one.visual_inputs for one in prompts]
        return score_choices(self.loaded.model, rows, ids, inputs)

    def _reply(self, asked, before, decoding):
        if not asked:
            return []
        prompts = self._prompts(asked, before, decoding.max_new_tokens)
        return reply(self.loaded, prompts, decoding, [f"{self.seed}/{one.id}" for one in asked])

    def _conversation(self, asked, before):
        """(turns, media of all of them) of a question behind the shots and what was said before."""
        media, turns = [], []
        for one, answer in (*self.kind_shots.get(asked.kind, self.shots), (asked, None)):
            places = range(len(media), len(media) + len(one.media))
            media += [(path, one.is_clip) for path in one.media]
            said = [*(before if answer is None else ()), (one.text, answer)]
            for number, (text, response) in enumerate(said):
                turns.append(Turn("user", (*(places if number == 0 else ()), text)))
                turns += [Turn("assistant", (response,))] if response is not None else []
        return turns, media

    def _prompts(self, asked, before, new_tokens):
        """The questions as the model reads them: list of answer.Prompt; a picture that several share is one tensor."""
        prompts, pixels = [], {}
        for one, said in zip(asked, before, strict=True):
            turns, media = self._conversation(one, said)
            visuals = [self._visual(path, is_clip) for path, is_clip in media]
            try:
                prompts.append(make_prompt(self.loaded, turns, visuals, new_tokens, pixels))
            except ValueError as error:
                raise ValueError(f"question {one.id!r}: {error}") from error
        return prompts

    def _visual(self, source, is_clip):
        key = str(source) if isinstance(source, Path) else f"{id(source)}"
        if is_clip:
            return Visual(key, Clip(str(source), self.num_frames))
        if isinstance(source, Encoded):
            source = source.open()
        if self.border:
            source = ImageOps.expand(images.load(source), self.border)
        return Visual(key, (source,))


# Multiple choice: by likelihood, by letter, by letter under rotation, and answers in ScienceQA's form.
#
# likelihood   argmin over choices of - Σ log p(token | question, tokens before it)     SEED-Bench, arXiv:2307.16125
# circular     N options are asked N times, each time rotated by one; right = all N     MMBench, arXiv:2307.06281


LETTERS = string.ascii_uppercase


def score_choices(model, prompts, choices, visual_inputs, pictures=None):
    """How unlikely a model finds each choice after its prompt. Prompt and pictures pass through the decoder once.

    Args:
      model: vlm.VLM.
      prompts: list of B lists of ids; vlm.IMAGE_TOKEN where an image token stands.
      choices: per prompt a list of choices, each a list of at least one id.
      visual_inputs: per prompt a list of float[f, 3, H, W], in order.
      pictures: dict that keeps encoded pictures from call to call, as workspace.Workspace.pictures; None = none kept.
    Returns: per prompt a list of (sum, mean) float, the negative log-likelihood of each choice's tokens in nats.
    Raises: ValueError for a prompt without choices, an empty choice, or too little context.
    """
    flat = [ids for several in choices for ids in several]
    longest = max(map(len, flat), default=0)
    for place, (prompt, several) in enumerate(zip(prompts, choices, strict=True)):
        if not several or not all(several):
            raise ValueError(
                f"prompt {place} has {len(several)} choices; at least one is needed, and none may be empty"
            )
        if len(prompt) + max(map(len, several)) > model.decoder.config.context_length:
            raise ValueError(
                f"prompt {place} has {len(prompt)} tokens; with its longest choice of {max(map(len, several))} that is "
                f"more than the context of {model.decoder.config.context_length}"
            )
    pictures = {} if pictures is None else pictures
    with torch.no_grad():
        shown = [pixels for several in visual_inputs for pixels in several]
        encode(model, shown, pictures)
        keys = list(dict.fromkeys(map(id, shown)))
        tokens = [pictures[key][1] for key in keys]
        rows = Rows(model, prompts, tokens, [keys.index(id(pixels)) for pixels in shown], longest)
        rows.select([place for place, several in enumerate(choices) for _ in several])
        losses = _losses(model, rows, flat, longest)
    pairs = [(float(loss), float(loss) / len(ids)) for loss, ids in zip(losses.tolist(), flat)]
    left = iter(pairs)
    return [[next(left) for _ in several] for several in choices]


def _losses(model, rows, flat, longest):
    """Summed losses of the choices behind the cached prompts: float32[R]. Choices are padded on the right."""
    device = rows.logits.device
    targets = torch.tensor([ids + [0] * (longest - len(ids)) for ids in flat], device=device)  # R T
    real = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in flat], device=device)
    scores = rows.logits[:, None]  # what the prompt's last token says of the first
    if longest > 1:
        column = rows.cache.length
        columns = column + torch.arange(longest - 1, device=device).expand(len(flat), -1)  # R T-1
        visible = Visible(rows.pads[:, None].expand_as(columns), columns + 1)
        embeddings = model.decoder.embedding(targets[:, :-1])
        positions, modality = columns - rows.pads[:, None], torch.zeros_like(columns)
        media = rows.media
        if media is not None:
            media = Media(
                media.tokens, Visible(*(edge.expand_as(columns) for edge in (media.visible.first, media.visible.stop)))
            )
        hidden = model.decoder(embeddings, positions, visible, modality, cache=rows.cache, media=media)
        scores = torch.cat([scores, model.decoder.logits(hidden).float()], 1)
    losses = F.cross_entropy(scores.transpose(1, 2), targets, reduction="none")
    return (losses * real).sum(1)


def listed(options):
    """Options as they stand in a prompt, "A. …" on a line each: str."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options))


def rotations(options, answer):
    """The N questions of circular evaluation.

    Args:
      options: list of N str. answer: int, place of the right one.
    Returns: list of N (options, answer), each rotated by one more to the left.
    """
    return [(options[k:] + options[:k], (answer - k) % len(options)) for k in range(len(options))]


def parse_letter(text, options):
    """Which option an answer names: int, or None.

    A letter alone or marked as one ("B", "(B)", "B. two dogs", "answer: B"), else the one option whose words it says.
    """
    text = text.strip()
    letters = LETTERS[: len(options)]
    found = re.match(rf"\(?([{letters}])(?:[).:,]|$)", text) or re.search(
        rf"(?i:answer|option|choice)(?: is)?:? \(?([{letters}])\b(?! [a-z])", text
    )
    if found:
        return letters.find(found[1])
    words = text.lower().rstrip(".")
    named = [place for place, option in enumerate(options) if option.strip() and option.lower().rstrip(".") == words]
    if not named:
        named = [place for place, option in enumerate(options) if option.strip() and option.lower() in words]
    return named[0] if len(named) == 1 else None


def parse_science_qa(text):
    """The letter of an answer in ScienceQA's form, or None: a bare letter, "B. …", or one "The answer is B."."""
    text = text.strip()
    if len(text) == 1 and text in LETTERS:
        return text
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    found = re.findall(r"The answer is ([A-Z])\.", text)
    return found[0] if len(found) == 1 else None


# Short answers: a question about a picture, a few greedy tokens, right or wrong by exact match.
#
# The protocol of easy-VQA, the scenes and, with their own metrics, of VQAv2, GQA or TextVQA: the model continues each
# prompt freely, nothing is chosen from a list. Prompts of similar length run together, a picture that many of them share
# is encoded once, and prompts that are equal in words and pictures are answered once.


GREY = (128, 128, 128)  # the colour of a blank picture
CHUNK = 8  # batches whose prompts are sorted together, and whose pictures are in memory at the same time
Z_95 = 1.959964  # normal quantile of a two-sided 95% interval


@dataclass(frozen=True)
class Answer:
    """What a model said to one conversation of a record."""

    record: str  # id of the record
    conversation: int  # its place in the record
    kind: str  # question type; "" = not stated
    question: str  # the last user turn
    truth: str
    prediction: str

    @property
    def right(self):
        """Whether the prediction is the truth by `exact_match`: bool."""
        return exact_match(self.prediction, self.truth)


def exact_match(prediction, truth):
    """Whether two answers are the same: bool. Outer whitespace never counts.

    A truth in capitals ("A7K") is a string to be read: case counts. Any other ("red circle", "Yes") is words:
    case does not.
    """
    prediction, truth = prediction.strip(), truth.strip()
    return prediction == truth if truth.isupper() else prediction.lower() == truth.lower()


@dataclass(frozen=True)
class Examiner:
    """Puts questions to a model always in the same way: greedily, at the picture size at which its vision stands."""

    tokenizer: Any  # data.tokenizer.Tokenizer
    template: Any  # data.templates.Template
    image_fit: str = "crop"  # how a picture becomes square, as in images.to_pixels
    max_new_tokens: int = 12  # tokens of an answer, the end token included
    batch_size: int = 256  # prompts that run together
    preprocessing: Preprocessing = CLIP  # mean and deviation of the pixels, as the run's or the model folder's

    def answers(self, model, records, blank=False, progress=None):
        """`answer_questions` with these settings: list of Answer."""
        return answer_questions(
            model, records, self.tokenizer, self.template, model.vision.image_size, self.image_fit,
            Decoding(max_new_tokens=self.max_new_tokens), self.batch_size, blank, progress, self.preprocessing,
        )  # fmt: skip


def answer_questions(
    model, records, tokenizer, template, image_size, image_fit, decoding, batch_size, blank=False, progress=None,
    preprocessing=CLIP,
):  # fmt: skip
    """Let a model answer the last question of every conversation.

    Args:
      model: vlm.VLM.
      records: iterable of Record, read as the answers are made; every conversation ends with a question and the true
        answer.
      tokenizer, template: Tokenizer and templates.Template.
      image_size, image_fit, preprocessing: pixels, how a picture becomes square, and the mean and deviation of its pixels; as
        in images.to_pixels.
      decoding: sampler.Decoding, greedy or beams, one sequence; its eos_ids should hold the tokenizer's.
      batch_size: prompts that run together.
      blank: bool; True shows a uniform grey picture in place of each, so that only the questions can help.
      progress: function called with the number of conversations newly answered, as tqdm's `update`; None = silent.
    Returns: list of Answer, in the order of the records and their conversations.
    Raises: ValueError for a conversation without a question, one that is too long (naming the record), or a decoding
      that draws at random.
    """
    if decoding.do_sample or decoding.num_return_sequences > 1:
        raise ValueError("answers are measured once and without chance; use do_sample=False and num_return_sequences=1")
    assistant = Assistant(model, tokenizer, template, image_size, image_fit, preprocessing)
    asked = ((record, number) for record in records for number in range(len(record.conversations)))
    answers = []
    while chunk := list(itertools.islice(asked, CHUNK * batch_size)):
        pixels = {}
        prompts = [_prompt(assistant, record, number, decoding, pixels, blank) for record, number in chunk]
        texts = reply(assistant, prompts, decoding, batch_size=batch_size)
        answers += [_answer(record, number, text) for (record, number), text in zip(chunk, texts)]
        if progress is not None:
            progress(len(chunk))
    return answers


def _grey(visual, image_size):
    """A blank picture, or a clip of as many blank frames."""
    frame = Image.new("RGB", (image_size, image_size), GREY)
    return Visual(f"blank/{len(visual.frames)}", (frame,) * len(visual.frames))


def _prompt(assistant, record, number, decoding, pixels, blank):
    """The last question of a conversation: answer.Prompt."""
    where = f"record {record.id!r}, conversation {number}"
    conversation = record.conversations[number]
    if len(conversation) < 2:
        raise ValueError(f"{where} has no question; it needs a user turn and the true answer after it")
    visuals = [_grey(visual, assistant.image_size) if blank else visual for visual in record.visuals]
    try:
        return make_prompt(assistant, conversation[:-1], visuals, decoding.max_new_tokens, pixels)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _answer(record, number, text):
    *_, question, truth = record.conversations[number]
    kind = record.kinds[number] if record.kinds else ""
    return Answer(record.id, number, kind, question.text, truth.text, text)


def shares(answers):
    """Shares of right answers.

    Args:
      answers: list of Answer, at least one.
    Returns: {"all": share, kind: share, …}, between 0 and 1, kinds in order of appearance; answers without a kind
      count only in "all".
    """
    if not answers:
        raise ValueError("no answers to take a share of; the records held no conversation")
    groups = {"all": answers}
    for answer in answers:
        if answer.kind:
            groups.setdefault(answer.kind, []).append(answer)
    return {kind: sum(answer.right for answer in group) / len(group) for kind, group in groups.items()}


def wilson(right, total):
    """95% interval of a share.

    Args:
      right, total: int, right answers of all; total at least 1.
    Returns: (low, high), between 0 and 1.
    Source: Wilson, JASA 22 (1927), 209-212; unlike the normal interval it stays sensible near 0 and 1.
    """
    if not 0 <= right <= total or total < 1:
        raise ValueError(f"{right} right of {total}: give at least one answer, and no more right ones than answers")
    share = right / total
    middle = share + Z_95**2 / (2 * total)
    reach = Z_95 * math.sqrt(share * (1 - share) / total + Z_95**2 / (4 * total**2))
    scale = 1 + Z_95**2 / total
    return max(0.0, (middle - reach) / scale), min(1.0, (middle + reach) / scale)


# Free answers judged by a language model.
#
# Open-VQA asks whether an answer implies the true one (Lynx, arXiv:2307.02469, Sec. 3.1); video question answering with a
# score asks for yes or no and a mark (Video-ChatGPT, arXiv:2306.05424). The judge is any function from a list of prompts
# to the list of its answers: a model of this project, an endpoint, or answers that were recorded.


IMPLIES = (  # word for word as printed in the paper
    'Given the question "QUESTION", does the answer "PREDICTION" imply the answer "GROUND_TRUTH"? Answer with Yes or No.'
)
WITH_SCORE = (  # our wording of Video-ChatGPT's request
    'Question: "QUESTION"\nCorrect answer: "GROUND_TRUTH"\nPredicted answer: "PREDICTION"\n'
    "Does the predicted answer mean the same as the correct answer? "
    "Answer with yes or no, then with an integer score from 0 (nothing agrees) to 5 (everything agrees)."
)
GRADED = (  # MM-Vet's task (arXiv:2308.02490, Sec. 3.3) with our wording and examples
    "Grade the prediction of a model against the ground truth by a number from 0.0 (wrong) to 1.0 (right) in steps of 0.1. "
    "<AND> in the ground truth joins what must all be said, <OR> joins what is right by itself.\n\n"
    "Question: What are the roots?\nGround truth: -1 <AND> -5\nPrediction: x = 3\nGrade: 0.0\n\n"
    "Question: What are the roots?\nGround truth: -1 <AND> -5\nPrediction: x = -1\nGrade: 0.5\n\n"
    "Question: Which animal is it?\nGround truth: a lion cub <OR> a young lion\nPrediction: A young lion.\nGrade: 1.0\n\n"
    "Question: QUESTION\nGround truth: GROUND_TRUTH\nPrediction: PREDICTION\nGrade:"
)
SCORE_RANGE = (0, 5)  # as in the public script; the paper says 1 to 5


def judge_prompt(question, prediction, truth, form=IMPLIES):
    """What the judge is asked: str. All three are put in at once, so that none is looked for inside another."""
    words = {"QUESTION": question, "PREDICTION": prediction, "GROUND_TRUTH": truth}
    return re.sub("|".join(words), lambda found: words[found[0]], form)


def parse_verdict(text):
    """What the judge said: True, False, or None where the first word is neither yes nor no."""
    first = re.match(r"\W*(\w+)", text.lower())
    return {"yes": True, "no": False}.get(first[1]) if first else None


def parse_score(text):
    """(verdict as in `parse_verdict`, score int or None): yes or no anywhere, and the first whole number in range.

    Reads plain words as well as the dictionaries that GPT judges like to write.
    """
    verdict = re.search(r"\b(yes|no)\b", text.lower())
    low, high = SCORE_RANGE
    numbers = [int(number) for number in re.findall(r"(?<![\d.])\d+(?![\d]|\.\d)", text) if low <= int(number) <= high]
    return (verdict[1] == "yes" if verdict else None), (numbers[0] if numbers else None)


def parse_share(text):
    """The first number from 0 to 1 in the judge's words: float or None."""
    numbers = [float(number) for number in re.findall(r"(?<![\d.])\d+(?:\.\d+)?", text)]
    return next((number for number in numbers if 0 <= number <= 1), None)


def open_vqa_scores(verdicts, classes):
    """Shares of right answers.

    Args:
      verdicts: list of True, False or None (the judge said neither; counts as wrong, as nothing shows it right).
      classes: list of str, the class of each question.
    Returns: {"all": share, CLASS: share, …, "unparsed": int}, classes in order of appearance.
    """
    if not verdicts or len(verdicts) != len(classes):
        raise ValueError(f"{len(verdicts)} verdicts for {len(classes)} questions; at least one each is needed")
    groups = {"all": verdicts}
    for name in dict.fromkeys(classes):
        groups[name] = [verdict for verdict, mine in zip(verdicts, classes) if mine == name]
    scores = {name: sum(verdict is True for verdict in group) / len(group) for name, group in groups.items()}
    return scores | {"unparsed": verdicts.count(None)}
