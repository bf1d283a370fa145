"""The one walk that decides what stays, for one method or for many at once."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dicer.decide.budget import (
    Decision,
    Key,
    decide_by_entropy,
    decide_by_scores,
    lists_needed,
)
from dicer.decide.grouping import random_groups, similarity_groups
from dicer.decide.merging import Survivors, keep_strongest, keep_top, merge_dominant, merge_mean
from dicer.decide.plan import LayerPlan, PrunePlan
from dicer.decide.task import Job, activation_on, portable, without_empty
from dicer.errors import RecipeError
from dicer.measure.entropy.cache import entropy_profile
from dicer.measure.statistics import LayerStatistics, Sums, stream
from dicer.measure.stores.resident import Progress, ResidentStore, silent
from dicer.measure.walk import AxisVisit, walk
from dicer.processes import BATCH_TOKENS, own_batches

GRADIENT_TOKENS = 1024  # in a forward and backward pass, which also holds logits and their gradients


def score(jobs: Sequence[Job], model: Any, progress: Progress = silent) -> list[PrunePlan]:
    """Run the walk once for all jobs, and decide for every chosen layer what stays.

    Where torch.distributed is initialised, each process sees its share of the samples, the sums are added up, and all
    processes come to the same plans.

    Args:
        jobs: from :func:`dicer.decide.task.prepare`, of one model; those that look at text must have the same tokens.
        model: the model in memory, in the dtype and on the device to compute with.
        progress: called with (stage, done, total).

    Returns:
        One plan for each job, the same as if it had been alone.

    Raises:
        RecipeError: jobs with different calibration tokens, or a target that the bounds cannot reach.
    """
    texts = [job.calibration.tokens for job in jobs if job.calibration is not None]
    if any(not torch.equal(tokens, texts[0]) for tokens in texts):
        raise RecipeError("methods that share a pass must share their calibration tokens; score these apart.")
    jobs = [_informed(job, model, progress) for job in jobs]
    plans = []
    for job, modules in zip(jobs, _pass(jobs, model, progress), strict=True):
        if job.decision is None:
            job, modules = _ranked(job, modules, model, progress)
        layers = {key: _decide(job, key, scored) for key, scored in modules.items() if isinstance(scored, Scores)}
        plans.append(_plan(job, layers | {k: plan for k, plan in modules.items() if isinstance(plan, LayerPlan)}))
    return plans


class Scores(NamedTuple):
    """What is kept of a module that was visited before it was known how many of its units stay."""

    values: Tensor
    sums: Sums

    def without_gram(self) -> Scores:
        """The same without the Gram matrix, which only one layer at a time may have."""
        return Scores(self.values, self.sums.without("gram"))


def _informed(job: Job, model: Any, progress: Progress) -> Job:
    """Decide by transfer entropy, where that was asked for."""
    if job.method.allocate != "transfer-entropy" or job.calibration is None or job.decision is not None:
        return job
    profile = entropy_profile(
        job.source,
        model,
        job.calibration.tokens,
        lists=lists_needed(job.method, job.recipe.split),
        search=job.recipe.entropy_search,
        at=job.recipe.entropy_at,
        batch_size=job.recipe.batch_size,
        progress=progress,
    )
    return replace(job, decision=decide_by_entropy(job.budget, job.recipe, profile))


def _ranked(
    job: Job, modules: dict[Key, Scores | LayerPlan], model: Any, progress: Progress
) -> tuple[Job, dict[Key, Scores | LayerPlan]]:
    """Decide by the scores of all modules; Gram matrices were not kept, so similarity needs another walk."""
    scores = {key: scored.values for key, scored in modules.items() if isinstance(scored, Scores)}
    job = replace(job, decision=decide_by_scores(job.budget, scores))
    return job, _pass([job], model, progress)[0] if job.method.grouped_by else modules


def _pass(jobs: Sequence[Job], model: Any, progress: Progress) -> list[dict[Key, Scores | LayerPlan]]:
    """One walk: for each job and module what stays, or what is needed to say it later."""
    found: list[dict[Key, Scores | LayerPlan]] = [{} for _ in jobs]
    layers = sorted({index for job in jobs for index in job.layers})
    if not layers:
        return found
    visits = walk(
        ResidentStore(model, jobs[0].source.family),
        layers,
        _batches(jobs),
        axes={axis for job in jobs for axis in job.method.axes},
        needs=frozenset().union(*(job.needs for job in jobs)),
        gradient=any("gradient" in job.criterion.needs for job in jobs),
        checkpointing=any(job.recipe.gradient_checkpointing for job in jobs),
        progress=progress,
    )
    for visit in visits:
        part = scored = None
        for job, modules in zip(jobs, found, strict=True):
            for axis in job.method.axes if visit.index in job.layers else ():
                if axis in visit.axes:
                    key, part = (axis, visit.index), visit.axes[axis]
                    scored = Scores(_score(job, key, part), part.sums)
                    modules[key] = _decide(job, key, scored) if job.decision else scored.without_gram()
        # One layer alive at a time: the next one is made before the loop would let go of this.
        del visit, part, scored
    return found


def _batches(jobs: Sequence[Job]) -> Sequence[Tensor]:
    """This process's share of the tokens, cut into what one forward pass takes; none where no job looks at text."""
    tokens = next((job.calibration.tokens for job in jobs if job.calibration is not None), None)
    if tokens is None:
        return ()
    gradient = any("gradient" in job.criterion.needs for job in jobs)
    size = min((job.recipe.batch_size for job in jobs if job.recipe.batch_size), default=None)
    return own_batches(tokens, size, GRADIENT_TOKENS if gradient else BATCH_TOKENS)


def _plan(job: Job, layers: dict[Key, LayerPlan]) -> PrunePlan:
    decision = job.decision or Decision({})
    notes = [*decision.told.get("notes", ()), *_fewer_groups(job, decision)]
    axes, empty = without_empty(job, layers)
    return PrunePlan(
        model={
            "name": job.source.name,
            "model_type": str(job.source.config.model_type),
            "fingerprint": job.source.fingerprint,
        },
        recipe=portable(job.recipe, job.method),
        calibration=job.calibration.provenance if job.calibration else {},
        versions={name: importlib.metadata.version(name) for name in ("dicer", "torch", "transformers")},
        axes=axes,
        blocks=tuple(sorted({*decision.blocks, *empty})),
        allocation={"target": job.budget.target, "whole": job.budget.whole, **decision.told, "notes": notes},
    )


def _fewer_groups(job: Job, decision: Decision) -> list[str]:
    """A note where modules keep fewer units than the groups that were asked for; known beforehand, it is refused."""
    asked = job.method.groups or 0
    fewer = [keep for keep in decision.keep.values() if 0 < keep < asked]
    if not fewer:
        return []
    where = f"{len(fewer)} of {len(decision.keep)} modules"
    return [f"--groups {asked} is more than {where} keep; those have a group a unit"]


def _score(job: Job, key: Key, visit: AxisVisit) -> Tensor:
    """The criterion's scores of one module."""
    rng = stream(job.recipe.seed, key[1], purpose(key[0], "criterion"))
    statistics = LayerStatistics(activation_on(key[0], job.method.activation), visit.sums, rng, visit.gradient)
    return job.criterion(visit.weights, statistics)


def purpose(axis: str, what: str) -> str:
    """What a random stream is for; neurons have those of versions that knew nothing else."""
    return what if axis == "mlp" else f"{what} {axis}"


def _decide(job: Job, key: Key, scored: Scores) -> LayerPlan:
    """Groups and survivors of one module, and the means that a bias will make up for."""
    units, keep = len(scored.values), (job.decision or Decision({})).keep[key]
    if keep == units:
        survivors = Survivors(torch.arange(units))
    elif keep == 0:
        survivors = Survivors(torch.empty(0, dtype=torch.int64))
    else:
        survivors = _survivors(job, key, scored, keep)
    means = None
    if job.recipe.compensate == "bias" and (keep < units or survivors.merge is not None):
        means = (scored.sums.get("channel_sum", "mod") / scored.sums.count).float().cpu()
        if not means.isfinite().all():
            raise RecipeError(
                f"the mean activations of {key[0]} in layer {key[1]} are not finite, so no bias can make up for them: "
                "try --dtype float32."
            )
    merge = survivors.merge
    if merge is None:
        return LayerPlan(units, survivors.keep, scored.values, means=means)
    return LayerPlan(units, survivors.keep, scored.values, merge.row, merge.weight_in, merge.weight_out, means)


def _survivors(job: Job, key: Key, scored: Scores, keep: int) -> Survivors:
    method, (axis, index) = job.method, key
    if method.grouping == "none":
        return keep_top(scored.values, keep)
    if method.grouped_by is not None:
        labels = similarity_groups(scored.sums.get("gram", activation_on(axis, method.grouped_by)), keep)
    else:
        groups = min(method.groups or keep, keep)
        labels = random_groups(len(scored.values), groups, stream(job.recipe.seed, index, purpose(axis, "grouping")))
    if method.merge == "mean":
        return merge_mean(scored.values, labels)
    if method.merge == "dominant":
        return merge_dominant(scored.sums.get("square_sum", "mod").sqrt().float().cpu(), labels)
    return keep_strongest(scored.values, labels, keep)
