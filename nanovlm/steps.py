"""A stage's loss as the `forward` of one module, the door through which DDP and FSDP2 let a model be trained.

In every micro-batch every process runs every module, or the others would wait for its gradients: a micro-batch of text
alone also shows a blank picture, in a row without a trained token, whose gradient is zero. A contrastive loss compares
the pictures and captions of all processes, so their features are gathered, with their gradient.
"""

import dataclasses

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from nanovlm.vlm import IGNORE, IMAGE_TOKEN, Batch


class LanguageStep(nn.Module):
    """A vision-language model whose forward is its loss; lean: as in `VLM.loss`."""

    def __init__(self, model, lean=False):
        super().__init__()
        self.model = model
        self.lean = lean

    def forward(self, batch):
        """Batch -> (float[] sum in nats, int trained tokens), as `VLM.loss`.

        Where pictures are shown, what of the bridge only clips use (an embedding per frame) takes part with zero: DDP
        waits for every gradient.
        """
        loss, trained = self.model.loss(batch, lean=self.lean)
        if batch.pixels is not None:
            loss = loss + 0 * sum(p.sum() for p in self.model.bridge.parameters() if p.requires_grad)
        return loss, trained


def no_rows():
    """A Batch without a row, for a process that has no micro-batch left while others have."""
    ids, none = torch.zeros(0, 1, dtype=torch.long), torch.zeros(0, dtype=torch.long)
    return Batch(ids, ids, ids, ids, None, none, none, none)


def with_blank_picture(batch, model, image_size):
    """A Batch without pictures, and one more row that shows a blank one and trains nothing.

    Args:
      batch: vlm.Batch with pixels None. model: vlm.VLM. image_size: pixels.
    Returns: vlm.Batch; its loss and gradients are the given one's, and zero for what only pictures reach.
    """
    tokens = model.num_image_tokens(image_size)
    picture = [IMAGE_TOKEN] * tokens if model.media_token is None else [model.media_token]
    row = torch.tensor([*picture, 0])  # some word behind it: what only text reaches is reached, too
    length = max(batch.ids.shape[1], len(row))

    def add(values, new, padding):
        widened = F.pad(values, (0, length - values.shape[1]), value=padding)
        return torch.cat([widened, F.pad(new, (0, length - len(new)), value=padding)[None]])

    return dataclasses.replace(
        batch,
        ids=add(batch.ids, row, 0), labels=add(batch.labels, torch.full_like(row, IGNORE), IGNORE),
        segments=add(batch.segments, torch.zeros_like(row), -1), positions=add(batch.positions, torch.arange(len(row)), 0),
        pixels=torch.zeros(1, 3, image_size, image_size), frames=torch.ones(1, dtype=torch.long),
        shown=torch.zeros(1, dtype=torch.long), owner=torch.tensor([len(batch.ids)]),
    )  # fmt: skip


class ContrastiveStep(nn.Module):
    """A pair of towers whose forward is a share of the contrastive loss of all processes' pictures and captions."""

    def __init__(self, model, processes):
        super().__init__()
        self.model = model
        self.processes = processes

    def forward(self, pixels, ids, lengths, right, looks):
        """This process's pictures and captions, as for the model's `loss` -> float[]; the shares add up to the loss."""
        captions = [tuple(row[:length]) for row, length in zip(ids.tolist(), lengths.tolist())]
        everything = self.processes.gather((captions, right.tolist()))
        images = Gather.apply(self.model.embed_images(pixels, looks), [len(right) for _, right in everything], self.processes.rank)
        texts = Gather.apply(self.model.embed_texts(ids, lengths), [len(found) for found, _ in everything], self.processes.rank)
        first, right = merge_captions(everything)
        return self.model.match(images, texts[first.to(texts.device)], right.to(images.device)) / self.processes.size


class Gather(torch.autograd.Function):
    """The rows of all processes behind one another; the gradient of a row comes from all of them."""

    @staticmethod
    def forward(ctx, x, counts, rank):
        """x float[counts[rank], E], counts: rows of each process -> float[sum of counts, E]."""
        padded = F.pad(x, (0, 0, 0, max(counts) - len(x)))
        found = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(found, padded.contiguous())
        ctx.rows = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        return torch.cat([rows[:count] for rows, count in zip(found, counts)])

    @staticmethod
    def backward(ctx, gradient):
        """Add up what every process's share of the loss says about every row; keep one's own rows."""
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[ctx.rows], None, None


def merge_captions(everything):
    """The captions of all processes, each once, as one process would have them.

    Args:
      everything: per process (captions: list of tuples of ids, right: list of lists of bool, pictures x captions).
    Returns: (int64[C], where among all captions each different one stands first; bool[B, C], which a picture has).
    """
    places, first, rows, number = {}, [], [], 0
    for captions, right in everything:
        for caption in captions:
            if caption not in places:
                places[caption] = len(places)
                first.append(number)
            number += 1
        rows += [[places[caption] for caption, one in zip(captions, row) if one] for row in right]
    merged = torch.zeros(len(rows), len(places), dtype=torch.bool)
    for picture, columns in enumerate(rows):
        merged[picture, columns] = True
    return torch.tensor(first), merged
