"""Of a Gram matrix: systems of equations, refused where they have no answer, and what inputs add up to together."""

from __future__ import annotations

import torch
from torch import Tensor

from dicer.errors import RecipeError
from dicer.measure.statistics import BLOCK, exact_products, mirrored


def factor(gram: Tensor, ridge: float, what: str) -> Tensor:
    """The Cholesky factor of ``gram + ridge * mean(diag) I``, lower [N, N].

    Args:
        gram: [N, N], symmetric.
        ridge: relative to the mean of the diagonal.
        what: the matrix is of, for the message.

    Raises:
        RecipeError: it is not finite, or singular also with the ridge.
    """
    diagonal = gram.diagonal()
    if not diagonal.isfinite().all():
        raise RecipeError(f"the Gram matrix of {what} is not finite: its activations overflow; try --dtype float32.")
    mean = float(diagonal.mean()) or 1.0
    damped = gram.clone()
    damped.diagonal().add_(ridge * mean)
    with exact_products():
        lower, fault = torch.linalg.cholesky_ex(damped)
    if int(fault):
        raise RecipeError(
            f"the Gram matrix of {what} is singular at ridge {ridge:g}: ask for a larger --ridge, or more calibration "
            "tokens."
        )
    found: Tensor = lower
    return found


def inverse(gram: Tensor, ridge: float, what: str) -> Tensor:
    """``(gram + ridge * mean(diag) I)^-1``, [N, N]."""
    with exact_products():
        found: Tensor = torch.cholesky_inverse(factor(gram, ridge, what))
    return found


def joint(gram: Tensor, rows: Tensor) -> Tensor:
    """``sum_t <a_i(t) w_i, a_j(t) w_j>``, what inputs i and j bring to the output together, float32 [N, N].

    Of inputs with factors z, the square of all that they bring is ``z^T joint z``.

    Args:
        gram: H [N, N] of the inputs a.
        rows: W [N, d], what each is multiplied with.
    """
    rows = rows.to(gram.device, torch.float32)
    found = torch.empty_like(gram, dtype=torch.float32)
    with exact_products():
        for start in range(0, len(gram), BLOCK):  # below the diagonal, as it is symmetric
            block, end = slice(start, start + BLOCK), start + BLOCK
            torch.mul(gram[block, :end], rows[block] @ rows[:end].T, out=found[block, :end])
    return mirrored(found)
