"""Vision-language models, one readable file per concept."""

__version__ = "0.1.0"


def load(folder, **options):
    """Open a model that train.py wrote, or a published one: `load("out/nano").ask("what is this?", images=["a.png"])`.

    Args: as of `nanovlm.recipes.load`. Returns: generation.chat.Assistant.
    """
    from nanovlm import recipes  # here, as all models come with it

    return recipes.load(folder, **options)
