"""Metrics on small cases counted by hand, against naive computations, and on the traps of the official programs."""

import itertools
import math
import random

import numpy
import pytest
import torch
from ablations import agreement
from random_models import randomise
from tiny import random_vlm

from nanovlm.evaluation import captions, pairwise, protocols, report
from nanovlm.evaluation.items import Item
from nanovlm.evaluation.vqa_accuracy import CONTRACTIONS, normalize, vqa_accuracy
from nanovlm.recipes import RECIPES
from nanovlm.vlm import Batch, IMAGE_TOKEN


@pytest.mark.parametrize(("text", "form"), [
    ("The Dog.", "dog"), ("two", "2"), ("None", "0"), ("dont", "don't"), ("couldntve", "couldntve"),
    ("a\tred\nbus ", "red bus"), ("red,blue", "red blue"), ("red, blue", "red blue"), ("1,000", "1000"), ("3.5", "3.5"),
    ("half-eaten", "half eaten"), ("half- eaten x-ray", "half eaten xray"), ("1,000 e-mails", "1000 emails"), ("5.", "5"),
    ("...", ""), ("shouldnt've", "shouldn't've"), ("wed", "wed"), ("?", ""),
])  # fmt: skip
def test_vqa_normalisation(text, form):
    assert normalize(text) == form


def test_vqa_accuracy_its_official_quirks_and_contractions():
    answers = ["cat"] * 3 + ["dog"] * 7
    assert vqa_accuracy("Cat.", answers) == pytest.approx((3 * 2 / 3 + 7 * 1) / 10)
    assert vqa_accuracy("the cow", answers) == 0.0
    assert vqa_accuracy("cat", ["cat"]) == 1.0  # no other to agree with
    numbered = [{"answer": "cat", "answer_id": n} for n in range(10)]
    assert vqa_accuracy("Cat.", numbered, official=True) == 0.0  # all ten are equal: nothing is normalised
    assert vqa_accuracy("cat", numbered, official=True) == 1.0
    alike = [{"answer": "cat"}] * 10
    assert vqa_accuracy("cat", alike, official=True) == 0.0  # without ids, equal records vanish from "the others"
    assert vqa_accuracy("cat", alike) == 1.0
    mixed = [{"answer": "The cat", "answer_id": 0}] + [{"answer": "a cat.", "answer_id": n} for n in range(1, 10)]
    assert vqa_accuracy("CAT", mixed, official=True) == 1.0
    assert len(CONTRACTIONS) == 120 - 6  # without the six that lower-cased text never meets, or that map to themselves
    assert CONTRACTIONS["somebody'd"] == "somebodyd" and "shed" not in CONTRACTIONS and "its" not in CONTRACTIONS
    assert all(key != word and key.replace("'", "") == word.replace("'", "") for key, word in CONTRACTIONS.items())


@pytest.mark.parametrize(("text", "tokens"), [  # as Stanford's PTBTokenizer 3.4.1 gives them, punctuation removed
    ("He can't go; won't they?", "he ca n't go wo n't they"),
    ("She's got 3,000 dogs (and 10:30 a.m.)", "she 's got 3,000 dogs -lrb- and 10:30 a.m. -rrb-"),
    ("U.S. flag on Mr. Smith's st. paul's", "u.s. flag on mr. smith 's st. paul 's"),
    ("a black/white cat -- and dog", "a black/white cat and dog"),
    ("gonna wanna cannot", "gon na wan na can not"),
    ("$5 and 50% off #1 A&W rock'n'roll", "$ 5 and 50 % off # 1 a&w rock 'n' roll"),
    ("the dogs' tails wait...what", "the dogs tails wait what"),
    ("e-mail foo@bar.com http://x.org/y", "e-mail foo@bar.com http://x.org/y"),
    ("o'clock y'all it's they're I've I'd I'm we'll", "o'clock y' all it 's they 're i 've i 'd i 'm we 'll"),
    ("don’t “curly” quotes – dash", "do n't curly quotes dash"),
    ("'tis 'twas ain't", "'t is 't was ai n't"),
    ("no. 5 end of no.", "no. 5 end of no"),
    ("end.Start man,woman the 1990's", "end.start man woman the 1990 's"),
])  # fmt: skip
def test_ptb_tokens(text, tokens):
    assert captions.tokenize(text) == tokens.split()


def test_bleu_rouge_and_cider_by_hand():
    (one, two, three, four) = captions.bleu([["a", "b", "b"]], [[["a", "b", "c", "d"], ["b", "b"]]])
    # matches: a, b, b of 3; (a b) (b b) of 2; none. Both references are one token away: the shorter counts, no penalty
    assert one == pytest.approx(1) and two == pytest.approx(1) and three < 1e-3 and four < 1e-2
    assert captions.bleu([["a"]], [[["a", "b", "c"]]])[0] == pytest.approx(math.exp(1 - 3))
    (score,) = captions.rouge_l([["a", "b", "c", "d"]], [[["a", "b", "c", "x", "y", "z"], ["a"]]])
    precision, recall = 3 / 4, 1.0
    assert score == pytest.approx((1 + 1.44) * precision * recall / (recall + 1.44 * precision))
    assert captions.rouge_l([[]], [[["a"]]]) == [0.0]
    same = ["a", "b", "c", "d"]
    assert captions.cider([same], [[same]]) == [0.0]
    corpus = [[same], [["e", "f", "g", "h"]]]
    assert captions.cider([same, ["x"]], corpus) == [pytest.approx(10), 0.0]
    longer = captions.cider([same + ["z"], ["x"]], corpus)[0]
    assert 0 < longer < 10
    draw = random.Random(0)
    for _ in range(50):
        one, other = ([draw.choice("abc") for _ in range(draw.randrange(7))] for _ in range(2))
        subsequences = [{c for n in range(8) for c in itertools.combinations(words, n)} for words in (one, other)]
        assert captions.common_subsequence(one, other) == max(map(len, subsequences[0] & subsequences[1]))


@pytest.mark.parametrize(("text", "official", "strict"), [
    ("Yes, there is.", "yes", "yes"), ("No, there is no dog.", "no", "no"), ("No!", "yes", "no"), ("NO", "yes", "no"),
    ("There is not. Yes.", "no", "other"), ("I see. no", "yes", "other"), ("", "yes", "other"),
])  # fmt: skip
def test_pope_parsers(text, official, strict):
    assert (protocols.parse_pope(text), protocols.parse_strict(text)) == (official, strict)


def test_pope_and_mme_scores():
    scores = report.yes_no_scores([("yes", "yes"), ("yes", "no"), ("no", "no"), ("other", "yes")])
    assert scores == {"accuracy": 0.5, "precision": 0.5, "recall": 0.5, "f1": 0.5, "yes_ratio": 0.5}
    answers = (("random", "yes"), ("popular", "no"))
    both = report.pope([{"kind": kind, "said": said, "answers": ["yes"], "prediction": said} for kind, said in answers])
    assert both["mean f1"] == 0.5 and both["random accuracy"] == 1.0 and both["popular f1"] == 0.0
    def scores(number, *tasks):
        several = [{"group": group, "score": score, "said": "yes", "prediction": "yes"}
                   for group, score in zip("aabb", (1, 1, 1, 0))]  # fmt: skip
        return report.mme([one | {"kind": task} for task in tasks for one in several[:number]])

    assert scores(4, "count") == {"count score": 100 * 0.75 + 100 * 0.5, "unparsed": 0.0}
    assert scores(3, "count")["count score"] == 200.0 and "count score" not in scores(1, "count")  # pairs alone count
    every = scores(4, *report.PERCEPTION)
    assert every["perception"] == 1250.0 and "cognition" not in every


@pytest.mark.parametrize(
    ("text", "word"), [("Yes", "yes"), ("no.", "no"), ("\nYES, it is", "yes"), ("Ah, no", "other"), ("It is", "other"), ("a no", "no")]
)
def test_mme_parser(text, word):
    assert protocols.parse_mme(text) == word


@pytest.mark.parametrize(("text", "place"), [
    ("B", 1), ("(B) dogs", 1), ("b", 1), ("B. a dog", 1), ("The answer is C", 2), ("answer: A.", 0), ("The answer is a dog", 1),
    ("Two cats", 0), ("Both two cats and a dog", None), ("D", None), ("A dog", 1), ("Cats", None), ("", None), ("C: x", 2),
    ("**B**", 1), ("B\nExplanation: A shows cats.", 1), ("The answer is B because they bark.", 1), ("answer:B", 1),
    ("The answer is A because of them", 0), ("The answer is A dog", 1), ("A since they purr", 0), ("d", None),
    ("I think B is correct", 1), ("\\boxed{C}", 2), ("<answer>B</answer>", 1), ("It is B.", 1), ("B is the answer", 1), ("Ans: C", 2),
    ("the answer is b", 1), ("I'd go with C", 2), ("Not B", None), ("it is not B but C", None), ("A or B", None), ("Vitamin C", None),
    ("It is A dog", 1), ("A man is A", 0), ("B is correct, C is correct", None),
])  # fmt: skip
def test_letters(text, place):
    assert protocols.parse_letter(text, ["two cats", "a dog", "a red bus"]) == place


@pytest.mark.parametrize(("text", "options", "place"), [
    ("I do not know", ["yes", "no"], None), ("unknown", ["yes", "no", "maybe"], None), ("a catalog", ["cat", "dog"], None),
    ("a red bus", ["bus", "red bus", "dog"], 1), ("it costs $5.", ["$5", "$50"], 0), ("no", ["no", "no way"], 0), ("x", ["", "x"], 1),
])  # fmt: skip
def test_options_are_read_as_whole_words_and_the_longest_counts(text, options, place):
    assert protocols.parse_letter(text, options) == place


def test_rotations_move_every_option_through_every_letter():
    asked = protocols.rotated([Item("7", "q", (1,), options=("w", "x", "y")), Item("8", "q", options=("w", "x"))])
    assert [(item.id, item.options, item.answers) for item in asked] == [
        ("7#0", ("w", "x", "y"), (1,)), ("7#1", ("x", "y", "w"), (0,)), ("7#2", ("y", "w", "x"), (2,)),
        ("8#0", ("w", "x"), ()), ("8#1", ("x", "w"), ()),
    ]  # fmt: skip
    assert protocols.rotated(asked) == asked  # those that stand rotated in their file


@pytest.mark.parametrize(("text", "letter"), [
    ("B", "B"), ("B. West", "B"), ("Because. The answer is C.", "C"), ("The answer is C", None), ("b", None), ("", None),
    ("The answer is A. The answer is B.", None), ("AB", None), (" D ", "D"), ("E", None),
])  # fmt: skip
def test_science_qa_answers(text, letter):
    assert protocols.parse_science_qa(text, ["w", "x", "y", "z"]) == (letter and "ABCD".index(letter))


def test_verdicts():
    assert [protocols.parse_verdict(text) for text in ("Yes.", '"No", it', "Well yes", "", "yesterday")] == [True, False, None, None, None]
    marks = {"{'pred': 'no', 'score': 3}": (False, 3), "Yes, 4.5 of 9": (True, None), "maybe 5": (None, 5), "no 0": (False, 0)}
    for text, (verdict, mark) in marks.items():
        assert protocols.judgement(text, "score") == {"verdict": verdict, "mark": mark, "score": float(verdict is True)}


def test_elo_by_hand_a_winner_in_both_orders_and_owlevals_ties():
    assert pairwise.elo([("a", "b", 1.0)]) == {"a": 1016.0, "b": 984.0}
    assert pairwise.elo([("a", "b", 0.5)]) == {"a": 1000.0, "b": 1000.0}
    games = [("a", "b", 1.0), ("b", "c", 1.0), ("c", "a", 1.0)]
    assert pairwise.elo(games) != pairwise.elo(games[::-1])
    assert numpy.ptp(list(pairwise.mean_elo(games, numpy.random.default_rng(0), shuffles=400).values())) < 6
    outcomes = [(1, 0), (1, 0.5), (1, 1), (0.5, 1), (0.5, 0.5)]  # of answer A, the model shown first and second
    assert [pairwise.both_orders(*pair) for pair in outcomes] == [1, 1, 0.5, 0, 0.5]
    fair = {"1": {"a": "5", "b": "5", "c": "3"}, "2": {"a": "1", "b": "2", "c": "4"}}
    assert pairwise.ties_allowed("ann", fair) == []
    assert len(pairwise.ties_allowed("ann", {"1": {"a": "5", "b": "5", "c": "5"}, "2": {"a": "6"}})) == 2
    assert len(pairwise.ties_allowed("ann", {str(n): {"a": "1", "b": "1"} for n in range(11)})) == 1
    assert pairwise.ties_allowed("ann", {str(n): {"a": "1", "b": "1"} for n in range(10)}) == []


def test_bradley_terry_finds_the_strengths_that_made_the_games():
    rng, points = numpy.random.default_rng(1), {"a": 1150.0, "b": 1000.0, "c": 850.0}
    games = []
    for one, other in itertools.combinations(points, 2):
        chance = 1 / (1 + 10 ** ((points[other] - points[one]) / 400))
        games += [(one, other, float(rng.random() < chance)) for _ in range(1500)]
    found = pairwise.bradley_terry(games)
    assert all(abs(found[model] - points[model]) < 25 for model in points)
    assert pairwise.bradley_terry(games[::-1]) == pytest.approx(found)
    won = pairwise.bradley_terry([("a", "b", 1.0)] * 5)
    assert won["a"] > won["b"] and math.isfinite(won["a"])
    few = games[::100]
    intervals = pairwise.bootstrap(len(few), lambda places: pairwise.bradley_terry([few[n] for n in places]), rng, draws=50)
    assert all(low < pairwise.bradley_terry(few)[model] < high for model, (low, high) in intervals.items())


def test_icc_against_a_published_table():
    table = [[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]]
    wanted = (0.17, 0.29, 0.71, 0.44, 0.62, 0.91)  # Shrout & Fleiss 1979, Table 4
    assert [round(agreement.icc(table, form), 2) for form in agreement.FORMS] == list(wanted)
    with pytest.raises(ValueError, match="ICC"):
        agreement.icc(table, "ICC(4,1)")
    with pytest.raises(ValueError, match="shape"):
        agreement.icc([[1, 2]])


def naive_loss(model, prompt, ids, pixels):
    """One whole row at a time, nothing shared."""
    row = torch.tensor([prompt + ids])
    shown = torch.arange(len(pixels))
    batch = Batch(
        row, torch.where(torch.arange(row.shape[1])[None] < len(prompt), -100, row), torch.zeros_like(row),
        torch.arange(row.shape[1])[None], torch.cat(pixels) if pixels else None,
        torch.tensor([len(one) for one in pixels], dtype=torch.long), shown, torch.zeros_like(shown),
    )  # fmt: skip
    with torch.no_grad():
        return float(model.loss(batch)[0])


@pytest.mark.parametrize("name", ["tiny", "open_flamingo", "blip2", "llava_phi", "mplug_owl2"])
def test_choices_behind_a_shared_prefix_have_the_losses_of_whole_rows(name):
    """Of every kind of decoder: media aside, learned positions, parallel layers, a vision branch."""
    if name == "tiny":
        model, size = random_vlm(), 8
    else:
        published = RECIPES[name].published
        model = randomise(published.build(published.configs["tiny"])).eval()
        size = model.vision.image_size
    inputs = [[torch.randn(1, 3, size, size) for _ in range(number)] for number in (2, 1, 0)]
    picture = [IMAGE_TOKEN] * model.num_image_tokens(size) if model.media_token is None else [model.media_token]
    prompts = [[5, *picture, 6, *picture, 7], [*picture, 8, 9, 4], [3, 4]]
    choices = [[[9], [10, 11, 12], [13, 3]], [[4, 5], [6, 3]], [[7, 8, 9]]]
    found = protocols.score_choices(model, prompts, choices, inputs)
    for prompt, several, pixels, scores in zip(prompts, choices, inputs, found):
        for ids, (total, length) in zip(several, scores, strict=True):
            assert total == pytest.approx(naive_loss(model, prompt, ids, pixels), abs=1e-3) and length == len(ids)


@pytest.mark.parametrize(
    ("text", "share"),
    [("0.5", 0.5), ("Grade: 1.0", 1.0), ("1", 1.0), ("I say 7, so 0.7", 0.7), ("0", 0.0), ("-", None), ("2.5 of 5", None), ("12", None)],
)
def test_a_grade_is_the_first_number_between_0_and_1(text, share):
    verdict = None if share is None else share == 1
    assert protocols.judgement(text, "share") == {"verdict": verdict, "mark": share, "score": share or 0.0}
