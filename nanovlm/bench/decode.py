"""How fast, compared with what everybody uses: `python -m nanovlm.bench decode`.

Tokens per second of greedy decoding against `transformers.generate`, with the same random weights and prompts. Both
run in turns, round after round, so that a busy machine disturbs them alike; the ratio is that of the medians. On a CPU
both must write the same tokens, and the time is that of the one thread. Random weights are as fast as trained ones.

    python -m nanovlm.bench decode                     135M and 4M parameters, one prompt and 16
    python -m nanovlm.bench decode --case 4M --rounds 9
    python -m nanovlm.bench decode --device cuda       7B in bfloat16, compiled, CUDA graphs
"""

import argparse
import importlib
import platform
import statistics
import sys
import time
from dataclasses import dataclass

import torch

from nanovlm.published import weights
from nanovlm.decoder import Decoder
from nanovlm.generation.fast_decode import FastDecoder
from nanovlm.published.language import LLAMA, llama_config
from nanovlm.projector import LinearProjector
from nanovlm.generation.sampler import Decoding, generate
from nanovlm.vit import ViT, ViTConfig
from nanovlm.vlm import VLM
from nanovlm.generation.prefill import Workspace

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
BAD_INPUT = 2  # exit code


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


def build(size, device, dtype):
    """The same random LLaMA twice: (transformers' model, vlm.VLM around ours).

    Raises: ImportError without transformers.
    """
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
    vision = ViT(ViTConfig(8, 4, width=8, num_layers=0, num_heads=1, mlp_width=8, class_token=False))
    model = VLM(vision, LinearProjector(8, decoder.config.width), decoder).to(device, dtype).eval()
    theirs.generation_config = transformers.GenerationConfig()
    return theirs, model


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


def seconds(function, device):
    """(seconds of this thread on a CPU, else of the wall, what the function returned)."""
    clock = time.thread_time if device == "cpu" else time.perf_counter
    if device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    answer = function()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start, answer


def read_bandwidth(device):
    """Bytes per second that one thread, or the GPU, reads from memory: the best of a few sums over 512 MB."""
    block = torch.ones(2**27, device=device)
    block.sum()
    return block.nbytes / min(seconds(block.sum, device)[0] for _ in range(5))


def compare(case, rounds, device, dtype):
    """Measure one case: list of lines. Raises: RuntimeError where the tokens differ on a CPU."""
    theirs, model = build(case.size, device, dtype)
    prompts = make_prompts(case, model.decoder.config.vocab_size)
    decoding = Decoding(max_new_tokens=case.num_new)
    if case.rows_end:
        decoding = Decoding(max_new_tokens=case.num_new, eos_ids=end_tokens(generate(model, prompts, decoding)))
    on_gpu = device == "cuda"
    workspace = Workspace(FastDecoder(model.decoder, static=on_gpu, compiled=on_gpu, rows=case.num_prompts))
    contenders = {
        "transformers": lambda: their_generate(theirs, prompts, decoding),
        "nanovlm": lambda: generate(model, prompts, decoding, workspace=workspace),
    }
    answers = {name: run() for name, run in contenders.items()}  # warm
    same = sum(a == b for one in zip(*answers.values()) for a, b in zip(*one))
    num_tokens = sum(map(len, answers["nanovlm"]))
    if not on_gpu and answers["nanovlm"] != answers["transformers"]:
        raise RuntimeError(f"only {same} of {num_tokens} tokens are those of transformers: no speed to compare")
    times = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            times[name].append(seconds(run, device)[0])
    middle = {name: statistics.median(values) for name, values in times.items()}
    ratio = middle["transformers"] / middle["nanovlm"]
    verdict = ""
    if case.required is not None:
        verdict = f" (required {case.required}: {'reached' if ratio >= case.required else 'MISSED'})"
    if case.rate is not None:
        rate = num_tokens / middle["nanovlm"]
        verdict += f" (required {case.rate:.0f} tokens/s on an H200: {'reached' if rate >= case.rate else 'MISSED'})"
    lines = [
        f"{name:<13}{num_tokens / middle[name]:9.1f} tokens/s   median {middle[name]:.3f} s, "
        f"{min(values):.3f} to {max(values):.3f}"
        for name, values in times.items()
    ]
    steps = max(map(len, answers["nanovlm"]))
    read = sum(p.nbytes for p in model.decoder.parameters()) * steps / middle["nanovlm"]
    bandwidth = read_bandwidth(device)
    lines.append(f"ratio of medians {ratio:.2f}{verdict}; {same} of {num_tokens} tokens equal")
    share = f"{read / bandwidth:.0%} of the {bandwidth / 1e9:.1f} GB/s of a plain sum"
    lines.append(f"weights read at {read / 1e9:.1f} GB/s, {share}")
    return lines


def decode(wishes):
    """Run `bench decode`; returns the exit code."""
    cases = CASES[wishes.device]
    names = wishes.case or list(cases)
    if wishes.device == "cuda" and not torch.cuda.is_available():
        say = "--device cuda, but torch finds no GPU here; run it where there is one, or leave --device out"
        print(f"bench: {say}", file=sys.stderr)
        return BAD_INPUT
    unknown = [name for name in names if name not in cases]
    if unknown:
        print(f"bench: --case {unknown[0]} is none of {', '.join(cases)} on {wishes.device}", file=sys.stderr)
        return BAD_INPUT
    torch.set_num_threads(1)
    dtype = torch.bfloat16 if wishes.device == "cuda" else torch.float32
    where = torch.cuda.get_device_name() if wishes.device == "cuda" else f"{cpu_name()}, one thread"
    print(f"greedy decoding on {where}; torch {torch.__version__}; {wishes.rounds} rounds in turns; {dtype}")
    for name in names:
        case = cases[name]
        ends = ", every row ends at another step" if case.rows_end else ""
        print(f"\n{name}: {case.num_prompts} prompt(s), up to {case.num_new} new tokens each{ends}")
        try:
            lines = compare(case, wishes.rounds, wishes.device, dtype)
        except ImportError:
            print("bench: transformers is missing; pip install -r tests/requirements.txt", file=sys.stderr)
            return BAD_INPUT
        print("\n".join(lines), flush=True)
    return 0


def cpu_name():
    """What the processor calls itself."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def make_parser():
    """The command line, as an argparse parser."""
    parser = argparse.ArgumentParser(
        prog="python -m nanovlm.bench", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("decode", allow_abbrev=False, help="tokens per second against transformers.generate")
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    command.add_argument("--case", action="append", metavar="NAME", help="one of the cases; may be given several times")
    command.add_argument("--rounds", type=int, default=5, metavar="N", help="measurements of each side")
    command.set_defaults(run=decode)
    command = commands.add_parser("train", allow_abbrev=False, help="training steps against transformers; on a GPU, against its peak")
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    command.add_argument("--case", action="append", metavar="NAME", help="one of the cases; may be given several times")
    command.add_argument("--compile", action="store_true", help="on a GPU: torch.compile around every block")
    command.add_argument("--out", default="notebooks/results", metavar="FOLDER", help="where the dated table of a GPU goes")
    command.add_argument("--rounds", type=int, default=7, metavar="N", help="measurements of each side")
    command.set_defaults(run=lambda wishes: importlib.import_module("nanovlm.bench.train").train(wishes))
    command = commands.add_parser("kernels", allow_abbrev=False, help="the Triton kernels against torch's, on a GPU")
    command.add_argument("--out", default="notebooks/results", metavar="FOLDER", help="where the dated table goes")
    command.add_argument("--rounds", type=int, default=20, metavar="N", help="measurements of each contender")
    command.add_argument("--only", default="", metavar="WORD", help="what has this in its name: causal, projection, loss …")
    command.set_defaults(run=lambda wishes: importlib.import_module("nanovlm.bench.kernels").measure_all(wishes))
    command = commands.add_parser("compile", allow_abbrev=False, help="registers, spills and memory of every kernel, without a GPU")
    command.add_argument("--kernel", action="append", choices=("attention", "projection"), help="may be given several times")
    command.add_argument("--record", action="store_true", help="remember how long the loops are, for later runs to compare with")
    command.set_defaults(rounds=1, run=lambda wishes: importlib.import_module("nanovlm.bench.compile").judge_all(wishes))
    return parser


def main(arguments=None):
    """Run the command line; returns the exit code."""
    parser = make_parser()
    wishes = parser.parse_args(arguments)
    if wishes.rounds < 1:
        parser.error(f"--rounds {wishes.rounds}: at least 1 is needed")
    return wishes.run(wishes)


if __name__ == "__main__":
    sys.exit(main())
