"""How fast a training step is: `python -m nanovlm.bench train`.

On a CPU against `transformers`: the same LLaMA with the same random weights, the same rows, the same AdamW of torch, by
turns, round after round, so that a busy machine disturbs both alike. Every step's loss must be the same on both sides,
or there is no speed to compare; the ratio is that of the medians of one thread's time.

On a GPU (`--device cuda`) there is nothing to compare with but the GPU itself: tokens per second, the share of its
peak, and the memory that a step took beside the forecast (both of training/cost.py), with torch's and with our own
attention, into a dated table.
"""

import dataclasses
import math
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nanovlm.bench import decode
from nanovlm.decoder import Decoder
from nanovlm.published.language import llama_config
from nanovlm.recipes import RECIPES
from nanovlm.training import optimizer
from nanovlm.training.cost import GB, example_cost, peak_flops, stage_memory, total_cost
from nanovlm.training.language_loss import language_loss
from nanovlm.training.processes import BLOCK, surround
from nanovlm.training.stages import WORDS, Stage, freeze
from nanovlm.vlm import IGNORE, IMAGE_TOKEN, Batch

SAME = 1e-4  # how far apart the two sides' losses may be: sums are taken in another order
LEARNING_RATE = 1e-5  # AdamW turns the last digit of a small gradient into a whole step: larger ones drift apart
REQUIRED = 0.95  # ratio of the medians
CASES = {"4M": (8, 128), "135M": (2, 64)}  # size of decode.SIZES -> rows, tokens
SETTLE, MEASURED = 3, 10  # steps on a GPU: before the clock starts, and under it


def make_batch(vocab_size, rows, words, device="cpu", image_tokens=0, image_size=0):
    """Rows of random words, all of them trained, behind a picture where there are image tokens: Batch."""
    ids = torch.randint(1, vocab_size, (rows, words), generator=torch.Generator().manual_seed(2)).to(device)
    ids = F.pad(ids, (image_tokens, 0), value=IMAGE_TOKEN)
    positions = torch.arange(ids.shape[1], device=device).expand_as(ids)
    each = torch.arange(rows if image_tokens else 0)
    pixels = torch.randn(rows, 3, image_size, image_size, device=device) if image_tokens else None
    labels = torch.where(ids == IMAGE_TOKEN, IGNORE, ids)
    return Batch(ids, labels, torch.zeros_like(ids), positions, pixels, torch.ones_like(each), each, each)


def sides(size, rows, tokens):
    """The two contenders, equal weights and rows: {name: function that takes a step and returns the loss before it}."""
    theirs, model = decode.build(size, "cpu", torch.float32)
    batch = make_batch(model.decoder.config.vocab_size, rows, tokens)

    def stepper(module, loss_of):
        adamw = torch.optim.AdamW(module.train().parameters(), LEARNING_RATE, (0.9, 0.95), weight_decay=0.0, fused=True)

        def step():
            adamw.zero_grad()
            loss = loss_of()
            loss.backward()
            adamw.step()
            return loss.item()

        return step

    return {
        "transformers": stepper(theirs, lambda: theirs(input_ids=batch.ids, labels=batch.ids).loss),
        "nanovlm": stepper(model.decoder, lambda: torch.div(*language_loss(model, batch))),
    }


def compare(size, rows, tokens, rounds):
    """Measure one size on a CPU: list of lines. Raises: RuntimeError where the losses differ."""
    contenders = sides(size, rows, tokens)
    losses = {name: [] for name in contenders}
    noted = {name: lambda name=name: losses[name].append(contenders[name]()) for name in contenders}
    times = decode.in_turns(noted, rounds + 1, "cpu")
    times = {name: found[1:] for name, found in times.items()}  # the first round warms up
    for number, (one, other) in enumerate(zip(*losses.values()), 1):
        if abs(one - other) > SAME * abs(one):
            raise RuntimeError(f"step {number}: the loss is {one:.6f} in transformers and {other:.6f} here: "
                               "no speed to compare")  # fmt: skip
    told = f"{rounds + 1} losses equal, {losses['nanovlm'][0]:.4f} to {losses['nanovlm'][-1]:.4f}"
    return [*decode.comparison(times, rows * tokens, REQUIRED), told]


@dataclass(frozen=True)
class Line:
    """One measurement on a GPU."""

    what: str
    backend: str
    rows: int
    tokens: int  # of a row, image tokens included
    tokens_per_second: float
    utilisation: float  # share of the GPU's peak
    required: float | None
    gb_measured: float
    gb_estimated: float


def slice_of_7b():
    """Four layers as wide as LLaMA-7B's, text alone: (VLM with next to no tower, Stage, rows, text, frames)."""
    config = llama_config(decode.SIZES["7B"] | {"num_hidden_layers": 4, "max_position_embeddings": 2048})
    stage = Stage("slice", "language", dict.fromkeys(WORDS, 1e-4), {"words": 1}, 20, 8, max_tokens=2048, image_size=8)
    return decode.around(Decoder(config)), stage, 8, 2048, 0


def of_recipe(name, size, stage, rows, text):
    """A function that makes a recipe's model, as `slice_of_7b` does; stage: its number."""
    recipe = RECIPES[name]
    return lambda: (recipe.build(size, 0), recipe.stages(size, False)[stage], rows, text, 1)


GPU_CASES = {  # what, and the share of the peak aimed at
    "7B-slice": (slice_of_7b, 0.45),
    "llava_phi": (of_recipe("llava_phi", "full", -1, 4, 512), 0.40),  # its last stage trains every part
    "lynx": (of_recipe("lynx", "full", 0, 8, 40), None),  # align, of pairs of a picture and a caption
}


def measure(name, make, required, backend, compiled=False, device="cuda"):
    """Train some steps on a GPU (a CPU rehearses it, without its memory and peak): Line."""
    with torch.device("meta"):
        shape, stage, rows, text, frames = make()
        stage = dataclasses.replace(stage, precision="bfloat16")
        costs = example_cost(shape, stage, text, frames)
    with torch.device(device):
        model = make()[0]
    model.vision.resize(stage.image_size)
    freeze(model, None, stage)
    model.set_backend(backend)
    for block_name, block in model.named_modules() if compiled else ():
        if BLOCK.fullmatch(block_name):
            surround(block, compiled=True, recompute=False)
    image_tokens = frames * model.num_image_tokens(stage.image_size)
    batch = make_batch(model.decoder.config.vocab_size, rows, text, device, image_tokens, stage.image_size)
    optimizers = optimizer.build(model.parts(), stage)

    def steps(number):
        for _ in range(number):
            with torch.autocast(device, torch.bfloat16):
                loss, count = language_loss(model, batch)
            (loss / count).backward()
            for one in optimizers:
                one.step()
                one.zero_grad()

    steps(SETTLE)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    speed = MEASURED / decode.seconds(lambda: steps(MEASURED), device)  # steps a second
    share = rows * total_cost(costs.values()).flops * speed / (peak_flops(decode.where(device)) or math.nan)
    memory, estimated = torch.cuda.max_memory_allocated(), stage_memory(model.parts(), stage, costs).total(rows)
    how = backend + (", compiled" if compiled else "")
    tokens, number = batch.ids.shape[1], batch.ids.numel()
    return Line(name, how, rows, tokens, number * speed, share, required, memory / GB, estimated / GB)


def measure_all(cases, compiled):
    """Lines of all cases with both backends: iterator of Line; what does not fit is said, and passed over."""
    for name, backend in ((name, backend) for name in cases for backend in ("sdpa", "triton")):
        try:
            yield measure(name, *cases[name], backend, compiled)
        except torch.cuda.OutOfMemoryError as error:
            print(f"{name}, {backend}: does not fit: {error}", file=sys.stderr)


def train(args):
    """Run `bench train`; returns the exit code: 0 also for a ratio that is missed, which is said."""
    cases = decode.chosen(args, GPU_CASES if args.device == "cuda" else CASES)
    place = decode.where(args.device)
    print(f"training steps on {place}; torch {torch.__version__}")
    if args.device == "cuda":
        measured, told = measure_all(cases, args.compile), {"gpu": place, "command": " ".join(sys.argv)}
        for line in decode.tabulate(measured, args, "train", **told):
            aim = "" if line.required is None else f" (aim {line.required:.0%})"
            print(f"{line.what:<11}{line.backend:<18}{line.rows} rows of {line.tokens}: {line.tokens_per_second:,.0f} "
                  f"tokens/s, {line.utilisation:.1%} of peak{aim}, {line.gb_measured:.1f} GB "
                  f"(estimated {line.gb_estimated:.1f})")  # fmt: skip
        return 0
    for name, (rows, tokens) in cases.items():
        print(f"\n{name}: {rows} rows of {tokens} tokens; {args.rounds} rounds in turns; float32")
        print("\n".join(compare(name, rows, tokens, args.rounds)), flush=True)
    return 0
