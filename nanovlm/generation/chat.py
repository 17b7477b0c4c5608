"""Talk to a model: single questions, or a conversation with pictures at any turn, in a history that always fits.

    model = nanovlm.load("out/nano")
    model.ask("what is this?", images=["a.png"])
    model.ask(["what color is it?", "how many are there?"], images=["a.png"])
    chat = model.chat()

The whole conversation is written anew with the model's template for every answer. When the context is full, the oldest
exchanges without a picture are forgotten, whole ones only: half a turn would be a text the model never trained on.

Describe-first: the model first describes the picture, then answers in that history. Its own words about the picture
help it to follow an instruction it was never trained for. Lynx, arXiv:2307.02469, Sec. 2.3 and 3.2.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from nanovlm.data.images import CLIP, Preprocessing
from nanovlm.data.records import Turn, Visual
from nanovlm.data.templates import Template
from nanovlm.data.tokenizer import Tokenizer
from nanovlm.generation.answer import DESCRIBE, PromptTooLong, check_speaks, make_prompt, reply, stream
from nanovlm.generation.prefill import Workspace
from nanovlm.generation.sampler import Decoding
from nanovlm.names import check_known


@dataclass(frozen=True)
class Form:
    """How short questions or captions are asked for in a benchmark, of a model that holds no conversation."""

    template: Template
    prompt: str = "{question}"  # in place of the task's
    stop: tuple[str, ...] = ()  # words before which an answer ends
    text_shots: int = 0  # examples without their pictures that stand in front where no shots are asked for


@dataclass(frozen=True)
class Assistant:
    """A model and all that decides how it is asked: what `nanovlm.load` returns."""

    model: nn.Module  # vlm.VLM, its vision None if it reads no pictures; of a bare folder a ViT or a pair of towers
    tokenizer: Tokenizer | None  # None beside a bare tower
    template: Template
    image_size: int  # pixels; 0 = reads no pictures
    image_fit: str = "crop"  # how a picture becomes square, as in images.to_pixels
    preprocessing: Preprocessing = CLIP  # mean and deviation of its pixels; size and fit are those above
    tiles: float | None = None  # squares along a picture's longer side, as in tiles.cut; None = as image_fit says
    decodings: dict = field(default_factory=lambda: {"default": Decoding()})  # preset name -> sampler.Decoding
    forms: dict = field(default_factory=dict)  # preset name -> Form
    remark: str = ""  # what to say beside an answer about a picture unlike the training's; "" = nothing
    notes: tuple[str, ...] = ()  # what was unusual about the files
    differs: tuple[str, ...] = ()  # where pictures or chats are not read as the published folder says

    def preset(self, name):
        """One of the decodings. Raises: ValueError with the nearest known name."""
        check_known("unknown preset", name, self.decodings)
        return self.decodings[name]

    def ask(self, question, images=(), decoding=None, seed=0):
        """Answer a question, or several at once that know nothing of each other.

        Args:
          question: str, or list of str.
          images: None, one, or a list of those shown with every question: each a path, a PIL image or uint8[H, W, 3]; a
            clip within the list is a list of them, as `[*video.Clip(path, 8)]` gives it, or an array uint8[F, H, W, 3].
          decoding: sampler.Decoding; None = the preset "default". seed: of sampling.
        Returns: str, or list of str.
        Raises: ValueError if it is too long, or the model cannot read pictures; what reading a picture raises.
        """
        questions, decoding = [question] if isinstance(question, str) else question, decoding or self.preset("default")
        if not all(one.strip() for one in questions):
            raise ValueError("the question is empty")
        visuals, pixels = visuals_of(images), {}
        turns = [[Turn("user", (*range(len(visuals)), one))] for one in questions]
        prompts = [make_prompt(self, one, visuals, decoding.max_new_tokens, pixels) for one in turns]
        texts = reply(self, prompts, decoding, [f"{seed}/{place}" for place in range(len(prompts))])
        return texts[0] if isinstance(question, str) else texts

    def chat(self, decoding=None, seed=0):
        """A conversation: Chat. Args: as of `ask`. Raises: ValueError for a vision tower alone."""
        check_speaks(self.model)
        generator = torch.Generator(self.model.decoder.embedding.weight.device).manual_seed(seed)
        return Chat(self, decoding or self.preset("default"), generator)


def visuals_of(pictures, first=0):
    """Pictures as of `Assistant.ask`, numbered: list of records.Visual."""
    pictures = () if pictures is None else pictures if isinstance(pictures, (tuple, list)) else [pictures]
    is_clip = [isinstance(one, (tuple, list)) or getattr(one, "ndim", 3) == 4 for one in pictures]
    frames = [tuple(one) if clip else (one,) for one, clip in zip(pictures, is_clip)]
    names = [f" ({one})" if isinstance(one, str | Path) else "" for one in pictures]
    return [Visual(f"picture {n}{name}", several) for n, (name, several) in enumerate(zip(names, frames), first + 1)]


class Chat:
    """A conversation with a model.

    Args:
      assistant: Assistant.
      decoding: sampler.Decoding; without eos_ids, what ends a reply in this form does (templates.end_ids).
      generator: as in sampler.generate, for one row.

    Attributes:
      turns: list of Turn, the history as the model will see it. visuals: list of records.Visual shown in it.
      workspace: prefill.Workspace; pictures are encoded when they are first shown, and not again for later answers.
      forgotten: int, exchanges dropped since the context was full.
      prompt, answer: answer.Prompt and new ids of the latest answer, without the end token; None before the first.
    """

    def __init__(self, assistant, decoding, generator=None):
        self.assistant, self.decoding, self.generator = assistant, decoding, generator
        self.workspace = Workspace()
        self.reset()

    def reset(self):
        """Forget everything said and shown."""
        self.turns, self.visuals, self.pixels, self.forgotten = [], [], {}, 0
        self.prompt = self.answer = None
        self.workspace.pictures.clear()

    def ask(self, question, images=(), decoding=None):
        """The whole answer: str. Args, Raises: as of `stream`."""
        return "".join(self.stream(question, images, decoding))

    def stream(self, question, images=(), decoding=None):
        """Ask, perhaps showing something.

        Args:
          question: str. images: what is shown with it, as of `Assistant.ask`.
          decoding: sampler.Decoding of this answer alone; None = the chat's.
        Returns: iterator of str, pieces of the answer; one piece from a beam search. The exchange enters the history
          when the last piece is taken.
        Raises: ValueError if there is no question, if a picture cannot be read, or if the question and the turns with
          pictures do not fit into the context.
        """
        if not question.strip():
            raise ValueError("the question is empty")
        decoding, shown = decoding or self.decoding, [*self.visuals, *visuals_of(images, len(self.visuals))]
        turns = [*self.turns, Turn("user", (*range(len(self.visuals), len(shown)), question))]
        pixels = dict(self.pixels)
        while True:
            try:
                with self.workspace.timed("images"):  # they are read and cut here
                    prompt = make_prompt(self.assistant, turns, shown, decoding.max_new_tokens, pixels)
                break
            except PromptTooLong:
                place = next((i for i in range(0, len(turns) - 1, 2) if not turns[i].visuals), None)
                if place is None:
                    raise
                turns = turns[:place] + turns[place + 2 :]
        answer = []
        pieces = stream(self.assistant, prompt, decoding, answer, self.generator, self.workspace)

        def remembered():
            """The same pieces; behind the last one, the exchange enters the history."""
            text = ""
            for piece in pieces:
                text += piece
                yield piece
            self.forgotten += len(self.turns) // 2 - len(turns) // 2
            self.turns = [*turns, Turn("assistant", (text,))]
            self.visuals, self.pixels, self.prompt, self.answer = shown, pixels, prompt, answer

        return remembered()

    def describe_first(self, question, images, decoding, describe=DESCRIBE):
        """Round 0 describes the pictures with its own decoding, then the question is asked in that history.

        Returns: (description str, iterator of str as of `stream`). Raises: as `stream`.
        """
        return self.ask(describe, images, decoding), self.stream(question)
