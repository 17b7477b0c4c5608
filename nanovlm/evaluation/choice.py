"""Multiple choice: by likelihood, by letter, by letter under rotation, and answers in ScienceQA's form.

likelihood   argmin over choices of - Σ log p(token | question, tokens before it)     SEED-Bench, arXiv:2307.16125
circular     N options are asked N times, each time rotated by one; right = all N     MMBench, arXiv:2307.06281
"""

import re
import string

import torch
import torch.nn.functional as F

from nanovlm.attention import Visible
from nanovlm.cross_attention import Media
from nanovlm.prefill import Rows, encode

LETTERS = string.ascii_uppercase


def score_choices(model, prompts, choices, visual_inputs, pictures=None):
    """How unlikely a model finds each choice after its prompt. Prompt and pictures pass through the decoder once.

    Args:
      model: vlm.VLM.
      prompts: list of B lists of ids; vlm.IMAGE_TOKEN where an image token stands.
      choices: per prompt a list of choices, each a list of at least one id.
      visual_inputs: per prompt a list of float[f, 3, H, W], in order.
      pictures: dict that keeps encoded pictures from call to call, as workspace.Workspace.pictures; None = none kept.
    Returns: per prompt a list of (sum, mean) float, the negative log-likelihood of each choice's tokens in nats.
    Raises: ValueError for a prompt without choices, an empty choice, or too little context.
    """
    flat = [ids for several in choices for ids in several]
    longest = max(map(len, flat), default=0)
    for place, (prompt, several) in enumerate(zip(prompts, choices, strict=True)):
        if not several or not all(several):
            raise ValueError(
                f"prompt {place} has {len(several)} choices; at least one is needed, and none may be empty"
            )
        if len(prompt) + max(map(len, several)) > model.decoder.config.context_length:
            raise ValueError(
                f"prompt {place} has {len(prompt)} tokens; with its longest choice of {max(map(len, several))} that is "
                f"more than the context of {model.decoder.config.context_length}"
            )
    pictures = {} if pictures is None else pictures
    with torch.no_grad():
        shown = [pixels for several in visual_inputs for pixels in several]
        encode(model, shown, pictures)
        keys = list(dict.fromkeys(map(id, shown)))
        tokens = [pictures[key][1] for key in keys]
        rows = Rows(model, prompts, tokens, [keys.index(id(pixels)) for pixels in shown], longest)
        rows.select([place for place, several in enumerate(choices) for _ in several])
        losses = _losses(model, rows, flat, longest)
    pairs = [(float(loss), float(loss) / len(ids)) for loss, ids in zip(losses.tolist(), flat)]
    left = iter(pairs)
    return [[next(left) for _ in several] for several in choices]


def _losses(model, rows, flat, longest):
    """Summed losses of the choices behind the cached prompts: float32[R]. Choices are padded on the right."""
    device = rows.logits.device
    targets = torch.tensor([ids + [0] * (longest - len(ids)) for ids in flat], device=device)  # R T
    real = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in flat], device=device)
    scores = rows.logits[:, None]  # what the prompt's last token says of the first
    if longest > 1:
        column = rows.cache.length
        columns = column + torch.arange(longest - 1, device=device).expand(len(flat), -1)  # R T-1
        visible = Visible(rows.pads[:, None].expand_as(columns), columns + 1)
        embeddings = model.decoder.embedding(targets[:, :-1])
        positions, modality = columns - rows.pads[:, None], torch.zeros_like(columns)
        media = rows.media
        if media is not None:
            media = Media(
                media.tokens, Visible(*(edge.expand_as(columns) for edge in (media.visible.first, media.visible.stop)))
            )
        hidden = model.decoder(embeddings, positions, visible, modality, cache=rows.cache, media=media)
        scores = torch.cat([scores, model.decoder.logits(hidden).float()], 1)
    losses = F.cross_entropy(scores.transpose(1, 2), targets, reduction="none")
    return (losses * real).sum(1)


def listed(options):
    """Options as they stand in a prompt, "A. …" on a line each: str."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options))


def rotations(options, answer):
    """The N questions of circular evaluation.

    Args:
      options: list of N str. answer: int, place of the right one.
    Returns: list of N (options, answer), each rotated by one more to the left.
    """
    return [(options[k:] + options[:k], (answer - k) % len(options)) for k in range(len(options))]


def parse_letter(text, options):
    """Which option an answer names: int, or None.

    A letter alone or marked as one ("B", "(B)", "B. two dogs", "answer: B"), else the one option whose words it says.
    """
    text = text.strip()
    letters = LETTERS[: len(options)]
    found = re.match(rf"\(?([{letters}])(?:[).:,]|$)", text) or re.search(
        rf"(?i:answer|option|choice)(?: is)?:? \(?([{letters}])\b(?! [a-z])", text
    )
    if found:
        return letters.find(found[1])
    words = text.lower().rstrip(".")
    named = [place for place, option in enumerate(options) if option.strip() and option.lower().rstrip(".") == words]
    if not named:
        named = [place for place, option in enumerate(options) if option.strip() and option.lower() in words]
    return named[0] if len(named) == 1 else None


def parse_science_qa(text):
    """The letter of an answer in ScienceQA's form, or None: a bare letter, "B. …", or one "The answer is B."."""
    text = text.strip()
    if len(text) == 1 and text in LETTERS:
        return text
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    found = re.findall(r"The answer is ([A-Z])\.", text)
    return found[0] if len(found) == 1 else None
