"""What a machine is fast in, told from what it says of itself."""

import itertools

import pytest
import torch

from nanovlm import machine
from nanovlm.machine import Facts, is_fast, training_precision

SYSTEMS, PROCESSORS = ("Linux", "Darwin", "Windows"), ("x86_64", "aarch64", "arm64", "AMD64", "riscv64")
FLAGS = ((), ("avx2",), ("avx512_bf16",), ("amx_bf16",), ("bf16",), ("avx512f", "avx512_bf16", "amx_bf16"))
CAPABILITIES = ("DEFAULT", "AVX2", "AVX512", "SVE256")


def test_bfloat16_on_a_cpu_takes_a_processor_that_multiplies_it():
    for system, processor, flags, capability in itertools.product(SYSTEMS, PROCESSORS, FLAGS, CAPABILITIES):
        facts = Facts("cpu", system, processor, frozenset(flags), capability)
        x86 = processor == "x86_64" and capability == "AVX512" and {"avx512_bf16", "amx_bf16"} & set(flags)
        arm = processor == "aarch64" and "bf16" in flags
        assert training_precision(facts) == ("bfloat16" if system == "Linux" and (x86 or arm) else "float32"), facts
        assert is_fast("float32", facts)
    assert training_precision(Facts("mps", "Darwin", "arm64", frozenset(["bf16"]))) == "float32"
    assert is_fast("float16", Facts("cpu", "Linux", "x86_64", frozenset(["avx512_fp16"]), "AVX512"))
    assert not is_fast("float16", Facts("cpu", "Linux", "x86_64", frozenset(["avx512_fp16"]), "AVX2"))
    assert is_fast("float16", Facts("cpu", "Linux", "aarch64", frozenset(["asimdhp"]), "DEFAULT"))


@pytest.mark.parametrize(("capability", "half", "brain"), [
    ((6, 1), False, False), ((7, 0), True, False), ((7, 5), True, False), ((8, 0), True, True), ((9, 0), True, True),
    ((12, 0), True, True)])  # fmt: skip
@pytest.mark.parametrize("flags", FLAGS)
def test_a_gpu_is_asked_for_its_compute_capability_alone(capability, half, brain, flags):
    facts = Facts("cuda", "Linux", "x86_64", frozenset(flags), "AVX2", capability)
    assert (is_fast("float16", facts), is_fast("bfloat16", facts)) == (half, brain)
    assert training_precision(facts) == ("bfloat16" if brain else "float32")


def test_the_facts_of_this_machine(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    facts = machine.facts_of("cpu")
    assert facts.device == "cpu" and facts.cpu_capability == "AVX2" and facts.system and facts.processor
    if facts.system == "Linux":
        assert len(facts.flags) > 3
    if facts.processor == "x86_64":
        assert "slow in bfloat16" in machine.slow_line("bfloat16", "cpu")
    assert machine.slow_line("float32", "cpu") is None
    machine.check_device("cpu")
    with pytest.raises(ValueError, match="try --device cpu"):
        machine.check_device("gpu")
