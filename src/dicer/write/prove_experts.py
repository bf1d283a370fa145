"""The proof of experts on a twin: one that goes is one that no token is sent to, a neuron that goes is zero."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from dicer.decide.plan import LayerPlan, PrunePlan
from dicer.model.source import ModelSource
from dicer.model.structure.find import FoundFamily
from dicer.model.units import Axis
from dicer.write.checkpoint import build_model
from dicer.write.surgery import plan_cut

_NEVER = -1e9  # a correction that no router's score makes up for
Logits = Callable[[Any], Tensor]


def tied_axes(family: FoundFamily) -> dict[str, Axis]:
    """The axes of neurons in experts, and those whose width the same key of the config says."""
    keys = {axis.width_keys[-1] for axis in family.axes.values() if axis.routed and not axis.kind.routed}
    return {name: axis for name, axis in family.axes.items() if axis.width_keys[-1] in keys}


def plan_neurons(family: FoundFamily) -> PrunePlan:
    """About three fifths of the neurons of every expert stay, others in each, and as many wherever one key says it."""
    axes = tied_axes(family)
    width = min(u / family.factors[name] for name in axes for u in family.counts[name] if u)
    step = 8 if width >= 24 else 1
    number = max(int(width * 3 // 5) // step, 1) * step
    return _plan(family, axes, lambda axis, _: int(number * family.factors[axis.name]))


def plan_experts(family: FoundFamily) -> PrunePlan:
    """As many experts go as may, but at most a quarter."""
    axis = family.axes["experts"]
    step = axis.parts

    def keep(_: Axis, units: int) -> int:
        return max(-(-max(units * 3 // 4, axis.least) // step) * step, step)

    return _plan(family, {"experts": axis}, keep)


def _plan(family: FoundFamily, axes: Mapping[str, Axis], keep: Callable[[Axis, int], int]) -> PrunePlan:
    generator = torch.Generator().manual_seed(7)
    plans: dict[str, dict[int, LayerPlan]] = {}
    for name, axis in axes.items():
        for layer, units in enumerate(family.counts[name]):
            if not units:
                continue
            size, each = units // axis.parts, keep(axis, units) // axis.parts
            parts = [torch.randperm(size, generator=generator)[:each] + part * size for part in range(axis.parts)]
            plans.setdefault(name, {})[layer] = LayerPlan(units, torch.cat(parts).sort().values, torch.zeros(units))
    return PrunePlan({}, {}, {}, {}, plans)


def compare_neurons(source: ModelSource, load: Callable[[Mapping[str, Tensor]], Any], logits: Logits) -> list[Tensor]:
    """Logits of the cut twin, of the twin in which what goes is zero, and of one whose neurons are in another order.

    Args:
        source: the twin.
        load: makes its class of tensors.
        logits: of a model.
    """
    family: Any = source.family
    plan = plan_neurons(family)
    cut = logits(build_model(plan_cut(source, plan), torch.float32))
    zero = _changed(source, plan, lambda part, dim, layer: part.index_fill_(dim, _gone(layer), 0.0))
    turned = _changed(source, plan, lambda part, dim, _: part.copy_(part.roll(1, dim)))
    return [cut, logits(load(zero)), logits(load(turned))]


def _changed(
    source: ModelSource, plan: PrunePlan, change: Callable[[Tensor, int, LayerPlan], Tensor]
) -> dict[str, Tensor]:
    """The twin's tensors, with the maps out of the neurons changed."""
    family = source.family
    tensors = {name: source.tensors.read(name).clone() for name in source.tensors.infos()}
    for name, layers in plan.axes.items():
        piece = family.axes[name].output_slice
        for index, layer in layers.items():
            tensor = tensors[family.tensor_name(index, piece.name)]
            if piece.expert is None:
                change(tensor, piece.dim, layer)
            else:
                change(tensor[piece.expert], piece.dim - 1, layer)
    return tensors


def _gone(layer: LayerPlan) -> Tensor:
    stays = torch.zeros(layer.units, dtype=torch.bool)
    stays[layer.keep] = True
    return (~stays).nonzero().flatten()


def compare_experts(source: ModelSource, model: Any, logits: Logits) -> list[Tensor]:
    """Logits of the cut twin, of the twin that sends no token to what goes, and of one that sends none to others.

    Args:
        source: the twin.
        model: the twin in memory, whose routers are changed for a while.
        logits: of a model.
    """
    family: Any = source.family
    plan = plan_experts(family)
    layers = plan.axes["experts"]
    cut = logits(build_model(plan_cut(source, plan), torch.float32))
    with _without(model, family, {index: _gone(layer) for index, layer in layers.items()}):
        masked = logits(model)
    with _without(model, family, {index: layer.keep[: len(_gone(layer))] for index, layer in layers.items()}):
        others = logits(model)
    return [cut, masked, others]


@contextmanager
def _without(model: Any, family: FoundFamily, gone: Mapping[int, Tensor]) -> Iterator[None]:
    """The router's logit of some experts is minus infinity, and no correction of its scores brings them back."""
    rows: dict[int, Tensor] = {}
    corrections = []
    for index, lost in gone.items():
        module = model.get_submodule(f"{family.layers}.{index}")
        state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        for piece in family.axes["experts"].slices:
            tensor = state.get(piece.memory or piece.name)
            if tensor is None or not piece.roles[0].startswith("router"):
                continue
            if tensor.dim() == 2 and piece.dim == 0:
                rows[tensor.data_ptr()] = lost
            elif piece.optional:
                corrections.append((tensor, tensor.detach().clone(), lost))
    linear = torch.nn.functional.linear

    def masked(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        output = linear(inputs, weight, bias)
        lost = rows.get(weight.data_ptr())
        return output if lost is None else output.index_fill(-1, lost, -torch.inf)

    with torch.no_grad(), patch.object(torch.nn.functional, "linear", masked):
        try:
            for tensor, _, lost in corrections:
                tensor[..., lost] = _NEVER
            yield
        finally:
            for tensor, before, _ in corrections:
                tensor.copy_(before)


def twin_counts(family: FoundFamily) -> dict[str, int]:
    """What a config says of the experts of a small twin: twice as many as have to stay."""
    axis = family.axes.get("experts")
    if axis is None:
        return {}
    count = max(family.counts["experts"])
    fewer = min(count, 2 * axis.least)
    return dict.fromkeys(axis.width_keys, fewer) if fewer < count else {}
