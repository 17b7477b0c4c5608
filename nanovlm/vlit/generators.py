"""Generators: whatever continues a chat. One interface for four of them, and their flags.

    template    rules and word lists, no model (template.py)
    local       a model of this project, or a published one (local.py)
    endpoint    any server that speaks OpenAI's chat completions (endpoint.py)
    replay      answers that were recorded before (replies.py)

A generator has
    name: str for provenance.
    accepts_images: bool, whether it looks at Chat.image.
    batch_size, workers: int, chats worth giving at once, and calls worth having under way at once.
    generate(chats, *, n, temperature, max_tokens, seed, stop): list of Chat -> per chat a list of n str.
It raises GeneratorError where asking again later may help, and Refused for one chat that it will never answer.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class GeneratorError(ValueError):
    """The generator cannot work now: the run stops, and goes on when it is started again."""


class Refused(ValueError):
    """This chat cannot be answered; others can."""


@dataclass(frozen=True)
class Chat:
    """What is asked.

    messages: (role, text) each, role "system" | "user" | "assistant"; the last is the user's.
    image: path, or "" without one. material: construct's annotations behind the words, which `template` works from.
    """

    messages: tuple[tuple[str, str], ...]
    image: str = ""
    material: Any = None

    @property
    def sha(self):
        """Hash of the words and of the image's name: str."""
        return digest([self.messages, Path(self.image).name])


@dataclass(frozen=True)
class Drawing:
    """How answers are drawn. The review draws 5 at temperature 0.8 (Sec. 4.2.2)."""

    n: int = 5
    temperature: float = 0.8
    max_tokens: int = 1024
    seed: int = 0
    stop: tuple[str, ...] = ()


def digest(value):
    """A name for any JSON value: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, ensure_ascii=True, sort_keys=True).encode()).hexdigest()[:16]
