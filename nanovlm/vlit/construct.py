"""Make instruction data from annotations."""


def add_flags(parser):
    """The flags of `construct`."""


def run(wishes):
    """Run `construct`: list of str, what to print."""
    raise ValueError("not there yet")
