"""Several processes that work on one pass: who sees which samples, and sums over all of them.

Everything here does nothing where torch.distributed was not initialised, so that one process runs the same code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed
from torch import Tensor

T = TypeVar("T")

BATCH_TOKENS = 4096  # in a forward pass


def _active() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank() -> int:
    """Which process this is; 0 is the one that writes."""
    return torch.distributed.get_rank() if _active() else 0


def world_size() -> int:
    """How many processes there are."""
    return torch.distributed.get_world_size() if _active() else 1


def share(samples: Tensor) -> Tensor:
    """The rows [S', T] of [S, T] that this process sees; every row goes to one process, some may get none."""
    return samples.tensor_split(world_size())[rank()]


def own_batches(samples: Tensor, size: int | None = None, most: int = BATCH_TOKENS) -> Sequence[Tensor]:
    """This process's rows of [S, T] in batches [B, T]; none where it got no rows.

    Args:
        samples: what all processes see together.
        size: B; None for as many rows as fit.
        most: tokens in a batch where no size is given, but never less than one row.
    """
    mine = share(samples)  # [S', T]
    return mine.split(size or max(1, most // mine.shape[1])) if len(mine) else ()


def all_reduce(total: Tensor) -> None:
    """Replace a tensor by its sum over all processes, in place; every process gets the same bits."""
    if world_size() > 1:
        torch.distributed.all_reduce(total)


def sum_of(count: int) -> int:
    """The sum of a whole number over all processes."""
    if world_size() == 1:
        return count
    counts: list[int | None] = [None] * world_size()
    torch.distributed.all_gather_object(counts, count)
    return sum(c or 0 for c in counts)


def from_first(value: T) -> T:
    """What process 0 holds, for all."""
    if world_size() == 1:
        return value
    held = [value]
    torch.distributed.broadcast_object_list(held, src=0)
    return held[0]
