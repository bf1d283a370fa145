"""A model that stays in its files, as a store of its layers: one at a time is read, and forgotten afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dicer.errors import ModelError, RecipeError
from dicer.measure.stores.hidden import HiddenStates
from dicer.measure.stores.resident import ResidentStore, evaluating
from dicer.measure.stores.store import Recording
from dicer.model.piecewise import OUTSIDE, Piecewise
from dicer.model.source import ModelSource
from dicer.model.units import UnitWeights

_PAGE = 4096  # bytes that a mapped file is read in, at least


class StreamedStore(ResidentStore):
    """A model of which at most two decoder layers are in memory: the one in use, and the next, read meanwhile.

    Everything else that the layers are called with (embeddings, positions) is read once; the head is not.

    Args:
        source: a model in a folder.
        dtype: ``auto`` (the checkpoint's own) or a torch dtype by name.
        device: to compute on.
        folder: where files with the hidden states are made; None to keep them in the computer's memory.

    Raises:
        ModelError: it is in memory already, or its layers cannot be told apart in its files.
    """

    def __init__(
        self, source: ModelSource, dtype: str = "auto", device: str = "cpu", folder: Path | None = None
    ) -> None:
        self._folder = folder
        self._parts = Piecewise(source, dtype, device)
        self._device = torch.device(device)
        self._reader = ThreadPoolExecutor(1, "dicer-layers")
        self._ahead: tuple[int, Future[dict[str, Tensor]]] | None = None
        self._copies = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._nbytes_read = 0
        super().__init__(self._parts.model, source.family)
        self._name = source.name

    @property
    def nbytes_read(self) -> int:
        """Bytes of weights that were read from disk up to now."""
        return self._nbytes_read

    @contextmanager
    def layer(self, index: int, then: int | None = None) -> Iterator[nn.Module]:
        """One decoder layer, while another one is read.

        Raises:
            ModelError: a file is gone or broken, or a tensor of the layer is in none.
        """
        tensors = self._taken(index)
        names = [*tensors]
        self._parts.put(tensors)
        del tensors
        try:
            self._check_whole(index)
            if then is not None:
                self._ahead = then, self._reader.submit(self._read_touching, then)
            with evaluating(self._layers[index]) as layer:
                yield layer
        finally:
            if self._device.type == "cuda":  # what is still to be computed reads what is now forgotten
                torch.cuda.synchronize(self._device)
            self._parts.forget(names)

    def record(self, batches: Sequence[Tensor]) -> Recording:
        """Embed every batch and note what each layer is called with; one layer is there, as it may be run."""
        away = self._put_outside()
        first = self._taken(0)
        self._parts.put(first)
        try:
            return super().record(batches)
        finally:
            self._parts.forget([*first, *away])
            self._ahead = 0, Future()
            self._ahead[1].set_result(first)

    def _put_outside(self) -> list[str]:
        """Put what is outside the layers into its place; the names of all but the final norm, which is used later."""
        tensors, norm = self._read(OUTSIDE), self._family.final_norm
        away = [name for name in tensors if not (norm and name.startswith(f"{norm}."))]
        # What stays is copied: it would hold the pages of all that lies in the same file.
        self._parts.put({name: tensor if name in away else tensor.clone() for name, tensor in tensors.items()})
        return away

    def _no_states(self) -> HiddenStates:
        return HiddenStates((), self._device, self._folder)

    def whole(self) -> nn.Module:
        """Never to be had.

        Raises:
            RecipeError: always.
        """
        raise RecipeError(NO_GRADIENTS)

    def gradients(self, *_: Any, **__: Any) -> dict[int, dict[str, UnitWeights]]:
        """Never to be had.

        Raises:
            RecipeError: always.
        """
        raise RecipeError(NO_GRADIENTS)

    def _taken(self, index: int) -> dict[str, Tensor]:
        ahead, self._ahead = self._ahead, None
        return self._read(index) if ahead is None or ahead[0] != index else ahead[1].result()

    def _read(self, part: int) -> dict[str, Tensor]:
        tensors = self._parts.read(part)
        self._nbytes_read += self._parts.nbytes(part)
        return tensors if self._device.type == "cpu" else {name: t.to(self._device) for name, t in tensors.items()}

    def _read_touching(self, part: int) -> dict[str, Tensor]:
        """The same in a thread: so that nothing waits for the disk or the bus when it is used."""
        if self._copies is None:
            tensors = self._read(part)
            _touch(tensors)
            return tensors
        with torch.cuda.stream(self._copies):  # beside what is computed
            pinned = {name: tensor.pin_memory() for name, tensor in self._parts.read(part).items()}
            self._nbytes_read += self._parts.nbytes(part)
            moved = {name: tensor.to(self._device, non_blocking=True) for name, tensor in pinned.items()}
        self._copies.synchronize()
        return moved

    def _check_whole(self, index: int) -> None:
        away = [name for name, tensor in self._layers[index].named_parameters() if tensor.is_meta]
        if away:
            raise ModelError(
                f"{self._name}: '{away[0]}' of layer {index} is in none of its files under a name of its own, so "
                "layers cannot be read one at a time. Leave --stream out."
            )


NO_GRADIENTS = (
    "gradients of the loss need the whole model in memory, with what every layer saw, so they cannot be had layer by "
    "layer from disk: leave --stream out, or what reads them (taylor, --distill)."
)


def _touch(tensors: Mapping[str, Tensor]) -> None:
    """Read a byte of every page of what is mapped."""
    for tensor in tensors.values():
        if tensor.is_contiguous() and tensor.numel():
            tensor.detach().flatten().view(torch.uint8)[::_PAGE].sum()
