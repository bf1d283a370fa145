"""A layer's tensors at other numbers of units: zeros for neurons and heads that are not there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from dicer.errors import ModelError
from dicer.model.shapes import LayerShape, layer_shapes
from dicer.model.source import ModelSource
from dicer.model.tensors import TensorInfo
from dicer.model.units import Axis, Slice

Read = Callable[[], Tensor]


@dataclass(frozen=True)
class Made:
    """A tensor that is read, or made, when it is asked for.

    Attributes:
        info: its shape and dtype.
        read: gives it.
    """

    info: TensorInfo
    read: Read

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.info.shape


def pad_units(tensor: Tensor, piece: Slice, count: int, target: int) -> Tensor:
    """Zeros behind the units of every segment.

    Args:
        tensor: ``count`` units along ``piece.dim``.
        piece: where the units lie in it.
        count: how many there are.
        target: how many there shall be.
    """
    rows = tensor.movedim(piece.dim, 0)  # [count * sum(blocks), ...]
    parts: list[Tensor] = []
    for block, segment in zip(piece.blocks, rows.split([count * block for block in piece.blocks]), strict=True):
        parts += [segment, segment.new_zeros(((target - count) * block, *segment.shape[1:]))]
    return torch.cat(parts).movedim(0, piece.dim)


class Layers:
    """A model's decoder layers, each with every tensor that any of them has.

    What a layer lacks because its sub-layer is gone is made: zeros, ones for a norm; the constant that is left of a
    sub-layer becomes its output projection's bias.

    Raises:
        ModelError: no layer has a unit of some axis left, so nobody can say what one would look like.
    """

    def __init__(self, source: ModelSource) -> None:
        self.source = source
        self.shapes: list[LayerShape] = layer_shapes(source.family, source.config)
        self.axes: Mapping[str, Axis] = source.family.axes
        infos = source.tensors.infos()
        self._names = {place: name for name in infos if (place := source.family.locate(name))}
        for name in self.axes:
            if not any(shape.units[name] for shape in self.shapes):
                raise ModelError(f"{source.name}: no layer has any {name} left, which no stock model can be.")

    @cached_property
    def names(self) -> dict[str, TensorInfo]:
        """Name inside a layer -> what one layer has there; constants of sub-layers that are gone count as biases."""
        constants = {f"{axis.modules[-1]}.bias": f"{axis.output}.bias" for axis in self.axes.values()}
        infos, found = self.source.tensors.infos(), dict[str, TensorInfo]()
        for (_, inner), name in sorted(self._names.items()):
            found.setdefault(constants.get(inner, inner), infos[name])
        return found

    def units(self, axis: str) -> list[int]:
        """How many units of an axis every layer has, 0 where the sub-layer is gone."""
        return [shape.units[axis] for shape in self.shapes]

    def padded(self, layer: int, targets: Mapping[str, int]) -> dict[str, Made]:
        """One layer's tensors by their name inside it, for at least as many units as the layer has."""
        return {inner: self._padded(layer, inner, info, targets) for inner, info in self.names.items()}

    def _padded(self, layer: int, inner: str, like: TensorInfo, targets: Mapping[str, int]) -> Made:
        name, cut = self._name(layer, inner), self._cut(inner)
        info, count, target = like, 0, 0
        if cut is not None:
            axis, piece = cut
            count, target = self.shapes[layer].units[axis.name], targets[axis.name]
            shape = list(like.shape)
            shape[piece.dim] = target * sum(piece.blocks)
            info = replace(like, shape=tuple(shape))
        if name is None:
            return Made(info, lambda: torch.full(info.shape, self._missing(inner), dtype=info.dtype))
        if cut is None or count == target:
            return Made(info, lambda: self._read(name))
        return Made(info, lambda: pad_units(self._read(name), cut[1], count, target))

    def _name(self, layer: int, inner: str) -> str | None:
        """The tensor on disk, or what is left of a sub-layer that is gone."""
        for axis in self.axes.values():
            if inner == f"{axis.output}.bias" and (left := self._names.get((layer, f"{axis.modules[-1]}.bias"))):
                return left
        return self._names.get((layer, inner))

    def _cut(self, inner: str) -> tuple[Axis, Slice] | None:
        found = ((axis, piece) for axis in self.axes.values() for piece in axis.slices)
        return next((pair for pair in found if pair[1].name == inner), None)

    def _read(self, name: str) -> Tensor:
        return self.source.tensors.read(name)

    def _missing(self, inner: str) -> float:
        """What a tensor that nothing depends on is filled with; Gemma adds one to its norms' weights."""
        is_norm = inner.endswith(".weight") and self._cut(inner) is None
        return float(is_norm and not self.source.family.model_type.startswith("gemma"))


def added_parameters(layers: Layers, targets: Sequence[Mapping[str, int]]) -> int:
    """How many parameters padding adds to what a model's layers have."""
    infos = layers.source.tensors.infos()
    have = sum(info.numel for name, info in infos.items() if layers.source.family.locate(name))
    return sum(made.info.numel for i, units in enumerate(targets) for made in layers.padded(i, units).values()) - have
