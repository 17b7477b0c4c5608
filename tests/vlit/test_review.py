"""What the VLIT review prints about itself follows from its tables, but for what it misprints."""

import pytest
from ablations import review


def test_the_review_is_reproduced_but_for_what_it_misprints():
    """The printed numbers are in the review's Tables 4 and 15; three of the four rows of ICC follow from Table 3."""
    for name, values in review.agreement().items():
        close = [abs(mine - printed) < 5e-5 for mine, printed in zip(values, review.ICC_PRINTED[name])]
        assert close == [name != "Ours"] * 2
    assert [round(value, 4) for value in review.agreement()["Ours"]] == [0.284, 0.5434]
    told = review.differences()
    assert len(told) == 4 and [sum(words in line for line in told) for words in ("'Ours'", "with VR")] == [2, 2]
    for values in review.correlations().values():
        assert [p for _, p in values] == pytest.approx([1 - abs(r) for r, _ in values], abs=1e-6)  # four data sets
    assert review.correlations()["B"][0][0] == pytest.approx(0.377, abs=0.02)  # smaller is better, says the text
    text = "\n".join(review.lines())
    assert all(words in text for words in ("0.2840", "0.3028", "0.5434", "0.5658", "not as printed", "0.116"))
