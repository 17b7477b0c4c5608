"""JSON files of records, cut into records before any is parsed: memory holds one, and a broken one breaks nothing else.

A file is JSON lines, a list, or objects in a row (pretty-printed or not), whatever its ending says, compressed or not.
"""

import gzip
import json
import re
from pathlib import Path

from nanovlm.evaluation.items import unique_keys

CHUNK = 1 << 20  # characters read at once
LONGEST = 1 << 26  # characters of one record; a base64 picture fits, a whole file mistaken for a record does not
STRUCTURE, INSIDE = re.compile(r'["{}\[\],]'), re.compile(r'["\\]')
CONTAINERS = {  # key at the top of a file -> what it is; these are no records
    "data": "MIMIC-IT's or TextVQA's file", "annotations": "MiniGPT-4's or COCO's file", "questions": "a VQA question file",
}  # fmt: skip


class Unreadable(ValueError):
    """Why a record cannot be read. text: the record as it stands in the file."""

    def __init__(self, why, text):
        super().__init__(why)
        self.text = text


def records(path):
    """The records of a file: yields (where, value) or (where, Unreadable), in order; where names file and line.

    Raises: FileNotFoundError; ValueError for a file without a record, or one that as a whole is of another form.
    """
    line = None
    for line, text, why in elements(path):
        try:
            if why:
                raise ValueError(why)
            value = _parse(text)
        except json.JSONDecodeError as error:
            yield f"{path}, line {line + error.lineno - 1}", Unreadable(f"no JSON ({error.msg})", text)
        except ValueError as error:
            yield f"{path}, line {line}", Unreadable(str(error), text.encode("utf-8", "replace").decode())
        else:
            _refuse_container(path, value)
            yield f"{path}, line {line}", value
    if line is None:
        raise ValueError(f"{path} holds no record; a list or lines of objects were expected")


def _parse(text):
    """The value of a record's text. Raises: ValueError."""
    try:
        text.encode()
        value = json.loads(text.strip(), object_pairs_hook=unique_keys)
        if "\\ud" in text or "\\uD" in text:  # JSON can spell half a surrogate pair, which is no character
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("not UTF-8 text, or half a surrogate pair in it") from error
    return value


def _refuse_container(path, value):
    key = next((key for key in CONTAINERS if key in value), None) if isinstance(value, dict) else None
    if key and "conversations" not in value and isinstance(value[key], (dict, list)):
        raise ValueError(
            f"{path}: the key {key!r} at its top makes it {CONTAINERS[key]}, not a file of records; bring it into LLaVA's "
            "form with `python -m nanovlm.data convert`"
        )


def open_text(path):
    """A text file, perhaps compressed, whose lines end at "\\n" alone; bytes that are no UTF-8 become surrogates."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a data set as .json, .jsonl or either with .gz")
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return (gzip.open if packed else open)(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="\n")


def elements(path):
    """The texts of a file's records: yields (line where it begins, str, "" or why it is none).

    Raises: FileNotFoundError; ValueError for a record without end, which is a missing bracket or another format.
    """
    with open_text(path) as file:
        head = file.readline(LONGEST)
        while head and not head.strip():
            head = file.readline(LONGEST)
    is_list = head.lstrip().startswith("[")
    if _is_json(head) or (".jsonl" in Path(path).suffixes and not is_list):
        yield from _lines(path)
    else:
        yield from _cut(path, is_list)


def _is_json(line):
    """Whether a line is an object by itself."""
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _lines(path):
    with open_text(path) as file:
        number = 0
        while line := file.readline(LONGEST):
            number += 1
            if len(line) == LONGEST:
                raise ValueError(_endless(path, number))
            if line.strip():
                yield number, line, ""


def _endless(path, line):
    return (
        f"{path}, line {line}: the record that begins here has no end within {LONGEST} characters; a bracket or quotation "
        "mark is missing, or the file is of another form: bring it into LLaVA's with `python -m nanovlm.data convert`"
    )


def _cut(path, is_list):
    """The elements of a list, or objects in a row, cut at commas and brackets outside of strings."""
    text, at, begin, line, in_string = "", 0, 0, 1, False
    depth, level = 0, 1 if is_list else 0  # level: where the records stand
    with open_text(path) as file:
        while True:
            found = (INSIDE if in_string else STRUCTURE).search(text, at)
            if found is None or (found[0] == "\\" and found.end() == len(text)):
                at = found.start() if found else len(text)
                more = file.read(CHUNK)
                if not more:
                    break
                text, at, begin = text[begin:] + more, at - begin, 0
                if len(text) > LONGEST:
                    raise ValueError(_endless(path, line + _blank_lines(text)))
                continue
            at, char, end = found.end(), found[0], None
            if char == "\\":
                at += 1
            elif char == '"':
                in_string = not in_string
            elif char in "{[":
                depth += 1
                if is_list and depth == 1:
                    line += text[begin:at].count("\n")
                    begin = at
            elif char in "}]":
                depth -= 1
                end = None if depth else found.start() if is_list else at
            elif depth == level:
                end = found.start()
            if end is None:
                continue
            piece = text[begin:end]
            if piece.strip():
                yield line + _blank_lines(piece), piece, ""
            line += text[begin:at].count("\n")
            begin = at
            if is_list and not depth:
                break
        rest = text[begin:] or file.read(CHUNK)
    if is_list and not depth and rest.strip():
        raise ValueError(f"{path}, line {line + _blank_lines(rest)}: text after the end of the list; a bracket too many above?")
    if rest.strip() or depth > 0:
        yield line + _blank_lines(rest), rest, "the file ends here, inside a record or list"


def _blank_lines(text):
    return text[: len(text) - len(text.lstrip())].count("\n")
