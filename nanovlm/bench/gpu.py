"""All that a GPU can tell about this project, in the minutes for which one is lent: `python -m nanovlm.bench gpu`.

  equality    our attention's values and gradients against float64, and that two runs agree in every bit
  attention   forward and backward beside torch's fused kernels and flex_attention
  nano        the smallest recipe, trained on the GPU: its log's last lines and how long it took
  lynx        align at full size with random weights: seconds, share of the peak, memory beside the forecast
  decoding    tokens per second of a model of 7 billion parameters

After each part OUT/gpu.json is written anew, so that a lease that ends early costs only what was running. A part that
fails leaves its error there, and the next one runs. `--device cpu --tiny` rehearses all of it.
"""

import dataclasses
import json
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch

from nanovlm.bench import decode, kernels, train
from nanovlm.decoder import Decoder
from nanovlm.files import JsonLines, replace_text
from nanovlm.generation.fast_decode import FastDecoder
from nanovlm.generation.prefill import Workspace
from nanovlm.generation.sampler import Decoding, generate
from nanovlm.published.language import llama_config

ROOT = Path(__file__).resolve().parents[2]
NANO_SHARE = 0.4  # of the minutes that are left
TINY = dict(vocab_size=97, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2)  # fmt: skip


def equality(args, minutes):
    """Head widths at which our attention is right: list of int. Raises: RuntimeError where it is not."""
    widths, how = (64, 88, 128), {}
    if args.tiny:
        widths, how = (8,), dict(dtype=torch.float32, tokens=40, repeats=1, ours="reference")
    for width in widths:
        kernels.check(width, args.device, **how)
    return widths


def attention(args, minutes):
    """list of kernels.Line as dicts."""
    cases = [case for case in kernels.CASES if case.head_width == 128 and case.tokens in (577, 2048)]
    how = (10, args.device, "triton")
    if args.tiny:
        cases, how = [kernels.Case("causal", 16, 8, 1, 2)], (2, args.device, "reference")
    return [dataclasses.asdict(line) for case in cases for line in kernels.attention_lines(case, *how)]


def nano(args, minutes):
    """Train the recipe nano in a process of its own: exit code, seconds, the ends of its log and words."""
    out, start = (Path(args.out) / "nano").resolve(), time.monotonic()
    flags = ["--size", "tiny", "--smoke"] if args.tiny else ["--max-minutes", f"{NANO_SHARE * minutes:.1f}"]
    flags += ["--resume"] if out.exists() else []
    command = [sys.executable, "train.py", "nano", "--out", str(out), "--device", args.device, *flags]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    said, log = (done.stdout + done.stderr).splitlines()[-20:], list(JsonLines(out / "log.jsonl"))[-10:]
    if not log:
        raise RuntimeError(done.stderr[-2000:])
    return {"exit_code": done.returncode, "seconds": time.monotonic() - start, "log": log, "said": said}


def lynx(args, minutes):
    """list of train.Line as dicts, with torch's attention and with ours."""
    case = (train.of_recipe("lynx", "tiny", 0, 2, 8), None) if args.tiny else train.GPU_CASES["lynx"]
    backends = ("sdpa",) if args.tiny else ("sdpa", "triton")
    return [dataclasses.asdict(train.measure("lynx", *case, backend, device=args.device)) for backend in backends]


def decoding(args, minutes):
    """Tokens per second of one prompt, continued greedily by random weights, beside the rate aimed at."""
    sizes, case = decode.SIZES["7B"], decode.CASES["cuda"]["7B"]
    if args.tiny:
        sizes, case = TINY, decode.Case("tiny", 1, 8, None)
    with torch.device(args.device):
        decoder = Decoder(llama_config(sizes | {"max_position_embeddings": decode.CONTEXT}))
    model = decode.around(decoder).to(args.device, torch.float32 if args.device == "cpu" else torch.bfloat16).eval()
    prompts, workspace = decode.make_prompts(case, sizes["vocab_size"]), Workspace(FastDecoder(model.decoder))
    write = lambda: generate(model, prompts, Decoding(max_new_tokens=case.num_new), workspace=workspace)
    write()  # warm
    spent = min(decode.in_turns({"nanovlm": write}, 3, args.device)["nanovlm"])
    return {"tokens_per_second": case.num_new / spent, "required": case.rate}


PARTS = {one.__name__: one for one in (equality, attention, nano, lynx, decoding)}


def measure_all(args):
    """The command `bench gpu`: runs the parts; returns the exit code, 1 if one failed."""
    decode.prepare(args.device)
    out, end, found = Path(args.out), time.monotonic() + 60 * args.minutes, {}
    out.mkdir(parents=True, exist_ok=True)
    report = {"where": decode.where(args.device), "torch": torch.__version__, "command": sys.argv, "parts": found}
    for name in args.part or PARTS:
        before = time.monotonic()
        try:
            left = (end - before) / 60
            found[name] = {"result": PARTS[name](args, left)} if left > 0 else {"error": "no time was left"}
        except Exception as error:  # the others run all the same
            where = traceback.format_exc().splitlines()[-12:]
            found[name] = {"error": f"{type(error).__name__}: {error}", "where": where}
        found[name]["seconds"] = time.monotonic() - before
        if args.device == "cuda":
            torch.cuda.empty_cache()
        replace_text(out / "gpu.json", json.dumps(report, indent=1))
        print(f"{name:<10}{found[name]['seconds']:7.1f} s  {found[name].get('error', 'done')}", flush=True)
    print(f"written to {out / 'gpu.json'}")
    return int(any("error" in part for part in found.values()))
