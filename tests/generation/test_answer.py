import dataclasses
import itertools

import pytest
from PIL import Image

from nanovlm.data import templates
from nanovlm.data.records import Turn, Visual
from nanovlm.data.templates import NANO, Template
from nanovlm.data.tokenizer import Tokenizer, train_tokenizer
from nanovlm.generation import sampler
from nanovlm.generation.answer import PromptTooLong, clean, make_prompt, pieces, reply, stream
from nanovlm.generation.chat import Assistant
from nanovlm.generation.sampler import Decoding
from tiny import random_vlm

TEMPLATES = {name: one for name, one in vars(templates).items() if isinstance(one, Template)} | {
    "suffix and end token": Template(answer_prefix=" ", answer_suffix="###"),
    "prefix of words": Template(answer_prefix=" it is", answer_suffix="\n", end_with_eos=False),
}
RED = Visual("red", (Image.new("RGB", (8, 8), "red"),))
BLUE = Visual("blue", (Image.new("RGB", (9, 7), "blue"),) * 2)


@pytest.fixture(scope="module")
def tokenizer():
    backend = train_tokenizer(["user: what color is the circle?\nbot: a red one"] * 3, 300).backend
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endofchunk|>", "<image>", "<end_of_utterance>"])
    return Tokenizer(backend)


@pytest.fixture(scope="module")
def assistant(tokenizer):
    return Assistant(random_vlm(tokenizer.vocab_size, context_length=200), tokenizer, NANO, 8)


def asked(*questions):
    """A conversation that ends with a question; every other turn is an answer."""
    return [Turn(role, (text,)) for role, text in zip(itertools.cycle(("user", "assistant")), questions)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_template_writes_around_an_answer_is_no_part_of_it(assistant, tokenizer, monkeypatch, name):
    """The new tokens are those that training would have here, up to the first that ends a reply."""
    template = TEMPLATES[name]
    turns = asked("what color?", "a red circle")
    asks = templates.write(templates.prompt(turns[:1], template), tokenizer, ())
    whole = templates.write(templates.segments(turns, template), tokenizer, ())
    ends = templates.end_ids(template, tokenizer)
    new = list(itertools.takewhile(lambda token: token not in ends, whole.ids[len(asks.ids) :]))
    monkeypatch.setattr(sampler, "generate", lambda model, prompts, *_, **__: [new] * len(prompts))
    monkeypatch.setattr(sampler, "stream", lambda *_: iter(new))
    assistant = dataclasses.replace(assistant, template=template)
    prompt, said = make_prompt(assistant, turns[:1], [], 5), []
    assert prompt.row.ids == asks.ids
    assert reply(assistant, [prompt], Decoding()) == ["a red circle"]
    assert "".join(stream(assistant, prompt, Decoding(), said)) == "a red circle" and said == new


def test_the_suffix_goes_first_then_what_follows_a_stop_word_then_the_prefix_and_the_blanks():
    template = Template(answer_prefix=" it is", answer_suffix="\n")
    assert clean(" it is red\n", template) == "red"
    assert clean(" it is red, blue\n", template, (";", ",", "b")) == "red"
    assert clean("it is red\n\n", template) == "it is red"
    assert clean(" ", template) == clean("", template) == clean("\n", template) == ""


@pytest.mark.parametrize("prefix, suffix", [(" ", ""), ("", "\n"), (" a", "aab"), ("ab", "b"), ("", ""), (" ", "a b")])
def test_pieces_make_the_whole_and_nothing_given_is_taken_back(prefix, suffix):
    template = Template(answer_prefix=prefix, answer_suffix=suffix)
    for letters in itertools.product(" ab\n", repeat=5):
        found = list(pieces(letters, template))
        assert "".join(found) == clean("".join(letters), template) and all(found)


def test_conversations_of_unequal_length_are_answered_together_as_alone(assistant, monkeypatch):
    pixels, calls = {}, []
    both = [Turn("user", (0, "what is this?", 1)), Turn("assistant", ("a red one",)), Turn("user", ("and now?",))]
    prompts = [
        make_prompt(assistant, turns, visuals, 6, pixels)
        for turns, visuals in ((asked("what?"), []), (both, [RED, BLUE]), (asked("what?"), []), (asked("a", "b", "c"), []),
                               ([Turn("user", ("is it red?", 0))], [BLUE]))
    ]  # fmt: skip
    assert [len(prompt.visual_inputs) for prompt in prompts] == [0, 2, 0, 0, 1]
    assert prompts[1].visual_inputs[1] is prompts[4].visual_inputs[0] is pixels["blue"], "read once"
    assert prompts[1].visual_inputs[1].shape == (2, 3, 8, 8)
    alone = [reply(assistant, [prompt], Decoding(max_new_tokens=6))[0] for prompt in prompts]
    whole = sampler.generate
    monkeypatch.setattr(sampler, "generate", lambda *args, **more: calls.append(args) or whole(*args, **more))
    for batch_size in (None, 1, 2):
        assert reply(assistant, prompts, Decoding(max_new_tokens=6), batch_size=batch_size) == alone
    lengths = [len(prompt) for prompt in calls[0][1]]
    assert len(lengths) == 4 and lengths == sorted(lengths), "equal prompts once, short ones first"
    assert calls[0][2].eos_ids == (assistant.tokenizer.eos,)
    (found,) = reply(assistant, prompts[:1], Decoding(max_new_tokens=6, num_beams=2))
    assert "".join(stream(assistant, prompts[0], Decoding(max_new_tokens=6, num_beams=2), [])) == found
    assert reply(assistant, [], Decoding()) == []


def test_every_sampled_answer_has_a_seed_of_its_own(assistant):
    decoding = Decoding(max_new_tokens=6, do_sample=True, temperature=3.0)
    prompts = [make_prompt(assistant, asked("what?"), [], 6)] * 3
    found = reply(assistant, prompts, decoding, ["0/a", "0/b", "0/c"])
    assert len(set(found)) == 3 and len(reply(assistant, prompts, decoding)) == 3
    assert reply(assistant, prompts, decoding, ["0/c", "0/a", "0/b"]) == [found[2], found[0], found[1]]


def test_a_conversation_may_fill_the_context_and_no_more(assistant):
    length = len(make_prompt(assistant, asked("what?"), [], 1).row.ids)
    make_prompt(assistant, asked("what?"), [], 200 - length)
    with pytest.raises(PromptTooLong, match=f"{length} tokens and the answer up to {201 - length}.* has 200"):
        make_prompt(assistant, asked("what?"), [], 201 - length)
