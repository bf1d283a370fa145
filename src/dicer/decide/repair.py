"""The kept columns of an output projection solved anew, so that the sub-layer's output stays what it was.

With H the Gram matrix of the projection's inputs that stay, W' their columns and r what the output lacks with them,
``W = W' + (H + ridge I)^-1 sum_t a(t) r(t)^T``: least squares with a ridge that holds on to W', so that the error on
the calibration tokens is never above that of W' (OSSCAR, Meng et al. 2024; MoDeGPT, Lin et al. 2025).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from dicer.decide.layer_plan import LayerPlan, Repair
from dicer.errors import RecipeError
from dicer.measure.gram import factor
from dicer.measure.propagate import CutVisit, Evidence
from dicer.measure.statistics import Sums, exact_products
from dicer.model.units import Axis

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
ENOUGH, LEAST = 10, 2  # calibration tokens for each input that stays: below, it is said; and below, factors are solved
_TRIED = 64  # outputs that a ridge is tried on; one ridge serves all
Form = Literal["least-squares", "factors"]


@dataclass(frozen=True)
class Equations:
    """What is to be solved, over some tokens.

    Attributes:
        gram: H [K * C, K * C], of the inputs that stay.
        right: sum_t a(t) r(t)^T, [K * C, d].
        lacking: sum_t |r(t)|^2.
        count: tokens.
        inputs: sum_t a(t), [K * C]; None where no bias is solved along.
        missing: sum_t r(t), [d]; None where no bias is solved along.
    """

    gram: Tensor
    right: Tensor
    lacking: float
    count: int
    inputs: Tensor | None = None
    missing: Tensor | None = None

    def centred(self) -> Equations:
        """The same around the means, where a bias takes them up."""
        if self.inputs is None or self.missing is None:
            return self
        gram = self.gram - torch.outer(self.inputs, self.inputs / self.count)
        right = self.right - torch.outer(self.inputs, self.missing / self.count)
        return replace(
            self, gram=gram, right=right, lacking=self.lacking - float(self.missing.square().sum()) / self.count
        )

    def bias(self, change: Tensor) -> Tensor | None:
        """The best bias [d] beside a change of the columns [K * C, d]."""
        if self.inputs is None or self.missing is None:
            return None
        return (self.missing - change.T @ self.inputs) / self.count

    def error(self, change: Tensor, bias: Tensor | None) -> float:
        """sum_t |r(t) - change^T a(t) - bias|^2."""
        with exact_products():
            left = (change * (self.gram @ change - 2 * self.right)).sum()
        if bias is not None and self.inputs is not None and self.missing is not None:
            left += self.count * bias.square().sum() - 2 * bias @ (self.missing - change.T @ self.inputs)
        return self.lacking + float(left)

    def by_column(self, columns: Tensor) -> Equations:
        """For one factor of each column [K * C, d], beside the best bias."""
        centred = self.centred()
        with exact_products():
            gram = centred.gram * (columns @ columns.T)
        return Equations(gram, (centred.right * columns).sum(1, keepdim=True), centred.lacking, self.count)

    def some(self, step: int) -> Equations:
        """Of every so manieth output; what is lacking is that of all."""
        missing = None if self.missing is None else self.missing[::step]
        return replace(self, right=self.right[:, ::step], missing=missing)

    def minus(self, other: Equations) -> Equations:
        """Over the tokens that the other does not have."""
        inputs = None if self.inputs is None or other.inputs is None else self.inputs - other.inputs
        missing = None if self.missing is None or other.missing is None else self.missing - other.missing
        return Equations(
            self.gram - other.gram,
            self.right - other.right,
            self.lacking - other.lacking,
            self.count - other.count,
            inputs,
            missing,
        )


@dataclass(frozen=True)
class Solved:
    """A change of the kept columns, and what it was made with."""

    form: Form
    ridge: float
    change: Tensor
    bias: Tensor | None
    error: tuple[float, float]  # over all tokens, before and after


def few(tokens: int, inputs: int) -> bool:
    """Whether there are too few tokens to solve for the columns of so many inputs."""
    return tokens < LEAST * inputs


def repaired(visit: CutVisit, layer: LayerPlan, ridge: float | Literal["auto"]) -> LayerPlan:
    """A sub-layer's plan with its output projection solved anew.

    Args:
        visit: the sub-layer, with the sums over the tokens that reach it.
        layer: what stays; with means, a bias is solved along.
        ridge: relative to the mean diagonal of H; ``auto`` for the one of ``RIDGES`` with the least error on the
            tokens that were held out, for factors the largest.

    Raises:
        RecipeError: a Gram matrix that is singular or not finite.
    """
    same = len(layer.keep) == layer.units and layer.merge is None and visit.evidence.sums.cross is None
    if same or not len(layer.keep):
        return layer
    moved = layer.merge is not None and bool((layer.merge.weight_in != _ones_at(layer)).any())
    evidence = visit.again(_weights(visit, layer)) if moved else visit.evidence
    gram = _finite_gram(visit, evidence.sums)
    columns = layer.output(visit.rows).to(gram.device, gram.dtype)  # [K*C, d]
    plain = layer.merge is None and layer.means is None and evidence.sums.cross is None
    if not few(evidence.sums.count, len(columns)):
        solved = _least_squares(visit, layer, columns, evidence, ridge, moved=moved)
    elif plain:
        solved = _factors(_of_plain_columns(visit, layer), columns, ridge, str(visit.place))
    else:
        whole = _equations(visit, layer, columns, evidence.sums, moved=moved)
        solved = _factors(whole.by_column(columns), columns, ridge, str(visit.place))
        solved = replace(solved, bias=whole.bias(solved.change))
    weight = columns + solved.change
    if not weight.isfinite().all():
        raise RecipeError(f"the repair of {visit.place} is not finite: ask for a larger --ridge.")
    about: dict[str, Any] = {"form": solved.form, "ridge": solved.ridge, "tokens": evidence.sums.count}
    about |= {"error": [_significant(max(error, 0.0)) for error in solved.error]}
    bias = None if solved.bias is None else solved.bias.float().cpu()
    return replace(layer, repair=Repair(weight.T.float().contiguous().cpu(), bias, about))


def _ones_at(layer: LayerPlan) -> Tensor:
    """M_in of survivors that are what they were."""
    return torch.zeros(layer.units).index_fill(0, layer.keep, 1.0)


def _weights(visit: CutVisit, layer: LayerPlan) -> dict[str, Tensor]:
    """The cut sub-layer's weights, without what a bias would take up."""
    found = masked(visit.axis, visit.tensors, layer)
    return {name: tensor for name, tensor in found.items() if name != f"{visit.axis.output}.bias"}


def _both(evidence: Evidence) -> Sequence[Sums]:
    return [evidence.sums, evidence.held] if evidence.held.count else [evidence.sums]


def _finite_gram(visit: CutVisit, sums: Sums) -> Tensor:
    gram = sums.get("channel_gram", "mod")
    if not gram.diagonal().isfinite().all():  # no other entry is larger
        raise RecipeError(
            f"the Gram matrix of {visit.place} is not finite: its activations overflow; try --dtype float32."
        )
    return gram


def _equations(visit: CutVisit, layer: LayerPlan, columns: Tensor, sums: Sums, *, moved: bool) -> Equations:
    """What is to be solved: of inputs that are as they were, all of it follows from their Gram matrix."""
    gram = _finite_gram(visit, sums)
    rows = layer.rows(visit.axis.channels).to(gram.device)
    kept = gram[rows[:, None], rows]
    change = torch.zeros_like(gram[:, : columns.shape[1]])
    if not moved:
        change = visit.rows.to(gram.device, gram.dtype).clone()
        change[rows] -= columns  # [N*C, d]: what is taken away
    gone = change.abs().sum(1).nonzero()[:, 0]
    with exact_products():
        along = gram[:, gone] @ change[gone]  # [N*C, d]
    right, lacking = along[rows], float((change * along).sum())
    means = sums.get("channel_sum", "mod").to(gram.dtype) if layer.means is not None else None
    missing = None if means is None else change.T @ means
    if sums.cross is not None and sums.missing is not None and sums.lacking is not None:
        lacking += float(2 * (change * sums.cross).sum() + sums.lacking)
        right = right + sums.cross[rows]
        missing = None if missing is None else missing + sums.missing
    return Equations(kept, right, lacking, sums.count, None if means is None else means[rows], missing)


def _of_plain_columns(visit: CutVisit, layer: LayerPlan) -> Equations:
    """The same for one factor a column, where columns stay as they are or go: what each two bring says it all."""
    joint = visit.joint
    rows = layer.rows(visit.axis.channels).to(joint.device)
    gone = torch.ones_like(joint[0]).index_fill(0, rows, 0)
    along = joint @ gone
    kept = joint.index_select(0, rows).index_select(1, rows)
    return Equations(kept, along[rows, None], float(along @ gone), visit.evidence.sums.count)


def _least_squares(
    visit: CutVisit,
    layer: LayerPlan,
    columns: Tensor,
    evidence: Evidence,
    ridge: float | Literal["auto"],
    *,
    moved: bool,
) -> Solved:
    """The solution with the ridge that was asked for, or that does best on the tokens that were held out."""
    place = str(visit.place)
    whole, *held = (_equations(visit, layer, columns, sums, moved=moved) for sums in _both(evidence))
    if ridge == "auto":
        ridge = _ridge(whole.minus(held[0]), held[0], place) if held else RIDGES[-2]
    centred = whole.centred()
    change = _change(centred, ridge, place)
    bias = whole.bias(change)
    return Solved("least-squares", ridge, change, bias, (centred.lacking, whole.error(change, bias)))


def _ridge(rest: Equations, held: Equations, place: str) -> float:
    """The one that does best on the tokens that were held out, if it is solved for over the others."""
    step = max(rest.right.shape[1] // _TRIED, 1)
    rest, held = rest.some(step), held.some(step)

    def error(ridge: float) -> float:
        change = _change(rest.centred(), ridge, place)
        return held.error(change, rest.bias(change))

    return min(RIDGES, key=error)


def _factors(equations: Equations, columns: Tensor, ridge: float | Literal["auto"], place: str) -> Solved:
    """One factor for each column: K unknowns for all d outputs together."""
    ridge = RIDGES[-1] if ridge == "auto" else ridge  # of few tokens none is held out
    factors = _change(equations, ridge, place)  # [K*C, 1]
    return Solved("factors", ridge, factors * columns, None, (equations.lacking, equations.error(factors, None)))


def _change(centred: Equations, ridge: float, place: str) -> Tensor:
    with exact_products():
        found: Tensor = torch.cholesky_solve(centred.right, factor(centred.gram, ridge, place))
        return found


def masked(axis: Axis, tensors: dict[str, Tensor] | Any, layer: LayerPlan) -> dict[str, Tensor]:
    """A cut sub-layer at its full size: what stays at its old place, columns of zeros for the rest.

    Args:
        axis: where the units lie.
        tensors: name inside the layer -> its weights and biases.
        layer: what stays of them.

    Returns:
        Those tensors that change.
    """
    found: dict[str, Tensor] = {}
    matrices = layer.merge_matrices()
    for piece in axis.slices if matrices is not None else ():
        name = piece.memory or piece.name
        if not piece.is_output and name in tensors:
            own = tensors[name].movedim(piece.dim, 0)  # [segments * N, ...]
            new = own.float().clone()
            for segment in range(len(piece.blocks)):  # of one row each, wherever units can be merged
                part = own[segment * layer.units : (segment + 1) * layer.units].float().cpu()
                merged = torch.sparse.mm(matrices[0], part.reshape(layer.units, -1)).reshape(-1, *part.shape[1:])  # type: ignore[index]
                new[segment * layer.units + layer.keep.to(new.device)] = merged.to(new.device)
            found[name] = new.movedim(0, piece.dim).to(own.dtype)
    piece = axis.output_slice
    name = piece.memory or piece.name
    own = tensors[name].movedim(piece.dim, 0)  # [N*C, d]
    output = torch.zeros_like(own)
    output[layer.rows(axis.channels).to(own.device)] = layer.output(own).to(own.device, own.dtype)
    found[name] = output.movedim(0, piece.dim)
    bias = f"{axis.output}.bias"
    if layer.means is not None or (layer.repair is not None and layer.repair.bias is not None):
        lost = layer.lost(own).to(own.device)
        found[bias] = (tensors[bias].float() + lost if bias in tensors else lost).to(own.dtype)
    elif not len(layer.keep) and bias in tensors:
        found[bias] = torch.zeros_like(tensors[bias])
    return found


def _significant(value: float) -> float:
    return float(f"{value:.4g}")
