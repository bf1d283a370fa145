"""A recipe held against a model, and the one walk that decides what stays, for one method or for many at once."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dicer.axes import legal
from dicer.calibration import Calibration, load_calibration
from dicer.criteria import CRITERIA, Criterion, find_criterion
from dicer.distributed import share
from dicer.errors import RecipeError, unknown
from dicer.grouping import GROUPINGS, random_groups, similarity_groups
from dicer.layer_statistics import LayerStatistics, Need, stream
from dicer.merging import MERGES, Survivors, keep_strongest, keep_top, merge_dominant, merge_mean
from dicer.plan import LayerPlan, PrunePlan
from dicer.recipe import Method, Recipe, select_layers
from dicer.sources import ModelSource, tokenize_with
from dicer.surgery import Sizes, plan_cut
from dicer.walk import LayerVisit, Progress, ResidentStore, silent, walk

BATCH_TOKENS = 4096  # in a forward pass
GRADIENT_TOKENS = 1024  # in a forward and backward pass, which also holds logits and their gradients


@dataclass(frozen=True)
class Job:
    """A recipe held against a model: everything that can be wrong has been looked at, and nothing been computed.

    Attributes:
        source: the model.
        recipe: what was asked.
        method: every choice of the recipe made.
        criterion: the scoring function.
        layers: layer -> (units, how many stay).
        calibration: the tokens, or None when nothing of the method looks at text.
    """

    source: ModelSource
    recipe: Recipe
    method: Method
    criterion: Criterion
    layers: dict[int, tuple[int, int]]
    calibration: Calibration | None

    @property
    def needs(self) -> frozenset[Need]:
        """The sums over activations that the method reads."""
        kinds = [kind for kind in ("square_sum", "sum") if kind in self.criterion.needs]
        needs = {Need(kind, self.method.activation) for kind in kinds}
        if self.method.grouped_by is not None:
            needs.add(Need("gram", self.method.grouped_by))
        if self.method.merge == "dominant" and self.method.grouping != "none":
            needs.add(Need("square_sum", "mod"))
        return frozenset(needs)

    @property
    def notes(self) -> list[str]:
        """What the user should know before the result surprises her."""
        notes = list(self.calibration.notes) if self.calibration else []
        if self.method.merge != "prune" and self.method.grouping == "none":
            notes.append(f"merge '{self.method.merge}' has nothing to merge without groups; name a --grouping")
        whole = [i for i, (units, keep) in self.layers.items() if units == keep]
        if whole:
            notes.append(f"{len(whole)} layers keep all their neurons: the ratio rounds to nothing there")
        return notes

    def sizes(self) -> tuple[Sizes, Sizes]:
        """What the model has and what it will have, known before anything is computed."""
        layers = {i: LayerPlan(n, torch.arange(k), torch.zeros(n)) for i, (n, k) in self.layers.items()}
        outline = PrunePlan({}, {}, {}, {}, {"mlp": layers})
        return plan_cut(self.source.tensors, self.source.family, outline).sizes()


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
    widths = source.family.widths(source.config)
    chosen = select_layers(recipe.layers, len(widths))
    layers = {i: (widths[i], legal(widths[i], recipe.ratio, recipe.width_multiple)) for i in chosen}
    for index, (_, keep) in layers.items():
        if method.groups is not None and method.groups > keep:
            raise RecipeError(
                f"--groups {method.groups} is more than the {keep} neurons that layer {index} keeps; "
                f"ask for at most {keep}."
            )
    job = Job(source, recipe, method, criterion, layers, None)
    if not job.needs and "gradient" not in criterion.needs:
        return job
    calibration = calibration or load_calibration(recipe, tokenize_with(tokenizer or source.tokenizer()))
    _check_tokens(calibration.tokens, source)
    return Job(source, recipe, method, criterion, layers, calibration)


def _check_tokens(tokens: Tensor, source: ModelSource) -> None:
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
        RecipeError: jobs with different calibration tokens.
    """
    gradient = any("gradient" in job.criterion.needs for job in jobs)
    texts = [job.calibration.tokens for job in jobs if job.calibration is not None]
    if any(not torch.equal(tokens, texts[0]) for tokens in texts):
        raise RecipeError("methods that share a pass must share their calibration tokens; score these apart.")
    size = min((job.recipe.batch_size for job in jobs if job.recipe.batch_size), default=None)
    batches: Sequence[Tensor] = ()
    if texts:
        mine = share(texts[0])  # [S', T]: all of it, or this process's part
        most = GRADIENT_TOKENS if gradient else BATCH_TOKENS
        batches = mine.split(size or max(1, most // mine.shape[1])) if len(mine) else ()
    visits = walk(
        ResidentStore(model, jobs[0].source.family),
        sorted({index for job in jobs for index in job.layers}),
        batches,
        needs=frozenset().union(*(job.needs for job in jobs)),
        gradient=gradient,
        checkpointing=any(job.recipe.gradient_checkpointing for job in jobs),
        progress=progress,
    )
    layers: list[dict[int, LayerPlan]] = [{} for _ in jobs]
    for visit in visits:
        for job, decided in zip(jobs, layers, strict=True):
            if visit.index in job.layers:
                decided[visit.index] = _decide(job, visit)
        del visit  # one layer alive at a time: the next one is made before the loop would let go of this
    return [_plan(job, decided) for job, decided in zip(jobs, layers, strict=True)]


def _plan(job: Job, layers: dict[int, LayerPlan]) -> PrunePlan:
    return PrunePlan(
        model={
            "name": job.source.name,
            "model_type": str(job.source.config.model_type),
            "fingerprint": job.source.fingerprint,
        },
        recipe=portable(job.recipe, job.method),
        calibration=job.calibration.provenance if job.calibration else {},
        versions={name: importlib.metadata.version(name) for name in ("dicer", "torch", "transformers")},
        axes={"mlp": layers},
    )


def _decide(job: Job, visit: LayerVisit) -> LayerPlan:
    """Scores, groups and survivors of one layer."""
    method, seed = job.method, job.recipe.seed
    units, keep = job.layers[visit.index]
    statistics = LayerStatistics(method.activation, visit.sums, stream(seed, visit.index, "criterion"), visit.gradient)
    scores = job.criterion(visit.weights, statistics)
    survivors = _survivors(job, visit, scores, units, keep)
    merge = survivors.merge
    if merge is None:
        return LayerPlan(units, survivors.keep, scores)
    return LayerPlan(units, survivors.keep, scores, merge.row, merge.weight_in, merge.weight_out)


def _survivors(job: Job, visit: LayerVisit, scores: Tensor, units: int, keep: int) -> Survivors:
    method = job.method
    if method.grouping == "none":
        return keep_top(scores, keep)
    if method.grouped_by is not None:
        labels = similarity_groups(visit.sums.get("gram", method.grouped_by), keep)
    else:
        labels = random_groups(units, method.groups or keep, stream(job.recipe.seed, visit.index, "grouping"))
    if method.merge == "mean":
        return merge_mean(scores, labels)
    if method.merge == "dominant":
        return merge_dominant(visit.sums.get("square_sum", "mod").sqrt().float().cpu(), labels)
    return keep_strongest(scores, labels, keep)


def portable(recipe: Recipe, method: Method) -> dict[str, Any]:
    """The recipe with every choice made and without paths of this machine."""
    criterion = method.criterion
    if ".py:" in criterion:
        file, _, name = criterion.rpartition(":")
        digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
        criterion = f"{Path(file).name}:{name} (sha256 {digest})"
    calib = Path(recipe.calib).name if recipe.calib.endswith((".txt", ".jsonl", ".gz")) else recipe.calib
    choices = method._asdict()
    return {**recipe.model_dump(), "method": choices.pop("preset"), **choices, "criterion": criterion, "calib": calib}
