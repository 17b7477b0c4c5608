"""A model by its name, where no folder here is called so: `owner/name`, `owner/name@revision`, `owner/name:FILE`.

huggingface_hub fetches it into its own cache (HF_HOME), from HF_ENDPOINT, with the user's token; HF_HUB_OFFLINE=1 takes
what is there already. Of the weights safetensors are fetched if there are any, else .bin or .pt files.
"""

import re
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import EntryNotFoundError

NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?(:(?P<file>[\w./-]+))?")
BESIDE = ["*.json", "*.jinja", "*.txt", "*.model", "non_lora_trainables.bin"]  # sizes, tokenizer, processor


def find(place):
    """The Path of a model's folder or file: as it stands here, else fetched by name; what is no name stays a path.

    Raises: FileNotFoundError, which names both possibilities.
    """
    named = NAME.fullmatch(str(place))
    if Path(place).exists() or not named or ".." in str(place):
        return Path(place)

    def fetch(*patterns, **options):
        return Path(snapshot_download(named["name"], revision=named["revision"], allow_patterns=patterns, **options))

    try:
        if named["file"]:
            found = fetch(named["file"]) / named["file"]
        else:
            found = fetch(*BESIDE, "*.safetensors", ignore_patterns=["*/*"])
            if not any(found.glob("*.safetensors")):
                found = fetch(*BESIDE, "*.bin", "*.pt", "*.pth", ignore_patterns=["*/*"])
        if not found.exists():
            raise FileNotFoundError("it holds no such file")
        return found
    except (OSError, ValueError, EntryNotFoundError) as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise FileNotFoundError(f"no {'file' if named['file'] else 'folder'} {place} here, and {constants.ENDPOINT} "
                                f"does not give {named['name']}: {said}") from None
