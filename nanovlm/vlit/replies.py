"""What generators are asked and what they answer: every answer is written down before the run goes on.

replies.jsonl holds one answer a line:
    {"key": …, "chat": …, "generator": …, "replies": [str, …]}
key is the hash of all that the answer depends on (words, generator, drawing), so nothing is asked twice, and no answer
is mistaken for that of another setting. Memory holds the keys and where their lines begin.
"""

import hashlib
import itertools
import json
import re
from collections import Counter, deque
from dataclasses import astuple, dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nanovlm.data.images import ImageError
from nanovlm.files import JsonLines
from nanovlm.files import digest as digest_of
from nanovlm.vlit.words import load_table

PROMPTS = load_table("prompts.json")
TOKEN = re.compile(r"\w+|[^\w\s]")


class GeneratorError(ValueError):
    """The generator cannot work now: the run stops, and goes on when it is started again."""


class Refused(ValueError):
    """This chat cannot be answered; others can."""


@dataclass(frozen=True)
class Chat:
    """What is asked."""

    messages: tuple[tuple[str, str], ...]  # (role, text) each, "system" | "user" | "assistant"; the last is the user's
    image: str = ""  # path, or "" without one
    material: Any = None  # (Plan, Picture, region) behind the words, which `template` works from

    @property
    def sha(self):
        """Hash of the words and of the picture, of one that is no file of its name: str."""
        image = Path(self.image)
        return digest([self.messages, digest_of(image) if image.is_file() else image.name])


@dataclass(frozen=True)
class Drawing:
    """How answers are drawn. The review draws 5 at temperature 0.8 (Sec. 4.2.2)."""

    n: int = 5
    temperature: float = 0.8
    max_tokens: int = 1024
    seed: int = 0
    stop: tuple[str, ...] = ()


def prompt(name, image="", **words):
    """A Chat of one message: one of PROMPTS with some words filled in."""
    return Chat((("user", "\n".join(PROMPTS[name]).format(**words)),), image)


def digest(value):
    """A name for any JSON value: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, ensure_ascii=True, sort_keys=True).encode()).hexdigest()[:16]


class Replies:
    """A file of answers, which may be absent, by their "key", or by their "chat" whatever the generator was."""

    def __init__(self, path, field="key"):
        self.file, self.places = JsonLines(path), {}
        for number, (start, answer) in enumerate(self.file.places(), start=1):
            if not isinstance(answer, dict) or not {"key", "chat", "replies"} <= answer.keys():
                raise ValueError(f"{path}, line {number}: no recorded answer; remove the line")
            self.places[answer[field]] = start

    def get(self, name):
        """The recorded texts of a key: list of str; none if there is no answer."""
        return self.file.at(self.places[name])["replies"] if name in self.places else []


class Replay:
    """Recorded answers as a generator, see generators.py; what was drawn otherwise is found all the same."""

    accepts_images, batch_size, workers = False, 1, 1

    def __init__(self, path):
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such file of recorded answers")
        self.name, self.replies = f"replay {Path(path).name}", Replies(path, field="chat")

    def generate(self, chats, *, n=1, temperature=0.0, max_tokens=0, seed=0, stop=()):
        """As every generator; the first n recorded texts of each chat. Raises: Refused where there are fewer."""
        found = [self.replies.get(chat.sha)[:n] for chat in chats]
        if (fewest := min(map(len, found))) < n:
            raise Refused(f"{self.name} holds {fewest} of the {n} answers to this request")
        return found


class Recorded:
    """A generator whose answers are written down: nothing is asked or paid for twice.

    Attributes: counts: Counter of chats "asked", "recorded" before and "refused". tokens: words and signs read and
      written by `ask`, a stand-in for tokens, whatever the tokenizer.
    """

    def __init__(self, generator, path):
        self.generator, self.replies, self.counts, self.tokens = generator, Replies(path), Counter(), 0
        self.name, self.accepts_images = generator.name, generator.accepts_images

    def ask(self, chats, n, temperature, max_tokens, seed, stop=()):
        """Texts for each Chat: list of lists of n str; a chat that was refused has none."""
        answers = self.stream(zip(chats), Drawing(n, temperature, max_tokens, seed, stop), len(chats))
        found = [answer if isinstance(answer, list) else [] for _, answer in answers]
        texts = [text for chat in chats for _, text in chat.messages] + sum(found, [])
        self.tokens += sum(len(TOKEN.findall(text)) for text in texts)
        return found

    def stream(self, requests, drawing, total=None):
        """Answer requests, tuples of a Chat and whatever their maker needs, from the file or by the generator.

        Args: total: of the requests, for the bar.
        Returns: iterator of (request, its texts, or the exception that says why there are none), in the same order.
        Raises: GeneratorError where the generator cannot go on; what was answered until then is in the file.
        """
        known, requests, generator = set(), iter(requests), self.generator

        def new_of(batch):
            keys = [digest([generator.name, chat.sha, *astuple(drawing)]) for chat, *_ in batch]
            asked = zip(keys, (chat for chat, *_ in batch))
            new = {key: chat for key, chat in asked if key not in self.replies.places and key not in known}
            known.update(new)  # two of the same words are asked once
            return batch, keys, new

        def answers(item):
            *_, new = item
            return dict(zip(new, _answers(list(new.values()), generator, drawing)))

        batches = map(new_of, iter(lambda: list(itertools.islice(requests, generator.batch_size)), []))
        with tqdm(desc=f"asking {generator.name}", total=total, unit="request", disable=None) as bar:
            for (batch, keys, new), found in in_parallel(answers, batches, generator.workers):
                for key, answer in found.items():
                    if isinstance(answer, list):
                        line = {"key": key, "chat": new[key].sha, "generator": generator.name, "replies": answer}
                        self.replies.places[key] = self.replies.file.add(line)
                for key, request in zip(keys, batch):
                    answer = found.pop(key, None)
                    kind = "recorded" if answer is None else "asked" if isinstance(answer, list) else "refused"
                    self.counts[kind] += 1
                    yield request, self.replies.get(key) if answer is None else answer
                bar.update(len(batch))


def _answers(chats, generator, drawing):
    """The answers to some chats: per chat a list of str, or the exception that says why there is none."""
    try:
        return generator.generate(chats, **vars(drawing)) if chats else []
    except (Refused, ImageError, FileNotFoundError) as error:
        return [error] if len(chats) == 1 else [_answers([chat], generator, drawing)[0] for chat in chats]


def in_parallel(function, items, workers):
    """Call a function on items, taken no faster than needed, in some threads (1 = in this one): yields (item, result).

    What the function raises is raised behind the results of the calls that were under way.
    """
    if workers == 1:
        yield from ((item, function(item)) for item in items)
        return
    items, under_way, failure = iter(items), deque(), None
    with ThreadPool(workers) as pool:  # whose threads an interrupted program does not wait for
        while True:
            for item in itertools.islice(items, 0 if failure else workers - len(under_way)):
                under_way.append((item, pool.apply_async(function, (item,))))
            if not under_way:
                break
            item, call = under_way.popleft()
            try:
                yield item, call.get()
            except Exception as error:
                failure = failure or error
    if failure:
        raise failure
