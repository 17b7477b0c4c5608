"""Chat: questions, pictures at any turn, and answers that come word by word, in a history that always fits.

The whole conversation is written anew with the model's template for every answer. When the context is full, the oldest
exchanges without a picture are forgotten, whole ones only: half a turn would be a text the model never trained on.

Describe-first: the model first describes the picture, then answers in that history. Its own words about the picture help
it to follow an instruction it was never trained for. Lynx, arXiv:2307.02469, Sec. 2.3 and 3.2.
"""

from dataclasses import dataclass

import torch

from nanovlm.data.records import Turn, Visual
from nanovlm.data.templates import Row
from nanovlm.generation.answer import DESCRIBE, PromptTooLong, make_prompt, stream
from nanovlm.generation.prefill import Workspace


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
      assistant: answer.Assistant or recipes.Loaded.
      decoding: sampler.Decoding; without eos_ids, what ends a reply in this form does (templates.end_ids).
      generator: as in sampler.generate, for one row.
      workspace: as in sampler.generate; pictures are encoded when they are first shown, and not again for later answers.

    Attributes:
      turns: list of Turn, the history as the model will see it. visuals: list of records.Visual shown in it.
      forgotten: int, exchanges dropped since the context was full.
      last: Exchange of the latest answer; None before the first.
    """

    def __init__(self, assistant, decoding, generator=None, workspace=None):
        self.assistant, self.decoding, self.generator = assistant, decoding, generator
        self.workspace = Workspace() if workspace is None else workspace
        self.reset()

    def reset(self):
        """Forget everything said and shown."""
        self.turns, self.visuals, self.pixels, self.forgotten, self.last = [], [], {}, 0, None
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
        decoding, shown = decoding or self.decoding, list(self.visuals)
        for picture in pictures:
            frames = picture if isinstance(picture, tuple) else (picture,)
            shown.append(Visual(f"shown in a chat, {len(shown)}", frames))
        turns = [*self.turns, Turn("user", (*range(len(self.visuals), len(shown)), question))]
        pixels = dict(self.pixels)
        while True:
            try:
                prompt = make_prompt(self.assistant, turns, shown, decoding.max_new_tokens, pixels)
                break
            except PromptTooLong:
                place = next((i for i in range(0, len(turns) - 1, 2) if not has_picture(turns[i])), None)
                if place is None:
                    raise
                turns = turns[:place] + turns[place + 2 :]
        exchange = Exchange(prompt.row, [], prompt.visual_inputs)
        pieces = stream(self.assistant, prompt, decoding, exchange.answer, self.generator, self.workspace)
        return self._remember(pieces, exchange, turns, shown, pixels)

    def describe_first(self, question, pictures, decoding, describe=DESCRIBE):
        """Round 0 describes the pictures with its own decoding, then the question is asked in that history.

        Returns: (description str, iterator of str as in `ask`).
        Raises: as `ask`.
        """
        description = "".join(self.ask(describe, pictures, decoding))
        return description, self.ask(question)

    def _remember(self, pieces, exchange, turns, shown, pixels):
        """The same pieces; behind the last one, the exchange enters the history."""
        text = ""
        for piece in pieces:
            text += piece
            yield piece
        self.forgotten += len(self.turns) // 2 - len(turns) // 2
        self.turns = [*turns, Turn("assistant", (text,))]
        self.visuals, self.pixels, self.last = shown, pixels, exchange


def has_picture(turn):
    """Whether a visual input stands in a turn."""
    return any(not isinstance(part, str) for part in turn.parts)
