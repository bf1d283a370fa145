"""Samples cut into what one forward pass takes, and shared out over processes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Self

import torch
from torch import Tensor

from dicer.errors import CalibrationError
from dicer.machine import free_memory
from dicer.processes import rank, world_size

BATCH_TOKENS = 4096  # in a forward pass
_TOKEN_BYTES = 24  # of a token of a sample, as a Python list and as a tensor
ABSENT, SEEN, COUNTED = 0, 1, 2  # a token that is not there; one that others see and no sum counts; any other


class Batches(tuple[Tensor, ...]):
    """Batches of tokens, int64 [B, T] each, where not all tokens count.

    Attributes:
        counted: bool [B, T] for each batch, or None where all tokens of it count.
    """

    counted: tuple[Tensor | None, ...]

    def __new__(cls, pairs: Iterable[tuple[Tensor, Tensor]]) -> Self:
        """From (tokens, which of them count)."""
        pairs = list(pairs)
        made = super().__new__(cls, (tokens for tokens, _ in pairs))
        made.counted = tuple(None if bool(counted.all()) else counted for _, counted in pairs)
        return made


def counted_of(batches: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """For each batch, which of its tokens count, bool [B, T]; None where all do."""
    return batches.counted if isinstance(batches, Batches) else [None] * len(batches)


def share(samples: Tensor) -> Tensor:
    """The rows [S', T] of [S, T] that this process sees; every row goes to one process, some may get none."""
    return samples.tensor_split(world_size())[rank()]


def own_batches(
    samples: Tensor, size: int | None = None, most: int = BATCH_TOKENS, mask: Tensor | None = None
) -> Sequence[Tensor]:
    """This process's rows of [S, T] in batches [B, T]; none where it got no rows.

    Rows of different length are never padded: each batch has rows of one length. So every row is computed as if it were
    alone, positions and windows included, in any family.

    Args:
        samples: what all processes see together; behind the end of a row anything.
        size: B; None for as many rows as fit.
        most: tokens in a batch where no size is given, but never less than one row.
        mask: uint8 [S, T], ABSENT behind the end of a row, else SEEN or COUNTED; None where all tokens count.
    """
    mine = share(samples)  # [S', T]
    if mask is None:
        return mine.split(size or max(1, most // mine.shape[1])) if len(mine) else ()
    own = share(mask)
    lengths = (own != ABSENT).sum(1)
    pairs: list[tuple[Tensor, Tensor]] = []
    for length in lengths.unique().tolist():
        rows, counted = mine[lengths == length, :length], own[lengths == length, :length] == COUNTED
        split = size or max(1, most // length)
        pairs += zip(rows.split(split), counted.split(split), strict=True)
    return Batches(pairs)


def check_room(samples: int, length: int) -> None:
    """See to it that samples of so many tokens fit into memory, with what is made of them.

    Raises:
        CalibrationError: they do not.
    """
    need, free = samples * length * _TOKEN_BYTES, free_memory(torch.device("cpu"))
    if free is not None and need > free:
        raise CalibrationError(
            f"{samples:,} samples of up to {length:,} tokens take {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB of "
            "memory are free. Ask for fewer or shorter ones."
        )


def in_one(rows: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> tuple[Tensor, Tensor | None]:
    """Rows of any length as int64 [S, T] and their mask, None where it would say nothing.

    Args:
        rows: the tokens of each and which of them count.
    """
    longest = max(len(ids) for ids, _ in rows)
    check_room(len(rows), longest)
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.full((len(rows), longest), ABSENT, dtype=torch.uint8)
    for number, (ids, counted) in enumerate(rows):
        tokens[number, : len(ids)] = torch.tensor(ids)
        mask[number, : len(ids)] = torch.where(torch.tensor(counted), COUNTED, SEEN)
    return tokens, None if bool((mask == COUNTED).all()) else mask
