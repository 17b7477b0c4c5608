"""What is shipped compiles for GPUs that are not there, without spills; the benchmark's own arithmetic."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanovlm.bench import compile, kernels
from nanovlm.bench.__main__ import main, make_parser
from nanovlm.bench.compile import Found, Variant, faults, read
from nanovlm.bench.kernels import Case, lines

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
    assert len(verdicts) == {"attention": 24, "projection": 6}[kernel]


@pytest.mark.parametrize("architecture, values, words", (
    (80, {}, None), (90, {}, None), (90, {"spilled": 17}, "spills 17 bytes"),
    (90, {"shared": 232_449}, "232449 bytes of shared memory, 232448 exist"),
    (80, {"shared": 101_377}, "101377 bytes of shared memory, 101376 exist"),
    (90, {"wgmma": 0}, "products are not warp-group products"), (90, {"mma": 1}, "products are not warp-group products"),
    (80, {"mma": 0}, "no tensor-core products"), (90, {"serialized": True}, "products are serialized"),
    (80, {"copies": 0}, "nothing is loaded ahead"), (80, {"narrow": 3}, "3 loads of 2 bytes"),
    (80, {"loop": 0}, "no loop with products"), (90, {"loop": 501}, "a loop of 501 instructions, 500 are allowed"),
))  # fmt: skip
def test_faults_are_seen(architecture, values, words):
    variant = Variant("x", None, architecture, {}, {}, 8, 2)
    found = dataclasses.replace(GOOD[architecture], **values)
    assert faults(variant, found, 500) == ([words] if words else [])
    assert faults(variant, GOOD[architecture]) == []


def test_reading_a_log_and_code():
    log = "0 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads\nUsed 255 registers, used 1 barriers"
    ptx = (
        "wgmma.mma_async.sync.x; mma.sync.aligned; cp.async.cg.shared.global; cp.async.commit_group; cp.async.wait_group 1;"
        "ld.global.b16 a; ld.global.L1::evict_last.b16 b; ld.global.v4.b32 c;"
    )
    assert read(log, ptx, "", 77) == Found(255, 12, 77, 1, 1, 1, 2, False, 0)
    assert read(log + "wgmma serialized due to", ptx, "", 77).serialized


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


def judge(*flags):
    return compile.judge_all(make_parser().parse_args(["compile", *flags]))


def test_loops_are_recorded_by_version_and_a_longer_one_is_a_fault(monkeypatch, tmp_path):
    triton, variant = pytest.importorskip("triton"), Variant("x", None, 90, {}, {}, 8, 2)
    monkeypatch.setattr(compile, "RECORDED", tmp_path / "loops.json")
    monkeypatch.setattr(compile, "KERNELS", {"attention": lambda: [variant]})
    monkeypatch.setattr(compile, "compiled", lambda variant: GOOD[90])
    for length, bad in ((477, 0), (476, 1)):  # 5% more than 477 is 500.85
        known = {"1.0": {"a": 9}, triton.__version__: {variant.label: length, "b": 5}}
        compile.RECORDED.write_text(json.dumps(known))
        assert judge() == bad and json.loads(compile.RECORDED.read_text()) == known
    assert judge("--record") == 0
    assert json.loads(compile.RECORDED.read_text()) == known | {triton.__version__: {variant.label: 500, "b": 5}}


def test_every_loop_is_recorded(monkeypatch):
    pytest.importorskip("triton")
    labels = {variant.label for variants in compile.KERNELS.values() for variant in variants()}
    recorded = json.loads(compile.RECORDED.read_text())
    assert all(set(recorded[version]) == labels for version in ("3.6.0", "3.9.0"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="unset it"):
        compile.compiled(next(compile.attention_variants()))


def test_flops_floors_and_ratios_by_hand_of_the_chosen_part():
    assert Case("full", 10, 8, 3, 2).flops() == 4 * 3 * 2 * 8 * 100
    assert Case("causal", 10, 8, 3, 2).flops() == 4 * 3 * 2 * 8 * 55
    assert Case("packed", 16, 8, 1, 1).flops() == 4 * 8 * 8 * 3  # eight documents of two tokens
    # the row of the specification: 137 GFLOP, 0.174 ms forward and 0.435 backward
    case = Case("causal", 2048, 128, 4, 32)
    assert case.flops() == pytest.approx(137.5e9, rel=1e-3)
    assert case.floor(False) == pytest.approx(0.174e-3, rel=5e-3) and case.floor(True) == pytest.approx(0.435e-3, rel=5e-3)
    times = {"nanovlm": [0.001, 0.002, 0.004], "other": [0.002, 0.002, 0.012], "broken": "no kernel available"}
    ours, other, broken = lines("a case", times, 8e9)
    assert (ours.ratio, ours.ratio_low, ours.ratio_high) == (1, 1, 1)
    assert (other.median_ms, other.ratio, other.ratio_low, other.ratio_high, other.tflops) == pytest.approx((2, 2, 1.5, 2.5, 4))
    assert math.isnan(broken.ratio) and broken.note == "no kernel available"
    assert all(math.isnan(line.ratio) for line in lines("a case", {"nanovlm": "out of memory", "other": [1.0]}, 1))
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
