"""A safetensors file, written one tensor at a time: the bytes that safetensors would write of all of them at once."""

from __future__ import annotations

import errno
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from dicer.model.tensors import DTYPES, Stretch, TensorInfo
from dicer.reading import open_plain

# As safetensors orders them: the largest first, so that every tensor begins at a multiple of its size.
_ORDER = ["BOOL", "U8", "I8", "I16", "F16", "BF16", "I32", "F32", "F64", "I64"]
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNED = 8  # bytes; the header ends at a multiple


_NO_COPIES = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF, errno.ETXTBSY)
_CALL = 2**30  # bytes that are asked of the system at once; it copies 2 GiB at most
_PIECE = 2**24  # bytes, where it cannot copy from file to file

Read = Callable[[str], Tensor | Stretch]  # a tensor, or where its bytes are


def write_file(path: Path, infos: Mapping[str, TensorInfo], read: Read) -> None:
    """Write tensors to a file; one of them is written and the next one read at a time, and what is copied is not read.

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
        for name, found in zip(names, _one_ahead(names, read), strict=True):
            if isinstance(found, Stretch):
                _copy(file, found)
                continue
            if (tuple(found.shape), found.dtype) != (infos[name].shape, infos[name].dtype):
                raise ValueError(f"'{name}' is {tuple(found.shape)} {found.dtype}, and not {infos[name]}")
            if found.numel():
                _write(file, found.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _one_ahead(names: Iterable[str], read: Read) -> Iterator[Tensor | Stretch]:
    """What is read, while the next is read already."""
    coming: deque[Future[Tensor | Stretch]] = deque()
    with ThreadPoolExecutor(1) as reader:
        for name in names:
            coming.append(reader.submit(read, name))
            if len(coming) == 2:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


def _write(file: FileIO, content: memoryview) -> None:
    while content:
        content = content[file.write(content) :]


def _copy(file: FileIO, stretch: Stretch) -> None:
    """Let the system copy from file to file, which makes no copy at all on some disks; piece by piece where it cannot.

    Raises:
        OSError: as with any writing, or where the file has become shorter.
    """
    start, left = stretch.start, stretch.nbytes
    with open_plain(stretch.path) as source:
        while left:
            try:
                done = os.copy_file_range(source.fileno(), file.fileno(), min(left, _CALL), start)
            except (AttributeError, OSError) as error:
                if isinstance(error, OSError) and error.errno not in _NO_COPIES:
                    raise
                source.seek(start)
                content = source.read(min(left, _PIECE))
                _write(file, memoryview(content))
                done = len(content)
            if not done:
                raise OSError(errno.EIO, "it has become shorter while it was read", str(stretch.path))
            start, left = start + done, left - done


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
