"""The walk: a model's sub-layers one after the other, each with its weights and what the tokens did in it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from dicer.measure.batches import counted_of
from dicer.measure.experts import Experts, listening
from dicer.measure.gram import joint
from dicer.measure.statistics import Need, Sums
from dicer.measure.stores.resident import axis_weights, weights_of
from dicer.measure.stores.store import LayerStore, Recording
from dicer.model.units import Axis, SubLayer, UnitWeights
from dicer.progress import Progress, silent


@dataclass(frozen=True)
class Visit:
    """One sub-layer, alive while it is visited.

    Attributes:
        place: which one.
        weights: its weights; views, where a unit owns one row of each.
        sums: what was asked for of its activations.
        gradient: dL/dW, float32, or None when it was not asked for.
    """

    place: SubLayer
    weights: UnitWeights
    sums: Sums
    gradient: UnitWeights | None

    @cached_property
    def rows(self) -> Tensor:
        """The output projection by its inputs, [U * C, d]."""
        return self.weights.down.T.reshape(self.weights.units * self.sums.channels, -1)

    @cached_property
    def joint(self) -> Tensor:
        """What each two of its inputs bring to the output together (:func:`dicer.measure.gram.joint`)."""
        return joint(self.sums.get("channel_gram", "mod"), self.rows)


class Along(Protocol):
    """What goes along with a walk, so that one that was stopped need not begin anew.

    Attributes:
        start: the first layer that is not finished.
    """

    start: int

    def states(self) -> Sequence[Tensor]:
        """The hidden states that go into it; asked for where it is not the first of all."""
        ...

    def finished(self, index: int, hidden: Sequence[Tensor]) -> None:
        """A layer's visits are over; the hidden states behind it."""
        ...


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
    along: Along | None = None,
) -> Iterator[Visit]:
    """Visit the sub-layers of the chosen layers in order; one pass over the tokens serves all needs.

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
        along: says where to begin, and is told of every layer that is done.
    """
    chosen, last = set(layers), max(layers)
    gradients: dict[int, dict[str, UnitWeights]] = {}
    if gradient:
        gradients = store.gradients(batches, sorted(chosen), axes, checkpointing=checkpointing, progress=progress)
    start = along.start if along is not None else 0
    recording = store.record(batches) if needs and start <= last else Recording()
    counted = counted_of(batches) if needs else ()
    if along is not None and needs and 0 < start <= last:
        for number, states in enumerate(along.states()):
            recording.hidden[number] = states.to(recording.hidden[number].device)
    for index in range(start, last + 1):
        if index not in chosen and not needs:
            continue
        with store.layer(index, then=index + 1 if needs and index < last else None) as layer:
            found = {n: axis for n, axis in store.axes(index).items() if n in axes and index in chosen}
            sums = {n: Sums([need for need in needs if need.axis == n], axis.channels) for n, axis in found.items()}
            with torch.no_grad(), ExitStack() as stack:
                for name, axis in found.items():
                    if not axis.routed:
                        stack.enter_context(listening_to(layer, axis, sums[name]))
                for routed in {axis.routed for axis in found.values() if axis.routed}:
                    own_axes = {name: axis for name, axis in found.items() if axis.routed == routed}
                    experts = Experts(layer.get_submodule(routed), routed)
                    stack.enter_context(listening(experts, own_axes, sums))
                for number, (hidden, counts) in enumerate(zip(recording.hidden, counted, strict=True)):
                    for own_sums in sums.values():
                        own_sums.begin(counts)
                    args, kwargs = recording.arguments_of(hidden)[index]
                    returned = layer(hidden, *args, **kwargs)
                    recording.hidden[number] = returned[0] if isinstance(returned, tuple) else returned
            progress("calibration", index + 1, last + 1)
            own = gradients.pop(index, {})
            for name, axis in found.items():
                yield _visit(SubLayer(index, name), layer, axis, sums.pop(name), own.get(name))
            del sums  # a Gram matrix of the next layer must not meet this one
            if along is not None:
                along.finished(index, recording.hidden)


def _visit(place: SubLayer, layer: nn.Module, axis: Axis, sums: Sums, gradient: UnitWeights | None) -> Visit:
    weights = weights_of(axis, layer, {name: weight.detach() for name, weight in axis_weights(axis, layer).items()})
    sums.all_reduce(weights.units, weights.up.device)
    return Visit(place, weights, sums, gradient)


@contextmanager
def listening_to(layer: nn.Module, axis: Axis, sums: Sums) -> Iterator[None]:
    """Feed the sub-layer's activations to the sums while it runs; nothing is kept of them."""
    wanted = {need.activation for need in sums.needs}
    with ExitStack() as stack:

        def at_activation(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            for activation, values in (("pre", inputs[0]), ("post", output)):
                if activation in wanted:
                    sums.add(activation, values)

        def at_output(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            sums.saw(inputs[0])
            # Where the activation is no module of its own, what goes into the output projection is all there is.
            for activation in wanted if axis.activation is None else wanted & {"mod"}:
                sums.add(activation, inputs[0])

        if wanted:
            output = layer.get_submodule(axis.output)
            stack.callback(output.register_forward_pre_hook(at_output).remove)
        if wanted and axis.activation is not None:
            activation = layer.get_submodule(axis.activation)
            stack.callback(activation.register_forward_hook(at_activation).remove)
        yield
