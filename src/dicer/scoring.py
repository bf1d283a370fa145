"""A recipe held against a model, and the one walk that decides what stays, for one method or for many at once."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dicer.axes import AXES, UNITS
from dicer.budget import (
    Budget,
    Decision,
    Key,
    decide_beforehand,
    decide_by_entropy,
    decide_by_scores,
    lists_needed,
    make_budget,
)
from dicer.calibration import Calibration, load_calibration
from dicer.criteria import CRITERIA, Criterion, find_criterion
from dicer.distributed import BATCH_TOKENS, own_batches
from dicer.entropy_cache import entropy_profile
from dicer.errors import RecipeError, unknown
from dicer.grouping import GROUPINGS, random_groups, similarity_groups
from dicer.layer_statistics import LayerStatistics, Need, Sums, stream
from dicer.merging import MERGES, Survivors, keep_strongest, keep_top, merge_dominant, merge_mean
from dicer.plan import LayerPlan, PrunePlan
from dicer.presets import Method
from dicer.recipe import Recipe
from dicer.sources import ModelSource, tokenize_with
from dicer.surgery import Sizes, plan_cut
from dicer.walk import AxisVisit, Progress, ResidentStore, silent, walk

GRADIENT_TOKENS = 1024  # in a forward and backward pass, which also holds logits and their gradients


@dataclass(frozen=True)
class Job:
    """A recipe held against a model: everything that can be wrong has been looked at, and nothing been computed.

    Attributes:
        source: the model.
        recipe: what was asked.
        method: every choice of the recipe made.
        criterion: the scoring function.
        budget: how many parameters are to go, and from where.
        decision: how much of everything stays; None where the model has to run before it can be said.
        calibration: the tokens, or None when nothing of the method looks at text.
    """

    source: ModelSource
    recipe: Recipe
    method: Method
    criterion: Criterion
    budget: Budget
    decision: Decision | None
    calibration: Calibration | None

    @property
    def layers(self) -> list[int]:
        """The layers whose units are scored."""
        return sorted({module.layer for module in self.budget.modules})

    @property
    def needs(self) -> frozenset[Need]:
        """The sums over activations that the method reads."""
        return frozenset().union(*(self._needs(axis) for axis in self.method.axes))

    def _needs(self, axis: str) -> set[Need]:
        kinds = [kind for kind in ("square_sum", "sum") if kind in self.criterion.needs]
        needs = {Need(kind, activation_on(axis, self.method.activation), axis) for kind in kinds}
        if self.method.grouped_by is not None:
            needs.add(Need("gram", activation_on(axis, self.method.grouped_by), axis))
        if self.method.merge == "dominant" and self.method.grouping != "none":
            needs.add(Need("square_sum", "mod", axis))
        if self.recipe.compensate == "bias":
            needs.add(Need("channel_sum", "mod", axis))
        return needs

    @property
    def runs_model(self) -> bool:
        """Whether tokens have to go through the model."""
        return bool(self.needs) or "gradient" in self.criterion.needs or self.method.allocate == "transfer-entropy"

    @property
    def notes(self) -> list[str]:
        """What the user should know before the result surprises her."""
        notes = list(self.calibration.notes) if self.calibration else []
        if self.method.merge != "prune" and self.method.grouping == "none":
            notes.append(f"merge '{self.method.merge}' has nothing to merge without groups; name a --grouping")
        for axis in self.method.axes if self.decision else ():
            modules = [module for module in self.budget.modules if module.axis == axis]
            whole = sum(self.decision.keep[axis, m.layer] == m.units for m in modules) if self.decision else 0
            if whole:
                notes.append(f"{whole} layers keep all their {UNITS[axis]}: the ratio rounds to nothing there")
        return notes

    @property
    def goes_with_its_layer(self) -> bool:
        """Whether a layer without its sub-layers can go whole: nothing of it is left, nor hangs on its number."""
        config = self.source.config
        stays = getattr(config, "scale_attn_by_inverse_layer_idx", False) or self.recipe.compensate == "bias"
        return not stays and getattr(config, "do_layer_norm_before", True)

    def outline(self) -> PrunePlan:
        """A plan with the widths that can be known before anything is computed, and nothing else."""
        layers: dict[Key, LayerPlan] = {}
        for module in self.budget.modules if self.decision else ():
            keep = self.decision.keep[module.axis, module.layer] if self.decision else 0
            layers[module.axis, module.layer] = LayerPlan(module.units, torch.arange(keep), torch.zeros(module.units))
        axes, blocks = _without_empty(self, layers)
        return PrunePlan({}, {}, {}, {}, axes, blocks)

    def sizes(self) -> tuple[Sizes, Sizes]:
        """What the model has and what it will have; the same again where the model has to run first."""
        return plan_cut(self.source, self.outline()).sizes()


def activation_on(axis: str, activation: str) -> str:
    """The activation by its name on an axis: heads have but one, what goes into the output projection."""
    return activation if axis == "mlp" else "mod"


def prepare(
    source: ModelSource, recipe: Recipe, tokenizer: Any | None = None, calibration: Calibration | None = None
) -> Job:
    """Hold a recipe against a model.

    Args:
        source: the model.
        recipe: what was asked.
        tokenizer: for models in memory; others bring their own.
        calibration: what the recipe's text gave before, so that it need not be read again.

    Raises:
        RecipeError: names that are in no registry, layers that do not exist, a ratio that leaves no neuron.
        CalibrationError: the text cannot be had or is too short.
    """
    method = recipe.resolve()
    criterion = find_criterion(method.criterion, CRITERIA)
    for kind, name, known in (("grouping", method.grouping, GROUPINGS), ("merge", method.merge, MERGES)):
        if name not in known:
            raise RecipeError(unknown(kind, name, known))
    if method.axis == "block" and getattr(source.config, "scale_attn_by_inverse_layer_idx", False):
        raise RecipeError(f"{source.name} scales attention by the layer's number, so no layer can go whole.")
    budget = make_budget(source, recipe, method)
    decision = decide_beforehand(budget, method, recipe)
    for (axis, index), keep in decision.keep.items() if decision else ():
        if method.groups is not None and method.groups > keep > 0:
            raise RecipeError(
                f"--groups {method.groups} is more than the {keep} {UNITS[axis]} that layer {index} keeps; "
                f"ask for at most {keep}."
            )
    job = Job(source, recipe, method, criterion, budget, decision, None)
    if not job.runs_model:
        return job
    calibration = calibration or load_calibration(recipe, tokenize_with(tokenizer or source.tokenizer()))
    check_tokens(calibration.tokens, source)
    return replace(job, calibration=calibration)


def check_tokens(tokens: Tensor, source: ModelSource) -> None:
    """See to it that a model can run on these samples.

    Args:
        tokens: int64 [S, T].
        source: the model.

    Raises:
        RecipeError: ids that the model does not know, or more tokens in a row than it has positions.
    """
    vocabulary, limit = int(source.config.vocab_size), int(source.config.max_position_embeddings)
    if int(tokens.max()) >= vocabulary:
        raise RecipeError(
            f"calibration has token id {int(tokens.max())}, and the model knows 0 to {vocabulary - 1}: these ids are "
            "from another tokenizer."
        )
    if source.family.learned_positions and tokens.shape[1] > limit:
        raise RecipeError(f"samples of {tokens.shape[1]} tokens are longer than the model's {limit} positions.")


def score(jobs: Sequence[Job], model: Any, progress: Progress = silent) -> list[PrunePlan]:
    """Run the walk once for all jobs, and decide for every chosen layer what stays.

    Where torch.distributed is initialised, each process sees its share of the samples, the sums are added up, and all
    processes come to the same plans.

    Args:
        jobs: from :func:`prepare`, of one model; those that look at text must have the same tokens.
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
    if job.method.allocate != "transfer-entropy" or job.calibration is None:
        return job
    profile = entropy_profile(
        job.source,
        model,
        job.calibration.tokens,
        lists=lists_needed(job.method),
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
    axes, empty = _without_empty(job, layers)
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
        allocation={"target": job.budget.target, "whole": job.budget.whole, **decision.told},
    )


def _without_empty(
    job: Job, layers: Mapping[Key, LayerPlan]
) -> tuple[dict[str, dict[int, LayerPlan]], tuple[int, ...]]:
    """(axis -> layer -> what stays, layers that go whole because nothing of them would stay)."""

    def keeps(axis: str, index: int) -> bool:
        return (axis, index) not in layers or len(layers[axis, index].keep) > 0

    empty = [i for i in job.layers if job.goes_with_its_layer and not any(keeps(axis, i) for axis in AXES)]
    axes: dict[str, dict[int, LayerPlan]] = {axis: {} for axis in job.method.axes}
    for (axis, index), layer in sorted(layers.items()):
        if index not in empty:
            axes[axis][index] = layer
    return axes, tuple(empty)


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


def portable(recipe: Recipe, method: Method) -> dict[str, Any]:
    """The recipe with every choice made and without paths of this machine."""
    criterion, allocate = method.criterion, method.allocate
    if ".py:" in criterion:
        file, _, name = criterion.rpartition(":")
        criterion = f"{Path(file).name}:{name} ({_digest(file)})"
    if allocate.endswith(".json"):
        allocate = f"{Path(allocate).name} ({_digest(allocate)})"
    calib = Path(recipe.calib).name if recipe.calib.endswith((".txt", ".jsonl", ".gz")) else recipe.calib
    choices = method._asdict()
    named = {"criterion": criterion, "allocate": allocate, "calib": calib}
    return {**recipe.model_dump(), "method": choices.pop("preset"), **choices, **named}


def _digest(file: str) -> str:
    try:
        return f"sha256 {hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]}"
    except OSError as error:
        raise RecipeError(f"{file} cannot be read: {error.strerror or error}.") from None
