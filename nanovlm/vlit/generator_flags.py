"""The flags that choose a generator, and the choice."""

import os
import sys

from nanovlm import recipes
from nanovlm.machine import DEVICES, DTYPES, check_device, default_device, slow_line
from nanovlm.vlit.endpoint import OpenAICompatible
from nanovlm.vlit.generators import Drawing
from nanovlm.vlit.local import Local
from nanovlm.vlit.replies import Replay
from nanovlm.vlit.template import Template

GENERATORS = ("template", "local", "endpoint", "replay")


def add_generator_flags(parser, n=Drawing.n, temperature=Drawing.temperature):
    """Add them to an argparse parser, with the defaults of the command for n and temperature."""
    add = parser.add_argument_group("generator").add_argument
    add("--generator", choices=GENERATORS, default="template", help="who writes (default: rules, without a model)")
    add("--model", metavar="NAME", help="local: the model's folder; endpoint: the model's name there")
    add("--recipe", metavar="FILE.py", help="the recipe file that a trained model's folder needs")
    add("--base-url", default="", metavar="URL", help="endpoint: up to /chat/completions; default: $OPENAI_BASE_URL. "
        "The key is read from $OPENAI_API_KEY")  # fmt: skip
    add("--workers", type=int, default=4, metavar="N", help="endpoint: requests under way at once")
    add("--per-minute", type=float, default=0, metavar="N", help="endpoint: requests a minute at most; 0 = no limit")
    add("--send-images", action="store_true", help="endpoint: the pictures go along, for models that see")
    add("--replies", metavar="FILE", help="replay: recorded answers, the replies.jsonl of another run")
    add("-n", type=int, default=n, metavar="N", help="answers drawn for each request")
    add("--temperature", type=float, default=temperature)
    add("--max-tokens", type=int, default=Drawing.max_tokens, metavar="N", help="tokens of an answer at most")
    add("--batch-size", type=int, default=4, metavar="N", help="local: requests that run together")
    add("--device", default=default_device(), help=f"local: {DEVICES}")
    add("--dtype", choices=DTYPES, default="float32", help="local")


def drawing(wishes):
    """How answers are drawn: generators.Drawing. Raises: ValueError. wishes: flags, with seed."""
    for name, least in (
        ("n", 1),
        ("max_tokens", 1),
        ("temperature", 0),
        ("workers", 1),
        ("per_minute", 0),
        ("batch_size", 1),
    ):
        if vars(wishes)[name] < least:
            raise ValueError(f"{name.replace('_', '-')} is {vars(wishes)[name]}; it must be {least} or more")
    return Drawing(wishes.n, wishes.temperature, wishes.max_tokens, wishes.seed)


def open_generator(wishes):
    """The chosen generator. Raises: ValueError or OSError, in words for the user."""
    if wishes.generator == "template":
        return Template()
    if wishes.generator == "replay":
        if not wishes.replies:
            raise ValueError("--generator replay needs --replies FILE, the replies.jsonl of another run")
        return Replay(wishes.replies)
    if not wishes.model:
        raise ValueError(
            f"--generator {wishes.generator} needs --model: a folder for local, the model's name for endpoint"
        )
    if wishes.generator == "local":
        check_device(wishes.device)
        if line := slow_line(wishes.dtype, wishes.device):
            print(f"({line})", file=sys.stderr)
        loaded = recipes.load(wishes.model, dtype=DTYPES[wishes.dtype], device=wishes.device, recipe=wishes.recipe)
        return Local(loaded, os.path.basename(os.path.abspath(wishes.model)), wishes.batch_size)
    return OpenAICompatible(
        wishes.model,
        wishes.base_url,
        workers=wishes.workers,
        per_minute=wishes.per_minute,
        send_images=wishes.send_images,
    )
