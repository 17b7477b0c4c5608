"""A generator whose answers are written down and counted: what a judge has said is neither asked nor paid for twice."""

import re

from nanovlm.vlit.asking import Request, ask
from nanovlm.vlit.generators import Drawing
from nanovlm.vlit.replies import key_of

TOKEN = re.compile(r"\w+|[^\w\s]")


class Recorded:
    """Another generator, through a file of answers.

    Args:
      generator: as in generators.py. replies: replies.Replies; None = nothing is written down.
    Attributes: tokens: words and signs read and written, a stand-in for tokens, whatever the tokenizer.
    """

    def __init__(self, generator, replies=None):
        self.generator, self.replies, self.tokens = generator, replies, 0
        self.name, self.accepts_images = generator.name, generator.accepts_images
        self.batch_size, self.workers = generator.batch_size, generator.workers

    def generate(self, chats, *, n, temperature, max_tokens, seed, stop):
        """As every generator; a chat that was refused has no answers."""
        drawing = Drawing(n, temperature, max_tokens, seed, tuple(stop))
        if self.replies is None:
            found = self.generator.generate(
                chats, n=n, temperature=temperature, max_tokens=max_tokens, seed=seed, stop=stop
            )
        else:
            requests = (Request(str(place), chat) for place, chat in enumerate(chats))
            ask(requests, self.generator, drawing, self.replies, len(chats))
            keys = [key_of(chat, self.generator, drawing) for chat in chats]
            found = [self.replies[key] if key in self.replies else [] for key in keys]
        texts = [text for chat in chats for _, text in chat.messages] + [text for several in found for text in several]
        self.tokens += sum(len(TOKEN.findall(text)) for text in texts)
        return found
