"""The model that a plan decided on, made without cutting: the dense one in which what goes is zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dicer.decide.plan import LayerPlan, PrunePlan
from dicer.model.source import ModelSource
from dicer.model.units import Axis, Slice
from dicer.write.surgery import compensation, slice_tensor


class _Passed(nn.Module):
    """A decoder layer that is not there."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """What came in."""
        return hidden_states


def masked_model(source: ModelSource, plan: PrunePlan) -> Any:
    """The dense model in float32, every tensor at its full size, computing what the pruned one should.

    Args:
        source: the model that the plan was made for.
        plan: what stays.
    """
    model: Any = source.load_model("float32")
    axes, state = source.family.axes, dict(model.named_parameters())
    with torch.no_grad():
        for name in source.tensors.infos():
            place = source.family.locate(name)
            found = place and _piece(axes, plan, *place)
            if place and found:
                parameter = state[source.family.tensor_name(*place)]
                parameter.copy_(_masked(source.tensors.read(name), *found))
        for axis, layers in plan.axes.items():
            for index, layer in layers.items():
                if layer.means is not None:
                    _add_bias(source, model, axes[axis], index, layer)
    layers = model.get_submodule(source.family.layers)
    for index in plan.blocks:
        layers[index] = _Passed()
    return model


def _piece(axes: Mapping[str, Axis], plan: PrunePlan, index: int, inner: str) -> tuple[Slice, LayerPlan] | None:
    """Where the units of a cut sub-layer lie in one of its tensors."""
    for name, axis in axes.items():
        layer = plan.axes.get(name, {}).get(index)
        for piece in axis.slices if layer is not None else ():
            if piece.name == inner:
                return piece, layer  # type: ignore[return-value]
    return None


def _masked(tensor: Tensor, piece: Slice, layer: LayerPlan) -> Tensor:
    """A tensor with what stays (merged, where others live on in it) at its old place, and zeros elsewhere."""
    whole = torch.zeros_like(tensor)
    if len(layer.keep):
        whole.index_copy_(piece.dim, piece.rows(layer.keep, layer.units), slice_tensor(tensor, piece, layer))
    return whole


def _add_bias(source: ModelSource, model: Any, axis: Axis, index: int, layer: LayerPlan) -> None:
    """What compensates for the cut, added to the output projection's bias; of a sub-layer that is gone, it is all."""
    module = model.get_submodule(source.family.tensor_name(index, axis.output))
    names = {place: name for name in source.tensors.infos() if (place := source.family.locate(name))}
    weight = source.tensors.read(names[index, axis.output_slice.name])
    own = names.get((index, f"{axis.output}.bias"))
    lost = compensation(weight, axis.output_slice, layer)
    bias = lost if own is None else lost + source.tensors.read(own).float()
    module.bias = nn.Parameter(bias.to(weight.dtype).float())
