"""What is put around a model, from outside, so that many processes can train it: its own code stays as it was.

Per block, as flags ask: torch.compile, and activation checkpointing (what happens inside a block is forgotten, and the
backward pass runs it again). Then DDP around the whole, or FSDP2's shards: first around every block, then around the
root with all that stands outside of blocks. The bridge belongs to the root: it is called once per length of clips, and
these differ from process to process, while every call of a sharded block is one that all processes must make.

Every stage wraps anew: what is frozen has no gradient to exchange and no state, and a new picture size brings a new
position table. With FSDP2 that means a new model without memory, which takes the shards over from the old one.
"""

import contextlib
import copy
import functools
import re

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from nanovlm.parallel import copy_shard
from nanovlm.run import all_parts, text_side
from nanovlm.steps import ContrastiveStep, LanguageStep
from nanovlm.weight_loading import resized

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
    run.model.share_prefix = run.model.share_prefix and not (mode == "fsdp" or run.recompute or run.compiled)
    prepared = run.contrastive if stage.objective == "contrastive" else run.model
    for name, block in prepared.named_modules():
        if BLOCK.fullmatch(name) and "forward" not in vars(block):
            surround(block, run.compiled, run.recompute)
    run.training = None
    if mode == "none":
        return
    run.training = LanguageStep(prepared) if prepared is run.model else ContrastiveStep(prepared, run.processes)
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
