"""Any server that speaks OpenAI's chat completions, as a generator: hosted models, vLLM, llama.cpp, Ollama, …

The `openai` package (optional: pip install openai) asks again after a growing wait where that may help (busy, limits,
broken connections). What does not pass (a wrong key, an unknown model) stops the run with a message; a request that the
server will never answer (too long, filtered) is refused alone.
"""

import base64
import mimetypes
import os
import threading
import time
from collections import Counter
from pathlib import Path

from nanovlm.vlit.replies import GeneratorError, Refused

REFUSING = (400, 413, 415, 422)  # status: this request alone
TIMEOUT, RETRIES = 120.0, 5  # seconds; of every request


class OpenAICompatible:
    """A model behind a base URL, see generators.py for the interface.

    Args:
      model: its name there. base_url: up to and without /chat/completions; "" = $OPENAI_BASE_URL, then OpenAI's. The key
        is $OPENAI_API_KEY, which may be absent for servers that ask for none.
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
        self.client = openai.OpenAI(
            api_key=key or "none", base_url=base_url or None, max_retries=RETRIES, timeout=TIMEOUT
        )
        self.name, self.model, self.accepts_images, self.workers = f"endpoint {model}", model, send_images, workers
        self.pause = 60 / per_minute if per_minute else 0.0
        self.usage, self.lock, self.next_start = Counter(), threading.Lock(), 0.0

    def generate(self, chats, *, n=1, temperature=0.0, max_tokens=1024, seed=0, stop=()):
        """As every generator. Servers that give fewer than n answers at once are asked for the rest."""
        found = [[] for _ in chats]
        for chat, texts in zip(chats, found):
            body = {"messages": self._messages(chat), "temperature": temperature, "max_tokens": max_tokens}
            body |= {"stop": list(stop)} if stop else {}
            while len(texts) < n:
                choices = self._post(model=self.model, n=n - len(texts), seed=seed + len(texts), **body)
                if not choices:
                    raise Refused("the server answered without a choice")
                texts += choices
        return [texts[:n] for texts in found]

    def _messages(self, chat):
        messages = [{"role": role, "content": text} for role, text in chat.messages]
        if self.accepts_images and chat.image:
            kind = mimetypes.guess_type(chat.image)[0] or "image/jpeg"
            url = f"data:{kind};base64,{base64.b64encode(Path(chat.image).read_bytes()).decode()}"
            words = {"type": "text", "text": messages[-1]["content"]}
            messages[-1]["content"] = [words, {"type": "image_url", "image_url": {"url": url}}]
        return messages

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
