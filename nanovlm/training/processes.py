"""The processes of a run: who they are, what they tell one another, and what becomes of the rest when one is lost.

torchrun starts the same program several times, each with a number, its rank. Every process runs the same loop over the
same stages; they differ in the examples that they read and, with fsdp, in the shards of the weights that they hold:

    none   one process
    ddp    every process holds the whole model; gradients are added up (torch's DistributedDataParallel)
    fsdp   every process holds a share of weights, gradients and optimizer state (torch's FSDP2, fully_shard);
           with --shards N, groups of N hold the model once each (hybrid sharding)

Whatever decides how the loop goes on is agreed upon: a process that alone skips, stops or fails would leave the others
waiting for it. What the models exchange travels by NCCL on GPUs, what is said here by Gloo.
"""

import contextlib
import copy
import dataclasses
import datetime
import functools
import os
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, MixedPrecisionPolicy
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import distribute_tensor, DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from nanovlm.data.images import CLIP, Preprocessing
from nanovlm.names import nearest
from nanovlm.published.weights import resized
from nanovlm.training.linear_cross_entropy import language_loss
from nanovlm.training.stages import Stage
from nanovlm.vlm import Batch, IGNORE, IMAGE_TOKEN


MODES = ("none", "ddp", "fsdp")
ENVIRONMENT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun tells its processes
PATIENCE = datetime.timedelta(days=7)  # for what has no time limit of its own: an evaluation, a slow disk
SIGNS = ("gloo", "NCCL", "Connection closed", "Connection reset", "Timed out", "Socket Timeout", "Broken pipe")


class Processes:
    """All processes of a run, seen from one of them; without arguments, a run of one process.

    mode: one of MODES. rank: int, this one's number. size: int, how many there are. shards: int, processes that hold
    the model once between them (fsdp). timeout: float, seconds that a process waits for another.
    """

    def __init__(self, mode="none", rank=0, size=1, shards=1, timeout=600.0):
        self.mode, self.rank, self.size, self.shards, self.timeout = mode, rank, size, shards, timeout
        self.main = rank == 0  # the one that prints, logs, evaluates and writes what exists once
        self.group = self.patient = self.saving = None
        if mode != "none":
            self.group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout))
            self.patient = dist.new_group(backend="gloo", timeout=PATIENCE)
            self.saving = dist.new_group(backend="gloo", timeout=PATIENCE)  # apart: a thread talks over it

    def __str__(self):
        return f"process {self.rank} of {self.size}"

    def share(self, items):
        """This process's share of what all do together: every size-th item of a list, from its own rank on."""
        return items[self.rank::self.size]

    def sum(self, numbers):
        """Add up a list of numbers over all processes: list of float; of one process, the numbers themselves."""
        if self.size == 1:
            return numbers
        total = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(total, group=self.group)
        return total.tolist()

    def sum_up(self, report):
        """The counts of all processes: a dataclass of int, as a new one."""
        return type(report)(**dict(zip(vars(report), map(int, self.sum(list(vars(report).values()))))))

    def first(self, value):
        """The value of the first process that has one, for all; None if nobody has."""
        return next((one for one in self.gather(value) if one is not None), None)

    def gather(self, value, group=None):
        """Everybody's value, by rank: list. value: anything that can be pickled."""
        if self.size == 1:
            return [value]
        found = [None] * self.size
        dist.all_gather_object(found, value, group=group or self.group)
        return found

    def together(self, function):
        """Run a function everywhere: it succeeds in all processes or raises in all of them.

        Returns: what it returned here.
        Raises: its own error, or an error of the same type that names the process where it happened.
        """
        if self.size == 1:
            return function()
        value = error = None
        try:
            value = function()
        except Exception as raised:
            error = raised
        self.agree(error)
        return value

    def agree(self, error, group=None):
        """Raise everywhere if there is an error (an Exception, or None) in any process."""
        found = [one for one in self.gather(_portable(error), group) if one is not None]
        if error is not None:
            raise error
        if found:
            raise found[0]

    def by_main(self, function):
        """Run a function in the main process alone: what it returns, or raises, reaches all."""
        if self.size == 1:
            return function()
        answer = [None, None]
        if self.main:
            try:
                answer[0] = function()
            except Exception as raised:
                answer[1] = _portable(raised)
        dist.broadcast_object_list(answer, src=0, group=self.patient)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def is_lost(self, error):
        """Whether an error says that another process is gone or does not answer: nothing can be agreed upon any more."""
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


def check_environment(mode, device, environment):
    """Raise ValueError, in words for the user, unless this process can be one of several.

    Args:
      mode: str of --parallel. device: str of --device. environment: os.environ.
    """
    if mode not in MODES:
        raise ValueError(f"--parallel {mode!r} is unknown.{nearest(mode, MODES)}")
    number = int(environment.get("WORLD_SIZE", 1))
    if mode == "none":
        if number > 1:
            raise ValueError(f"torchrun has started {number} processes, but --parallel is none: each would train the "
                             "same model; name ddp or fsdp")
        return
    missing = [name for name in ENVIRONMENT if name not in environment]
    if missing:
        raise ValueError(f"--parallel {mode} takes several processes, which torchrun starts ({', '.join(missing)} not set): "
                         f"torchrun --nproc-per-node 2 train.py ... --parallel {mode}")
    if torch.device(device).type == "cuda":
        if not dist.is_nccl_available():
            raise ValueError("this torch has no NCCL, by which GPUs talk to one another; install one that has, or --device cpu")
        if int(environment["LOCAL_RANK"]) >= torch.cuda.device_count():
            raise ValueError(f"{environment['LOCAL_RANK']} is the number of a process on this machine, but there are only "
                             f"{torch.cuda.device_count()} GPUs; give torchrun a smaller --nproc-per-node")


def join(mode, device, shards=None, timeout=600.0):
    """Meet the other processes.

    Args:
      mode: one of MODES. device: str, "cpu" or "cuda". shards: int, with fsdp; None = the model once, over all.
      timeout: float, seconds.
    Returns: (Processes, str of this process's own device).
    Raises: ValueError for what does not go together, or if the others do not come.
    """
    check_environment(mode, device, os.environ)
    if shards is not None and mode != "fsdp":
        raise ValueError(f"--shards {shards} says how --parallel fsdp cuts the model, but --parallel is {mode}")
    if mode == "none":
        return Processes(), device
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if size % (shards or size):
        raise ValueError(f"--shards {shards} does not divide the {size} processes into groups")
    backend = "gloo"
    if torch.device(device).type == "cuda":
        device, backend = f"cuda:{os.environ['LOCAL_RANK']}", "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    try:
        # torch tries once more when this time is over
        store, *_ = next(rendezvous("env://", timeout=datetime.timedelta(seconds=timeout / 2)))
        store.set_timeout(datetime.timedelta(seconds=timeout))
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout), store=store, rank=rank, world_size=size)
        return Processes(mode, rank, size, shards or size, timeout), device
    except RuntimeError as error:
        raise ValueError(f"the other processes do not come together ({error}); are they all started, with the same "
                         "MASTER_ADDR and MASTER_PORT?") from error


def leave(processes):
    """Part from the other processes, when all is done."""
    if processes.mode != "none":
        dist.destroy_process_group()


def shard_of(tensor, like):
    """A copy of a tensor where a parameter lies; of a whole tensor, if the parameter is sharded, this process's share.

    Args:
      tensor: Tensor or DTensor. like: Parameter; a tensor of another shape (a count of steps) is never sharded.
    """
    if isinstance(like, DTensor) and not isinstance(tensor, DTensor) and tensor.shape == like.shape:
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return tensor.to(like.device, copy=True)


def copy_shard(target, source):
    """Copy a whole tensor into one of the same shape, or its share into a sharded one."""
    target.copy_(shard_of(source, target) if isinstance(target, DTensor) else source)


# A training run: everything it is made of, in one place that the trainer and a recipe's hooks share.


def all_parts(model, contrastive):
    """Parts of a vision-language model and of the text tower beside it.

    Args:
      model: vlm.VLM. contrastive: contrastive.ContrastiveModel or None.
    Returns: dict part -> dict name -> Parameter; the ViT, which both models share, stands in it once.
    """
    if contrastive is None:
        return model.parts()
    return model.parts() | {"text_tower": contrastive.parts()["text_tower"]}


def text_side(contrastive):
    """State of a contrastive model without its ViT, which belongs to the vision-language model.

    Args:
      contrastive: contrastive.ContrastiveModel or None.
    Returns: dict name -> Tensor, the model's own memory; empty for None.
    """
    if contrastive is None:
        return {}
    return {name: tensor for name, tensor in contrastive.state_dict().items() if not name.startswith("vision.")}


@dataclass
class Run:
    """Everything a training run is made of. The hooks of a recipe receive it."""

    out: Path                     # output folder
    identity: dict                # JSON values that a resumed run must share: recipe, size, seed, stages, data
    model: Any                    # vlm.VLM
    contrastive: Any              # contrastive.ContrastiveModel around the same ViT; None without contrastive stages
    tokenizer: Any                # data.tokenizer.Tokenizer
    template: Any                 # data.templates.Template
    stages: tuple[Stage, ...]
    sources: dict[str, Any]       # name -> source, at least those that the stages' mixtures name
    seed: int
    device: torch.device
    smoke: bool                   # a run of seconds: hooks should measure on a handful of examples
    save_every: int               # optimizer steps between checkpoints
    exam_every: int               # optimizer steps between exams
    max_minutes: float | None     # of this process; then a checkpoint is written and the run stops
    evaluate: Callable            # (run, stage) -> {measure: share}, quick and held-out; {} = nothing to measure
    exam: Callable                # (run) -> list of lines: held-out questions with the model's present answers
    finish: Callable              # (run) -> {key: value} for results.json
    report: Callable              # (run, results) -> list of lines printed last
    stage_templates: dict = field(default_factory=dict)  # stage name -> its own template instead of `template`
    log: Callable | None = None   # (entry) -> None, is told every line of the log, see progress.py
    held_out: bool = False        # one record in a hundred is never trained on, but asked, see held_out.py
    workers: int = 0              # processes that read and decode ahead; 0 = none
    max_damaged: float = 0.01     # share of the records that may be unusable and replaced by the next
    preprocessing: Preprocessing = CLIP  # mean and deviation of its pixels; size and fit are the stage's
    processes: Processes = field(default_factory=Processes)  # that train together
    skeleton: Any = None          # (model, contrastive) on the meta device, for sharded copies; None unless fsdp
    training: Any = None          # module whose forward is the stage's loss, see wrapping.lay_out; None = the model's own
    recompute: bool = False       # run every block again in the backward pass instead of remembering its inside
    compiled: bool = False        # torch.compile around every block
    keep: int = 1                 # checkpoints that stay
    background: bool = False      # a thread writes the checkpoints
    made_of: dict = field(default_factory=dict)  # what config.json holds beside identity, see start.describe

    @property
    def share_prefix(self):
        """bool, whether a picture that several rows show runs once; blocks that are wrapped run whole rows."""
        return not (self.processes.mode == "fsdp" or self.recompute or self.compiled)

    def template_of(self, stage):
        """The data.templates.Template that a stage writes its rows with."""
        return self.stage_templates.get(stage.name, self.template)

    def parts(self):
        """`all_parts` of this run's models."""
        return all_parts(self.model, self.contrastive)

    def frozen(self, stage):
        """Every tensor that a stage must leave alone: dict name -> Tensor."""
        trained = {name for part in stage.learning_rates for name in self.parts()[part]}
        everything = self.model.state_dict() | text_side(self.contrastive)
        return {name: tensor for name, tensor in everything.items() if name not in trained}


# A stage's loss as the `forward` of one module, the door through which DDP and FSDP2 let a model be trained.
#
# In every micro-batch every process runs every module, or the others would wait for its gradients: a micro-batch of text
# alone also shows a blank picture, in a row without a trained token, whose gradient is zero. A contrastive loss compares
# the pictures and captions of all processes, so their features are gathered, with their gradient.


class LanguageStep(nn.Module):
    """A vision-language model whose forward is its loss; share, lean: as in `language_loss`."""

    def __init__(self, model, share=True, lean=False):
        super().__init__()
        self.model = model
        self.share = share
        self.lean = lean

    def forward(self, batch):
        """Batch -> (float[] sum in nats, int trained tokens), as `VLM.loss`.

        Where pictures are shown, what of the bridge only clips use (an embedding per frame) takes part with zero: DDP
        waits for every gradient.
        """
        loss, trained = language_loss(self.model, batch, self.share, self.lean)
        if batch.pixels is not None:
            loss = loss + 0 * sum(p.sum() for p in self.model.bridge.parameters() if p.requires_grad)
        return loss, trained


def no_rows():
    """A Batch without a row, for a process that has no micro-batch left while others have."""
    ids, none = torch.zeros(0, 1, dtype=torch.long), torch.zeros(0, dtype=torch.long)
    return Batch(ids, ids, ids, ids, None, none, none, none)


def with_blank_picture(batch, model, image_size):
    """A Batch without pictures, and one more row that shows a blank one and trains nothing.

    Args:
      batch: vlm.Batch with pixels None. model: vlm.VLM. image_size: pixels.
    Returns: vlm.Batch; its loss and gradients are the given one's, and zero for what only pictures reach.
    """
    tokens = model.num_image_tokens(image_size)
    picture = [IMAGE_TOKEN] * tokens if model.media_token is None else [model.media_token]
    row = torch.tensor([*picture, 0])  # some word behind it: what only text reaches is reached, too
    length = max(batch.ids.shape[1], len(row))

    def add(values, new, padding):
        widened = F.pad(values, (0, length - values.shape[1]), value=padding)
        return torch.cat([widened, F.pad(new, (0, length - len(new)), value=padding)[None]])

    return dataclasses.replace(
        batch,
        ids=add(batch.ids, row, 0), labels=add(batch.labels, torch.full_like(row, IGNORE), IGNORE),
        segments=add(batch.segments, torch.zeros_like(row), -1), positions=add(batch.positions, torch.arange(len(row)), 0),
        pixels=torch.zeros(1, 3, image_size, image_size), frames=torch.ones(1, dtype=torch.long),
        shown=torch.zeros(1, dtype=torch.long), owner=torch.tensor([len(batch.ids)]),
    )  # fmt: skip


class ContrastiveStep(nn.Module):
    """A pair of towers whose forward is a share of the contrastive loss of all processes' pictures and captions."""

    def __init__(self, model, processes):
        super().__init__()
        self.model = model
        self.processes = processes

    def forward(self, pixels, ids, lengths, right, looks):
        """This process's pictures and captions, as for the model's `loss` -> float[]; the shares add up to the loss."""
        captions = [tuple(row[:length]) for row, length in zip(ids.tolist(), lengths.tolist())]
        everything = self.processes.gather((captions, right.tolist()))
        images = Gather.apply(self.model.embed_images(pixels, looks), [len(right) for _, right in everything], self.processes.rank)
        texts = Gather.apply(self.model.embed_texts(ids, lengths), [len(found) for found, _ in everything], self.processes.rank)
        first, right = merge_captions(everything)
        return self.model.match(images, texts[first.to(texts.device)], right.to(images.device)) / self.processes.size


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


def merge_captions(everything):
    """The captions of all processes, each once, as one process would have them.

    Args:
      everything: per process (captions: list of tuples of ids, right: list of lists of bool, pictures x captions).
    Returns: (int64[C], where among all captions each different one stands first; bool[B, C], which a picture has).
    """
    places, first, rows, number = {}, [], [], 0
    for captions, right in everything:
        for caption in captions:
            if caption not in places:
                places[caption] = len(places)
                first.append(number)
            number += 1
        rows += [[places[caption] for caption, one in zip(captions, row) if one] for row in right]
    merged = torch.zeros(len(rows), len(places), dtype=torch.bool)
    for picture, columns in enumerate(rows):
        merged[picture, columns] = True
    return torch.tensor(first), merged


# What is put around a model, from outside, so that many processes can train it: its own code stays as it was.
#
# Per block, as flags ask: torch.compile, and activation checkpointing (what happens inside a block is forgotten, and the
# backward pass runs it again). Then DDP around the whole, or FSDP2's shards: first around every block, then around the
# root with all that stands outside of blocks. The bridge belongs to the root: it is called once per length of clips, and
# these differ from process to process, while every call of a sharded block is one that all processes must make.
#
# Every stage wraps anew: what is frozen has no gradient to exchange and no state, and a new picture size brings a new
# position table. With FSDP2 that means a new model without memory, which takes the shards over from the old one.


BLOCK = re.compile(r"(vision|text)\.blocks\.\d+|decoder\.layers\.\d+")


def lay_out(run, stage):
    """Make a run's models ready for a stage: picture size, frozen parts, and what goes around them.

    Args:
      run: run.Run; `training` becomes the module whose forward is the loss, or None where nothing is wrapped; with
        fsdp, `model` and `contrastive` become new ones, whose parameters are shards (DTensor).
      stage: stages.Stage.
    """
    mode = run.processes.mode
    old = run.model, run.contrastive
    if mode == "fsdp":
        run.model, run.contrastive = copy.deepcopy(run.skeleton)
    run.model.vision.resize(stage.image_size)  # first: the position table may become a new parameter
    freeze(run.model, run.contrastive, stage)
    prepared = run.contrastive if stage.objective == "contrastive" else run.model
    for name, block in prepared.named_modules():
        if BLOCK.fullmatch(name) and "forward" not in vars(block):
            surround(block, run.compiled, run.recompute)
    run.training = None
    if mode == "none":
        return
    run.training = LanguageStep(prepared, run.share_prefix) if prepared is run.model else ContrastiveStep(prepared, run.processes)
    if mode == "ddp":
        run.training = DistributedDataParallel(run.training)
        run.training.register_comm_hook(None, add_up)
    else:
        shard(run.training, prepared, run)
        take_over(run, *old)


def freeze(model, contrastive, stage):
    """Let exactly those parameters have gradients that a stage trains and its loss can reach."""
    config = model.vision.config
    behind = () if config.feature_layer is None else (
        "vision.post_norm.", *(f"vision.blocks.{n}." for n in range(config.feature_layer, config.num_layers)))
    for part, parameters in all_parts(model, contrastive).items():
        for name, parameter in parameters.items():
            parameter.requires_grad_(part in stage.learning_rates and not name.startswith(behind))


def surround(block, compiled, recompute):
    """Compile a block's forward, or run it again instead of remembering it, or both; while it is trained, not asked."""
    plain = block.forward
    trained = torch.compile(plain) if compiled else plain
    if recompute:
        trained = functools.partial(checkpoint, trained, use_reentrant=False)
    if trained is not plain:
        block.forward = lambda *inputs: (trained if torch.is_grad_enabled() else plain)(*inputs)


def add_up(state, bucket):
    """DDP's exchange: gradients are added, not averaged, as one process adds up its micro-batches."""
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda future: future.value()[0])


def shard(training, prepared, run):
    """FSDP2 around the blocks and the root of a module on the meta device, which then gets memory for its shards."""
    processes, device = run.processes, run.device
    groups = processes.size // processes.shards
    shape, names = ((processes.size,), ("shard",)) if groups == 1 else ((groups, processes.shards), ("replicate", "shard"))
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)  # weights travel as they are; autocast sees to the rest
    for name, block in prepared.named_modules():
        if BLOCK.fullmatch(name):
            fully_shard(block, mesh=mesh, mp_policy=policy)
    scalars = {parameter for parameter in training.parameters() if parameter.ndim == 0}  # nothing to shard
    fully_shard(training, mesh=mesh, mp_policy=policy, ignored_params=scalars)
    for module in training.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    training.set_reduce_scatter_unused_params(True)
    training.to_empty(device=device)


def add_up_scalars(run, parameters):
    """The gradients that FSDP2 does not exchange: those of single numbers."""
    if run.processes.mode == "fsdp":
        for parameter in parameters:
            if not isinstance(parameter, DTensor):
                dist.all_reduce(parameter.grad)


@torch.no_grad()
def take_over(run, model, contrastive):
    """Fill the new models of a run with the weights of the old ones: shards stay where they are.

    Args:
      run: run.Run, its models sharded, or in part still without memory. model, contrastive: those before; at the very
        beginning only the main process has theirs.
    """
    for one in (run.model, run.contrastive):
        for module in one.modules() if one is not None else ():
            if any(parameter.is_meta for parameter in module.parameters(recurse=False)):  # this stage's loss needs it not
                module.to_empty(device=run.device, recurse=False)
    before = everything(model, contrastive)
    for name, target in everything(run.model, run.contrastive).items():
        source = before[name]
        if isinstance(source, DTensor) and isinstance(target, DTensor) and source.shape == target.shape:
            target.to_local().copy_(source.to_local())
            continue
        source = full(source, run)
        if source.shape != target.shape:
            source = resized(name, source, len(target))
        copy_shard(target, source)


def everything(model, contrastive):
    """Every tensor of a run's models, the ViT's once: dict name -> Tensor."""
    return model.state_dict() | text_side(contrastive)


def full(tensor, run):
    """A whole tensor from its shards, or from the main process."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    whole = tensor.to(run.device) if run.processes.main else torch.empty(tensor.shape, dtype=tensor.dtype, device=run.device)
    dist.broadcast(whole.contiguous(), src=0)
    return whole


@contextlib.contextmanager
def whole(run):
    """Within, the main process has whole models, which can be asked and written; the others keep their shards."""
    if run.processes.mode != "fsdp":
        yield
        return
    sharded = run.model, run.contrastive
    plain = copy.deepcopy(run.skeleton) if run.processes.main else sharded
    targets = {}
    if run.processes.main:
        plain[0].vision.resize(run.model.vision.image_size)
        for one in plain:
            if one is not None:
                one.to_empty(device=run.device)
        targets = everything(*plain)
    for name, tensor in everything(*sharded).items():
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if name in targets:
            targets[name].copy_(tensor)
    run.model, run.contrastive = plain
    try:
        yield
    finally:
        run.model, run.contrastive = sharded


@contextlib.contextmanager
def last(run, is_last):
    """Around one micro-batch of several: what can wait is exchanged with the last."""
    training = run.training
    if isinstance(training, DistributedDataParallel) and not is_last:
        with training.no_sync():
            yield
        return
    if isinstance(training, FSDPModule):  # shards are added up at once, or every gradient would be held whole
        training.set_requires_all_reduce(is_last)
    yield
