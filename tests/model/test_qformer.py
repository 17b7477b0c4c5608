"""The Q-Former against transformers: forward, gradients of inputs and of every parameter; then frames, maps, errors."""

import pytest
import torch

from nanovlm.published.weights import to_ours
from nanovlm.qformer import QFormer
from nanovlm.recipes.blip2 import QFORMER
from parity import close, perturb
from published_models import same_gradients


def make(cross_attention=(True, False, True), **options):
    sizes = dict(vision_width=20, output_width=10, width=12, num_queries=5, num_heads=3, ffn_width=18)
    return perturb(QFormer(**(sizes | options), cross_attention=cross_attention))


class Published(torch.nn.Module):
    """BLIP-2's Q-Former of transformers with the queries and the linear map that stand around it."""

    def __init__(self, transformers, frequency, num_layers):
        super().__init__()
        config = transformers.Blip2QFormerConfig(
            hidden_size=12, num_hidden_layers=num_layers, num_attention_heads=3, intermediate_size=18,
            cross_attention_frequency=frequency, encoder_hidden_size=20,
        )  # fmt: skip
        self.query_tokens = torch.nn.Parameter(torch.zeros(1, 5, 12))
        self.qformer = transformers.Blip2QFormerModel(config)
        self.language_projection = torch.nn.Linear(12, 10)

    def forward(self, features):
        queries = self.query_tokens.expand(len(features), -1, -1)
        hidden = self.qformer(query_embeds=queries, encoder_hidden_states=features).last_hidden_state
        return self.language_projection(hidden)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("frequency, looks", [(2, (True, False, True)), (1, (True, True)), (3, (True, False, False, True))])
def test_blip2(frequency, looks, backend):
    transformers = pytest.importorskip("transformers")
    theirs = perturb(Published(transformers, frequency, len(looks)))
    ours = make(looks)
    ours.load_state_dict(to_ours(QFORMER, dict(theirs.named_parameters()), ours.state_dict()))
    ours.backend = backend
    features = torch.randn(2, 7, 20, requires_grad=True)
    same_features = features.detach().clone().requires_grad_()
    found, expected = ours(features), theirs(same_features)
    assert found.shape == (2, 5, 10)
    close(found, expected)
    weights = torch.randn_like(found)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    close(features.grad, same_features.grad)
    same_gradients(ours, theirs, QFORMER)


def test_eps_is_bert_s_and_start():
    norms = [module for module in make().modules() if isinstance(module, torch.nn.LayerNorm)]
    assert len(norms) == 1 + 3 + 2 + 3 and {norm.eps for norm in norms} == {1e-12}
    bridge = QFormer(20, 96, 64, num_queries=32, num_heads=4, ffn_width=128, cross_attention=(True, False))
    assert 0.018 < bridge.queries.std() < 0.022 and 0.018 < bridge.project.weight.std() < 0.022
    assert (bridge.project.bias == 0).all() and (bridge.layers[1].fc_1.bias == 0).all()
    assert 0.018 < bridge.layers[0].cross_attention.k.weight.std() < 0.022


def test_only_the_listed_layers_look_at_the_picture():
    bridge = make((False, True, False, False))
    assert [layer.cross_attention is not None for layer in bridge.layers] == [False, True, False, False]
    out, features = {}, torch.randn(2, 7, 20)
    close(bridge(features, out=out), bridge(features))
    assert len(out["latents"]) == 1 and out["latents"][0].shape == (2, 3, 5, 7)
    close(out["latents"][0].sum(-1), torch.ones(2, 3, 5))
    for options, message in ((dict(cross_attention=(False, False)), "no layer looks"), (dict(num_heads=5), "width 12 .* 5 heads")):
        with pytest.raises(ValueError, match=message):
            make(**options)
    bridge, clips = make(), torch.randn(2, 3, 7, 20)  # M frames N width
    found = bridge(clips.flatten(1, 2), 3)
    expected = torch.stack([torch.cat([bridge(clips[m, f][None])[0] for f in range(3)]) for m in range(2)])
    close(found, expected)
    assert found.shape == (2, bridge.num_image_tokens(7, 3), 10) == (2, 15, 10) and bridge.num_image_tokens(900) == 5
