"""Random scores: the baseline that the paper found surprisingly strong."""

import torch
from torch import Tensor

from dicer.ask.methods import XU_2025
from dicer.measure.criteria.registry import criterion
from dicer.measure.statistics import LayerStatistics
from dicer.model.units import UnitWeights


@criterion("random", source="Xu et al. 2025, B.4", link=XU_2025)
def random(weights: UnitWeights, statistics: LayerStatistics) -> Tensor:
    """A uniform draw for every unit, [U], from the layer's own stream."""
    return torch.from_numpy(statistics.rng.random(weights.units))
