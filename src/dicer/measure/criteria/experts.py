"""What experts are worth by the tokens that are sent to them."""

from torch import Tensor

from dicer.measure.criteria.registry import criterion
from dicer.measure.statistics import LayerStatistics
from dicer.model.units import UnitWeights

REAP_2025 = "https://arxiv.org/abs/2510.13999"


@criterion("reap", needs=("tokens", "routed_norm"), source="REAP (Lasby et al. 2025)", link=REAP_2025)
def reap(weights: UnitWeights, statistics: LayerStatistics) -> Tensor:
    """Mean over an expert's tokens of the router's weight times the norm of its output, [E]; without tokens 0."""
    return statistics.routed_norm / statistics.tokens.clamp(min=1)


@criterion("frequency", needs=("tokens",), source="baseline of Lasby et al. 2025", link=REAP_2025)
def frequency(weights: UnitWeights, statistics: LayerStatistics) -> Tensor:
    """The share of the tokens that are sent to an expert, [E]."""
    return statistics.tokens / max(statistics.count, 1)
