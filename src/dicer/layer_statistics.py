"""Running sums over the tokens that one layer has seen, and what criteria read of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dicer.axes import UnitWeights
from dicer.distributed import all_reduce, sum_of, world_size
from dicer.errors import RecipeError

Kind = Literal["square_sum", "sum", "gram"]


class Need(NamedTuple):
    """One sum that a run asks for, over one activation (pre, post or mod)."""

    kind: Kind
    activation: str


def widest(device: torch.device) -> torch.dtype:
    """What long sums are kept in: float64, but for Apple's GPUs, which have none."""
    return torch.float32 if device.type == "mps" else torch.float64


class Sums:
    """The sums of one layer, filled batch by batch.

    ``square_sum`` and ``sum`` are float64 [U] (float32 within a batch), ``gram`` is float32 [U, U], as at 18,944
    neurons it already takes 1.4 GB.
    """

    def __init__(self, needs: Iterable[Need]) -> None:
        self.needs = frozenset(needs)
        self.count = 0
        self._totals: dict[Need, Tensor] = {}

    def add(self, activation: str, values: Tensor) -> None:
        """Take in one batch of one activation, [..., U]."""
        flat = values.detach().reshape(-1, values.shape[-1]).float()  # [T, U]
        for need in self.needs:
            if need.activation != activation:
                continue
            if need.kind == "gram":
                total = self._totals.setdefault(need, flat.new_zeros(flat.shape[1], flat.shape[1]))
                total.addmm_(flat.T, flat)
                continue
            batch = (flat.square() if need.kind == "square_sum" else flat).sum(0)  # [U]
            self._totals[need] = self._totals.get(need, 0.0) + batch.to(widest(batch.device))

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
            shape, dtype = ((units, units), torch.float32) if need.kind == "gram" else ((units,), widest(device))
            all_reduce(self._totals.setdefault(need, torch.zeros(shape, dtype=dtype, device=device)))

    def get(self, kind: Kind, activation: str) -> Tensor:
        """One sum.

        Raises:
            RecipeError: it was not asked for before the pass.
        """
        total = self._totals.get(Need(kind, activation))
        if total is None:
            raise _not_collected(kind)
        return total


def _not_collected(kind: str) -> RecipeError:
    return RecipeError(
        f"statistic '{kind}' was not collected: a criterion that reads it must declare it, "
        f'@criterion(..., needs=("{kind}",)).'
    )


def empty_sums() -> Sums:
    """Sums that hold nothing, for criteria that read weights alone."""
    return Sums(())


@dataclass(frozen=True)
class LayerStatistics:
    """What a criterion may read of one layer, besides its weights.

    Attributes:
        activation: which activation the recipe names; ``square_sum`` and ``sum`` are of this one.
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
    def gradient(self) -> UnitWeights:
        """dL/dW of the whole calibration set, float32, shaped as the weights."""
        if self.loss_gradient is None:
            raise _not_collected("gradient")
        return self.loss_gradient


def stream(seed: int, layer: int, purpose: str) -> np.random.Generator:
    """An independent random stream for each (seed, layer, purpose), the same on every platform."""
    return np.random.default_rng([seed, layer, *purpose.encode()])
