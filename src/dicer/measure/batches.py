"""Samples cut into what one forward pass takes, and shared out over processes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dicer.processes import rank, world_size

BATCH_TOKENS = 4096  # in a forward pass


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
