"""What a machine is fast in, told from what it says of itself."""

import itertools
import platform

import pytest
import torch

from nanovlm import machine
from nanovlm.machine import is_fast, training_precision

SYSTEMS, PROCESSORS = ("Linux", "Darwin", "Windows"), ("x86_64", "aarch64", "arm64", "AMD64", "riscv64")
FLAGS = ((), ("avx2",), ("avx512_bf16",), ("amx_bf16",), ("bf16",), ("avx512f", "avx512_bf16", "amx_bf16"))
CAPABILITIES = ("DEFAULT", "AVX2", "AVX512", "SVE256")


@pytest.fixture
def this_is(monkeypatch):
    """Make this machine another: function of system, processor, its flags, torch's kernels, GPU's capability, maker."""
    def change(system, processor, flags, kernels="DEFAULT", capability=None, maker="AuthenticAMD"):
        said = {"flags|Features": " ".join(flags), "vendor_id": maker if processor == "x86_64" else ""}
        monkeypatch.setattr(platform, "system", lambda: system)
        monkeypatch.setattr(platform, "machine", lambda: processor)
        monkeypatch.setattr(machine, "cpuinfo", said.get)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: kernels)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return change


def test_bfloat16_on_a_cpu_takes_a_processor_that_multiplies_it(this_is):
    units = {"AuthenticAMD": "avx512_bf16", "GenuineIntel": "amx_bf16", "Another": None}  # that are faster than float32
    for system, processor, flags, kernels, maker in itertools.product(SYSTEMS, PROCESSORS, FLAGS, CAPABILITIES, units):
        this_is(system, processor, flags, kernels, maker=maker)
        x86 = processor == "x86_64" and kernels == "AVX512" and units[maker] in flags
        fast = system == "Linux" and (x86 or processor == "aarch64" and "bf16" in flags)
        assert training_precision("cpu") == ("bfloat16" if fast else "float32"), (system, processor, flags, kernels, maker)
        assert is_fast("float32", "cpu")


@pytest.mark.parametrize(("capability", "half", "brain"), [
    ((6, 1), False, False), ((7, 0), True, False), ((7, 5), True, False), ((8, 0), True, True), ((9, 0), True, True),
    ((12, 0), True, True)])  # fmt: skip
@pytest.mark.parametrize("flags", FLAGS)
def test_a_gpu_is_asked_for_its_compute_capability_alone(capability, half, brain, flags, this_is):
    this_is("Linux", "x86_64", flags, "AVX2", capability)
    assert (is_fast("float16", "cuda"), is_fast("bfloat16", "cuda")) == (half, brain)
    assert training_precision("cuda") == ("bfloat16" if brain else "float32")


@pytest.mark.parametrize(("dtype", "device", "expected", "machine"), [
    ("bfloat16", "mps", False, ("Darwin", "arm64", ["bf16"])),
    ("float16", "cpu", True, ("Linux", "x86_64", ["avx512_fp16"], "AVX512")),
    ("float16", "cpu", False, ("Linux", "x86_64", ["avx512_fp16"], "AVX2")),
    ("float16", "cpu", True, ("Linux", "aarch64", ["asimdhp"])),
])  # fmt: skip
def test_float16_on_a_cpu_and_mps(dtype, device, expected, machine, this_is):
    this_is(*machine)
    assert is_fast(dtype, device) is expected


def test_what_this_machine_says(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    if platform.system() == "Linux":
        assert len(machine.cpuinfo("flags|Features").split()) > 3
    if platform.machine() == "x86_64":
        assert "slow in bfloat16" in machine.slow_line("bfloat16", "cpu")
    assert machine.slow_line("float32", "cpu") is None and machine.cpuinfo("no such name") == ""


def test_a_device_that_is_not_there():
    machine.check_device("cpu")
    with pytest.raises(ValueError, match="try --device cpu"):
        machine.check_device("gpu")
