"""Helpful errors for names: an unknown one is answered with the nearest known one."""

import difflib


def nearest(name, known):
    """Say which known name was probably meant.

    Args:
      name: the unknown name.
      known: iterable of the names that exist.
    Returns: str, " Did you mean 'x'?" or " Known: 'a', 'b'." to append to an error message.
    """
    known = sorted(map(str, known))
    close = difflib.get_close_matches(str(name), known, n=1)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" Known: {', '.join(map(repr, known))}."
