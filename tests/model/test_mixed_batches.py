"""Text alone, one image, several images and a clip in one batch: every row's scores are those of the row alone."""

import pytest
import torch

from nanovlm.recipes import RECIPES
from nanovlm.generation.sampler import Decoding, generate
from parity import close, perturb
from published_models import make_batch, real_logits, write

SLOW = ["llava", "llava tiny_linear", "lynx", "llava_phi", "blip2", "smolvlm"]
NAMES = ["mplug_owl2", "open_flamingo", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
WITHOUT_CLIPS = ("open_flamingo",)  # its code asserts a single frame; a clip is several pictures there


@pytest.fixture(scope="module", params=NAMES)
def tiny(request):
    """(name of the recipe, its tiny model with every parameter moved)."""
    name, _, size = request.param.partition(" ")
    published = RECIPES[name].published
    torch.manual_seed(0)
    model = perturb(published.build(published.configs[size or "tiny"]))
    for parameter in model.decoder.embedding.parameters():
        parameter.data *= 10  # words that differ, as those of a trained model do
    return name, model


def rows(name, model):
    """Five rows of unequal length; in the last, words stand before the first picture."""
    size = model.vision.image_size
    a, b, c, d, e = torch.randn(5, 1, 3, size, size)
    clip = torch.randn(3, 3, size, size) if name not in WITHOUT_CLIPS else a
    words = torch.randint(3, 500, (40,)).tolist()
    return [[a, 1, *words[:6]], [1, *words[6:19]], [1, b, *words[19:22], c, d, 5], [clip, 1, 7], [1, *words[22:27], e, 9]]


@pytest.mark.parametrize("side, backend", [("left", "sdpa"), ("right", "reference")])
def test_each_row_as_alone(tiny, side, backend):
    name, model = tiny
    torch.manual_seed(1)
    given = rows(name, model)
    model.set_backend(backend)
    together = real_logits(model, make_batch(model, given, side))
    for row, found in zip(given, together):
        alone = real_logits(model, make_batch(model, [row]))[0]
        close(found, alone)
    assert all(found.std(0).max() > 1e-3 for found in together)  # not all the same
    loss, trained = model.loss(make_batch(model, given))
    alone = [model.loss(make_batch(model, [row])) for row in given]
    assert trained == sum(count for _, count in alone)
    close(loss, sum(one for one, _ in alone), atol=1e-3, rtol=1e-5)


def test_generation_together_and_alone(tiny):
    name, model = tiny
    torch.manual_seed(3)
    given = rows(name, model)
    prompts = [[id for item in row for id in write(model, item)] for row in given]
    pictures = [[item for item in row if torch.is_tensor(item)] for row in given]
    decoding = Decoding(max_new_tokens=5)
    together = generate(model, prompts, decoding, pictures)
    assert together == [generate(model, [prompt], decoding, [shown])[0] for prompt, shown in zip(prompts, pictures)]
