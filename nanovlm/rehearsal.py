"""What one example costs in training, found without doing it: products to compute, and bytes to keep for the way back.

The model runs on tensors that have shapes and no numbers (torch's "meta" device), with the stage's parts frozen.
Autograd itself then says what it would keep until the backward pass, and every product tells what it will cost there:

  y = W x          2 |W| operations a token forward
  dx = W^T dy      as many again, where something before this layer trains
  dW = dy x^T      as many again, where the layer itself trains

So a frozen language model behind a bridge that trains costs 2/3 of one that trains, and a frozen tower 1/3. The
backends of a GPU are taken for granted: fused attention keeps q, k, v, its output and one number a query, never the
square of scores, and skips what a causal mask hides. Norms, activations and sums are not counted: they are memory traffic.

F frames, T tokens, N image tokens
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from nanovlm.attention import causal_rows, rope_tables
from nanovlm.cross_attention import Media
from nanovlm.decoder import Context
from nanovlm.linear_cross_entropy import ROWS, linear_cross_entropy
from nanovlm.modality_adaptive import Routing

META = torch.device("meta")


@dataclass
class Cost:
    """Of one part of the model, for one example."""

    forward: float = 0.0  # operations (a multiplication with its addition counts as two)
    backward: float = 0.0
    kept: int = 0  # bytes of activations that wait for the backward pass
    copies: int = 0  # bytes of weights in bfloat16 that wait with them; once for all examples of a micro-batch
    working: int = 0  # bytes that come and go within; once for all examples too

    def __add__(self, other):
        return Cost(self.forward + other.forward, self.backward + other.backward, self.kept + other.kept,
                    self.copies + other.copies, self.working + other.working)

    @property
    def flops(self):
        """Operations of both passes."""
        return self.forward + self.backward


class FusedAttention(torch.autograd.Function):
    """Attention that computes nothing and keeps what a fused kernel keeps."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, _):
        raise NotImplementedError("a rehearsal has no backward pass")


@dataclass
class Rehearsal(TorchFunctionMode):
    """Within, products are counted into `cost`, and in bfloat16 made as autocast makes them.

    bfloat16: whether products cast what they read.
    """

    bfloat16: bool
    cost: Cost = field(default_factory=Cost)
    seen: dict = field(default_factory=dict)  # storage -> a tensor of it, so that its address stays taken
    weights: dict = field(default_factory=dict)  # id(Parameter) -> its copy in bfloat16

    def __post_init__(self):
        super().__init__()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self.attention(*[self.cast(one) for one in args[:3]], kwargs.get("is_causal", False))
        if func not in PRODUCTS:
            return func(*args, **kwargs)
        args = [self.cast(one) if isinstance(one, torch.Tensor) else one for one in args]
        kwargs = {name: self.cast(one) if isinstance(one, torch.Tensor) else one for name, one in kwargs.items()}
        out = func(*args, **kwargs)
        self.count(2.0 * out.numel() * PRODUCTS[func](args), args[0], args[1])
        return out

    def count(self, forward, *inputs):
        """Operations of one product, and of the product that each input's gradient will take."""
        self.cost.forward += forward
        if torch.is_grad_enabled():
            self.cost.backward += forward * sum(one.requires_grad for one in inputs)

    def attention(self, q, k, v, is_causal):
        """Two products over the pairs that are visible; their backward takes four."""
        pairs = q[..., 0].numel() * k.shape[2] * ((q.shape[2] + 1) / (2 * q.shape[2]) if is_causal else 1)
        for width in (q.shape[-1], v.shape[-1]):
            self.count(2.0 * pairs * width, *[q.detach().requires_grad_(q.requires_grad or k.requires_grad)] * 2)
        return FusedAttention.apply(q, k, v)

    def cast(self, tensor):
        """A float tensor in the products' type; a Parameter once, as autocast's cache has it."""
        if not self.bfloat16 or not tensor.is_floating_point() or tensor.dtype == torch.bfloat16:
            return tensor
        if not isinstance(tensor, torch.nn.Parameter):
            return tensor.to(torch.bfloat16)
        if id(tensor) not in self.weights:
            self.weights[id(tensor)] = tensor.to(torch.bfloat16)
        return self.weights[id(tensor)]

    def keep(self, tensor):
        """Autograd's question what to keep: note each storage once."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen[storage._cdata] = tensor
        return tensor

    def close(self, parameters):
        """Add what was kept to the cost; parameters: those of the model, which lie in memory anyway."""
        copies = {copy.untyped_storage()._cdata for copy in self.weights.values()}
        ours = {parameter.untyped_storage()._cdata for parameter in parameters}
        for storage, tensor in self.seen.items():
            size = tensor.untyped_storage().nbytes()
            if storage in copies:
                self.cost.copies += size
            elif storage not in ours:
                self.cost.kept += size


PRODUCTS = {  # function -> how many products one number of its output sums up
    F.linear: lambda args: args[0].shape[-1],
    F.conv2d: lambda args: args[1][0].numel(),
    torch.matmul: lambda args: args[0].shape[-1],
    torch.Tensor.matmul: lambda args: args[0].shape[-1],
    torch.Tensor.__matmul__: lambda args: args[0].shape[-1],
    torch.bmm: lambda args: args[0].shape[-1],
}


def rehearse(work, parameters, bfloat16):
    """Run a function as a rehearsal: (what it returned, Cost)."""
    rehearsal = Rehearsal(bfloat16)
    with rehearsal, torch.autograd.graph.saved_tensors_hooks(rehearsal.keep, lambda tensor: tensor):
        returned = work()
    rehearsal.close(parameters)
    return returned, rehearsal.cost


def example_cost(model, stage, text_tokens, num_frames=1, recompute=False):
    """What an example of one visual input costs.

    Args:
      model: vlm.VLM on the meta device.
      stage: Stage; its parts are those that train, its precision that of the products. The tower is resized.
      text_tokens: tokens of the row beside the image tokens, all of them trained (what is not costs no scores).
      num_frames: pictures of the visual input; 0 = an example of text alone.
      recompute: whether blocks are run again in the backward pass (wrapping.surround); work that the model does not need
        is not counted as its operations.
    Returns: dict part ("vision", "bridge", "decoder", "head") -> Cost.
    """
    model.vision.resize(stage.image_size)
    for part, parameters in model.parts().items():
        for parameter in parameters.values():
            parameter.requires_grad_(part in stage.learning_rates)
    everything, bfloat16 = list(model.parameters()), stage.precision == "bfloat16"
    costs, tokens = {"vision": Cost(), "bridge": Cost()}, None
    if num_frames:
        pixels = torch.empty(num_frames, 3, stage.image_size, stage.image_size, device=META)
        features, costs["vision"] = rehearse(lambda: model.vision(pixels), everything, bfloat16)
        tokens, costs["bridge"] = rehearse(lambda: model.bridge(features.flatten(0, 1)[None], num_frames), everything, bfloat16)
    hidden, costs["decoder"] = rehearse(lambda: decode(model, tokens, text_tokens), everything, bfloat16)
    _, costs["head"] = rehearse(lambda: score(model, hidden[0, -text_tokens:], bfloat16), everything, bfloat16)
    settle_head(costs["head"], model, text_tokens, 2 if bfloat16 else 4)
    if recompute:
        forget(costs["vision"], num_frames * (model.vision.num_patches(stage.image_size) + model.vision.config.class_token),
               model.vision.config.width, len(model.vision.blocks))  # fmt: skip
        forget(costs["decoder"], hidden.shape[1], model.decoder.config.width, len(model.decoder.layers))
    return costs


def forget(cost, tokens, width, num_blocks):
    """Keep of every block what goes into it, in float32, and of one block the inside."""
    if cost.kept:
        cost.kept = 4 * tokens * width * num_blocks + cost.kept // num_blocks


def settle_head(cost, model, text_tokens, size):
    """Tell apart what the loss takes per example and what it takes once; size: bytes of a number in a product."""
    head = model.decoder.embedding if model.decoder.lm_head is None else model.decoder.lm_head
    vocab_size, width = head.weight.shape
    if not model.chunked_loss:
        cost.kept += 2 * 4 * text_tokens * vocab_size  # gradients of the scores and of their logarithms
        return
    per_number = 4 if size == 4 else 4 + size  # sums in float32, beside what is read or left in bfloat16
    cost.working = per_number * ROWS * vocab_size
    if head.weight.requires_grad:  # its gradient is made in the forward pass, once for all examples
        cost.kept -= size * vocab_size * width
        cost.working += per_number * vocab_size * width


def pair_cost(contrastive, stage, num_tokens):
    """What a picture with its caption costs in a contrastive stage; the product of all pairs is left out.

    Args: contrastive: contrastive.ContrastiveModel on the meta device. stage: Stage. num_tokens: int, of the caption.
    Returns: dict "vision", "text_tower" -> Cost.
    """
    contrastive.vision.resize(stage.image_size)
    for part, parameters in contrastive.parts().items():
        for parameter in parameters.values():
            parameter.requires_grad_(part in stage.learning_rates)
    everything, bfloat16 = list(contrastive.parameters()), stage.precision == "bfloat16"
    pixels = torch.empty(1, 3, stage.image_size, stage.image_size, device=META)
    ids = torch.empty(1, num_tokens, dtype=torch.long, device=META)
    lengths = torch.empty(1, dtype=torch.long, device=META)
    return {
        "vision": rehearse(lambda: contrastive.embed_images(pixels), everything, bfloat16)[1],
        "text_tower": rehearse(lambda: contrastive.embed_texts(ids, lengths), everything, bfloat16)[1],
    }


def decode(model, image_tokens, text_tokens):
    """`Decoder.forward` of a row whose modalities are known by their number alone.

    Args: image_tokens: float[1, N, W] or None. text_tokens: int.
    Returns: float[1, T, W].
    """
    decoder, media, placed = model.decoder, None, 0
    x = decoder.embedding(torch.empty(1, text_tokens, dtype=torch.long, device=META))
    if image_tokens is not None and model.media_token is not None:
        visible = causal_rows(1, text_tokens, META)
        media = Media(image_tokens, type(visible)(visible.first, visible.stop, "full"))
    elif image_tokens is not None:
        placed = image_tokens.shape[1]
        x = torch.cat([image_tokens.to(x.dtype), x], dim=1)
    positions = torch.arange(x.shape[1], device=META)[None]
    cos, sin = rope_tables(positions, decoder.config.num_rotary, decoder.config.rope_base)
    places = torch.arange(x.shape[1], device=META)
    routing = Routing(positions, places[placed:], places[:placed]) if placed else Routing(None, None, None)
    context = Context(cos, sin, causal_rows(1, x.shape[1], META), routing, None, media, "sdpa", None)
    if decoder.positions is not None:
        x = x + F.embedding(positions, decoder.positions)
    for index, layer in enumerate(decoder.layers):
        x = layer(x, context, index)
    return decoder.norm(x)


def score(model, hidden, bfloat16):
    """The loss of `VLM.loss`, from hidden float[T, W]."""
    decoder, labels = model.decoder, torch.empty(len(hidden), dtype=torch.long, device=META)
    head = decoder.embedding if decoder.lm_head is None else decoder.lm_head
    if model.chunked_loss:
        dtype = torch.bfloat16 if bfloat16 else hidden.dtype
        return linear_cross_entropy(hidden.to(dtype), head.weight.to(dtype), labels)
    return F.cross_entropy(F.linear(hidden, head.weight).float(), labels, reduction="sum")
