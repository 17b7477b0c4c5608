"""The statistics that the VLIT review prints about its own experiment, computed again from its own tables.

    python -m nanovlm.vlit review

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

import numpy

from nanovlm.evaluation.agreement import icc, pearson

COLUMNS = ("Overall", "SU", "II", "IL", "IA", "IC", "SR", "IIR", "VR", "TR")
DATA_SETS = ("LLaVA", "MIMIC-IT", "Ours", "Ours, filtered")
TABLE_3 = {  # data set -> accuracy (%) of LLaVA, BLIP-2 and OpenFlamingo in COLUMNS
    "LLaVA": ((28.0, 25.3, 28.3, 33.9, 24.3, 25.8, 27.6, 10.0, 10.3, 18.2),
              (27.3, 25.7, 25.3, 33.9, 22.7, 22.4, 22.4, 20.0, 10.3, 8.6),
              (25.5, 25.7, 27.0, 30.7, 22.7, 23.6, 25.2, 10.0, 13.8, 21.5)),
    "MIMIC-IT": ((26.3, 24.4, 25.4, 30.7, 24.3, 23.1, 25.7, 10.0, 14.8, 21.5),
                 (26.5, 24.1, 24.4, 31.2, 20.1, 21.7, 21.8, 20.0, 13.8, 9.1),
                 (25.8, 23.9, 24.4, 33.9, 22.7, 24.0, 24.6, 20.0, 10.8, 20.4)),
    "Ours": ((28.3, 25.0, 27.0, 35.0, 24.3, 25.8, 26.3, 10.0, 17.2, 45.5),
             (27.5, 26.3, 26.5, 33.9, 25.2, 23.6, 23.7, 20.0, 13.8, 9.1),
             (28.1, 28.2, 26.0, 33.9, 21.4, 25.5, 22.4, 20.0, 17.2, 27.3)),
    "Ours, filtered": ((28.7, 26.3, 29.1, 36.1, 26.5, 26.4, 26.3, 20.0, 18.3, 47.1),
                       (28.4, 27.7, 27.0, 35.0, 25.2, 25.8, 25.7, 20.0, 19.4, 17.5),
                       (29.1, 30.5, 29.6, 37.9, 26.5, 27.5, 24.6, 20.0, 20.6, 30.7)),
}  # fmt: skip
ICC_PRINTED = {"LLaVA": (0.7978, 0.9221), "MIMIC-IT": (0.7239, 0.8872), "Ours": (0.3028, 0.5658),
               "Ours, filtered": (0.4398, 0.7019)}  # fmt: skip
TABLE_4 = {  # key of indicators.Indicator -> its values for DATA_SETS, as far as they can be read
    "MD": (30.7, 30.9, 33.2, 34.1), "C": (91.1, 93.4, 94.6, 94.8), "T": (9, 9, 10, 10), "I": (14.5, 13.3, 20.5, 22.6),
    "R": (None, None, 2.3, 2.5), "O/G": (None, None, 1.9, 2.0), "IC": (6.5, 4.4, 6.8, 7.1), "B": (14.6, 10.5, 16.8, 12.3),
}  # fmt: skip
TABLE_15 = {  # indicator -> printed correlation with each of COLUMNS
    "MD": (0.952, 0.891, 0.705, 0.946, 0.852, 0.929, 0.328, 0.821, 0.989, 0.999),
    "T": (0.932, 0.842, 0.631, 0.885, 0.741, 0.874, 0.195, 0.707, 0.931, 0.972),
    "I": (0.986, 0.937, 0.778, 0.965, 0.867, 0.959, 0.402, 0.728, 0.971, 0.991),
    "IC": (0.864, 0.886, 0.893, 0.802, 0.731, 0.839, 0.639, 0.194, 0.656, 0.696),
    "B": (0.377, 0.301, 0.250, 0.205, 0.009, 0.249, -0.065, -0.342, 0.116, 0.240),
}
ICC_DIGITS = 5e-5  # a printed value that differs by more is not what Table 3 gives
ROUNDING = 0.05  # what one printed decimal of Tables 3 and 4 leaves open in a correlation of four points


def agreement():
    """{data set: (ICC(3,1), ICC(3,k))} over the ten columns of Table 3: floats."""
    return {
        name: tuple(icc(numpy.transpose(rows), form) for form in ("ICC(3,1)", "ICC(3,k)"))
        for name, rows in TABLE_3.items()
    }


def correlations():
    """{indicator: ((r, p) with each of COLUMNS)}, the mean of the three models' accuracy over the four data sets."""
    means = numpy.array([numpy.mean(TABLE_3[name], axis=0) for name in DATA_SETS])
    return {key: tuple(pearson(TABLE_4[key], column) for column in means.T) for key in TABLE_15}


def differences():
    """Where the printed numbers do not follow from the printed tables: list of str."""
    found = [
        f"ICC of {name!r}: {form} {mine:.4f}, printed {printed:.4f}"
        for name, values in agreement().items()
        for form, mine, printed in zip(("SM", "AM"), values, ICC_PRINTED[name])
        if abs(mine - printed) > ICC_DIGITS
    ]
    for key, values in correlations().items():
        found += [
            f"correlation of {key} with {column}: {r:.3f}, printed {printed:.3f}"
            for column, (r, _), printed in zip(COLUMNS, values, TABLE_15[key])
            if abs(r - printed) > ROUNDING
        ]
    return found


def add_flags(parser):
    """`review` has none."""


def run(wishes):
    """Print both tables anew: list of str."""
    lines = [f"{'ICC over ten columns':<22}{'SM':>8}{'printed':>9}{'AM':>8}{'printed':>9}"]
    for name, (single, mean) in agreement().items():
        lines.append(f"{name:<22}{single:>8.4f}{ICC_PRINTED[name][0]:>9.4f}{mean:>8.4f}{ICC_PRINTED[name][1]:>9.4f}")
    lines += ["", f"{'r, printed below':<18}" + "".join(f"{column:>9}" for column in COLUMNS)]
    for key, values in correlations().items():
        lines.append(f"{key:<18}" + "".join(f"{r:>9.3f}" for r, _ in values))
        lines.append(" " * 18 + "".join(f"{r:>9.3f}" for r in TABLE_15[key]))
        lines.append(f"{'  p':<18}" + "".join(f"{p:>9.3f}" for _, p in values))
    return [*lines, "", "not as printed:", *(f"    {words}" for words in differences())]
