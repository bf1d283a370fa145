"""The walk of one method whose cuts change what comes behind them, or whose output projections are solved anew."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from dicer.ask.axes import kind_of
from dicer.decide.choose import batches_of, choose, own_batches_of, scores_of
from dicer.decide.distill import STEP_TOKENS, distilled
from dicer.decide.kept import Kept, Seen
from dicer.decide.layer_plan import LayerPlan
from dicer.decide.repair import ENOUGH, few, masked, repaired
from dicer.decide.task import Decided
from dicer.errors import RecipeError
from dicer.measure.batches import ABSENT, COUNTED, Batches, counted_of, own_batches
from dicer.measure.propagate import CutVisit, Tokens, propagate
from dicer.measure.stores.store import LayerStore
from dicer.measure.text import Calibration
from dicer.model.units import SubLayer
from dicer.progress import Progress

_HELD = 8  # one of so many samples is held out


def walk_cut(task: Decided, store: LayerStore, progress: Progress, kept: Kept | None = None) -> Seen:
    """What stays of every sub-layer, its output projection solved anew where that was asked for.

    Args:
        task: what was asked, and how much stays.
        store: where the model's layers come from.
        progress: called with (stage, done, total).
        kept: where the walk goes on if it was stopped.

    Raises:
        RecipeError: too little text to hold any out, or numbers that are not finite.
    """
    text = task.calibration
    if text is None:
        raise RecipeError("repair looks at a text: read it first (dicer.decide.task.with_text).")
    seen = Seen()

    def cut(visit: CutVisit) -> Mapping[str, Tensor]:
        if visit.place not in task.places:
            return {}
        layer = choose(task, visit.place, scores_of(task, visit))
        if task.method.repair != "none":
            layer = repaired(visit, layer, task.recipe.ridge)
        seen.plans[visit.place] = layer
        return masked(visit.axis, visit.tensors, layer)

    gradients = None
    if task.needs_gradient:
        gradients = store.gradients(
            batches_of([task]),
            task.layers,
            task.axes,
            checkpointing=task.compute.gradient_checkpointing,
            progress=progress,
        )
    propagate(
        store,
        task.layers,
        _tokens(task, text),
        cut,
        axes=task.axes,
        needs=task.walked_needs,
        pruned=task.method.propagate == "pruned",
        dense=task.recipe.target == "dense",
        gradients=gradients,
        progress=progress,
        along=None if kept is None else kept.walk(seen),
    )
    if task.recipe.distill:
        lesson = task.lesson or text
        seen.plans = distilled(
            store,
            seen.plans,
            own_batches(lesson.tokens, None, STEP_TOKENS, lesson.mask),
            task.recipe.distill,
            seed=task.recipe.seed,
            at_once=task.compute.batch_size,
            along=None if kept is None else kept.lesson(),
            progress=progress,
        )
    return seen


def _tokens(task: Decided, text: Calibration) -> Tokens:
    """The samples in batches, with some held out where a ridge is to be found on them."""
    factors = task.method.repair != "none" and all(_few_tokens(task, text))
    if factors or task.method.repair == "none" or task.recipe.ridge != "auto":
        # Of plain columns and factors only the squares are read, and no system of the Gram matrix is solved.
        plain = task.method.merge == "prune" and (task.recipe.target, task.recipe.compensate) == ("own", "none")
        return Tokens(batches_of([task]), single=factors and plain and "channel_gram" not in task.parts.criterion.needs)
    held = held_out(text)
    parts = [own_batches_of(task, text, rows) for rows in (~held, held)]
    pairs = [
        (tokens, torch.ones_like(tokens, dtype=torch.bool) if counted is None else counted)
        for part in parts
        for tokens, counted in zip(part, counted_of(part), strict=True)
    ]
    return Tokens(Batches(pairs), len(parts[1]))


def _tokens_of(text: Calibration) -> int:
    return text.tokens.numel() if text.mask is None else int((text.mask == COUNTED).sum())


def _few_tokens(task: Decided, text: Calibration) -> Iterator[bool]:
    """Whether there are too few to solve for the columns of each sub-layer."""
    axes, tokens = task.source.family.axes, _tokens_of(text)
    return (few(tokens, keep * axes[place.axis].channels) for place, keep in task.amounts.keep.items())


def held_out(text: Calibration) -> Tensor:
    """Which samples are held out, bool [S]: every eighth, at least one, and none that is also among the others.

    Raises:
        RecipeError: there is none.
    """
    count = len(text.tokens)
    held = torch.zeros(count, dtype=torch.bool)
    held[min(_HELD, count) - 1 :: _HELD] = True
    _, same = torch.unique(text.tokens, dim=0, return_inverse=True)
    held &= ~torch.isin(same, same[~held])
    if not held.any() or held.all():
        raise RecipeError(
            f"--ridge auto holds samples out, and of these {count} none differs from all others: give more calibration "
            "text, or a --ridge such as 0.01."
        )
    return held


def unlearned_notes(task: Decided, plans: Mapping[SubLayer, LayerPlan]) -> list[str]:
    """What did not learn along, where all that stays was to."""
    axes = task.source.family.axes
    missing = {
        piece.name
        for place, layer in plans.items()
        for piece in axes[place.axis].required
        if task.recipe.distill and layer.repair is not None and not layer.repair.touches(piece)
    }
    if not missing:
        return []
    return [f"{', '.join(sorted(missing))}: in memory in another form than in the files, so cut and not learned along"]


def evidence_notes(task: Decided) -> list[str]:
    """What to know where there are few tokens for each input of an output projection that stays."""
    text = task.calibration
    if task.method.repair == "none" or text is None:
        return []
    tokens = _tokens_of(text)
    length = text.tokens.shape[1] if text.mask is None else int((text.mask != ABSENT).sum(1).max())
    axes, notes = task.source.family.axes, []
    for axis in task.axes:
        kept = [keep for place, keep in task.amounts.keep.items() if place.axis == axis]
        inputs = max(kept, default=0) * axes[axis].channels
        if tokens >= ENOUGH * inputs:
            continue
        what = "one factor a column is solved for, not the columns" if few(tokens, inputs) else "repair may overfit"
        units, wanted = kind_of(axis).units, math.ceil(ENOUGH * inputs / length)
        notes.append(
            f"{tokens:,} calibration tokens are {tokens / inputs:.1f} for each of the {inputs:,} inputs that stay of a "
            f"layer's {units}, so {what}; {ENOUGH} for each would be --samples {wanted} --seq-len {length}"
        )
    return notes
