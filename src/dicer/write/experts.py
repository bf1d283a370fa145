"""What becomes of experts' tensors: their neurons are cut side by side, whole ones go, and the rest is renumbered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dicer.decide.plan import LayerPlan, PrunePlan
from dicer.errors import PlanError
from dicer.model.units import Axis, Slice, templates

Cutter = Callable[[Tensor, Slice, LayerPlan], Tensor]


@dataclass(frozen=True)
class ExpertCut:
    """How one tensor of experts changes.

    Attributes:
        name: what it is called afterwards inside its layer; None where it goes with its expert.
        inside: (piece, what stays) for the neurons of each expert that the tensor holds.
        whole: (piece, what stays) where it holds rows of all experts; None else.
    """

    name: str | None
    inside: tuple[tuple[Slice, LayerPlan], ...] = ()
    whole: tuple[Slice, LayerPlan] | None = None

    def shape(self, before: tuple[int, ...]) -> tuple[int, ...]:
        """The shape afterwards."""
        shape = list(before)
        if self.inside:
            piece, layer = self.inside[0]
            shape[piece.dim] = len(layer.keep) * sum(piece.blocks)
        if self.whole:
            piece, layer = self.whole
            shape[piece.dim] = len(layer.keep) * sum(piece.blocks)
        return tuple(shape)

    def apply(self, tensor: Tensor, cut: Cutter) -> Tensor:
        """The tensor afterwards; experts that go are not cut first.

        Args:
            tensor: as on disk.
            cut: what cuts the units of one slice out of a tensor (:func:`dicer.write.surgery.slice_tensor`).
        """
        if self.inside and self.inside[0][0].expert is None:
            return cut(tensor, *self.inside[0])
        if self.inside:
            layer = self.whole[1] if self.whole else None
            stay = range(len(self.inside)) if layer is None else layer.keep.tolist()
            own = [self.inside[e] for e in stay]
            return torch.stack(
                [cut(tensor[e], replace(p, dim=p.dim - 1), plan) for e, (p, plan) in zip(stay, own, strict=True)]
            )
        return cut(tensor, *self.whole) if self.whole else tensor


Find = Callable[[int, str], ExpertCut | None]


def expert_cuts(axes: Mapping[str, Axis], plan: PrunePlan) -> Find:
    """(layer, name inside it) -> how a plan changes the tensor; None for one that is none of experts that it cuts.

    Args:
        axes: of the family.
        plan: what stays; what is found raises PlanError where experts in one tensor keep different numbers of neurons,
            or none.
    """
    places: dict[str, list[tuple[Axis, Slice]]] = {}
    for axis in axes.values():
        for piece in axis.slices if axis.routed and plan.axes.get(axis.name) else ():
            places.setdefault(piece.name, []).append((axis, piece))

    def find(index: int, inner: str) -> ExpertCut | None:
        name, whole, inside = inner, None, {}
        for number, template in templates(inner):
            for axis, piece in places.get(template, ()):
                layer = plan.axes[axis.name].get(index)
                if layer is None:
                    continue
                if number is not None:
                    place = (layer.keep == number).nonzero().flatten().tolist()
                    if not place:
                        return ExpertCut(None)
                    name = template.format(place[0])
                elif axis.kind.routed:
                    whole = piece, layer
                else:
                    inside[piece.expert or 0] = piece, layer
        if not inside and whole is None and name == inner:
            return None
        own = tuple(inside[expert] for expert in sorted(inside))
        widths = {len(layer.keep) for _, layer in own}
        if len(widths) > 1 or 0 in widths:
            raise PlanError(
                f"the plan keeps {sorted(widths)} neurons of experts that share '{inner}' in layer {index}."
            )
        return ExpertCut(name, own, whole)

    return find


def without_aliases(raw_config: Mapping[str, Any], config: Any, path: str) -> dict[str, Any]:
    """A raw config without other names of a key: of two that differ, one would win without a word.

    Args:
        raw_config: ``config.json`` as it stands.
        config: the transformers config of the whole.
        path: of the key that is set, as in ``text_config.num_local_experts``.
    """
    outer, _, key = path.rpartition(".")
    part = getattr(config, outer) if outer else config
    names = {alias for alias, target in part.attribute_map.items() if target == key} - {key}
    if not outer:
        return {name: value for name, value in raw_config.items() if name not in names}
    inside = {name: value for name, value in raw_config.get(outer, {}).items() if name not in names}
    return {**raw_config, outer: inside}
