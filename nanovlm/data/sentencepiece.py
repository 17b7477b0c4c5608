"""SentencePiece BPE models (`tokenizer.model`) read without the sentencepiece package, as `tokenizers` objects.

The file is one protobuf message; a reader of a few lines finds the pieces with their scores and the few settings that
matter. SentencePiece joins the neighbours whose piece scores highest; `tokenizers` wants that as a list of merges: of
every piece all its splits into two known pieces, best score first. Ids must not be used for that order: they follow
the scores almost everywhere, and mis-tokenise where they do not.

File format: github.com/google/sentencepiece, src/sentencepiece_model.proto.
"""

import struct
from dataclasses import dataclass, field
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

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
