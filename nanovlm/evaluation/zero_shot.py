"""Zero-shot recognition: which of several captions does a contrastive model find closest to a picture?

CLIP, arXiv:2103.00020, Sec. 3.1.4. It measures a vision tower before there is a language model to ask.
"""

import torch

from nanovlm.data.batching import pixels_of
from nanovlm.data.easy_vqa import COLORS, SHAPES
from nanovlm.data.images import CLIP


@torch.no_grad()
def closest_captions(model, pixels, captions, tokenizer):
    """Choose a caption for every picture.

    Args:
      model: contrastive.ContrastiveModel.
      pixels: float32[B, 3, S, S].
      captions: list of str, written for the model as in training: BOS, caption, EOS.
      tokenizer: Tokenizer.
    Returns: list of B str, each one of the captions.
    """
    rows = [[tokenizer.bos, *tokenizer.encode(caption), tokenizer.eos] for caption in captions]
    longest, device = max(map(len, rows)), model.log_scale.device
    ids = torch.tensor([row + [tokenizer.pad] * (longest - len(row)) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    similar = model.views(pixels.to(device)) @ model.embed_texts(ids, lengths).T  # B views captions
    similar = similar.amax(dim=1)
    return [captions[place] for place in similar.argmax(dim=1).tolist()]


def easy_vqa_zero_shot(model, records, tokenizer, image_size, image_fit="crop", preprocessing=CLIP):
    """Shares of easy-VQA pictures whose colour and shape are told apart, among its 8 colours x 3 shapes.

    Args:
      model: contrastive.ContrastiveModel, its vision standing at image_size.
      records: list of Record of EasyVQA(kind="captions"); a colour or shape that a caption lacks is not counted.
      tokenizer: Tokenizer. image_size, image_fit, preprocessing: as in images.to_pixels, those of the model.
    Returns: {"color": share, "shape": share}; at chance 1/8 and 1/3.
    """
    captions = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
    pixels = pixels_of([record.visuals[0] for record in records], image_size, image_fit, preprocessing)
    found = [caption.split() for caption in closest_captions(model, pixels, captions, tokenizer)]
    truths = [set(record.conversations[0][-1].text.split()) for record in records]
    shares = {}
    for place, (name, words) in enumerate((("color", COLORS), ("shape", SHAPES))):
        known = [(chosen[place], truth) for chosen, truth in zip(found, truths) if truth & set(words)]
        shares[name] = sum(word in truth for word, truth in known) / len(known)
    return shares
