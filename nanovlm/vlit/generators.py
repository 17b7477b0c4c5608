"""Generators: whatever continues a chat. One interface for four of them, and their flags.

    template    rules and word lists, no model (template.py)
    local       a model of this project, or a published one (below)
    endpoint    any server that speaks OpenAI's chat completions (endpoint.py)
    replay      answers that were recorded before (replies.py)

A generator has
    name: str for provenance.
    accepts_images: bool, whether it looks at Chat.image.
    batch_size, workers: int, chats worth giving at once, and calls worth having under way at once.
    generate(chats, *, n, temperature, max_tokens, seed, stop): list of replies.Chat -> per chat a list of n str.
It raises GeneratorError where asking again later may help, and Refused for one chat that it will never answer.
"""

import os

from nanovlm import recipes
from nanovlm.data.records import Turn, Visual
from nanovlm.generation.answer import PromptTooLong, check_speaks, make_prompt, reply
from nanovlm.generation.sampler import Decoding
from nanovlm.vlit.endpoint import OpenAICompatible
from nanovlm.vlit.replies import Drawing, Refused, Replay
from nanovlm.vlit.template import Template

LEAST = {"n": 1, "max_tokens": 1, "temperature": 0, "workers": 1, "per_minute": 0, "batch_size": 1}  # of flags


class Local:
    """A chat.Assistant as a generator. Raises: ValueError for a model that writes no text.

    The system message goes before the first user's words: templates here have no place for one.
    """

    workers = 1

    def __init__(self, loaded, name, batch_size=4):
        check_speaks(loaded.model)
        self.loaded, self.name, self.batch_size = loaded, f"local {name}", batch_size
        self.accepts_images = loaded.model.vision is not None

    def generate(self, chats, *, n=1, temperature=0.0, max_tokens=1024, seed=0, stop=()):
        """As every generator; temperature 0 = greedy, the same text n times. Raises: Refused for too long a prompt."""
        draws = n if temperature else 1
        prompts = [one for chat in chats for one in [self._prompt(chat, max_tokens)] * draws]
        seeds = [f"{seed}/{chat.sha}/{draft}" for chat in chats for draft in range(draws)]  # not the batch
        decoding = Decoding(max_new_tokens=max_tokens, do_sample=True, temperature=temperature)
        texts = reply(self.loaded, prompts, decoding, seeds, stop)
        return [texts[place * draws : (place + 1) * draws] * (n // draws) for place in range(len(chats))]

    def _prompt(self, chat, max_tokens):
        """A chat as the model reads it: answer.Prompt; its picture stands before the last message."""
        system = "".join(text + "\n" for role, text in chat.messages if role == "system")
        (role, first), *rest = (one for one in chat.messages if one[0] != "system")
        turns, visuals = [Turn(role, (text,)) for role, text in ((role, system + first), *rest)], []
        if self.accepts_images and chat.image:
            visuals = [Visual(chat.image, (chat.image,))]
            turns[-1] = Turn("user", (0, *turns[-1].parts))
        try:
            return make_prompt(self.loaded, turns, visuals, max_tokens)
        except PromptTooLong as error:
            raise Refused(str(error)) from error


def add_generator_flags(parser):
    """The flags that choose a generator, and how it answers."""
    group = parser.add_argument_group("generator")
    add = group.add_argument
    add("--generator", choices=("template", "local", "endpoint", "replay"), default="template",
        help="who writes (default: rules, without a model)")  # fmt: skip
    add("--model", metavar="NAME", help="local: the model's folder; endpoint: the model's name there")
    add("--base-url", default="", metavar="URL", help="endpoint: up to /chat/completions; default: $OPENAI_BASE_URL. "
        "The key is read from $OPENAI_API_KEY")  # fmt: skip
    add("--workers", type=int, default=4, help="endpoint: requests under way at once")
    add("--per-minute", type=float, default=0, help="endpoint: requests a minute at most; 0 = no limit")
    add("--send-images", action="store_true", help="endpoint: the pictures go along, for models that see")
    add("--replies", metavar="FILE", help="replay: recorded answers, the replies.jsonl of another run")
    add("-n", type=int, default=Drawing.n, help="answers drawn for each request")
    add("--temperature", type=float, default=Drawing.temperature)
    add("--max-tokens", type=int, default=Drawing.max_tokens, help="tokens of an answer at most")
    add("--batch-size", type=int, default=4, help="local: requests that run together")
    recipes.model_flags(group)


def drawing(args):
    """How answers are drawn: replies.Drawing. Raises: ValueError. args: flags, with seed."""
    for name, least in LEAST.items():
        if vars(args)[name] < least:
            raise ValueError(f"{name.replace('_', '-')} is {vars(args)[name]}; it must be {least} or more")
    return Drawing(args.n, args.temperature, args.max_tokens, args.seed)


def open_generator(args):
    """The chosen generator. Raises: ValueError or OSError, in words for the user."""
    if args.generator == "template":
        return Template()
    if args.generator == "replay":
        if not args.replies:
            raise ValueError("--generator replay needs --replies FILE, the replies.jsonl of another run")
        return Replay(args.replies)
    if not args.model:
        raise ValueError(f"--generator {args.generator} needs --model: a folder if local, its name if endpoint")
    if args.generator == "local":
        loaded = recipes.load_by_flags(args.model, args)
        return Local(loaded, os.path.basename(os.path.abspath(args.model)), args.batch_size)
    options = {name: vars(args)[name] for name in ("workers", "per_minute", "send_images")}
    return OpenAICompatible(args.model, args.base_url, **options)
