"""Generators: whatever continues a chat. One interface for four of them, and their flags.

    template    rules and word lists, no model (template.py)
    local       a model of this project, or a published one (below)
    endpoint    any server that speaks OpenAI's chat completions (below)
    replay      answers that were recorded before (replies.py)

A generator has
    name: str for provenance.
    accepts_images: bool, whether it looks at Chat.image.
    batch_size, workers: int, chats worth giving at once, and calls worth having under way at once.
    generate(chats, *, n, temperature, max_tokens, seed, stop): list of replies.Chat -> per chat a list of n str.
It raises GeneratorError where asking again later may help, and Refused for one chat that it will never answer.
"""

import base64
import mimetypes
import os
import threading
import time
from collections import Counter
from pathlib import Path

from nanovlm import recipes
from nanovlm.data.records import Turn, Visual
from nanovlm.generation.answer import PromptTooLong, check_speaks, make_prompt, reply
from nanovlm.generation.sampler import Decoding
from nanovlm.vlit.replies import Drawing, GeneratorError, Refused, Replay
from nanovlm.vlit.template import Template

LEAST = {"n": 1, "max_tokens": 1, "temperature": 0, "workers": 1, "per_minute": 0, "batch_size": 1}  # of flags
REFUSING = (400, 413, 415, 422)  # an endpoint's status: this request alone
TIMEOUT, RETRIES = 120.0, 5  # seconds; of every request


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


class OpenAICompatible:
    """Any server that speaks OpenAI's chat completions: hosted models, vLLM, llama.cpp, Ollama, …

    The `openai` package (optional: pip install openai) asks again after a growing wait where that may help. What does
    not pass (a wrong key, an unknown model) stops the run; a request that is too long or filtered is refused alone.

    Args:
      model: its name there. base_url: up to and without /chat/completions; "" = $OPENAI_BASE_URL, then OpenAI's. The
        key is $OPENAI_API_KEY, which may be absent for servers that ask for none.
      workers: requests under way at once. per_minute: requests begun within a minute at most; 0 = no limit.
      send_images: whether the picture goes along, for models that see.
    Attributes:
      usage: Counter of "prompt_tokens", "completion_tokens" as the server counts them, "requests" and "retries".
    Raises: ImportError without the package.
    """

    batch_size = 1

    def __init__(self, model, base_url="", *, workers=4, per_minute=0.0, send_images=False):
        try:
            import openai
        except ImportError as error:
            raise ImportError("endpoints need the package openai: pip install openai") from error
        key = os.environ.get("OPENAI_API_KEY")
        self.openai, self.headers = openai, None if key else {"Authorization": openai.Omit()}
        limits = {"max_retries": RETRIES, "timeout": TIMEOUT}
        self.client = openai.OpenAI(api_key=key or "none", base_url=base_url or None, **limits)
        self.name, self.model, self.accepts_images, self.workers = f"endpoint {model}", model, send_images, workers
        self.pause = 60 / per_minute if per_minute else 0.0
        self.usage, self.lock, self.next_start = Counter(), threading.Lock(), 0.0

    def generate(self, chats, *, n=1, temperature=0.0, max_tokens=1024, seed=0, stop=()):
        """As every generator. Servers that give fewer than n answers at once are asked for the rest."""
        found = [[] for _ in chats]
        for chat, texts in zip(chats, found):
            messages = [{"role": role, "content": text} for role, text in chat.messages]
            if self.accepts_images and chat.image:
                kind = mimetypes.guess_type(chat.image)[0] or "image/jpeg"
                url = f"data:{kind};base64,{base64.b64encode(Path(chat.image).read_bytes()).decode()}"
                words = {"type": "text", "text": messages[-1]["content"]}
                messages[-1]["content"] = [words, {"type": "image_url", "image_url": {"url": url}}]
            body = {"messages": messages, "temperature": temperature, "max_tokens": max_tokens}
            body |= {"stop": list(stop)} if stop else {}
            while len(texts) < n:
                choices = self._post(model=self.model, n=n - len(texts), seed=seed + len(texts), **body)
                if not choices:
                    raise Refused("the server answered without a choice")
                texts += choices
        return [texts[:n] for texts in found]

    def _post(self, **body):
        """One request: list of str, the texts of its choices."""
        with self.lock:  # wait until the rate allows it
            start = max(time.monotonic(), self.next_start)
            self.next_start = start + self.pause
        time.sleep(max(0.0, start - time.monotonic()))
        try:
            response = self.client.chat.completions.with_raw_response.create(**body, extra_headers=self.headers)
            completion = response.parse()
            texts = [choice.message.content or "" for choice in completion.choices]
        except self.openai.APIStatusError as error:
            problem = f"HTTP {error.status_code}: {error.response.text.strip()[:300] or error.message}"
            if error.status_code in REFUSING:
                raise Refused(problem) from error
            raise GeneratorError(f"{self.client.base_url} answers {problem}") from error
        except (self.openai.OpenAIError, AttributeError, TypeError, ValueError) as error:  # unreachable, no completion
            problem = f"{type(error).__name__}: {error}"
            raise GeneratorError(f"{self.client.base_url} gives no chat completion ({problem})") from error
        used = completion.usage
        with self.lock:
            self.usage.update(requests=1 + response.retries_taken, retries=response.retries_taken)
            if used:
                self.usage.update(prompt_tokens=used.prompt_tokens, completion_tokens=used.completion_tokens)
        return texts


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
