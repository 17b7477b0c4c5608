"""SimCSE: a sentence encoder that learns from sentences alone.

Every sentence goes through the same encoder twice; dropout makes two different vectors of it, which are to find each
other among all second vectors of the batch:

    l_i = -log  exp(sim(h_i, h_i') / τ) / Σ_j exp(sim(h_i, h_j') / τ)         SimCSE, arXiv:2104.08821, Eq. 2

(The VLIT review prints the same vector on both sides of the numerator in its Eq. 2, and i for j below the sum.)
Differs from the paper: a small encoder, trained here on the data set's own responses, instead of BERT; words become
numbers by hashing, so that no tokenizer is needed; the mean over words, not [CLS].

    B sentences, T words, W width
"""

import zlib

import torch
import torch.nn.functional as F
from torch import nn

from nanovlm.attention import Visible
from nanovlm.vit import Block
from nanovlm.vlit.words import tokens

TEMPERATURE, DROPOUT = 0.05, 0.1  # the paper's
BUCKETS, WIDTH, LONGEST = 4096, 64, 48  # rows of the embedding; channels; words of a sentence, the rest is cut
STEPS, BATCH, RATE = 60, 64, 1e-3  # optimizer steps, sentences, Adam's


def word_ids(texts):
    """int[B, T], right padded with 0, and int[B] lengths; a text without words is one word of its own."""
    words = [(tokens(text) or [repr(text)])[:LONGEST] for text in texts]
    rows = [[1 + zlib.crc32(word.encode("utf-8", "replace")) % (BUCKETS - 1) for word in row] for row in words]
    padded = nn.utils.rnn.pad_sequence(list(map(torch.tensor, rows)), batch_first=True)
    return padded, torch.tensor(list(map(len, rows)))


class SentenceEncoder(nn.Module):
    """One transformer block over hashed words, all of which see one another; the mean over words is the sentence."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(BUCKETS, WIDTH)
        self.positions = nn.Parameter(torch.randn(LONGEST, WIDTH) * 0.02)
        self.block = Block(WIDTH, 4, 2 * WIDTH)
        self.dropout = nn.Dropout(DROPOUT)
        self.project = nn.Linear(WIDTH, WIDTH)

    def forward(self, ids, lengths):
        """int[B, T], int[B] -> float[B, W] of length 1."""
        inside = torch.arange(ids.shape[1]) < lengths[:, None]  # B T
        x = self.dropout(self.embedding(ids) + self.positions[: ids.shape[1]])
        visible = Visible(torch.zeros_like(ids), lengths[:, None].expand_as(ids))  # all words, no padding
        x = self.dropout(self.block(x, visible, "sdpa"))
        mean = (x * inside[..., None]).sum(1) / lengths[:, None]
        return F.normalize(self.project(self.dropout(mean)), dim=-1)


def loss(first, second):
    """Eq. 2 as a mean over the batch: float[B, W] twice, of length 1 -> float[]."""
    return F.cross_entropy(first @ second.T / TEMPERATURE, torch.arange(len(first)))


def train_encoder(texts, seed=0, steps=STEPS):
    """An encoder of these texts: SentenceEncoder in evaluation mode. Equal texts never meet in a batch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        different = list(dict.fromkeys(texts))
        model = SentenceEncoder()
        optimizer = torch.optim.Adam(model.parameters(), RATE)
        for _ in range(steps if len(different) > 1 else 0):
            chosen = torch.randperm(len(different))[:BATCH].tolist()
            ids, lengths = word_ids([different[place] for place in chosen])
            optimizer.zero_grad()
            loss(model(ids, lengths), model(ids, lengths)).backward()
            optimizer.step()
    return model.eval()


def simcse_vectors(texts):
    """Vectors by an encoder trained on the texts themselves: list of N str -> float32[N, WIDTH] of length 1."""
    model = train_encoder(texts)
    with torch.no_grad():
        found = [model(*word_ids(texts[begin : begin + 256])) for begin in range(0, len(texts), 256)]
    return torch.cat(found).numpy()
