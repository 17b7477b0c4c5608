"""Every shipped kernel, compiled for GPUs that need not be there: `python -m nanovlm.bench compile`.

A kernel can be right and ten times too slow: its tile does not fit the registers, its products are not those of the
tensor cores, or its rows are read in pieces of two bytes. The compiled code tells. Each tile in the tables of
flash_attention.py and routed_projection.py is compiled for its architecture, as the launch would (pointers aligned to
16 bytes), and judged. For another Triton than the installed one:

    pip install --no-deps --target OTHER triton==3.6.0
    PYTHONPATH=OTHER python -m nanovlm.bench compile

The loop over whole tiles is where a kernel spends its time, and its instructions beside the products are what the
tensor cores wait for. What was counted once stands in sass.json, by version of Triton, whose assembler decides: a loop
that has become more than 5% longer is a fault, and `--record` writes today's counts there.
"""

import contextlib
import io
import itertools
import json
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

# bytes of fast memory that one program can have: an H100; the least of all later than an A100, as they share its tiles
SHARED_LIMIT = {90: 232_448, 80: 101_376}
SPILL_LIMIT = 16  # bytes; more of it sits in a loop
ALIGNED = [["tt.divisibility", 16]]
RECORDED = Path(__file__).with_name("sass.json")
SLACK = 1.05
ROW = "{:<24}{:>4}{:>6} {:>11}{:>6}{:>7}{:>10}{:>8}{:>9}{:>9}{:>7}{:>6}  {}"
HEAD = "kernel sm width tile warps stages registers spilled shared products copies loop verdict"


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

    @property
    def tile(self):
        """The sizes of its tile, as 128x64."""
        sizes = map(self.constants.get, ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
        return "x".join(str(size) for size in sizes if size)

    @property
    def label(self):
        """What it is called in sass.json."""
        width = f" width {self.constants['D']}" if "D" in self.constants else ""
        return f"{self.name} sm_{self.architecture}{width} {self.tile} w{self.warps} s{self.stages}"


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
    loop: int  # machine instructions of the loop over whole tiles; 0 = no loop with products


def attention_variants():
    """Forward, dQ, dK and dV of flash_attention.TILES, with 88 channels where they are padded; of 128 ALiBi's too."""
    from nanovlm import flash_attention

    integers = ("visible_stride", "seen_by_stride", "num_heads", "group", "num_queries", "num_keys")
    scalars = dict.fromkeys(integers, "i32")
    scalars |= dict(scale="fp32", lse="*fp32", delta="*fp32", seen_by="*i32", slopes="*fp32")
    for (architecture, widest), tiles in flash_attention.TILES.items():
        for width in (88,) if widest == 96 else (88, 128) if (architecture, widest) == (80, 128) else (widest,):
            kinds = [("", tiles, {"slopes": None}), (" alibi", flash_attention.with_alibi(tiles), {})]
            for (kind, chosen, off), place in itertools.product(kinds[: 2 if width == 128 else 1], range(3)):
                name, tile = ("forward", "dq", "dkv")[place], chosen[place]
                function = getattr(flash_attention, f"{name}_kernel")
                types = {n: ("i32",) * 3 if n.endswith("strides") else "*bf16" for n in function.arg_names} | scalars
                types |= dict.fromkeys(("first", "stop"), "*i64" if name == "forward" else "*i32")
                sizes = off | dict(D=width, BLOCK_D=64 if width <= 64 else 128, BLOCK_M=tile.queries, BLOCK_N=tile.keys)
                yield Variant(f"attention {name}{kind}", function, architecture, sizes, types, tile.warps, tile.stages)


def projection_variants():
    """The product, forward and for the input's gradient, and the weights' gradient of routed_projection.TILES."""
    from nanovlm import modality_adaptive
    from nanovlm import routed_projection as module

    sizes = ("num_in", "num_out", "x_stride", "row_stride", "column_stride", "out_stride", "dy_stride")
    types = dict.fromkeys(("x", "text", "vision", "out", "dy"), "*bf16") | dict(order="*i64", text_end="*i64")
    types |= dict.fromkeys((*sizes, "num_rows", "length"), "i32")
    for architecture, (product, gradient) in module.TILES.items():
        for name, function, one, (columns, summed, warps, stages) in (
            ("projection forward", module.product_kernel, {"column_stride": 1}, product),
            ("projection dx", module.product_kernel, {"row_stride": 1}, product),
            ("projection dw", module.weight_kernel, {}, gradient),
        ):
            constants = dict(BLOCK_M=modality_adaptive.TILE, BLOCK_N=columns, BLOCK_K=summed) | one
            yield Variant(name, function, architecture, constants, types, warps, stages, sizes)


KERNELS = {"attention": attention_variants, "projection": projection_variants}


def compiled(variant):
    """Compile one variant and read what came out: Found.

    Raises: RuntimeError where kernels are interpreted; what Triton raises where one does not compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RuntimeError("TRITON_INTERPRET=1: interpreted kernels cannot be compiled; unset it")
    names, constants = variant.function.arg_names, variant.constants
    signature = {n: "constexpr" if n in constants else variant.types[n] for n in names}
    attributes = {(place,): ALIGNED for place, (n, kind) in enumerate(signature.items())
                  if kind[0] == "*" or n in variant.aligned and n not in constants}  # fmt: skip
    constants = {(names.index(n),): value for n, value in constants.items()}
    source = ASTSource(variant.function, signature, constexprs=constants, attrs=attributes)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"  # cuobjdump starts nvdisasm
    os.environ |= {"TRITON_DUMP_PTXAS_LOG": "1", "TRITON_ALWAYS_COMPILE": "1", "PATH": f"{tools}:{os.environ['PATH']}"}
    options = dict(num_warps=variant.warps, num_stages=variant.stages, enable_fp_fusion=True)
    with contextlib.redirect_stdout(io.StringIO()) as log, tempfile.NamedTemporaryFile() as file:
        kernel = triton.compile(source, target=GPUTarget("cuda", variant.architecture, 32), options=options)
        Path(file.name).write_bytes(kernel.asm["cubin"])
        sass = subprocess.check_output([tools / "cuobjdump", "-sass", file.name], text=True)
    return read(log.getvalue(), kernel.asm["ptx"], sass, kernel.metadata.shared)


def read(log, ptx, sass, shared):
    """Found, from the assembler's log, the code it read and made, and the shared memory asked for (bytes)."""
    used, spilled = (int(re.search(form, log)[1]) for form in (r"Used (\d+) registers", r"(\d+) bytes spill stores"))
    copies = len(re.findall(r"cp\.async\.(?!wait|commit)", ptx))
    narrow = len(re.findall(r"ld\.global[.\w:]*\.b16", ptx))
    products = ptx.count("wgmma.mma_async"), ptx.count("mma.sync")
    return Found(used, spilled, shared, *products, copies, narrow, "serialized" in log, shortest_loop(sass))


def shortest_loop(sass):
    """Instructions of the shortest loop that has tensor-core products: the one over tiles that need no mask; 0 = none.

    sass: machine code as cuobjdump prints it; an instruction has 16 bytes.
    """
    code, lengths = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(\S.*);", sass, re.MULTILINE), []
    for place, instruction in enumerate(code):
        if jump := re.search(r"\bBRA\b.*?\b0x([0-9a-f]+)", instruction):
            body = code[int(jump[1], 16) // 16 : place + 1]  # empty for a jump ahead
            lengths += [len(body)] * any(re.search(r"\bHG?MMA\b", one) for one in body)
    return min(lengths, default=0)


def faults(variant, found, longest=None):
    """What makes the code slow or impossible: list of str, empty if nothing does.

    longest: instructions that its loop may have (`shortest_loop`); None = any number.
    """
    architecture, limit = variant.architecture, SHARED_LIMIT[variant.architecture]
    wrong = {
        f"spills {found.spilled} bytes": found.spilled > SPILL_LIMIT,
        f"{found.shared} bytes of shared memory, {limit} exist": found.shared > limit,
        "products are not warp-group products": architecture == 90 and (not found.wgmma or found.mma),
        "no tensor-core products": architecture == 80 and not found.mma,
        "products are serialized": found.serialized,
        "nothing is loaded ahead": not found.copies,
        f"{found.narrow} loads of 2 bytes": found.narrow,
        "no loop with products": not found.loop,
        f"a loop of {found.loop} instructions, {longest} are allowed": longest is not None and found.loop > longest,
    }
    return [words for words, is_so in wrong.items() if is_so]


def judge_all(args):
    """The command `bench compile`: a table of all variants; returns the exit code, 1 if a kernel has a fault."""
    import triton

    recorded, lengths, bad = json.loads(RECORDED.read_text()), {}, False
    known = recorded.get(triton.__version__, {})
    judged = "recorded" if args.record else "at most 5% more than recorded" if known else "nothing recorded"
    print(f"Triton {triton.__version__}; registers and spilled bytes of a thread, shared bytes of a program, "
          f"instructions of the loop over whole tiles ({judged})\n{ROW.format(*HEAD.split())}")  # fmt: skip
    for one in (variant for name in args.kernel or KERNELS for variant in KERNELS[name]()):
        found = compiled(one)
        longest = None if args.record or one.label not in known else int(known[one.label] * SLACK)
        wrong = faults(one, found, longest)
        bad, lengths[one.label] = bad or bool(wrong), found.loop
        print(ROW.format(one.name, one.architecture, one.constants.get("D", ""), one.tile, one.warps, one.stages,
                         found.registers, found.spilled, found.shared, found.wgmma + found.mma, found.copies,
                         found.loop, "; ".join(wrong) or "good"), flush=True)  # fmt: skip
    if args.record:
        recorded[triton.__version__] = dict(sorted((known | lengths).items()))
        RECORDED.write_text(json.dumps(dict(sorted(recorded.items())), indent=2) + "\n")
    return int(bad)
