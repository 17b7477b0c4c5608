"""How many machine instructions a kernel's loop has: a ratchet against code that grows slower without a GPU to notice.

The loop over whole tiles is where a kernel spends its time, and its instructions beside the products are what the
tensor cores wait for. NVIDIA's disassembler comes with Triton and needs no GPU. What was counted once stands in
bench_sass.json, by version of Triton, whose assembler decides; `python -m nanovlm.bench compile` finds fault with a
loop that has become more than 5% longer, and `--record` writes today's counts there.
"""

import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

RECORDED = Path(__file__).with_name("bench_sass.json")
SLACK = 1.05
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(\S.*);", re.MULTILINE)
JUMP = re.compile(r"\bBRA\b.*?\b0x([0-9a-f]+)")
PRODUCT = re.compile(r"\bH(?:G)?MMA\b")


def disassemble(cubin):
    """The machine code of a compiled kernel, bytes, as text."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    path = f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"  # cuobjdump starts nvdisasm
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tools / "cuobjdump", "-sass", file.name], env={**os.environ, "PATH": path},
                              text=True, capture_output=True, check=True)  # fmt: skip
    return done.stdout


def shortest_loop(sass):
    """Instructions of the shortest loop that has tensor-core products: the one over tiles that need no mask; 0 = none."""
    code = [(int(address, 16), text) for address, text in INSTRUCTION.findall(sass)]
    lengths = []
    for place, (address, text) in enumerate(code):
        jump = JUMP.search(text)
        if jump and int(jump[1], 16) < address:
            body = [inner for start, inner in code[: place + 1] if start >= int(jump[1], 16)]
            if any(PRODUCT.search(inner) for inner in body):
                lengths.append(len(body))
    return min(lengths, default=0)


def recorded(version):
    """What was counted with a version of Triton: {a variant's label: instructions}, empty for one not recorded."""
    return json.loads(RECORDED.read_text()).get(version, {}) if RECORDED.exists() else {}


def record(version, lengths):
    """Write the counts of a version, {label: instructions}; those of other labels and versions stay."""
    known = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    known[version] = dict(sorted({**known.get(version, {}), **lengths}.items()))
    RECORDED.write_text(json.dumps(dict(sorted(known.items())), indent=2) + "\n")
