"""What a training run will take, before anything of it exists: `python train.py RECIPE --print`.

The model runs forward and backward on tensors that have shapes and no numbers (torch's "meta" device), with the stage's
parts frozen. torch counts the operations of its products, a multiplication with its addition as two, and autograd says
what it would keep for the way back. So a frozen language model behind a bridge that trains costs 2/3 of one that learns
itself, a frozen tower 1/3. A GPU's backends are taken for granted: fused attention keeps no scores and skips what a
causal mask hides. The length of a text and the share of a GPU's peak are guesses, named where they stand.

F frames, T tokens, N image tokens, W width
"""

import copy
import dataclasses
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from nanovlm.attention import causal_rows, full
from nanovlm.cross_attention import Media
from nanovlm.data.datasets import DATA, command_line_sources
from nanovlm.data.tiles import most
from nanovlm.machine import training_precision
from nanovlm.training import optimizer
from nanovlm.training.language_loss import ROWS, is_chunked
from nanovlm.training.processes import BLOCK, MODES
from nanovlm.training.stages import all_parts, freeze
from nanovlm.training.start import add_lora, build_models, check_stages, choose_size, choose_stages, count_epochs

META = torch.device("meta")
FLOAT32 = 4  # bytes
GB = 1e9
SHORT, LONG = 64, 128  # tokens of text in the two examples that tell what any length costs
UTILISATION = 0.4  # of a GPU's peak, assumed
CAPACITY = 80 * GB  # bytes of a GPU, assumed
PROCESS = 0.4 * GB  # bytes of Python, torch and their libraries on a CPU
PEAKS = {  # part of a GPU's name -> operations per second in bfloat16, not sparse (data sheets); the first that fits
    "B200": 2250e12, "H200": 989e12, "GH200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
    "A100": 312e12, "A800": 312e12, "L40S": 362e12, "L4": 121e12, "A10G": 70e12, "A10": 125e12,
    "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip
PRODUCTS = (F.linear, F.conv2d, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm)


def peak_flops(name):
    """The most operations per second of a device, by torch's name for it: float, or None if it is not known."""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


# ---- one example


@dataclass
class Cost:
    """Of one part of the model, for one example."""

    flops: float = 0.0  # operations, there and back
    kept: int = 0  # bytes of activations that wait for the backward pass
    once: int = 0  # bytes that a micro-batch's examples share: weights in bfloat16 that wait, and the loss's work


def total_cost(costs):
    """The sum of several Cost."""
    return Cost(*map(sum, zip(*map(dataclasses.astuple, costs))))


class FusedAttention(torch.autograd.Function):
    """Attention of a fused kernel in numbers alone: two products over all visible pairs, four on the way back."""

    @staticmethod
    def forward(ctx, q, k, v, num_pairs):
        out, ctx.num_pairs = q.new_empty(*q.shape[:-1], v.shape[-1]), num_pairs
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        count_pairs(num_pairs, q.shape[-1] + v.shape[-1])
        return out

    @staticmethod
    def backward(ctx, _):
        q, k, v = ctx.saved_tensors[:3]
        count_pairs(ctx.num_pairs, 2 * (q.shape[-1] + v.shape[-1]))
        return *map(torch.empty_like, (q, k, v)), None


def count_pairs(num_pairs, width):
    """A product of so many pairs and channels, for torch's counter."""
    torch.empty(num_pairs, width, device=META) @ torch.empty(width, 1, device=META)


class Fused(TorchFunctionMode):
    """Within, attention is FusedAttention, and products read bfloat16 (torch.autocast refuses the meta device)."""

    def __init__(self, bfloat16):
        super().__init__()
        self.bfloat16, self.copies = bfloat16, {}  # id(Parameter) -> its copy in bfloat16; id(indices) -> theirs here

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            q, k, v = map(self.cast, args[:3])
            hidden = (q.shape[2] - 1) * q.shape[2] // 2 if kwargs.get("is_causal") else 0  # pairs that a mask hides
            return FusedAttention.apply(q, k, v, q.shape[0] * q.shape[1] * (q.shape[2] * k.shape[2] - hidden))
        if function in PRODUCTS:
            args, kwargs = tree_map(self.cast, (args, kwargs))
        if function is torch.Tensor.index_copy:  # which tokens are which modality's is known on the host
            args = (*args[:2], self.copies.setdefault(id(args[2]), args[2].to(META)), args[3])
        return function(*args, **kwargs)

    def cast(self, value):
        """A float tensor in the products' type, a Parameter once for all; other values as they are."""
        if not self.bfloat16 or not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
            return value
        copy = value.to(torch.bfloat16)
        return self.copies.setdefault(id(value), copy) if isinstance(value, torch.nn.Parameter) else copy


def measure_part(run, inputs, model, stage):
    """Run a function of one tensor (or None) there and back: (what it returned, Cost)."""
    kept, mode = [], Fused(stage.precision == "bfloat16")

    def storages(tensors):
        return {one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in tensors}

    def keep(tensor):
        kept.append(tensor)
        return tensor

    if inputs is not None:
        inputs = inputs.detach().requires_grad_(inputs.requires_grad)
    in_place = lambda total, a, b, out_shape=None, **options: 2 * a[0] * a[1] * b[1]  # which torch does not count
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place})
    with counter, mode, torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one):
        output = run(inputs)
        if output.requires_grad:
            output.backward(torch.empty_like(output))
    sizes, shared, weights = storages(kept), storages(mode.copies.values()), storages(model.parameters())
    once = sum(sizes[one] for one in sizes.keys() & shared.keys())
    own = sum(sizes[one] for one in sizes.keys() - shared.keys() - weights.keys())
    return output, Cost(float(counter.get_total_flops()), own, once)


def example_cost(model, stage, text_tokens, num_frames=1, recompute=False):
    """What an example of one visual input costs: dict part ("vision", "bridge", "decoder", "head") -> Cost.

    Args:
      model: vlm.VLM on the meta device. stage: Stage; its parts train, its image size is taken on.
      text_tokens: tokens of the row beside the image tokens, all of them trained. num_frames: pictures; 0 = text alone.
      recompute: blocks are run again in the backward pass, which is not counted among the model's operations.
    """
    model.vision.resize(stage.image_size)
    freeze(model, None, stage)
    costs, tokens = {"vision": Cost(), "bridge": Cost()}, None
    if num_frames:
        pixels = torch.empty(num_frames, 3, stage.image_size, stage.image_size, device=META)
        features, costs["vision"] = measure_part(model.vision, pixels, model, stage)
        bridge = lambda x: model.bridge(x.flatten(0, 1)[None], num_frames)
        tokens, costs["bridge"] = measure_part(bridge, features, model, stage)
    hidden, costs["decoder"] = measure_part(lambda x: decode(model, x, text_tokens), tokens, model, stage)
    costs["head"] = head_cost(model, stage, text_tokens, hidden.requires_grad)
    if recompute:
        patches = num_frames * (model.vision.num_patches(stage.image_size) + model.vision.config.class_token)
        forget(costs["vision"], patches, model.vision.config.width, len(model.vision.blocks))
        forget(costs["decoder"], hidden.shape[1], model.decoder.config.width, len(model.decoder.layers))
    return costs


def pair_cost(contrastive, stage, num_tokens):
    """Of a picture and a caption in a contrastive stage, but for the product of all pairs: part -> Cost."""
    contrastive.vision.resize(stage.image_size)
    freeze(contrastive, None, stage)
    pixels = torch.empty(1, 3, stage.image_size, stage.image_size, device=META)
    ids, lengths = (torch.empty(*shape, dtype=torch.long, device=META) for shape in ((1, num_tokens), (1,)))
    embed_texts = lambda _: contrastive.embed_texts(ids, lengths)
    return {"vision": measure_part(contrastive.embed_images, pixels, contrastive, stage)[1],
            "text_tower": measure_part(embed_texts, None, contrastive, stage)[1]}


def decode(model, image_tokens, text_tokens):
    """A row of image tokens float[1, N, W] (or None), then words, through the decoder: float[1, T, W]."""
    media, modality = None, None
    x = model.decoder.embedding(torch.empty(1, text_tokens, dtype=torch.long, device=META))
    if image_tokens is not None and model.media_token is not None:
        media = Media(image_tokens, full(text_tokens, text_tokens, META))
    elif image_tokens is not None:
        x = torch.cat([image_tokens.to(x.dtype), x], dim=1)
        modality = (torch.arange(x.shape[1], device="cpu") < image_tokens.shape[1]).long()[None]
    positions = torch.arange(x.shape[1], device=META)[None]
    return model.decoder(x, positions, causal_rows(1, x.shape[1], META), modality, media=media)


def head_cost(model, stage, num_tokens, reached):
    """The Cost of `language_loss` from hidden states on; reached: whether anything before them trains."""
    head = model.decoder.embedding if model.decoder.lm_head is None else model.decoder.lm_head
    (num_words, width), trained = head.weight.shape, head.weight.requires_grad
    size = 2 if stage.precision == "bfloat16" else 4
    cost = Cost(2.0 * num_tokens * num_words * width * (1 + reached + trained), size * num_tokens * width)
    if is_chunked(model):  # the gradients are made at once: sums in float32, beside what is read or left in bfloat16
        cost.once = (4 if size == 4 else 6) * num_words * (ROWS + width * trained)
    else:  # shares of the words, gradients of the scores and of their logarithms
        cost.kept += 3 * FLOAT32 * num_tokens * num_words
        cost.once = (4 - size) * num_words * width
    return cost


def forget(cost, tokens, width, num_blocks):
    """Keep of every block what goes into it, in float32, and of one block the inside."""
    if cost.kept:
        cost.kept = FLOAT32 * tokens * width * num_blocks + cost.kept // num_blocks


# ---- what share of a GPU's peak a step reaches (MFU, model FLOPs utilisation: PaLM, arXiv:2204.02311, App. B)


def make_meter(model, stage, peak):
    """What tells the share of a peak, in operations per second, that a step reaches: of a row of T tokens, a T + b T^2.

    Returns: function of the step's pictures, rows, tokens (image tokens included) and seconds -> float.
    """
    memo = {id(one): torch.nn.Parameter(torch.empty(one.shape, device=META)) for one in model.parameters()}
    model = copy.deepcopy(model, memo)  # without numbers
    short, long = (example_cost(model, stage, length) for length in (SHORT, LONG))
    first, second = (length + model.num_image_tokens(stage.image_size) for length in (SHORT, LONG))
    of_first, of_second = short["decoder"].flops / first, long["decoder"].flops / second  # each a + b T
    b = (of_second - of_first) / (second - first)
    a, per_picture = of_first - b * first, short["vision"].flops + short["bridge"].flops

    def share(pictures, rows, tokens, seconds):
        return (pictures * per_picture + a * tokens + b * tokens**2 / max(rows, 1)) / seconds / peak

    return share


# ---- memory: weights, gradients, optimizer, activations
#
#   weights      4 bytes a parameter, whether it trains or not
#   gradients    4 bytes a parameter that trains
#   optimizer    8 more for AdamW (two running averages), 4 for Muon (one)
#   activations  what autograd keeps, per example of a micro-batch
#   once         2 bytes a weight in bfloat16, as long as the backward pass may ask for it; a few hundred rows of scores
#
# With `ddp` each process keeps all of this, and every gradient once more, in the buckets that travel. `fsdp` shares
# weights, gradients and optimizer out evenly. Gathered again are the root, that is all outside the blocks, with its
# gradients, and two blocks at a time, the one that computes and the next. Left out: the allocator's waste and a few
# hundred MB of the driver. Gradients and activations are added up: with several micro-batches both are there at once.


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at the top of a step."""

    weights: float
    gradients: float
    optimizer: float
    gathered: float  # with fsdp: the root and two blocks; with ddp: gradients on their way
    once: float  # weights in bfloat16 and the loss's work
    activations: float  # of one example

    def total(self, examples):
        """Bytes with a micro-batch of so many examples."""
        return sum(dataclasses.astuple(self)) + (examples - 1) * self.activations

    def fitting(self, capacity):
        """The most examples a micro-batch can have on a GPU of `capacity` bytes: int, 0 = not even one."""
        return max(0, int((capacity - self.total(0)) // max(self.activations, 1)))


def stage_memory(parts, stage, costs, parallel="none", num_processes=1):
    """What a stage takes: Memory. costs: part -> Cost of an example. parallel: one of processes.MODES."""
    cost, trained, state = total_cost(costs.values()), 0, 0
    for group in optimizer.groups(parts, stage):
        size = FLOAT32 * sum(parameter.numel() for parameter in group["params"])
        trained, state = trained + size, state + size * (1 if group["muon"] else 2)
    gathered, once, share = trained if parallel == "ddp" else 0, cost.once, 1
    if parallel == "fsdp":
        sizes = Counter()  # block -> parameters; outside of blocks, None, those that train count twice
        for part, name, parameter in ((part, *one) for part, named in parts.items() for one in named.items()):
            block = BLOCK.match(name)
            sizes[block and block[0]] += parameter.numel() * (1 if block else 1 + (part in stage.learning_rates))
        root = sizes.pop(None, 0)
        share, gathered = 1 / num_processes, FLOAT32 * (2 * max(sizes.values(), default=0) + root)
        once = sum(costs[part].once for part in ("bridge", "head") if part in costs)  # a block's are let go with it
    weights = FLOAT32 * sum(one.numel() for named in parts.values() for one in named.values())
    return Memory(weights * share, trained * share, state * share, gathered, once, cost.kept)


# ---- the plan that --print shows


def plan(recipe, args):
    """The whole plan: list of str, lines. Raises: ValueError where stages and model do not go together."""
    stages = choose_stages(recipe, args)
    if args.data is not None:
        stages = count_epochs(recipe, stages, args, command_line_sources(args.data, args.images)[0])
    vocab_size = recipe.tokenizer().vocab_size if recipe.published is None else 0  # 0: as published
    with torch.device("meta"):
        model, contrastive = build_models(recipe, choose_size(recipe, args.size), vocab_size, args.seed)
        add_lora(model, stages, args.lora)
    check_stages(recipe, stages, model, contrastive)
    lines = []
    for stage in stages:
        model.vision.resize(stage.image_size)  # its position table counts
        lines += [f"stage {stage.name}"]
        lines += [f"  {name} = {value!r}" for name, value in vars(stage).items() if name != "name"]
        expected, parts = recipe.expects(stage), all_parts(model, contrastive)
        on_cpu, on_gpu = (dataclasses.replace(stage, precision=kind) if stage.precision == "auto" else stage
                          for kind in (training_precision("cpu"), "bfloat16"))  # fmt: skip
        here, there = (stage_costs(expected, one, model, contrastive, args.recompute) for one in (on_cpu, on_gpu))
        lines += [*optimizer.table(parts, on_gpu), "", *stage_lines(expected, on_gpu, parts, *there),
                  cpu_line(on_cpu, parts, here[0]), ""]  # fmt: skip
    return lines + file_lines(recipe, stages, args.data)


def stage_costs(expected, stage, model, contrastive, recompute):
    """What an example of a stage costs: (dict part -> Cost, its image tokens)."""
    if stage.objective == "contrastive":
        return pair_cost(contrastive, stage, expected.text_tokens), 0
    num_frames = expected.num_frames * most(stage.tiles)  # of a square picture
    costs = example_cost(model, stage, expected.text_tokens, num_frames, recompute)
    return costs, model.num_image_tokens(stage.image_size, num_frames) if num_frames else 0


def cpu_line(stage, parts, costs):
    """What training takes in one process on a CPU, with the stage's own micro-batch: str."""
    examples = stage.micro_batch_size or stage.batch_size
    needed = PROCESS + stage_memory(parts, stage, costs).total(examples)
    return (f"        {needed / GB:,.1f} GB in one process on a CPU in {stage.precision}, with micro-batches of "
            f"{examples} and the {PROCESS / GB:g} GB of Python and torch")


def stage_lines(expected, stage, parts, costs, image_tokens):
    """Tokens, operations, hours and memory of one stage: list of str."""
    examples, tokens = stage.steps * stage.batch_size, image_tokens + expected.text_tokens
    flops = total_cost(costs.values()).flops
    shares = ", ".join(f"{part} {cost.flops / 1e9:,.1f}" for part, cost in costs.items() if cost.flops)
    return [
        f"data    {examples:,} examples of {image_tokens} image tokens and about {expected.text_tokens} of text: "
        f"{examples * tokens / 1e9:,.3g} billion tokens",
        f"work    {flops / 1e9:,.1f} GFLOP an example ({shares}), {examples * flops:.2e} FLOP in all",
        *hours_lines(expected, examples * flops), *memory_lines(expected, stage, parts, costs),
    ]


def hours_lines(expected, total):
    """Hours by the count of operations, and by the paper: list of str."""
    gpus, alone = f"{expected.num_gpus} {expected.gpu}", total / peak_flops(expected.gpu) / expected.num_gpus / 3600
    lines = [f"time    {hours(alone / UTILISATION)} on {gpus} at {UTILISATION:.0%} of their peak"]
    if expected.hours is not None:
        source = f"by the paper ({expected.source}), {alone / expected.hours:.0%} of their peak"
        lines.append(f"        {hours(expected.hours)} on {gpus} {source}")
    return lines


def hours(number):
    """Hours in words: str; minutes where there is less than one, days from two on."""
    if number < 1:
        return f"{60 * number:.1f} minutes"
    return f"{number:.1f} hours" if number < 48 else f"{number / 24:.1f} days ({number:.0f} hours)"


def memory_lines(expected, stage, parts, costs):
    """A table, a line per value of --parallel: list of str."""
    unit, size = ("GB", GB) if total_cost(costs.values()).kept > GB / 100 else ("MB", GB / 1000)
    columns = ("weights", "gradients", "optimizer", "other", "an example", "micro-batch in 80 GB")
    lines = [f"memory  {unit} of each GPU{''.join(f'{name:>12}' for name in columns[:-1])}{columns[-1]:>22}"]
    for parallel in MODES:
        number = 1 if parallel == "none" else expected.num_gpus
        found = stage_memory(parts, stage, costs, parallel, number)
        values = (found.weights, found.gradients, found.optimizer, found.gathered + found.once, found.activations)
        fitting = min(found.fitting(CAPACITY), max(1, stage.batch_size // number)) or "none"
        cells = "".join(f"{value / size:12,.2f}" for value in values)
        lines.append(f"        {f'{parallel} x {number}':<14}{cells}{fitting:>22}")
    return lines


def file_lines(recipe, stages, data):
    """What must be there before training starts: list of str. data: of --data, or None."""
    own, lines = recipe.sources.keys() | {DATA}, []
    names = list(dict.fromkeys(name for stage in stages for name in stage.mixture if name not in own))
    if recipe.weights:
        lines += ["weights and tokenizer, after --init:", *(f"  {one}" for one in recipe.weights)]
    if names:
        lines += [f"data, listed in --datasets FILE.json ({len(names)}; examples, page):"]
        lines += [f"  {name:<24}{recipe.home(name)}" for name in names]
    if data is not None:
        lines += [f"data, by --data: {data}"]
    lines = lines or ["none: the recipe makes its own data and starts from nothing"]
    return [f"{'' if place else 'files':<8}{line}" for place, line in enumerate(lines)]
