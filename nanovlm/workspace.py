"""What generation keeps from call to call, if asked to: pictures already encoded, and the time its parts took."""

import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

PARTS = ("images", "prompt", "decoding")


@dataclass
class Workspace:
    """Hand the same one to several calls of `sampler.generate` or `sampler.stream`.

    fast: fast_decode.FastDecoder of the model; None = the readable step.
    pictures: {id of a tensor of pixels: (the tensor itself, float[n, W] its image tokens)}, never forgotten here.
    seconds: wall time in each of PARTS, summed over the calls. What the caller does between two tokens does not count.
    num_images, num_prompt_tokens, num_new_tokens: visual inputs encoded, tokens of the prompts, tokens of the answers.
    """

    fast: object = None
    pictures: dict = field(default_factory=dict)
    seconds: dict = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    num_images: int = 0
    num_prompt_tokens: int = 0
    num_new_tokens: int = 0
    clock: Callable = time.perf_counter

    @contextmanager
    def timed(self, part, device=None):
        """Count the time of a block; device: wait for this one before the clock is read."""
        start = self.clock()
        yield
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        self.seconds[part] += self.clock() - start

    def report(self):
        """The times in words: list of str."""
        images, prompt, decoding = (self.seconds[part] for part in PARTS)
        rate = f", {self.num_new_tokens / decoding:.1f} tokens/s" if decoding else ""
        return [
            f"images   {images:8.3f} s  ({self.num_images} encoded)",
            f"prompt   {prompt:8.3f} s  ({self.num_prompt_tokens} tokens)",
            f"decoding {decoding:8.3f} s  ({self.num_new_tokens} tokens{rate})",
        ]
