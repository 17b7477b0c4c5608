"""Flamingo's gated cross-attention: the words look at the picture from inside the language model.

Image tokens never enter the row. One media token, an ordinary word, stands where a picture is shown, and some layers
of the frozen decoder get a block in front of them in which every token asks the latest picture before it. Two gates
start closed, so that training begins with the language model as it was.

Flamingo, arXiv:2204.14198, Sec. 2.2 and 2.3. With x the hidden states of the words and m the image tokens:
  x <- x + tanh(a) softmax(q k^T / sqrt(D)) v W_o,   q = LN(x) W_q,  k = m W_k,  v = m W_v
  x <- x + tanh(b) W_2 GELU(W_1 LN(x))                a = b = 0 at the start
Differs from the paper, as OpenFlamingo (mlfoundations/open_flamingo) does:
- GELU in the feed-forward, where the paper has a squared ReLU;
- the media keep the width of the vision tower, and no norm stands in front of their keys and values;
- 8 heads of 64 channels at every size of the language model, where the paper has as many as the language model.

A token sees the picture whose number *equals* the count of media tokens so far; with `>=` it would see all before it.

B rows, T tokens, I pictures of the fullest row, L image tokens of each, H heads, D head width, W width
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nanovlm.attention import Visible, attention, attention_weights, causal


@dataclass(frozen=True)
class Media:
    """The pictures of a batch, and which of them each token sees.

    tokens: float[B, I * L, media_width], the pictures of each row behind one another, zeros where a row has fewer.
    visible: attention.Visible of the T tokens over the I * L image tokens.
    kept: per decoder layer its keys and values (k, v) of the tokens, float[B, H, I * L, D], or None; empty = each layer
      makes them when it needs them. `Decoder.keep` fills it.
    """

    tokens: Tensor
    visible: Visible
    kept: tuple = ()

    def step(self):
        """The same for the one token that comes behind the last: it sees what the last saw, whatever it is itself."""
        return Media(self.tokens, Visible(self.visible.first[:, -1:], self.visible.stop[:, -1:]))

    def select(self, rows):
        """The same for other rows: int64[N], new row n continues old row rows[n]."""
        return Media(self.tokens[rows], Visible(self.visible.first[rows], self.visible.stop[rows]))


def latest_picture(is_media, segments, num_image_tokens):
    """Every token sees the latest picture of its own document, none before the first: Visible over the row's pictures.

    Args: is_media: bool[B, T], where a media token stands; it sees its own picture. segments: as in `attention.causal`.
    """
    shown = is_media.cumsum(dim=1)  # B T, pictures so far: Flamingo's "text time"
    document = causal(segments).first  # B T, where the token's document begins
    before = (shown - is_media.long()).gather(1, document)  # pictures of the documents packed in front
    stop = torch.where(shown > before, shown * num_image_tokens, 0)
    return Visible((stop - num_image_tokens).clamp(min=0), stop)


def gather_media(image_tokens, shown, is_media, segments):
    """Put the pictures of each row behind one another: Media, or None where nothing is shown.

    image_tokens: list of M float[L, media_width]. shown: list of int, which of them stands at each True of is_media
    bool[B, T], in row-major order. segments: int[B, T]. Raises: ValueError for pictures of unequal length.
    """
    if not shown:
        return None
    lengths = sorted({len(tokens) for tokens in image_tokens})
    if len(lengths) > 1:
        raise ValueError(f"pictures of {lengths} image tokens in one batch; cross-attention needs equally many of each")
    row, column = is_media.nonzero(as_tuple=True)
    place = is_media.cumsum(dim=1)[row, column] - 1  # S, number of the picture within its row
    pictures = torch.stack(image_tokens)[torch.as_tensor(shown, device=is_media.device)]  # S L W
    tokens = pictures.new_zeros(len(is_media), int(place.max()) + 1, *pictures.shape[1:])
    tokens = tokens.index_put((row, place), pictures)  # B I L W
    return Media(tokens.flatten(1, 2), latest_picture(is_media, segments, lengths[0]))


NUM_HEADS, HEAD_WIDTH = 8, 64  # channels, whatever the width


class GatedCrossAttention(nn.Module):
    """Cross-attention of words of `width` channels to media of `media_width`, and feed-forward, each behind a gate."""

    def __init__(self, width, media_width):
        super().__init__()
        inner = NUM_HEADS * HEAD_WIDTH
        self.norm = nn.LayerNorm(width)
        self.q = nn.Linear(width, inner, bias=False)
        self.k = nn.Linear(media_width, inner, bias=False)
        self.v = nn.Linear(media_width, inner, bias=False)
        self.o = nn.Linear(inner, width, bias=False)
        self.attention_gate = nn.Parameter(torch.zeros(1))
        widen, narrow = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        self.ffn = nn.Sequential(nn.LayerNorm(width), widen, nn.GELU(), narrow)
        self.ffn_gate = nn.Parameter(torch.zeros(1))

    def forward(self, x, media, backend="sdpa", out=None, index=None):
        """Let the words look: float[B, T, W] -> the same shape.

        Args:
          media: Media; None = no picture, and only the feed-forward works.
          out: dict; when given, out["cross_attention"] gets one more float[B, H, T, I * L].
          index: number of the decoder layer, to find what the media keep for it.
        """
        if media is not None:
            q = self.heads(self.q(self.norm(x)))  # B H T D
            k, v = media.kept[index] if media.kept else self.keys_and_values(media.tokens)
            if out is not None:
                out.setdefault("cross_attention", []).append(attention_weights(q, k, media.visible))
            seen = attention(q, k, v, media.visible, backend)  # zeros for a token that no picture precedes
            x = x + self.attention_gate.tanh() * self.o(seen.transpose(1, 2).flatten(-2))
        return x + self.ffn_gate.tanh() * self.ffn(x)

    def keys_and_values(self, tokens):
        """Image tokens float[B, I * L, media_width] -> two float[B, H, I * L, D]."""
        return self.heads(self.k(tokens)), self.heads(self.v(tokens))

    def heads(self, x):
        """float[B, S, H * D] -> float[B, H, S, D]."""
        return x.unflatten(-1, (NUM_HEADS, HEAD_WIDTH)).transpose(1, 2)
