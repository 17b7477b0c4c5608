"""Rename tables work in both directions, and what does not fit is named; files are read one shard at a time."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nanovlm.published.weights import (
    Alias, Entry, OURS, Unread, WeightsError, grouped, load_weights, open_checkpoint, plan, prefixed,
    resized, to_ours, to_published, write_checkpoint,
)

TABLE = (
    ("h.{i}.w.{p}", "layers.{i}.{p}"),
    Entry("h.{i}.qkv.{p}", ("q.{i}.{p}", "k.{i}.{p}", "v.{i}.{p}"), num_heads=2),
    Entry("zeros", ("first", None, "last")),
    Entry("frames", "frames", unit_axes=(0, 2)),
    ("words", "words"),
    ("head", "head"),
    ("head", "words"),
    Unread("{rest}.inv_freq", "angles"),
    Unread("pool.{rest}", "not wanted"),
    Alias("old.{rest}", "h.{rest}"),
)


@pytest.fixture
def ours():
    state = {f"layers.{i}.{p}": torch.randn(3, 2) for i in range(12) for p in ("weight", "bias")}
    state |= {f"{name}.0.weight": torch.randn(4, 3) for name in "qkv"}
    return state | {"first": torch.randn(2), "last": torch.randn(2), "frames": torch.randn(5, 6), "words": torch.randn(7, 2)}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_there_and_back(ours):
    published = to_published(TABLE, ours)
    assert published["frames"].shape == (1, 5, 1, 6) and "head" not in published
    assert torch.equal(published["zeros"], torch.cat([ours["first"], torch.zeros(2), ours["last"]]))
    for head in range(2):  # x (q, k, v) x 2 channels
        for row, name in enumerate("qkv", start=3 * head):
            fused = published["h.0.qkv.weight"][2 * row : 2 * row + 2]
            assert torch.equal(fused, ours[f"{name}.0.weight"][2 * head : 2 * head + 2])
    assert equal(to_ours(TABLE, published, ours), ours)
    assert equal(to_ours(TABLE, published, {name: tensor.shape for name, tensor in ours.items()}), ours)


def test_a_tied_head_comes_under_either_name(ours):
    published = to_published(TABLE, ours)
    published["head"] = published.pop("words")
    assert torch.equal(to_ours(TABLE, published, ours)["words"], ours["words"])
    published["words"] = published["head"].clone()
    assert torch.equal(to_ours(TABLE, published, ours)["words"], ours["words"])
    with pytest.raises(WeightsError, match="is a second copy of our words"):
        to_ours(TABLE, published | {"head": published["words"] + 1}, ours)
    state = ours | {"head": torch.randn(7, 2)}
    assert equal(to_ours(TABLE, to_published(TABLE, state), state), state)
    with pytest.raises(WeightsError, match=r"missing \(1\): head"):
        to_ours(TABLE, to_published(TABLE, ours), state)


def test_another_spelling_of_all_names(ours):
    published = to_published(TABLE, ours)
    respelled = {name.replace("h.", "old.", 1): tensor for name, tensor in published.items()}
    assert equal(to_ours(TABLE, respelled, ours), ours)
    published["old.3.w.weight"] = published.pop("h.3.w.weight")
    with pytest.raises(WeightsError, match="old.3.w.weight"):  # only one of them: a mistake
        to_ours(TABLE, published, ours)


def test_what_is_unused_is_counted_and_what_has_no_place_named_together(ours):
    published = to_published(TABLE, ours) | {"h.0.inv_freq": torch.ones(1), "pool.probe": torch.ones(1)}
    found = plan(TABLE, {name: tensor.shape for name, tensor in published.items()}, {n: t.shape for n, t in ours.items()})
    assert not found.check("file") and found.skipped == {"h.0.inv_freq": "angles", "pool.probe": "not wanted"}
    assert len(found.consumed) == len(published) - 2
    with pytest.raises(WeightsError, match=r"no place for 2 tensors: layers.\{0-1\}.lora_a \(2\)"):
        to_published(TABLE, ours | {"layers.0.lora_a": torch.ones(1), "layers.1.lora_a": torch.ones(1)})
    assert grouped(["h.0.w", "h.1.w", "h.3.w", "x", "h.2.b"]) == ["h.{0,1,3}.w (3)", "x", "h.2.b"]


@pytest.mark.parametrize(("spoil", "words"), [
    (lambda t: (t.pop("h.4.w.bias"), t.pop("h.5.w.bias")), [r"missing \(2\): h.\{4-5\}.w.bias \(2\)", "missing shard"]),
    (lambda t: t.update(h_12=torch.ones(1)), [r"unexpected \(1\): h_12"]),
    (lambda t: t.update(frames=torch.ones(1, 5, 2, 6)), [r"frames is \[1, 5, 2, 6\], expected \[1, 5, 1, 6\]"]),
    (lambda t: t.update(zeros=torch.ones(5)), [r"zeros is \[5\], expected \[6\]"]),
    (lambda t: t.update({"x.Wqkv": t.pop("words")}), ["before January 2024"]),
    (lambda t: (t.clear(), t.update(gate=torch.ones(1))), ["another family"]),
    (lambda t: [t.update({f"llm.{name}": t.pop(name)}) for name in list(t)], ["'llm'", "another family"]),
    (lambda t: t.update(words=torch.ones(8, 2)), [r"words is \[8, 2\]"]),
])  # fmt: skip
def test_misfits_are_named_with_the_likely_cause(ours, spoil, words):
    published = to_published(TABLE, ours)
    spoil(published)
    for word in words:
        with pytest.raises(WeightsError, match=word):
            to_ours(TABLE, published, ours)


def test_prefixes_move_every_kind_of_entry(ours):
    table = prefixed(TABLE, "model.", "decoder.")
    state = {f"decoder.{name}": tensor for name, tensor in ours.items()}
    published = to_published(table, state)
    assert published.keys() == {f"model.{name}" for name in to_published(TABLE, ours)}
    extra = {"model.x.inv_freq": torch.ones(1), "model.pool.x": torch.ones(1), "model.head": published["model.words"]}
    assert equal(to_ours(table, published | extra, state), state)
    old = {name.replace("model.h.", "model.old.", 1): tensor for name, tensor in published.items()}
    assert equal(to_ours(table, old, state), state)
    with pytest.raises(WeightsError, match="unexpected"):
        to_ours(table, published | {"pool.x": torch.ones(1)}, state)


class Stack(nn.Module):
    def __init__(self, num_layers=6, width=64):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(num_layers))


STACK = (("h.{i}.{p}", "layers.{i}.{p}"),)


def load(folder, **options):
    """A Stack with what a folder holds."""
    with torch.device("meta"):
        model = Stack()
    load_weights(model, STACK, open_checkpoint(folder), **options)
    return model


@pytest.mark.parametrize("max_bytes", [10**9, 40_000, 1])
def test_shards_are_written_and_read(tmp_path, max_bytes):
    state = Stack().state_dict()
    names = write_checkpoint(tmp_path, STACK, state, max_bytes)
    assert len(names) == {10**9: 1, 40_000: 3, 1: 12}[max_bytes]
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == sorted(names)
    if len(names) > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
        assert all(name in load_file(tmp_path / shard) for name, shard in index["weight_map"].items())
        index["metadata"]["total_size"] -= 4096  # as Llama-2's published one
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert equal(load(tmp_path).state_dict(), state)


@pytest.mark.parametrize(("stored", "wanted"), [(torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16),
                                                (torch.float32, torch.float16)])  # fmt: skip
def test_types_are_turned_on_the_way(tmp_path, stored, wanted):
    state = {name: tensor.to(stored) for name, tensor in Stack().state_dict().items()}
    write_checkpoint(tmp_path, STACK, state)
    model = load(tmp_path, dtype=wanted)
    assert equal(model.state_dict(), {name: tensor.to(wanted) for name, tensor in state.items()})
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_quantised_weights_are_refused(tmp_path):
    save_file({name: tensor.to(torch.int8) for name, tensor in to_published(STACK, Stack().state_dict()).items()},
              tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="int8"):
        load(tmp_path)


MEASURE = """
import re, sys
from pathlib import Path
from torch import nn
import torch
from nanovlm.published.weights import load_weights, open_checkpoint
class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1024, 1024) for _ in range(32))
def memory(field):
    return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
nn.Linear(1024, 1024)(torch.randn(2, 1024))
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = memory("VmRSS")
with torch.device("meta"):
    model = Stack()
load_weights(model, (("h.{i}.{p}", "layers.{i}.{p}"),), open_checkpoint(sys.argv[1]))
print(memory("VmHWM") - before, sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of memory is read from Linux's /proc")
def test_loading_needs_one_shard_beside_the_model(tmp_path):
    tensors = {f"h.{i}.weight": torch.full((1024, 1024), float(i), dtype=torch.float32) for i in range(32)}
    tensors |= {f"h.{i}.bias": torch.zeros(1024) for i in range(32)}
    shard = 16 * 2**20
    names = write_checkpoint(tmp_path, OURS, tensors, shard + 65536)
    assert len(names) == 9
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown, model = map(int, done.stdout.split())
    assert 0.95 * model < grown < model + 1.5 * shard and model > 7 * shard


def test_a_full_disk_is_reported(tmp_path, monkeypatch):
    def full(*arguments, **named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(WeightsError, match="No space left"):
        write_checkpoint(tmp_path, STACK, Stack().state_dict())
    assert list(tmp_path.iterdir()) == []


def test_shards_and_index_of_different_downloads(tmp_path):
    write_checkpoint(tmp_path, STACK, Stack().state_dict(), 40_000)
    first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
    before, path = second.read_bytes(), tmp_path / "model.safetensors.index.json"
    save_file(load_file(first) | load_file(second), second)
    with pytest.raises(WeightsError, match=second.name):  # a tensor in two files
        open_checkpoint(tmp_path)
    second.write_bytes(before)
    index = json.loads(path.read_text())
    for shard, words in ((first.name, "h.99.weight"), ("../elsewhere.safetensors", "index.json")):
        index["weight_map"]["h.99.weight"] = shard
        path.write_text(json.dumps(index))
        with pytest.raises(WeightsError, match=words):
            open_checkpoint(tmp_path)


def test_a_single_file_goes_before_an_index(tmp_path):
    """As in transformers; the shards may be gone."""
    old, new = Stack().state_dict(), Stack().state_dict()
    write_checkpoint(tmp_path, STACK, old, 40_000)
    save_file(to_published(STACK, new), tmp_path / "model.safetensors")
    for shard in tmp_path.glob("model-*"):
        assert equal(load(tmp_path).state_dict(), new) and "index" in open_checkpoint(tmp_path).notes[0]
        shard.unlink()
    (tmp_path / "model.safetensors.index.json").unlink()
    assert not open_checkpoint(tmp_path).notes
    torch.save(to_published(STACK, old), tmp_path / "pytorch_model.bin")
    assert equal(load(tmp_path).state_dict(), new) and "pytorch_model.bin" in open_checkpoint(tmp_path).notes[0]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "module._orig_mod.", "model.", "module.model."])
def test_names_saved_from_inside_a_wrapper(tmp_path, prefix):
    state = Stack().state_dict()
    tensors = {prefix + name: tensor for name, tensor in to_published(STACK, state).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    assert equal(load(tmp_path).state_dict(), state)
    tensors["h.5.bias"] = tensors.pop(f"{prefix}h.5.bias")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="h.0.weight|h.{"):  # not every name: a mistake
        load(tmp_path)


@pytest.mark.parametrize("rows", [3, 5, 8])
def test_words_are_cut_off_or_added_at_their_mean(rows):
    table = torch.randn(5, 4)
    found = resized("decoder.embedding.weight", table, rows)
    assert found.shape == (rows, 4) and torch.equal(found[: min(rows, 5)], table[:rows])
    assert torch.allclose(found[5:], table.mean(0).expand(max(rows - 5, 0), 4))
