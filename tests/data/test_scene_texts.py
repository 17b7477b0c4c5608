"""Text-only instructions: every answer worked out again from the words alone."""

import re
from collections import Counter

import pytest

from nanovlm.data.scene_questions import FACTS, SceneTexts, TEXT_TYPES
from nanovlm.data.scenes import ALPHABET, COLORS, HELD_OUT, SHAPES, in_held_out_fifth

NUMBER = 3000
OPPOSITES = {"left": "right", "above": "below", "big": "small", "top": "bottom", "yes": "no", "hot": "cold",
             "light": "dark", "up": "down", "day": "night", "old": "new"}
OPPOSITES |= {opposite: word for word, opposite in OPPOSITES.items()}
TURNED = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
OBJECT = re.compile(rf"a (big|small) ({'|'.join(COLORS)}) ({'|'.join(SHAPES)}) at the ([a-z ]+)")
LISTED = re.compile(rf"()({'|'.join(COLORS)}) ({'|'.join(SHAPES)})")
RELATED = re.compile(r"an? (\w+ \w+) is (left of|right of|above|below) an? (\w+ \w+)")


@pytest.fixture(scope="module")
def made():
    """{split: list of (kind, texts of the turns)}."""
    found = {}
    for split in ("train", "new"):
        source = SceneTexts(split)
        found[split] = [source.record(n) for n in range(NUMBER)]
        assert all(not record.visuals and len(record.conversations) == 1 for record in found[split])
        found[split] = [(record.kinds[0], [turn.text for turn in record.conversations[0]]) for record in found[split]]
    return found


def about_caption(question, text):
    """(kind, answer) of a question about a caption, read from its words."""
    things = OBJECT.findall(text) or LISTED.findall(text)
    string = re.search('text "?([A-Z0-9]+)"?', text)

    def fitting(words):
        words = [{"crosses": "cross"}.get(word, word if word == "cross" else word.removesuffix("s"))
                 for word in words.split() if word not in ("object", "objects")]
        return [thing for thing in things if all(word in thing for word in words)]

    if found := re.fullmatch(r"what (?:color is|is the color of) the (\w+)\?", question):
        (thing,) = fitting(found[1])
        return "color", thing[1]
    if found := re.fullmatch(r"what shape is the (\w+) object\?|what is the (\w+) shape\?", question):
        (thing,) = fitting(found[1] or found[2])
        return "shape", thing[2]
    if found := re.fullmatch(r"how many (.+) are there\?", question):
        return "count", str(len(fitting(found[1])))
    if found := re.fullmatch(r"is there an? (.+)\?", question):
        return "existence", "yes" if fitting(found[1]) else "no"
    if found := re.fullmatch(r"where is the (.+)\?", question):
        (thing,) = fitting(found[1])
        return "place", thing[3]
    if found := re.fullmatch(r"is the (.+) big or small\?", question):
        (thing,) = fitting(found[1])
        return "size", thing[0]
    return "reading", string[1]


def solve(kind, text):
    """(text that must or must not be held out, answer)."""
    if kind == "opposite":
        return None, OPPOSITES[re.fullmatch(r"what is the opposite of (\w+)\?", text)[1]]
    if kind == "addition":
        one, other = sorted(map(int, re.fullmatch(r"what is (\d) plus (\d)\?", text).groups()))
        return f"{one} plus {other}", str(one + other)
    if kind == "spelling":
        string = re.fullmatch(r"spell (\w+)\.", text)[1]
        return f"spell {string}", " ".join(string)
    if kind == "next_letter":
        return None, chr(ord(re.fullmatch(r"which letter comes after ([A-Y])\?", text)[1]) + 1)
    if kind == "word_of_phrase":
        end, phrase = re.fullmatch(r"what is the (first|last) word of: ([a-z ]+)", text).groups()
        return phrase, phrase.split()[0 if end == "first" else -1]
    sentence, question = text.split(". ")
    if kind != "described_relation":
        about, answer = about_caption(question, sentence)
        assert kind == f"{'described' if OBJECT.search(sentence) else 'listed'}_{about}"
        return sentence, answer
    one, relation, other = RELATED.fullmatch(sentence).groups()
    assert one != other
    facts = {(one, relation, other), (other, TURNED[relation], one)}
    if found := re.fullmatch(r"what is (left of|right of|above|below) the (.+)\?", question):
        (answer,) = [thing for thing, *rest in facts if rest == [found[1], found[2]]]
        return sentence, answer
    asked = re.fullmatch(r"is the (.+) (left of|right of|above|below) the (.+)\?", question).groups()
    assert {asked[0], asked[2]} == {one, other}
    return sentence, "yes" if asked in facts else "no"


@pytest.mark.parametrize("split", ["train", "new"])
def test_every_answer_is_right_and_in_its_split(made, split):
    kinds = Counter()
    for kind, turns in made[split]:
        kinds[kind if kind in TEXT_TYPES else kind.split("_")[0]] += 1
        if kind == "plain_caption":
            (key,) = turns
        else:
            text, answer = turns
            key, right = solve(kind, text)
            assert answer == right, (kind, text, answer)
        assert key is None or in_held_out_fifth(key) == (split == "new")
    expected = set(TEXT_TYPES) - ({"opposite", "next_letter"} if split == "new" else set())
    assert set(kinds) == expected and min(kinds.values()) > 0.75 * NUMBER / len(expected)


def test_held_out_pairs_and_strings_never_occur(made):
    pairs = re.compile("|".join(f"{color} {shape}" for color, shape in HELD_OUT))
    for _, turns in made["train"] + made["new"]:
        assert not any(pairs.search(text) for text in turns)
        for word in re.findall(rf"\b[{ALPHABET}]{{2,3}}\b", " ".join(turns)):
            assert not in_held_out_fifth(word)


def test_the_new_split_shares_no_sum_spelling_or_phrase_with_training(made):
    for kind in ("addition", "spelling", "word_of_phrase", "described_relation"):
        trained, new = ({solve(*pair)[0] for pair in ((k, t[0]) for k, t in made[split] if k == kind)}
                        for split in ("train", "new"))
        assert trained and new and not trained & new
    sums = {split: {solve(k, t[0])[0] for k, t in made[split] if k == "addition"} for split in made}
    assert 53 <= len(sums["train"] | sums["new"]) <= 55 and 5 <= len(sums["new"]) <= 20


def test_all_facts_occur_evenly(made):
    train = made["train"]
    assert len({t[0] for k, t in train if k == "opposite"}) == 20
    assert {t[0][-2] for k, t in train if k == "next_letter"} == set("ABCDEFGHIJKLMNOPQRSTUVWXY")
    assert {len(t[0].split(": ")[1].split()) for k, t in train if k == "word_of_phrase"} == {2, 3, 4}
    for kind, half in (("word_of_phrase", "first word"), ("described_relation", ". what")):
        some = [half in t[0] for k, t in train if k == kind]
        assert 0.4 < sum(some) / len(some) < 0.6
    related = [t for k, t in train if k == "described_relation"]
    answers = Counter(t[1] for t in related if ". is" in t[0])
    assert 0.38 < answers["yes"] / answers.total() < 0.62
    # either object is asked for, and either comes first
    turned = [t[1] in t[0].split(" is ")[0] for t in related if ". what" in t[0]]
    assert 0.38 < sum(turned) / len(turned) < 0.62
    opposites = Counter(t[1] in ("right", "below", "small", "bottom", "no", "cold", "dark", "down", "night", "new")
                        for k, t in train if k == "opposite")
    assert 0.38 < opposites[True] / opposites.total() < 0.62
    forms = Counter("at the" in t[0] and "long" or " is " in t[0] and "related" or "short"
                    for k, t in train if k == "plain_caption")
    assert min(forms["long"], forms["related"], forms["short"]) > 0.25 * forms.total()
    objects = Counter(len(OBJECT.findall(t[0])) for k, t in train if k == "described_size")
    assert set(objects) == {1, 2, 3, 4}
    listed = {k.removeprefix("listed_") for k, _ in train if k.startswith("listed")}
    assert listed == {"color", "shape", "count", "existence", "reading"}
    described = {k.removeprefix("described_") for k, _ in train if k.startswith("described")}
    assert described == {*listed, "place", "size", "relation"}


def test_options_and_determinism():
    one, other = SceneTexts(seed=5, length=7), SceneTexts(seed=5)
    assert [one.record(n) for n in range(40)] == [other.record(n) for n in reversed(range(40))][::-1]
    assert one.record(0) != SceneTexts(seed=6).record(0) and len(one) == 7 and one.name == "scene_texts_train"
    assert len({one.record(n).id for n in range(10)} | {SceneTexts("new", seed=5).record(0).id}) == 11
    assert {SceneTexts(weights={"addition": 1, "spelling": 0}).record(n).kinds for n in range(20)} == {("addition",)}
    described = [SceneTexts(weights={"described": 1}, max_objects=2, string_share=1).record(n) for n in range(60)]
    texts = [record.conversations[0][0].text for record in described]
    assert all('text "' in text for text in texts) and {len(OBJECT.findall(text)) for text in texts} == {1, 2}
    plain = SceneTexts(weights={"plain_caption": 1}, string_share=0)
    assert not any("text" in plain.record(n).conversations[0][0].text for n in range(60))
    with_text = sum('text "' in SceneTexts(weights={"described": 1}).record(n).conversations[0][0].text
                    for n in range(400))
    assert 0.23 < with_text / 400 < 0.4
    assert {turn.role for turn in plain.record(0).conversations[0]} == {"assistant"}
    first = SceneTexts(weights={"addition": 1}), SceneTexts("new", weights={"addition": 1})
    assert len(FACTS) == 6 and first[0].record(1) != first[1].record(1)


def test_several_questions_about_a_text_follow_each_other():
    source = SceneTexts(weights={"described": 1, "listed": 1}, questions_per_text=4)
    lengths = Counter()
    for n in range(100):
        (turns,) = source.record(n).conversations
        assert [turn.role for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
        sentence, first = turns[0].text.split(". ")
        questions = [first, *(turn.text for turn in turns[2::2])]
        assert [about_caption(question, sentence)[1] for question in questions] == [turn.text for turn in turns[1::2]]
        assert len(set(questions)) == len(questions)
        lengths[len(questions)] += 1
    assert max(lengths) == 4 and lengths[4] > 80


@pytest.mark.parametrize("options, message", [
    ({"questions_per_text": 0}, "questions_per_text 0"),
    ({"split": "test"}, "unknown split 'test'"),
    ({"weights": {"additions": 1}}, "unknown type 'additions'. Did you mean 'addition'"),
    ({"weights": {"addition": -1}}, "the weight of 'addition' is -1"),
    ({"split": "new", "weights": {"opposite": 1}}, "no type of the split 'new' has a weight above 0"),
    ({"max_objects": 0}, "max_objects 0"),
    ({"string_share": -0.5}, "string_share -0.5"),
    ({"string_share": 1.5}, "string_share 1.5"),
    ({"seed": -1}, "seed -1"),
    ({"length": 0}, "length 0"),
])
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError) as error:
        SceneTexts(**options)
    assert message in str(error.value)
    assert len(SceneTexts()) == 10_000
    assert len(SceneTexts(max_objects=1, string_share=0, length=1)) == len(SceneTexts(string_share=1, length=1)) == 1


def test_several_questions_about_one_text_follow_one_another():
    source = SceneTexts(weights={"described": 1.0, "listed": 1.0}, questions_per_text=4, max_objects=3)
    lengths = set()
    for n in range(60):
        (turns,) = source.record(n).conversations
        lengths.add(len(turns) // 2)
        assert [turn.role for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
        assert all(". " not in turn.text for turn in turns[2::2])  # the text is told once
        questions = [turns[0].text.split(". ")[-1]] + [turn.text for turn in turns[2::2]]
        assert len(set(questions)) == len(questions)
    assert max(lengths) == 4


def test_at_least_one_question_per_text():
    with pytest.raises(ValueError, match="1 or more"):
        SceneTexts(questions_per_text=0)
