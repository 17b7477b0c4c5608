"""Vision-language models, one readable file per concept."""

__version__ = "0.1.0"
