"""What a training run will take, before anything of it exists: `python train.py RECIPE --print`.

Sizes, tokens, operations, memory and hours of every stage, and the files to fetch; no weight is made and no file read.
The operations are counted (rehearsal.py), the memory adds up what they keep (memory.py); the length of a text and the
share of a GPU's peak that a run will reach are guesses, named where they stand.
"""

import copy
import dataclasses
from collections import Counter
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from nanovlm.attention import causal_rows, rope_tables
from nanovlm.cross_attention import Media
from nanovlm.decoder import Context
from nanovlm.modality_adaptive import Routing
from nanovlm.recipes.recipe import Expected
from nanovlm.training import optimizer
from nanovlm.training.language_loss import is_chunked, linear_cross_entropy, ROWS
from nanovlm.training.processes import all_parts, BLOCK, MODES
from nanovlm.training.start import add_lora, build_models, check_stages, choose_size, choose_stages, home


# What share of a GPU's peak a training step reaches (MFU, model FLOPs utilisation: PaLM, arXiv:2204.02311, App. B).
#
# Counted is what the model needs, not what the machine did: recomputing activations, padding and the scores of words that
# train nothing count for nothing. The operations of an example are those of rehearsal.py: so many for each picture, and
# for a row of T tokens a T + b T^2, which two rehearsals of different length settle.


SHORT, LONG = 64, 128  # tokens of text in the two rehearsals


@dataclass(frozen=True)
class Meter:
    """Operations of a step, against the peak of all GPUs."""

    per_picture: float
    per_token: float  # a
    per_pair: float  # b
    peak: float  # operations per second

    def share(self, pictures, rows, tokens, seconds):
        """The share of the peak: float. pictures, rows, tokens (image tokens included): of the step."""
        flops = pictures * self.per_picture + tokens * self.per_token + self.per_pair * tokens**2 / max(rows, 1)
        return flops / seconds / self.peak


def without_numbers(model):
    """A copy of a model on the meta device, whatever holds its weights."""
    memo = {id(one): torch.nn.Parameter(torch.empty(one.shape, device="meta"), one.requires_grad) for one in model.parameters()}
    return copy.deepcopy(model, memo)


def make_meter(model, stage, device, number):
    """The Meter of a stage; None where the peak is not known (a CPU), or without a language loss.

    Args: model: vlm.VLM. stage: Stage. device: torch.device. number: int, GPUs.
    """
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if peak is None or stage.objective != "language":
        return None
    return measure(without_numbers(model), stage, number * peak)


def measure(model, stage, peak):
    """A Meter from two rehearsals of a model on the meta device."""
    short, long = (example_cost(model, stage, length) for length in (SHORT, LONG))
    image_tokens = model.num_image_tokens(stage.image_size)
    first, second = SHORT + image_tokens, LONG + image_tokens
    a, b = short["decoder"].flops / first, long["decoder"].flops / second  # each a + b T
    per_pair = (b - a) / (second - first)
    return Meter(short["vision"].flops + short["bridge"].flops, a - per_pair * first, per_pair, peak)


# What GPUs can do at most, to say what share of it a training run uses.
#
# Dense bfloat16 products with sums in float32, without the sparsity that data sheets count double.
# Source: NVIDIA's data sheets of each product.


PEAKS = {  # part of the name that torch.cuda.get_device_name() gives -> operations per second; the first that fits
    "B200": 2250e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_flops(name):
    """The most operations per second of a device: float, or None for one that the table does not know.

    Args:
      name: str, from torch.cuda.get_device_name(), or a key of PEAKS.
    """
    return next((peak for part, peak in PEAKS.items() if part in name), None)


# What one example costs in training, found without doing it: products to compute, and bytes to keep for the way back.
#
# The model runs on tensors that have shapes and no numbers (torch's "meta" device), with the stage's parts frozen.
# Autograd itself then says what it would keep until the backward pass, and every product tells what it will cost there:
#
#   y = W x          2 |W| operations a token forward
#   dx = W^T dy      as many again, where something before this layer trains
#   dW = dy x^T      as many again, where the layer itself trains
#
# So a frozen language model behind a bridge that trains costs 2/3 of one that trains, and a frozen tower 1/3. The
# backends of a GPU are taken for granted: fused attention keeps q, k, v, its output and one number a query, never the
# square of scores, and skips what a causal mask hides. Norms, activations and sums are not counted: they are memory traffic.
#
# F frames, T tokens, N image tokens


META = torch.device("meta")


@dataclass
class Cost:
    """Of one part of the model, for one example."""

    forward: float = 0.0  # operations (a multiplication with its addition counts as two)
    backward: float = 0.0
    kept: int = 0  # bytes of activations that wait for the backward pass
    copies: int = 0  # bytes of weights in bfloat16 that wait with them; once for all examples of a micro-batch
    working: int = 0  # bytes that come and go within; once for all examples too

    def __add__(self, other):
        return Cost(self.forward + other.forward, self.backward + other.backward, self.kept + other.kept,
                    self.copies + other.copies, self.working + other.working)

    @property
    def flops(self):
        """Operations of both passes."""
        return self.forward + self.backward


class FusedAttention(torch.autograd.Function):
    """Attention that computes nothing and keeps what a fused kernel keeps."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, _):
        raise NotImplementedError("a rehearsal has no backward pass")


@dataclass
class Rehearsal(TorchFunctionMode):
    """Within, products are counted into `cost`, and in bfloat16 made as autocast makes them.

    bfloat16: whether products cast what they read.
    """

    bfloat16: bool
    cost: Cost = field(default_factory=Cost)
    seen: dict = field(default_factory=dict)  # storage -> a tensor of it, so that its address stays taken
    weights: dict = field(default_factory=dict)  # id(Parameter) -> its copy in bfloat16

    def __post_init__(self):
        super().__init__()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self.attention(*[self.cast(one) for one in args[:3]], kwargs.get("is_causal", False))
        if func not in PRODUCTS:
            return func(*args, **kwargs)
        args = [self.cast(one) if isinstance(one, torch.Tensor) else one for one in args]
        kwargs = {name: self.cast(one) if isinstance(one, torch.Tensor) else one for name, one in kwargs.items()}
        out = func(*args, **kwargs)
        self.count(2.0 * out.numel() * PRODUCTS[func](args), args[0], args[1])
        return out

    def count(self, forward, *inputs):
        """Operations of one product, and of the product that each input's gradient will take."""
        self.cost.forward += forward
        if torch.is_grad_enabled():
            self.cost.backward += forward * sum(one.requires_grad for one in inputs)

    def attention(self, q, k, v, is_causal):
        """Two products over the pairs that are visible; their backward takes four."""
        pairs = q[..., 0].numel() * k.shape[2] * ((q.shape[2] + 1) / (2 * q.shape[2]) if is_causal else 1)
        for width in (q.shape[-1], v.shape[-1]):
            self.count(2.0 * pairs * width, *[q.detach().requires_grad_(q.requires_grad or k.requires_grad)] * 2)
        return FusedAttention.apply(q, k, v)

    def cast(self, tensor):
        """A float tensor in the products' type; a Parameter once, as autocast's cache has it."""
        if not self.bfloat16 or not tensor.is_floating_point() or tensor.dtype == torch.bfloat16:
            return tensor
        if not isinstance(tensor, torch.nn.Parameter):
            return tensor.to(torch.bfloat16)
        if id(tensor) not in self.weights:
            self.weights[id(tensor)] = tensor.to(torch.bfloat16)
        return self.weights[id(tensor)]

    def keep(self, tensor):
        """Autograd's question what to keep: note each storage once."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen[storage._cdata] = tensor
        return tensor

    def close(self, parameters):
        """Add what was kept to the cost; parameters: those of the model, which lie in memory anyway."""
        copies = {copy.untyped_storage()._cdata for copy in self.weights.values()}
        ours = {parameter.untyped_storage()._cdata for parameter in parameters}
        for storage, tensor in self.seen.items():
            size = tensor.untyped_storage().nbytes()
            if storage in copies:
                self.cost.copies += size
            elif storage not in ours:
                self.cost.kept += size


PRODUCTS = {  # function -> how many products one number of its output sums up
    F.linear: lambda args: args[0].shape[-1],
    F.conv2d: lambda args: args[1][0].numel(),
    torch.matmul: lambda args: args[0].shape[-1],
    torch.Tensor.matmul: lambda args: args[0].shape[-1],
    torch.Tensor.__matmul__: lambda args: args[0].shape[-1],
    torch.bmm: lambda args: args[0].shape[-1],
}


def rehearse(work, parameters, bfloat16):
    """Run a function as a rehearsal: (what it returned, Cost)."""
    rehearsal = Rehearsal(bfloat16)
    with rehearsal, torch.autograd.graph.saved_tensors_hooks(rehearsal.keep, lambda tensor: tensor):
        returned = work()
    rehearsal.close(parameters)
    return returned, rehearsal.cost


def example_cost(model, stage, text_tokens, num_frames=1, recompute=False):
    """What an example of one visual input costs.

    Args:
      model: vlm.VLM on the meta device.
      stage: Stage; its parts are those that train, its precision that of the products. The tower is resized.
      text_tokens: tokens of the row beside the image tokens, all of them trained (what is not costs no scores).
      num_frames: pictures of the visual input; 0 = an example of text alone.
      recompute: whether blocks are run again in the backward pass (wrapping.surround); work that the model does not need
        is not counted as its operations.
    Returns: dict part ("vision", "bridge", "decoder", "head") -> Cost.
    """
    model.vision.resize(stage.image_size)
    for part, parameters in model.parts().items():
        for parameter in parameters.values():
            parameter.requires_grad_(part in stage.learning_rates)
    everything, bfloat16 = list(model.parameters()), stage.precision == "bfloat16"
    costs, tokens = {"vision": Cost(), "bridge": Cost()}, None
    if num_frames:
        pixels = torch.empty(num_frames, 3, stage.image_size, stage.image_size, device=META)
        features, costs["vision"] = rehearse(lambda: model.vision(pixels), everything, bfloat16)
        tokens, costs["bridge"] = rehearse(lambda: model.bridge(features.flatten(0, 1)[None], num_frames), everything, bfloat16)
    hidden, costs["decoder"] = rehearse(lambda: decode(model, tokens, text_tokens), everything, bfloat16)
    _, costs["head"] = rehearse(lambda: score(model, hidden[0, -text_tokens:], bfloat16), everything, bfloat16)
    settle_head(costs["head"], model, text_tokens, 2 if bfloat16 else 4)
    if recompute:
        forget(costs["vision"], num_frames * (model.vision.num_patches(stage.image_size) + model.vision.config.class_token),
               model.vision.config.width, len(model.vision.blocks))  # fmt: skip
        forget(costs["decoder"], hidden.shape[1], model.decoder.config.width, len(model.decoder.layers))
    return costs


def forget(cost, tokens, width, num_blocks):
    """Keep of every block what goes into it, in float32, and of one block the inside."""
    if cost.kept:
        cost.kept = 4 * tokens * width * num_blocks + cost.kept // num_blocks


def settle_head(cost, model, text_tokens, size):
    """Tell apart what the loss takes per example and what it takes once; size: bytes of a number in a product."""
    head = model.decoder.embedding if model.decoder.lm_head is None else model.decoder.lm_head
    vocab_size, width = head.weight.shape
    if not is_chunked(model):
        cost.kept += 2 * 4 * text_tokens * vocab_size  # gradients of the scores and of their logarithms
        return
    per_number = 4 if size == 4 else 4 + size  # sums in float32, beside what is read or left in bfloat16
    cost.working = per_number * ROWS * vocab_size
    if head.weight.requires_grad:  # its gradient is made in the forward pass, once for all examples
        cost.kept -= size * vocab_size * width
        cost.working += per_number * vocab_size * width


def pair_cost(contrastive, stage, num_tokens):
    """What a picture with its caption costs in a contrastive stage; the product of all pairs is left out.

    Args: contrastive: contrastive.ContrastiveModel on the meta device. stage: Stage. num_tokens: int, of the caption.
    Returns: dict "vision", "text_tower" -> Cost.
    """
    contrastive.vision.resize(stage.image_size)
    for part, parameters in contrastive.parts().items():
        for parameter in parameters.values():
            parameter.requires_grad_(part in stage.learning_rates)
    everything, bfloat16 = list(contrastive.parameters()), stage.precision == "bfloat16"
    pixels = torch.empty(1, 3, stage.image_size, stage.image_size, device=META)
    ids = torch.empty(1, num_tokens, dtype=torch.long, device=META)
    lengths = torch.empty(1, dtype=torch.long, device=META)
    return {
        "vision": rehearse(lambda: contrastive.embed_images(pixels), everything, bfloat16)[1],
        "text_tower": rehearse(lambda: contrastive.embed_texts(ids, lengths), everything, bfloat16)[1],
    }


def decode(model, image_tokens, text_tokens):
    """`Decoder.forward` of a row whose modalities are known by their number alone.

    Args: image_tokens: float[1, N, W] or None. text_tokens: int.
    Returns: float[1, T, W].
    """
    decoder, media, placed = model.decoder, None, 0
    x = decoder.embedding(torch.empty(1, text_tokens, dtype=torch.long, device=META))
    if image_tokens is not None and model.media_token is not None:
        visible = causal_rows(1, text_tokens, META)
        media = Media(image_tokens, type(visible)(visible.first, visible.stop, "full"))
    elif image_tokens is not None:
        placed = image_tokens.shape[1]
        x = torch.cat([image_tokens.to(x.dtype), x], dim=1)
    positions = torch.arange(x.shape[1], device=META)[None]
    cos, sin = rope_tables(positions, decoder.config.num_rotary, decoder.config.rope_base)
    places = torch.arange(x.shape[1], device=META)
    routing = Routing(positions, places[placed:], places[:placed]) if placed else Routing(None, None, None)
    context = Context(cos, sin, causal_rows(1, x.shape[1], META), routing, None, media, "sdpa", None)
    if decoder.positions is not None:
        x = x + F.embedding(positions, decoder.positions)
    for index, layer in enumerate(decoder.layers):
        x = layer(x, context, index)
    return decoder.norm(x)


def score(model, hidden, bfloat16):
    """The loss of `language_loss`, from hidden float[T, W]."""
    decoder, labels = model.decoder, torch.empty(len(hidden), dtype=torch.long, device=META)
    head = decoder.embedding if decoder.lm_head is None else decoder.lm_head
    if is_chunked(model):
        dtype = torch.bfloat16 if bfloat16 else hidden.dtype
        return linear_cross_entropy(hidden.to(dtype), head.weight.to(dtype), labels)
    return F.cross_entropy(F.linear(hidden, head.weight).float(), labels, reduction="sum")


# How much memory training takes, before it is asked for: weights, gradients, optimizer, activations.
#
#   weights      4 bytes a parameter, whether it trains or not
#   gradients    4 bytes a parameter that trains
#   optimizer    8 more for AdamW (two running averages), 4 for Muon (one)
#   copies       2 bytes a weight in bfloat16, as long as the backward pass may ask for it
#   activations  what autograd keeps, per example of a micro-batch (rehearsal.py)
#   working      the scores of the loss, a few hundred rows at a time
#
# With several processes, `ddp` keeps all of this in each of them, and every gradient once more, in the buckets that
# travel. `fsdp` (wrapping.py) shares weights, gradients and optimizer out evenly. Gathered again are the root, that is all
# outside the blocks, with its gradients, and two blocks at a time, the one that computes and the next. Activations are
# never shared. Left out: the allocator's waste and a few hundred MB of the driver.
#
# Gradients and activations are added up although a backward pass frees the one while it makes the other: with more than
# one micro-batch both are there at once.


FLOAT32 = 4  # bytes
GB = 1e9


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at the top of a step."""

    weights: float
    gradients: float
    optimizer: float
    gathered: float  # with fsdp: the root and two blocks; with ddp: gradients on their way
    copies: float
    activations: float  # of one example
    working: float

    def total(self, examples):
        """Bytes with a micro-batch of so many examples."""
        return self.total_without() + examples * self.activations

    def total_without(self):
        """Bytes that are taken whatever the micro-batch."""
        return self.weights + self.gradients + self.optimizer + self.gathered + self.copies + self.working

    def fitting(self, capacity):
        """The most examples a micro-batch can have on a GPU of `capacity` bytes: int, 0 = not even one."""
        return max(0, int((capacity - self.total_without()) // max(self.activations, 1)))


def stage_memory(parts, stage, costs, parallel="none", num_processes=1):
    """What a stage takes.

    Args:
      parts: dict part -> dict name -> Parameter, of all models in memory. stage: Stage.
      costs: dict part -> Cost of an example, from rehearsal.py.
      parallel: one of parallel.MODES. num_processes: GPUs; 1 with "none".
    Returns: Memory.
    """
    cost = sum(costs.values(), Cost())
    everything = FLOAT32 * sum(one.numel() for parameters in parts.values() for one in parameters.values())
    trained = state = 0
    for group in optimizer.groups(parts, stage):
        size = FLOAT32 * sum(parameter.numel() for parameter in group["params"])
        muon = stage.optimizer == "muon" and group["name"].endswith("/matrix")
        trained, state = trained + size, state + size * (1 if muon else 2)
    gathered, copies, share = 0, cost.copies, 1
    if parallel == "ddp":
        gathered = trained
    if parallel == "fsdp":
        share = 1 / num_processes
        blocks, root = outside_and_inside(parts)
        gathered = FLOAT32 * (2 * max(blocks.values(), default=0) + root + sum(root_of(parts, part) for part in stage.learning_rates))
        copies = costs["bridge"].copies if "bridge" in costs else 0  # a block's are let go with it
    return Memory(everything * share, trained * share, state * share, gathered, copies, cost.kept, cost.working)


def outside_and_inside(parts):
    """(Counter block -> parameters, parameters outside all blocks) of a model's parts."""
    blocks = Counter()
    for parameters in parts.values():
        for name, parameter in parameters.items():
            block = BLOCK.match(name)
            if block:
                blocks[block.group()] += parameter.numel()
    return blocks, sum(root_of(parts, part) for part in parts)


def root_of(parts, part):
    """Parameters of a part that lie outside all blocks: int."""
    return sum(parameter.numel() for name, parameter in parts[part].items() if not BLOCK.match(name))


UTILISATION = 0.4  # of a GPU's peak, assumed
CAPACITY = 80 * GB  # bytes of a GPU, assumed


def plan(recipe, wishes):
    """The whole plan.

    Args: recipe: Recipe. wishes: the values of train.py's flags.
    Returns: list of str, lines.
    Raises: ValueError where stages and model do not go together.
    """
    stages = choose_stages(recipe, wishes)
    vocab_size = recipe.tokenizer().vocab_size if recipe.published is None else 0  # 0: as published
    with torch.device("meta"):
        model, contrastive = build_models(recipe, choose_size(recipe, wishes.size), vocab_size, wishes.seed)
        add_lora(model, stages, wishes.lora)
    check_stages(stages, model, contrastive)
    lines = []
    for stage in stages:
        model.vision.resize(stage.image_size)  # its position table counts
        lines += [f"stage {stage.name}"]
        lines += [f"  {name} = {value!r}" for name, value in vars(stage).items() if name != "name"]
        if stage.precision == "auto":
            stage = dataclasses.replace(stage, precision="bfloat16")  # as on the GPUs that the plan counts with
        lines += [*optimizer.table(all_parts(model, contrastive), stage), ""]
        lines += [*stage_lines(recipe, stage, model, contrastive, wishes.recompute), ""]
    return lines + file_lines(recipe, stages)


def stage_lines(recipe, stage, model, contrastive, recompute):
    """Tokens, operations, hours and memory of one stage: list of str."""
    expected = recipe.expected.get(stage.name, Expected(min(64, stage.max_tokens // 2), num_gpus=1))
    if stage.objective == "contrastive":
        image_tokens, costs = 0, pair_cost(contrastive, stage, expected.text_tokens)
    else:
        costs = example_cost(model, stage, expected.text_tokens, expected.num_frames, recompute)
        image_tokens = model.num_image_tokens(stage.image_size, expected.num_frames) if expected.num_frames else 0
    examples, tokens = stage.steps * stage.batch_size, image_tokens + expected.text_tokens
    total = examples * sum(costs.values(), Cost()).flops
    shares = ", ".join(f"{part} {cost.flops / 1e9:,.1f}" for part, cost in costs.items() if cost.flops)
    return [
        f"data    {examples:,} examples of {image_tokens} image tokens and about {expected.text_tokens} of text: "
        f"{examples * tokens / 1e9:,.3g} billion tokens",
        f"work    {total / examples / 1e9:,.1f} GFLOP an example ({shares}), {total:.2e} FLOP in all",
        *hours_lines(expected, total),
        *memory_lines(expected, stage, all_parts(model, contrastive), costs),
    ]


def hours_lines(expected, total):
    """Hours by the count of operations, and by the paper: list of str."""
    peak = peak_flops(expected.gpu) * expected.num_gpus
    gpus = f"{expected.num_gpus} {expected.gpu}"
    lines = [f"time    {hours(total / (UTILISATION * peak) / 3600)} on {gpus} at {UTILISATION:.0%} of their peak"]
    if expected.hours is not None:
        share = total / (expected.hours * 3600) / peak
        lines.append(f"        {hours(expected.hours)} on {gpus} by the paper ({expected.source}), {share:.0%} of their peak")
    return lines


def hours(number):
    """Hours in words: str; minutes where there is less than one, days from two on."""
    if number < 1:
        return f"{60 * number:.1f} minutes"
    return f"{number:.1f} hours" if number < 48 else f"{number / 24:.1f} days ({number:.0f} hours)"


def memory_lines(expected, stage, parts, costs):
    """A table, a line per value of --parallel: list of str."""
    unit, size = ("GB", GB) if sum(costs.values(), Cost()).kept > GB / 100 else ("MB", GB / 1000)
    columns = ("weights", "gradients", "optimizer", "other", "an example", "micro-batch in 80 GB")
    lines = [f"memory  {unit} of each GPU{''.join(f'{name:>{len(name) + 3}}' for name in columns)}"]
    for parallel in MODES:
        number = 1 if parallel == "none" else expected.num_gpus
        found = stage_memory(parts, stage, costs, parallel, number)
        other = found.gathered + found.copies + found.working
        values = (found.weights, found.gradients, found.optimizer, other, found.activations)
        cells = [f"{value / size:{len(name) + 3},.2f}" for value, name in zip(values, columns)]
        fitting = min(found.fitting(CAPACITY), max(1, stage.batch_size // number))
        cells.append(f"{fitting or 'none':>23}")
        lines.append(f"        {f'{parallel} x {number}':<14}{''.join(cells)}")
    return lines


def file_lines(recipe, stages):
    """What must be there before training starts: list of str."""
    names = list(dict.fromkeys(name for stage in stages for name in stage.mixture if name not in recipe.sources))
    if not names and not recipe.weights:
        return ["files   none: the recipe makes its own data and starts from nothing"]
    lines = ["files   weights and tokenizer, united in --init FOLDER:", *(f"          {one}" for one in recipe.weights)]
    lines += [f"        data, listed in --datasets FILE.json ({len(names)}; examples, page):"]
    return lines + [f"          {name:<24}{home(name)}" for name in names]
