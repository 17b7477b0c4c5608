"""What this machine can do: where models run, and which type of numbers it is fast in.

bfloat16 halves memory and doubles speed where the processor multiplies it itself. Where it does not, torch imitates it,
up to forty times slower than float32. So it is taken on Nvidia GPUs from Ampere on, and under Linux on CPUs whose flags
name it, unless torch is kept from its AVX512 kernels (ATEN_CPU_CAPABILITY=avx2); everywhere else it is float32. Intel's
multiply it in their AMX tiles: where a virtual machine hides these, avx512_bf16 is there and half as fast as float32.
The choice follows what the machine says of itself, so it is the same every time.
"""

import platform
import re
from pathlib import Path

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEVICES = "cpu, cuda, cuda:1, or mps (untried)"
FLAGS = {  # type -> maker of the x86, or kind of processor -> what one that multiplies it says of itself; Linux's names
    "bfloat16": {"AuthenticAMD": ("avx512_bf16",), "GenuineIntel": ("amx_bf16",), "aarch64": ("bf16",)},
    "float16": {"AuthenticAMD": ("avx512_fp16",), "GenuineIntel": ("avx512_fp16", "amx_fp16"), "aarch64": ("asimdhp",)},
}
CAPABILITIES = {"bfloat16": (8, 0), "float16": (7, 0)}  # of an Nvidia GPU: tensor cores for this type


def cpuinfo(names):
    """What Linux says of the processor under one of some names ("flags|Features"): str, "" where it says nothing."""
    path = Path("/proc/cpuinfo")
    found = re.search(rf"^(?:{names})\s*:(.*)$", path.read_text() if path.exists() else "", re.MULTILINE)
    return found[1].strip() if found else ""


def is_fast(dtype, device):
    """Whether this machine is fast in a type on a device: bool. dtype: a key of DTYPES. device: by torch's name."""
    device, processor = torch.device(device), platform.machine()
    if dtype == "float32":
        return True
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= CAPABILITIES[dtype]
    if device.type != "cpu" or platform.system() != "Linux":
        return False
    kernels = torch.backends.cpu.get_cpu_capability()  # "DEFAULT", "AVX2", "AVX512"
    if processor == "x86_64" and not kernels.startswith(("AVX512", "AVX10", "AMX")):
        return False
    kind = cpuinfo("vendor_id") if processor == "x86_64" else processor
    return not set(FLAGS[dtype].get(kind, ())).isdisjoint(cpuinfo("flags|Features").split())


def training_precision(device):
    """What precision="auto" stands for on a device: "bfloat16" where the machine is fast in it, else "float32"."""
    return "bfloat16" if is_fast("bfloat16", device) else "float32"


def slow_line(dtype, device):
    """What is said to someone who asks for a type that a device is slow in: str, or None if it is fast.

    dtype: a key of DTYPES. device: by torch's name.
    """
    return None if is_fast(dtype, device) else f"{device} is slow in {dtype} here; float32 is faster"


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
