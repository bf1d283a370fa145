"""Which of several processes this is, and sums over all of them; asked here and nowhere else, by accelerate's word.

Everything here does nothing in a single process, so that one process runs the same code and imports no accelerate.
"""

from __future__ import annotations

import atexit
import functools
import os
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor

T = TypeVar("T")


def several() -> bool:
    """Whether a launcher (``accelerate launch``, ``torchrun``) started more than one process."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def join(*, cpu: bool) -> Any:
    """Meet the other processes, once; accelerate's PartialState. They wait for long: one may have the longer texts."""
    from accelerate import PartialState

    state = PartialState(cpu=cpu, timeout=timedelta(weeks=1))
    _leave_at_exit()
    return state


@functools.cache
def _leave_at_exit() -> None:
    """See to it that the process group is gone before the interpreter is: its threads would abort the process."""
    from accelerate import PartialState

    atexit.register(PartialState().destroy_process_group)


def _state() -> Any:
    return join(cpu=not torch.cuda.is_available())


def rank() -> int:
    """Which process this is; 0 is the one that writes."""
    return int(_state().process_index) if several() else 0


def local_rank() -> int | None:
    """Which process of this machine this is, and so whose GPU; None where it is alone."""
    return int(_state().local_process_index) if several() else None


def world_size() -> int:
    """How many processes there are."""
    return int(_state().num_processes) if several() else 1


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
