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

import datetime
import os
import pickle

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor

from nanovlm.names import nearest

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
