"""Many recipes, few passes: those that read the same tokens in the same way are scored together."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from dicer.ask.recipe import Recipe
from dicer.decide.decide import score
from dicer.decide.plan import PrunePlan
from dicer.decide.task import Job, prepare
from dicer.machine import peak_memory, reset_peak_memory
from dicer.measure.stores.resident import Progress, silent
from dicer.measure.text import Calibration, load_calibration
from dicer.model.source import ModelSource, tokenize_with
from dicer.processes import world_size

T = TypeVar("T")

_TEXT_FIELDS = ("calib", "calib_config", "calib_split", "calib_field", "samples", "seq_len", "calib_seed")
_NORM_FIELDS = (*_TEXT_FIELDS, "layers", "batch_size", "device", "dtype")


@dataclass(frozen=True)
class Scored:
    """What a pass gave for one recipe.

    Attributes:
        job: the recipe, held against the model.
        plan: which units stay.
        norms: layer -> L2 norm of each unit's post activation over the calibration tokens, float32 [N]; None where the
            text cannot be had and the method does not look at it.
        seconds: of the whole pass.
        sharing: recipes that the pass served.
        memory: most bytes that were held meanwhile.
    """

    job: Job
    plan: PrunePlan
    norms: dict[int, Tensor] | None
    seconds: float
    sharing: int
    memory: dict[str, int]


class _Member(NamedTuple):
    """One job of a pass, and whose it is: a recipe's number, or the key of the norms that all recipes show."""

    owner: object
    job: Job


class _Pass(NamedTuple):
    plan: PrunePlan
    seconds: float
    sharing: int
    memory: dict[str, int]


def score_all(
    source: ModelSource, model: Any, recipes: Sequence[Recipe], tokenizer: Any, progress: Progress = silent
) -> list[Scored | Exception]:
    """One plan for each recipe, with as few passes as there are kinds of statistics and token sets.

    Args:
        source: the model.
        model: the same, in memory.
        recipes: what to do, each on its own.
        tokenizer: of the model, or None where it has none.
        progress: called with (stage, done, total).

    Returns:
        In the order of the recipes; where one failed, its error: the others do not suffer.
    """
    texts = _Texts(tokenizer)
    jobs = [_tried(lambda recipe=recipe: _prepare(source, recipe, tokenizer, texts)) for recipe in recipes]  # type: ignore[misc]
    passes: dict[tuple[object, str], list[_Member]] = {}
    for number, job in enumerate(jobs):
        if isinstance(job, Exception):
            continue
        text = texts.key(job.recipe) if job.calibration else None
        passes.setdefault((text, _kind(job)), []).append(_Member(number, job))
        norms = _tried(partial(_norms_job, job, tokenizer, texts))
        members = passes.setdefault((texts.key(job.recipe), "sums"), [])
        if not isinstance(norms, Exception) and all(_norms_key(job) != member.owner for member in members):
            members.append(_Member(_norms_key(job), norms))
    found: dict[object, _Pass | Exception] = {}
    for members in passes.values():
        found.update(_run_pass(members, model, progress))
    return [job if isinstance(job, Exception) else _scored(job, number, found) for number, job in enumerate(jobs)]


def _scored(job: Job, number: int, found: dict[object, _Pass | Exception]) -> Scored | Exception:
    own, norms = found[number], found.get(_norms_key(job))
    if isinstance(own, Exception):
        return own
    scores = {i: layer.scores for i, layer in norms.plan.mlp.items()} if isinstance(norms, _Pass) else None
    return Scored(job, own.plan, scores, own.seconds, own.sharing, own.memory)


def _run_pass(members: list[_Member], model: Any, progress: Progress) -> dict[object, _Pass | Exception]:
    """Score together; where that fails, one after the other, so that only those fail that must."""
    if not members:
        return {}
    reset_peak_memory()
    start = time.perf_counter()
    plans = _tried(lambda: score([member.job for member in members], model, progress))
    if not isinstance(plans, Exception):
        seconds, memory = time.perf_counter() - start, peak_memory()
        runs = sum(isinstance(member.owner, int) for member in members)
        return {m.owner: _Pass(plan, seconds, runs, memory) for m, plan in zip(members, plans, strict=True)}
    if world_size() > 1:  # the others may have got through: to try again would be out of step with them
        raise plans
    if len(members) == 1:
        return {members[0].owner: plans}
    return {owner: value for member in members for owner, value in _run_pass([member], model, progress).items()}


def _kind(job: Job) -> str:
    """Passes of different cost stay apart, so that the time of each says something about its methods."""
    if job.method.allocate == "transfer-entropy" and job.decision is None:
        return "entropy"
    if "gradient" in job.criterion.needs:
        return "gradient"
    if any(need.kind == "gram" for need in job.needs):
        return "gram"
    return "sums" if job.needs else "weights"


def _prepare(source: ModelSource, recipe: Recipe, tokenizer: Any, texts: _Texts) -> Job:
    job = prepare(source, recipe, tokenizer, texts.known(recipe))
    if job.calibration is not None:
        texts.keep(recipe, job.calibration)
    return job


def _norms_key(job: Job) -> object:
    return (*(getattr(job.recipe, name) for name in _TEXT_FIELDS), tuple(job.layers))


def _norms_job(job: Job, tokenizer: Any, texts: _Texts) -> Job:
    recipe = Recipe(method="act-l2", **{name: getattr(job.recipe, name) for name in _NORM_FIELDS})
    return prepare(job.source, recipe, tokenizer, texts.get(recipe))


class _Texts:
    """Calibration tokens, read once for all recipes that ask for the same."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenize = tokenize_with(tokenizer)
        self._held: dict[object, Calibration | Exception] = {}

    def key(self, recipe: Recipe) -> object:
        return tuple(getattr(recipe, name) for name in _TEXT_FIELDS)

    def known(self, recipe: Recipe) -> Calibration | None:
        found = self._held.get(self.key(recipe))
        return found if isinstance(found, Calibration) else None

    def keep(self, recipe: Recipe, calibration: Calibration) -> None:
        self._held[self.key(recipe)] = calibration

    def get(self, recipe: Recipe) -> Calibration:
        key = self.key(recipe)
        if key not in self._held:
            self._held[key] = _tried(lambda: load_calibration(recipe, self._tokenize))
        found = self._held[key]
        if isinstance(found, Exception):
            raise found
        return found


def _tried(work: Callable[[], T]) -> T | Exception:
    try:
        return work()
    except Exception as error:  # a run that fails is told of, and the rest goes on
        return error
