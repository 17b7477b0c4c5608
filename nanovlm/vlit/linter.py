"""Rules that a sample keeps or breaks, checked without a model.

    python -m nanovlm.vlit lint FILE [--images FOLDER]
"""


def add_flags(parser):
    """The flags of `lint`."""
    parser.add_argument("file", metavar="FILE", help="LLaVA-style .json or .jsonl")
    parser.add_argument("--images", metavar="FOLDER", help="where image paths start (default: the folder of FILE)")


def check(sample, images=None):
    """What a sample breaks.

    Args:
      sample: samples.Sample.
      images: folder where its image paths start; None = pictures are not looked at.
    Returns: list of (rule, words) str; empty = keeps them all.
    """
    found = []
    if not sample.turns:
        found.append(("empty", "no turn at all"))
    return found


def run(wishes):
    """Check every sample of a file: list of str, what to print."""
    raise ValueError("not there yet")
