"""The cut itself: tensors by their names on disk are copied or sliced, and a new config says what they became."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dicer.axes import Slice
from dicer.checkpoint import TensorInfo, TensorSource
from dicer.errors import PlanError
from dicer.families import Family
from dicer.plan import LayerPlan, PrunePlan

MODELING_FILE = "modeling_pruned.py"


def slice_tensor(tensor: Tensor, piece: Slice, layer: LayerPlan) -> Tensor:
    """One tensor of a pruned layer.

    Args:
        tensor: as on disk, N units along ``piece.dim``.
        piece: where the units lie in it.
        layer: which units stay, and how others merge into them.

    Returns:
        The tensor with K units along ``piece.dim``: selected rows bit by bit, or the merge map applied in float32 and
        rounded once to the tensor's own dtype.
    """
    matrices = layer.merge_matrices()
    if matrices is None:
        return tensor.index_select(piece.dim, piece.rows(layer.keep, layer.units).to(tensor.device))
    matrix = matrices[1] if piece.is_output else matrices[0]  # [K, N]
    by_unit = tensor.movedim(piece.dim, 0).float()
    segments = by_unit.split(layer.units)  # blocks are 1 wherever units can be merged
    merged = [torch.sparse.mm(matrix, segment.reshape(layer.units, -1).cpu()) for segment in segments]
    shaped = torch.cat(merged).reshape(-1, *by_unit.shape[1:])
    return shaped.movedim(0, piece.dim).to(tensor.dtype)


@dataclass(frozen=True)
class Sizes:
    """Parameters and bytes, counted from the tensors that are really there.

    Attributes:
        parameters: all of them.
        mlp: those that belong to neurons (with their biases).
        nbytes: of all tensors.
    """

    parameters: int
    mlp: int
    nbytes: int


@dataclass(frozen=True)
class Cut:
    """What becomes of every tensor of a source: each is copied or sliced, none is forgotten.

    Attributes:
        infos: name -> shape and dtype after the cut, for all tensors, in the source's order.
        read: makes one tensor of the result.
        sliced: names of the tensors that are cut.
        before: name -> shape and dtype before.
        neurons: names of the tensors that MLP neurons own, in all layers.
    """

    infos: dict[str, TensorInfo]
    read: Callable[[str], Tensor]
    sliced: frozenset[str]
    before: Mapping[str, TensorInfo]
    neurons: frozenset[str]

    def sizes(self) -> tuple[Sizes, Sizes]:
        """What the model has and what it will have."""
        before, after = (
            Sizes(
                sum(info.numel for info in infos.values()),
                sum(infos[name].numel for name in self.neurons),
                sum(info.nbytes for info in infos.values()),
            )
            for infos in (self.before, self.infos)
        )
        return before, after


def plan_cut(source: TensorSource, family: Family, plan: PrunePlan) -> Cut:
    """Lay out the surgery without reading a weight.

    Raises:
        PlanError: the plan's layers or widths are not those of the tensors, or a tensor that must be cut is missing.
    """
    pieces = {piece.name: piece for piece in family.mlp.slices}
    before = source.infos()
    infos: dict[str, TensorInfo] = {}
    work: dict[str, tuple[Slice, LayerPlan]] = {}
    for name, info in before.items():
        place = family.locate(name)
        layer = plan.mlp.get(place[0]) if place else None
        piece = pieces.get(place[1]) if place else None
        if layer is None or piece is None:
            infos[name] = info
            continue
        if piece.units(info.shape) != layer.units:
            raise PlanError(
                f"the plan has {layer.units} neurons in layer {place[0] if place else '?'}, and tensor '{name}' has "
                f"{piece.units(info.shape)}."
            )
        shape = list(info.shape)
        shape[piece.dim] = len(layer.keep) * sum(piece.blocks)
        infos[name] = TensorInfo(tuple(shape), info.dtype)
        work[name] = (piece, layer)
    required = len(plan.mlp) * sum(not piece.optional for piece in family.mlp.slices)
    found = sum(not piece.optional for piece, _ in work.values())
    if found != required:
        raise PlanError(f"the plan cuts {required} weight matrices, and the model has {found} of them.")

    def read(name: str) -> Tensor:
        tensor = source.read(name)
        return slice_tensor(tensor, *work[name]) if name in work else tensor

    neurons = frozenset(name for name in before if (place := family.locate(name)) and place[1] in pieces)
    return Cut(infos, read, frozenset(work), before, neurons)


def pruned_config(raw_config: Mapping[str, Any], family: Family, widths: list[int]) -> dict[str, Any]:
    """``config.json`` of a model with the given MLP widths (DESIGN section 4).

    One width for all layers gives a stock config. Otherwise ``per_layer_config`` names the widths and ``auto_map`` the
    code that reads it; the global width is the largest.

    Args:
        raw_config: the source's ``config.json``, stock or already pruned.
        family: its row of the table.
        widths: neurons of each layer.
    """
    own = ("auto_map", "per_layer_config", "allow_global_per_layer_attribute_access", "_name_or_path")
    config = {key: value for key, value in raw_config.items() if key not in own}
    key, largest = family.mlp.width_keys[0], max(widths)
    config[key] = largest
    config["architectures"] = [family.causal_lm]
    config["model_type"] = family.model_type
    if len(set(widths)) == 1:
        return config
    module = MODELING_FILE.removesuffix(".py")
    config.update(
        model_type=family.pruned_type,
        architectures=[family.pruned_classes["AutoModelForCausalLM"]],
        auto_map={auto: f"{module}.{name}" for auto, name in family.pruned_classes.items()},
        per_layer_config={f"{i:03d}": {key: width} for i, width in enumerate(widths) if width != largest},
        allow_global_per_layer_attribute_access=True,
    )
    return config


def pruned_widths(config: Any, family: Family, plan: PrunePlan) -> list[int]:
    """Neurons of every layer after the plan."""
    return [len(plan.mlp[i].keep) if i in plan.mlp else width for i, width in enumerate(family.widths(config))]
