"""What a published folder says of its pictures and of its chats: read and taken over, or named where it is not ours.

A processor is a list of values (preprocessor_config.json, or inside processor_config.json), a chat template a program,
which is recognised by words in it and never run.
"""

import dataclasses
import json

from nanovlm.data.templates import CHATML, CHATML_QWEN, CHATML_SMOLLM2, LLAVA, PHI, SMOLVLM, VICUNA, Template
from nanovlm.published.language import read_json

TEXT = Template("", "", "", "", turn_prefix="\n")  # of a language model that nobody taught to answer
SIGNS = (  # words of a chat template -> ours; the first that fits
    (("<end_of_utterance>",), SMOLVLM), (("named SmolLM",), CHATML_SMOLLM2), (("You are Qwen",), CHATML_QWEN),
    (("<|im_start|>",), CHATML), (("A chat between a curious", "ASSISTANT:"), VICUNA), (("ASSISTANT:",), LLAVA),
    (("Instruct: ", "Output:"), PHI),
)


def side(size):
    """Pixels of a size as processors write it: a number, {"shortest_edge": S} or {"height", "width"}; else None."""
    if isinstance(size, dict):
        return size.get("shortest_edge") or (size.get("height") if size.get("height") == size.get("width") else None)
    return size


def pictures_of(folder, shown, ours):
    """How a folder's pictures are read: ({"image_fit", "tiles", "preprocessing"} of an Assistant, list of notes).

    shown: the same of the recipe, of which stays what the folder does not tell.
    ours: bool, whether the recipe's fit is kept on purpose: its authors' code prepares pictures before their processor.
    """
    paths = folder / "processor_config.json", folder / "preprocessor_config.json"
    nested, own = (read_json(path) if path.exists() else {} for path in paths)
    told, notes, before = (nested.get("image_processor") or {}) | own, [], shown["preprocessing"]
    if not told:
        return shown, notes
    size, crop = side(told.get("size")), told.get("do_center_crop", True) and side(told.get("crop_size"))
    stretched = isinstance(told.get("size"), dict) and "shortest_edge" not in told["size"]
    fit = "pad" if told.get("do_pad") and not stretched else "crop" if crop or not stretched else "stretch"
    if ours and fit != shown["image_fit"]:
        notes.append(f"pictures are fitted by {shown['image_fit']!r}, as the authors' code does; the processor of "
                     f"{folder} alone says {fit!r}")
        fit = shown["image_fit"]
    named = {"mean": ("image_mean", 0.0), "std": ("image_std", 1.0)}
    values = {field: tuple(told.get(key) or vars(before)[field]) if told.get("do_normalize", True) else (plain,) * 3
              for field, (key, plain) in named.items()}
    scale = told.get("rescale_factor", 1 / 255) if told.get("do_rescale", True) else 1.0
    if abs(scale * 255 - 1) > 1e-6:  # (x scale - mean) / std, written with x / 255
        values = {field: tuple(value / (scale * 255) for value in several) for field, several in values.items()}
    values |= {"resample": told.get("resample", before.resample), "zoom": size / crop if size and crop else 1.0}
    tiles = shown["tiles"]
    if "max_image_size" in told:
        tiles = told["size"]["longest_edge"] / told["max_image_size"]["longest_edge"]
        tiles = tiles if told.get("do_image_splitting") else 0
    elif not told.get("do_resize", True):
        notes.append(f"the processor of {folder} leaves pictures their size; here each becomes a square, by {fit!r}")
    return {"image_fit": fit, "tiles": tiles, "preprocessing": dataclasses.replace(before, **values)}, notes


def template_of(folder, default=None):
    """How a model is asked: (Template, list of notes).

    default: the recipe's, where the folder has no chat template; None: its plain text goes on.
    """
    path = folder / "chat_template.jinja"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    for path in map(folder.joinpath, ("chat_template.json", "processor_config.json", "tokenizer_config.json")):
        if not text and path.exists() and (told := read_json(path).get("chat_template")):
            text = told if isinstance(told, str) else json.dumps(told)
    found = next((template for words, template in SIGNS if all(word in text for word in words)), None)
    if text and found is None:
        how = "as its recipe does" if default else "with the plain text"
        return default or TEXT, [f"{folder}'s chat template is none of ours and is not run; the model is asked {how}"]
    return found or default or TEXT, []
