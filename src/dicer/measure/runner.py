"""One layer, run whole, or up to the output projection of one of its sub-layers and from there on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dicer.measure.stores.resident import replaced_forwards
from dicer.measure.stores.store import Recording
from dicer.model.units import Axis


class _Reached(Exception):  # noqa: N818 - no error: what was wanted is there
    """The output projection has its input, and what comes behind it is not needed."""


@dataclass(frozen=True)
class Runner:
    """A layer and what it is called with besides hidden states."""

    layer: nn.Module
    index: int
    recording: Recording

    def whole(self, hidden: Tensor) -> Tensor:
        """The layer's output, [B, T, d]."""
        args, kwargs = self.recording.arguments_of(hidden)[self.index]
        returned = self.layer(hidden, *args, **kwargs)
        output: Tensor = returned[0] if isinstance(returned, tuple) else returned
        return output

    def up_to(self, hidden: Tensor, axis: Axis) -> Tensor:
        """The input of a sub-layer's output projection, [B, T, U * C]; nothing behind it runs."""
        seen: list[Tensor] = []

        def at_output(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen.append(inputs[0])
            raise _Reached

        handle = self.layer.get_submodule(axis.output).register_forward_pre_hook(at_output)
        try:
            self.whole(hidden)
        except _Reached:
            pass
        finally:
            handle.remove()
        return seen[0]

    def without(self, hidden: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
        """(the same, the layer's output if the output projection gave zeros, [B, T, d])."""
        seen: list[Tensor] = []

        width = output_rows(axis, self.layer).shape[1]

        def zeros(inputs: Tensor) -> Tensor:
            seen.append(inputs)
            return inputs.new_zeros(*inputs.shape[:-1], width)

        with replaced_forwards([self.layer.get_submodule(axis.output)], lambda _: zeros):
            output = self.whole(hidden)
        return seen[0], output

    def onward(self, values: Tensor, without: Tensor, axis: Axis) -> Tensor:
        """The layer's output from what :meth:`without` gave, by the output projection as it is now."""
        projected: Tensor = self.layer.get_submodule(axis.output)(values)
        return without + projected.view_as(without)  # OPT's MLP has all tokens in one row

    def goes_on(self, hidden: Tensor, whole: Tensor, axis: Axis) -> bool:
        """Whether :meth:`onward` gives what the whole layer does, to the last bit: not behind a norm or a factor."""
        values, without = self.without(hidden, axis)
        return not torch.equal(whole, without) and torch.equal(whole, self.onward(values, without, axis))


def output_rows(axis: Axis, layer: nn.Module) -> Tensor:
    """The output projection by its inputs, [U * C, d]."""
    piece = axis.output_slice
    return layer.get_parameter(piece.memory or piece.name).detach().movedim(piece.dim, 0)


@contextmanager
def swapping(layer: nn.Module) -> Iterator[Callable[[Mapping[str, Tensor]], None]]:
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
