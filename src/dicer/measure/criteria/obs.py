"""Criteria of second order, from the Gram matrix of the output projection's inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from dicer.errors import RecipeError
from dicer.measure.criteria.registry import criterion
from dicer.measure.gram import inverse
from dicer.measure.statistics import LayerStatistics, exact_products, widest
from dicer.model.units import UnitWeights

_BLOCKS = 64
_GRAM = "the output projection's inputs"


@criterion(
    "leverage",
    needs=("channel_gram",),
    source="MoDeGPT (Lin et al. 2025, MLP part): ridge leverage",
    link="https://arxiv.org/abs/2408.09632",
)
def leverage(weights: UnitWeights, statistics: LayerStatistics, *, ridge: float = 1e-2) -> Tensor:
    """L / (1 - l) of the leverage l = [H (H + ridge)^-1]_cc, summed over a unit's channels, [U].

    The odds rank neurons as l does, and do not drown in rounding where all l are near 1.
    """
    gram = statistics.channel_gram
    rest = (ridge * gram.diagonal().mean() * inverse(gram, ridge, _GRAM).diagonal()).clamp(min=1e-30)  # 1 - l
    return ((1 - rest).clamp(min=0) / rest).reshape(weights.units, -1).sum(1)


@criterion(
    "obs",
    needs=("channel_gram",),
    source="OSSCAR (Meng et al. 2024), ZipLM (Kurtic et al. 2023), after Hassibi and Stork 1993",
    link="https://arxiv.org/abs/2403.12983",
)
def obs(weights: UnitWeights, statistics: LayerStatistics, *, ridge: float = 1e-2, block: int = 16) -> Tensor:
    """What the output has lost when a unit goes, [U]: units go in blocks, the least loss first, the rest updated."""
    gram = statistics.channel_gram
    rows = weights.down.T.reshape(len(gram), -1).to(gram.dtype)  # [U*C, d]
    return removal(gram, rows, len(gram) // weights.units, keep=statistics.keep or 1, ridge=ridge, block=block)


def removal(gram: Tensor, rows: Tensor, channels: int, *, keep: int, ridge: float, block: int) -> Tensor:
    """Remove units one block after the other: those of the least ``tr(W_g^T [H^-1]_gg^-1 W_g)``, which is what goes of
    the output when all others make up for it. Then W and H^-1 become those of the rest.

    Args:
        gram: H [U * C, U * C].
        rows: W [U * C, d], the output projection by its inputs.
        channels: C.
        keep: where to stop.
        ridge: added to the diagonal, relative to its mean.
        block: units that go at once, at most one of 64 of those that are left; heads, which are few, go one by one.

    Returns:
        float64 [U]: all that is lost up to and with a unit; of those that stay, what each would add. So one order
        serves all widths.
    """
    left, weight = inverse(gram, ridge, _GRAM), rows.clone()
    units = torch.arange(len(gram) // channels, device=gram.device)  # those that are left, by their number
    scores, lost = torch.zeros(len(units), dtype=widest(gram.device), device=gram.device), 0.0
    while True:
        saliency = _saliency(left, weight, channels)
        if not saliency.isfinite().all():
            raise RecipeError("progressive removal met numbers that are not finite: ask for more --set ridge=...")
        if len(units) <= keep:
            scores[units] = lost + saliency.to(scores.dtype)
            return scores
        step = min(block, len(units) // _BLOCKS) if channels == 1 else 1
        value, gone = saliency.topk(min(max(step, 1), len(units) - keep), largest=False)
        left, weight, loss = _without(left, weight, gone, channels)
        each = value.to(scores.dtype).cumsum(0)
        scores[units[gone]] = lost + each / each[-1].clamp(min=1e-300) * loss
        lost += loss
        stays = torch.ones(len(units), dtype=torch.bool, device=gram.device)
        stays[gone] = False
        units = units[stays]


def _saliency(left: Tensor, weight: Tensor, channels: int) -> Tensor:
    """What the output loses by each unit alone, [U]."""
    if channels == 1:
        return weight.square().sum(1) / left.diagonal()
    count = len(left) // channels
    blocks = left.reshape(count, channels, count, channels).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [U, C, C]
    own = weight.reshape(count, channels, -1)
    solved: Tensor = torch.linalg.solve(blocks, own)
    return (own * solved).sum((1, 2))


def _without(left: Tensor, weight: Tensor, gone: Tensor, channels: int) -> tuple[Tensor, Tensor, float]:
    """H^-1 and W of the units that stay, once the others have gone, and what the output loses by that."""
    rows = (gone[:, None] * channels + torch.arange(channels, device=gone.device)).reshape(-1)
    mask = torch.ones(len(left), dtype=torch.bool, device=left.device)
    mask[rows] = False
    stays = mask.nonzero()[:, 0]
    column = left[stays[:, None], rows]  # [R, B]
    with exact_products():
        share = torch.linalg.solve(left[rows[:, None], rows], torch.cat([weight[rows], column.T], 1))
        mine, theirs = share[:, : weight.shape[1]], share[:, weight.shape[1] :]
        loss = float((weight[rows] * mine).sum())
        rest = left[stays[:, None], stays].addmm_(column, theirs, alpha=-1)  # of such matrices no more than two
        return rest, torch.addmm(weight[stays], column, mine, alpha=-1), loss
