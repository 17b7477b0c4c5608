"""Every shipped kernel, compiled for GPUs that need not be there: `python -m nanovlm.bench compile`.

A kernel can be right and ten times too slow: its tile does not fit the registers, its products are not those of the
tensor cores, or its rows are read in pieces of two bytes. All of that can be read from the compiled code, without a
GPU. Each tile in the tables of flash_attention.py and routed_projection.py is compiled for its architecture, as the
launch would (pointers aligned to 16 bytes), and judged. For another Triton than the installed one:

    pip install --no-deps --target OTHER triton==3.6.0
    PYTHONPATH=OTHER python -m nanovlm.bench compile
"""

import contextlib
import io
import json
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

# bytes of fast memory that one program can have: an H100; the least of all later than an A100, as they share its tiles
SHARED_LIMIT = {90: 232_448, 80: 101_376}
KERNELS = ("attention", "projection")
SPILL_LIMIT = 16  # bytes; more of it sits in a loop
ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Variant:
    """A kernel as one launch compiles it."""

    name: str
    function: object  # triton.jit
    architecture: int  # compute capability, 90 = H100 and H200, 80 = A100
    constants: dict  # name: value
    types: dict  # name: Triton's name of the argument's type
    warps: int
    stages: int
    aligned: tuple = ()  # integers that are multiples of 16
    products: bool = True  # has matrix products, fed by copies that run ahead


@dataclass(frozen=True)
class Found:
    """What the compiled code tells."""

    registers: int  # of a thread
    spilled: int  # bytes of a thread that did not fit
    shared: int  # bytes of a program
    wgmma: int  # products of a whole warp group, sm_90's
    mma: int  # products of a warp
    copies: int  # asynchronous ones
    narrow: int  # loads of 2 bytes
    serialized: bool  # products wait for one another
    loop: int = 0  # machine instructions of the loop over whole tiles; 0 = no loop with products


def attention_variants():
    """Forward, dQ, dK and dV of flash_attention.TILES, with 88 channels where they are padded."""
    from nanovlm import flash_attention

    scalars = ("visible_stride", "seen_by_stride", "num_heads", "group", "num_queries", "num_keys")
    types = dict.fromkeys(scalars, "i32") | dict(scale="fp32", lse="*fp32", delta="*fp32", seen_by="*i32")
    for (architecture, widest), tiles in flash_attention.TILES.items():
        for width in (88,) if widest == 96 else (88, 128) if architecture == 80 and widest == 128 else (widest,):
            for name, tile in zip(("forward", "dq", "dkv"), tiles):
                function = getattr(flash_attention, f"{name}_kernel")
                interval = "*i64" if name == "forward" else "*i32"
                own = {n: "*bf16" for n in function.arg_names if n in ("q", "k", "v", "out", "do", "dq", "dk", "dv")}
                own |= {n: ("i32",) * 3 for n in function.arg_names if n.endswith("strides")}
                sizes = dict(D=width, BLOCK_D=64 if width <= 64 else 128, BLOCK_M=tile.queries, BLOCK_N=tile.keys)
                yield Variant(f"attention {name}", function, architecture, sizes, types | own | dict(
                    first=interval, stop=interval), tile.warps, tile.stages)  # fmt: skip


def projection_variants():
    """The product, forward and for the input's gradient, and the weights' gradient of routed_projection.TILES."""
    from nanovlm import modality_adaptive
    from nanovlm import routed_projection as module

    pointers = dict.fromkeys(("x", "text", "vision", "out", "dy"), "*bf16") | dict(order="*i64", text_end="*i64")
    sizes = ("num_in", "num_out", "x_stride", "row_stride", "column_stride", "out_stride", "dy_stride")
    types = pointers | dict.fromkeys((*sizes, "num_rows", "length"), "i32")
    for architecture, (product, gradient) in module.TILES.items():
        for name, function, one, (columns, summed, warps, stages) in (
            ("projection forward", module.product_kernel, "column_stride", product),
            ("projection dx", module.product_kernel, "row_stride", product),
            ("projection dw", module.weight_kernel, None, gradient),
        ):
            constants = dict(BLOCK_M=modality_adaptive.TILE, BLOCK_N=columns, BLOCK_K=summed) | ({one: 1} if one else {})
            yield Variant(name, function, architecture, constants, types, warps, stages, sizes)


def compiled(variant):
    """Compile one variant and read what came out: Found.

    Raises: RuntimeError where kernels are interpreted; what Triton raises where one does not compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RuntimeError("TRITON_INTERPRET=1: interpreted kernels cannot be compiled; unset it")
    names = variant.function.arg_names
    signature = {n: "constexpr" if n in variant.constants else variant.types[n] for n in names}
    aligned = [i for i, n in enumerate(names) if str(signature[n]).startswith("*") or
               n in variant.aligned and n not in variant.constants]  # fmt: skip
    source = ASTSource(
        variant.function, signature, constexprs={(names.index(n),): value for n, value in variant.constants.items()},
        attrs={(i,): ALIGNED for i in aligned},
    )  # fmt: skip
    options = dict(num_warps=variant.warps, num_stages=variant.stages, enable_fp_fusion=True)
    verbose = dict(TRITON_DUMP_PTXAS_LOG="1", TRITON_ALWAYS_COMPILE="1")
    with contextlib.redirect_stdout(io.StringIO()) as log, settings(**verbose):
        kernel = triton.compile(source, target=GPUTarget("cuda", variant.architecture, 32), options=options)
    found = read(log.getvalue(), kernel.asm["ptx"], kernel.metadata.shared)
    return replace(found, loop=shortest_loop(disassemble(kernel.asm["cubin"]))) if variant.products else found


@contextlib.contextmanager
def settings(**values):
    """Environment variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def read(log, ptx, shared):
    """Found, from the assembler's log, the code it read, and the shared memory asked for (bytes).

    Raises: ValueError for a log without registers and spills.
    """
    used, spilled = re.search(r"Used (\d+) registers", log), re.search(r"(\d+) bytes spill stores", log)
    if not used or not spilled:
        raise ValueError(f"the assembler's log names no registers and spills: {log[:200]!r}")
    return Found(
        int(used[1]), int(spilled[1]), shared, ptx.count("wgmma.mma_async"), ptx.count("mma.sync"),
        ptx.count("cp.async.") - ptx.count("cp.async.wait") - ptx.count("cp.async.commit"),
        len(re.findall(r"ld\.global[.\w:]*\.b16", ptx)), "serialized" in log,
    )  # fmt: skip


def tile_of(variant):
    """The sizes of a variant's tile, as 128x64."""
    return "x".join(str(variant.constants[n]) for n in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK") if n in variant.constants)


def label(variant):
    """What a variant is called in sass.json."""
    width = f" width {variant.constants['D']}" if "D" in variant.constants else ""
    return f"{variant.name} sm_{variant.architecture}{width} {tile_of(variant)} w{variant.warps} s{variant.stages}"


def faults(variant, found, longest=None):
    """What makes the code slow or impossible: list of str, empty if nothing does.

    longest: instructions that its loop may have (`shortest_loop`); None = any number.
    """
    limit, wrong = SHARED_LIMIT[variant.architecture], []
    if found.spilled > SPILL_LIMIT:
        wrong.append(f"spills {found.spilled} bytes")
    if found.shared > limit:
        wrong.append(f"{found.shared} bytes of shared memory, {limit} exist")
    if not variant.products:
        return wrong
    if variant.architecture == 90 and (not found.wgmma or found.mma):
        wrong.append("products are not warp-group products")
    if variant.architecture == 80 and not found.mma:
        wrong.append("no tensor-core products")
    if found.serialized:
        wrong.append("products are serialized")
    if not found.copies:
        wrong.append("nothing is loaded ahead")
    if found.narrow:
        wrong.append(f"{found.narrow} loads of 2 bytes")
    if not found.loop:
        wrong.append("no loop with products")
    if longest is not None and found.loop > longest:
        wrong.append(f"a loop of {found.loop} instructions, {int(longest)} are allowed")
    return wrong


def compile_all(names, keep=False):
    """Compile and judge all variants of some files; prints a table.

    Args: keep: write the loops' lengths to sass.json instead of judging them.
    Returns: int, how many have faults.
    """
    import triton

    makers = dict(attention=attention_variants, projection=projection_variants)
    known = {} if keep else recorded(triton.__version__)
    print(f"Triton {triton.__version__}; registers and spilled bytes of a thread, shared bytes of a program, instructions of "
          f"the loop over whole tiles ({'recorded' if keep else 'at most 5% more than recorded' if known else 'nothing recorded'})")
    print(f"{'kernel':<20}{'sm':>4}{'width':>6} {'tile':>11}{'warps':>6}{'stages':>7}{'registers':>10}{'spilled':>8}"
          f"{'shared':>9}{'products':>9}{'copies':>7}{'loop':>6}  verdict")  # fmt: skip
    bad, lengths = 0, {}
    for variant in (variant for name in names for variant in makers[name]()):
        found = compiled(variant)
        longest = known.get(label(variant))
        wrong = faults(variant, found, None if longest is None else longest * SLACK)
        bad += bool(wrong)
        if found.loop:
            lengths[label(variant)] = found.loop
        width = variant.constants.get("D", "")
        print(f"{variant.name:<20}{variant.architecture:>4}{width:>6} {tile_of(variant):>11}{variant.warps:>6}"
              f"{variant.stages:>7}{found.registers:>10}{found.spilled:>8}{found.shared:>9}{found.wgmma + found.mma:>9}"
              f"{found.copies:>7}{found.loop:>6}  {'; '.join(wrong) or 'good'}", flush=True)  # fmt: skip
    if keep:
        record(triton.__version__, lengths)
    return bad


def judge_all(args):
    """The command `bench compile`; returns the exit code, 1 if a kernel has a fault."""
    return int(compile_all(args.kernel or KERNELS, args.record) > 0)


# How many machine instructions a kernel's loop has: a ratchet against code that grows slower without a GPU to notice.
#
# The loop over whole tiles is where a kernel spends its time, and its instructions beside the products are what the
# tensor cores wait for. NVIDIA's disassembler comes with Triton and needs no GPU. What was counted once stands in
# sass.json, by version of Triton, whose assembler decides; `python -m nanovlm.bench compile` finds fault with a
# loop that has become more than 5% longer, and `--record` writes today's counts there.


RECORDED = Path(__file__).with_name("sass.json")
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
