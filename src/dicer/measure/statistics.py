"""Running sums over the tokens that one layer has seen, and what criteria read of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dicer.errors import RecipeError
from dicer.model.units import UnitWeights
from dicer.processes import all_reduce, sum_of, world_size

Kind = Literal["square_sum", "sum", "gram", "channel_sum", "tokens", "routed_norm"]


class Need(NamedTuple):
    """One sum that a run asks for, over one activation (pre, post or mod; attention has mod alone) of one axis."""

    kind: Kind
    activation: str
    axis: str = "mlp"


def widest(device: torch.device) -> torch.dtype:
    """What long sums are kept in: float64, but for Apple's GPUs, which have none."""
    return torch.float32 if device.type == "mps" else torch.float64


class Sums:
    """The sums of one axis of one layer, filled batch by batch.

    ``square_sum`` and ``sum`` are float64 [U] (float32 within a batch), over all channels of a unit; ``channel_sum`` is
    float64 [U * C], for each channel by itself; ``gram`` is float32 [U, U], as at 18,944 neurons it already takes
    1.4 GB. Of experts, ``tokens`` are those sent to each, ``routed_norm`` is the sum of their outputs' norms times the
    router's weights (both float64 [E]), and ``gram`` is of the outputs of all of them, over all tokens.

    Args:
        needs: what is asked for.
        channels: C, the values that one unit has for a token: 1 for neurons.
    """

    def __init__(self, needs: Iterable[Need], channels: int = 1) -> None:
        self.needs = frozenset(needs)
        self.channels = channels
        self.count = 0
        self._counted: Tensor | None = None
        self._totals: dict[Need, Tensor] = {}

    def begin(self, counted: Tensor | None) -> None:
        """Say which tokens of the batch that comes now count, bool [B, T]; None for all."""
        self._counted = counted

    def saw(self, values: Tensor) -> None:
        """Count the tokens of a batch, [B, T, ...]."""
        self.count += values.shape[:-1].numel() if self._counted is None else int(self._counted.sum())

    def add(self, activation: str, values: Tensor) -> None:
        """Take in one batch of one activation, [..., U * C]."""
        flat = values.detach().reshape(-1, values.shape[-1]).float()  # [T, U*C]
        if self._counted is not None:
            flat = flat[self._counted.reshape(-1).to(flat.device)]
        for need in self.needs:
            if need.activation != activation:
                continue
            if need.kind == "gram":
                by_unit = flat.reshape(len(flat), -1, self.channels).movedim(1, 0).flatten(1)  # [U, T*C]
                if need not in self._totals:
                    self._totals[need] = flat.new_zeros(len(by_unit), len(by_unit))
                self._totals[need].addmm_(by_unit, by_unit.T)
                continue
            batch = (flat.square() if need.kind == "square_sum" else flat).sum(0)  # [U*C]
            if need.kind != "channel_sum":
                batch = batch.reshape(-1, self.channels).sum(1)  # [U]
            self._totals[need] = self._totals.get(need, 0.0) + batch.to(widest(batch.device))

    def start(self, units: int, device: torch.device) -> None:
        """Begin with zeros: where tokens are sent to units, some may see none.

        Args:
            units: U.
            device: where the sums are made.
        """
        for need in self.needs:
            shape, dtype = self._form(need, units, device)
            if need not in self._totals:
                self._totals[need] = torch.zeros(shape, dtype=dtype, device=device)

    def counts(self, tokens: Tensor) -> Tensor:
        """Which of the tokens, by their place in the batch, count: bool [N]."""
        if self._counted is None:
            return torch.ones_like(tokens, dtype=torch.bool)
        return self._counted.reshape(-1).to(tokens.device)[tokens]

    def add_rows(self, activation: str, values: Tensor) -> None:
        """Take in an activation of tokens that all count, [N, U]."""
        before, self._counted = self._counted, None
        self.add(activation, values)
        self._counted = before

    def add_to(self, unit: int, activation: str, values: Tensor) -> None:
        """Take in an activation of one unit's own tokens, over all its channels, [N, C]."""
        flat = values.detach().float()
        for need in self.needs:
            if need.activation == activation and need.kind in ("square_sum", "sum"):
                self._totals[need][unit] += (flat.square() if need.kind == "square_sum" else flat).sum()

    def routed(self, unit: int, tokens: int, norms: Tensor) -> None:
        """Take in how many tokens were sent to one unit, and the sum of what came of them."""
        for need in self.needs:
            if need.kind in ("tokens", "routed_norm"):
                self._totals[need][unit] += tokens if need.kind == "tokens" else norms

    def add_gram(self, products: Tensor) -> None:
        """Take in inner products of units, [U, U]."""
        for need in self.needs:
            if need.kind == "gram":
                self._totals[need] += products

    def part(self, units: slice) -> Sums:
        """The same sums of some of the units only."""
        own = Sums(self.needs, self.channels)
        own.count = self.count
        own._totals = {n: t[units, units] if n.kind == "gram" else t[units] for n, t in self._totals.items()}
        return own

    def _form(self, need: Need, units: int, device: torch.device) -> tuple[tuple[int, ...], torch.dtype]:
        shapes = {"gram": (units, units), "channel_sum": (units * self.channels,)}
        return shapes.get(need.kind, (units,)), torch.float32 if need.kind == "gram" else widest(device)

    def all_reduce(self, units: int, device: torch.device) -> None:
        """Make these the sums over all processes' tokens; a process without tokens takes part with zeros.

        Args:
            units: U.
            device: where zeros are made.
        """
        if world_size() == 1:
            return
        self.count = sum_of(self.count)
        for need in sorted(self.needs):
            shape, dtype = self._form(need, units, device)
            all_reduce(self._totals.setdefault(need, torch.zeros(shape, dtype=dtype, device=device)))

    def without(self, kind: Kind) -> Sums:
        """The same sums but for one kind."""
        rest = Sums((need for need in self.needs if need.kind != kind), self.channels)
        rest.count = self.count
        rest._totals = {need: total for need, total in self._totals.items() if need.kind != kind}
        return rest

    def get(self, kind: Kind, activation: str) -> Tensor:
        """One sum.

        Raises:
            RecipeError: it was not asked for before the pass.
        """
        for need, total in self._totals.items():
            if need[:2] == (kind, activation):
                return total
        raise _not_collected(kind)


def _not_collected(kind: str) -> RecipeError:
    return RecipeError(
        f"statistic '{kind}' was not collected: what reads it must declare it, as in "
        f'@criterion(..., needs=("{kind}",)).'
    )


def empty_sums() -> Sums:
    """Sums that hold nothing, for criteria that read weights alone."""
    return Sums(())


@dataclass(frozen=True)
class LayerStatistics:
    """What a criterion may read of one layer, besides its weights.

    Attributes:
        activation: which activation the recipe names; ``square_sum``, ``sum`` and ``gram`` are of this one.
        sums: all sums of the layer.
        rng: this layer's own stream of the recipe's seed.
        loss_gradient: dL/dW in the form of the weights; criteria read it as ``gradient``.
    """

    activation: str = "post"
    sums: Sums = field(default_factory=empty_sums)
    rng: np.random.Generator = field(default_factory=lambda: stream(0, 0, "criterion"))
    loss_gradient: UnitWeights | None = None

    @property
    def count(self) -> int:
        """T, the tokens seen."""
        return self.sums.count

    @property
    def square_sum(self) -> Tensor:
        """sum_t a_i(t)^2, float64 [U]."""
        return self.sums.get("square_sum", self.activation)

    @property
    def sum(self) -> Tensor:
        """sum_t a_i(t), float64 [U]."""
        return self.sums.get("sum", self.activation)

    @property
    def gram(self) -> Tensor:
        """sum_t a_i(t) a_j(t), float32 [U, U]; of a unit with many channels over all of them."""
        return self.sums.get("gram", self.activation)

    @property
    def tokens(self) -> Tensor:
        """How many tokens were sent to each expert, float64 [U]."""
        return self.sums.get("tokens", "mod")

    @property
    def routed_norm(self) -> Tensor:
        """sum_t g_i(t) ||f_i(x_t)|| over the tokens sent to each expert, g the router's weights, float64 [U]."""
        return self.sums.get("routed_norm", "mod")

    @property
    def gradient(self) -> UnitWeights:
        """dL/dW of the whole calibration set, float32, shaped as the weights."""
        if self.loss_gradient is None:
            raise _not_collected("gradient")
        return self.loss_gradient


def stream(seed: int, layer: int, purpose: str) -> np.random.Generator:
    """An independent random stream for each (seed, layer, purpose), the same on every platform."""
    return np.random.default_rng([seed, layer, *purpose.encode()])
