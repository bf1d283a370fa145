"""Mean and standard deviation of every channel, batch by batch and over processes, and the entropy that they give."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dicer.processes import all_reduce, sum_of, world_size

STD_FLOOR = 1e-8  # a constant channel would add -inf; below this a std is rounding noise of float64


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of every channel.

    Deviations, not squares: a channel of mean 1e4 and std 1e-2 would lose all its digits in a sum of squares.

    Attributes:
        count: tokens.
        mean: [C], in the widest float of the device.
        spread: [C], sum over tokens of (value - mean)^2.
    """

    count: int
    mean: Tensor
    spread: Tensor

    def add(self, values: Tensor) -> Moments:
        """These and one batch [..., C] together (Chan et al. 1979)."""
        flat = values.reshape(-1, values.shape[-1]).to(self.mean.dtype)  # [N, C]
        count = flat.shape[0]
        variance, mean = torch.var_mean(flat, 0, correction=0)  # [C], [C]
        total, step = self.count + count, mean - self.mean
        return Moments(
            total,
            self.mean + step * (count / total),
            self.spread + variance * count + step.square() * (self.count * count / total),
        )

    def of_all_processes(self) -> Moments:
        """Over all processes' tokens, the same bits in each; one without tokens takes part with zeros."""
        if world_size() == 1:
            return self
        total = sum_of(self.count)
        mean = self.mean * (self.count / total)
        all_reduce(mean)
        spread = self.spread + (self.mean - mean).square() * self.count
        all_reduce(spread)
        return Moments(total, mean, spread)

    @property
    def std(self) -> Tensor:
        """Population standard deviation, float64 [C] on the CPU."""
        return (self.spread.cpu().double() / self.count).sqrt()

    @property
    def entropy(self) -> float:
        """H in nats, up to the constant that all Gaussians share; a constant channel counts as one of STD_FLOOR."""
        return float(self.std.clamp(min=STD_FLOOR).log().sum())

    @property
    def constant(self) -> int:
        """How many channels are constant."""
        return int((self.std <= STD_FLOOR).sum())
