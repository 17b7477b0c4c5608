"""JSON files of any size and form, one record at a time.

What is called .json may be one list, one object that holds a list under a key, lines of objects, or pretty-printed
objects behind one another; all may be compressed by gzip. A file is never held whole: records come out one by one with
the line where they begin and the bytes that they fill, so that a reader can come back for one of them later.

Lines end at "\\n" only: U+2028, at which `str.splitlines` cuts as well, may stand inside a text. An object that names a
key twice is an error, since Python would keep the last value and lose the others without a word.
"""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHUNK = 1 << 20  # bytes read at a time
LARGEST = 1 << 28  # bytes of one record; a record that has not ended by then is no JSON
SPACE = " \t\r\n"
PACKED = b"\x1f\x8b"  # how gzip's files begin


@dataclass(frozen=True)
class Element:
    """One record of a file.

    where: "FILE, line N", in a list with ", item N", for messages.
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
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with open(path, "rb") as file:
        packed = file.read(2) == PACKED
    return gzip.open(path) if packed else open(path, "rb")


def parse(data, where):
    """One JSON value.

    Args:
      data: bytes. where: str, for messages.
    Raises: ValueError if it is no UTF-8, malformed, or names a key twice.
    """
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique_keys)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text ({error})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}, column {error.colno}: malformed JSON: {error.msg}") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


class Scanner:
    """Reads JSON values from a file, one behind the other, with as much of it in memory as one value needs.

    The bytes are looked at as Latin-1, in which every byte is one character: places in the text are places in the file.
    """

    def __init__(self, path):
        self.path, self.file = path, open_bytes(path)
        self.text, self.place = "", 0
        self.offset = 0  # byte in the file of text[0]
        self.line, self.counted = 1, 0  # line in the file of text[counted], which lies before the place
        self.before = 0  # bytes of the line of text[0] that are forgotten
        self.ended = False
        self.more()
        if self.text.startswith("\xef\xbb\xbf"):  # a byte order mark, as Windows editors write it
            self.place, self.before = 3, -3

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()

    def more(self):
        """Read on, and forget what lies behind."""
        self.count_lines()
        self.before = self.column(self.place) - 1
        self.offset += self.place
        try:
            new = self.file.read(max(CHUNK, len(self.text) - self.place))  # doubling: a long value costs linear time
        except (EOFError, gzip.BadGzipFile) as error:
            raise ValueError(f"{self.path}: the packed file is damaged or cut short ({error})") from error
        self.text, self.place, self.ended = self.text[self.place :] + new.decode("latin-1"), 0, not new
        self.counted = 0

    def count_lines(self):
        """The line of the next character: int."""
        self.line += self.text.count("\n", self.counted, self.place)
        self.counted = self.place
        return self.line

    def where(self):
        """File and line of the next character: str."""
        return f"{self.path}, line {self.count_lines()}"

    def peek(self):
        """The next character that is no space: str, "" at the end."""
        while True:
            while self.place < len(self.text) and self.text[self.place] in SPACE:
                self.place += 1
            if self.place < len(self.text) or self.ended:
                return self.text[self.place : self.place + 1]
            self.more()

    def take(self, *expected):
        """Step over the next character, one of those expected: str. Raises: ValueError for another."""
        found = self.peek()
        if found not in expected or not found:
            raise ValueError(f"{self.where()}, column {self.column(self.place)}: malformed JSON: "
                             f"{' or '.join(map(repr, expected))} expected, found {found or 'the end'!r}")
        self.place += 1
        return found

    def column(self, place):
        """Where text[place] stands in its line: int, in bytes from 1."""
        line_break = self.text.rfind("\n", 0, place)
        return place - line_break + (self.before if line_break < 0 else 0)

    def value(self):
        """The next value: Element. Raises: ValueError naming file and line for what is no JSON."""
        self.peek()
        while True:
            where, start = self.where(), self.offset + self.place
            try:
                value, stop = DECODER.raw_decode(self.text, self.place)
            except json.JSONDecodeError as error:
                if self.ended or len(self.text) - self.place > LARGEST:
                    line = self.count_lines() + self.text.count("\n", self.place, error.pos)
                    where = f"{self.path}, line {line}, column {self.column(error.pos)}"
                    raise ValueError(f"{where}: malformed JSON: {error.msg}") from error
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            else:
                if not isinstance(value, (int, float)) or self.text[stop : stop + 1] in (*SPACE, *",]}") or self.ended:
                    break  # a number could go on in the next chunk
            self.more()
        text, self.place = self.text[self.place : stop], stop
        if not text.isascii():
            value = parse(text.encode("latin-1"), where)
        return Element(where, value, start, self.offset + stop)


def elements(path, key=None):
    """The elements of a list, or the members of an object, one by one.

    Args:
      path: the file: a list or an object; with `key`, an object that holds it under that name. What stands beside it
        is read over.
    Yields: Element. Raises: ValueError naming file and line for what is no JSON or not of this form.
    """
    with Scanner(path) as scanner:
        yield from _inside(scanner) if key is None else _below(scanner, key)
        if scanner.peek():
            raise ValueError(f"{scanner.where()}, column {scanner.column(scanner.place)}: malformed JSON: more behind the end")


def _below(scanner, key):
    """Elements of what an object holds under a key."""
    keys, comma = [], scanner.take("{")
    while comma != "}" and scanner.peek() != "}":
        keys.append(_name(scanner))
        if keys[-1] == key:
            yield from _inside(scanner)
        elif scanner.peek() in ("[", "{"):  # COCO's annotations are hundreds of megabytes
            for _ in _inside(scanner):
                pass
        else:
            scanner.value()
        comma = scanner.take(",", "}")
    if keys.count(key) != 1:
        raise ValueError(f"{scanner.path}: one key {key!r} was expected, found {', '.join(map(repr, keys)) or 'nothing'}")


def _name(scanner):
    name = scanner.value()
    if not isinstance(name.value, str):
        raise ValueError(f"{name.where}: malformed JSON: a name in quotes was expected, found {name.value!r}")
    scanner.take(":")
    return name.value


def _inside(scanner):
    """Elements up to the bracket that closes what opens here."""
    close = {"[": "]", "{": "}"}[scanner.take("[", "{")]
    if scanner.peek() == close:
        scanner.take(close)
        return
    number, comma = 0, ","
    while comma == ",":
        number += 1
        key = _name(scanner) if close == "}" else None
        found = scanner.value()
        where = f"{found.where}, item {number}" if key is None else f"{found.where}, key {key!r}"
        yield Element(where, found.value, found.start, found.stop, key)
        comma = scanner.take(",", close)


def records(path):
    """The records of a file, whatever its name says: a list, lines of JSON, or objects behind one another.

    Yields: Element; a line that cannot be read has its ValueError as value, behind it the next line follows.
    Raises: ValueError naming file and line where there is no going on.
    """
    with Scanner(path) as scanner:
        first = scanner.peek()
        while first == "{" and not scanner.ended and "\n" not in scanner.text[scanner.place :] and len(scanner.text) < LARGEST:
            scanner.more()
        line = scanner.text[scanner.place :].partition("\n")[0]
    if first == "[":
        yield from elements(path)
    elif first and (first != "{" or _is_object(line)):
        yield from _lines(path)
    else:
        yield from _objects(path)


def _is_object(line):
    """Whether a line of Latin-1 is an object by itself, or only begins one."""
    try:
        DECODER.raw_decode(line)
    except json.JSONDecodeError as error:
        return error.pos < len(line.rstrip())  # broken within the line; else it goes on in the next
    except ValueError:
        pass  # a key that stands twice
    return True


def _lines(path):
    start = 0
    with open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            where, stop = f"{path}, line {number}", start + len(line)
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if text.strip():
                try:
                    value = parse(text.strip(), where)
                except ValueError as error:
                    value = error
                yield Element(where, value, stop - len(text), stop)
            start = stop


def _objects(path):
    with Scanner(path) as scanner:
        while scanner.peek():
            yield scanner.value()


def read_at(path, element_start, element_stop, where):
    """The value of one record, by the bytes that it fills in a file that is not packed."""
    with open(path, "rb") as file:
        file.seek(element_start)
        return parse(file.read(element_stop - element_start), where)
