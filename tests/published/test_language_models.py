"""The decoder as LLaMA, SmolLM2, Qwen2, Phi-2 and OPT against transformers: values, gradients, padding and the cache.

Tiny random models in float32, every parameter moved by N(0, 0.05^2) so that each bias and norm counts.
"""

import pytest
import torch
import torch.nn.functional as F

from nanovlm.attention import Visible, causal
from nanovlm.cache import KeyValueCache
from nanovlm.decoder import Decoder, DecoderConfig, LayerOptions, RMSNorm
from nanovlm.published import language
from nanovlm.published.weights import to_ours

transformers = pytest.importorskip("transformers")

CLOSE = dict(atol=1e-5, rtol=1e-5)

def llama(cls="Llama", num_heads=4, num_kv_heads=4, **options):
    """A model of transformers and its rename table; Qwen2's class differs by its biases alone."""
    config = dict(
        vocab_size=61, hidden_size=12 * num_heads, intermediate_size=56, num_hidden_layers=3, rms_norm_eps=1e-3,
        num_attention_heads=num_heads, num_key_value_heads=num_kv_heads, max_position_embeddings=40,
        tie_word_embeddings=False,
    )  # fmt: skip
    config = getattr(transformers, f"{cls}Config")(**(config | options))
    return getattr(transformers, f"{cls}ForCausalLM")(config), language.LLAMA


def phi():
    """RoPE on the first int(0.4 * 20) = 8 of 20 channels."""
    config = transformers.PhiConfig(
        vocab_size=61, hidden_size=80, intermediate_size=72, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=40, layer_norm_eps=1e-3, hidden_act="gelu_new", resid_pdrop=0.0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.4},
    )  # fmt: skip
    return transformers.PhiForCausalLM(config), language.PHI


def opt():
    """Odd head width 9: nothing turns."""
    config = transformers.OPTConfig(
        vocab_size=61, hidden_size=36, ffn_dim=56, num_hidden_layers=3, num_attention_heads=4, word_embed_proj_dim=36,
        max_position_embeddings=40, dropout=0.0, pad_token_id=1,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config), language.OPT


def decoder(width, num_heads, ffn_width, num_kv_heads=None, **options):
    """Our side, by plain options."""
    layers = (LayerOptions(),) * 3
    return Decoder(DecoderConfig(61, width, num_heads, num_kv_heads or num_heads, ffn_width, 40, layers, **options))


RMS = dict(norm_eps=1e-3)
PHI = dict(
    norm="layer", norm_eps=1e-3, ffn="plain", activation="gelu_tanh", qkv_bias="qkv", output_bias=True, ffn_bias=True,
    head_bias=True, parallel=True, rotary_width=8,
)  # fmt: skip
OPT = dict(
    norm="layer", norm_eps=1e-5, ffn="plain", activation="relu", qkv_bias="qkv", output_bias=True, ffn_bias=True,
    tied_head=True, rotary_width=0, position_offset=2,
)  # fmt: skip
FAMILIES = {
    "llama": (lambda: llama(), lambda: decoder(48, 4, 56, **RMS)),
    "smollm2": (
        lambda: llama(num_heads=9, num_kv_heads=3, tie_word_embeddings=True,
                      rope_parameters={"rope_type": "default", "rope_theta": 100000.0}),
        lambda: decoder(108, 9, 56, 3, **RMS, tied_head=True, rope_base=1e5),
    ),
    "qwen2": (
        lambda: llama("Qwen2", num_kv_heads=2, tie_word_embeddings=True),
        lambda: decoder(48, 4, 56, 2, **RMS, tied_head=True, qkv_bias="qkv"),
    ),
    "phi": (phi, lambda: decoder(80, 4, 72, **PHI)),
    "opt": (opt, lambda: decoder(36, 4, 56, **OPT)),
}  # fmt: skip


@pytest.fixture(params=FAMILIES)
def pair(request):
    """(transformers' model, ours with its weights, the rename table)."""
    torch.manual_seed(0)
    make_theirs, make_ours = FAMILIES[request.param]
    (theirs, table), ours = make_theirs(), make_ours()
    theirs = theirs.float().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    ours.load_state_dict(to_ours(table, dict(theirs.named_parameters()), ours.state_dict()))  # every name on both sides
    return theirs, ours, table


def padded(front, behind):
    """Rows of 7 and of fewer tokens: (real bool[2, 7], segments, positions)."""
    columns = torch.arange(7)
    real = (columns >= torch.tensor([[0], [front]])) & (columns < torch.tensor([[7], [7 - behind]]))
    return real, real.long() - 1, (real.cumsum(1) - 1).clamp(min=0)


def our_logits(model, embeddings, segments, positions, **options):
    modality = torch.zeros_like(segments)
    return model.logits(model(embeddings, positions, causal(segments), modality, **options))


def grads(logits, real, weights, embeddings):
    """Of a random weighted sum of the real tokens' logits."""
    (logits * weights)[real].sum().backward()
    return embeddings.grad


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("front, behind", [(0, 0), (3, 0), (0, 2)])
def test_values_and_gradients(pair, front, behind, backend):
    theirs, ours, table = pair
    ours.backend = backend
    real, segments, positions = padded(front, behind)
    ids = torch.randint(2, 61, (2, 7))
    embeddings = ours.embedding(ids).detach()
    their_input, our_input = embeddings.clone().requires_grad_(), embeddings.clone().requires_grad_()
    logits = theirs(inputs_embeds=their_input, attention_mask=real.long(), position_ids=positions).logits
    found = our_logits(ours, our_input, segments, positions)
    torch.testing.assert_close(found[real], logits[real], **CLOSE)
    weights = torch.randn_like(logits)
    expected = grads(logits, real, weights, their_input)
    torch.testing.assert_close(grads(found, real, weights, our_input)[real], expected[real], atol=1e-4, rtol=1e-4)
    their_grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in theirs.named_parameters()}
    their_grads = to_ours(table, their_grads, ours.state_dict())
    for name, parameter in ours.named_parameters():
        if parameter.grad is None:  # words came in as embeddings: an untied table has nothing to learn
            assert name == "embedding.weight" and not their_grads[name].any()
            continue
        assert parameter.grad.abs().sum() > 0, name
        scale = max(1.0, float(their_grads[name].abs().max()))  # sums over 12 tokens and 61 words
        torch.testing.assert_close(
            parameter.grad, their_grads[name], atol=2e-5 * scale, rtol=1e-4, msg=lambda text: f"{name}: {text}"
        )


@torch.no_grad()
def test_ids_and_their_own_positions(pair):
    """Left padding; OPT makes its positions from the mask itself, the others are given them."""
    theirs, ours, _ = pair
    real, segments, positions = padded(3, 0)
    ids = torch.where(real, torch.randint(2, 61, (2, 7)), 1)
    given = {} if isinstance(theirs, transformers.OPTForCausalLM) else {"position_ids": positions}
    logits = theirs(input_ids=ids, attention_mask=real.long(), **given).logits
    found = our_logits(ours, ours.embedding(ids), segments, positions)
    torch.testing.assert_close(found[real], logits[real], **CLOSE)


@torch.no_grad()
def test_cached_equals_uncached(pair):
    theirs, ours, _ = pair
    real, segments, positions = padded(2, 0)
    ids, visible = torch.randint(2, 61, (2, 7)), causal(segments)
    logits = theirs(input_ids=ids, attention_mask=real.long(), position_ids=positions).logits
    cache, parts, modality = KeyValueCache(ours.config, 2, 7), [], torch.zeros_like(ids)
    for begin, stop in ((0, 4), (4, 6), (6, 7)):
        columns = slice(begin, stop)
        part = Visible(visible.first[:, columns], visible.stop[:, columns])
        embeddings = ours.embedding(ids[:, columns])
        parts.append(ours.logits(ours(embeddings, positions[:, columns], part, modality[:, columns], cache)))
        cache.advance(stop - begin)
    torch.testing.assert_close(torch.cat(parts, 1)[real], logits[real], **CLOSE)


@torch.no_grad()
def test_attention_maps(pair):
    theirs, ours, _ = pair
    theirs.set_attn_implementation("eager")
    real, segments, positions = padded(0, 0)
    ids, out = torch.randint(2, 61, (2, 7)), {}
    maps = theirs(input_ids=ids, output_attentions=True).attentions
    our_logits(ours, ours.embedding(ids), segments, positions, out=out)
    assert len(out["attention"]) == len(maps) == 3
    for found, expected in zip(out["attention"], maps):
        torch.testing.assert_close(found, expected, **CLOSE)


def test_rms_norm_in_half_precision():
    """Cast back before the weight: bit for bit as in transformers."""
    theirs = transformers.models.llama.modeling_llama.LlamaRMSNorm(32, eps=1e-6)
    ours = RMSNorm(32, eps=1e-6)
    ours.weight.data = theirs.weight.data = torch.randn(32)
    x = torch.randn(5, 32) * 30
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x, ours, theirs = x.to(dtype), ours.to(dtype), theirs.to(dtype)
        assert torch.equal(ours(x), theirs(x)) and ours(x).dtype == dtype
    fused = F.rms_norm(x.bfloat16(), (32,), ours.weight.bfloat16(), 1e-6)
    assert not torch.equal(ours.bfloat16()(x.bfloat16()), fused)  # otherwise the order would not show
