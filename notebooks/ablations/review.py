"""The statistics that the VLIT review prints about its own experiment, computed again from its own tables.

    python notebooks/ablations/review.py

Table 3: SEED-Bench accuracy of three models tuned on four data sets. Table 4: the indicators of these data sets, and
how well the models agree (ICC). Table 15: correlation of indicators with accuracy. What comes out:
- ICC is ICC(3,1) ("SM") and ICC(3,k) ("AM") over the ten columns, "Overall" counted as if it were a task of its own;
  three of the four rows come out to all digits, the row "Ours" does not;
- Table 15 comes out to within 0.04 but for two values of column VR, which differ by 0.12. With four data sets
  p = 1 - |r|, so that a correlation of 0.9 may well be chance;
- Balance, smaller is better, correlates positively with most columns; the text says the opposite.
Table 4 prints correctness, which Table 15 leaves out. Its columns R and O/G are legible for two data sets only in the
copy at hand, so their rows of Table 15 are not checked.
"""

import json
import sys
from pathlib import Path

import numpy

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]

from ablations.agreement import icc, pearson
from nanovlm.vlit.words import load_table

TABLES = json.loads(Path(__file__).with_name("review.json").read_text(encoding="utf-8"))
COLUMNS = TABLES["columns"]
TABLE_3 = TABLES["Table 3"]  # data set -> accuracy (%) of LLaVA, BLIP-2 and OpenFlamingo in COLUMNS
ICC_PRINTED = TABLES["ICC"]  # data set -> SM, AM
TABLE_4 = load_table("table_4.json")["values"]  # key of indicators.Indicator -> its value for each data set of Table 3
TABLE_15 = TABLES["Table 15"]  # indicator -> printed correlation with each of COLUMNS
ICC_DIGITS = 5e-5  # a printed value that differs by more is not what Table 3 gives
ROUNDING = 0.05  # what one printed decimal of Tables 3 and 4 leaves open in a correlation of four points


def agreement():
    """{data set: (ICC(3,1), ICC(3,k))} over the ten columns of Table 3: floats."""
    return {name: tuple(icc(numpy.transpose(rows), form) for form in ("ICC(3,1)", "ICC(3,k)")) for name, rows in TABLE_3.items()}


def correlations():
    """{indicator: ((r, p) with each of COLUMNS)}, the mean of the three models' accuracy over the four data sets."""
    means = numpy.array([numpy.mean(rows, axis=0) for rows in TABLE_3.values()])
    return {key: tuple(pearson(TABLE_4[key], column) for column in means.T) for key in TABLE_15}


def differences():
    """Where the printed numbers do not follow from the printed tables: list of str."""
    found = [f"ICC of {name!r}: {form} {mine:.4f}, printed {printed:.4f}" for name, values in agreement().items()
             for form, mine, printed in zip(("SM", "AM"), values, ICC_PRINTED[name]) if abs(mine - printed) > ICC_DIGITS]  # fmt: skip
    return found + [f"correlation of {key} with {column}: {r:.3f}, printed {printed:.3f}" for key, values in correlations().items()
                    for column, (r, _), printed in zip(COLUMNS, values, TABLE_15[key]) if abs(r - printed) > ROUNDING]  # fmt: skip


def lines():
    """Both tables anew: list of str."""
    found = [f"{'ICC over ten columns':<22}{'SM':>8}{'printed':>9}{'AM':>8}{'printed':>9}"]
    for name, (single, mean) in agreement().items():
        found.append(f"{name:<22}{single:>8.4f}{ICC_PRINTED[name][0]:>9.4f}{mean:>8.4f}{ICC_PRINTED[name][1]:>9.4f}")
    found += ["", f"{'r, printed below':<18}" + "".join(f"{column:>9}" for column in COLUMNS)]
    for key, values in correlations().items():
        rows = (key, [r for r, _ in values]), ("", TABLE_15[key]), ("  p", [p for _, p in values])
        found += [f"{name:<18}" + "".join(f"{value:>9.3f}" for value in numbers) for name, numbers in rows]
    return [*found, "", "not as printed:", *(f"    {words}" for words in differences())]


if __name__ == "__main__":
    print("\n".join(lines()))
