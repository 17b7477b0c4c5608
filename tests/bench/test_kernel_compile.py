"""What is shipped compiles for GPUs that are not there, without spills; the benchmark's own arithmetic."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanovlm.bench import compile, kernels
from nanovlm.bench.__main__ import main
from nanovlm.bench.kernels import Case
from nanovlm.bench.compile import Found, Variant, faults, read
from nanovlm.bench.kernels import lines

ROOT = Path(__file__).resolve().parents[2]
GOOD = {90: Found(200, 0, 100_000, 36, 0, 20, 0, False, 500), 80: Found(200, 16, 100_000, 0, 90, 20, 0, False, 500)}


def tool(*arguments):
    """Run the command in a process of its own, as kernels made for the interpreter cannot be compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "nanovlm.bench", "compile", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["attention", "projection"])
def test_every_shipped_tile_compiles_well(kernel):
    pytest.importorskip("triton")
    done = tool("--kernel", kernel)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    verdicts = [line for line in done.stdout.splitlines() if line.endswith("good")]
    assert len(verdicts) == {"attention": 18, "projection": 6}[kernel]


def test_the_variants_are_the_tables_of_tiles():
    flash, routed = (pytest.importorskip(f"nanovlm.{name}") for name in ("flash_attention", "routed_projection"))
    variants = list(compile.attention_variants())
    for (architecture, widest), tiles in flash.TILES.items():
        mine = [v for v in variants if v.architecture == architecture and v.constants["D"] <= widest][-3:]
        assert [(v.constants["BLOCK_M"], v.constants["BLOCK_N"], v.warps, v.stages) for v in mine] == [
            (t.queries, t.keys, t.warps, t.stages) for t in tiles
        ]
    assert {v.constants["D"] for v in variants if v.architecture == 90} == {64, 88, 128}
    assert {v.architecture for v in compile.projection_variants()} == set(routed.TILES) == {80, 90}


def test_faults_are_seen():
    variant = {a: Variant("x", None, a, {}, {}, 8, 2) for a in (80, 90)}
    change = lambda a, **values: faults(variant[a], Found(**{**GOOD[a].__dict__, **values}))
    assert change(80) == change(90) == []
    assert change(90, spilled=17) == ["spills 17 bytes"]
    assert change(90, shared=232_449) == ["232449 bytes of shared memory, 232448 exist"]
    assert change(80, shared=101_377) == ["101377 bytes of shared memory, 101376 exist"]
    assert change(90, wgmma=0) == change(90, mma=1) == ["products are not warp-group products"]
    assert change(80, mma=0) == ["no tensor-core products"]
    assert change(90, serialized=True) == ["products are serialized"]
    assert change(80, copies=0) == ["nothing is loaded ahead"]
    assert change(80, narrow=3) == ["3 loads of 2 bytes"]
    assert change(80, loop=0) == ["no loop with products"]
    assert faults(variant[90], GOOD[90], 500.0) == []
    assert faults(variant[90], GOOD[90], 499.8) == ["a loop of 500 instructions, 499 are allowed"]
    alone = Variant("norm", None, 90, {}, {}, 8, 2, products=False)
    assert faults(alone, Found(30, 0, 0, 0, 0, 0, 5, False)) == []
    assert faults(alone, Found(30, 20, 0, 0, 0, 0, 0, False)) == ["spills 20 bytes"]


def test_reading_a_log_and_code():
    log = "0 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads\nUsed 255 registers, used 1 barriers"
    ptx = (
        "wgmma.mma_async.sync.x; mma.sync.aligned; cp.async.cg.shared.global; cp.async.commit_group; cp.async.wait_group 1;"
        "ld.global.b16 a; ld.global.L1::evict_last.b16 b; ld.global.v4.b32 c;"
    )
    assert read(log, ptx, 77) == Found(255, 12, 77, 1, 1, 1, 2, False)
    assert read(log + "wgmma serialized due to", ptx, 77).serialized
    with pytest.raises(ValueError, match="names no registers"):
        read("", ptx, 0)


def instructions(*texts):
    """Machine code as the disassembler writes it: each instruction on two lines, 16 bytes."""
    lines = [f"        /*{16 * n:04x}*/    {text} ;   /* 0x0a00ff017b82 */\n      /* 0x000ff0 */" for n, text in enumerate(texts)]
    return "\n".join(["\tcode for sm_90a", *lines])


def test_the_shortest_loop_with_products():
    masked = instructions(
        "LDC R1, c[0x0][0x28]", "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4]", "FSETP R2", "@!P3 BRA 0x10",  # 3 in a loop
        "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4]", "@!P3 BRA 0x40",  # 2
        "FADD R1, R2", "@P0 BRA 0x90", "@P1 BRA 0x70", "EXIT", "BRA 0xa0",  # without products, ahead, on the spot
    )
    assert compile.shortest_loop(masked) == 2
    assert compile.shortest_loop(masked.replace("@!P3 BRA 0x40", "@!P3 BRA 0x60")) == 3
    assert compile.shortest_loop(masked.replace("HGMMA", "HMMA")) == 2
    assert compile.shortest_loop(masked.replace("HGMMA", "FFMA")) == 0


def test_loops_are_recorded_by_version(monkeypatch, tmp_path):
    monkeypatch.setattr(compile, "RECORDED", tmp_path / "loops.json")
    assert compile.recorded("3.6.0") == {}
    compile.record("3.6.0", {"b": 5, "a": 7})
    compile.record("3.9.0", {"a": 9})
    compile.record("3.6.0", {"b": 4})
    assert compile.recorded("3.6.0") == {"a": 7, "b": 4} and compile.recorded("3.9.0") == {"a": 9}


def test_every_loop_is_recorded():
    pytest.importorskip("triton")
    variants = [*compile.attention_variants(), *compile.projection_variants()]
    for version in ("3.6.0", "3.9.0"):
        assert set(compile.recorded(version)) == {compile.label(variant) for variant in variants}


def test_a_longer_loop_is_a_fault(monkeypatch, capsys):
    variant = Variant("x", None, 90, {}, {}, 8, 2)
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(compile, "attention_variants", lambda: [variant])
    monkeypatch.setattr(compile, "compiled", lambda variant: GOOD[90])
    for length, bad in ((477, 0), (476, 1)):  # 5% more than 477 is 500.85
        monkeypatch.setattr(compile, "recorded", lambda version: {compile.label(variant): length})
        assert compile.compile_all(["attention"]) == bad
    assert f"Triton {triton.__version__}" in capsys.readouterr().out


def test_interpreted_kernels_are_refused(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="unset it"):
        compile.compiled(next(compile.attention_variants()))


def test_flops_and_floors_by_hand():
    assert Case("full", 10, 8, 3, 2).flops() == 4 * 3 * 2 * 8 * 100
    assert Case("causal", 10, 8, 3, 2).flops() == 4 * 3 * 2 * 8 * 55
    assert Case("packed", 16, 8, 1, 1).flops() == 4 * 8 * 8 * 3  # eight documents of two tokens
    # the row of the specification: 137 GFLOP, 0.174 ms forward and 0.435 backward
    case = Case("causal", 2048, 128, 4, 32)
    assert case.flops() == pytest.approx(137.5e9, rel=1e-3)
    assert case.floor(False) == pytest.approx(0.174e-3, rel=5e-3) and case.floor(True) == pytest.approx(0.435e-3, rel=5e-3)


def test_ratios_are_taken_round_by_round():
    times = {"nanovlm": [1.0, 2.0, 4.0], "other": [2.0, 2.0, 12.0], "broken": "no kernel available"}
    ours, other, broken = lines("a case", times, 8e9)
    assert (ours.ratio, ours.ratio_low, ours.ratio_high) == (1, 1, 1)
    assert (other.median_ms, other.ratio, other.ratio_low, other.ratio_high, other.tflops) == (2, 2, 1.5, 2.5, 4)
    assert math.isnan(broken.ratio) and broken.note == "no kernel available"
    assert all(math.isnan(line.ratio) for line in lines("a case", {"nanovlm": "out of memory", "other": [1.0]}, 1))


def test_a_part_of_the_benchmark_can_be_chosen():
    assert len(kernels.measures("")) == len(kernels.CASES) + 4
    assert len(kernels.measures("causal 577")) == len(kernels.measures("projection")) == 3
    assert kernels.measures("loss") == [kernels.loss_lines]
    with pytest.raises(ValueError, match="--only 'casual' is in none of these names: attention causal 577 64, "):
        kernels.measures("casual")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what it does without a GPU")
def test_without_a_gpu_the_floors_are_printed(capsys):
    assert main(["kernels"]) == 0
    printed = capsys.readouterr().out
    assert "no GPU here" in printed and len(printed.splitlines()) == len(kernels.CASES) + 4
