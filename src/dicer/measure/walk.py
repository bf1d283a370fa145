"""The walk: a model's decoder layers one after the other, each with its weights and what its tokens did in it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dicer.measure.statistics import Need, Sums
from dicer.measure.stores.resident import LayerStore, Progress, Recording, axis_weights, silent
from dicer.model.units import Axis, UnitWeights, unit_weights


@dataclass(frozen=True)
class AxisVisit:
    """One sub-layer of a visited layer.

    Attributes:
        weights: its weights; views, where a unit owns one row of each.
        sums: what was asked for of its activations.
        gradient: dL/dW, float32, or None when it was not asked for.
    """

    weights: UnitWeights
    sums: Sums
    gradient: UnitWeights | None


@dataclass(frozen=True)
class LayerVisit:
    """One layer, alive while it is visited.

    Attributes:
        index: which decoder layer.
        axes: axis name -> sub-layer; one that the layer lacks is not there.
    """

    index: int
    axes: dict[str, AxisVisit]


def walk(
    store: LayerStore,
    layers: Collection[int],
    batches: Sequence[Tensor],
    *,
    axes: Collection[str] = ("mlp",),
    needs: Collection[Need] = (),
    gradient: bool = False,
    checkpointing: bool = False,
    progress: Progress = silent,
) -> Iterator[LayerVisit]:
    """Visit the chosen layers in order; one pass over the tokens serves all needs.

    The forward pass is layer-major, stops after the last chosen layer and computes no logits; where nothing is asked of
    the activations it does not run at all.

    Args:
        store: where the layers come from.
        layers: which to visit.
        batches: calibration tokens, int64 [B, T] each; may be empty when nothing is asked for.
        axes: which sub-layers of theirs.
        needs: sums over activations.
        gradient: also dL/dW, by one forward and backward pass of the whole model.
        checkpointing: with ``gradient``, trade a second forward pass for memory.
        progress: called with (stage, done, total).
    """
    chosen, last = set(layers), max(layers)
    gradients: dict[int, dict[str, UnitWeights]] = {}
    if gradient:
        gradients = store.gradients(batches, sorted(chosen), axes, checkpointing=checkpointing, progress=progress)
    recording = store.record(batches) if needs else Recording()
    for index in range(last + 1):
        if index not in chosen and not needs:
            continue
        with store.layer(index) as layer:
            found = {n: axis for n, axis in store.axes(index).items() if n in axes and index in chosen}
            sums = {n: Sums([need for need in needs if need.axis == n], axis.channels) for n, axis in found.items()}
            with torch.no_grad(), ExitStack() as stack:
                for name, axis in found.items():
                    stack.enter_context(_listening(layer, axis, sums[name]))
                for number, hidden in enumerate(recording.hidden):
                    args, kwargs = recording.arguments[hidden.shape[0]][index]
                    recording.hidden[number] = layer(hidden, *args, **kwargs)
            progress("calibration", index + 1, last + 1)
            if index in chosen:
                yield _visit(index, layer, found, sums, gradients.pop(index, {}))
            del sums  # a Gram matrix of the next layer must not meet this one


def _visit(
    index: int, layer: nn.Module, axes: dict[str, Axis], sums: dict[str, Sums], gradients: dict[str, UnitWeights]
) -> LayerVisit:
    visits = {}
    for name, axis in axes.items():
        weights = unit_weights(axis, {n: w.detach() for n, w in axis_weights(axis, layer).items()})
        sums[name].all_reduce(weights.units, weights.up.device)
        visits[name] = AxisVisit(weights, sums[name], gradients.get(name))
    return LayerVisit(index, visits)


@contextmanager
def _listening(layer: nn.Module, axis: Axis, sums: Sums) -> Iterator[None]:
    """Feed the sub-layer's activations to the sums while it runs; nothing is kept of them."""
    wanted = {need.activation for need in sums.needs}
    with ExitStack() as stack:

        def at_activation(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            for activation, values in (("pre", inputs[0]), ("post", output)):
                if activation in wanted:
                    sums.add(activation, values)

        def at_output(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            sums.count += inputs[0].shape[:-1].numel()
            if "mod" in wanted:
                sums.add("mod", inputs[0])

        if wanted:
            output = layer.get_submodule(axis.output)
            stack.callback(output.register_forward_pre_hook(at_output).remove)
        if wanted and axis.activation is not None:
            activation = layer.get_submodule(axis.activation)
            stack.callback(activation.register_forward_hook(at_activation).remove)
        yield
