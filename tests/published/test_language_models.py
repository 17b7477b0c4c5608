"""The decoder as LLaMA, SmolLM2, Qwen2, Phi-2 and OPT against transformers: values, gradients, padding and the cache.

Tiny random models in float32, every parameter moved by N(0, 0.05^2) so that each bias and norm counts.
"""

import pytest
import torch
import torch.nn.functional as F

from nanovlm.attention import Visible, causal
from nanovlm.cache import KeyValueCache
from nanovlm.decoder import RMSNorm
from nanovlm.published.language import LANGUAGE_MODELS
from nanovlm.published.weights import to_ours
from parity import CLOSE, perturb
from published_models import same_gradients

transformers = pytest.importorskip("transformers")


SIZES = dict(vocab_size=61, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=40)
LLAMA = SIZES | dict(hidden_size=48, intermediate_size=56, num_key_value_heads=4, rms_norm_eps=1e-3, tie_word_embeddings=False)
ROPE = {"rope_type": "default", "rope_theta": 100000.0}
FAMILIES = {
    "llama": ("Llama", LLAMA),
    "smollm2": ("Llama", LLAMA | dict(hidden_size=108, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
                                      rope_parameters=ROPE)),
    "qwen2": ("Qwen2", LLAMA | dict(num_key_value_heads=2, tie_word_embeddings=True)),
    "phi": ("Phi", SIZES | dict(hidden_size=80, intermediate_size=72, layer_norm_eps=1e-3, resid_pdrop=0.0,  # 8 of 20 turn
                                rope_parameters=ROPE | {"partial_rotary_factor": 0.4})),
    "mpt": ("Mpt", dict(vocab_size=61, n_layers=3, n_heads=4, max_seq_len=40, d_model=48, no_bias=True)),
    "mpt, 6 heads, clipped": ("Mpt", dict(vocab_size=61, n_layers=3, n_heads=6, max_seq_len=40, d_model=48, layer_norm_epsilon=1e-3,
                                          attn_config=dict(clip_qkv=0.3))),
    "opt": ("OPT", SIZES | dict(hidden_size=36, ffn_dim=56, word_embed_proj_dim=36, dropout=0.0, pad_token_id=1)),  # none
}  # fmt: skip


@pytest.fixture(params=FAMILIES)
def pair(request):
    """(transformers' model, ours with its weights, the rename table)."""
    torch.manual_seed(0)
    kind, values = FAMILIES[request.param]
    theirs = perturb(getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**values)))
    published, config = LANGUAGE_MODELS[kind.lower()], theirs.config.to_dict()
    ours, table = published.build(config), published.layout(config)
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
    assert all(parameter.grad is None or parameter.grad.any() for parameter in ours.parameters())
    unused = [] if ours.config.tied_head else ["embedding."]  # words came in as embeddings: an untied table learns nothing
    same_gradients(ours, theirs, table, unused=unused)


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
