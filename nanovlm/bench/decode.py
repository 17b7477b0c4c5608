"""How fast answers are written, compared with what everybody uses: `python -m nanovlm.bench decode`.

Tokens per second of greedy decoding against `transformers.generate`, with the same random weights and prompts. Both
run in turns, round after round, so that a busy machine disturbs them alike; the ratio is that of the medians. On a CPU
both must write the same tokens, and the time is that of the one thread. Random weights are as fast as trained ones.
"""

import csv
import dataclasses
import datetime
import itertools
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from nanovlm.decoder import Decoder
from nanovlm.generation.fast_decode import FastDecoder
from nanovlm.generation.prefill import Workspace
from nanovlm.generation.sampler import Decoding, generate
from nanovlm.machine import check_device, cpuinfo
from nanovlm.projector import LinearProjector
from nanovlm.published import weights
from nanovlm.published.language import LLAMA, llama_config
from nanovlm.vit import ViT, ViTConfig
from nanovlm.vlm import VLM

SIZES = {  # as in a config.json of a LLaMA
    "135M": dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                 num_key_value_heads=3, tie_word_embeddings=True),
    "4M": dict(vocab_size=1024, hidden_size=192, intermediate_size=512, num_hidden_layers=8, num_attention_heads=3,
               num_key_value_heads=3, tie_word_embeddings=True),
    "7B": dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
               num_attention_heads=32, num_key_value_heads=32, tie_word_embeddings=False),
}  # fmt: skip
CONTEXT = 1024  # tokens
SPREAD = 0.1  # standard deviation of the weights; with less, a random model with a tied head repeats its last word


@dataclass(frozen=True)
class Case:
    """One comparison: a size of SIZES, prompts and new tokens, and the ratio that counts as reached."""

    size: str
    num_prompts: int
    num_new: int  # tokens
    required: float | None
    rows_end: bool = False  # every row at another step, as answers do
    rate: float | None = None  # tokens per second that count as reached, where the ratio is open


CASES = {
    "cpu": {
        "135M": Case("135M", 1, 32, 1.35),
        "4M": Case("4M", 1, 96, 2.0),
        "135M-batch": Case("135M", 16, 32, 1.5, rows_end=True),
        "135M-batch-full": Case("135M", 16, 32, None),
    },
    "cuda": {"7B": Case("7B", 1, 256, None, rate=250)},  # on an H200
}


def around(decoder):
    """A decoder in a vlm.VLM whose tower and bridge are next to nothing."""
    vision = ViT(ViTConfig(8, 4, width=8, num_layers=0, num_heads=1, mlp_width=8, class_token=False))
    return VLM(vision, LinearProjector(8, decoder.config.width), decoder)


def build(size, device, dtype):
    """The same random LLaMA twice: (transformers' model, vlm.VLM around ours). Raises: ImportError."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    config = transformers.LlamaConfig(**SIZES[size], max_position_embeddings=CONTEXT, initializer_range=SPREAD)
    torch.manual_seed(0)
    with torch.device(device):
        theirs = transformers.LlamaForCausalLM(config).to(dtype).eval()
        model = around(Decoder(llama_config(config.to_dict()))).to(dtype).eval()
    model.decoder.load_state_dict(weights.to_ours(LLAMA, theirs.state_dict(), model.decoder.state_dict()))
    theirs.generation_config = transformers.GenerationConfig()
    return theirs, model


def make_prompts(case, vocab_size):
    """Prompts of random ids from 1 on, of unequal length if there are several: list of lists of int."""
    generator = torch.Generator().manual_seed(1)
    lengths = [16] if case.num_prompts == 1 else torch.linspace(8, 96, case.num_prompts).long().tolist()
    return [torch.randint(1, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def end_tokens(answers):
    """Ids that let every row end at another step: each row's own word at a place further on than the last row's."""
    return tuple({answer[row * len(answer) // len(answers) - 1] for row, answer in enumerate(answers, 1)})


def their_generate(model, prompts, decoding):
    """transformers.generate: list of lists of new ids, without end token and what follows it."""
    ids = pad_sequence(list(map(torch.tensor, prompts)), True, padding_side="left").to(model.device)
    options = dict(max_new_tokens=decoding.max_new_tokens, do_sample=False, eos_token_id=list(decoding.eos_ids) or None)
    rows = model.generate(ids, attention_mask=(ids > 0).long(), pad_token_id=0, **options)[:, ids.shape[1] :].tolist()
    return [list(itertools.takewhile(lambda token: token not in decoding.eos_ids, row)) for row in rows]


def compare(case, rounds, device, dtype):
    """Measure one case: list of lines. Raises: RuntimeError where the tokens differ on a CPU."""
    theirs, model = build(case.size, device, dtype)
    prompts, decoding = make_prompts(case, model.decoder.config.vocab_size), Decoding(max_new_tokens=case.num_new)
    if case.rows_end:
        decoding = dataclasses.replace(decoding, eos_ids=end_tokens(generate(model, prompts, decoding)))
    workspace = Workspace(FastDecoder(model.decoder, rows=case.num_prompts))
    contenders = {
        "transformers": lambda: their_generate(theirs, prompts, decoding),
        "nanovlm": lambda: generate(model, prompts, decoding, workspace=workspace),
    }
    expected, answers = (run() for run in contenders.values())  # warm
    same = sum(a == b for one in zip(expected, answers) for a, b in zip(*one))
    num_tokens = sum(map(len, answers))
    if device == "cpu" and answers != expected:
        raise RuntimeError(f"only {same} of {num_tokens} tokens are those of transformers: no speed to compare")
    times = in_turns(contenders, rounds, device)
    told, middle = comparison(times, num_tokens, case.required), statistics.median(times["nanovlm"])
    if case.rate is not None:
        told.append(f"(required {case.rate:.0f} tokens/s on an H200: {reached(num_tokens / middle, case.rate)})")
    read = sum(p.nbytes for p in model.decoder.parameters()) * max(map(len, answers)) / middle
    block = torch.ones(2**27, device=device)  # what one thread, or the GPU, reads at best: a few sums over 512 MB
    bandwidth = block.nbytes / min(in_turns({"sum": block.sum}, 6, device)["sum"])
    share = f"{read / bandwidth:.0%} of the {bandwidth / 1e9:.1f} GB/s of a plain sum"
    return [*told, f"{same} of {num_tokens} tokens equal; weights read at {read / 1e9:.1f} GB/s, {share}"]


def decode(args):
    """Run `bench decode`; returns the exit code."""
    cases = chosen(args, CASES[args.device])
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    print(f"greedy decoding on {where(args.device)}; torch {torch.__version__}; {args.rounds} rounds in turns; {dtype}")
    for name, case in cases.items():
        ends = ", every row ends at another step" if case.rows_end else ""
        print(f"\n{name}: {case.num_prompts} prompt(s), up to {case.num_new} new tokens each{ends}",
              *compare(case, args.rounds, args.device, dtype), sep="\n", flush=True)  # fmt: skip
    return 0


# ---- the timer and the tables of all benchmarks


def chosen(args, cases):
    """The cases that --case names, or all: {name: case}. Raises: ValueError for an unknown one, or without the GPU."""
    if unknown := set(args.case or ()) - set(cases):
        raise ValueError(f"--case {unknown.pop()} is none of {', '.join(cases)} on {args.device}")
    prepare(args.device)
    return {name: cases[name] for name in args.case or cases}


def prepare(device):
    """Raise ValueError without the device; on a CPU one thread is what is measured."""
    check_device(device)
    if device == "cpu":
        torch.set_num_threads(1)


def where(device):
    """What is measured: str."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{cpuinfo('model name') or 'an unknown processor'}, one thread"


def seconds(function, device):
    """Seconds that a call takes: of this thread on a CPU, else of the GPU."""
    if device == "cpu":
        start = time.thread_time()
        function()
        return time.thread_time() - start
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1000


def in_turns(runs, rounds, device, between=lambda: None):
    """Seconds of every function in every round, one after the other: {name: list}; between: called before each."""
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            between()
            times[name].append(seconds(run, device))
    return times


def comparison(times, num_tokens, required):
    """A line for every side, and one for the ratio: list of str; times: as of `in_turns`. required: ratio, or None."""
    medians = {name: statistics.median(found) for name, found in times.items()}
    ratio = medians["transformers"] / medians["nanovlm"]
    verdict = "" if required is None else f" (required {required}: {reached(ratio, required)})"
    lines = [f"{name:<13}{num_tokens / median:9.1f} tokens/s   median {median:.3f} s, {min(times[name]):.3f} to "
             f"{max(times[name]):.3f}" for name, median in medians.items()]  # fmt: skip
    return [*lines, f"ratio of medians {ratio:.2f}{verdict}"]


def reached(value, required):
    """The verdict on a measured value: str."""
    return "reached" if value >= required else "MISSED"


def tabulate(lines, args, name, **places):
    """Add dataclasses, as they come, to the table OUT/NAME_DATE.csv, and hand them on. places: further columns."""
    path = Path(args.out) / f"{name}_{datetime.date.today().isoformat()}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", newline="") as file:
        for line in lines:
            row = dataclasses.asdict(line) | {"torch": torch.__version__} | places
            table = csv.DictWriter(file, row)
            if not file.tell():
                table.writeheader()
            table.writerow(row)
            file.flush()  # a time limit must not cost what is already measured
            yield line
    print(f"written to {path}")
