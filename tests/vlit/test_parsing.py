"""Conversations are found in whatever form a generator wrote them, and what cannot be read has a name."""

import pytest

from nanovlm.vlit.parsing import Unparsed, parse

TWO = (("user", "a?"), ("assistant", "b."), ("user", "c?"), ("assistant", "d."))
ONE = TWO[:2]


def test_repeated_keys_are_kept_and_names_of_speakers_inside_a_turn_are_words():
    assert parse('{"User": "a?", "AI": "b.", "User": "c?", "AI": "d."}').turns == TWO
    said = ["Which is right, A: cat or B: dog?", "A: the cat", "c?", "User: is a word."]
    text = '{{"User": "{}", "AI": "{}", "User": "{}", "AI": "{}"}}'.format(*said)
    assert [words for _, words in parse(text).turns] == said
    assert parse("User: who?\nAI: He says: me.\nAs the sign: reads").turns[1][1] == "He says: me.\nAs the sign: reads"


@pytest.mark.parametrize(("text", "turns", "notes"), [
    ('```json\n{"User": "a?", "AI": "b."}\n```', ONE, ()),
    ('Here it is:\n{"User": "a?", "AI": "b."}\n{"User": "c?", "AI": "d."}', TWO, ()),
    ('[{"User": "a?", "AI": "b."}, {"User": "c?", "AI": "d."}]', TWO, ()),
    ('{"conversation": [{"user": "a?", "ai": "b."}]}', ONE, ()),
    ('[{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b."}]', ONE, ()),
    ('[{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b."}]', ONE, ()),
    ('{"User": "a?\nreally", "AI": "b."}', (("user", "a?\nreally"), ("assistant", "b.")), ()),
    ('{"User": "a?", "AI": 2}', (("user", "a?"), ("assistant", "2")), ()),
    ('{"User": "a?", "AI": true}', (("user", "a?"), ("assistant", "Yes")), ()),
    ('{"User": "a?", "AI": "b.",}', ONE, ("malformed",)),
    ('{"User": "a?", "AI": "b." "User": "c?", "AI": "d."}', TWO, ("malformed",)),
    ('[{"User": "a?" "AI": "b."}, {"User": "c?", "AI": "d."}]', TWO, ("malformed",)),
    ("{'User': 'a?', 'AI': 'it's b.'}", (("user", "a?"), ("assistant", "it's b.")), ("malformed",)),
    ('{"User": "who said "hi"?", "AI": "b."}', (("user", 'who said "hi"?'), ("assistant", "b.")), ("malformed",)),
    ('{"User": "a?", "AI": "b."} I hope [this helps', ONE, ("malformed",)),
    ('{"User": "a?", "AI": "b.", "User": "c?", "AI": "d and th', ONE, ("malformed", "cut")),
    ('{"User": "a?", "AI": "b.", "User": "c?', ONE, ("malformed", "cut")),
    ('{"User": "a?", "AI": "b.", "User": "c?"}', ONE, ("cut",)),
    ("User: a?\nAI: b.\nUser: c?\nAI: d.", TWO, ("plain text",)),
    ("Question:\na?\n===\nAnswer:\nb.\n===\nQuestion:\nc?\n===\nAnswer:\nd.", TWO, ("plain text",)),
])  # fmt: skip
def test_other_forms_are_understood_and_noted(text, turns, notes):
    parsed = parse(text)
    assert (parsed.turns, parsed.notes) == (turns, notes)


@pytest.mark.parametrize(("text", "reason"), [
    ("", "empty answer"),
    ("I am sorry, I cannot do that.", "no conversation"),
    ('{"AI": "b."}', "begins with the answer"),
    ('{"User": "a?"}', "no answer"),
    ('{"User": "a?", "User": "c?", "AI": "d."}', "two questions in a row"),
    ('{"User": "a?", "AI": "b.", "AI": "d."}', "two answers in a row"),
    ('{"User": "a?", "AI": ""}', "empty turn"),
    ('{"User": "a?", "AI": null}', "empty turn"),
])  # fmt: skip
def test_what_cannot_be_read_has_a_reason(text, reason):
    with pytest.raises(Unparsed) as caught:
        parse(text)
    assert str(caught.value) == reason
