"""The processes of a run, the threads of a process, and what is put around a model so that they train it together.

torchrun starts the same program several times, each with a number, its rank. Every process runs the same loop over the
same stages; they differ in the examples that they read and, with fsdp, in the shards of the weights that they hold:

    none   one process; on a CPU its threads share every micro-batch
    ddp    every process holds the whole model; gradients are added up (torch's DistributedDataParallel)
    fsdp   every process holds a share of weights, gradients and optimizer state (torch's FSDP2, fully_shard);
           with --shards N, groups of N hold the model once each (hybrid sharding)

Whatever decides how the loop goes on is agreed upon: a process that alone skips, stops or fails would leave the others
waiting for it. What the models exchange travels by NCCL on GPUs, what is said here by Gloo.
"""

import contextlib
import copy
import datetime
import functools
import os
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from nanovlm.names import nearest
from nanovlm.training.language_loss import language_loss
from nanovlm.training.stages import Stage, all_parts, everything, freeze, unsharded

MODES = ("none", "ddp", "fsdp")
ENVIRONMENT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # from torchrun
PATIENCE = datetime.timedelta(days=7)  # for what has no time limit of its own: an evaluation, a slow disk
ATTEMPTS = 5  # of Gloo, each with the whole time limit, to reach a process that is gone when groups meet
SIGNS = ("gloo", "NCCL", "Connection closed", "Connection reset", "Timed out", "Socket Timeout", "Broken pipe")
BLOCK = re.compile(r"(vision|text)\.blocks\.\d+|decoder\.layers\.\d+")  # what is compiled, run again and sharded


class Processes:
    """All processes of a run, seen from one of them; without arguments, a run of one process.

    mode: one of MODES. rank: int, this one's number. size: int, how many there are. shards: int, processes that hold
    the model once between them (fsdp). timeout: float, seconds that a process waits for another.
    """

    def __init__(self, mode="none", rank=0, size=1, shards=1, timeout=600.0):
        self.mode, self.rank, self.size, self.shards = mode, rank, size, shards
        self.main = rank == 0  # the one that prints, logs, evaluates and writes what exists once
        self.group = self.patient = self.saving = None
        if mode != "none":  # saving stands apart: a thread talks over it
            wait = datetime.timedelta(seconds=timeout)
            self.group, self.patient, self.saving = (
                dist.new_group(backend="gloo", timeout=wait / ATTEMPTS) for _ in range(3))
            for group, patience in ((self.group, wait), (self.patient, PATIENCE), (self.saving, PATIENCE)):
                _set_pg_timeout(patience, group)  # only now: one that is gone before they meet is not waited for

    def __str__(self):
        return f"process {self.rank} of {self.size}"

    def sum(self, numbers):
        """Add up a list of numbers over all processes: list of float; of one process, the numbers themselves."""
        if self.size == 1:
            return numbers
        total = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(total, group=self.group)
        return total.tolist()

    def gather(self, value, group=None):
        """Everybody's value, by rank: list. value: anything that can be pickled."""
        if self.size == 1:
            return [value]
        found = [None] * self.size
        dist.all_gather_object(found, value, group=group or self.group)
        return found

    def first(self, value, group=None):
        """The value of the first process that has one, for all; None if nobody has."""
        return next((one for one in self.gather(value, group) if one is not None), None)

    def agree(self, error, group=None):
        """Raise everywhere if there is an error (an Exception, or None) in any process: its own, or the first one's."""
        found = self.first(_portable(error), group)
        if error or found:
            raise error or found

    def together(self, function, here=True, group=None):
        """What a function returns, if it runs `here`; if it raises anywhere, it has failed in all processes."""
        value = error = None
        try:
            value = function() if here else None
        except Exception as raised:
            error = raised
        self.agree(error, group)
        return value

    def by_main(self, function):
        """Run a function in the main process alone: what it returns, or raises, reaches all."""
        return self.gather(self.together(function, self.main, self.patient), self.patient)[0]

    def is_lost(self, error):
        """Whether an error says that another process is gone or silent: nothing can be agreed upon any more."""
        while error is not None and self.size > 1:
            if isinstance(error, dist.DistError) or any(sign in str(error) for sign in SIGNS):
                return True
            error = error.__cause__ or error.__context__
        return False


def _portable(error):
    """An error that can be sent to another process; what cannot is sent as its message."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def join(mode, device, shards=None, timeout=600.0):
    """Meet the other processes: (Processes, str of this process's own device).

    Args: mode: one of MODES. shards: with fsdp; None = the model once, over all. timeout: seconds.
    Raises: ValueError, in words for the user, for what does not go together, or if the others do not come.
    """
    if mode not in MODES:
        raise ValueError(f"--parallel {mode!r} is unknown.{nearest(mode, MODES)}")
    if shards is not None and mode != "fsdp":
        raise ValueError(f"--shards {shards} says how --parallel fsdp cuts the model, but --parallel is {mode}")
    size = int(os.environ.get("WORLD_SIZE", 1))
    if mode == "none":
        if size > 1:
            raise ValueError(f"torchrun has started {size} processes, but --parallel is none; name ddp or fsdp")
        return Processes(), device
    if not os.environ.keys() >= set(ENVIRONMENT):
        raise ValueError(f"--parallel {mode} takes several processes; start them with "
                         f"torchrun --nproc-per-node 2 train.py ... --parallel {mode}")
    if size % (shards or size):
        raise ValueError(f"--shards {shards} does not divide the {size} processes into groups")
    rank, local_rank, backend = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), "gloo"
    wait = datetime.timedelta(seconds=timeout)
    if torch.device(device).type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ValueError(f"process {local_rank} of this machine finds only {torch.cuda.device_count()} GPUs; give "
                             "torchrun a smaller --nproc-per-node")
        device, backend = f"cuda:{local_rank}", "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    try:
        store, *_ = next(rendezvous("env://", timeout=wait / 2))  # torch tries once more when this time is over
        store.set_timeout(wait)
        dist.init_process_group(backend, timeout=wait / ATTEMPTS, store=store, rank=rank, world_size=size)
        _set_pg_timeout(wait, dist.group.WORLD)
        return Processes(mode, rank, size, shards or size, timeout), device
    except RuntimeError as error:
        raise ValueError(f"the other processes do not come together ({error}); start all, with one "
                         "MASTER_ADDR and MASTER_PORT") from error


def leave(processes):
    """Part from the other processes, when all is done."""
    if processes.mode != "none":
        dist.destroy_process_group()


@contextlib.contextmanager
def threads(number):
    """A pool of CPU threads, each computing by itself: a small model's tensors are too small to be cut."""
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(number, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)  # a worker's setting is everybody's


class ByThreads(torch.autograd.Function):
    """function(share) of several shares, a thread for each, forward and backward.

    Gradients are added in the order of the shares, so that equal runs stay equal to the last bit. A loss that needs the
    features of all shares at once stands between the two passes (GradCache, arXiv:2101.06983, Sec. 3.2).
    """

    @staticmethod
    def forward(ctx, function, shares, *parameters):
        """Tuple of Tensor, one for each share."""
        ctx.parameters = parameters
        with threads(len(shares)) as pool:
            ctx.outputs = list(pool.map(function, shares))
        return tuple(output.detach() for output in ctx.outputs)

    @staticmethod
    def backward(ctx, *gradients):
        """The parameters' gradients; None for those that no share reaches."""
        def work(output, gradient):
            if not output.requires_grad:
                return [None] * len(ctx.parameters)
            return torch.autograd.grad(output, ctx.parameters, gradient, allow_unused=True)

        with threads(len(gradients)) as pool:
            found = list(pool.map(work, ctx.outputs, gradients))
        reached = ([one for one in values if one is not None] for values in zip(*found))
        return None, None, *(sum(values[1:], values[0]) if values else None for values in reached)


def by_threads(function, shares, module):
    """function(share) of each share: sequence of Tensor. module: holds all parameters that the function uses."""
    if len(shares) == 1:
        return [function(shares[0])]
    return ByThreads.apply(function, shares, *(one for one in module.parameters() if one.requires_grad))


@dataclass
class Run:
    """What a training run is made of. The hooks of a recipe receive it."""

    recipe: Any              # recipes.recipe.Recipe
    args: Any                # the values of train.py's flags
    out: Path                # output folder
    identity: dict           # JSON values that a resumed run must share: recipe, size, seed, stages, data
    model: Any               # vlm.VLM
    contrastive: Any         # contrastive.ContrastiveModel around the same ViT; None without contrastive stages
    tokenizer: Any           # data.tokenizer.Tokenizer
    stages: tuple[Stage, ...]
    sources: dict[str, Any]  # name -> source, at least those that the stages' mixtures name
    device: torch.device
    processes: Processes     # that train together
    skeleton: Any = None     # (model, contrastive) on the meta device, for sharded copies; None unless fsdp
    loss: Any = None         # module whose forward is the stage's loss, see `lay_out`

    @property
    def share_prefix(self):
        """bool, whether a picture that several rows show runs once; blocks that are wrapped run whole rows."""
        return not (self.processes.mode == "fsdp" or self.args.recompute or self.args.compile)

    def template_of(self, stage):
        """The data.templates.Template that a stage writes its rows with."""
        return self.recipe.stage_templates.get(stage.name, self.recipe.template)

    def parts(self):
        """dict part -> dict name -> Parameter."""
        return all_parts(self.model, self.contrastive)

    def models(self):
        """nn.ModuleList of those that are there."""
        return nn.ModuleList(one for one in (self.model, self.contrastive) if one is not None)


# A stage's loss as the `forward` of one module, the door through which DDP and FSDP2 let a model be trained.


class StageLoss(nn.Module):
    """What the losses have in common."""

    def __init__(self, model, run, stage):
        super().__init__()
        self.model, self.run, self.precision = model, run, stage.precision

    def autocast(self):
        """The context of a forward pass in the stage's precision, on a CPU without torch's cache of cast weights.

        All threads share it, and the first to finish empties it: how a gradient is rounded would depend on their speed.
        """
        kind = self.run.device.type
        return torch.autocast(kind, torch.bfloat16, self.precision == "bfloat16", cache_enabled=kind != "cpu")


class LanguageLoss(StageLoss):
    """The next-token loss of a vision-language model."""

    def forward(self, batches):
        """list of vlm.Batch, one for each thread -> float[] in nats, summed over their trained tokens."""
        return sum(by_threads(self.of_batch, batches, self))

    def of_batch(self, batch):
        """vlm.Batch -> float[]."""
        run = self.run
        with self.autocast():  # of many processes each runs every module, or the others wait for its gradients
            loss, _ = language_loss(self.model, batch.to(run.device), run.share_prefix, lean=run.processes.size == 1)
            if batch.pixels is not None:  # what only clips use, an embedding per frame: DDP waits for every gradient
                loss = loss + 0 * sum(one.sum() for one in self.model.bridge.parameters() if one.requires_grad)
            return loss


class ContrastiveLoss(StageLoss):
    """The loss of a pair of towers; of several processes each has a share of it, over all pictures and captions."""

    def forward(self, shares, ids, lengths, right):
        """shares: (pixels, looks) for each thread; see batching.contrastive_batch -> float[] in nats."""
        device, processes = self.run.device, self.run.processes
        images = torch.cat(by_threads(self.embed_images, shares, self.model))
        with self.autocast():
            texts = self.model.embed_texts(ids.to(device), lengths.to(device))
            if processes.size > 1:  # the features of all, each caption once
                captions = [tuple(row[:length]) for row, length in zip(ids.tolist(), lengths.tolist())]
                found = processes.gather((captions, right.tolist()))
                first, right = merge_captions(found)
                images = Gather.apply(images, [len(rows) for _, rows in found], processes.rank)
                texts = Gather.apply(texts, [len(own) for own, _ in found], processes.rank)[first.to(device)]
            return self.model.match(images, texts, right.to(device)) / processes.size

    def embed_images(self, share):
        """(pixels, looks) -> float[looks, E]."""
        with self.autocast():
            return self.model.embed_images(*(one.to(self.run.device) for one in share))


def stage_loss(run, stage):
    """The loss module of a stage, around the run's model."""
    contrastive = stage.objective == "contrastive"
    return ContrastiveLoss(run.contrastive, run, stage) if contrastive else LanguageLoss(run.model, run, stage)


class Gather(torch.autograd.Function):
    """The rows of all processes behind one another; the gradient of a row comes from all of them."""

    @staticmethod
    def forward(ctx, x, counts, rank):
        """x float[counts[rank], E], counts: rows of each process -> float[sum of counts, E]."""
        padded = F.pad(x, (0, 0, 0, max(counts) - len(x)))
        found = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(found, padded.contiguous())
        ctx.rows = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        return torch.cat([rows[:count] for rows, count in zip(found, counts)])

    @staticmethod
    def backward(ctx, gradient):
        """Add up what every process's share of the loss says about every row; keep one's own rows."""
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[ctx.rows], None, None


def merge_captions(found):
    """The captions of all processes, each once, as one process would have them.

    found: of each process (captions: tuples of ids, right: lists of bool, pictures x captions).
    Returns: (int64[C], where among all captions each different one stands first; bool[B, C], which a picture has).
    """
    captions = [caption for own, _ in found for caption in own]
    first = torch.tensor([captions.index(caption) for caption in captions])
    right = torch.block_diag(*(torch.tensor(rows, dtype=torch.float32) for _, rows in found))  # pictures x captions
    merged = torch.zeros_like(right).index_add(1, first, right) > 0
    return first.unique(), merged[:, first.unique()]


# What is put around a model, from outside, so that many processes can train it: its own code stays as it was.
#
# Per block, as flags ask: torch.compile, and activation checkpointing (the backward pass runs a block again). Then DDP
# around the whole, or FSDP2's shards: first around every block, then around the root with all that stands outside of
# blocks. The bridge belongs to the root: it is called once per length of clips, and these differ from process to
# process, while every call of a sharded block is one that all processes must make.
#
# Every stage wraps anew: what is frozen has no gradient to exchange and no state, and a new picture size brings a new
# position table. With FSDP2 that means new models without memory, which take their shards over from whole ones.


def lay_out(run, stage):
    """Make a run's models ready for a stage; with fsdp they become new ones, whose parameters are shards (DTensor)."""
    mode, plain = run.processes.mode, ()
    if mode == "fsdp":
        with whole(run):
            plain = (run.model, run.contrastive) if run.processes.main else ()
        run.model, run.contrastive = copy.deepcopy(run.skeleton)
    for model in (run.model, *plain[:1]):
        model.vision.resize(stage.image_size)  # first: the position table may become a new parameter
    freeze(run.model, run.contrastive, stage)
    run.loss = stage_loss(run, stage)
    blocks = [block for name, block in run.loss.model.named_modules() if BLOCK.fullmatch(name)]
    for block in blocks:
        if "forward" not in vars(block):
            surround(block, run.args.compile, run.args.recompute)
    if stage.precision == "bfloat16" and run.device.type == "cpu" and mode != "fsdp":
        for linear in run.loss.modules():
            if type(linear) is nn.Linear and "forward" not in vars(linear):
                linear.forward = CastOnce(linear)
    if mode == "ddp":
        run.loss = DistributedDataParallel(run.loss)
        run.loss.register_comm_hook(None, add_up)
    elif mode == "fsdp":
        shard(run, blocks)
        fill(run, plain)


def surround(block, compiled, recompute):
    """Compile a block's forward, or run it again instead of remembering it, or both; while it is trained, not asked."""
    plain = block.forward
    trained = torch.compile(plain) if compiled else plain
    if recompute:
        trained = functools.partial(checkpoint, trained, use_reentrant=False)
    if trained is not plain:
        block.forward = lambda *inputs: (trained if torch.is_grad_enabled() else plain)(*inputs)


class CastOnce:
    """The forward of a linear map whose weight, while it is frozen, is cast once; autocast does it at every call.

    The same numbers. On a CPU casting took a third of the time that SmolLM2-135M, frozen, spends on rows of 25 words.
    """

    def __init__(self, linear):
        self.linear, self.cast, self.version = linear, None, None

    def __call__(self, x):
        linear = self.linear
        if linear.weight.requires_grad or not torch.is_autocast_enabled("cpu"):
            self.cast = None
            return F.linear(x, linear.weight, linear.bias)
        if self.cast is None or self.version != linear.weight._version:  # which every change in place raises
            self.cast, self.version = linear.weight.to(torch.get_autocast_dtype("cpu")), linear.weight._version
        return F.linear(x, self.cast, linear.bias)


def add_up(state, bucket):
    """DDP's exchange: gradients are added, not averaged, as one process adds up its micro-batches."""
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda future: future.value()[0])


def shard(run, blocks):
    """FSDP2 around the blocks and the root of a loss on the meta device, which then gets memory for its shards."""
    size, shards = run.processes.size, run.processes.shards
    shape = (size,) if shards == size else (size // shards, shards)  # copies, shards of each
    mesh = init_device_mesh(run.device.type, shape, mesh_dim_names=("copy", "shard")[-len(shape):])
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)  # weights travel as they are; autocast sees to the rest
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    scalars = {parameter for parameter in run.loss.parameters() if parameter.ndim == 0}  # nothing to shard
    fully_shard(run.loss, mesh=mesh, mp_policy=policy, ignored_params=scalars)
    for module in (run.loss, *blocks):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    run.loss.set_reduce_scatter_unused_params(True)
    run.loss.to_empty(device=run.device)


@torch.no_grad()
def fill(run, plain):
    """Give a run's new models the weights of whole ones, which the main process has."""
    for module in run.models().modules():
        if any(one.is_meta for one in module.parameters(recurse=False)):  # this stage's loss does not need it
            module.to_empty(device=run.device, recurse=False)
    sources = everything(*plain) if plain else {}
    for name, target in everything(run.model, run.contrastive).items():
        source = sources.get(name, torch.empty(target.shape, dtype=target.dtype)).to(run.device).contiguous()
        dist.broadcast(source, src=0)
        target.copy_(shard_of(source, target))


@contextlib.contextmanager
def whole(run):
    """Within, the main process has whole models, which can be asked and written; the others keep their shards."""
    if not isinstance(run.loss, FSDPModule):
        yield
        return
    sharded = run.model, run.contrastive
    try:
        if run.processes.main:
            run.model, run.contrastive = copy.deepcopy(run.skeleton)
            run.model.vision.resize(sharded[0].vision.image_size)
            for one in run.models():
                one.to_empty(device=run.device)
        targets = everything(run.model, run.contrastive)
        for name, tensor in everything(*sharded).items():
            tensor = unsharded(tensor)  # one at a time: no other process ever has room for all
            if run.processes.main:
                targets[name].copy_(tensor)
        yield
    finally:
        run.model, run.contrastive = sharded


def exchange_with(run, is_last):
    """Before a micro-batch: what can wait is exchanged with the last one."""
    if isinstance(run.loss, DistributedDataParallel):
        run.loss.require_backward_grad_sync = is_last
    elif isinstance(run.loss, FSDPModule):  # shards are added up at once, or every gradient would be held whole
        run.loss.set_requires_all_reduce(is_last)


def add_up_scalars(run, parameters):
    """The gradients that FSDP2 does not exchange: those of single numbers."""
    if run.processes.mode == "fsdp":
        for parameter in parameters:
            if not isinstance(parameter, DTensor):
                dist.all_reduce(parameter.grad)


def shard_of(tensor, like):
    """A tensor where a parameter lies; of a whole tensor of its shape, if it is sharded, this process's share."""
    if isinstance(like, DTensor) and not isinstance(tensor, DTensor) and tensor.shape == like.shape:
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return tensor.to(like.device)
