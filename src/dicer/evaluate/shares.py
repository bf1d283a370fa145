"""A share of yes among independent answers, and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Sequence


def share_of(answers: Sequence[bool]) -> dict[str, float]:
    """The share that is True, and its standard error.

    Where all answers are alike the error is not 0: it is that of n + 2 answers, one more yes and one more no (Laplace's
    rule of succession), as in reports.
    """
    n, yes = len(answers), sum(answers)
    share, p, count = yes / n, yes / n, n
    if yes in (0, n):
        p, count = (yes + 1) / (n + 2), n + 2
    return {"value": share, "stderr": math.sqrt(p * (1 - p) / count)}
