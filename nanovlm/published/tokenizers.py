"""Tokenizers of published models, read from the files beside their weights with the `tokenizers` package alone.

Three forms exist: `tokenizer.json`; a SentencePiece `tokenizer.model` (Vicuna ships nothing else); `vocab.json` with
`merges.txt` (OPT). Which tokens are special, which begins a text and which ids end a reply stands in the JSON files
beside them: tokenizer_config.json, special_tokens_map.json, added_tokens.json, generation_config.json.

Differs from `transformers`: special strings in a text stay text. Its chat models rely on finding them in one long
string; here templates name them (see templates.py) and nobody can type the end of a turn.
"""

import functools
import json
import struct
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from nanovlm.data.tokenizer import CACHED_TEXTS, Tokenizer


PADDED_ROWS = 1024  # rows without token that a published embedding may have: spare_rows of check_vocabulary
ROLES = ("bos", "eos", "pad", "unk")
USUAL = {"bos": ("<s>",), "eos": ("</s>", "<|endoftext|>"), "pad": ("<pad>",), "unk": ("<unk>",)}  # told by no file
BYTE_LEVEL_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast", "CodeGenTokenizer", "CodeGenTokenizerFast")


class PublishedTokenizer(Tokenizer):
    """Text to ids and back, as Tokenizer; made by `load_tokenizer`.

    bos may be None (Qwen has none); pad is the unknown or the end token where a model has none of its own.
    """

    def __init__(self, backend, roles, special, add_bos, eos_ids=None):
        """
        Args:
          backend: tokenizers.Tokenizer.
          roles: dict role -> token, "eos" at least. special: list of str, further special tokens.
          add_bos: bool. eos_ids: tuple of int, None = the eos token.
        """
        backend.no_truncation()  # a saved file may carry either
        backend.no_padding()
        self.roles = roles
        backend.add_special_tokens(
            [AddedToken(token, normalized=False, special=True) for token in (*roles.values(), *special)]
        )
        backend.encode_special_tokens = True
        self.backend, self.inner = backend, _without_prefix(backend)
        self.bos, self.eos, self.pad = (self._role(role) for role in ("bos", "eos", "pad"))
        self.pad = next(id for id in (self.pad, self._role("unk"), self.eos) if id is not None)
        self.add_bos = add_bos
        self.eos_ids = eos_ids or (self.eos,)
        self.vocab_size = max(backend.get_vocab().values()) + 1
        marked = {*roles.values(), *special}
        added = backend.get_added_tokens_decoder().items()
        self.special_names = {id: token.content for id, token in added if token.special or token.content in marked}
        self._encode = functools.lru_cache(maxsize=CACHED_TEXTS)(self._encode)

    def encode(self, text, continues=False):
        """list[int], never a special id.

        Args:
          text: str.
          continues: whether text stands before it in the row; otherwise SentencePiece's tokenizers, after a special
            token too, begin it with a blank.
        Raises: UnicodeEncodeError (a ValueError) for half a surrogate pair, which is no character.
        """
        return list(self._encode(text, continues))

    def decode(self, ids):
        """str; special ids and rows that only pad the embedding are left out.

        Raises: ValueError for a negative id, which is no token.
        """
        for id in ids:
            if id < 0:
                raise ValueError(f"id {id} is no token")
        return self.backend.decode([id for id in ids if id < self.vocab_size], skip_special_tokens=True)

    def save(self, path):
        """Write tokenizer.json, and tokenizer_config.json beside it."""
        super().save(path)
        config = {f"{role}_token": token for role, token in self.roles.items()}
        config |= {"add_bos_token": self.add_bos, "eos_token_ids": list(self.eos_ids)}
        config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        Path(path).with_name("tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def _role(self, role):
        return self.backend.token_to_id(self.roles[role]) if role in self.roles else None

    def _encode(self, text, continues):
        text.encode()  # names the place of what is no character (half a surrogate pair)
        ids = (self.inner if continues else self.backend).encode(text, add_special_tokens=False).ids
        if self.special_names.keys().isdisjoint(ids):
            return tuple(ids)
        return tuple(part for id in ids for part in self._spelled(id, text))

    def _spelled(self, id, text):
        """A special token that merges can make of its own letters, in two halves; the unknown token as it is."""
        token = self.special_names.get(id)
        if token is None or token not in text:
            return [id]
        return [part for half in (token[:1], token[1:]) for part in self.inner.encode(half).ids]


def load_tokenizer(folder, added=()):
    """The tokenizer of a published model.

    Args:
      folder: path of the folder with the tokenizer's files.
      added: special tokens that a model adds to its language model's tokenizer, appended in this order where absent.
    Returns: PublishedTokenizer.
    Raises: FileNotFoundError if none of the known files is there; ValueError naming the file that is damaged or
      contradicts another, or if no end token can be found.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; the one with the model's tokenizer files is expected")
    config = _json(folder / "tokenizer_config.json")
    roles = _roles(folder, config)
    if (folder / "tokenizer.json").is_file():
        backend = _from_json(folder / "tokenizer.json")
    elif (folder / "tokenizer.model").is_file():
        path = folder / "tokenizer.model"
        backend = convert(read(path), path)
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        backend = _byte_level(folder, config)
        roles = {"bos": "</s>", "eos": "</s>", "pad": "<pad>"} | roles  # OPT, where no file says otherwise
    else:
        found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise FileNotFoundError(
            f"{folder}: no tokenizer; tokenizer.json, tokenizer.model, or vocab.json with merges.txt is expected, "
            f"found {found}"
        )
    _add_tokens(backend, folder, config)
    roles = _completed(backend, roles, folder)
    special = [token for token in _further(folder, config) if backend.token_to_id(token) is not None]
    add_bos = _adds_bos(backend, roles, config, folder)
    if add_bos and backend.post_processor is None:  # for other programs that read the file which `save` writes
        bos = roles["bos"]
        backend.post_processor = processors.TemplateProcessing(f"{bos} $A", None, [(bos, backend.token_to_id(bos))])
    tokenizer = PublishedTokenizer(backend, roles, [*special, *added], add_bos)
    tokenizer.eos_ids = _eos_ids(tokenizer, folder, config)
    return tokenizer


def _json(path):
    """A JSON object: dict, empty without the file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: malformed JSON ({error}); copy or download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a JSON object was expected, found {type(content).__name__}")
    return content


def _roles(folder, config):
    """role -> token, of what the files state; tokenizer_config.json goes before special_tokens_map.json."""
    roles = {}
    for values in (_json(folder / "special_tokens_map.json"), config):
        for role in ROLES:
            token = values.get(f"{role}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if token:
                roles[role] = token
    return roles


def _further(folder, config):
    """Special tokens without a role, as the files list them: list of str."""
    found = []
    for values in (_json(folder / "special_tokens_map.json"), config):
        for field in ("additional_special_tokens", "extra_special_tokens"):
            tokens = values.get(field) or []
            found += tokens.values() if isinstance(tokens, dict) else tokens
    return [token["content"] if isinstance(token, dict) else token for token in found]


def _completed(backend, roles, folder):
    """Roles that no file states, by their usual tokens; every token must exist."""
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    told = bool(roles)
    for role, names in USUAL.items():
        usual = next((name for name in names if name in added), None)
        if role not in roles and usual is not None and (role == "eos" or not told):
            roles[role] = usual
    if "eos" not in roles:
        raise ValueError(f"{folder}: no token ends a text; tokenizer_config.json should name it as eos_token")
    for role, token in roles.items():
        if backend.token_to_id(token) is None:
            raise ValueError(
                f"{folder}: its {role}_token {token!r} is not in the vocabulary; these files belong to two models"
            )
    return roles


def _from_json(path):
    data = path.read_bytes()
    if data.startswith(LFS_POINTER):
        raise ValueError(f"{path}: a Git LFS pointer, not the file itself; fetch it with git lfs pull")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path}: not a tokenizer file, or damaged ({error}); copy or download it again") from error


def _byte_level(folder, config):
    """GPT-2's byte-level BPE from vocabulary and merges."""
    kind = config.get("tokenizer_class", BYTE_LEVEL_CLASSES[0])
    if kind not in BYTE_LEVEL_CLASSES:
        raise ValueError(f"{folder}: a {kind} cannot be made of vocab.json and merges.txt; add its tokenizer.json")
    path = folder / "merges.txt"
    lines = path.read_text(encoding="utf-8").split("\n")
    lines = lines[1:] if lines[0].startswith("#version") else lines  # "#" is a token too, and may begin a merge
    merges = [tuple(line.split(" ")) for line in lines if line]
    wrong = next((merge for merge in merges if len(merge) != 2), None)
    if wrong is not None:
        raise ValueError(f"{path}: two tokens with a space between them are expected on a line, found {wrong}")
    try:
        backend = tokenizers.Tokenizer(models.BPE(_json(folder / "vocab.json"), merges))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{folder}: vocab.json and merges.txt do not belong together ({error})") from error
    prefix = bool(config.get("add_prefix_space", False))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    return backend


def _add_tokens(backend, folder, config):
    """Tokens that the JSON files add, each at the id that they give it."""
    added = {id: (token, True) for token, id in _json(folder / "added_tokens.json").items()}
    for id, token in config.get("added_tokens_decoder", {}).items():
        added[int(id)] = token["content"], token.get("special", False)
    for id in sorted(added):
        token, special = added[id]
        if backend.token_to_id(token) is None or special:
            add = backend.add_special_tokens if special else backend.add_tokens
            add([AddedToken(token, normalized=False, special=special)])
        if backend.token_to_id(token) != id:
            raise ValueError(
                f"{folder}: the token {token!r} should have id {id} but gets {backend.token_to_id(token)}; "
                "these files belong to two models"
            )


def _adds_bos(backend, roles, config, folder):
    """Whether texts begin with BOS: tokenizer_config.json, else the file's own template, else the form's habit."""
    if config.get("add_bos_token") is not None:
        return "bos" in roles and bool(config["add_bos_token"])
    if "bos" not in roles:
        return False
    if (folder / "tokenizer.json").is_file():
        if backend.post_processor is None and not config:
            return True  # a file of train_tokenizer's, which states nothing
        return backend.encode("", add_special_tokens=True).ids[:1] == [backend.token_to_id(roles["bos"])]
    # SentencePiece (LLaMA) and OPT, whose class is GPT-2's, begin with it; CodeGen does not
    return not config.get("tokenizer_class", "").startswith("CodeGen")


def _eos_ids(tokenizer, folder, config):
    """Ids that end a reply: those of our own or of generation_config.json, else the eos token."""
    ids = config.get("eos_token_ids", _json(folder / "generation_config.json").get("eos_token_id"))
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    kept = [id for id in ids if id < tokenizer.vocab_size and not tokenizer.decode([id]).strip()]  # "\n" in BLIP-2
    for id in ids:
        if id not in kept:  # LLaVA-Phi's config gives LLaMA's ids, which are ordinary words in Phi's vocabulary
            token = tokenizer.backend.id_to_token(id)
            warnings.warn(f"{folder}: eos_token_id {id} is {token!r}, which ends no reply; left out", stacklevel=3)
    return tuple(kept) or (tokenizer.eos,)


def _without_prefix(backend):
    """The same tokenizer for text that continues another: nothing is put before its first word."""
    state, changed = json.loads(backend.to_str()), False
    for part in (state["normalizer"], state["pre_tokenizer"]):
        for step in [part, *(part.get("normalizers") or part.get("pretokenizers") or [])] if part else []:
            for field, value in (("prepend", ""), ("prepend_scheme", "never"), ("add_prefix_space", False)):
                changed |= step.get(field, value) != value
                step |= {field: value} if field in step else {}
    if not changed:
        return backend
    inner = tokenizers.Tokenizer.from_str(json.dumps(state))
    inner.encode_special_tokens = True
    return inner


# SentencePiece BPE models (`tokenizer.model`) read without the sentencepiece package, as `tokenizers` objects.
#
# The file is one protobuf message; a reader of a few lines finds the pieces with their scores and the few settings that
# matter. SentencePiece joins the neighbours whose piece scores highest; `tokenizers` wants that as a list of merges: of
# every piece all its splits into two known pieces, best score first. Ids must not be used for that order: they follow
# the scores almost everywhere, and mis-tokenise where they do not.
#
# File format: github.com/google/sentencepiece, src/sentencepiece_model.proto.


SPACE = "▁"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BPE = 2
LFS_POINTER = b"version https://git-lfs"


@dataclass
class Model:
    """What is read of a file.

    pieces: list of (text, score, kind), the id is the place. model_type: 1 unigram, 2 BPE, 3 words, 4 characters.
    byte_fallback: unknown characters become their bytes. add_prefix: a text begins with a blank of its own.
    squeeze: runs of blanks become one. normalized: the text is changed by a table before anything else.
    """

    pieces: list[tuple[str, float, int]] = field(default_factory=list)
    model_type: int = 1
    byte_fallback: bool = False
    add_prefix: bool = True
    squeeze: bool = True
    normalized: bool = False


def read(path):
    """Read a SentencePiece model.

    Args:
      path: of the `.model` file.
    Returns: Model.
    Raises: FileNotFoundError; ValueError naming the file if it is damaged or something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such SentencePiece model")
    data = path.read_bytes()
    if data.startswith(LFS_POINTER):
        raise ValueError(f"{path}: a Git LFS pointer, not the file itself; fetch it with git lfs pull")
    try:
        model = _model(data)
    except (IndexError, UnicodeDecodeError, struct.error, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: not a SentencePiece model, or damaged ({error}); copy or download it again"
        ) from error
    if not model.pieces:
        raise ValueError(f"{path}: not a SentencePiece model, or damaged (it holds no piece)")
    return model


def convert(model, where="the model"):
    """A SentencePiece BPE model as the `tokenizers` object that gives the same ids.

    Args:
      model: Model.
      where: str, what errors call it.
    Returns: tokenizers.Tokenizer without BOS or EOS of its own; control pieces and the unknown one are special tokens.
    Raises: ValueError for what is not BPE, or uses what no published model of these families does.
    """
    _check(model, where)
    ids = {text: id for id, (text, _, _) in enumerate(model.pieces)}
    unknown = next(text for text, _, kind in model.pieces if kind == UNKNOWN)
    bpe = models.BPE(ids, _merges(model), unk_token=unknown, fuse_unk=True, byte_fallback=model.byte_fallback)
    backend = tokenizers.Tokenizer(bpe)
    prefix = [normalizers.Prepend(SPACE)] if model.add_prefix else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if model.add_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    special = [text for text, _, kind in model.pieces if kind in (UNKNOWN, CONTROL)]
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    typed = [text for text, _, kind in model.pieces if kind == USER_DEFINED]
    backend.add_tokens([AddedToken(text, normalized=True) for text in typed])
    return backend


def _check(model, where):
    texts = [text for text, _, _ in model.pieces]
    kinds = [kind for _, _, kind in model.pieces]
    for wrong, message in (
        (model.model_type != BPE, "it is no BPE model; use the tokenizer.json of the same model"),
        (len(set(texts)) < len(texts), "a piece stands in it twice; copy or download it again"),
        (kinds.count(UNKNOWN) != 1, f"it has {kinds.count(UNKNOWN)} unknown pieces, one is expected"),
        (UNUSED in kinds, "it has unused pieces, which cannot be converted; use the tokenizer.json"),
        (model.byte_fallback and kinds.count(BYTE) != 256,
         f"it falls back to bytes but has {kinds.count(BYTE)} of the 256; copy or download it again"),
        (model.normalized or model.squeeze,
         "it changes texts before cutting them (normalisation, or blanks squeezed); use the tokenizer.json"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(f"{where}: {message}")


def _merges(model):
    """All splits of every piece into two known ones; the pieces by falling score, the splits by their ids."""
    ids = {text: id for id, (text, _, kind) in enumerate(model.pieces) if kind == NORMAL}
    merges = []
    for text in sorted(ids, key=lambda text: -model.pieces[ids[text]][1]):
        splits = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        known = [(left, right) for left, right in splits if left in ids and right in ids]
        merges += sorted(known, key=lambda split: (ids[split[0]], ids[split[1]]))
    return merges


def _model(data):
    model = Model()
    for number, value in _fields(data):
        if number == 1:
            model.pieces.append(_piece(value))
        elif number == 2:
            settings = dict(_fields(value))
            model.model_type = settings.get(3, 1)
            model.byte_fallback = bool(settings.get(35, 0))
        elif number == 3:
            settings = dict(_fields(value))
            model.normalized = bool(settings.get(2, b""))
            model.add_prefix, model.squeeze = bool(settings.get(3, 1)), bool(settings.get(4, 1))
    return model


def _piece(data):
    settings = dict(_fields(data))
    score = struct.unpack("<f", settings[2])[0] if 2 in settings else 0.0
    kind = settings.get(3, NORMAL)
    if kind not in range(NORMAL, BYTE + 1):
        raise ValueError(f"a piece of the unknown kind {kind}")
    if 1 not in settings:
        raise ValueError("a piece without text")
    return settings[1].decode(), score, kind


def _fields(data):
    """(number, value) of every field of a protobuf message: int, or bytes."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        wire = tag & 7
        if wire == 0:
            value, place = _varint(data, place)
        elif wire in (1, 2, 5):
            length, place = _varint(data, place) if wire == 2 else ({1: 8, 5: 4}[wire], place)
            value, place = data[place : place + length], place + length
            if place > len(data):
                raise ValueError("the file ends within a field")
        else:
            raise ValueError(f"a field of the unknown wire type {wire}")
        yield tag >> 3, value


def _varint(data, place):
    """An integer of 7 bits a byte, lowest first: (value, next place)."""
    value = shift = 0
    while True:
        if place >= len(data) or shift > 63:
            raise ValueError("the file ends within a number" if place >= len(data) else "a number of more than 64 bits")
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
