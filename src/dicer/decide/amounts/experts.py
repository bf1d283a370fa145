"""What experts ask of an allocation: enough for every token, widths that kernels take, the same everywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import torch

from dicer.ask.axes import kind_name
from dicer.decide.amounts.prunable import TOLERANCE, Prunable
from dicer.errors import RecipeError
from dicer.model.source import ModelSource
from dicer.model.units import Axis

_KERNEL_BYTES = 16  # torch.grouped_mm wants the rows of each expert to begin at a multiple of it


def with_experts(sub_layers: Sequence[Prunable], source: ModelSource, *, by_default: bool) -> tuple[Prunable, ...]:
    """The same with the bounds of experts, and with ties where one key of the config says several widths.

    Args:
        sub_layers: what units can be taken out of.
        source: the model.
        by_default: widths of experts are multiples that kernels take; the user asked for no other.
    """
    family = source.family
    keys = {key for axis in family.axes.values() if axis.routed for key in axis.width_keys}
    found = []
    for sub_layer in sub_layers:
        axis = family.axes[sub_layer.axis]
        if axis.width_keys[-1] not in keys:
            found.append(sub_layer)
            continue
        multiple = axis.parts if axis.kind.routed or not by_default else _kernel(source, axis, sub_layer)
        share = family.factors[sub_layer.axis]
        tie = axis.width_keys[-1]
        found.append(replace(sub_layer, least=axis.least, multiple=multiple, tie=tie, share=share))
    return tuple(found)


def _kernel(source: ModelSource, axis: Axis, sub_layer: Prunable) -> int:
    """Neurons whose values are a multiple of what grouped kernels take; 1 where those of the model are none."""
    infos = source.tensors.infos()
    name = source.family.tensor_name(sub_layer.layer, axis.slices[0].name)
    size = infos[name].dtype.itemsize if name in infos else torch.float32.itemsize
    multiple = max(_KERNEL_BYTES // size, 1)
    return multiple if sub_layer.units % multiple == 0 else 1


def reason_against(source: ModelSource, axis: str) -> str:
    """Why a model has no units along an axis, where that is known."""
    family = source.family
    if any(kind_name(name) == axis for name in family.axes):
        return ""
    known = [why for name, why in family.refused.items() if kind_name(name) == axis]
    why = known[0] if known else "the model has no experts" if axis == "experts" else ""
    return why and f": {why.rstrip('.')}"


def check_least(source: ModelSource, sub_layers: Sequence[Prunable], ratio: float) -> None:
    """Refuse a ratio that leaves fewer experts than a token is sent to.

    Raises:
        RecipeError: with how many stay, how many must, and the most that can be asked for.
    """
    for sub_layer in sub_layers:
        keep = round(sub_layer.units * (1 - ratio))
        if not sub_layer.kind.routed or keep >= sub_layer.least:
            continue
        most = math.floor((1 - sub_layer.least / sub_layer.units) * 1000 + TOLERANCE) / 1000
        groups = source.family.axes[sub_layer.axis].parts
        why = f" (in {groups} groups, of which a token takes some)" if groups > 1 else ""
        raise RecipeError(
            f"ratio {ratio} leaves {keep} of {sub_layer.units} experts in layer {sub_layer.layer}, and a token is sent "
            f"to so many that {sub_layer.least} have to stay{why}: ask for at most {most:g}."
        )


def tied_units(sub_layers: Sequence[Prunable], kept: Sequence[int]) -> list[int]:
    """Numbers that are the same wherever one key says them, and so that as many parameters go, within half a step.

    Args:
        sub_layers: [M].
        kept: [M], as an allocation has them, each for itself.
    """
    found, ties = list(kept), {sub_layer.tie for sub_layer in sub_layers if sub_layer.tie}
    for tie in sorted(ties):
        own = [i for i, sub_layer in enumerate(sub_layers) if sub_layer.tie == tie]
        if len({kept[i] / sub_layers[i].share for i in own}) == 1:
            continue
        whole = sum(sub_layers[i].share * sub_layers[i].unit_parameters for i in own)
        mean = sum((kept[i] * sub_layers[i].unit_parameters for i in own), Fraction(0)) / whole
        step = math.lcm(*(sub_layers[i].multiple for i in own))
        least = max(math.ceil(sub_layers[i].least / sub_layers[i].share) for i in own)
        number = max(round(mean / step) * step, math.ceil(least / step) * step)
        for i in own:
            found[i] = min(int(number * sub_layers[i].share), sub_layers[i].units)
    return found
