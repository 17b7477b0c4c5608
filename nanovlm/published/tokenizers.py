"""Tokenizers of published models, read from the files beside their weights with the `tokenizers` package alone.

Three forms exist: `tokenizer.json`; a SentencePiece `tokenizer.model` (Vicuna ships nothing else); `vocab.json` with
`merges.txt` (OPT). Which tokens are special, which begins a text and which ids end a reply stands in the JSON files
beside them: tokenizer_config.json, special_tokens_map.json, added_tokens.json, generation_config.json.

Differs from `transformers`: special strings in a text stay text. Its chat models rely on finding them in one long
string; here templates name them (see templates.py) and nobody can type the end of a turn.
"""

import json
import warnings
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from nanovlm.data.tokenizer import Tokenizer
from nanovlm.published.language import read_json
from nanovlm.published.weights import damage

SPACE = "▁"  # how SentencePiece writes a blank
PADDED_ROWS = 1024  # rows without token that a published embedding may have: spare_rows of check_vocabulary
ROLES = ("bos", "eos", "pad", "unk")
USUAL = {"<s>": "bos", "<|endoftext|>": "eos", "</s>": "eos", "<pad>": "pad", "<unk>": "unk"}  # where no file says
NO_PREFIX = {"prepend": "", "prepend_scheme": "never", "add_prefix_space": False}  # fields of a tokenizer.json's steps


class PublishedTokenizer(Tokenizer):
    """Text to ids and back, as Tokenizer; made by `load_tokenizer`.

    bos may be None (Qwen has none); pad is the unknown or the end token where a model has none of its own.
    """

    def __init__(self, backend, roles, special, add_bos):
        """roles: {role: token}, "eos" at least. special: list of str, further special tokens."""
        self.roles, self.add_bos, marked = roles, add_bos, [*roles.values(), *special]
        backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in marked])
        bos, eos, pad, unk = (backend.token_to_id(roles.get(role, "")) for role in ROLES)
        self._use(backend, bos, eos, next(id for id in (pad, unk, eos) if id is not None), marked)
        self.inner = _without_prefix(backend)

    def encode(self, text, continues=False):
        """list[int], never a special id.

        continues: whether text stands before it in the row; otherwise SentencePiece's tokenizers, after a special token
          too, begin it with a blank. Raises: UnicodeEncodeError (a ValueError) for half a surrogate pair.
        """
        return list(self._encode(text, continues))

    def decode(self, ids):
        """str; special ids and rows that only pad the embedding are left out. Raises: ValueError for a negative id."""
        if min(ids, default=0) < 0:
            raise ValueError(f"id {min(ids)} is no token")
        return self.backend.decode([id for id in ids if id < self.vocab_size], skip_special_tokens=True)

    def save(self, path):
        """Write tokenizer.json, and tokenizer_config.json beside it."""
        super().save(path)
        config = {f"{role}_token": token for role, token in self.roles.items()} | {
            "add_bos_token": self.add_bos, "eos_token_ids": self.eos_ids, "tokenizer_class": "PreTrainedTokenizerFast"}
        Path(path).with_name("tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def _encode(self, text, continues):
        text.encode()  # names the place of what is no character (half a surrogate pair)
        ids = []
        for id in (self.inner if continues else self.backend).encode(text, add_special_tokens=False).ids:
            token = self.special_names.get(id)
            if token and token in text:  # merges have made it of its own letters: in two halves they cannot
                ids += self.inner.encode(token[:1]).ids + self.inner.encode(token[1:]).ids
            else:
                ids.append(id)
        return tuple(ids)


def load_tokenizer(folder, added=()):
    """The tokenizer in a published model's folder: PublishedTokenizer.

    added: special tokens that a model adds to its language model's tokenizer, appended in this order where absent.
    Raises: FileNotFoundError if none of the known files is there; ValueError naming the file that is damaged or
      contradicts another, or if no end token can be found; ImportError if a `.model` is there without its package.
    """
    folder = Path(folder)
    config = _beside(folder, "tokenizer_config.json")
    files = (_beside(folder, "special_tokens_map.json"), config)  # the second goes before the first
    stated = {key: value for values in files for key, value in values.items() if value}
    roles = {role: _content(stated[f"{role}_token"]) for role in ROLES if f"{role}_token" in stated}
    special = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        tokens = stated.get(key, [])
        special += map(_content, tokens.values() if isinstance(tokens, dict) else tokens)
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{path} is no tokenizer file, or {damage(path)} ({error})") from error
    elif (folder / "tokenizer.model").is_file():
        backend = from_sentencepiece(folder / "tokenizer.model")
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        backend = _byte_level(folder, config)
        roles = {"bos": "</s>", "eos": "</s>", "pad": "<pad>"} | roles  # OPT, where no file says otherwise
    else:
        raise FileNotFoundError(f"{folder} holds no tokenizer.json, no tokenizer.model, no vocab.json with merges.txt")
    _add_tokens(backend, folder, config)
    known = [token.content for token in backend.get_added_tokens_decoder().values()]
    roles = roles or {role: token for token, role in USUAL.items() if token in known}
    if "eos" not in roles:
        raise ValueError(f"{folder}: no token ends a text; tokenizer_config.json should name it as eos_token")
    for role, token in roles.items():
        if backend.token_to_id(token) is None:
            raise ValueError(f"{folder}: its {role}_token {token!r} is not in the vocabulary; files of two models?")
    special = [token for token in special if backend.token_to_id(token) is not None]
    add_bos = _adds_bos(backend, roles, config, folder)
    if add_bos and backend.post_processor is None:  # for other programs that read the file which `save` writes
        bos = roles["bos"]
        backend.post_processor = processors.TemplateProcessing(f"{bos} $A", None, [(bos, backend.token_to_id(bos))])
    tokenizer = PublishedTokenizer(backend, roles, [*special, *added], add_bos)
    tokenizer.eos_ids = _eos_ids(tokenizer, folder, config)
    return tokenizer


def _beside(folder, name):
    """The JSON object of a file that may be absent: dict."""
    return read_json(folder / name) if (folder / name).is_file() else {}


def _content(token):
    """A token's text, which files write bare or in an object."""
    return token.get("content") if isinstance(token, dict) else token


def _byte_level(folder, config):
    """GPT-2's byte-level BPE from vocabulary and merges."""
    kind = config.get("tokenizer_class", "GPT2Tokenizer")
    if not kind.startswith(("GPT2", "CodeGen")):
        raise ValueError(f"{folder}: a {kind} cannot be made of vocab.json and merges.txt; add its tokenizer.json")
    try:
        backend = tokenizers.Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{folder}: vocab.json and merges.txt are damaged or of two models ({error})") from error
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space", False)))
    backend.decoder = decoders.ByteLevel()
    return backend


def _add_tokens(backend, folder, config):
    """Tokens that the JSON files add, each at the id that they give it."""
    added = {id: {"content": token, "special": True} for token, id in _beside(folder, "added_tokens.json").items()}
    added |= {int(id): token for id, token in config.get("added_tokens_decoder", {}).items()}
    for id, token in sorted(added.items()):
        text, special = token["content"], token.get("special", False)
        if backend.token_to_id(text) is None or special:
            add = backend.add_special_tokens if special else backend.add_tokens
            add([AddedToken(text, normalized=False, special=special)])
        if backend.token_to_id(text) != id:
            raise ValueError(f"{folder}: the token {text!r} should have id {id} but gets {backend.token_to_id(text)}; "
                             "these files belong to two models")


def _adds_bos(backend, roles, config, folder):
    """Whether texts begin with BOS: tokenizer_config.json, else the file's own template, else the form's habit."""
    if "bos" not in roles:
        return False
    if config.get("add_bos_token") is not None:
        return bool(config["add_bos_token"])
    if (folder / "tokenizer.json").is_file():
        if backend.post_processor is None and not config:
            return True  # a file of train_tokenizer's, which states nothing
        return backend.encode("", add_special_tokens=True).ids[:1] == [backend.token_to_id(roles["bos"])]
    # SentencePiece (LLaMA) and OPT, whose class is GPT-2's, begin with it; CodeGen does not
    return not config.get("tokenizer_class", "").startswith("CodeGen")


def _eos_ids(tokenizer, folder, config):
    """Ids that end a reply: those of our own or of generation_config.json, else the eos token."""
    ids = config.get("eos_token_ids", _beside(folder, "generation_config.json").get("eos_token_id"))
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    kept = [id for id in ids if id < tokenizer.vocab_size and not tokenizer.decode([id]).strip()]  # "\n" in BLIP-2
    for id in ids:
        if id not in kept:  # LLaVA-Phi's config gives LLaMA's ids, which are ordinary words in Phi's vocabulary
            token = tokenizer.backend.id_to_token(id)
            warnings.warn(f"{folder}: eos_token_id {id} is {token!r}, which ends no reply; left out", stacklevel=3)
    return tuple(kept) or (tokenizer.eos,)


def _without_prefix(backend):
    """The same tokenizer for text that continues another: nothing is put before its first word."""

    def plain(step):  # of every object; numbers belong to a word of the vocabulary
        return step | {key: value for key, value in NO_PREFIX.items() if type(step.get(key)) is type(value)}

    state = json.loads(backend.to_str(), object_hook=plain)
    if state == json.loads(backend.to_str()):
        return backend
    inner = tokenizers.Tokenizer.from_str(json.dumps(state))
    inner.encode_special_tokens = True
    return inner


def from_sentencepiece(path):
    """A SentencePiece BPE model as the `tokenizers` object that gives the same ids.

    SentencePiece joins the neighbours whose piece scores highest; `tokenizers` wants that as a list of merges: of every
    piece all its splits into two known pieces, best score first. Ids must not be used for that order: they follow the
    scores almost everywhere, and mis-tokenise where they do not. That the ids are the same is tried on every piece.

    Returns: tokenizers.Tokenizer without BOS or EOS of its own; control pieces and the unknown one are special tokens.
    Raises: ImportError without the package `sentencepiece`; ValueError for a damaged file, or one that does what no
      published model of these families does.
    """
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise ImportError(f"{path} is read by the package sentencepiece, which is not installed; install it, or put "
                          "the tokenizer.json of the same model beside it") from error
    try:
        model = SentencePieceProcessor(model_file=str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} is no SentencePiece model, or {damage(path)} ({error})") from error
    texts = [model.id_to_piece(id) for id in range(model.get_piece_size())]
    special = [text for id, text in enumerate(texts) if model.is_unknown(id) or model.is_control(id)]
    ids = {text: id for id, text in enumerate(texts)}
    normal = {text: model.get_score(id) for text, id in ids.items() if text not in special and not model.is_byte(id)}
    merges = []
    for text in sorted(normal, key=normal.get, reverse=True):
        splits = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        known = [split for split in splits if normal.keys() >= {*split}]
        merges += sorted(known, key=lambda split: [ids[part] for part in split])
    unknown, fallback = texts[model.unk_id()], any(map(model.is_byte, ids.values()))
    backend = tokenizers.Tokenizer(models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=fallback))
    prefix = model.normalize("a").startswith(SPACE)  # a text begins with a blank of its own
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE)] * prefix + [normalizers.Replace(" ", SPACE)])
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
                                         *[decoders.Strip(" ", 1, 0)] * prefix])
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    backend.encode_special_tokens = True
    for text in (*texts, "a  b", " \ufb01 \uff21"):
        text = text.replace(SPACE, " ")
        if backend.encode(text, add_special_tokens=False).ids != model.encode(text):
            raise ValueError(f"{path}: cuts {text!r} as no byte-pair encoding does that is read here (a unigram model, "
                             "symbols of a user's, texts changed before); use the tokenizer.json of the same model")
    return backend
