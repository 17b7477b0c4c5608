"""A batch as text: which tokens are trained, which are only read, where image tokens stand.

On a terminal by colour (trained green, read grey, image tokens blue), elsewhere by marks ([trained], <image x16>).
"""

import itertools

from nanovlm.vlm import IGNORE, IMAGE_TOKEN

GREEN, GREY, BLUE, PLAIN = "\x1b[32m", "\x1b[90m", "\x1b[34m", "\x1b[0m"
COLORS = {"trained": GREEN, "read": GREY, "image": BLUE}


def use_color(stream, environment):
    """Whether to colour what is written to a stream: on a terminal, unless NO_COLOR (no-color.org) is set."""
    return stream.isatty() and not environment.get("NO_COLOR")


def legend(color):
    """One line that explains the marks: str."""
    names = {"trained": "trained (has a loss)", "read": "read only", "image": "<image xN> N image tokens"}
    return "   ".join(mark(text, kind, color) for kind, text in names.items())


def mark(text, kind, color):
    """A text that stands for tokens of one kind."""
    if color:
        return f"{COLORS[kind]}{text}{PLAIN}"
    return f"[{text}]" if kind == "trained" else text


def paint(batch, tokenizer, color):
    """A vlm.Batch as lines, two per row: its size and pictures, then its tokens, by colour or by marks: list of str.

    Line breaks are shown as ↵, other control characters as escapes.
    """
    lines = []
    for b in range(len(batch.ids)):
        length = int((batch.segments[b] >= 0).sum())
        ids, labels = batch.ids[b, :length].tolist(), batch.labels[b, :length].tolist()
        kinds = ["image" if id == IMAGE_TOKEN else "read" if label == IGNORE else "trained"
                 for id, label in zip(ids, labels)]
        trained, padding = length - labels.count(IGNORE), batch.ids.shape[1] - length
        pictures = batch.shown[batch.owner == b].tolist()
        lines.append(f"row {b}: {length} tokens, {trained} trained, {padding} padding, pictures {pictures}")
        painted = ""
        for kind, run in itertools.groupby(zip(kinds, ids), key=lambda token: token[0]):
            run = [id for _, id in run]
            painted += mark(f"<image x{len(run)}>" if kind == "image" else printable(run, tokenizer), kind, color)
        lines.append(painted)
    return lines


def printable(ids, tokenizer):
    """Ids as printable text, special tokens by name; words are decoded together, so that no character is cut."""
    text = ""
    for special, run in itertools.groupby(ids, key=tokenizer.special_names.get):
        text += special * len(list(run)) if special else tokenizer.decode(list(run))
    text = text.replace("\n", "↵")
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
