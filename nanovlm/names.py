"""Names: an unknown one is answered with the nearest known one; a module remembers what it was made with."""

import difflib


def nearest(name, known):
    """What to append to a message about an unknown name: " Did you mean 'x'?" or " Known: 'a', 'b'." """
    known = sorted(map(str, known))
    close = difflib.get_close_matches(str(name), known, n=1)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" Known: {', '.join(map(repr, known))}."


def check_known(what, name, known):
    """Raise ValueError, "{what} 'name'." with the nearest known one, unless the name is known."""
    if name not in known:
        raise ValueError(f"{what} {name!r}.{nearest(name, known)}")


def arguments(names):
    """What a constructor was called with, from `locals()` at its start: {name: value}, for config.json."""
    return {name: value for name, value in names.items() if name not in ("self", "__class__")}
