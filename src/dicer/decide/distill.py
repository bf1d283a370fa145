"""What stays of the repaired sub-layers learns, all of them together, from what the dense model answers.

A repair mends each sub-layer by itself, towards its own output. Here the weights that stay in all of them follow the
gradient of KL(dense || pruned), the loss that a pruned model is judged by (Hinton et al. 2015; as the last step of
pruning: Minitron, Muralidharan et al. 2024).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from dicer.decide.layer_plan import LayerPlan
from dicer.decide.repair import masked
from dicer.errors import RecipeError
from dicer.measure.batches import counted_of
from dicer.measure.runner import swapping
from dicer.measure.stores.resident import evaluating, frozen
from dicer.measure.stores.store import LayerStore
from dicer.model.units import Axis, Slice, SubLayer
from dicer.progress import Progress, silent

RATE = 2e-4  # of AdamW at its highest; from there along a cosine to zero
STEP_TOKENS = 1024  # for each step
_BETAS = (0.9, 0.99)
_WARM = 0.05  # of all steps, in which the rate rises
_LARGEST = 1.0  # norm of a step's gradient
_WEIGHT = "weight"
_KEPT = (_WEIGHT, "exp_avg", "exp_avg_sq")
_KEEP = 100  # steps between two that are kept
_ROWS = 32  # tokens whose answers are compared at once: what the cache holds, not what memory does


class Along(Protocol):
    """Where a distillation that may be killed keeps what it has learned."""

    def state(self, shapes: Mapping[str, torch.Size]) -> tuple[int, Mapping[str, Tensor]]:
        """Steps that are done, and what was kept of them: tensors of these names and shapes."""

    def keep(self, done: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep what was learned in so many steps."""


@dataclass(frozen=True)
class _Learner:
    """What stays of one tensor, and learns.

    Attributes:
        name: the tensor's, inside its layer in memory.
        piece: where the units lie in it.
        parameter: it, in the dense model.
        rows: int64, its rows along ``piece.dim`` that stay.
        whole: the cut tensor at its full size, in the model's dtype; what goes is behind columns of zeros.
        before: float32, what stays of it; the output projection as it was solved.
        weight: the same as it is learned.
    """

    name: str
    piece: Slice
    parameter: nn.Parameter
    rows: Tensor
    whole: Tensor
    before: Tensor
    weight: Tensor

    def as_cut(self) -> Tensor:
        """The tensor at its full size, with what was learned up to now."""
        return self.whole.index_copy(self.piece.dim, self.rows, self.weight.to(self.whole.dtype))

    def take_gradient(self, count: int) -> None:
        """Add the gradient of the dense model's parameter, a sum over tokens, to what stays of it, as a mean."""
        gradient, self.parameter.grad = self.parameter.grad, None
        if gradient is not None:
            own = gradient.index_select(self.piece.dim, self.rows).float() / count
            self.weight.grad = own if self.weight.grad is None else self.weight.grad + own


@dataclass(frozen=True)
class _Pupil:
    """A sub-layer that learns: its tensors that do, and what else the cut has made of it (name -> tensor)."""

    learners: tuple[_Learner, ...]
    others: dict[str, Tensor]

    def as_cut(self) -> dict[str, Tensor]:
        """All tensors that the cut changes, by their names inside the layer."""
        return {**self.others, **{learner.name: learner.as_cut() for learner in self.learners}}

    def learned(self, layer: LayerPlan) -> LayerPlan:
        """The plan with what was learned."""
        assert layer.repair is not None
        output = next(learner for learner in self.learners if learner.piece.is_output)
        weight = output.weight.detach().movedim(output.piece.dim, 1).cpu().contiguous()
        inputs = [learner for learner in self.learners if learner is not output]
        learned = {one.piece.name: (one.weight.detach() - one.before).cpu().contiguous() for one in inputs}
        return replace(layer, repair=replace(layer.repair, weight=weight, learned=learned))


def distilled(
    store: LayerStore,
    layers: Mapping[SubLayer, LayerPlan],
    batches: Sequence[Tensor],
    passes: int,
    *,
    rate: float = RATE,
    seed: int = 0,
    at_once: int | None = None,
    along: Along | None = None,
    progress: Progress = silent,
) -> dict[SubLayer, LayerPlan]:
    """Plans whose repaired sub-layers have learned from the dense model: their output projections, and what feeds them.

    Args:
        store: the dense model, whole; left as it is.
        layers: what stays of its sub-layers; what has no repair stays as it is.
        batches: int64 [B, T] each; a step for each.
        passes: how often all of them are seen, each time in another order.
        rate: of AdamW.
        seed: of that order.
        at_once: samples that go through the model together, where a step has more; this changes the last bits alone.
        along: where it goes on if it was stopped.
        progress: called with (stage, done, total).

    Returns:
        The same plans with other numbers in their repairs.

    Raises:
        RecipeError: a loss or a gradient that is not finite, or sub-layers that share a tensor.
    """
    learning = {place: layer for place, layer in layers.items() if layer.repair is not None}
    if not learning or not batches:
        return dict(layers)
    model = store.whole()
    pupils = {place: _pupil(store, place, layer) for place, layer in learning.items()}
    learners = [learner for pupil in pupils.values() for learner in pupil.learners]
    if len({id(learner.parameter) for learner in learners}) < len(learners):
        raise RecipeError("two of the sub-layers that would learn share a tensor: leave --distill out.")
    weights = [learner.weight for learner in learners]
    optimizer = torch.optim.AdamW(weights, betas=_BETAS, weight_decay=0.0)
    steps, start = passes * len(batches), 0 if along is None else _restored(optimizer, weights, along)
    with evaluating(model), frozen(model):
        progress("distill", start, steps)
        for step, number in itertools.islice(enumerate(_order(len(batches), passes, seed)), start, None):
            loss = _divergence(store, pupils, batches[number], counted_of(batches)[number], at_once)
            norm = float(nn.utils.clip_grad_norm_(weights, _LARGEST))
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise RecipeError("the pruned model's answers are not finite while it learns: try --dtype float32.")
            optimizer.param_groups[0]["lr"] = rate * _share(step, steps)
            optimizer.step()
            optimizer.zero_grad()
            if along is not None and (step + 1) % _KEEP == 0:
                along.keep(step + 1, _learned(optimizer, weights))
            progress("distill", step + 1, steps)
    return {**layers, **{place: pupil.learned(learning[place]) for place, pupil in pupils.items()}}


def _pupil(store: LayerStore, place: SubLayer, layer: LayerPlan) -> _Pupil:
    with store.layer(place.layer) as module:
        axis = store.axes(place.layer)[place.axis]
        parameters = dict(module.named_parameters())
        others = masked(axis, {name: parameter.detach() for name, parameter in parameters.items()}, layer)
    assert layer.repair is not None
    learners = []
    for name, piece in _pieces(axis, parameters, layer):
        parameter = parameters[name]
        whole = others.pop(name, parameter.detach())
        rows = piece.rows(layer.keep, layer.units).to(whole.device)
        solved = layer.repair.weight.movedim(1, piece.dim).to(whole.device) if piece.is_output else None
        before = (whole.index_select(piece.dim, rows) if solved is None else solved).float().contiguous()
        weight = before.clone().requires_grad_(True)
        learners.append(_Learner(name, piece, parameter, rows, whole, before, weight))
    return _Pupil(tuple(learners), others)


def _pieces(axis: Axis, parameters: Mapping[str, Tensor], layer: LayerPlan) -> Iterator[tuple[str, Slice]]:
    """The tensors that learn, by their names in memory; one that lies there in another form is left as it is cut."""
    names = [piece.memory or piece.name for piece in axis.slices]
    for name, piece in zip(names, axis.slices, strict=True):
        there = name in parameters and parameters[name].shape[piece.dim] == layer.units * sum(piece.blocks)
        if piece.is_output or (there and names.count(name) == 1):
            yield name, piece


def _learned(optimizer: torch.optim.Optimizer, weights: Sequence[Tensor]) -> dict[str, Tensor]:
    """The weights and what the optimizer knows of each, by their number."""
    found: dict[str, Tensor] = {}
    for number, weight in enumerate(weights):
        held = {_WEIGHT: weight, **optimizer.state[weight]}
        found |= {f"{number}/{name}": held.get(name, torch.zeros_like(weight)) for name in _KEPT}
    return found


def _restored(optimizer: torch.optim.Optimizer, weights: Sequence[Tensor], along: Along) -> int:
    """Take in what :func:`_learned` gave; how many steps were done."""
    done, held = along.state(
        {f"{number}/{name}": weight.shape for number, weight in enumerate(weights) for name in _KEPT}
    )
    for number, weight in enumerate(weights if done else ()):
        weight.data.copy_(held[f"{number}/{_WEIGHT}"])
        moments = {name: held[f"{number}/{name}"].to(weight.device) for name in _KEPT if name != _WEIGHT}
        optimizer.state[weight] = {"step": torch.tensor(float(done)), **moments}
    return done


def _share(step: int, steps: int) -> float:
    """Of the highest rate, at one of so many steps."""
    return min(1.0, (step + 1) / max(1.0, _WARM * steps)) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def _order(count: int, passes: int, seed: int) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(passes):
        yield from torch.randperm(count, generator=generator).tolist()


def _divergence(
    store: LayerStore,
    pupils: Mapping[SubLayer, _Pupil],
    batch: Tensor,
    counted: Tensor | None,
    at_once: int | None,
) -> float:
    """Mean KL(dense || pruned) over the tokens of a batch that count; its gradient is added to the learners'."""
    model, total = store.whole(), 0.0
    counts = torch.ones_like(batch, dtype=torch.bool) if counted is None else counted
    size, count = at_once or len(batch), max(int(counts.sum()), 1)
    for part, own in zip(batch.split(size), counts.split(size), strict=True):
        tokens = part.to(next(model.parameters()).device)
        with torch.no_grad():
            dense = _logits(model, tokens)
        with torch.enable_grad(), _as_cut(store, pupils):  # the way back, too, reads what the cut has made
            logits = _logits(model, tokens)
            apart, slope = _apart(dense, logits.detach(), own.to(logits.device))
            logits.backward(slope)  # a sum, as float16 would lose much of a mean
        for pupil in pupils.values():
            for learner in pupil.learners:
                learner.take_gradient(count)
        total += apart / count
    return total


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits  # [B, T, V]
    return logits


def _apart(dense: Tensor, pruned: Tensor, counted: Tensor) -> tuple[float, Tensor]:
    """The sum of KL(dense || pruned) over the tokens that count, and its gradient by the pruned logits [B, T, V].

    Args:
        dense: logits [B, T, V].
        pruned: logits [B, T, V].
        counted: bool [B, T].
    """
    total, slope = 0.0, torch.zeros_like(pruned)
    parts = (one.flatten(0, -2).split(_ROWS) for one in (dense, pruned, slope))
    for theirs, own, there, kept in zip(*parts, counted.flatten().split(_ROWS), strict=True):
        wanted, found = (logits[kept].float().log_softmax(-1) for logits in (theirs, own))
        share = wanted.exp()
        total += float(wanted.sub_(found).mul_(share).sum())
        there[kept] = found.exp_().sub_(share).to(there.dtype)
    return total, slope


@contextmanager
def _as_cut(store: LayerStore, pupils: Mapping[SubLayer, _Pupil]) -> Iterator[None]:
    """The dense model as the pruned one for a while; of what learns, gradients are asked for."""
    parameters = [learner.parameter for pupil in pupils.values() for learner in pupil.learners]
    with ExitStack() as stack:
        for place, pupil in pupils.items():
            module = stack.enter_context(store.layer(place.layer))
            stack.enter_context(swapping(module))(pupil.as_cut())
        try:
            for parameter in parameters:
                parameter.requires_grad_(True)
            yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)
