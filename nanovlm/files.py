"""Files that survive a kill: `replace` and `new_folder` write whole or not at all, `JsonLines` line by line."""

import contextlib
import hashlib
import io
import json
import mmap
import os
import shutil
from pathlib import Path

TEMPORARY = ".tmp"  # ends the name of what is not complete yet


def sync(path):
    """Force a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def listing(folder, pattern="*"):
    """The paths of a folder that fit a glob pattern, without systems' own (.NAMES, __MACOSX): list of Path, sorted."""
    def is_data(path):
        return not any(part.startswith((".", "__MACOSX")) for part in path.relative_to(folder).parts)

    return sorted(filter(is_data, Path(folder).glob(pattern)))


def digest(path):
    """The SHA-256 of a file: str."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def replace(path, write):
    """Write a file by write(its temporary Path), force it to the disk and rename it; on an error the old file stays."""
    temporary = Path(f"{path}{TEMPORARY}")
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_text(path, text):
    """`replace` with a text, in UTF-8."""
    replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


@contextlib.contextmanager
def new_folder(path):
    """Fill a folder under a temporary name, which this context yields; it is renamed to `path` at the end.

    An exception removes it. Its files are not forced to the disk; `replace` and `sync` do that where it matters.
    Raises: FileExistsError if `path` is a file or a folder with something in it.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} already exists; name another folder, or remove it")
    temporary = Path(f"{path}{TEMPORARY}")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.exists():
            path.rmdir()
        os.rename(temporary, path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def differences(old, new, where=""):
    """What two JSON objects, and the objects in them, have under equal names and not in common: list of str."""
    words = []
    for name in new | old:
        one, other = old.get(name), new.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            words += differences(one, other, f"{where}{name}.")
        elif one != other:
            words.append(f"{where}{name} {one!r}, now {other!r}")
    return words


class JsonLines:
    """A file of one JSON value a line. Reading passes over a last line that a kill cut short, appending removes it.

    Args:
      path: Path; the file may be absent.
      head: JSON object for the first line: all that the other lines depend on. None = no such line.
    Raises: ValueError if the file has another head, naming what differs.
    """

    def __init__(self, path, head=None):
        self.path, self.first = Path(path), 0  # first: lines before the values
        if head is None:
            return
        head = json.loads(json.dumps(head))  # as it reads back: tuples become lists
        found = next(iter(self), None)
        if found is None:
            self.add(head)
        elif found != head:
            differing = ", ".join(differences(found, head) if isinstance(found, dict) else ())
            raise ValueError(f"{path} was made with {differing or 'what is not known'}; give another --out")
        self.first = 1

    def places(self):
        """(first byte of its line, value) of each but the head. Raises: ValueError naming a line that is no JSON."""
        start = 0
        with open(self.path, "rb") if self.path.exists() else io.BytesIO() as file:
            for number, line in enumerate(file):
                if number >= self.first and line.endswith(b"\n"):
                    try:
                        yield start, json.loads(line)
                    except ValueError as error:
                        raise ValueError(f"{self.path}, line {number + 1}: no JSON ({error})") from error
                start += len(line)

    def __iter__(self):
        return (value for _, value in self.places())

    def at(self, start):
        """The value of the line that begins at a byte."""
        with open(self.path, "rb") as file:
            file.seek(start)
            return json.loads(file.readline())

    def add(self, *values):
        """Append values; they are in the file when this returns, though perhaps not on the disk: see `size`.

        Returns: int, the byte at which the first of their lines begins.
        Raises: OSError, of a full disk for example.
        """
        with open(self.path, "ab+") as file:
            if file.tell():
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                    whole = content.rfind(b"\n") + 1
                file.truncate(whole)
            start = file.seek(0, os.SEEK_END)
            file.write("".join(json.dumps(value) + "\n" for value in values).encode())
        return start

    def size(self):
        """Bytes of the file, forced to the disk: int. An absent file is created."""
        with open(self.path, "ab") as file:
            os.fsync(file.fileno())
            return file.tell()

    def cut(self, size):
        """Forget all but the first `size` bytes, a number that `size` or `places` gave."""
        os.truncate(self.path, size)
