"""What generators answered, on disk: a run that was killed goes on from it, and another can replay it.

replies.jsonl holds one answer a line:
    {"key": …, "chat": …, "generator": …, "replies": [str, …]}
key is the hash of all that the answer depends on (words, generator, drawing), so nothing is asked twice, and no answer is
mistaken for that of another setting. Memory holds the keys and where their lines begin.
"""

import json
import os
from pathlib import Path

from nanovlm.vlit.generators import Refused, digest


def key_of(chat, generator, drawing):
    """The name of an answer: str. chat: generators.Chat. generator: has a name. drawing: generators.Drawing."""
    return digest(
        [generator.name, chat.sha, drawing.n, drawing.temperature, drawing.max_tokens, drawing.seed, drawing.stop]
    )


class Replies:
    """A file of answers, by one of their fields.

    Args:
      path: the file; it may be absent. field: "key", or "chat" to find answers whatever the generator was.
      repair: whether a last line that a kill cut off is removed, for a run that goes on writing.
    Raises: ValueError naming the line that is no answer.
    """

    def __init__(self, path, field="key", repair=False):
        self.path, self.places = Path(path), {}
        if not self.path.exists():
            return
        start = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n") and repair:
                    os.truncate(self.path, start)
                    break
                try:
                    answer = json.loads(line)
                    if not all(isinstance(one, str) for one in (answer["key"], answer["chat"], *answer["replies"])):
                        raise ValueError("key, chat and replies must be texts")
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"{self.path}, line {number}: no recorded answer ({error}); remove the line"
                    ) from error
                self.places[answer[field]] = start
                start += len(line)

    def __len__(self):
        return len(self.places)

    def __contains__(self, name):
        return name in self.places

    def __getitem__(self, name):
        """The recorded texts of a key: list of str."""
        with open(self.path, "rb") as file:
            file.seek(self.places[name])
            return json.loads(file.readline())["replies"]

    def add(self, key, chat, generator, replies):
        """Write an answer down; it is in the file when this returns. chat: Chat. replies: list of str."""
        answer = {"key": key, "chat": chat.sha, "generator": generator.name, "replies": replies}
        with open(self.path, "ab") as file:
            self.places[key] = file.tell()
            file.write(json.dumps(answer).encode() + b"\n")


class Replay:
    """Recorded answers as a generator, see generators.py; what was drawn otherwise is found all the same."""

    accepts_images, batch_size, workers = False, 1, 1

    def __init__(self, path):
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such file of recorded answers")
        self.name, self.replies = f"replay {Path(path).name}", Replies(path, field="chat")

    def generate(self, chats, *, n=1, temperature=0.0, max_tokens=0, seed=0, stop=()):
        """As every generator; the first n recorded texts of each chat. Raises: Refused where there are fewer."""
        return [self._one(chat, n) for chat in chats]

    def _one(self, chat, n):
        found = self.replies[chat.sha] if chat.sha in self.replies else []
        if len(found) < n:
            raise Refused(f"{self.replies.path} holds {len(found)} of the {n} answers to this request")
        return found[:n]
