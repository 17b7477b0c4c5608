"""A model under examination: it answers questions about pictures in batches, and says how likely it finds an answer."""

import dataclasses
import zlib
from pathlib import Path

import torch
from PIL import ImageOps

from nanovlm.chat import DESCRIBE
from nanovlm.data import images
from nanovlm.data.batching import pixels_of, prompt_row
from nanovlm.data.records import Turn, Visual
from nanovlm.data.templates import end_ids, prompt
from nanovlm.data.video import Clip
from nanovlm.evaluation.choice import score_choices
from nanovlm.evaluation.items import Encoded
from nanovlm.sampler import generate


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
        ends = end_ids(loaded.template, loaded.tokenizer)
        self.loaded, self.num_frames, self.seed, self.border = loaded, num_frames, seed, border
        self.shots, self.kind_shots = tuple(shots), kind_shots or {}
        self.decoding, self.describe = (
            one and (one if one.eos_ids else dataclasses.replace(one, eos_ids=ends)) for one in (decoding, describe)
        )

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
        rows, inputs = self._rows(asked, before, 0)
        template, tokenizer = self.loaded.template, self.loaded.tokenizer
        ids = []
        for one, said, several in zip(asked, before, options):
            last = prompt(self._conversation(one, said)[0], template)[-1]
            continues = last.visual is None and last.special is None
            ids.append([tokenizer.encode(template.answer_prefix + option, continues=continues) for option in several])
        return score_choices(self.loaded.model, rows, ids, inputs)

    def _reply(self, asked, before, decoding):
        if not asked:
            return []
        rows, inputs = self._rows(asked, before, decoding.max_new_tokens)
        generators = None
        if decoding.do_sample:
            device = self.loaded.model.decoder.embedding.weight.device
            seeds = [zlib.crc32(f"{self.seed}/{one.id}".encode()) for one in asked]
            generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        found = generate(self.loaded.model, rows, decoding, inputs, generators)
        ending = self.loaded.template.answer_suffix
        return [self.loaded.tokenizer.decode(ids).removesuffix(ending).strip() for ids in found]

    def _conversation(self, asked, before):
        """(turns, media of all of them) of a question behind the shots and what was said before."""
        media, turns = [], []
        for one, answer in (*self.kind_shots.get(asked.kind, self.shots), (asked, None)):
            places = range(len(media), len(media) + len(one.media))
            media += [(path, one.is_clip) for path in one.media]
            said = [*(before if answer is None else ()), (one.text, answer)]
            for number, (text, reply) in enumerate(said):
                turns.append(Turn("user", (*(places if number == 0 else ()), text)))
                turns += [Turn("assistant", (reply,))] if reply is not None else []
        return turns, media

    def _rows(self, asked, before, new_tokens):
        """Ids of the prompts, and the pictures of each; a picture that several questions share is one tensor."""
        model, loaded, pixels = self.loaded.model, self.loaded, {}
        room = model.decoder.config.context_length - new_tokens
        rows, inputs = [], []
        for one, said in zip(asked, before, strict=True):
            turns, media = self._conversation(one, said)
            visuals = [self._visual(path, is_clip) for path, is_clip in media]
            counts = [model.num_image_tokens(loaded.image_size, len(visual.frames)) for visual in visuals]
            try:
                row = prompt_row(turns, loaded.template, loaded.tokenizer, counts, room)
            except ValueError as error:
                raise ValueError(f"question {one.id!r}: {error}") from error
            for visual in visuals:
                if visual.key not in pixels:
                    pixels[visual.key] = pixels_of([visual], loaded.image_size, loaded.image_fit, loaded.preprocessing)
            rows.append(row.ids)
            inputs.append([pixels[visuals[image[0]].key] for image in row.images])
        return rows, inputs

    def _visual(self, source, is_clip):
        key = str(source) if isinstance(source, Path) else f"{id(source)}"
        if is_clip:
            return Visual(key, Clip(str(source), self.num_frames))
        if isinstance(source, Encoded):
            source = source.open()
        if self.border:
            source = ImageOps.expand(images.load(source), self.border)
        return Visual(key, (source,))
