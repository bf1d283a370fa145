"""What a .gguf file says of itself, held against its bytes: the libraries that read it loop as often as it says."""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass, field
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from dicer.errors import ModelError
from dicer.reading import open_plain

_SCALARS = {
    **{GGUFValueType.UINT8: "B", GGUFValueType.INT8: "b", GGUFValueType.BOOL: "B"},
    **{GGUFValueType.UINT16: "H", GGUFValueType.INT16: "h", GGUFValueType.FLOAT32: "f"},
    **{GGUFValueType.UINT32: "I", GGUFValueType.INT32: "i", GGUFValueType.FLOAT64: "d"},
    **{GGUFValueType.UINT64: "Q", GGUFValueType.INT64: "q"},
}
_MOST_DIMENSIONS = 8
_MOST_READ = 100_000  # numbers of a list: one for each layer, not one for each token


@dataclass
class _Walk:
    """A file from front to back.

    Attributes:
        data: all of it.
        order: of its bytes, as struct spells it.
        at: where the next value begins.
        numbers: key -> whole numbers.
    """

    data: mmap.mmap
    order: str = "<"
    at: int = 8
    numbers: dict[str, list[int]] = field(default_factory=dict)

    def skip(self, count: int) -> None:
        if count > len(self.data) - self.at:
            raise ValueError(f"it says that {count:,} bytes come where it ends")
        self.at += count

    def read(self, form: str, count: int = 1) -> tuple[int | float, ...]:
        start, size = self.at, struct.calcsize(f"<{form}")
        self.skip(size * count)
        return struct.unpack(f"{self.order}{count}{form}", self.data[start : self.at])

    def number(self, form: str) -> int:
        return int(self.read(form)[0])

    def text(self) -> str:
        length, start = self.number("Q"), self.at
        self.skip(length)
        return self.data[start : min(self.at, start + 1000)].decode("utf-8", "replace")

    def value(self, key: str, kind: int, count: int = 1) -> None:
        if kind == GGUFValueType.STRING:
            if 8 * count > len(self.data) - self.at:
                raise ValueError(f"it says that {count:,} texts come where it ends")
            for _ in range(count):
                self.skip(self.number("Q"))
        elif kind in _SCALARS:
            form = _SCALARS[GGUFValueType(kind)]
            if form in "fd" or count > _MOST_READ:
                self.skip(struct.calcsize(f"<{form}") * count)
            else:
                self.numbers[key] = [int(value) for value in self.read(form, count)]
        else:
            raise ValueError(f"'{key:.60}' is of kind {kind}, which there is not")

    def entry(self) -> None:
        key, kind = self.text(), self.number("I")
        if kind == GGUFValueType.ARRAY:
            inner, count = self.number("I"), self.number("Q")
            self.value(key, inner, count)
        else:
            self.value(key, kind)

    def tensor(self) -> tuple[tuple[int, ...], int]:
        """(dimensions, where its data ends, counted from where all data begins)."""
        name, dimensions = self.text(), self.number("I")
        if dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"'{name:.60}' has {dimensions:,} dimensions")
        shape = tuple(map(int, self.read("Q", dimensions)))
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(self.number("I"))]
        return shape, self.number("Q") + math.prod(shape) // block * size


def check_claims(path: Path) -> None:
    """See to it that what a file says of counts and lengths can be, before anything is made of it.

    Raises:
        ModelError: it ends before what it says, or its numbers are beyond what its tensors can be.
        OSError: it cannot be opened.
    """
    try:
        with open_plain(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:4] != b"GGUF":
                raise ValueError("it does not begin with GGUF")
            _check(_Walk(data))
    except ValueError as error:
        raise ModelError(f"{path.name}: the GGUF file cannot be loaded: {error}. Fetch it again.") from None


def _check(walk: _Walk) -> None:
    (version,) = struct.unpack("<I", (walk.data[4:8] + bytes(4))[:4])
    walk.order = "<" if version & 0xFFFF else ">"
    tensors, entries = walk.number("Q"), walk.number("Q")
    for _ in range(entries):
        walk.entry()
    infos = [walk.tensor() for _ in range(tensors)]
    end = max((end for _, end in infos), default=0)
    if end > len(walk.data) - walk.at:
        raise ValueError(f"its tensors have {end:,} bytes, and {len(walk.data) - walk.at:,} are there")
    largest = max((size for shape, _ in infos for size in shape), default=0)
    for key, values in walk.numbers.items():
        kind, most = key.rpartition(".")[2], max(values, default=0)
        if kind == "block_count" and most > tensors:
            raise ValueError(f"it says {most:,} layers, and has {tensors:,} tensors")
        sizes = kind.endswith(("_count", "_length", "vocab_size")) and "context" not in kind
        if sizes and most > max(largest, tensors):
            raise ValueError(f"it says {kind} {most:,}, and the largest dimension of its tensors is {largest:,}")
