"""Hidden states between two layers: in the computer's memory, or in files that go by themselves."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, MutableSequence
from contextlib import contextmanager, suppress
from copy import copy
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

_OPEN = Path("/proc/self/fd")  # of Linux: the files that this process has open


class HiddenStates(MutableSequence[Tensor]):
    """Batches of hidden states that lie outside the device, and come to it one at a time.

    A file is unlinked as soon as it is mapped, so its space is free again when the states are gone, or the process.

    Args:
        states: [B, T, d] each.
        device: where they are asked for.
        folder: where their files are made; None to keep them in memory.
    """

    def __init__(
        self, states: Iterable[Tensor] = (), device: torch.device | str = "cpu", folder: Path | None = None
    ) -> None:
        self._device, self._folder = torch.device(device), folder
        self._held: list[Tensor] = []
        self.extend(states)

    def __copy__(self) -> HiddenStates:
        """The same states, of which each may be replaced without the other's; nothing is copied."""
        made = HiddenStates((), self._device, self._folder)
        made._held = list(self._held)
        return made

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> HiddenStates: ...
    def __getitem__(self, index: Any) -> Any:
        """One batch, on the device; of several, the same states again."""
        if isinstance(index, slice):
            made = copy(self)
            made._held = made._held[index]
            return made
        return self._held[index].to(self._device)

    def __setitem__(self, index: Any, value: Any) -> None:
        """Put another batch in its place, or several in theirs."""
        self._held[index] = [*map(self._kept, value)] if isinstance(index, slice) else self._kept(value)

    def __delitem__(self, index: Any) -> None:
        """Forget a batch."""
        del self._held[index]

    def __len__(self) -> int:
        """How many batches there are."""
        return len(self._held)

    def insert(self, index: int, value: Tensor) -> None:
        """Put a batch in front of another."""
        self._held.insert(index, self._kept(value))

    def _kept(self, states: Tensor) -> Tensor:
        if self._folder is None:
            return states.cpu()
        with _unnamed_file(self._folder) as name:
            mapped = torch.from_file(name, shared=True, size=states.numel(), dtype=states.dtype).view(states.shape)
        return mapped.copy_(states)


@contextmanager
def _unnamed_file(folder: Path) -> Iterator[str]:
    """A name to open a new file by, while the block lasts; on Linux it is in no folder, so that a kill leaves none."""
    if _OPEN.is_dir():
        with tempfile.TemporaryFile(dir=folder) as file:
            yield str(_OPEN / str(file.fileno()))
        return
    number, name = tempfile.mkstemp(".hidden", ".dicer-", folder)
    os.close(number)
    try:
        yield name
    finally:
        with suppress(OSError):  # some systems keep the name of an open file
            Path(name).unlink()
