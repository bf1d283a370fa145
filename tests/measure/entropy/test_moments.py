"""Moments of channels, batch by batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dicer.measure.entropy.moments import STD_FLOOR, Moments


def moments_of(values, size):
    zeros = torch.zeros(values.shape[1], dtype=torch.float64)
    moments = Moments(0, zeros, zeros)
    for batch in values.split(size):
        moments = moments.add(batch)
    return moments


@pytest.mark.parametrize("size", [5000, 7, 1])
def test_channel_far_from_zero(size):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5000, 3, generator=generator, dtype=torch.float64)
    values = (values * torch.tensor([1e-2, 1.0, 1e3]) + torch.tensor([1e4, 0.0, -1e6])).float()  # what a model gives
    moments, std = moments_of(values, size), values.double().numpy().std(0)
    assert std[0] == pytest.approx(1e-2, rel=0.05)
    assert moments.std.numpy() == pytest.approx(std, rel=1e-9)
    assert moments.entropy == pytest.approx(np.log(std).sum(), rel=1e-9)
    assert moments.count == 5000


def test_constant_channel():
    values = torch.tensor([[0.1, 1.0], [0.1, 3.0], [0.1, 1.0]] * 50)
    moments = moments_of(values, 4)
    assert moments.constant == 1
    assert moments.entropy == pytest.approx(np.log(STD_FLOOR) + np.log(values[:, 1].double().numpy().std()))
