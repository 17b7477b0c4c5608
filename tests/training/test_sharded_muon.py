"""Muon on shards gives every process its rows of what it does with the whole matrix."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import many
from nanovlm.training.optimizer import Muon, build
from nanovlm.training.stages import Stage


def work(rank):
    """Four steps of two matrices, one of them with rows that do not divide: (largest difference, rows held)."""
    dist.init_process_group("gloo")
    mesh, generator = init_device_mesh("cpu", (2,)), torch.Generator().manual_seed(0)
    wholes = [torch.nn.Parameter(torch.randn(5, 8, generator=generator)), torch.nn.Parameter(torch.randn(8, 3, generator=generator))]
    shards = [torch.nn.Parameter(distribute_tensor(whole.detach(), mesh, [Shard(0)])) for whole in wholes]
    plain = Muon([{"params": wholes, "lr": 0.1, "weight_decay": 0.2}], 0.9, torch.float32)
    sharded = Muon([{"params": shards, "lr": 0.1, "weight_decay": 0.2}], 0.9, torch.float32)
    for _ in range(4):
        for whole, shard in zip(wholes, shards):
            whole.grad = torch.randn(whole.shape, generator=generator)
            shard.grad = distribute_tensor(whole.grad, mesh, [Shard(0)])
        plain.step()
        sharded.step()
    stage = Stage("s", "language", {"vision": 1.0}, {"x": 1}, 1, 1, optimizer="muon")
    built = build({"vision": {f"vision.blocks.{n}.weight": shard for n, shard in enumerate(shards)}}, stage, num_threads=4)
    assert len(built) == 1, "on several threads processes would say things in different order"
    state = sharded.state[shards[0]]["momentum_buffer"].to_local().shape[0]
    return max((shard.full_tensor() - whole).abs().max().item() for shard, whole in zip(shards, wholes)), state


def test_sharded_muon_is_muon_of_the_whole_matrix():
    (first, first_rows), (second, second_rows) = many.run(2, work)
    assert first < 1e-6 and second < 1e-6
    assert first_rows + second_rows == 5
