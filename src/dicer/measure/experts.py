"""What tokens do in experts: one hook on the module that runs them all, which runs each on its own tokens again.

All types of transformers with experts keep their maps side by side in memory, and call one module with the hidden
states, the experts that each token is sent to, and their weights. So one hook serves them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dicer.errors import ModelError, RecipeError
from dicer.measure.statistics import Sums
from dicer.model.structure.experts import inputs_of
from dicer.model.units import Axis, UnitWeights

FEW_TOKENS = 64  # of an expert's calibration; with fewer, its scores say little
_GRAM_TOKENS = 64  # at once, as every expert's output is there for each
_OFF = {torch.float64: 1e-6, torch.float32: 1e-3}  # how far the own reckoning may be off, of the largest output


@dataclass(frozen=True)
class Batch:
    """What goes into a module of experts.

    Attributes:
        rows: [T, d]; where a class gives each expert its own inputs, [E, T, d] (Llama 4).
        index: int64 [T, k], the experts of each token; None where each has its own inputs.
        weights: [T, k], what their outputs are multiplied by; None there, as the inputs are multiplied.
    """

    rows: Tensor
    index: Tensor | None
    weights: Tensor | None

    def of(self, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens [N], their inputs [N, d], the weights of the outputs [N]) of one expert."""
        if self.index is None or self.weights is None:
            own = self.rows[expert]
            tokens = own.any(1).nonzero().flatten()
            return tokens, own[tokens], own.new_ones(len(tokens))
        tokens, place = (self.index == expert).nonzero(as_tuple=True)
        return tokens, self.rows[tokens], self.weights[tokens, place]


class Experts:
    """A module of experts, and the maps of each.

    Args:
        module: of transformers.
        name: its path inside its layer, for people.

    Raises:
        ModelError: its maps lie otherwise than side by side.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module: Any = module
        self.inputs = inputs_of(module)
        if not self.inputs:
            raise ModelError(
                f"the experts of {name} (a {type(module).__name__}) do not lie side by side in gate_up_proj and "
                "down_proj, so nothing can be read of them; use --axis attention or block."
            )
        into, out = self.module.get_parameter(self.inputs), self.module.get_parameter("down_proj")
        self.count = int(into.shape[0])
        self.gated = self.inputs == "gate_up_proj"
        wide = (2 if self.gated else 1) * int(out.shape[-1]) != into.shape[-2] or out.shape[-2] != into.shape[-1]
        self.transposed = bool(getattr(module, "is_transposed", wide))
        self.in_turns = not getattr(module, "is_concatenated", True)

    def tensors(self) -> dict[str, nn.Parameter]:
        """The weight matrices by their names inside the module, [E, ...] each."""
        return {name: self.module.get_parameter(name) for name in (self.inputs, "down_proj")}

    def weights(self, axis: Axis, tensors: Mapping[str, Tensor]) -> UnitWeights:
        """The maps along one axis: of the neurons of one expert, or of experts with all their rows.

        Args:
            axis: one of this module.
            tensors: as :meth:`tensors` has them, or of their shapes.
        """
        into, out = tensors[self.inputs], tensors["down_proj"]
        if axis.kind.routed:
            return UnitWeights(None, into.flatten(1), out.flatten(1).T)
        expert = expert_number(axis)
        up, down = into[expert], out[expert]
        if self.transposed:
            up, down = up.T, down.T
        if not self.gated:
            return UnitWeights(None, up, down)
        gate, up = (up[::2], up[1::2]) if self.in_turns else up.chunk(2)
        return UnitWeights(gate, up, down)

    def run(self, expert: int, rows: Tensor, seen: Callable[[str, Tensor], None]) -> Tensor:
        """One expert's output [N, d] for inputs [N, d], not weighted.

        Args:
            expert: its number.
            rows: the inputs.
            seen: is told each activation of its neurons, [N, I]; without a module that is the activation, there is but
                what goes into the map out of them, which is then pre and post as well.
        """
        module = self.module
        found = self._linear(rows, self.inputs, expert)
        act = getattr(module, "act_fn", None)
        hook = act.register_forward_hook(_activation(seen)) if isinstance(act, nn.Module) else None
        try:
            modulated = self._modulated(found)
        finally:
            if hook is not None:
                hook.remove()
        for name in ("mod",) if hook is not None else ("pre", "post", "mod"):
            seen(name, modulated)
        output: Tensor = self._linear(modulated, "down_proj", expert)
        if getattr(module, "has_post_expert_norm", False):
            output = module.post_expert_norm(output)
        return output

    def _modulated(self, found: Tensor) -> Tensor:
        module = self.module
        if not self.gated:
            apply = module.act_fn
        elif hasattr(module, "_apply_gate"):
            apply = module._apply_gate
        else:
            apply = partial(_gated, module.act_fn)
        modulated: Tensor = apply(found)
        return modulated

    def _linear(self, rows: Tensor, name: str, expert: int) -> Tensor:
        weight, bias = getattr(self.module, name)[expert], getattr(self.module, f"{name}_bias", None)
        output: Tensor = rows @ (weight if self.transposed else weight.T)
        return output if bias is None else output + bias[expert]

    def batch(self, values: tuple[Any, ...]) -> Batch:
        """What the module was called with: hidden states, experts and weights, in this order."""
        rows, *rest = [value for value in values if isinstance(value, Tensor)]
        rows = rows.reshape(-1, rows.shape[-1])
        if len(rest) < 2:
            return Batch(rows.reshape(self.count, -1, rows.shape[-1]), None, None)
        index = next(value for value in rest if not value.is_floating_point())
        return Batch(rows, index, next(value for value in rest if value is not index))


def _gated(act: Callable[[Tensor], Tensor], found: Tensor) -> Tensor:
    gate, up = found.chunk(2, dim=-1)
    return act(gate) * up


def expert_number(axis: Axis) -> int:
    """Whose neurons an axis has: 3 of ``mlp.expert3``."""
    return int(axis.name.split(".")[1].removeprefix("expert"))


def _activation(seen: Callable[[str, Tensor], None]) -> Callable[..., None]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen("pre", inputs[0])
        seen("post", output)

    return hook


@contextmanager
def listening(experts: Experts, axes: Mapping[str, Axis], sums: Mapping[str, Sums]) -> Iterator[None]:
    """Feed what each expert does with its tokens to the sums while the module runs.

    Args:
        experts: of one layer.
        axes: those of the layer that lie in them, by name.
        sums: of these axes.
    """
    neurons = {expert_number(axis): sums[name] for name, axis in axes.items() if not axis.kind.routed}
    whole = next((sums[name] for name, axis in axes.items() if axis.kind.routed), None)

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        batch = experts.batch((*args, *kwargs.values()))
        _count(experts, batch, neurons, whole)
        own = _fed(experts, batch, neurons, whole)
        given = output[0] if isinstance(output, tuple) else output
        _check(experts, own, given.reshape(own.shape))
        if whole is not None and any(need.kind == "gram" for need in whole.needs):
            _similarities(experts, batch, whole)

    if not any(own.needs for own in sums.values()):
        yield
        return
    handle = experts.module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _count(experts: Experts, batch: Batch, neurons: Mapping[int, Sums], whole: Sums | None) -> None:
    """Note how many tokens came, and that zeros are no want of sums: an expert may see none."""
    if whole is not None:
        whole.saw(batch.rows if batch.index is not None else batch.rows[0])
        whole.start(experts.count, batch.rows.device)
    width = experts.module.get_parameter("down_proj").shape[-2 if experts.transposed else -1]
    for own in neurons.values():
        own.start(int(width), batch.rows.device)


def _fed(experts: Experts, batch: Batch, neurons: Mapping[int, Sums], whole: Sums | None) -> Tensor:
    """Run expert after expert on the tokens that chose it; returns what the module should have given."""
    total = torch.zeros_like(batch.rows)
    for expert in range(experts.count):
        tokens, rows, weights = batch.of(expert)
        if not len(tokens):
            continue
        own = neurons.get(expert)
        output = experts.run(expert, rows, partial(_sum, expert, tokens, own, whole))
        if own is not None:
            own.count += int(own.counts(tokens).sum())
        if whole is not None:
            counts = whole.counts(tokens)
            norms = output[counts].float().norm(dim=1) * weights[counts].float()  # [N]
            whole.routed(expert, len(norms), norms.sum())
        into = total[expert] if batch.index is None else total
        into.index_add_(0, tokens, (output * weights[:, None]).to(total.dtype))  # a token may choose one twice
    return total


def _sum(expert: int, tokens: Tensor, own: Sums | None, whole: Sums | None, activation: str, values: Tensor) -> None:
    """Take in one activation of an expert's neurons on its tokens, [N, I], as neurons and as one unit."""
    if own is not None:
        own.add_rows(activation, values[own.counts(tokens)])
    if whole is not None:
        whole.add_to(expert, activation, values[whole.counts(tokens)])


def _check(experts: Experts, own: Tensor, given: Tensor) -> None:
    """See to it that what is recomputed is what the module computes."""
    off, largest = float((own - given).abs().max()), float(given.abs().max())
    if off > _OFF.get(given.dtype, 5e-2) * max(largest, 1e-6):
        raise ModelError(
            f"a {type(experts.module).__name__} computes otherwise than its maps and its activation say (off by "
            f"{off:.2g} of {largest:.2g}), so nothing can be read of its experts; use --axis attention or block."
        )


def _similarities(experts: Experts, batch: Batch, whole: Sums) -> None:
    """Inner products of all experts' outputs over all tokens (as Chen et al. 2025, HC-SMoE, compare experts)."""
    if batch.index is None:
        raise RecipeError(
            f"the experts of a {type(experts.module).__name__} do not see the tokens of others, so they cannot be "
            "grouped by similarity; use --grouping random or none."
        )
    rows = batch.rows[whole.counts(torch.arange(len(batch.rows), device=batch.rows.device))]
    for part in rows.split(_GRAM_TOKENS):
        outputs = torch.stack([experts.run(e, part, lambda *_: None).float().flatten() for e in range(experts.count)])
        whole.add_gram(outputs @ outputs.T)  # [E, N*d] -> [E, E]
