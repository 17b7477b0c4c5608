"""The same tokens as transformers.generate, live: tiny random LLaMA, Phi and MPT with the same weights on both sides."""

import random

import pytest
import torch

from nanovlm.generation import sampler
from nanovlm.generation.logits_processors import process
from nanovlm.generation.sampler import Decoding, generate
from nanovlm.published.language import LANGUAGE_MODELS
from nanovlm.published.weights import to_ours
from tiny import vision_language_model

transformers = pytest.importorskip("transformers")
transformers.utils.logging.set_verbosity_error()

VOCABULARY, CONTEXT, PAD = 29, 32, 28  # prompts never hold PAD
SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=CONTEXT, tie_word_embeddings=False,
)  # fmt: skip
FAMILIES = {
    "Llama": SIZES | dict(num_key_value_heads=2), "Phi": SIZES | dict(partial_rotary_factor=0.5),
    "Mpt": dict(vocab_size=VOCABULARY, d_model=16, n_layers=2, n_heads=4, max_seq_len=CONTEXT, tie_word_embeddings=True),
}


@pytest.fixture(scope="module", params=FAMILIES)
def models(request):
    """The same random weights as (transformers' model, ours)."""
    torch.manual_seed(5)
    config = getattr(transformers, f"{request.param}Config")(**FAMILIES[request.param])
    theirs = getattr(transformers, f"{request.param}ForCausalLM")(config)
    for parameter in theirs.parameters():
        parameter.data = torch.randn_like(parameter) * (0.25 if parameter.ndim > 1 else 0.5)
    published, config = LANGUAGE_MODELS[request.param.lower()], config.to_dict()
    model = vision_language_model(published.build(config).config)
    weights = to_ours(published.layout(config), dict(theirs.named_parameters()), model.decoder.state_dict())
    model.decoder.load_state_dict(weights)
    theirs.generation_config = transformers.GenerationConfig()
    return theirs.eval(), model


def their_answers(model, prompts, decoding, seed, **more):
    """transformers.generate on one left-padded batch; its sequences without prompt, and without what follows the end."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (longest - len(prompt)) + prompt for prompt in prompts])
    torch.manual_seed(seed)
    names = (
        "max_new_tokens", "num_beams", "repetition_penalty", "no_repeat_ngram_size", "do_sample",
        "length_penalty", "early_stopping", "num_return_sequences",
    )  # fmt: skip
    options = {name: vars(decoding)[name] for name in names}
    if decoding.do_sample:
        options |= {name: vars(decoding)[name] for name in ("temperature", "top_k", "top_p", "min_p")}
    if decoding.min_new_tokens:
        options["min_new_tokens"] = decoding.min_new_tokens
    made = model.generate(
        ids, attention_mask=torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
        pad_token_id=PAD, eos_token_id=list(decoding.eos_ids) or None, return_dict_in_generate=True,
        renormalize_logits=decoding.renormalize, **options, **more,
    )  # fmt: skip
    answers = []
    for row in made.sequences[:, longest:].tolist():
        ends = [place for place, token in enumerate(row) if token in decoding.eos_ids]
        answers.append(row[: ends[0]] if ends else row)
    return answers, made


def random_case(chance, kind):
    """One setting and its prompts, drawn from a random.Random."""
    num_ends = chance.choice([0, 1, 1, 2, 5])
    length = chance.randint(3, 9)
    options = dict(
        max_new_tokens=length, eos_ids=tuple(chance.sample(range(PAD), num_ends)),
        repetition_penalty=chance.choice([1.0, 1.0, 0.7, 1.6]), no_repeat_ngram_size=chance.choice([0, 0, 1, 2, 3]),
        min_new_tokens=chance.choice([0, 0, 1, length // 2]),
    )  # fmt: skip
    if "sampling" in kind:
        options |= dict(
            do_sample=True, temperature=chance.choice([1.0, 0.6, 1.8]), top_k=chance.choice([0, 0, 3, 12]),
            top_p=chance.choice([1.0, 0.95, 0.6]), min_p=chance.choice([0.0, 0.0, 0.05, 0.3]), renormalize=chance.random() < 0.2,
        )  # fmt: skip
    if "beam" in kind:
        options |= dict(
            num_beams=chance.choice([2, 3, 4]), length_penalty=chance.choice([-2.0, 0.0, 0.6, 1.0, 2.0]),
            early_stopping=chance.choice([False, True, "never"]),
        )  # fmt: skip
    if kind != "greedy":
        options["num_return_sequences"] = chance.randint(1, options.get("num_beams", 3))
    if kind == "beam sampling":  # it draws so many without replacement, from at least so many
        options["no_repeat_ngram_size"] = 0
    lengths = [chance.randint(1, 7) for _ in range(chance.randint(2, 4))]
    if options["no_repeat_ngram_size"] == 1:  # transformers takes padding for a word that must not be repeated
        lengths = [lengths[0]] * len(lengths)
    if not options["eos_ids"] and options["no_repeat_ngram_size"]:
        lengths = [lengths[0]] * len(lengths)
    prompts = [[chance.randrange(PAD) for _ in range(number)] for number in lengths]
    return Decoding(**options), prompts


@pytest.mark.parametrize("kind", [
    "greedy", "sampling", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("beam search", "beam sampling"))
])  # fmt: skip
def test_the_same_tokens(models, kind):
    theirs, ours = models
    chance = random.Random(kind)
    lengths = set()
    for number in range(55):
        decoding, prompts = random_case(chance, kind)
        want, _ = their_answers(theirs, prompts, decoding, seed=number)
        got = generate(ours, prompts, decoding, generator=torch.Generator().manual_seed(number))
        assert got == want, f"setting {number}: {decoding}, prompts {prompts}"
        lengths |= {len(answer) for answer in got}
    assert len(lengths) > 5, "answers must be of many lengths for this test to mean something"


@pytest.mark.parametrize("kind", ["sampling", "greedy"])
def test_the_same_probabilities_at_every_step(models, kind, monkeypatch):
    theirs, ours = models
    chance = random.Random(f"steps of {kind}")
    seen = []
    monkeypatch.setattr(sampler, "process", lambda *args: seen.append(process(*args)) or seen[-1])
    for number in range(12):
        decoding, prompts = random_case(chance, kind)
        prompts = prompts[:1]  # ended rows leave our batch, but not theirs
        decoding = Decoding(**vars(decoding) | {"num_return_sequences": 1})
        _, made = their_answers(theirs, prompts, decoding, number, output_scores=True)
        seen.clear()
        generate(ours, prompts, decoding, generator=torch.Generator().manual_seed(number))
        assert len(seen) == len(made.scores)
        for want, got in zip(made.scores, seen):
            assert torch.equal(want.isinf(), got.isinf()), "the same ids are left"
            torch.testing.assert_close(got.softmax(-1), want.softmax(-1), atol=1e-5, rtol=1e-4)
