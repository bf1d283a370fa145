"""Many recipes, few passes: those that read the same tokens in the same way are scored together."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from dicer.ask.recipe import Recipe
from dicer.ask.spelling import Wanted
from dicer.ask.text import Text
from dicer.decide.decide import score
from dicer.decide.plan import PrunePlan
from dicer.decide.task import Asked, Decided, prepare, with_text
from dicer.machine import peak_memory, reset_peak_memory
from dicer.measure.stores.store import LayerStore
from dicer.measure.text import Calibration, load_calibration
from dicer.model.source import ModelSource, tokenize_with
from dicer.processes import world_size
from dicer.progress import Progress, silent

T = TypeVar("T")


@dataclass(frozen=True)
class Scored:
    """What a pass gave for one recipe.

    Attributes:
        task: the recipe, held against the model.
        plan: which units stay.
        norms: layer -> L2 norm of each unit's post activation over the calibration tokens, float32 [N]; None where the
            text cannot be had and the method does not look at it.
        seconds: of the whole pass.
        sharing: recipes that the pass served.
        memory: most bytes that were held meanwhile.
    """

    task: Asked
    plan: PrunePlan
    norms: dict[int, Tensor] | None
    seconds: float
    sharing: int
    memory: dict[str, int]


class _Member(NamedTuple):
    """One task of a pass, and whose it is: a recipe's number, or the key of the norms that all recipes show."""

    owner: object
    task: Asked


class _Pass(NamedTuple):
    plan: PrunePlan
    seconds: float
    sharing: int
    memory: dict[str, int]


def score_all(
    source: ModelSource,
    store: LayerStore,
    wanted: Sequence[Wanted],
    tokenizer: Any,
    progress: Progress = silent,
) -> list[Scored | Exception]:
    """One plan for each recipe, with as few passes as there are kinds of statistics and token sets.

    Args:
        source: the model.
        store: its layers.
        wanted: what to do and how it is computed, each on its own.
        tokenizer: of the model, or None where it has none.
        progress: called with (stage, done, total).

    Returns:
        In their order; where one failed, its error: the others do not suffer.
    """
    texts = _Texts(tokenizer)
    tasks = [_tried(partial(_with_text, source, asked, texts)) for asked in wanted]
    passes: dict[tuple[Text | None, str], list[_Member]] = {}
    for number, task in enumerate(tasks):
        if isinstance(task, Exception):
            continue
        text = task.recipe.text if task.calibration else None
        kind = f"alone {number}" if task.method.walks_alone else _kind(task)
        passes.setdefault((text, kind), []).append(_Member(number, task))
        norms = _tried(partial(_with_text, source, Wanted(_norms_recipe(task), task.compute), texts))
        members = passes.setdefault((task.recipe.text, "sums"), [])
        if not isinstance(norms, Exception) and all(_norms_key(task) != member.owner for member in members):
            members.append(_Member(_norms_key(task), norms))
    found: dict[object, _Pass | Exception] = {}
    for members in passes.values():
        found.update(_run_pass(members, store, progress))
    return [task if isinstance(task, Exception) else _scored(task, number, found) for number, task in enumerate(tasks)]


def _scored(task: Asked, number: int, found: dict[object, _Pass | Exception]) -> Scored | Exception:
    own, norms = found[number], found.get(_norms_key(task))
    if isinstance(own, Exception):
        return own
    scores = {i: layer.scores for i, layer in norms.plan.mlp.items()} if isinstance(norms, _Pass) else None
    return Scored(task, own.plan, scores, own.seconds, own.sharing, own.memory)


def _run_pass(members: list[_Member], store: LayerStore, progress: Progress) -> dict[object, _Pass | Exception]:
    """Score together; where that fails, one after the other, so that only those fail that must."""
    if not members:
        return {}
    reset_peak_memory()
    start = time.perf_counter()
    plans = _tried(lambda: score([member.task for member in members], store, progress))
    if not isinstance(plans, Exception):
        seconds, memory = time.perf_counter() - start, peak_memory()
        runs = sum(isinstance(member.owner, int) for member in members)
        return {m.owner: _Pass(plan, seconds, runs, memory) for m, plan in zip(members, plans, strict=True)}
    if world_size() > 1:  # the others may have got through: to try again would be out of step with them
        raise plans
    if len(members) == 1:
        return {members[0].owner: plans}
    return {owner: value for member in members for owner, value in _run_pass([member], store, progress).items()}


def _kind(task: Asked) -> str:
    """Passes of different cost stay apart, so that the time of each says something about its methods."""
    if task.method.allocate in ("transfer-entropy", "cosine") and not isinstance(task, Decided):
        return "entropy"
    if task.needs_gradient:
        return "gradient"
    if any("gram" in need.kind for need in task.needs):
        return "gram"
    return "sums" if task.needs else "weights"


def _with_text(source: ModelSource, wanted: Wanted, texts: _Texts) -> Asked:
    task = prepare(source, *wanted)
    return with_text(task, read=texts.get)


def _norms_key(task: Asked) -> object:
    return (task.recipe.text, tuple(task.layers))


def _norms_recipe(task: Asked) -> Recipe:
    return Recipe(method="act-l2", layers=task.recipe.layers, text=task.recipe.text)


class _Texts:
    """Calibration tokens, read once for all recipes that ask for the same."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenize = tokenize_with(tokenizer)
        self._held: dict[Text, Calibration | Exception] = {}

    def get(self, text: Text) -> Calibration:
        if text not in self._held:
            self._held[text] = _tried(lambda: load_calibration(text, self._tokenize))
        found = self._held[text]
        if isinstance(found, Exception):
            raise found
        return found


def _tried(work: Callable[[], T]) -> T | Exception:
    try:
        return work()
    except Exception as error:  # a run that fails is told of, and the rest goes on
        return error
