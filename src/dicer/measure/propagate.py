"""The walk in which every sub-layer sees what the cuts before it have done, and may be looked at again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, MutableSequence, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dicer.ask.axes import kind_name
from dicer.errors import RecipeError
from dicer.measure.batches import counted_of
from dicer.measure.statistics import Need, Sums
from dicer.measure.stores.resident import axis_weights
from dicer.measure.stores.store import LayerStore, Recording
from dicer.measure.walk import Visit, listening_to
from dicer.model.units import Axis, SubLayer, UnitWeights, unit_weights
from dicer.processes import from_first
from dicer.progress import Progress, silent


@dataclass(frozen=True)
class Evidence:
    """What the tokens did in a sub-layer.

    Attributes:
        sums: over all tokens.
        held: of these, over the tokens that were held out.
    """

    sums: Sums
    held: Sums


@dataclass(frozen=True)
class CutVisit(Visit):
    """One sub-layer that is to be cut before the tokens go on.

    Attributes:
        axis: where its units lie.
        tensors: name inside the layer, in memory -> its parameters, as they are.
        evidence: the sums, with what the output lacks where the dense model's is the target.
        again: tensors in place of its own -> the evidence with them: what the output lacks of the target counts too.
    """

    axis: Axis
    tensors: Mapping[str, Tensor]
    evidence: Evidence
    again: Callable[[Mapping[str, Tensor]], Evidence]


Cut = Callable[[CutVisit], Mapping[str, Tensor]]  # -> name inside the layer -> what it is from here on, of full size


@dataclass(frozen=True)
class Tokens:
    """What goes through the layers.

    Attributes:
        batches: int64 [B, T] each.
        held: how many of them, the last ones, are held out.
    """

    batches: Sequence[Tensor]
    held: int = 0


def propagate(
    store: LayerStore,
    layers: Collection[int],
    tokens: Tokens,
    cut: Cut,
    *,
    axes: Collection[str],
    needs: Collection[Need],
    pruned: bool = True,
    dense: bool = False,
    gradients: Mapping[int, dict[str, UnitWeights]] | None = None,
    progress: Progress = silent,
) -> None:
    """Visit the sub-layers in order, and let the tokens go on through what each was cut to.

    A cut is computed at full size, with zeros where columns go: the same function as the pruned model's. The layers
    are given back as they were.

    Args:
        store: where the layers come from.
        layers: which to visit.
        tokens: what goes through them.
        cut: what becomes of a sub-layer.
        axes: which sub-layers.
        needs: sums over activations.
        pruned: let the tokens go on through the cut sub-layers; else through the dense ones.
        dense: also walk the dense model's own hidden states, and say what each output lacks of the dense one.
        gradients: layer -> axis -> dL/dW, for criteria that read it.
        progress: called with (stage, done, total).

    Raises:
        RecipeError: hidden states that are not finite, or a family in which outputs do not simply add up.
    """
    chosen, last = sorted(set(layers)), max(layers)
    if from_first(chosen) != chosen:
        raise RecipeError("the processes do not prune the same layers, so none knows what the others' cuts have done.")
    recording = store.record(tokens.batches)
    beside: MutableSequence[Tensor] | None = None
    for index in range(last + 1):
        if dense and index == chosen[0]:  # before it both are the same
            beside = copy(recording.hidden)
        following = index + 1 if index < last else None
        with store.layer(index, then=following) as layer, torch.no_grad(), _swapping(layer) as swap:
            walked = _Layer(layer, index, recording, tokens, beside)
            found = {n: axis for n, axis in store.axes(index).items() if n in axes and index in chosen}
            if beside is not None:
                walked.run_dense(found)
                if index == chosen[0]:
                    walked.check_adds(store.axes(index), swap)
            for name, axis in found.items():
                own = (gradients or {}).get(index, {}).get(name)
                visit = walked.visit(SubLayer(index, name), axis, [n for n in needs if n.axis == name], own, swap)
                tensors = cut(visit)
                del visit  # with its Gram matrices
                if pruned:
                    swap(tensors)
            if index < last:
                walked.run_on()
        progress("calibration", index + 1, last + 1)


class _Reached(Exception):  # noqa: N818 - no error: what was wanted is there
    """The output projection has its input, and what comes behind it is not needed."""


@dataclass
class _Layer:
    """One layer while the tokens are in it.

    Attributes:
        beside: the dense model's hidden states before this layer; None where nobody asks.
        outputs: the dense model's hidden states behind it.
        inputs: axis -> the dense model's inputs of the output projection, where outputs are not compared instead.
    """

    layer: nn.Module
    index: int
    recording: Recording
    tokens: Tokens
    beside: MutableSequence[Tensor] | None
    outputs: list[Tensor] = field(default_factory=list)
    inputs: dict[str, list[Tensor]] = field(default_factory=dict)

    def visit(
        self,
        place: SubLayer,
        axis: Axis,
        needs: Sequence[Need],
        gradient: UnitWeights | None,
        swap: Callable[[Mapping[str, Tensor]], None],
    ) -> CutVisit:
        tensors: dict[str, Tensor] = {name: weight.detach() for name, weight in axis_weights(axis, self.layer).items()}
        weights = unit_weights(axis, tensors)
        own = {name: weight.detach() for name, weight in self.layer.named_parameters()}

        def again(changed: Mapping[str, Tensor]) -> Evidence:
            before = {name: own[name] for name in changed}
            return self._evidence(axis, needs, weights, lambda new: swap(changed if new else before))

        evidence = self._evidence(axis, needs, weights)
        return CutVisit(place, weights, evidence.sums, gradient, axis, own, evidence, again)

    def _evidence(
        self,
        axis: Axis,
        needs: Sequence[Need],
        weights: UnitWeights,
        swap: Callable[[bool], None] | None = None,
    ) -> Evidence:
        """Sums over all batches; with ``swap`` of the changed sub-layer, and what its output lacks."""
        total, held = Sums(needs, axis.channels), Sums([n for n in needs if "channel" in n.kind], axis.channels)
        counted = counted_of(self.tokens.batches)
        first_held = len(counted) - self.tokens.held
        rows = output_rows(axis, self.layer)
        for number, counts in enumerate(counted):
            sums = [total, held] if number >= first_held else [total]
            for one in sums:
                one.begin(counts)
            values, missing = self._looked_at(number, axis, sums if swap is None else [])
            if swap is not None:
                swap(True)
                changed, _ = self._looked_at(number, axis, sums, stop=True)
                new = output_rows(axis, self.layer)
                swap(False)
                lacks = values.float() @ rows.float() - changed.float() @ new.float()
                values, missing = changed, lacks if missing is None else lacks + missing
            if missing is not None:
                for one in sums:
                    one.add_missing(values, missing)
        for one in (total, held):
            one.all_reduce(weights.units, weights.up.device)
            if self.beside is not None or swap is not None:
                one.all_reduce_missing(weights.units, rows.shape[1], rows.device)
        return Evidence(total, held)

    def _looked_at(
        self, number: int, axis: Axis, sums: Sequence[Sums], *, stop: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """(input of the output projection of one batch, what its output lacks of the dense one, if that counts)."""
        hidden = self.recording.hidden[number]
        whole = self.beside is not None and axis.name not in self.inputs and not stop
        with ExitStack() as stack:
            for one in sums:
                stack.enter_context(listening_to(self.layer, axis, one))
            values, output = self._run(hidden, axis, whole=whole)
        if self.beside is None or stop:
            return values, None
        if output is not None:
            return values, self.outputs[number].float() - output.float()
        rest = (self.inputs[axis.name][number].float() - values.float()) @ output_rows(axis, self.layer).float()
        return values, rest + self.beside[number].float() - hidden.float()

    def _run(self, hidden: Tensor, axis: Axis, *, whole: bool) -> tuple[Tensor, Tensor | None]:
        """(input of an output projection, the layer's output if the whole layer is run)."""
        seen: list[Tensor] = []

        def at_output(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen.append(inputs[0])
            if not whole:
                raise _Reached

        handle = self.layer.get_submodule(axis.output).register_forward_pre_hook(at_output)
        try:
            output = self._through(hidden)
        except _Reached:
            return seen[0], None
        else:
            return seen[0], output
        finally:
            handle.remove()

    def _through(self, hidden: Tensor) -> Tensor:
        args, kwargs = self.recording.arguments_of(hidden)[self.index]
        output: Tensor = self.layer(hidden, *args, **kwargs)
        return output

    def run_dense(self, axes: Mapping[str, Axis]) -> None:
        """Let the dense model's hidden states through, and keep what the cut ones will be held against."""
        for hidden in self.beside or ():
            for name, axis in axes.items():
                if kind_name(name) != "mlp":  # whose output is the layer's
                    self.inputs.setdefault(name, []).append(self._run(hidden, axis, whole=False)[0])
            self.outputs.append(self._through(hidden))

    def check_adds(self, axes: Mapping[str, Axis], swap: Callable[[Mapping[str, Tensor]], None]) -> None:
        """See to it that the output projection's output joins the hidden states as it is: no norm comes between.

        Raises:
            RecipeError: it does not, so that what the output lacks is no sum.
        """
        axis = next((one for name, one in axes.items() if kind_name(name) == "mlp" and not one.routed), None)
        if not self.beside or axis is None:
            return
        piece = axis.output_slice
        name = piece.memory or piece.name
        weight = self.layer.get_parameter(name).detach()
        values, output = self._run(self.beside[0], axis, whole=True)
        swap({name: torch.zeros_like(weight)})
        without = self._through(self.beside[0])
        swap({name: weight})
        added = values.float() @ weight.movedim(piece.dim, 0).float()
        found = (without if output is None else output).float() - without.float()
        if (found - added).norm() > 0.1 * added.norm():
            raise RecipeError(
                "--target dense needs outputs that join the hidden states as they are, and this model has a norm or a "
                "factor between: leave it out."
            )

    def run_on(self) -> None:
        """Let the tokens through the layer as it is now."""
        for number, hidden in enumerate(self.recording.hidden):
            self.recording.hidden[number] = output = self._through(hidden)
            if not output.isfinite().all():
                raise RecipeError(
                    f"the hidden states behind layer {self.index} are not finite on this text (batch {number + 1}), "
                    "with what was cut so far: try --dtype float32."
                )
        if self.beside is not None:
            self.beside[:] = self.outputs


def output_rows(axis: Axis, layer: nn.Module) -> Tensor:
    """The output projection by its inputs, [U * C, d]."""
    piece = axis.output_slice
    return layer.get_parameter(piece.memory or piece.name).detach().movedim(piece.dim, 0)


@contextmanager
def _swapping(layer: nn.Module) -> Iterator[Callable[[Mapping[str, Tensor]], None]]:
    """A function that puts tensors into a layer; afterwards it is as it was.

    A bias that the layer does not have is added to the module's output.
    """
    before: dict[str, Tensor] = {}
    with ExitStack() as stack:

        def swap(tensors: Mapping[str, Tensor]) -> None:
            parameters = dict(layer.named_parameters())
            for name, tensor in tensors.items():
                if name in parameters:
                    own = parameters[name]
                    before.setdefault(name, own.data)
                    own.data = tensor.to(own.device, own.dtype)
                    continue
                module = layer.get_submodule(name.rpartition(".")[0])
                bias = tensor.to(next(layer.parameters()).device, next(layer.parameters()).dtype)
                handle = module.register_forward_hook(lambda _m, _i, output, bias=bias: output + bias)
                stack.callback(handle.remove)

        try:
            yield swap
        finally:
            for name, parameter in layer.named_parameters():
                if name in before:
                    parameter.data = before[name]
