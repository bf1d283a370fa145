"""The one walk that decides what stays, for one method or for many at once."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence

from dicer.ask.axes import kind_of
from dicer.ask.portable import portable
from dicer.decide.budget import amounts_by_cosine, amounts_by_entropy, amounts_by_rank, lists_needed
from dicer.decide.choose import Scores, batches_of, choose, scores_of
from dicer.decide.kept import Kept, Seen
from dicer.decide.plan import PrunePlan
from dicer.decide.task import Asked, Decided, asked_groups, without_empty
from dicer.decide.walk_cut import evidence_notes, unlearned_notes, walk_cut
from dicer.errors import RecipeError
from dicer.measure.entropy.cache import entropy_profile
from dicer.measure.experts import FEW_TOKENS
from dicer.measure.stores.store import LayerStore
from dicer.measure.turning import turning
from dicer.measure.walk import Visit, walk
from dicer.model.units import SubLayer
from dicer.progress import Progress, silent


def score(
    tasks: Sequence[Asked], store: LayerStore, progress: Progress = silent, *, kept: Kept | None = None
) -> list[PrunePlan]:
    """Run the walk once for all tasks, and decide for every chosen layer what stays.

    In several processes, each sees its share of the samples, the sums are added up, and all come to the same plans.

    Args:
        tasks: from :func:`dicer.decide.task.prepare`, of one model, with their text; those that look at text must
            have the same tokens.
        store: where the model's layers come from, in the dtype and on the device to compute with.
        progress: called with (stage, done, total).
        kept: of one task alone, where its walks go on if they were stopped.

    Returns:
        One plan for each task, the same as if it had been alone.

    Raises:
        RecipeError: tasks with different calibration tokens, or a target that the bounds cannot reach.
    """
    texts = [task.calibration for task in tasks if task.calibration is not None]
    if any(not text.same_tokens(texts[0]) for text in texts):
        raise RecipeError("methods that share a pass must share their calibration tokens; score these apart.")
    tasks = [_measured(task, store, progress) for task in tasks]
    together = [task for task in tasks if not (isinstance(task, Decided) and task.method.walks_alone)]
    walked = iter(_walk(together, store, progress, kept))
    plans = []
    for task in tasks:
        if not isinstance(task, Decided):
            plans.append(_by_rank(task, next(walked), store, progress, kept))
        elif task.method.walks_alone:
            plans.append(_plan(task, walk_cut(task, store, progress, kept)))
        else:
            plans.append(_plan(task, next(walked)))
    return plans


def _measured(task: Asked, store: LayerStore, progress: Progress) -> Asked:
    """Decide how much stays by what is measured of the dense model, where that was asked for."""
    if task.method.allocate not in ("transfer-entropy", "cosine") or isinstance(task, Decided):
        return task
    if task.calibration is None:
        raise RecipeError("transfer entropy is measured on a text: read it first (dicer.decide.task.with_text).")
    if task.method.allocate == "cosine":
        turned = turning(store, max(task.layers), batches_of([task]), progress)
        return task.decided(amounts_by_cosine(task.budget, turned))
    profile = entropy_profile(
        task.source,
        store,
        task.calibration.tokens,
        mask=task.calibration.mask,
        lists=lists_needed(task.method, task.recipe.split),
        search=task.recipe.entropy_search,
        at=task.recipe.entropy_at,
        batch_size=task.compute.batch_size,
        progress=progress,
    )
    return task.decided(amounts_by_entropy(task.budget, task.recipe, profile))


def _by_rank(task: Asked, seen: Seen, store: LayerStore, progress: Progress, kept: Kept | None) -> PrunePlan:
    """Decide by the scores of all sub-layers; Gram matrices were not kept, so what needs them is another walk."""
    decided = task.decided(amounts_by_rank(task.budget, {p: scored.values for p, scored in seen.scores.items()}))
    if task.method.walks_alone:
        return _plan(decided, walk_cut(decided, store, progress, kept))
    if task.recipe.rolls > 1 or any("gram" in n for n in (*task.parts.grouping.needs, *task.parts.merge.needs)):
        return _plan(decided, _walk([decided], store, progress, kept)[0])
    seen.plans = {place: choose(decided, place, scored) for place, scored in seen.scores.items()}
    return _plan(decided, seen)


def _walk(tasks: Sequence[Asked], store: LayerStore, progress: Progress, kept: Kept | None) -> list[Seen]:
    """One walk for all tasks."""
    found = [Seen() for _ in tasks]
    layers = sorted({layer for task in tasks for layer in task.layers})
    if not layers:
        return found
    visits = walk(
        store,
        layers,
        batches_of(tasks),
        axes={axis for task in tasks for axis in task.axes},
        needs=frozenset().union(*(task.needs for task in tasks)),
        gradient=any(task.needs_gradient for task in tasks),
        checkpointing=any(task.compute.gradient_checkpointing for task in tasks),
        progress=progress,
        along=None if kept is None else kept.walk(*found),
    )
    for visit in visits:
        for task, seen in zip(tasks, found, strict=True):
            if visit.place in task.places:
                _see(task, seen, visit)
        del visit  # one layer alive at a time: the next one is made before the loop would let go of this
    return found


def _see(task: Asked, seen: Seen, visit: Visit) -> None:
    """Score one sub-layer, and choose at once where it is known how much stays."""
    scored = scores_of(task, visit)
    if task.source.family.axes[visit.place.axis].routed and visit.sums.needs:
        tokens = visit.sums.get("tokens", "mod").tolist() if kind_of(visit.place.axis).routed else [visit.sums.count]
        seen.tokens[visit.place] = [int(count) for count in tokens]
    if isinstance(task, Decided):
        seen.plans[visit.place] = choose(task, visit.place, scored)
    else:  # of Gram matrices only one layer at a time may have one
        seen.scores[visit.place] = Scores(scored.values, visit.sums.without_grams())


def _plan(task: Decided, seen: Seen) -> PrunePlan:
    source, amounts = task.source, task.amounts
    notes = [*amounts.provenance.get("notes", ()), *_groups_note(task), *_tokens_note(seen.tokens)]
    notes += [*evidence_notes(task), *unlearned_notes(task, seen.plans)]
    axes, empty = without_empty(task, seen.plans)
    return PrunePlan(
        model={"name": source.name, "model_type": str(source.config.model_type), "fingerprint": source.fingerprint},
        recipe=portable(task.recipe, task.method, task.compute),
        calibration=_read(task),
        versions={name: importlib.metadata.version(name) for name in ("dicer", "torch", "transformers")},
        axes=axes,
        blocks=tuple(sorted({*amounts.blocks, *empty})),
        allocation={"target": task.budget.target, "whole": task.budget.whole, **amounts.provenance, "notes": notes},
    )


def _read(task: Decided) -> dict[str, object]:
    """Where the tokens come from."""
    found = task.calibration.provenance if task.calibration else {}
    return found if task.lesson is None else {**found, "distill": task.lesson.provenance}


def _tokens_note(tokens: Mapping[SubLayer, Sequence[int]]) -> list[str]:
    """A note where experts saw so few tokens of the text that their scores say little."""
    counts = [count for found in tokens.values() for count in found]
    few = sum(count < FEW_TOKENS for count in counts)
    if not few:
        return []
    return [
        f"{few} of {len(counts)} experts saw fewer than {FEW_TOKENS} tokens (the least: {min(counts)}), so their "
        "scores say little: give more text (--samples)"
    ]


def _groups_note(task: Decided) -> list[str]:
    """A note where sub-layers keep fewer units than the groups that were asked for; known beforehand, it is refused."""
    asked, keep = asked_groups(task.parts), task.amounts.keep
    fewer = [units for units in keep.values() if 0 < units < asked]
    if not fewer:
        return []
    return [f"--groups {asked} is more than {len(fewer)} of {len(keep)} modules keep; those have a group a unit"]
