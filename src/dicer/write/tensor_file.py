"""A safetensors file, written one tensor at a time: the bytes that safetensors would write of all of them at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dicer.model.tensors import DTYPES, TensorInfo

# As safetensors orders them: the largest first, so that every tensor begins at a multiple of its size.
_ORDER = ["BOOL", "U8", "I8", "I16", "F16", "BF16", "I32", "F32", "F64", "I64"]
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNED = 8  # bytes; the header ends at a multiple


Read = Callable[[str], Tensor | Iterator[Tensor]]  # a tensor, or its rows a few at a time


def write_file(path: Path, infos: Mapping[str, TensorInfo], read: Read) -> None:
    """Write tensors to a file; one of them, or a few of its rows, is in memory at a time.

    Args:
        path: the file.
        infos: every tensor of it.
        read: makes one tensor.

    Raises:
        OSError: it cannot be written.
        ValueError: a tensor is not what its info says.
    """
    names = sorted(infos, key=lambda name: (-_ORDER.index(_NAMES[infos[name].dtype]), name.encode()))
    with path.open("xb") as file:
        file.write(_header(names, infos))
        for name in names:
            found = read(name)
            if isinstance(found, Tensor) and (tuple(found.shape), found.dtype) != (
                infos[name].shape,
                infos[name].dtype,
            ):
                raise ValueError(f"'{name}' is {tuple(found.shape)} {found.dtype}, and not {infos[name]}")
            for piece in [found] if isinstance(found, Tensor) else found:
                if piece.numel():
                    flat = piece.detach().cpu().contiguous().reshape(-1)
                    file.write(flat.view(torch.uint8).numpy().data)


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
