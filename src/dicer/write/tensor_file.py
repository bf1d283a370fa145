"""A safetensors file, written piece by piece: the bytes that safetensors would write of all tensors at once."""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dicer.model.tensors import DTYPES, Selection, Stretch, TensorInfo
from dicer.reading import open_plain

# As safetensors orders them: the largest first, so that every tensor begins at a multiple of its size.
_ORDER = ["BOOL", "U8", "I8", "I16", "F16", "BF16", "I32", "F32", "F64", "I64"]
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNED = 8  # bytes; the header ends at a multiple


_PIECE = 2**24  # bytes that go through memory at once
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # which numpy has, for what it has not

Found = Tensor | Selection | Stretch  # a tensor, rows of one, or where its bytes are
Read = Callable[[str], Found]


def write_file(path: Path, infos: Mapping[str, TensorInfo], read: Read) -> None:
    """Write tensors to a file, piece by piece: one is written while the next is made.

    Args:
        path: the file.
        infos: every tensor of it.
        read: makes one tensor; called in a thread of its own.

    Raises:
        OSError: it cannot be written.
        ValueError: a tensor is not what its info says.
    """
    names = sorted(infos, key=lambda name: (-_ORDER.index(_NAMES[infos[name].dtype]), name.encode()))
    with path.open("xb", buffering=0) as file:
        _write(file, memoryview(_header(names, infos)))
        for piece in _one_ahead(_pieces(names, infos, read)):
            _write(file, piece)


def _pieces(names: Iterable[str], infos: Mapping[str, TensorInfo], read: Read) -> Iterator[memoryview]:
    """The bytes of all tensors."""
    rooms = cycle([_Room(), _Room()])  # what is written lies in one, what is made next in the other
    for name in names:
        found = read(name)
        if isinstance(found, Stretch):
            yield from _copied(found, rooms)
            continue
        made = found.info if isinstance(found, Selection) else TensorInfo(tuple(found.shape), found.dtype)
        if made != infos[name]:
            raise ValueError(f"'{name}' is {made}, and not {infos[name]}")
        if isinstance(found, Selection):
            yield from _selected(found, rooms)
        elif found.numel():
            yield found.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


class _Room:
    """Memory that is used again and again: to get new pages costs more than to fill them."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def array(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """An array whose content is what was left there."""
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes > len(self._bytes):
            self._bytes = np.empty(nbytes, np.uint8)
        return self._bytes[:nbytes].view(dtype).reshape(shape)


def _copied(found: Stretch, rooms: Iterator[_Room]) -> Iterator[memoryview]:
    """Bytes of a file. The system's own copying from file to file is no quicker, and is not to be had everywhere.

    Raises:
        OSError: it cannot be read, or has become shorter.
    """
    left = found.nbytes
    with open_plain(found.path) as source:
        source.seek(found.start)
        while left:
            piece = memoryview(next(rooms).array((min(left, _PIECE),), np.dtype(np.uint8)))
            done = source.readinto(piece)
            if not done:
                raise OSError(errno.EIO, "it has become shorter while it was read", str(found.path))
            left -= done
            yield piece[:done]


def _selected(found: Selection, rooms: Iterator[_Room]) -> Iterator[memoryview]:
    """Rows of a tensor along one dimension, so many bytes at a time.

    Raises:
        ValueError: rows that it does not have.
    """
    tensor, dim, rows = found
    count, index = tensor.shape[dim], rows.numpy()
    if len(index) and not 0 <= index.min() <= index.max() < count:
        raise ValueError(f"rows {index.min()} to {index.max()} are asked for of {count}")
    if not found.info.numel:  # no room is taken for nothing: the piece before it may still be written from the other
        return
    outer, inner = math.prod(tensor.shape[:dim]), math.prod(tensor.shape[dim + 1 :])
    whole = tensor.view(_BITS[tensor.dtype.itemsize]).numpy().reshape(outer, count, inner)
    nbytes = inner * whole.itemsize
    if outer == 1:
        step = max(_PIECE // nbytes, 1)
        parts = ((whole[0], index[start : start + step], 0) for start in range(0, len(index), step))
    else:
        step = max(_PIECE // (nbytes * len(index)), 1)
        parts = ((whole[start : start + step], index, 1) for start in range(0, outer, step))
    for part, chosen, axis in parts:
        shape = (len(chosen), inner) if axis == 0 else (len(part), len(chosen), inner)
        array = next(rooms).array(shape, whole.dtype)
        np.take(part, chosen, axis=axis, out=array, mode="clip")  # which needs no copy, and all are inside
        yield array.reshape(-1).view(np.uint8).data


def _one_ahead(pieces: Iterator[memoryview]) -> Iterator[memoryview]:
    """The same, each made while the one before it is used."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, pieces, None)
        while (piece := coming.result()) is not None:
            coming = reader.submit(next, pieces, None)
            yield piece


def _write(file: FileIO, content: memoryview) -> None:
    while content:
        content = content[file.write(content) :]


def _header(names: list[str], infos: Mapping[str, TensorInfo]) -> bytes:
    said: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in names:
        end = start + infos[name].nbytes
        said[name] = {
            "dtype": _NAMES[infos[name].dtype],
            "shape": list(infos[name].shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(said, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNED)
    return len(text).to_bytes(8, "little") + text
