"""What this machine can do: where models run, and which type of numbers it is fast in.

bfloat16 halves memory and doubles speed where the processor multiplies it itself. Where it does not, torch imitates it,
up to forty times slower than float32. So it is taken on Nvidia GPUs from Ampere on, and under Linux on CPUs whose flags
name it, unless torch is kept from its AVX512 kernels (ATEN_CPU_CAPABILITY=avx2); everywhere else it is float32. The
choice follows what the machine says of itself, so it is the same every time.
"""

import platform
import re
from dataclasses import dataclass
from pathlib import Path

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEVICES = "cpu, cuda, cuda:1, or mps (untried)"
FLAGS = {  # type -> what a processor that multiplies it says of itself; Linux's names on x86 and on Arm
    "bfloat16": {"x86_64": ("avx512_bf16", "amx_bf16"), "aarch64": ("bf16",)},
    "float16": {"x86_64": ("avx512_fp16", "amx_fp16"), "aarch64": ("asimdhp",)},
}
CAPABILITIES = {"bfloat16": (8, 0), "float16": (7, 0)}  # of an Nvidia GPU: tensor cores for this type


@dataclass(frozen=True)
class Facts:
    """What a machine says of itself."""

    device: str  # "cpu", "cuda" or "mps"
    system: str  # "Linux", "Darwin" or "Windows"
    processor: str = ""  # "x86_64" or "aarch64"
    flags: frozenset[str] = frozenset()  # of the processor, by Linux's names
    cpu_capability: str = ""  # torch's kernels: "DEFAULT", "AVX2", "AVX512"
    compute_capability: tuple[int, int] = (0, 0)  # of an Nvidia GPU


def is_fast(dtype, facts):
    """Whether a machine is fast in a type: bool. dtype: a key of DTYPES. facts: Facts."""
    if dtype == "float32":
        return True
    if facts.device == "cuda":
        return facts.compute_capability >= CAPABILITIES[dtype]
    if facts.device != "cpu" or facts.system != "Linux":
        return False
    if facts.processor == "x86_64" and not facts.cpu_capability.startswith(("AVX512", "AVX10", "AMX")):
        return False
    return not facts.flags.isdisjoint(FLAGS[dtype].get(facts.processor, ()))


def training_precision(facts):
    """What precision="auto" stands for: "bfloat16" where a machine is fast in it, else "float32"."""
    return "bfloat16" if is_fast("bfloat16", facts) else "float32"


def facts_of(device):
    """The Facts of this machine, for a device by torch's name."""
    device, path = torch.device(device), Path("/proc/cpuinfo")
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", path.read_text(), re.MULTILINE) if path.exists() else None
    return Facts(
        device=device.type,
        system=platform.system(),
        processor=platform.machine(),
        flags=frozenset(found[1].split() if found else ()),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        compute_capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0),
    )


def slow_line(dtype, device):
    """What is said to someone who asks for a type that a device is slow in: str, or None if it is fast.

    dtype: a key of DTYPES. device: by torch's name.
    """
    return None if is_fast(dtype, facts_of(device)) else f"{device} is slow in {dtype} here; float32 is faster"


def free_memory(device):
    """Bytes that are free on a device, on a CPU within its container's limit: int, or None where nothing says so."""
    device, meminfo, limits = torch.device(device), Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu" or not meminfo.exists():
        return None
    free = int(re.search(r"MemAvailable:\s+(\d+)", meminfo.read_text())[1]) * 1024
    if (limits / "memory.max").exists() and (limits / "memory.max").read_text().strip() != "max":
        limit, used = (int((limits / f"memory.{name}").read_text()) for name in ("max", "current"))
        files = int(re.search(r"inactive_file (\d+)", (limits / "memory.stat").read_text())[1])  # which give way
        free = min(free, limit - used + files)
    return free


def check_memory(needed, device, what):
    """Raise ValueError if so many bytes are not free on a device; what: for whom, in words."""
    free = free_memory(device)
    if free is not None and needed > free:
        raise ValueError(f"{what} take {needed / 1e9:,.1f} GB, and {device} has {free / 1e9:,.1f} GB free; take a "
                         "smaller model or type (--dtype bfloat16), train fewer parts (--lora 8), or a larger machine")


def default_device():
    """The device that is used unless another is named: "cuda" if there is one, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(name):
    """Raise ValueError for a device that torch does not know or this machine does not have."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        said = str(error).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used here ({said}); try --device cpu") from error
