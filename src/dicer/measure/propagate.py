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
from dicer.measure.runner import Runner, output_rows, swapping
from dicer.measure.statistics import Need, Sums
from dicer.measure.stores.resident import axis_weights
from dicer.measure.stores.store import LayerStore
from dicer.measure.walk import Along, Visit, listening_to
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


_PROBE = 4  # tokens
HALFWAY = 2**28  # numbers: inputs of an output projection that are kept, so that layers are run but once
Cut = Callable[[CutVisit], Mapping[str, Tensor]]  # -> name inside the layer -> what it is from here on, of full size


@dataclass(frozen=True)
class Tokens:
    """What goes through the layers.

    Attributes:
        batches: int64 [B, T] each.
        held: how many of them, the last ones, are held out.
        single: whether Gram matrices of them are wanted in single precision.
    """

    batches: Sequence[Tensor]
    held: int = 0
    single: bool = False


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
    along: Along | None = None,
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
        along: says where to begin, and is told of every layer that is done.

    Raises:
        RecipeError: hidden states that are not finite, or a family in which outputs do not simply add up.
    """
    chosen, last = sorted(set(layers)), max(layers)
    if from_first(chosen) != chosen:
        raise RecipeError("the processes do not prune the same layers, so none knows what the others' cuts have done.")
    start = along.start if along is not None else 0
    if start > last:
        return
    recording = store.record([*tokens.batches, *(batch[:1, :_PROBE] for batch in tokens.batches[:1])])
    probe = recording.hidden.pop() if tokens.batches else None  # uncut all the way: only of what form layers are counts
    beside: MutableSequence[Tensor] | None = None
    if along is not None and probe is not None and start:
        *states, probe = [state.to(probe.device) for state in along.states()]
        beside = copy(recording.hidden) if dense and start > chosen[0] else None
        recording.hidden[:] = states[: len(recording.hidden)]
        if beside is not None:
            beside[:] = states[len(recording.hidden) :]
    for index in range(start, last + 1):
        if dense and index == chosen[0]:  # before it both are the same
            beside = copy(recording.hidden)
        following = index + 1 if index < last else None
        with store.layer(index, then=following) as layer, torch.no_grad(), swapping(layer) as swap:
            runner = Runner(layer, index, recording)
            before, probe = probe, None if probe is None else runner.whole(probe)
            walked = _Layer(runner, tokens, beside, None if before is None or probe is None else (before, probe))
            found = {n: axis for n, axis in store.axes(index).items() if n in axes and index in chosen}
            if beside is not None:
                walked.run_dense(found)
                if index == chosen[0]:
                    walked.check_adds(store.axes(index))
            for name, axis in found.items():
                own = (gradients or {}).get(index, {}).get(name)
                visit = walked.visit(SubLayer(index, name), axis, [n for n in needs if n.axis == name], own, swap)
                tensors = cut(visit)
                del visit  # with its Gram matrices
                if pruned:
                    walked.swapped(tensors, swap)
            if index < last:
                walked.run_on()
        progress("calibration", index + 1, last + 1)
        if along is not None and probe is not None:
            along.finished(index, [*recording.hidden, *(beside or ()), probe])


@dataclass
class _Layer:
    """One layer while the tokens are in it.

    Attributes:
        beside: the dense model's hidden states before this layer; None where nobody asks.
        probe: a few tokens' hidden states before and behind the uncut layer; None where there are no tokens.
        outputs: the dense model's hidden states behind it.
        inputs: axis -> the dense model's inputs of the output projection, where outputs are not compared instead.
        halfway: (input of the MLP's output projection, the layer's output without it) of each batch, where the layer
            can go on from there.
        behind: the axis that it goes on from.
    """

    runner: Runner
    tokens: Tokens
    beside: MutableSequence[Tensor] | None
    probe: tuple[Tensor, Tensor] | None
    outputs: list[Tensor] = field(default_factory=list)
    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    halfway: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    behind: Axis | None = None

    @property
    def layer(self) -> nn.Module:
        return self.runner.layer

    @property
    def hidden(self) -> MutableSequence[Tensor]:
        return self.runner.recording.hidden

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

        self._go_halfway(axis, weights.units)
        evidence = self._evidence(axis, needs, weights)
        return CutVisit(place, weights, evidence.sums, gradient, axis, own, evidence, again)

    def _go_halfway(self, axis: Axis, units: int) -> None:
        """Note that the layer is to be run up to here once, where it can go on from here and there is room for it."""
        self.halfway, self.behind = [], None
        room = sum(batch.numel() for batch in self.tokens.batches) * units * axis.channels <= HALFWAY
        if self.probe is not None and room and kind_name(axis.name) == "mlp" and self.runner.goes_on(*self.probe, axis):
            self.behind = axis

    def swapped(self, tensors: Mapping[str, Tensor], swap: Callable[[Mapping[str, Tensor]], None]) -> None:
        """Put what a sub-layer was cut to into the layer."""
        swap(tensors)
        if self.behind is None or any(name.rpartition(".")[0] != self.behind.output for name in tensors):
            self.halfway, self.behind = [], None  # its inputs are others now

    def _evidence(
        self,
        axis: Axis,
        needs: Sequence[Need],
        weights: UnitWeights,
        swap: Callable[[bool], None] | None = None,
    ) -> Evidence:
        """Sums over all batches; with ``swap`` of the changed sub-layer, and what its output lacks."""
        total = Sums(needs, axis.channels, single=self.tokens.single)
        held = Sums([n for n in needs if "channel" in n.kind], axis.channels)
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
                changed = self._heard(number, axis, sums)
                new = output_rows(axis, self.layer)
                swap(False)
                lacks = values.float() @ rows.float() - changed.float() @ new.float()
                values, missing = changed, lacks if missing is None else lacks.view_as(missing) + missing
            if missing is not None:
                for one in sums:
                    one.add_missing(values, missing)
        for one in (total, held):
            one.all_reduce(weights.units, weights.up.device)
            if self.beside is not None or swap is not None:
                one.all_reduce_missing(weights.units, rows.shape[1], rows.device)
        return Evidence(total, held)

    def _looked_at(self, number: int, axis: Axis, sums: Sequence[Sums]) -> tuple[Tensor, Tensor | None]:
        """(input of the output projection of one batch, what its output lacks of the dense one, if that counts)."""
        hidden = self.hidden[number]
        if self.behind is axis and number == len(self.halfway):
            with _listening(self.layer, axis, sums):
                self.halfway.append(self.runner.without(hidden, axis))
        values = self.halfway[number][0] if self.behind is axis else self._heard(number, axis, sums)
        if self.beside is None:
            return values, None
        if axis.name in self.inputs:
            rest = (self.inputs[axis.name][number].float() - values.float()) @ output_rows(axis, self.layer).float()
            return values, rest + self.beside[number].float() - hidden.float()
        output = self._output(number, axis)
        return values, self.outputs[number].float() - output.float()

    def _heard(self, number: int, axis: Axis, sums: Sequence[Sums]) -> Tensor:
        """The input of the output projection of one batch, with its activations taken in on the way."""
        with _listening(self.layer, axis, sums):
            return self.runner.up_to(self.hidden[number], axis)

    def _output(self, number: int, axis: Axis | None) -> Tensor:
        """The layer's output of one batch, as it is now."""
        if self.behind is axis and axis is not None:
            return self.runner.onward(*self.halfway[number], axis)
        return self.runner.whole(self.hidden[number])

    def run_dense(self, axes: Mapping[str, Axis]) -> None:
        """Let the dense model's hidden states through, and keep what the cut ones will be held against."""
        for hidden in self.beside or ():
            for name, axis in axes.items():
                if kind_name(name) != "mlp":  # whose output is the layer's
                    self.inputs.setdefault(name, []).append(self.runner.up_to(hidden, axis))
            self.outputs.append(self.runner.whole(hidden))

    def check_adds(self, axes: Mapping[str, Axis]) -> None:
        """See to it that the output projection's output joins the hidden states as it is: no norm comes between.

        Raises:
            RecipeError: it does not, so that what the output lacks is no sum.
        """
        axis = next((one for name, one in axes.items() if kind_name(name) == "mlp" and not one.routed), None)
        if not self.beside or axis is None:
            return
        values, without = self.runner.without(self.beside[0], axis)
        added = self.layer.get_submodule(axis.output)(values).float()  # OPT's has all tokens in one row
        if (self.outputs[0].float() - without.float() - added.view_as(without)).norm() > 0.1 * added.norm():
            raise RecipeError(
                "--target dense needs outputs that join the hidden states as they are, and this model has a norm or a "
                "factor between: leave it out."
            )

    def run_on(self) -> None:
        """Let the tokens through the layer as it is now."""
        for number in range(len(self.hidden)):
            self.hidden[number] = output = self._output(number, self.behind)
            if not output.isfinite().all():
                raise RecipeError(
                    f"the hidden states behind layer {self.runner.index} are not finite on this text (batch "
                    f"{number + 1}), with what was cut so far: try --dtype float32."
                )
        if self.beside is not None:
            self.beside[:] = self.outputs


@contextmanager
def _listening(layer: nn.Module, axis: Axis, several: Sequence[Sums]) -> Iterator[None]:
    with ExitStack() as stack:
        for sums in several:
            stack.enter_context(listening_to(layer, axis, sums))
        yield
