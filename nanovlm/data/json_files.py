"""JSON files of any size and form, one record at a time.

What is called .json may be one list, one object that holds a list under a key, lines of objects, or indented objects
one after another; gzip may have packed it. No more of a file is held than one record needs. Each comes with the line
where it begins, for messages, and with its bytes, so that a reader can come back for it later.

Lines end at "\\n" only: U+2028, at which `str.splitlines` cuts as well, may stand inside a text. An object that names a
key twice is an error, since Python would keep the last value and lose the others without a word.
"""

import gzip
import json
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHUNK = 1 << 20  # bytes read at a time
LARGEST = 1 << 28  # bytes of one record; a record that has not ended by then is no JSON
PACKED = b"\x1f\x8b"  # how gzip's files begin
CLOSING = {"[": "]", "{": "}"}
BETWEEN = re.compile(r"[ \t\r\n,:]*")  # what lies between two values is not looked at any closer
GOES_ON = (b"{", b"[", b",", b":")  # how the first line of an object that fills several ends


@dataclass(frozen=True)
class Element:
    """One record of a file.

    where: "FILE, line N", in a list with ", item N", in an object with ", key K"; for messages.
    value: what it holds, or the ValueError that says why it cannot be read (only lines go on behind a broken one).
    start, stop: its bytes in the (unpacked) file. key: its name, of a member of an object.
    """

    where: str
    value: Any
    start: int
    stop: int
    key: str | None = None


def unique_keys(pairs):
    """An object whose keys all differ: dict. Raises: ValueError for a repeated key, whose first value would be lost."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)


def open_bytes(path):
    """A file for reading bytes, unpacked on the way if gzip has packed it. Raises: FileNotFoundError."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with open(path, "rb") as file:
        packed = file.read(2) == PACKED
    return gzip.open(path) if packed else open(path, "rb")


def parse(data, where):
    """One JSON value of bytes. Raises: ValueError, beginning with `where`: no UTF-8, malformed, or a key twice."""
    try:
        return DECODER.decode(data.decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{where}: malformed JSON: {error}") from error


def field(record, name, kinds, where=""):
    """A field of a record, a dict. Raises: ValueError if it is missing or of another type.

    name: of the field, or several of which the first that is there counts. kinds: type or types that it may have.
    """
    names = name if isinstance(name, tuple) else (name,)
    place = f"{where}: " if where else ""
    if not isinstance(record, dict):
        raise ValueError(f"{place}an object with {' or '.join(names)} was expected, found {type(record).__name__}")
    name = next(filter(record.__contains__, names), None)
    if name is None:
        missing, found = " or ".join(map(repr, names)), ", ".join(map(repr, record)) or "nothing"
        raise ValueError(f"{place}field {missing} is missing; found {found}")
    value = record[name]
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
        expected = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
        raise ValueError(f"{place}field {name!r} must be a {expected}, found {value!r}")
    return value


def text_field(record, name, where=""):
    """As `field`: words, without the blanks and line breaks around them. Raises: ValueError if there are none."""
    text = field(record, name, str, where).strip()
    if not text:
        raise ValueError(f"{where and where + ': '}field {name!r} is empty")
    return text


class Scanner:
    """Reads JSON values from a file, one behind the other, with as much of it in memory as one value needs.

    The bytes are looked at as Latin-1, in which every byte is one character: places in the text are places in the file.
    """

    def __init__(self, path, file):
        self.path, self.file, self.ended = path, file, False
        self.text, self.place = "", 0  # place: of the next character
        self.offset, self.line = 0, 1  # byte in the file of text[0]; line of the place
        self.more()
        if self.text.startswith("\xef\xbb\xbf"):  # a byte order mark, as Windows editors write it
            self.place = 3

    def more(self):
        """Read on, and forget what lies behind."""
        try:
            new = self.file.read(max(CHUNK, len(self.text) - self.place))  # doubling: a long value costs linear time
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{self.path}: the packed file is damaged or cut short ({error})") from error
        self.offset += self.place
        self.text, self.place, self.ended = self.text[self.place :] + new.decode("latin-1"), 0, not new

    def go(self, place):
        """Step over text, and count its lines."""
        self.line += self.text.count("\n", self.place, place)
        self.place = place

    def peek(self):
        """The first character of what comes next, a value or a closing bracket: str, "" at the end."""
        while True:
            self.go(BETWEEN.match(self.text, self.place).end())
            if self.place < len(self.text) or self.ended:
                return self.text[self.place : self.place + 1]
            self.more()

    def malformed(self, message, place):
        """The error that names a place of the text."""
        line = self.line + self.text.count("\n", self.place, place)
        return ValueError(f"{self.path}, line {line}, byte {self.offset + place}: malformed JSON: {message}")

    def value(self, beside="", key=None):
        """The next value: Element; beside: what its `where` says behind the line. Raises: ValueError."""
        self.peek()
        where = f"{self.path}, line {self.line}{beside}"
        while True:
            try:
                value, stop = DECODER.raw_decode(self.text, self.place)
                if len(self.text) - stop > 2 or self.ended:  # else a number could go on in the next chunk, as 1e+5
                    break
            except json.JSONDecodeError as error:
                if self.ended or len(self.text) - self.place > LARGEST:
                    raise self.malformed(error.msg, error.pos) from error
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            self.more()
        text, start = self.text[self.place : stop], self.offset + self.place
        self.go(stop)
        value = value if text.isascii() else parse(text.encode("latin-1"), where)
        return Element(where, value, start, start + len(text), key)

    def inside(self):
        """Walk through what opens here: the key of each member of an object, None in a list; its value is next."""
        opening = self.peek()
        if opening not in CLOSING:
            raise self.malformed("a list or an object was expected", self.place)
        self.place += 1
        while self.peek() not in ("]", "}", ""):
            yield self.value().value if opening == "{" else None
        if self.peek() != CLOSING[opening]:
            raise self.malformed(f"{CLOSING[opening]!r} was expected", self.place)
        self.place += 1

    def members(self):
        """The elements of the list, or the members of the object, that opens here."""
        for number, key in enumerate(self.inside(), start=1):
            yield self.value(f", item {number}" if key is None else f", key {key!r}", key)

    def end(self):
        """Raise ValueError unless nothing stands behind the place."""
        if self.peek():
            raise self.malformed("more behind the end", self.place)


def elements(path, key=None):
    """The elements of a file's list, or the members of its object; with `key`, of what it holds under that name.

    Yields: Element. Raises: ValueError naming file and line for what is no JSON or not of this form.
    """
    with open_bytes(path) as file:
        scanner = Scanner(path, file)
        if key is None:
            yield from scanner.members()
        else:
            names = []
            for name in scanner.inside():
                names.append(name)
                if name == key or scanner.peek() in CLOSING:  # COCO's annotations are hundreds of megabytes
                    yield from (member for member in scanner.members() if name == key)
                else:
                    scanner.value()
            if names.count(key) != 1:
                found = ", ".join(map(repr, names)) or "nothing"
                raise ValueError(f"{path}: one key {key!r} was expected, found {found}")
        scanner.end()


def records(path):
    """The records of a file, whatever its name says: a list, lines of JSON, or objects one after another.

    Yields: Element; a line that cannot be read has its ValueError as value, behind it the next line follows.
    Raises: ValueError naming file and line where there is no going on.
    """
    with open_bytes(path) as file:
        scanner = Scanner(path, file)
        if scanner.peek() == "[":
            yield from scanner.members()
            return scanner.end()
        file.seek(0)
        first_line = next(filter(bytes.strip, file), b"").rstrip()
        file.seek(0)
        if first_line.endswith(GOES_ON):
            scanner = Scanner(path, file)
            while scanner.peek():
                yield scanner.value()
        else:
            stop = 0
            for number, line in enumerate(file, start=1):
                start, stop, where = stop, stop + len(line), f"{path}, line {number}"
                if line.strip():
                    try:
                        value = parse(line.strip(), where)
                    except ValueError as error:
                        value = error
                    yield Element(where, value, start, stop)


def read_at(path, start, stop, where):
    """The value of one record, by the bytes that it fills in a file that is not packed."""
    with open(path, "rb") as file:
        file.seek(start)
        return parse(file.read(stop - start), where)
