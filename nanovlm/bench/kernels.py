"""The kernels against what else there is, on a GPU: `python -m nanovlm.bench kernels`.

First whether they are right: the error against float64 may be twice that of torch's own attention in bfloat16, and a
hundred runs must agree in every bit. Then how fast: all contenders run in turns, round after round with a cold cache,
and what is reported is the median of the rounds' ratios with its quartiles. Without a GPU the command says so and
prints the floors, below which no kernel can come.
"""

import dataclasses
import functools
import math
import statistics
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from nanovlm.attention import attention, causal, causal_rows, full
from nanovlm.bench import decode
from nanovlm.modality_adaptive import ModalityAdaptive, Routing, route
from nanovlm.training.language_loss import linear_cross_entropy

ERROR_FACTOR = 2  # times the error of torch's own attention in bfloat16
REPEATS = 100
TOKENS, WIDTH, WORDS = 8192, 4096, 32000  # of projection and loss
OURS = "nanovlm"
FLOPS, BYTES, EXPONENTIALS = 790e12, 4.3e12, 3.7e12  # an H200's per second: dense bfloat16 as reached, memory, exp2
BACKWARD_FLOPS = 2.5  # of the forward's: five products instead of two


@dataclass(frozen=True)
class Case:
    """One attention to measure."""

    mask: str  # "causal", "full" or "packed": eight documents
    tokens: int
    head_width: int
    rows: int
    heads: int = 16

    def visible(self, device):
        """attention.Visible of the mask."""
        if self.mask == "full":
            return full(self.tokens, self.tokens, device)
        if self.mask == "causal":
            return causal_rows(1, self.tokens, device)
        return causal((torch.arange(self.tokens, device=device) * 8 // self.tokens)[None])

    def flops(self):
        """Of the forward pass: two products for every pair of query and key; a kernel may skip masked pairs."""
        visible = self.visible("cpu")
        return 4 * self.rows * self.heads * self.head_width * int((visible.stop - visible.first).sum())

    def floor(self, backward):
        """Seconds that the pass takes at least, by arithmetic, numbers to and from memory, and exponentials."""
        flops, size = self.flops(), self.rows * self.heads * self.tokens * self.head_width * 2
        products, tensors = (BACKWARD_FLOPS, 8) if backward else (1, 4)
        return max(flops * products / FLOPS, tensors * size / BYTES, flops / 4 / self.head_width / EXPONENTIALS)


CASES = [
    Case(mask, tokens, width, max(1, 8192 // tokens))
    for tokens in (577, 2048, 8192) for width in (64, 88, 128) for mask in ("causal", "full", "packed")
]  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One measured contender; times in milliseconds, ratio = contender's time / ours."""

    what: str
    contender: str
    median_ms: float = math.nan
    ratio: float = math.nan
    ratio_low: float = math.nan  # first quartile
    ratio_high: float = math.nan  # third quartile
    tflops: float = math.nan
    note: str = ""


def flex(visible, tokens):
    """torch's flex_attention over the same intervals."""
    torch.compiler.reset()  # after eight shapes torch.compile would give up, and write all scores to memory
    sees = lambda b, h, q, k: (k >= visible.first[0, q]) & (k < visible.stop[0, q])
    mask = create_block_mask(sees, None, None, tokens, tokens, device=visible.first.device)
    return functools.partial(torch.compile(flex_attention), block_mask=mask)


def ours_or_torchs(visible, backend):
    """function(q, k, v) by one of attention.BACKENDS, or by one of torch's kernels alone."""
    if isinstance(backend, str):
        return lambda q, k, v: attention(q, k, v, visible, backend)
    return sdpa_kernel(backend)(lambda q, k, v: attention(q, k, v, visible, "sdpa"))


def contenders(case, visible, ours="triton"):
    """{name: function(q, k, v)}, ours first; ours: its backend."""
    named = {OURS: ours, "sdpa": "sdpa"}
    if ours == "triton":
        named = {OURS: ours, "sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa cudnn": SDPBackend.CUDNN_ATTENTION}
        if case.mask == "packed":  # needs the mask, which flash refuses
            named = {OURS: ours, "sdpa masked": "sdpa"}
        named |= {"eager": "reference"} if case.tokens <= 2048 else {}
    found = {name: ours_or_torchs(visible, backend) for name, backend in named.items()}
    # half a minute of compilation for each case
    return found | ({"flex": flex(visible, case.tokens)} if ours == "triton" else {})


def check(width, device, dtype=torch.bfloat16, tokens=577, repeats=REPEATS, ours="triton"):
    """Raise RuntimeError unless our attention is as exact as torch's, times ERROR_FACTOR, and the same every time."""
    torch.manual_seed(width)
    segments = torch.arange(tokens, device=device) * 3 // tokens
    segments[-20:] = -1  # padding, which sees nothing
    visible = causal(segments[None])
    q, k, v, do = (torch.randn(2, heads, tokens, width, device=device, dtype=dtype) for heads in (4, 2, 2, 4))

    def run(backend, kind=dtype):
        inputs = [x.to(kind).requires_grad_() for x in (q, k, v)]
        out = ours_or_torchs(visible, backend)(*inputs)
        return [out, *torch.autograd.grad(out, inputs, do.to(kind))]

    expected, theirs, found = run(SDPBackend.MATH, torch.float64), run("sdpa"), run(ours)
    for name, e, t, o in zip(("out", "dq", "dk", "dv"), expected, theirs, found):
        # some of torch's kernels give NaN where a query sees nothing
        error, allowed = ((x.double() - e).abs().max().item() for x in (o, t.nan_to_num()))
        if not error <= ERROR_FACTOR * allowed + 1e-6:
            raise RuntimeError(f"head width {width}: {name} is off by {error:.2e}, torch's by {allowed:.2e}")
    for repeat in range(repeats):
        if not all(map(torch.equal, found, run(ours))):
            raise RuntimeError(f"head width {width}: run {repeat + 2} gave other bits than the first")


def in_turns(runs, rounds, device="cuda"):
    """Seconds of every run in every round, with a cold cache: {name: list}; one that fails: {name: its words}."""
    cold, failed = torch.empty(2**28 if device == "cuda" else 1, dtype=torch.int8, device=device), {}
    for name, run in runs.items():
        try:
            for _ in range(3):
                decode.seconds(run, device)
        except Exception as error:  # whatever a contender stumbles over stands in the table
            failed[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]}"
    times = decode.in_turns({name: run for name, run in runs.items() if name not in failed}, rounds, device, cold.zero_)
    return {name: failed.get(name) or times[name] for name in runs}


def lines(what, times, flops):
    """list of Line from what `in_turns` gave; ratios are taken round by round, as neighbours share their weather."""
    found, ours = [], times[OURS]
    for name, values in times.items():
        if isinstance(values, str) or isinstance(ours, str):
            found.append(Line(what, name, note=values if isinstance(values, str) else f"{OURS} failed"))
            continue
        low, middle, high = statistics.quantiles([a / b for a, b in zip(values, ours)], n=4, method="inclusive")
        median = statistics.median(values)
        found.append(Line(what, name, 1e3 * median, middle, low, high, flops / median / 1e12))
    return found


def attention_lines(case, rounds, device="cuda", ours="triton"):
    """Forward and backward of one case: list of Line."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shape = (case.rows, case.tokens, case.heads, case.head_width)
    q, k, v, do = (torch.randn(shape, device=device, dtype=dtype).transpose(1, 2) for _ in range(4))
    inputs, named = [x.requires_grad_() for x in (q, k, v)], contenders(case, case.visible(device), ours)

    def backward_alone(function):
        out = functools.cache(lambda: function(*inputs))  # in the first call, where failures are caught
        return lambda: torch.autograd.grad(out(), inputs, do, retain_graph=True)

    name = f"attention {case.mask} {case.tokens} tokens, {case.head_width} channels"
    with torch.no_grad():
        times = in_turns({n: functools.partial(f, *inputs) for n, f in named.items()}, rounds, device)
    found = lines(f"{name}, forward", times, case.flops())
    times = in_turns({n: backward_alone(f) for n, f in named.items()}, rounds, device)
    return found + lines(f"{name}, backward", times, BACKWARD_FLOPS * case.flops())


@torch.no_grad()
def projection_lines(share, rounds):
    """Keys and values where a share of the tokens is vision, forward: ours, index_select, as written, grouped_mm."""
    modality = (torch.arange(TOKENS, device="cuda") < share * TOKENS).long()[None]
    make = lambda: torch.nn.Linear(WIDTH, WIDTH, bias=False, device="cuda", dtype=torch.bfloat16)
    layer = ModalityAdaptive(make(), make())
    x = torch.randn(1, TOKENS, WIDTH, device="cuda", dtype=torch.bfloat16)
    weights = torch.stack([layer.text.weight, layer.vision.weight])

    def grouped():
        order = modality[0].argsort(stable=True)
        ends = torch.stack([TOKENS - modality.sum(), torch.full_like(modality.sum(), TOKENS)]).int()
        out = F.grouped_mm(x[0][order], weights.transpose(1, 2), offs=ends)
        return torch.empty_like(out).index_copy(0, order, out)

    runs = {
        OURS: lambda: layer.in_place(x, route(modality, in_place=True)),
        "index_select": lambda: layer.routed(x, route(modality, in_place=False)),
        "as written": lambda: layer.as_written(x, Routing(modality, None, None)),
        "grouped_mm": grouped,
    }
    return lines(f"projection, {share:.0%} vision", in_turns(runs, rounds), 2 * TOKENS * WIDTH**2)


def loss_lines(rounds):
    """Head and loss, forward and backward, with their peak memory beyond what was there before."""
    hidden = torch.randn(TOKENS, WIDTH, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(WORDS, WIDTH, device="cuda") * 0.02).bfloat16().requires_grad_()
    labels = torch.randint(0, WORDS, (TOKENS,), device="cuda")
    losses = {
        OURS: lambda: linear_cross_entropy(hidden, weight, labels),
        "eager": lambda: F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum"),
    }
    runs = {name: lambda loss=loss: torch.autograd.grad(loss(), (hidden, weight)) for name, loss in losses.items()}
    found = lines("head and loss, forward and backward", in_turns(runs, rounds), 6 * TOKENS * WIDTH * WORDS)
    memory = []
    for run in runs.values():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        memory.append(f"{(torch.cuda.max_memory_allocated() - before) / 1e9:.2f} GB")
    return [dataclasses.replace(line, note=note) for line, note in zip(found, memory)]


def measures(only):
    """What to measure, list of functions of the number of rounds: all whose name contains a word, "" = everything."""
    named = {f"attention {c.mask} {c.tokens} {c.head_width}": functools.partial(attention_lines, c) for c in CASES}
    named |= {f"projection {share:.0%}": functools.partial(projection_lines, share) for share in (0.05, 0.25, 0.6)}
    named["loss"] = loss_lines
    chosen = [function for name, function in named.items() if only in name]
    if not chosen:
        raise ValueError(f"--only {only!r} is in none of these names: {', '.join(named)}")
    return chosen


def measure_all(args):
    """The command `bench kernels`; returns the exit code."""
    if not torch.cuda.is_available():
        print("torch finds no GPU here: nothing is measured. `python -m nanovlm.bench compile` judges compiled code.\n")
        print("\n".join(floors()))
        return 0
    chosen, device = measures(args.only), decode.where("cuda")
    try:
        for width in (64, 88, 128):
            check(width, "cuda")
    except RuntimeError as error:
        print(f"bench: {error}; no speed to compare", file=sys.stderr)
        return 1
    print(f"right to {ERROR_FACTOR} times torch's error, {REPEATS} runs alike; {device}, torch {torch.__version__}")
    measured = (line for measure in chosen for line in measure(args.rounds))
    for line in decode.tabulate(measured, args, "kernels", device=device):
        print(f"{line.what:<56}{line.contender:<13}{line.median_ms:9.3f} ms{line.tflops:7.0f} TFLOP/s  ratio "
              f"{line.ratio:5.2f} ({line.ratio_low:.2f} to {line.ratio_high:.2f}) {line.note}", flush=True)  # fmt: skip
    return 0


def floors():
    """The table of what is impossible to undercut: list of str."""
    limits = f"{FLOPS / 1e12:.0f} TFLOP/s, {BYTES / 1e12} TB/s, {EXPONENTIALS:.1e} exponentials/s"
    told = [f"floors of one H200 ({limits}), ms", f"{'attention':<44}{'forward':>10}{'backward':>10}"]
    for one in CASES:
        name = f"{one.mask}, {one.rows} x {one.tokens} tokens, {one.heads} heads of {one.head_width}"
        told.append(f"{name:<44}{1e3 * one.floor(False):>10.3f}{1e3 * one.floor(True):>10.3f}")
    return told
