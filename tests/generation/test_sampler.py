import dataclasses
import json

import pytest
import torch

from torch.utils._python_dispatch import TorchDispatchMode

from nanovlm.generation import beam_search, prefill, sampler
from nanovlm.generation.fast_decode import FastDecoder
from nanovlm.generation.logits_processors import process
from nanovlm.generation.sampler import Decoding, generate, stream
from nanovlm.generation.prefill import Workspace
from random_models import text_batch
from tiny import GENERATION, random_vlm, recorded_llama

CASES = json.loads((GENERATION / "gen_cases.json").read_text())["cases"]
END = 7  # in the random model's vocabulary
SAMPLE = Decoding(max_new_tokens=9, do_sample=True, temperature=1.3, top_k=15, top_p=0.9, eos_ids=(END,))
IMAGE = [-1, -1, -1, -1]
PROMPTS = [[*IMAGE, 2, 3, 4], [5], [6, *IMAGE, 8, *IMAGE, 9, 10], [11, 12, 13, 14, 15, 16]]
DECODINGS = {
    "greedy": Decoding(max_new_tokens=9, eos_ids=(5, 22)),
    "penalties": Decoding(
        max_new_tokens=9, eos_ids=(END, 1), repetition_penalty=1.4, no_repeat_ngram_size=2, min_new_tokens=3
    ),
    "sampling": SAMPLE,
    "min-p": dataclasses.replace(SAMPLE, top_k=0, top_p=1.0, min_p=0.1, min_new_tokens=4),
    "beams": Decoding(max_new_tokens=9, eos_ids=(END,), num_beams=3, length_penalty=0.7, early_stopping=True),
    "beam sampling": dataclasses.replace(SAMPLE, num_beams=3, num_return_sequences=2),
}


@pytest.fixture(scope="module")
def llama():
    return recorded_llama()


@pytest.fixture(scope="module")
def model():
    return random_vlm()


@pytest.fixture(scope="module")
def pictures():
    torch.manual_seed(3)
    return [torch.randn(1, 3, 8, 8) for _ in range(3)]


@pytest.fixture(scope="module")
def visual_inputs(pictures):
    return [[pictures[0]], [], [pictures[1], pictures[0]], []]


def seeds(number, first=0):
    return [torch.Generator().manual_seed(first + i) for i in range(number)]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_recorded_transformers_runs(llama, number):
    case = CASES[number]
    options = dict(case["options"])
    del options["pad"]
    eos_ids = tuple(options.pop("eos") or ())
    renormalize = options.pop("renormalize_logits", False)
    decoding = Decoding(eos_ids=eos_ids, renormalize=renormalize, **options)
    rows = zip(case["input_ids"], case["attention_mask"])
    prompts = [[token for token, real in zip(*row) if real] for row in rows]
    generator = torch.Generator().manual_seed(case["seed"])
    want = []
    for sequence in case["sequences"]:
        new = [token for token in sequence[len(case["input_ids"][0]) :] if token >= 0]  # -1 fills where nothing ended
        stop = next((place for place, token in enumerate(new) if token in eos_ids), len(new))
        want.append(new[:stop])
    assert generate(llama, prompts, decoding, generator=generator) == want
    if case["sequences_scores"] is not None:
        rows = prefill.Rows(llama, prompts, [], [], decoding.max_new_tokens)
        with torch.no_grad():
            found = beam_search.beam_search(rows, decoding, torch.Generator().manual_seed(case["seed"]))
        scores = [hypothesis.score for hypotheses in found for hypothesis in hypotheses]
        torch.testing.assert_close(scores, case["sequences_scores"], rtol=1e-4, atol=1e-5)


def naive(model, prompt, inputs, decoding, generator):
    """One row without cache, batch or padding: everything is computed again for every token."""
    ids = list(prompt)
    for step in range(decoding.max_new_tokens):
        batch, shown = text_batch([ids]), torch.arange(len(inputs))
        batch.pixels, batch.frames = torch.cat(inputs) if inputs else None, torch.ones_like(shown)
        batch.shown, batch.owner = shown, torch.zeros_like(shown)
        with torch.no_grad():
            scores = process(model(batch)[:, -1], torch.tensor([ids]), step, decoding)
        if decoding.do_sample:
            token = int(torch.multinomial(scores.softmax(-1)[0], 1, generator=generator))
        else:
            token = int(scores.argmax())
        if token in decoding.eos_ids:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", ["greedy", "penalties", "sampling", "min-p"])
def test_equals_a_loop_without_cache(model, visual_inputs, name):
    decoding = DECODINGS[name]
    lengths = set()
    for first in range(0, 40, 10):
        got = generate(model, PROMPTS, decoding, visual_inputs, seeds(4, first))
        want = [naive(model, *row, decoding, one) for *row, one in zip(PROMPTS, visual_inputs, seeds(4, first))]
        assert got == want
        lengths |= set(map(len, got))
    assert not any(END in row for row in got)
    assert len(lengths) > 1, "rows must end at different steps for this test to mean something"


@pytest.mark.parametrize("name", list(DECODINGS))
def test_a_row_depends_neither_on_its_neighbours_nor_on_their_number(model, visual_inputs, name):
    decoding, number = DECODINGS[name], DECODINGS[name].num_return_sequences
    for first in (0, 10, 20):
        together = generate(model, PROMPTS, decoding, visual_inputs, seeds(4, first))
        alone = []
        for prompt, inputs, one in zip(PROMPTS, visual_inputs, seeds(4, first)):
            alone += generate(model, [prompt], decoding, [inputs], [one])
        assert together == alone and len(together) == 4 * number
        for batch_size in (1, 3, 4, 99):
            assert generate(model, PROMPTS, decoding, visual_inputs, seeds(4, first), batch_size) == together


def test_several_samples_per_prompt_stand_side_by_side(model, visual_inputs):
    decoding = dataclasses.replace(SAMPLE, num_return_sequences=3)
    want = [naive(model, PROMPTS[row // 3], visual_inputs[row // 3], SAMPLE, one) for row, one in enumerate(seeds(12))]
    for batch_size in (None, 2):
        assert generate(model, PROMPTS, decoding, visual_inputs, seeds(12), batch_size) == want


def test_shared_generator_draws_for_all_rows_at_every_step(llama):
    """transformers' order: one draw per step over all rows, those that have ended included."""
    torch.manual_seed(11)
    prompts = torch.randint(128, (4, 3)).tolist()
    decoding = Decoding(max_new_tokens=12, do_sample=True, eos_ids=tuple(range(0, 128, 5)))
    got = generate(llama, prompts, decoding, generator=torch.Generator().manual_seed(5))
    generator, ids, ended, want = torch.Generator().manual_seed(5), prompts, [False] * 4, [[], [], [], []]
    for _ in range(12):
        if all(ended):
            break
        with torch.no_grad():
            drawn = torch.multinomial(llama(text_batch(ids))[:, -1].softmax(-1), 1, generator=generator)[:, 0].tolist()
        ended = [was or token in decoding.eos_ids for was, token in zip(ended, drawn)]
        for row, token in enumerate(drawn):
            want[row] += [] if ended[row] else [token]
        ids = [[*row, token] for row, token in zip(ids, drawn)]
    assert got == want and len(set(map(len, got))) > 2
    torch.manual_seed(5)
    assert generate(llama, prompts, decoding) == want, "without a generator torch's global one draws"


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device: reading a number, or how many elements a mask selects."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        indices = args[1] if name in ("aten.index.Tensor", "aten.index_put_.default") else []
        masks = [x for x in indices if x is not None and x.dtype == torch.bool]
        if masks or any(word in name for word in ("_local_scalar_dense", "nonzero", "masked_select")):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("fast", [None, False, True])
@pytest.mark.parametrize("name", ["greedy", "penalties", "sampling", "min-p"])
def test_a_step_waits_for_the_device_once(model, monkeypatch, fast, name):
    """For the stop test, by tolist; everything else of a step stays on the device."""
    decoding = dataclasses.replace(DECODINGS[name], eos_ids=(), max_new_tokens=6)
    workspace = Workspace(None if fast is None else FastDecoder(model.decoder, static=fast))
    with torch.no_grad():
        rows, lists = sampler.prefill(model, [[3, 4, 5], [6]], [[], []], decoding.max_new_tokens, workspace), []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: lists.append(self.shape) or tolist(self))
    with torch.no_grad(), Waits() as waits:
        steps = list(sampler.sample_steps(rows, decoding, torch.Generator().manual_seed(0), workspace))
        assert waits.names == [] and lists == [(2,)] * 6 and len(steps) == 6
        bool(rows.logits.sum() > 0)
        assert len(waits.names) == 1, "a wait would have been seen"


def test_ended_rows_leave_the_batch_and_ended_prompts_the_beam_search(model, visual_inputs, monkeypatch, llama):
    sizes, packed = [], (1, sum(map(len, PROMPTS)))  # all prompts side by side
    forward = type(model.decoder).forward

    def watched(self, embeddings, *args, **kwargs):
        sizes.append(tuple(embeddings.shape[:2]))
        return forward(self, embeddings, *args, **kwargs)

    monkeypatch.setattr(type(model.decoder), "forward", watched)
    for decoding in (SAMPLE, dataclasses.replace(SAMPLE, max_new_tokens=1)):
        for generator in (seeds(4, 30), torch.Generator().manual_seed(0)):
            sizes.clear()
            lengths = list(map(len, generate(model, PROMPTS, decoding, visual_inputs, generator)))
            steps = min(max(lengths), decoding.max_new_tokens - 1)
            assert sizes == [packed] + [(sum(length > step for length in lengths), 1) for step in range(steps)]
            assert len({rows for rows, _ in sizes}) > 1 or not steps
    beams, step = [], prefill.Rows.step
    monkeypatch.setattr(prefill.Rows, "step", lambda self, tokens: (beams.append(len(tokens)), step(self, tokens)))
    decoding = Decoding(max_new_tokens=12, num_beams=2, early_stopping=True, eos_ids=tuple(range(1, 128, 4)))
    generate(llama, [[3, 9], [5], [77, 31, 4]], decoding)
    assert beams == [6, 4, 4, 4, *[2] * 7]


@pytest.mark.parametrize("going, order", [
    ([0, 1, 2], [0, 1, 2]), ([], []), ([1, 2, 3], [3, 1, 2]), ([0, 4, 5], [0, 5, 4]), ([5], [5])])
def test_the_last_rows_take_the_places_of_those_that_ended(going, order):
    assert sampler.close_gaps(going) == order


def test_every_picture_is_encoded_once_and_forgotten_after_its_last_prompt(model, pictures, monkeypatch):
    seen, kept, encode, prefill_ = [], [], type(model).encode, sampler.prefill
    monkeypatch.setattr(type(model), "encode", lambda *args: seen.append(args[2].tolist()) or encode(*args))
    monkeypatch.setattr(sampler, "prefill", lambda *args: (prefill_(*args), kept.append(len(args[-1].pictures)))[0])
    prompts, (a, b, c) = [[*IMAGE, 3], [*IMAGE, 4], [*IMAGE, *IMAGE], [5], [*IMAGE, 6]], pictures
    inputs = [[a], [b], [b, a], [], [c]]
    want = [generate(model, [prompt], DECODINGS["greedy"], [one])[0] for prompt, one in zip(prompts, inputs)]
    for batch_size, calls, held in (
            (None, [[1, 1, 1]], [3]), (2, [[1, 1], [1]], [2, 2, 1]), (1, [[1], [1], [1]], [1, 2, 2, 0, 1])):
        seen.clear(), kept.clear()
        assert generate(model, prompts, DECODINGS["greedy"], inputs, batch_size=batch_size) == want
        assert seen == calls and kept == held


@pytest.mark.parametrize("name", ["greedy", "penalties", "sampling", "min-p"])
def test_stream_hands_out_the_same_tokens(model, visual_inputs, name):
    for row, (prompt, inputs) in enumerate(zip(PROMPTS, visual_inputs)):
        got = list(stream(model, prompt, DECODINGS[name], inputs, torch.Generator().manual_seed(row)))
        assert got == generate(model, [prompt], DECODINGS[name], [inputs], torch.Generator().manual_seed(row))[0]


def test_stream_computes_a_token_only_when_it_is_asked_for(model, monkeypatch):
    steps, step = [], prefill.Rows.step
    monkeypatch.setattr(prefill.Rows, "step", lambda self, tokens: (steps.append(1), step(self, tokens)))
    tokens = stream(model, [5], Decoding(max_new_tokens=5))
    for number in (0, 1, 2):
        next(tokens)
        assert len(steps) == number
    assert len(list(tokens)) == 2 and len(steps) == 4 and generate(model, [], DECODINGS["greedy"]) == []


def test_new_tokens_up_to_the_last_place_of_the_context(model, visual_inputs):
    decoding = Decoding(max_new_tokens=38)
    assert len(generate(model, [[3, 4]], decoding)[0]) == 38  # context 40
    with pytest.raises(ValueError, match="prompt 1 leaves 37 tokens free of the context of 40"):
        generate(model, [[3, 4], [3, 4, 5]], decoding)
    with pytest.raises(ValueError, match="leaves 0 tokens free"):
        generate(model, [[3] * 45], decoding)
    model = random_vlm().to(torch.bfloat16)
    for decoding in DECODINGS.values():
        rows = generate(model, PROMPTS, decoding, visual_inputs, torch.Generator().manual_seed(0))
        assert len(rows) == 4 * decoding.num_return_sequences


CLIP, ONE = torch.zeros(2, 3, 8, 8), torch.zeros(1, 3, 8, 8)
TWICE = dataclasses.replace(SAMPLE, num_return_sequences=2)


@pytest.mark.parametrize("change, message", [
    ({"prompts": [[3], []]}, "prompt 1 is empty"),
    ({"prompts": [[3, 23]]}, "prompt 0 holds ids from 3 to 23; known are 0 to 22"),
    ({"prompts": [[3, -2]]}, "prompt 0 holds ids from -2 to 3"),
    ({"prompts": [[3, -1]]}, "prompt 0 has 1 ids -1 for its pictures; its 0 visual inputs need 0"),
    ({"visual_inputs": [[ONE]]}, "has 0 ids -1 for its pictures; its 1 visual inputs need 4"),
    ({"prompts": [[*IMAGE, 3]], "visual_inputs": [[CLIP]]}, "4 ids -1 for its pictures; its 1 visual inputs need 8"),
    ({"prompts": [[3], [4]], "visual_inputs": [[]]}, "2 prompts, but visual inputs for 1"),
    ({"decoding": Decoding(eos_ids=(3, 23))}, "end token 23 lies outside the vocabulary of 23"),
    ({"batch_size": 0}, "batch_size is 0"),
    ({"decoding": SAMPLE, "generator": seeds(2)}, "2 generators for 1 rows"),
    ({"decoding": TWICE, "generator": seeds(1)}, "1 generators for 2 rows"),
    ({"decoding": DECODINGS["beam sampling"], "generator": seeds(2)}, "2 generators for 1 rows"),
    ({"prompt": [3], "decoding": Decoding(num_beams=2)}, "streaming and num_beams=2 contradict"),
    ({"prompt": [3], "decoding": TWICE}, "streaming and num_return_sequences=2"),
    ({"prompt": []}, "prompt 0 is empty"),
    ({"prompt": [3], "generator": seeds(2)}, "2 generators for 1 rows"),
])
def test_bad_calls_say_what_is_wrong_before_the_first_token(model, change, message):
    call, arguments = (stream, {}) if "prompt" in change else (generate, {"prompts": [[3]]})
    with pytest.raises(ValueError, match=message):
        call(model, **arguments | {"decoding": Decoding()} | change)


EDGES = [
    ("max_new_tokens", [1, 5], [0]), ("num_beams", [1, 2], [0]), ("temperature", [0.01, 3.0], [-0.1, -1.0]),
    ("top_k", [0, 1], [-1]), ("top_p", [0.01, 1.0], [0.0, 1.01]), ("min_p", [0.0, 1.0], [-0.01, 1.01]),
    ("no_repeat_ngram_size", [0, 2], [-1]), ("repetition_penalty", [0.1, 2.0], [0.0]),
    ("min_new_tokens", [0, 20], [-1]), ("num_return_sequences", [1], [0]), ("early_stopping", [False, True, "never"], ["always", None, 1]),
    ("eos_ids", [(), (0,), (3, 4)], [(3, 3), (-1,)]),
]


@pytest.mark.parametrize("name, good, bad", EDGES)
def test_options_out_of_range(name, good, bad):
    for value in good:
        assert vars(Decoding(**{name: value}))[name] == value
    for value in bad:
        with pytest.raises(ValueError, match=name):
            Decoding(**{name: value})


@pytest.mark.parametrize("options, words", [
    (dict(num_beams=2, num_return_sequences=3), "num_return_sequences 3 .* num_beams 2"),
    (dict(num_return_sequences=2), "num_return_sequences 2 .* do_sample=False"),
    (dict(max_new_tokens=5, min_new_tokens=6), "min_new_tokens 6 .* max_new_tokens 5"),
])  # fmt: skip
def test_contradictory_options_name_both(options, words):
    with pytest.raises(ValueError, match=words):
        Decoding(**options)
    assert Decoding(num_beams=2, num_return_sequences=2) and Decoding(do_sample=True, num_return_sequences=2)
    assert Decoding(temperature=0, do_sample=True, top_p=0.9) == Decoding(top_p=0.9), "the most probable token"
