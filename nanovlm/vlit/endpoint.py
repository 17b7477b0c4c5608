"""Any server that speaks OpenAI's chat completions, as a generator: hosted models, vLLM, llama.cpp, Ollama, …

POST BASE_URL/chat/completions with the standard library. What passes (busy, limits, broken connections) is asked again
after a growing wait; what does not (a wrong key, an unknown model) stops the run with a message; a request that the
server will never answer (too long, filtered) is refused alone.
"""

import base64
import http.client
import json
import mimetypes
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

from nanovlm.vlit.generators import GeneratorError, Refused

BUSY = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # try again
REFUSING = (400, 413, 415, 422)  # this request alone
LONGEST_WAIT = 60.0  # seconds between two attempts


class OpenAICompatible:
    """A model behind a base URL, see generators.py for the interface.

    Args:
      model: its name there. base_url: up to and without /chat/completions; "" = $OPENAI_BASE_URL, then OpenAI's.
      key: str; "" = $OPENAI_API_KEY, which may be absent for servers that ask for none.
      workers: requests under way at once. per_minute: requests begun within a minute at most; 0 = no limit.
      send_images: whether the picture goes along, for models that see.
      attempts: of every request. first_wait: seconds after the first failure; doubled after each. timeout: seconds.

    Attributes:
      usage: Counter of "prompt_tokens", "completion_tokens" as the server counts them, "requests" and "retries".
    """

    batch_size = 1

    def __init__(
        self, model, base_url="", key="", *, workers=4, per_minute=0.0, send_images=False, attempts=6, first_wait=1.0,
        timeout=120.0,
    ):  # fmt: skip
        base_url = base_url or os.environ.get("OPENAI_BASE_URL", "https://api.openai.com/v1")
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"base URL {base_url!r} must begin with http:// or https://")
        self.name, self.model, self.accepts_images, self.workers = f"endpoint {model}", model, send_images, workers
        self.url, self.key = base_url.rstrip("/") + "/chat/completions", key or os.environ.get("OPENAI_API_KEY", "")
        self.pause = 60 / per_minute if per_minute else 0.0
        self.attempts, self.first_wait, self.timeout = attempts, first_wait, timeout
        self.usage, self.lock, self.next_start = Counter(), threading.Lock(), 0.0

    def generate(self, chats, *, n=1, temperature=0.0, max_tokens=1024, seed=0, stop=()):
        """As every generator. Servers that give fewer than n answers at once are asked for the rest."""
        return [self._answers(chat, n, temperature, max_tokens, seed, stop) for chat in chats]

    def _answers(self, chat, n, temperature, max_tokens, seed, stop):
        body = {
            "model": self.model,
            "messages": self._messages(chat),
            "temperature": temperature,
            "max_tokens": max_tokens,
        }
        body |= {"stop": list(stop)} if stop else {}
        found = []
        while len(found) < n:
            choices = self._post(body | {"n": n - len(found), "seed": seed + len(found)})
            if not choices:
                raise Refused("the server answered without a choice")
            found += choices
        return found[:n]

    def _messages(self, chat):
        messages = [{"role": role, "content": text} for role, text in chat.messages]
        if self.accepts_images and chat.image:
            kind = mimetypes.guess_type(chat.image)[0] or "image/jpeg"
            url = f"data:{kind};base64,{base64.b64encode(Path(chat.image).read_bytes()).decode()}"
            words = {"type": "text", "text": messages[-1]["content"]}
            messages[-1]["content"] = [words, {"type": "image_url", "image_url": {"url": url}}]
        return messages

    def _post(self, body):
        """One request with its retries: list of str, the texts of its choices."""
        data = json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        for attempt in range(self.attempts):
            self._take_turn()
            try:
                request = urllib.request.Request(self.url, data, headers)
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return self._choices(response.read())
            except urllib.error.HTTPError as error:
                words = error.read().decode("utf-8", "replace").strip()[:300]
                problem, wait = f"HTTP {error.code}: {words or error.reason}", error.headers.get("Retry-After", "")
                if error.code in REFUSING:
                    raise Refused(problem) from error
                if error.code not in BUSY:
                    raise GeneratorError(f"{self.url} answers {problem}") from error
            except (OSError, http.client.HTTPException, ValueError) as error:  # unreachable, cut off, or no JSON
                problem, wait = f"{type(error).__name__}: {error}", ""
            if attempt + 1 < self.attempts:
                self._wait(attempt, wait)
        raise GeneratorError(f"{self.url} failed {self.attempts} times, lastly with {problem}")

    def _choices(self, data):
        """The texts in a response. Raises: ValueError if it is none of a chat completion."""
        response = json.loads(data)
        try:
            texts = [choice["message"]["content"] or "" for choice in response["choices"]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"no chat completion: {data[:200]!r}") from error
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"choices without text: {data[:200]!r}")
        with self.lock:
            used = response.get("usage") or {}
            self.usage.update({name: used.get(name) or 0 for name in ("prompt_tokens", "completion_tokens")})
        return texts

    def _take_turn(self):
        """Wait until the rate allows another request."""
        with self.lock:
            self.usage["requests"] += 1
            now = time.monotonic()
            start = max(now, self.next_start)
            self.next_start = start + self.pause
        time.sleep(start - now)

    def _wait(self, attempt, asked):
        """Wait before the next attempt: as long as the server asks for, else longer each time, never all at once."""
        with self.lock:
            self.usage["retries"] += 1
        seconds = (
            float(asked)
            if asked.replace(".", "", 1).isdigit()
            else self.first_wait * 2**attempt * random.uniform(0.5, 1)
        )
        time.sleep(min(seconds, LONGEST_WAIT))
