"""How well several raters agree, and how two quantities go together.

ICC   intraclass correlation from the mean squares of a two-way table   Shrout & Fleiss, Psych. Bulletin 86 (1979)
r     Pearson's correlation, with the two-sided p-value of Student's t
"""

import math

import numpy

from nanovlm.names import check_known

FORMS = ("ICC(1,1)", "ICC(2,1)", "ICC(3,1)", "ICC(1,k)", "ICC(2,k)", "ICC(3,k)")


def icc(table, form="ICC(3,1)"):
    """Intraclass correlation.

    Args:
      table: n rows (what is rated) of k marks, one per rater; n and k at least 2.
      form: one of FORMS. 1: every row has raters of its own; 2: the same raters, drawn from many; 3: just these raters.
        1: of a single rater; k: of the mean of all k.
    Returns: float, at most 1.
    """
    check_known("unknown form", form, FORMS)
    table = numpy.asarray(table, dtype=float)
    if table.ndim != 2 or min(table.shape) < 2:
        raise ValueError(f"a table of shape {table.shape}; at least 2 rows of 2 marks are needed")
    n, k = table.shape
    rows = k * ((table.mean(1) - table.mean()) ** 2).sum()
    raters = n * ((table.mean(0) - table.mean()) ** 2).sum()
    total = ((table - table.mean()) ** 2).sum()
    between = rows / (n - 1)  # mean squares
    error = (total - rows - raters) / ((n - 1) * (k - 1))
    if form[4] == "1":
        error, extra = (total - rows) / (n * (k - 1)), 0.0
    else:
        extra = (raters / (k - 1) - error) / n if form[4] == "2" else 0.0
    if form[6] == "1":
        return float((between - error) / (between + (k - 1) * error + k * extra))
    return float((between - error) / (between + extra))


def pearson(x, y):
    """Pearson's correlation and its two-sided p-value: (float, float).

    The p-value integrates the density of r under independence, (1 - r²)^((n-4)/2), numerically; for n = 4 it is 1 - |r|.
    """
    x, y = numpy.asarray(x, dtype=float), numpy.asarray(y, dtype=float)
    if x.shape != y.shape or len(x) < 3:
        raise ValueError(f"{len(x)} and {len(y)} values; two series of equal length, 3 at least, are needed")
    x, y = x - x.mean(), y - y.mean()
    length = math.sqrt((x @ x) * (y @ y))
    if not length:
        raise ValueError("one of the two series is constant; a correlation needs some variation in both")
    r = float(numpy.clip(x @ y / length, -1, 1))
    # r = sin(a): the density becomes cos(a)^(n-3), without a pole at n = 3
    angle = numpy.linspace(-math.pi / 2, math.pi / 2, 20001)
    density = numpy.cos(angle) ** (len(x) - 3)
    tail = numpy.linspace(math.asin(abs(r)), math.pi / 2, 20001)
    return r, float(2 * numpy.trapezoid(numpy.cos(tail) ** (len(x) - 3), tail) / numpy.trapezoid(density, angle))
