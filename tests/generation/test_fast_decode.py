"""Fast steps: the readable decoder's scores and tokens, from the same memory."""

import dataclasses
import itertools

import pytest
import torch
from torch import nn

from nanovlm import lora
from nanovlm.generation import fast_decode
from nanovlm.decoder import Decoder, DecoderAttention, DecoderConfig, LayerOptions, RMSNorm
from nanovlm.generation.fast_decode import FastDecoder
from nanovlm.generation.prefill import Rows
from nanovlm.projector import LinearProjector
from nanovlm.generation.sampler import Decoding, generate, stream
from nanovlm.vit import ViT, ViTConfig
from nanovlm.vlm import VLM
from nanovlm.generation.prefill import Workspace
from tiny import vision_language_model

END = 7
PLAIN = DecoderConfig(23, 16, 4, 2, 24, 40, (LayerOptions(),) * 2)
BIASED = dict(num_kv_heads=4, norm="layer", ffn="plain", qkv_bias="qkv", output_bias=True, ffn_bias=True)
MPT = dict(norm="layer_no_bias", ffn="plain", activation="gelu", rotary_width=0)
CONFIGS = {name: dataclasses.replace(PLAIN, **changes) for name, changes in {
    "LLaMA": {},
    "tied head, qkv bias": dict(tied_head=True, qkv_bias="qkv", num_kv_heads=1),
    "Phi": BIASED | dict(activation="gelu_tanh", head_bias=True, parallel=True, rotary_width=2),
    "OPT": BIASED | dict(activation="relu", rotary_width=0, position_offset=2),
    "MPT": MPT | dict(num_kv_heads=4, tied_head=True, alibi=(0.5, 0.3, 0.2, 0.1), qkv_clip=0.6),
    "MPT-1B, shared keys": MPT | dict(alibi=(1.5, 0.3, 0.2, 0.1), qk_norm=True),
    "adapters, own keys for images": dict(
        layers=(LayerOptions(4, modality_adaptive=True), LayerOptions(modality_adaptive=True))),
}.items()}
IMAGE = [-1] * 4
PROMPTS = [[*IMAGE, 2, 3, 4], [5], [6, *IMAGE, 8, 9, 10], [11, 12, 13, 14, 15, 16]]
DECODINGS = {
    "greedy": Decoding(max_new_tokens=9, eos_ids=(5, 22)),
    "sampling": Decoding(
        max_new_tokens=9, do_sample=True, temperature=1.3, top_p=0.9, eos_ids=(END,), num_return_sequences=2),
    "beams": Decoding(max_new_tokens=9, eos_ids=(END,), num_beams=3, length_penalty=0.7),
}


@pytest.fixture(params=list(CONFIGS))
def model(request):
    return vision_language_model(CONFIGS[request.param])


@pytest.fixture
def pictures():
    return [[torch.randn(1, 3, 8, 8)], [], [torch.randn(1, 3, 8, 8)], []]


@pytest.mark.parametrize("static", [False, True])
def test_the_same_answers(model, pictures, static):
    def answers(fast):
        found = []
        for decoding in DECODINGS.values():
            for rows in (slice(None), slice(3, 4)):  # padded, and a row alone
                generator = torch.Generator().manual_seed(0)
                workspace = Workspace(fast)
                found.append(generate(model, PROMPTS[rows], decoding, pictures[rows], generator, workspace=workspace))
        return found

    want = answers(None)
    fast = FastDecoder(model.decoder, static)
    assert answers(fast) == want
    assert answers(None) == want, "the readable decoder still works, from the same memory"
    lengths = {len(answer) for one in want for answer in one}
    assert len(lengths) > 3


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("static", [False, True])
def test_the_same_scores(model, pictures, static, rows):
    flat = [torch.randn(4, 16) for _ in range(2)]
    with torch.no_grad():
        slow = Rows(model, PROMPTS, flat, [0, 1], 4)
        fast = Rows(model, PROMPTS, flat, [0, 1], 4, FastDecoder(model.decoder, static, rows=rows))
        for tokens in ([1, 2, 3, 4], [9, 0, 22, 1], [5, 5, 5, 5]):
            for one in (slow, fast):
                one.step(torch.tensor(tokens))
            torch.testing.assert_close(fast.logits, slow.logits, atol=1e-5, rtol=1e-4)
            assert fast.logits.dtype == torch.float32 and not fast.logits.requires_grad
        assert fast.cache.length == slow.cache.length


@pytest.mark.parametrize("size", [(24, 40), (40, 24), (24, 24)])
def test_a_product_does_not_depend_on_the_order_in_memory(size):
    """Few rows and many, weights in either order, with and without bias and residual."""
    weight, bias = torch.randn(size), torch.randn(size[1])
    for num_rows in (1, 2, 5, 8, 9):
        x, residual = torch.randn(num_rows, size[0]), torch.randn(num_rows, size[1])
        want = torch.stack([(row[:, None] * weight).sum(0) for row in x])
        before = residual.clone()
        for stored, b, r in itertools.product((weight, weight.t().contiguous().t()), (None, bias), (None, residual)):
            got = fast_decode.product(x, stored, b, r)
            added = sum(one for one in (b, r) if one is not None)
            torch.testing.assert_close(got, want + added, atol=1e-5, rtol=1e-5)
            assert got.is_contiguous()
        assert torch.equal(residual, before), "the hidden states are read, not written"


def test_weights_stand_in_the_order_of_reading_and_once(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fast = FastDecoder(model.decoder)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    for packed, layer in zip(fast.layers, model.decoder.layers):
        weight = packed.qkv[0]
        assert weight.is_contiguous() and len(weight) == 16
        memory = weight.untyped_storage().data_ptr()
        attention = layer.attention
        for linear in (attention.q, fast_decode.text_branch(attention.k), fast_decode.text_branch(attention.v)):
            assert linear.weight.untyped_storage().data_ptr() == memory
        assert packed.wide[0].is_contiguous() and packed.o[0].is_contiguous()
    head = model.decoder.embedding.weight if model.decoder.lm_head is None else model.decoder.lm_head.weight
    assert fast.head[0].is_contiguous() and fast.head[0].data_ptr() == head.data_ptr()


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("name", ["LLaMA", "Phi", "tied head, qkv bias"])
def test_loading_other_weights_reaches_the_fast_steps(name, rows):
    model, other = vision_language_model(CONFIGS[name]), vision_language_model(CONFIGS[name])
    for parameter in other.parameters():
        parameter.data.mul_(-0.7)
    fast = FastDecoder(model.decoder, rows=rows)
    model.load_state_dict(other.state_dict())
    decoding = Decoding(max_new_tokens=6)
    assert generate(model, [[5, 6]], decoding, workspace=Workspace(fast)) == generate(other, [[5, 6]], decoding)


def test_static_steps_are_kept_for_the_next_rows_and_serve_one_set_at_a_time():
    model = vision_language_model(PLAIN)
    fast = FastDecoder(model.decoder, static=True)
    decoding = Decoding(max_new_tokens=5)
    want = [generate(model, [prompt], decoding)[0] for prompt in ([3], [4, 5, 6])]
    got = [generate(model, [prompt], decoding, workspace=Workspace(fast))[0] for prompt in ([3], [4, 5, 6])]
    assert got == want and list(fast.static_steps) == [(1, fast_decode.COLUMNS)]
    memory = [buffer.data_ptr() for step in fast.static_steps.values() for buffer in step.cache.layers]
    one = stream(model, [3], decoding, workspace=Workspace(fast))
    first = [next(one), next(one)]
    assert list(stream(model, [4, 5, 6], decoding, workspace=Workspace(fast))) == want[1]
    assert first == want[0][:2]
    with pytest.raises(RuntimeError, match="finish one answer before the next"):
        next(one)
    assert memory == [buffer.data_ptr() for step in fast.static_steps.values() for buffer in step.cache.layers]


@pytest.mark.slow
def test_one_compiled_graph_for_all_steps():
    model = vision_language_model(dataclasses.replace(PLAIN, layers=(LayerOptions(),)))
    want = generate(model, PROMPTS[3:], DECODINGS["greedy"])
    fast = FastDecoder(model.decoder, static=True)
    fast.by_mask = torch.compile(fast.by_mask, fullgraph=True, dynamic=False)  # as on a GPU
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert generate(model, PROMPTS[3:], DECODINGS["greedy"], workspace=Workspace(fast)) == want
        for prompt in ([1], [2, 3, 4]):
            want = generate(model, [prompt], DECODINGS["greedy"])
            assert generate(model, [prompt], DECODINGS["greedy"], workspace=Workspace(fast)) == want


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("kind", ["LLaMA", "MPT-1B, shared keys"])
def test_pictures_beside_the_row(static, kind):
    """Cross-attention layers: new tokens see the latest picture of their row, if there is one."""
    layers = (LayerOptions(cross_attention=True), LayerOptions(4), LayerOptions(cross_attention=True))
    vision = ViT(ViTConfig(8, 4, width=12, num_layers=1, num_heads=2, mlp_width=16, class_token=False))
    decoder = Decoder(dataclasses.replace(CONFIGS[kind], layers=layers, cross_attention_width=12))
    model = VLM(vision, LinearProjector(12, 12), decoder, media_token=20).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.4
    prompts, pixels = [[20, 3, 4], [5], [6, 20, 8, 20, 9]], list(torch.randn(3, 1, 3, 8, 8))
    inputs = [[pixels[0]], [], [pixels[1], pixels[2]]]
    for name, decoding in DECODINGS.items():
        for rows in (slice(None), slice(2, 3), slice(1, 2)):
            seed = lambda: torch.Generator().manual_seed(1)
            want = generate(model, prompts[rows], decoding, inputs[rows], seed())
            workspace = Workspace(FastDecoder(model.decoder, static))
            assert generate(model, prompts[rows], decoding, inputs[rows], seed(), workspace=workspace) == want, name


class Gated(DecoderAttention):
    def forward(self, x, context, index):
        return super().forward(x, context, index) * 0.5


class Silent(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 0


class Doubled(RMSNorm):
    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize("name, change", [
    ("layers.1.attention", lambda model: setattr(model.decoder.layers[1], "attention", Gated(PLAIN, False))),
    ("layers.0.ffn.down", lambda model: setattr(model.decoder.layers[0].ffn, "down", Silent(24, 16, False))),
    ("lm_head", lambda model: setattr(model.decoder, "lm_head", Silent(16, 23))),
    ("layers.0.attention.q", lambda model: lora.add(model, rank=2, alpha=2)),
    ("layers.1.ffn.down", lambda model: lora.add(model, 2, 2, r"1.ffn.down")),
])  # fmt: skip
def test_a_module_of_another_type_is_refused_by_name_and_nothing_changes(name, change):
    model = vision_language_model(PLAIN)
    change(model)
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf" at {name}: merge low-rank"):
        FastDecoder(model.decoder)
    assert before == {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}


def test_norms_and_adapters_of_ones_own_are_called():
    model = vision_language_model(dataclasses.replace(PLAIN, layers=(LayerOptions(4),) * 2))
    layer = model.decoder.layers[0]
    layer.norm_1, layer.adapter = Doubled(16), nn.Sequential(layer.adapter, nn.Tanh())
    want = generate(model, PROMPTS[3:], DECODINGS["greedy"])
    assert generate(model, PROMPTS[3:], DECODINGS["greedy"], workspace=Workspace(FastDecoder(model.decoder))) == want
