"""Chat: questions, pictures at any turn, and answers that come word by word, in a history that always fits.

The whole conversation is written anew with the model's template for every answer. When the context is full, the oldest
exchanges without a picture are forgotten, whole ones only: half a turn would be a text the model never trained on.

Describe-first: the model first describes the picture, then answers in that history. Its own words about the picture help
it to follow an instruction it was never trained for. Lynx, arXiv:2307.02469, Sec. 2.3 and 3.2.
"""

import dataclasses
from dataclasses import dataclass

import torch

from nanovlm.generation import sampler
from nanovlm.data.batching import pixels_of
from nanovlm.data.images import CLIP
from nanovlm.data.records import Turn, Visual
from nanovlm.data.templates import Row, end_ids, prompt, write
from nanovlm.generation.prefill import Workspace

DESCRIBE = "describe the image."


@dataclass(frozen=True)
class Exchange:
    """What one answer was made of.

    row: templates.Row of the prompt. answer: new ids, without the end token.
    visual_inputs: float32[f, 3, S, S] each, in the order of row.images.
    """

    row: Row
    answer: list[int]
    visual_inputs: list[torch.Tensor]


class Chat:
    """A conversation with a model.

    Args:
      model: vlm.VLM. tokenizer: Tokenizer. template: templates.Template.
      decoding: sampler.Decoding; without eos_ids, what ends a reply in this form does (templates.end_ids).
      image_size, fit, preprocessing: as in images.to_pixels.
      generator: as in sampler.generate, for one row.
      workspace: as in sampler.generate; pictures are encoded when they are first shown, and not again for later answers.

    Attributes:
      turns: list of Turn, the history as the model will see it.
      forgotten: int, exchanges dropped since the context was full.
      last: Exchange of the latest answer; None before the first.
    """

    def __init__(
        self, model, tokenizer, template, decoding, image_size, fit="crop", generator=None, preprocessing=CLIP, workspace=None
    ):
        self.workspace = Workspace() if workspace is None else workspace
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.decoding, self.generator = decoding, generator
        self.image_size, self.fit, self.preprocessing = image_size, fit, preprocessing
        self.reset()

    def reset(self):
        """Forget everything said and shown."""
        self.turns, self.pictures, self.forgotten, self.last = [], [], 0, None
        self.workspace.pictures.clear()

    def ask(self, question, pictures=(), decoding=None):
        """Ask, perhaps showing something.

        Args:
          question: str.
          pictures: what is shown with it: each a path or PIL image, or a tuple of them, the frames of a clip.
          decoding: sampler.Decoding of this answer alone; None = the chat's.
        Returns: iterator of str, pieces of the answer; one piece from a beam search. The exchange enters the history
          when the last piece is taken.
        Raises: ValueError if there is no question, if a picture cannot be read, or if the question and the turns with
          pictures do not fit into the context.
        """
        if not question.strip():
            raise ValueError("the question is empty")
        decoding = self.decoding if decoding is None else decoding
        if not decoding.eos_ids:
            decoding = dataclasses.replace(decoding, eos_ids=end_ids(self.template, self.tokenizer))
        clips = [picture if isinstance(picture, tuple) else (picture,) for picture in pictures]
        visuals = [Visual("shown in a chat", frames) for frames in clips]
        new = [pixels_of([visual], self.image_size, self.fit, self.preprocessing) for visual in visuals]
        asked = Turn("user", (*range(len(self.pictures), len(self.pictures) + len(new)), question))
        shown = self.pictures + new
        turns, row = self._fit([*self.turns, asked], shown, decoding.max_new_tokens)
        visual_inputs = [shown[visual] for visual, _, _ in row.images]
        if decoding.num_beams > 1:
            (ids,) = sampler.generate(
                self.model, [row.ids], decoding, [visual_inputs], self.generator, workspace=self.workspace
            )
        else:
            ids = sampler.stream(self.model, row.ids, decoding, visual_inputs, self.generator, self.workspace)
        return self._answer(ids, row, turns, shown, visual_inputs)

    def describe_first(self, question, pictures, decoding, describe=DESCRIBE):
        """Round 0 describes the pictures with its own decoding, then the question is asked in that history.

        Returns: (description str, iterator of str as in `ask`).
        Raises: as `ask`.
        """
        description = "".join(self.ask(describe, pictures, decoding))
        return description, self.ask(question)

    def _fit(self, turns, shown, max_new_tokens):
        """Drop the oldest exchanges without a picture until prompt and answer fit: (turns, Row)."""
        counts = [self.model.num_image_tokens(self.image_size, len(pixels)) for pixels in shown]
        context = self.model.decoder.config.context_length
        while True:
            row = write(prompt(turns, self.template), self.tokenizer, counts)
            if len(row.ids) + max_new_tokens <= context:
                return turns, row
            place = next((i for i in range(0, len(turns) - 1, 2) if not has_picture(turns[i])), None)
            if place is None:
                raise ValueError(
                    f"the question and the turns with pictures need {len(row.ids)} tokens and the answer up to "
                    f"{max_new_tokens}, but the context has {context}: ask something shorter, lower max_new_tokens, "
                    "or begin anew"
                )
            turns = turns[:place] + turns[place + 2 :]

    def _answer(self, ids, row, turns, shown, visual_inputs):
        """Turn ids into pieces of text, then remember the exchange."""
        answer, pieces, decoder = [], [], self.tokenizer.stream()
        for piece in without_prefix(decoded(ids, answer, decoder), self.template.answer_prefix):
            pieces.append(piece)
            yield piece
        self.forgotten += len(self.turns) // 2 - len(turns) // 2
        self.turns = [*turns, Turn("assistant", ("".join(pieces),))]
        self.pictures, self.last = shown, Exchange(row, answer, visual_inputs)


def has_picture(turn):
    """Whether a visual input stands in a turn."""
    return any(not isinstance(part, str) for part in turn.parts)


def decoded(ids, answer, decoder):
    """Text of ids as they come, which are also appended to `answer`; decoder: tokenizer.TextStream."""
    for token in ids:
        answer.append(token)
        yield decoder.push(token)
    yield decoder.finish()


def without_prefix(pieces, prefix):
    """The same text without the template's gap before an answer, in pieces that are never empty."""
    held = ""
    for piece in pieces:
        if prefix:
            held += piece
            if prefix.startswith(held):  # not yet more than the gap, perhaps
                continue
            piece, prefix = held.removeprefix(prefix), ""
        if piece:
            yield piece
