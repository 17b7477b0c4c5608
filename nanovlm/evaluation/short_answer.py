"""Short answers: a question about a picture, a few greedy tokens, right or wrong by exact match.

The protocol of easy-VQA, the scenes and, with their own metrics, of VQAv2, GQA or TextVQA: the model continues each
prompt freely, nothing is chosen from a list. Prompts of similar length run together, a picture that many of them share
is encoded once, and prompts that are equal in words and pictures are answered once.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any

from PIL import Image

from nanovlm.data.batching import pixels_of, prompt_row
from nanovlm.data.images import CLIP, Preprocessing
from nanovlm.data.records import Visual
from nanovlm.data.templates import end_ids
from nanovlm.sampler import Decoding, generate

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
        decoding = Decoding(max_new_tokens=self.max_new_tokens, eos_ids=end_ids(self.template, self.tokenizer))
        return answer_questions(
            model, records, self.tokenizer, self.template, model.vision.image_size, self.image_fit, decoding,
            self.batch_size, blank, progress, self.preprocessing,
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
    room = model.decoder.config.context_length - decoding.max_new_tokens
    asked = ((record, number) for record in records for number in range(len(record.conversations)))
    answers = []
    while chunk := list(itertools.islice(asked, CHUNK * batch_size)):
        prompts, pixels = [], {}  # (ids, keys of the pictures in order of appearance), and key -> picture
        for record, number in chunk:
            visuals = [_grey(visual, image_size) if blank else visual for visual in record.visuals]
            counts = [model.num_image_tokens(image_size, len(visual.frames)) for visual in visuals]
            row = _row(record, number, template, tokenizer, counts, room)
            shown = [visuals[image[0]] for image in row.images]
            prompts.append((tuple(row.ids), tuple(visual.key for visual in shown)))
            for visual in shown:
                if visual.key not in pixels:
                    pixels[visual.key] = pixels_of([visual], image_size, image_fit, preprocessing)
        replies = _replies(model, prompts, pixels, decoding, batch_size)
        for (record, number), prompt in zip(chunk, prompts):
            text = tokenizer.decode(replies[prompt]).removesuffix(template.answer_suffix).strip()
            answers.append(_answer(record, number, text))
        if progress is not None:
            progress(len(chunk))
    return answers


def _grey(visual, image_size):
    """A blank picture, or a clip of as many blank frames."""
    frame = Image.new("RGB", (image_size, image_size), GREY)
    return Visual(f"blank/{len(visual.frames)}", (frame,) * len(visual.frames))


def _row(record, number, template, tokenizer, num_image_tokens, room):
    """The prompt of a conversation: templates.Row."""
    where = f"record {record.id!r}, conversation {number}"
    conversation = record.conversations[number]
    if len(conversation) < 2:
        raise ValueError(f"{where} has no question; it needs a user turn and the true answer after it")
    try:
        return prompt_row(conversation[:-1], template, tokenizer, num_image_tokens, room)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _replies(model, prompts, pixels, decoding, batch_size):
    """Each different prompt run once, short ones first: {prompt: list of new ids}."""
    order = sorted(dict.fromkeys(prompts), key=lambda prompt: len(prompt[0]))  # a set has another order in every run
    inputs = [[pixels[key] for key in keys] for _, keys in order]
    return dict(zip(order, generate(model, [list(ids) for ids, _ in order], decoding, inputs, batch_size=batch_size)))


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
