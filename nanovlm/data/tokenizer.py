"""Byte-level BPE tokenizer, trained with the `tokenizers` library.

Text becomes bytes and frequent neighbours become one token (Sennrich et al., arXiv:1508.07909, Sec. 3.2; over bytes
as in GPT-2), so that any text can be written and comes back exactly. Text is cut first, by one expression: a
lower-case word keeps one leading space or newline and a trailing colon ("user:" and "\\nbot:" can become single
tokens); every upper-case letter and every digit stands alone, so that reading "B7" aloud is one token per symbol.

Special tokens exist as ids only: `encode` never yields them, whatever the text looks like.
"""

import functools
import re
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from nanovlm.names import check_known

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
SPECIAL = (BOS, EOS, PAD)
PIECES = r"[ \n]?\p{Ll}+:?|\p{Lu}|\p{N}"  # what lies between matches is a piece too
BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")
CACHED_TEXTS = 65536


class Tokenizer:
    """Text to ids and back.

    bos, eos, pad: int, the ids of the special tokens. eos_ids: tuple of int, all ids that end a reply.
    special_names: dict id -> str. vocab_size: int, special tokens included.
    add_bos: bool, whether a row begins with bos.
    """

    add_bos = True

    def __init__(self, source):
        """
        Args:
          source: path of a tokenizer.json, or a trained tokenizers.Tokenizer.
        Raises: FileNotFoundError without the file; ValueError if it is no tokenizer or lacks a special token.
        """
        backend = source
        if not isinstance(source, tokenizers.Tokenizer):
            if not Path(source).is_file():
                raise FileNotFoundError(f"{source}: no such tokenizer; a model folder holds its tokenizer.json")
            try:
                backend = tokenizers.Tokenizer.from_file(str(source))
            except Exception as error:  # the library raises nothing narrower
                raise ValueError(f"{source}: not a tokenizer file, or damaged: {error}") from error
        absent = [token for token in SPECIAL if backend.token_to_id(token) is None]
        if absent:
            raise ValueError(f"tokenizer {source} has no {', '.join(absent)}; train one with train_tokenizer")
        self._use(backend, *map(backend.token_to_id, SPECIAL))

    def _use(self, backend, bos, eos, pad, special=()):
        """Take over a tokenizers.Tokenizer. special: its special tokens beside those that it marks itself."""
        backend.no_truncation()  # a saved file may carry either
        backend.no_padding()
        backend.encode_special_tokens = True  # "</s>" typed by a user is four characters, not the end of a reply
        self.backend, self.bos, self.eos, self.pad, self.eos_ids = backend, bos, eos, pad, (eos,)
        self.vocab_size = max(backend.get_vocab().values()) + 1
        added = backend.get_added_tokens_decoder().items()
        self.special_names = {id: token.content for id, token in added if token.special or token.content in special}
        self._encode = functools.lru_cache(maxsize=CACHED_TEXTS)(self._encode)

    def _encode(self, text):
        text.encode()  # names the place of what is no character (half a surrogate pair)
        return tuple(self.backend.encode(text, add_special_tokens=False).ids)

    def encode(self, text, continues=False):
        """list[int], never a special id. Raises: UnicodeEncodeError (a ValueError) for half a surrogate pair.

        continues: whether text stands before it in the row; here it makes no difference.
        """
        return list(self._encode(text))

    def decode(self, ids):
        """str; special ids are left out."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def special_id(self, token):
        """int: the id of a special token by its name. Raises: ValueError if there is none of that name."""
        ids = {special.content: id for id, special in self.backend.get_added_tokens_decoder().items()}
        check_known("the tokenizer has no special token", token, ids)
        return ids[token]

    def stream(self):
        """A TextStream: text as it is made."""
        return TextStream(self)

    def save(self, path):
        """Write tokenizer.json."""
        self.backend.save(str(path))


class TextStream:
    """Decodes one id at a time; keeps spaces and never gives half a character.

    Ids are decoded behind the ones before them: SentencePiece's tokenizers drop the blank of a text's first word. Their
    single bytes ("<0x0A>") wait for the next word, since one that is no character spoils all its neighbours.
    """

    def __init__(self, tokenizer):
        self.tokenizer, self.in_bytes = tokenizer, False
        self.given = []  # ids of the piece given last
        self.pending = []  # ids whose text is not complete yet

    def push(self, id):
        """str: the text that this id completes, often a word, sometimes nothing yet."""
        self.pending.append(id)
        if id not in self.tokenizer.special_names:
            self.in_bytes = BYTE_PIECE.fullmatch(self.tokenizer.backend.id_to_token(id) or "")
        text = "" if self.in_bytes else self._new_text()
        if text.endswith("\ufffd") or not text:  # bytes that begin a character decode to U+FFFD
            return ""
        return self._give(text)

    def finish(self):
        """str: what was held back; at the end of a reply, half a character becomes U+FFFD."""
        return self._give(self._new_text())

    def _new_text(self):
        before = self.tokenizer.decode(self.given)
        return self.tokenizer.decode(self.given + self.pending)[len(before) :]

    def _give(self, text):
        if text:
            self.given, self.pending = self.pending, []
        return text


def train_tokenizer(texts, vocab_size):
    """Train a tokenizer; the same texts give the same one.

    Args:
      texts: iterable of str.
      vocab_size: int, tokens wanted, special ones and the 256 bytes included; fewer if the texts hold no more merges.
    Raises: ValueError if vocab_size has no room for the bytes.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + len(SPECIAL)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size {vocab_size} has no room for 256 bytes and special tokens; at least {smallest}")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(SPECIAL),
                                  initial_alphabet=sorted(alphabet), show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend)


def check_vocabulary(tokenizer, num_embeddings, spare_rows=0):
    """Raise ValueError unless the model has a row for every token and at most spare_rows more (published ones do)."""
    if not 0 <= num_embeddings - tokenizer.vocab_size <= spare_rows:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens but the model {num_embeddings} embeddings; "
                         "use the tokenizer.json beside the model")
