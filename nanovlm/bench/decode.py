"""How fast answers are written, compared with what everybody uses: `python -m nanovlm.bench decode`.

Tokens per second of greedy decoding against `transformers.generate`, with the same random weights and prompts. Both
run in turns, round after round, so that a busy machine disturbs them alike; the ratio is that of the medians. On a CPU
both must write the same tokens, and the time is that of the one thread. Random weights are as fast as trained ones.
"""

import statistics
import time
from dataclasses import dataclass

import torch

from nanovlm.decoder import Decoder
from nanovlm.generation.fast_decode import FastDecoder
from nanovlm.generation.prefill import Workspace
from nanovlm.generation.sampler import Decoding, generate
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
    "7B": dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
               num_key_value_heads=32, tie_word_embeddings=False),
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
    """The same random LLaMA twice: (transformers' model, vlm.VLM around ours). Raises: ImportError without transformers."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    config = transformers.LlamaConfig(**SIZES[size], max_position_embeddings=CONTEXT, initializer_range=SPREAD)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            theirs = transformers.LlamaForCausalLM(config).eval()
            decoder = Decoder(llama_config(config.to_dict()))
    finally:
        torch.set_default_dtype(before)
    decoder.load_state_dict(weights.to_ours(LLAMA, theirs.state_dict(), decoder.state_dict()))
    theirs.generation_config = transformers.GenerationConfig()
    return theirs, around(decoder).to(device, dtype).eval()


def make_prompts(case, vocab_size):
    """Prompts of random ids, of unequal length if there are several: list of lists of int."""
    generator = torch.Generator().manual_seed(1)
    lengths = [16] if case.num_prompts == 1 else torch.linspace(8, 96, case.num_prompts).long().tolist()
    return [torch.randint(1, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def end_tokens(answers):
    """Ids that let every row end at another step: each row's own word at a place further on than the last row's."""
    number = len(answers)
    return tuple(sorted({answer[(row + 1) * len(answer) // number - 1] for row, answer in enumerate(answers)}))


def their_generate(model, prompts, decoding):
    """transformers.generate: list of lists of new ids, without end token and what follows it."""
    longest, device = max(map(len, prompts)), next(model.parameters()).device
    pads = [longest - len(prompt) for prompt in prompts]
    ids = torch.tensor([[0] * pad + prompt for pad, prompt in zip(pads, prompts)], device=device)
    mask = torch.tensor([[0] * pad + [1] * len(prompt) for pad, prompt in zip(pads, prompts)], device=device)
    rows = model.generate(
        ids, attention_mask=mask, max_new_tokens=decoding.max_new_tokens, do_sample=False,
        eos_token_id=list(decoding.eos_ids) or None, pad_token_id=0,
    )[:, longest:].tolist()  # fmt: skip
    stops = [next((place for place, token in enumerate(row) if token in decoding.eos_ids), len(row)) for row in rows]
    return [row[:stop] for row, stop in zip(rows, stops)]


def fast_workspace(model, device, rows):
    """The Workspace with which a model decodes fastest on a device."""
    return Workspace(FastDecoder(model.decoder, static=device == "cuda", compiled=device == "cuda", rows=rows))


def compare(case, rounds, device, dtype):
    """Measure one case: list of lines. Raises: RuntimeError where the tokens differ on a CPU."""
    theirs, model = build(case.size, device, dtype)
    prompts, decoding = make_prompts(case, model.decoder.config.vocab_size), Decoding(max_new_tokens=case.num_new)
    if case.rows_end:
        decoding = Decoding(max_new_tokens=case.num_new, eos_ids=end_tokens(generate(model, prompts, decoding)))
    workspace = fast_workspace(model, device, case.num_prompts)
    contenders = {
        "transformers": lambda: their_generate(theirs, prompts, decoding),
        "nanovlm": lambda: generate(model, prompts, decoding, workspace=workspace),
    }
    answers = {name: run() for name, run in contenders.items()}  # warm
    same = sum(a == b for one in zip(*answers.values()) for a, b in zip(*one))
    num_tokens = sum(map(len, answers["nanovlm"]))
    if device == "cpu" and answers["nanovlm"] != answers["transformers"]:
        raise RuntimeError(f"only {same} of {num_tokens} tokens are those of transformers: no speed to compare")
    times = in_turns(contenders, rounds, device)
    middle = statistics.median(times["nanovlm"])
    ratio, rate = statistics.median(times["transformers"]) / middle, num_tokens / middle
    verdict = "" if case.required is None else f" (required {case.required}: {reached(ratio, case.required)})"
    if case.rate is not None:
        verdict += f" (required {case.rate:.0f} tokens/s on an H200: {reached(rate, case.rate)})"
    read = sum(p.nbytes for p in model.decoder.parameters()) * max(map(len, answers["nanovlm"])) / middle
    bandwidth = read_bandwidth(device)
    return [
        *rates(times, num_tokens),
        f"ratio of medians {ratio:.2f}{verdict}; {same} of {num_tokens} tokens equal",
        f"weights read at {read / 1e9:.1f} GB/s, {read / bandwidth:.0%} of the {bandwidth / 1e9:.1f} GB/s of a plain sum",
    ]


def decode(args):
    """Run `bench decode`; returns the exit code."""
    cases = chosen(args, CASES[args.device])
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    print(f"greedy decoding on {where(args.device)}; torch {torch.__version__}; {args.rounds} rounds in turns; {dtype}")
    for name, case in cases.items():
        ends = ", every row ends at another step" if case.rows_end else ""
        print(f"\n{name}: {case.num_prompts} prompt(s), up to {case.num_new} new tokens each{ends}")
        print("\n".join(compare(case, args.rounds, args.device, dtype)), flush=True)
    return 0


# ---- the timer and the table of all benchmarks


def chosen(args, cases):
    """The cases that --case names, or all: {name: case}. Raises: ValueError for an unknown one, or without the GPU."""
    for name in args.case or ():
        if name not in cases:
            raise ValueError(f"--case {name} is none of {', '.join(cases)} on {args.device}")
    need(args.device)
    return {name: cases[name] for name in args.case or cases}


def need(device):
    """Raise ValueError without the device; on a CPU one thread is what is measured."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch finds no GPU here; run it where there is one, or leave --device out")
    if device == "cpu":
        torch.set_num_threads(1)


def where(device):
    """What is measured: str."""
    return torch.cuda.get_device_name() if device == "cuda" else f"{cpu_name()}, one thread"


def cpu_name():
    """What the processor calls itself."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return "an unknown processor"


def seconds(function, device):
    """(seconds of this thread on a CPU, else of the GPU, what the function returned)."""
    if device == "cpu":
        start = time.thread_time()
        answer = function()
        return time.thread_time() - start, answer
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    answer = function()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1000, answer


def in_turns(runs, rounds, device, between=lambda: None):
    """Seconds of every function in every round, one after the other: {name: list}; between: called before each."""
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            between()
            times[name].append(seconds(run, device)[0])
    return times


def read_bandwidth(device):
    """Bytes per second that one thread, or the GPU, reads from memory: the best of a few sums over 512 MB."""
    block = torch.ones(2**27, device=device)
    return block.nbytes / min(in_turns({"sum": block.sum}, 6, device)["sum"])


def rates(times, num_tokens):
    """A line for every side of a comparison: list of str; times: as `in_turns` gives them."""
    return [f"{name:<13}{num_tokens / statistics.median(found):9.1f} tokens/s   median {statistics.median(found):.3f} s, "
            f"{min(found):.3f} to {max(found):.3f}" for name, found in times.items()]  # fmt: skip


def reached(value, required):
    """The verdict on a measured value: str."""
    return "reached" if value >= required else "MISSED"
