"""The cut itself: tensors by their names on disk are copied, sliced or dropped, and a config says what they became."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dicer.decide.plan import LayerPlan, PrunePlan
from dicer.errors import PlanError
from dicer.model.families import Family
from dicer.model.shapes import LayerShape, layer_shapes
from dicer.model.sizes import Sizes, count_sizes
from dicer.model.source import ModelSource
from dicer.model.structure.idle import idle_tensors
from dicer.model.tensors import SafetensorsSource, Selection, Stretch, TensorInfo
from dicer.model.units import Axis, Slice
from dicer.write.config import pruned_config, zero_biases
from dicer.write.experts import ExpertCut, expert_cuts

Read = Callable[[], Tensor]


def slice_tensor(tensor: Tensor, piece: Slice, layer: LayerPlan) -> Tensor:
    """One tensor of a pruned layer.

    Args:
        tensor: as on disk, N units along ``piece.dim``.
        piece: where the units lie in it.
        layer: which units stay, and how others merge into them.

    Returns:
        The tensor with K units along ``piece.dim``: selected rows bit by bit, or the merge map applied in float32 (or
        what was solved anew or has learned), rounded once to the tensor's own dtype.
    """
    if piece.is_output and layer.repair is not None:
        return layer.repair.weight.movedim(1, piece.dim).to(tensor.dtype)
    learned = None if layer.repair is None else layer.repair.learned.get(piece.name)
    made = _selected_or_merged(tensor, piece, layer)
    return (made if learned is None else made.float() + learned).to(tensor.dtype)


def _selected_or_merged(tensor: Tensor, piece: Slice, layer: LayerPlan) -> Tensor:
    """As it is, or in float32 where it is merged."""
    matrices = layer.merge_matrices()
    if matrices is None:
        return tensor.index_select(piece.dim, piece.rows(layer.keep, layer.units).to(tensor.device))
    matrix = matrices[1] if piece.is_output else matrices[0]  # [K, N]
    by_unit = tensor.movedim(piece.dim, 0).float()
    turns = len(piece.blocks)  # which are 1 wherever units can be merged
    segments = [by_unit[i::turns] for i in range(turns)] if piece.interleaved else by_unit.split(layer.units)
    merged = [torch.sparse.mm(matrix, segment.reshape(layer.units, -1).cpu()) for segment in segments]
    joined = torch.stack(merged, 1) if piece.interleaved else torch.cat(merged)
    shaped = joined.reshape(-1, *by_unit.shape[1:])
    return shaped.movedim(0, piece.dim)


@dataclass(frozen=True)
class _Sliced:
    """How one tensor of a pruned layer is made."""

    source: ModelSource
    name: str
    piece: Slice
    layer: LayerPlan

    def __call__(self) -> Tensor:
        return slice_tensor(self.source.tensors.read(self.name), self.piece, self.layer)

    def written(self) -> Tensor | Selection:
        """The same to be written: where rows are selected, which."""
        repair = self.layer.repair
        if self.layer.merge is not None or (repair is not None and repair.touches(self.piece)):
            return self()
        rows = self.piece.rows(self.layer.keep, self.layer.units)
        return Selection(self.source.tensors.read(self.name), self.piece.dim, rows)


def compensation(weight: Tensor, piece: Slice, layer: LayerPlan) -> Tensor:
    """What is added to the output projection's bias, float32 [d] (:meth:`.LayerPlan.lost`).

    Args:
        weight: the output projection as on disk.
        piece: where the units lie in it.
        layer: which units stay, and the mean activations.
    """
    return layer.lost(weight.movedim(piece.dim, 0))


@dataclass(frozen=True)
class Cut:
    """What becomes of every tensor of a source: each is copied, sliced or dropped, none is forgotten.

    Attributes:
        config: ``config.json`` of the result.
        infos: name -> shape and dtype after the cut, for all tensors, in the source's order.
        made: name -> how it is made, for tensors that are not what the source has under ``origin``.
        origin: name -> the source's name, for tensors that are copied.
        before: name -> shape and dtype before.
        source: the model.
    """

    config: dict[str, Any]
    infos: dict[str, TensorInfo]
    made: dict[str, Read]
    origin: dict[str, str]
    before: Mapping[str, TensorInfo]
    source: ModelSource

    def read(self, name: str) -> Tensor:
        """One tensor of the result."""
        return self.made[name]() if name in self.made else self.source.tensors.read(self.origin[name])

    def written(self, name: str) -> Tensor | Selection | Stretch:
        """The same to be written: of what a file has only which rows of it, or where its bytes are."""
        tensors, made = self.source.tensors, self.made.get(name)
        if not isinstance(tensors, SafetensorsSource) or not (made is None or isinstance(made, _Sliced)):
            return self.read(name)
        return tensors.stretch(self.origin[name]) if made is None else made.written()

    def sizes(self) -> tuple[Sizes, Sizes]:
        """What the model has and what it will have."""
        return count_sizes(self.source.family, self.before), count_sizes(self.source.family, self.infos)


def plan_cut(source: ModelSource, plan: PrunePlan, *, stock: bool = True) -> Cut:
    """Lay out the surgery without reading a weight; ``stock``: to the stock class where that can be it.

    Raises:
        PlanError: the plan's layers or widths are not those of the model.
    """
    family, before = source.family, source.tensors.infos()
    shapes = layer_shapes(family, source.config)
    axes = family.axes
    places = _places(family, before)
    _check(plan, shapes, axes, {place: before[name].shape for place, name in places.items()})
    kept = [i for i in range(len(shapes)) if i not in plan.blocks]
    after = [_shape_after(plan, i, shapes[i], _native_biases(axes, shapes[i], places, i)) for i in kept]
    cut = Cut({}, {}, {}, {}, before, source)
    number = {old: new for new, old in enumerate(kept)}
    of_experts = expert_cuts(axes, plan)
    for name, info in before.items():
        place = family.locate(name)
        if place is None:
            cut.infos[name], cut.origin[name] = info, name
        elif place[0] in number and (own := of_experts(*place)) is not None:
            _of_experts(cut, own, name, number[place[0]])
        elif place[0] in number:
            _inside(cut, axes, plan, name, number[place[0]])
    for name in _idle(cut, after, number):
        del cut.infos[name], cut.origin[name]
    for old, new in number.items():
        for axis in axes:
            layer = plan.axes.get(axis, {}).get(old)
            if axis in after[new].output_bias and layer is not None and layer.means is not None:
                weight = places[old, axes[axis].output_slice.name]
                _output_bias(cut, axes[axis], layer, weight, new)
    cut.config.update(pruned_config(source, cut.infos, after, kept, stock=stock))
    if "auto_map" not in cut.config:
        for name, info in zero_biases(source, cut.infos, after).items():
            cut.infos[name] = info
            cut.made[name] = lambda info=info: torch.zeros(info.shape, dtype=info.dtype)  # type: ignore[misc]
    return cut


def _check(
    plan: PrunePlan,
    shapes: list[LayerShape],
    axes: Mapping[str, Axis],
    before: Mapping[tuple[int, str], tuple[int, ...]],
) -> None:
    for axis, layers in plan.axes.items():
        for index, layer in layers.items():
            found = shapes[index].units[axis] if index < len(shapes) else 0
            if found != layer.units:
                raise PlanError(f"the plan has {layer.units} units of {axis} in layer {index}, the model has {found}.")
            channels = found * axes[axis].channels
            if layer.repair is not None and layer.repair.weight.shape[1] * found != len(layer.keep) * channels:
                raise PlanError(f"the plan's repaired output projection of {axis} in layer {index} is not the model's.")
            for name, tensor in ({} if layer.repair is None else layer.repair.learned).items():
                piece = next((one for one in axes[axis].slices if one.name == name and not one.is_output), None)
                shape = before.get((index, name))
                if piece is None or shape is None or tensor.shape != _cut_shape(shape, piece, layer):
                    raise PlanError(f"the plan's learned '{name:.60}' in layer {index} is not the model's.")
            if layer.means is not None and len(layer.means) != channels:
                raise PlanError(
                    f"the plan has means of {len(layer.means)} channels for {axis} in layer {index}, the model has "
                    f"{channels}."
                )
    if len(plan.blocks) == len(shapes):
        raise PlanError(f"the plan removes all {len(shapes)} layers, and one has to stay.")
    if any(index >= len(shapes) for index in plan.blocks):
        raise PlanError(f"the plan removes layer {max(plan.blocks)}, and the model has {len(shapes)} layers.")


def _cut_shape(shape: tuple[int, ...], piece: Slice, layer: LayerPlan) -> tuple[int, ...]:
    return (*shape[: piece.dim], len(layer.keep) * sum(piece.blocks), *shape[piece.dim + 1 :])


def _native_biases(
    axes: Mapping[str, Axis], shape: LayerShape, places: Mapping[tuple[int, str], str], layer: int
) -> set[str]:
    """The axes whose output projection has a bias from the stock class itself."""
    found = {axis.name for axis in axes.values() if (layer, axis.output_bias) in places and shape.units[axis.name]}
    return found - shape.output_bias


def _shape_after(plan: PrunePlan, index: int, shape: LayerShape, native: set[str]) -> LayerShape:
    units, biased = dict(shape.units), set(shape.output_bias)
    for axis, layers in plan.axes.items():
        if (layer := layers.get(index)) is None:
            continue
        units[axis] = len(layer.keep)
        if not units[axis]:
            biased.discard(axis)
        if layer.means is not None and not (axis in native and units[axis]):
            biased.add(axis)
    return LayerShape(units, frozenset(biased))


def _inside(cut: Cut, axes: Mapping[str, Axis], plan: PrunePlan, name: str, new: int) -> None:
    """Copy, slice or drop one tensor of a decoder layer that stays."""
    family, info = cut.source.family, cut.before[name]
    index, inner = family.locate(name) or (0, "")
    target = family.renumbered(name, new)
    planned = [axes[axis] for axis, layers in plan.axes.items() if index in layers]
    own = [axis for axis in planned if any(piece.name == inner for piece in axis.slices)]
    axis = next(iter([*own, *(axis for axis in planned if axis.owns(inner))]), None)
    layer = plan.axes[axis.name][index] if axis else None
    piece = next((piece for piece in axis.slices if piece.name == inner), None) if axis else None
    if layer is not None and not len(layer.keep):
        return
    cut.infos[target], cut.origin[target] = info, name
    if axis is None or layer is None:
        return
    if piece is not None:
        cut.infos[target] = TensorInfo(_cut_shape(info.shape, piece, layer), info.dtype)
        cut.made[target] = _Sliced(cut.source, name, piece, layer)
    elif inner == axis.output_bias and layer.means is not None:
        cut.made[target] = lambda: _biased(cut.source, axis, layer, name)


def _idle(cut: Cut, after: list[LayerShape], number: Mapping[int, int]) -> list[str]:
    """What will be tensors of norms that nothing comes of."""
    family, gone = cut.source.family, dict[int, dict[str, bool]]()
    for old, new in number.items():
        for axis, counts in family.counts.items():
            if counts[old] and not after[new].units[axis]:
                gone.setdefault(old, {})[axis] = axis in after[new].output_bias
    inside = {name: origin for name, origin in cut.origin.items() if (p := family.locate(origin)) and p[0] in gone}
    idle = {*idle_tensors(family, cut.source.config, [*inside.values()], gone)} if gone else set()
    return [name for name, origin in inside.items() if origin in idle]


def _of_experts(cut: Cut, own: ExpertCut, name: str, new: int) -> None:
    """Drop, rename or cut one tensor of experts in a decoder layer that stays."""
    family, info = cut.source.family, cut.before[name]
    if own.name is None:
        return
    index, _ = family.locate(name) or (0, "")
    target = family.renumbered(family.tensor_name(index, own.name), new)
    cut.infos[target] = TensorInfo(own.shape(info.shape), info.dtype)
    if not own.inside and own.whole is None:
        cut.origin[target] = name
        return
    cut.made[target] = lambda: own.apply(cut.source.tensors.read(name), slice_tensor)


def _biased(source: ModelSource, axis: Axis, layer: LayerPlan, bias_name: str) -> Tensor:
    """An output projection's own bias with what the cut takes from the output's mean."""
    own = source.tensors.read(bias_name)
    weight = source.tensors.read(bias_name.removesuffix("bias") + "weight")
    return (own.float().cpu() + compensation(weight, axis.output_slice, layer)).to(own.dtype)


def _output_bias(cut: Cut, axis: Axis, layer: LayerPlan, weight_name: str, new: int) -> None:
    """A bias that the stock class does not have, unless it was copied or added to already."""
    source, piece = cut.source, axis.output_slice
    bias_name = weight_name.removesuffix("weight") + "bias"
    name = source.family.renumbered(bias_name, new)
    if not len(layer.keep):
        name = f"{name.removesuffix(axis.output_bias)}{axis.modules[-1]}.bias"
    if name in cut.infos:
        return
    info = cut.before[weight_name]
    cut.infos[name] = TensorInfo((info.shape[1 - piece.dim],), info.dtype)

    def make() -> Tensor:
        if bias_name in cut.before:
            return _biased(source, axis, layer, bias_name)
        return compensation(source.tensors.read(weight_name), piece, layer).to(info.dtype)

    cut.made[name] = make


def _places(family: Family, names: Iterable[str]) -> dict[tuple[int, str], str]:
    """(layer, name inside it) -> name on disk, which older checkpoints write without the outermost prefix."""
    return {place: name for name in names if (place := family.locate(name))}
