"""Records made ready for a stage: pictures decoded and fitted, conversations written as rows.

All of it needs no model, so that workers can do it ahead of the training; what they hand over is a record again, whose
batch is the same to the last bit as that of the record they were given.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from nanovlm.data import images
from nanovlm.data.batching import Report, captions_of, checked, fitted, rows_of
from nanovlm.data.images import CLIP, Preprocessing

CHARACTERS = 4  # of English text in one token, roughly


@dataclass(frozen=True)
class Preparation:
    """What one stage does with a record before it can be batched.

    image_size, fit, preprocessing: as in images.to_pixels.
    template, tokenizer, num_image_tokens, max_tokens: as in batching.build_batch. Without a template (a contrastive
      stage) only the pictures are made ready, and every record must be one picture with captions.
    """

    image_size: int
    fit: str
    preprocessing: Preprocessing = CLIP
    template: Any = None
    tokenizer: Any = None
    num_image_tokens: Callable | None = None
    max_tokens: int = 0

    def __call__(self, record):
        """The record with its pictures fitted and its rows written.

        Raises: ValueError (images.ImageError among them) or OSError, naming record or file, if a picture cannot be
          used or a conversation gives no row.
        """
        rows = ()
        if self.template is None:
            captions_of(record)  # before its picture is changed
        else:
            rows = tuple(rows_of(record, self.template, self.tokenizer, self.num_image_tokens, self.image_size))
            for where, row in rows:
                checked(row, self.max_tokens, Report(), where)  # cut and counted when the batch is built
        return replace(record, visuals=tuple(map(self._visual, record.visuals)), rows=rows)

    def _visual(self, visual):
        if visual.view is None and all(isinstance(frame, Image.Image) for frame in visual.frames):
            return visual  # in memory already
        squares = (fitted(frame, visual.view, self.image_size, self.fit, self.preprocessing) for frame in visual.frames)
        return replace(visual, frames=tuple(map(Image.fromarray, squares)), view=None)

    def length(self, record):
        """About how many tokens a record has, without tokenising it: int."""
        characters = sum(len(turn.text) for turns in record.conversations for turn in turns)
        visuals = (self.num_image_tokens(self.image_size, len(visual.frames)) for visual in record.visuals)
        return characters // CHARACTERS + sum(visuals)
