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
from nanovlm.vlit.words import load_table

PROMPTS = load_table("prompts.json")
TOKEN = re.compile(r"\w+|[^\w\s]")


class GeneratorError(ValueError):
    """The generator cannot work now: the run stops, and goes on when it is started again."""


class Refused(ValueError):
    """This chat cannot be answered; others can."""


@dataclass(frozen=True)
class Chat:
    """What is asked.

    messages: (role, text) each, role "system" | "user" | "assistant"; the last is the user's.
    image: path, or "" without one. material: (Plan, Picture, region) behind the words, which `template` works from.
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


@dataclass(frozen=True)
class Request:
    """id: str, unique within a run. chat: Chat. what: whatever its maker needs to use the answer."""

    id: str
    chat: Chat
    what: object = None


def prompt(name, image="", **words):
    """A Chat of one message: one of PROMPTS with some words filled in."""
    return Chat((("user", "\n".join(PROMPTS[name]).format(**words)),), image)


def digest(value):
    """A name for any JSON value: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, ensure_ascii=True, sort_keys=True).encode()).hexdigest()[:16]


def key_of(chat, generator, drawing):
    """The name of an answer: str. generator: has a name."""
    return digest([generator.name, chat.sha, *astuple(drawing)])


class Replies:
    """A file of answers, which may be absent, by their "key", or by their "chat" whatever the generator was.

    Raises: ValueError naming the line that is no answer.
    """

    def __init__(self, path, field="key"):
        self.file, self.places = JsonLines(path), {}
        for number, (start, answer) in enumerate(self.file.places(), start=1):
            try:
                if not all(isinstance(one, str) for one in (answer["key"], answer["chat"], *answer["replies"])):
                    raise TypeError("key, chat and replies must be texts")
            except (KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: no recorded answer ({error}); remove the line") from error
            self.places[answer[field]] = start

    def __len__(self):
        return len(self.places)

    def get(self, name):
        """The recorded texts of a key: list of str; none if there is no answer."""
        return self.file.at(self.places[name])["replies"] if name in self.places else []

    def add(self, key, chat, generator, replies):
        """Write an answer, a list of str, down; it is in the file when this returns."""
        answer = {"key": key, "chat": chat.sha, "generator": generator.name, "replies": replies}
        self.places[key] = self.file.add(answer)


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
            raise Refused(f"{self.replies.file.path} holds {fewest} of the {n} answers to this request")
        return found


class Judge:
    """A generator whose answers are written down (replies: None = nowhere): nothing is asked or paid for twice.

    Attributes: tokens: words and signs read and written, a stand-in for tokens, whatever the tokenizer.
    """

    def __init__(self, generator, replies=None):
        self.generator, self.replies, self.tokens = generator, replies, 0
        self.name, self.accepts_images = generator.name, generator.accepts_images

    def ask(self, chats, n, temperature, max_tokens, seed, stop=()):
        """Texts for each Chat: list of lists of n str; a chat that was refused has none."""
        drawing = Drawing(n, temperature, max_tokens, seed, stop)
        if self.replies is None:
            found = self.generator.generate(chats, **vars(drawing))
        else:
            ask((Request("", chat) for chat in chats), self.generator, drawing, self.replies, len(chats))
            found = [self.replies.get(key_of(chat, self.generator, drawing)) for chat in chats]
        texts = [text for chat in chats for _, text in chat.messages] + sum(found, [])
        self.tokens += sum(len(TOKEN.findall(text)) for text in texts)
        return found


def ask(requests, generator, drawing, replies, total=None):
    """Put every Request whose answer is not in the file yet, and write the answers there. total: of them, for the bar.

    Returns: (Counter of "asked", "recorded" and "refused", list of (id, why) of those refused).
    Raises: GeneratorError where the generator cannot go on; what was answered until then is in the file.
    """
    counts, refused, known = Counter(), [], set()
    bar = tqdm(desc=f"asking {generator.name}", total=total, unit="request", disable=None)

    def new():
        for request in requests:
            key = key_of(request.chat, generator, drawing)
            if key in replies.places or key in known:  # two of the same words are asked once
                counts["recorded"] += 1
                bar.update()
            else:
                known.add(key)
                yield key, request

    def answers(batch):
        return _answers([request.chat for _, request in batch], generator, drawing)

    waiting = new()
    batches = iter(lambda: list(itertools.islice(waiting, generator.batch_size)), [])
    with bar:
        for batch, found in in_parallel(answers, batches, generator.workers):
            for (key, request), answer in zip(batch, found):
                if isinstance(answer, list):
                    replies.add(key, request.chat, generator, answer)
                else:
                    refused.append((request.id, str(answer)))
                counts["asked" if isinstance(answer, list) else "refused"] += 1
            bar.update(len(batch))
            bar.set_postfix(counts, refresh=False)
    return counts, refused


def _answers(chats, generator, drawing):
    """The answers to some chats: per chat a list of str, or the exception that says why there is none."""
    try:
        return generator.generate(chats, **vars(drawing))
    except (Refused, ImageError, FileNotFoundError) as error:
        return [error] if len(chats) == 1 else [_answers([chat], generator, drawing)[0] for chat in chats]


def in_parallel(function, items, workers):
    """Call a function on items, taken no faster than needed, in some threads (1 = in this one): yields (item, result).

    What the function raises is raised after the results of the calls that were under way. A program that is interrupted
    does not wait for the threads.
    """
    if workers == 1:
        yield from ((item, function(item)) for item in items)
        return
    items, under_way, failure, pool = iter(items), deque(), None, ThreadPool(workers)
    while True:
        new = itertools.islice(items, 0 if failure else workers - len(under_way))
        under_way.extend((item, pool.apply_async(function, (item,))) for item in new)
        if not under_way:
            break
        item, call = under_way.popleft()
        try:
            result = call.get()
        except Exception as error:
            failure = failure or error
        else:
            yield item, result
    pool.close()
    if failure:
        raise failure
