"""SmolVLM-256M beside transformers on one CPU thread: the same random weights, tiles, tokens and type (float32).

    python tests/official/smolvlm_speed.py [SQUARES, 1 or 17] [NEW TOKENS]

Times are CPU seconds of the process, which other work on the machine hardly disturbs: from pictures to the first word, and
words per second behind it. transformers runs with sdpa and its own cache.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import transformers

from nanovlm.generation.fast_decode import FastDecoder
from nanovlm.generation.prefill import Workspace
from nanovlm.generation.sampler import Decoding, stream
from nanovlm.published.weights import to_ours
from nanovlm.recipes import smolvlm

IMAGE, SIZE = 49190, smolvlm.CONFIGS["256M"]


class Clock(transformers.generation.streamers.BaseStreamer):
    """The moments at which transformers gives out tokens, the prompt's first."""

    def __init__(self):
        self.times = []

    def put(self, value):
        self.times.append(time.process_time())

    def end(self):
        """Nothing is held back."""


def main(num_squares=1, num_new=48):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = transformers.Idefics3Config(**SIZE, image_token_id=IMAGE)
    theirs = transformers.Idefics3ForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()
    ours = smolvlm.build(SIZE).eval()
    ours.load_state_dict(to_ours(smolvlm.LAYOUT(SIZE), theirs.state_dict(), ours.state_dict()))
    words, pixels = torch.randint(100, 49000, (43,)).tolist(), torch.randn(num_squares, 3, 512, 512)
    ids = torch.tensor([words[:3] + [IMAGE] * (64 * num_squares) + words[3:]])
    clock, began = Clock(), time.process_time()
    with torch.no_grad():
        expected = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels[None], streamer=clock,
                                   max_new_tokens=num_new, do_sample=False, eos_token_id=None, pad_token_id=2)  # fmt: skip
    said, times, prompt = [], clock.times[1:], torch.where(ids == IMAGE, -1, ids)[0].tolist()
    print(f"transformers  first word {times[0] - began:6.2f} s, {(len(times) - 1) / (times[-1] - times[0]):5.1f} words/s")
    workspace, times, began = Workspace(FastDecoder(ours.decoder)), [], time.process_time()
    for token in stream(ours, prompt, Decoding(max_new_tokens=num_new), [pixels], workspace=workspace):
        said.append(token)
        times.append(time.process_time())
    assert said == expected[0, ids.shape[1] :].tolist(), "other tokens"
    print(f"nanovlm       first word {times[0] - began:6.2f} s, {(len(times) - 1) / (times[-1] - times[0]):5.1f} words/s")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
