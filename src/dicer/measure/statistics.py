"""Running sums over the tokens that one layer has seen, and what criteria read of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dicer.errors import RecipeError
from dicer.machine import free_memory
from dicer.model.units import UnitWeights
from dicer.processes import all_reduce, sum_of, world_size

Kind = Literal[
    "square_sum", "sum", "gram", "channel_sum", "channel_square_sum", "channel_gram", "tokens", "routed_norm"
]
GRAM_FLOAT64 = 12_000  # inputs of an output projection, above which their Gram matrix is kept in float32


class Need(NamedTuple):
    """One sum that a run asks for, over one activation (pre, post or mod; attention has mod alone) of one axis."""

    kind: Kind
    activation: str
    axis: str = "mlp"


def widest(device: torch.device) -> torch.dtype:
    """What long sums are kept in: float64, but for Apple's GPUs, which have none."""
    return torch.float32 if device.type == "mps" else torch.float64


def gram_dtype(inputs: int, device: torch.device) -> torch.dtype:
    """What a Gram matrix of so many inputs is kept and solved in."""
    return torch.float32 if inputs > GRAM_FLOAT64 else widest(device)


@contextmanager
def exact_products() -> Iterator[None]:
    """Matrix products in full precision: TF32 has ten bits, and a system of equations loses the others."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def new_gram(inputs: int, device: torch.device, *, single: bool = False) -> Tensor:
    """A Gram matrix of zeros, [inputs, inputs]; in float32 where single precision will do.

    Raises:
        RecipeError: there is no memory for it and for the two more that solving takes.
    """
    dtype = torch.float32 if single else gram_dtype(inputs, device)
    size, free = inputs * inputs * dtype.itemsize, free_memory(device)
    if free is not None and 3 * size > free:
        raise RecipeError(
            f"the Gram matrix of {inputs:,} inputs takes {size / 1e9:.1f} GB ({str(dtype).removeprefix('torch.')}), "
            f"and solving it as much again twice, but {device} has {free / 1e9:.1f} GB free: use another --device, or "
            "a criterion and no repair that needs none."
        )
    return torch.zeros(inputs, inputs, dtype=dtype, device=device)


BLOCK = 256


class Sums:
    """The sums of one axis of one layer, filled batch by batch.

    ``square_sum`` and ``sum`` are float64 [U] (float32 within a batch), over all channels of a unit; ``channel_sum``
    and ``channel_square_sum`` are float64 [U * C], for each channel by itself; ``gram`` is float32 [U, U], as at 18,944
    neurons it already takes 1.4 GB; ``channel_gram`` is [U * C, U * C], in float64 up to 12,000 of them. Of experts,
    ``tokens`` are those sent to each, ``routed_norm`` is the sum of their outputs' norms times the router's weights
    (both float64 [E]), and ``gram`` is of the outputs of all of them, over all tokens.

    Where a target other than the activations themselves is pursued, ``cross`` [U * C, d] and ``missing`` [d] hold what
    the output lacks: ``sum_t a(t) r(t)^T`` and ``sum_t r(t)``; ``lacking`` is ``sum_t |r(t)|^2``, [].

    Args:
        needs: what is asked for.
        channels: C, the values that one unit has for a token: 1 for neurons.
        single: whether ``channel_gram`` is float32 for any number of inputs: no system of it is to be solved.
    """

    def __init__(self, needs: Iterable[Need], channels: int = 1, *, single: bool = False) -> None:
        self.needs = frozenset(needs)
        self.channels = channels
        self.count = 0
        self.cross: Tensor | None = None
        self.missing: Tensor | None = None
        self.lacking: Tensor | None = None
        self._counted: Tensor | None = None
        self._totals: dict[Need, Tensor] = {}
        self._mirrored: set[Need] = set()
        self._single = single

    def begin(self, counted: Tensor | None) -> None:
        """Say which tokens of the batch that comes now count, bool [B, T]; None for all."""
        self._counted = counted

    def saw(self, values: Tensor) -> None:
        """Count the tokens of a batch, [B, T, ...]."""
        self.count += values.shape[:-1].numel() if self._counted is None else int(self._counted.sum())

    def add(self, activation: str, values: Tensor) -> None:
        """Take in one batch of one activation, [..., U * C]."""
        flat = self._flat(values)  # [T, U*C]
        for need in self.needs:
            if need.activation != activation:
                continue
            if need.kind == "gram":
                by_unit = flat.reshape(len(flat), -1, self.channels).movedim(1, 0).flatten(1)  # [U, T*C]
                if need not in self._totals:
                    self._totals[need] = flat.new_zeros(len(by_unit), len(by_unit))
                self._totals[need].addmm_(by_unit, by_unit.T)
                continue
            if need.kind == "channel_gram":
                self._add_gram(need, flat)
                continue
            batch = (flat.square() if "square" in need.kind else flat).sum(0)  # [U*C]
            if "channel" not in need.kind:
                batch = batch.reshape(-1, self.channels).sum(1)  # [U]
            self._totals[need] = self._totals.get(need, 0.0) + batch.to(widest(batch.device))

    def add_missing(self, values: Tensor, missing: Tensor) -> None:
        """Take in what the output lacks, [B, T, d], beside the inputs of the output projection, [B, T, U * C]."""
        wide = gram_dtype(values.shape[-1], values.device)
        flat, rest = self._flat(values).to(wide), self._flat(missing).to(wide)
        with exact_products():
            cross = flat.T @ rest
        self.cross = cross if self.cross is None else self.cross.add_(cross)
        self.missing = rest.sum(0) + (0.0 if self.missing is None else self.missing)
        self.lacking = rest.square().sum() + (0.0 if self.lacking is None else self.lacking)

    def _flat(self, values: Tensor) -> Tensor:
        """The tokens that count, float32 [T, ...]."""
        flat = values.detach().reshape(-1, values.shape[-1]).float()
        return flat if self._counted is None else flat[self._counted.reshape(-1).to(flat.device)]

    def _add_gram(self, need: Need, flat: Tensor) -> None:
        """Add A^T A block by block below the diagonal, as it is symmetric; :meth:`get` fills in the rest."""
        inputs = flat.shape[1]
        if need not in self._totals:
            self._totals[need] = new_gram(inputs, flat.device, single=self._single)
        self._mirrored.discard(need)
        total, wide = self._totals[need], flat.to(self._totals[need].dtype)
        with exact_products():
            for start in range(0, inputs, BLOCK):
                rows = slice(start, start + BLOCK)
                total[rows, : start + BLOCK].addmm_(wide[:, rows].T, wide[:, : start + BLOCK])

    def start(self, units: int, device: torch.device) -> None:
        """Begin with zeros: where tokens are sent to units, some may see none.

        Args:
            units: U.
            device: where the sums are made.
        """
        for need in self.needs:
            if need not in self._totals:
                self._totals[need] = self._zeros(need, units, device)

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

    def _zeros(self, need: Need, units: int, device: torch.device) -> Tensor:
        inputs = units * self.channels
        if need.kind == "channel_gram":
            return new_gram(inputs, device, single=self._single)
        shape = {"gram": (units, units)}.get(need.kind, (inputs if "channel" in need.kind else units,))
        return torch.zeros(shape, dtype=torch.float32 if need.kind == "gram" else widest(device), device=device)

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
            if need not in self._totals:
                self._totals[need] = self._zeros(need, units, device)
            all_reduce(self._totals[need])
        self._mirrored.clear()

    def all_reduce_missing(self, units: int, outputs: int, device: torch.device) -> None:
        """The same for ``cross`` and ``missing``; ``outputs`` is d."""
        if world_size() == 1:
            return
        inputs = units * self.channels
        dtype = gram_dtype(inputs, device)
        if self.cross is None or self.missing is None or self.lacking is None:
            self.cross = torch.zeros(inputs, outputs, dtype=dtype, device=device)
            self.missing, self.lacking = torch.zeros_like(self.cross[0]), torch.zeros_like(self.cross[0, 0])
        for total in (self.cross, self.missing, self.lacking):
            all_reduce(total)

    def without_grams(self) -> Sums:
        """The same sums but for Gram matrices, of which no two layers may have one."""
        rest = Sums((need for need in self.needs if "gram" not in need.kind), self.channels)
        rest.count = self.count
        rest._totals = {need: total for need, total in self._totals.items() if "gram" not in need.kind}
        return rest

    def as_tensors(self) -> dict[str, Tensor]:
        """Everything that was summed, by names that :meth:`from_tensors` understands."""
        totals = {"/".join(need): total for need, total in self._totals.items()}
        return {**totals, "count": torch.tensor(self.count), "channels": torch.tensor(self.channels)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Sums:
        """The sums that :meth:`as_tensors` gave."""
        totals = {Need(*name.split("/")): total for name, total in tensors.items() if "/" in name}  # type: ignore[arg-type]
        sums = cls(totals, int(tensors["channels"]))
        sums.count, sums._totals = int(tensors["count"]), totals
        return sums

    def get(self, kind: Kind, activation: str) -> Tensor:
        """One sum.

        Raises:
            RecipeError: it was not asked for before the pass.
        """
        for need, total in self._totals.items():
            if need[:2] == (kind, activation):
                if kind == "channel_gram" and need not in self._mirrored:
                    mirrored(total)
                    self._mirrored.add(need)
                return total
        raise _not_collected(kind)


def mirrored(lower: Tensor) -> Tensor:
    """A symmetric matrix whose blocks above the diagonal are filled from those below it, in place."""
    for start in range(BLOCK, len(lower), BLOCK):
        lower[start - BLOCK : start, start:] = lower[start:, start - BLOCK : start].T
    return lower


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
        activation: which activation the recipe names; all sums are of this one.
        sums: all sums of the layer.
        rng: this layer's own stream of the recipe's seed.
        loss_gradient: dL/dW in the form of the weights; criteria read it as ``gradient``.
        keep: how many units will stay, where that is known; what ranks one after the other may stop there.
    """

    activation: str = "post"
    sums: Sums = field(default_factory=empty_sums)
    rng: np.random.Generator = field(default_factory=lambda: stream(0, 0, "criterion"))
    loss_gradient: UnitWeights | None = None
    keep: int | None = None

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
    def channel_sum(self) -> Tensor:
        """The sum for each channel by itself, float64 [U * C]."""
        return self.sums.get("channel_sum", self.activation)

    @property
    def channel_square_sum(self) -> Tensor:
        """The sum of squares for each channel by itself, float64 [U * C]."""
        return self.sums.get("channel_square_sum", self.activation)

    @property
    def channel_gram(self) -> Tensor:
        """sum_t a(t) a(t)^T over all channels of all units, [U * C, U * C]; float64 up to 12,000, then float32."""
        return self.sums.get("channel_gram", self.activation)

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
