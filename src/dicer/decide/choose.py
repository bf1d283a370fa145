"""Scores, groups and survivors of one sub-layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dicer.ask.axes import kind_of
from dicer.decide.layer_plan import LayerPlan
from dicer.decide.merging import Survivors
from dicer.decide.repair import few
from dicer.decide.rolls import RIDGE, best_roll
from dicer.decide.task import Asked, Decided
from dicer.errors import RecipeError
from dicer.measure.batches import BATCH_TOKENS, own_batches
from dicer.measure.statistics import LayerStatistics, Sums, stream
from dicer.measure.text import Calibration
from dicer.measure.walk import Visit
from dicer.model.units import SubLayer

GRADIENT_TOKENS = 1024  # in a forward and backward pass, which also holds logits and their gradients


class Scores(NamedTuple):
    """What is known of a sub-layer before it is said how many of its units stay."""

    values: Tensor
    sums: Sums
    visit: Visit | None = None  # where more is read of it than the sums


def scores_of(task: Asked, visit: Visit) -> Scores:
    """What the criterion says of a sub-layer's units."""
    values = task.parts.criterion(visit.weights, _statistics(task, visit.place, "criterion", visit))
    rolls = task.recipe.rolls > 1 and isinstance(task, Decided)
    return Scores(values, visit.sums, visit if rolls else None)


def _statistics(task: Asked, place: SubLayer, part: str, seen: Visit | Scores) -> LayerStatistics:
    """What a part of the method reads of a sub-layer: the criterion the recipe's activation, a merge what is merged."""
    kind, method = kind_of(place.axis), task.method
    activation = {"criterion": method.activation, "grouping": method.grouped_by or method.activation}.get(part, "mod")
    rng = stream(task.recipe.seed, place.layer, kind.stream_name(part))
    gradient = seen.gradient if isinstance(seen, Visit) else None
    keep = task.amounts.keep[place] if isinstance(task, Decided) else None
    return LayerStatistics(kind.activation(activation), seen.sums, rng, gradient, keep)


def batches_of(tasks: Sequence[Asked]) -> Sequence[Tensor]:
    """This process's share of the tokens, cut into what one forward pass takes; none where no task looks at text."""
    text = next((task.calibration for task in tasks if task.calibration is not None), None)
    if text is None:
        return ()
    most = GRADIENT_TOKENS if any(task.needs_gradient for task in tasks) else BATCH_TOKENS
    size = min((task.compute.batch_size for task in tasks if task.compute.batch_size), default=None)
    return own_batches(text.tokens, size, most, text.mask)


def own_batches_of(task: Asked, text: Calibration, rows: Tensor) -> Sequence[Tensor]:
    """The same of some samples of a task's text, bool [S]."""
    mask = None if text.mask is None else text.mask[rows]
    return own_batches(text.tokens[rows], task.compute.batch_size, BATCH_TOKENS, mask)


def choose(task: Decided, place: SubLayer, scored: Scores) -> LayerPlan:
    """Groups and survivors of one sub-layer, and the means that a bias will make up for."""
    units, keep = len(scored.values), task.amounts.keep[place]
    survivors = Survivors(torch.arange(keep)) if keep in (0, units) else _survivors(task, place, scored, keep)
    means = None
    if task.recipe.compensate == "bias" and (keep < units or survivors.merge is not None):
        means = (scored.sums.get("channel_sum", "mod") / scored.sums.count).float().cpu()
        if not means.isfinite().all():
            raise RecipeError(
                f"the mean activations of {place} are not finite, so no bias can make up for them: try --dtype float32."
            )
    return LayerPlan(units, survivors.keep, scored.values, survivors.merge, means)


def _survivors(task: Decided, place: SubLayer, scored: Scores, keep: int) -> Survivors:
    """What groups leave; where the units lie in parts that must stay alike, each part by itself."""
    parts = task.source.family.axes[place.axis].parts
    if parts == 1:
        return _survivors_of_part(task, place, scored, keep)
    size, found = len(scored.values) // parts, []
    for part in range(parts):
        own = slice(part * size, (part + 1) * size)
        scores = Scores(scored.values[own], scored.sums.part(own))
        found.append(_survivors_of_part(task, place, scores, keep // parts))
    return Survivors(torch.cat([survivors.keep + part * size for part, survivors in enumerate(found)]))


def _survivors_of_part(task: Decided, place: SubLayer, scored: Scores, keep: int) -> Survivors:
    """Groups, and what each leaves; of several rolls the best."""
    groups, merged = (_statistics(task, place, what, scored) for what in ("grouping", "merge"))

    def draw() -> Survivors:
        labels = task.parts.grouping(scored.values, keep, groups)
        return task.parts.merge(scored.values, labels, keep, merged)

    if scored.visit is None:
        return draw()
    ridge = task.recipe.ridge if task.recipe.ridge != "auto" else RIDGE
    solved = task.method.repair != "none" and not few(scored.sums.count, keep * scored.sums.channels)
    return best_roll(draw, task.recipe.rolls, scored.visit, ridge if solved else None)
