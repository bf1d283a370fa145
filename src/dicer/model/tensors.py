"""Tensors by their names on disk: what a checkpoint holds, read lazily from one file or many shards."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dicer.errors import ModelError
from dicer.reading import TABLES, check_plain, open_plain, read_json, reason

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # what can be cut


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return self.numel * self.dtype.itemsize


class Stretch(NamedTuple):
    """Where the bytes of a tensor lie: file, first byte, how many."""

    path: Path
    start: int
    nbytes: int


class Selection(NamedTuple):
    """A tensor of which only some rows along one dimension are meant: which."""

    tensor: Tensor
    dim: int
    rows: Tensor

    @property
    def info(self) -> TensorInfo:
        """Shape and dtype of these rows."""
        shape = list(self.tensor.shape)
        shape[self.dim] = len(self.rows)
        return TensorInfo(tuple(shape), self.tensor.dtype)


class TensorSource(Protocol):
    """Tensors that can be asked for by name, one at a time."""

    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor's shape and dtype, without reading it."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor."""
        ...

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start..stop-1 of one tensor, without reading the others."""
        ...


class MemorySource:
    """Tensors of a model in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor's shape and dtype."""
        return {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        """One tensor, not copied."""
        return self._tensors[name]

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of one tensor, not copied."""
        return self._tensors[name][start:stop]


class SafetensorsSource:
    """Tensors of a folder with ``model.safetensors`` or an index and its shards.

    Args:
        folder: where they are.
        files: tensor name -> file; None to find out.

    Raises:
        ModelError: no weights, two different sets of them, only pickled weights, a missing, truncated or corrupt shard,
            an index that points out of the folder or at tensors that its shards do not hold, or a dtype that cannot be
            pruned.
    """

    def __init__(self, folder: Path, files: Mapping[str, str] | None = None) -> None:
        self._folder = folder
        self._files = dict(_one_set(folder) if files is None else files)
        self._renamed: dict[str, str] = {}
        self._starts: dict[Path, dict[str, int]] = {}
        self._infos: dict[str, TensorInfo] = {}
        for file in sorted(set(self._files.values())):
            held = self._read_header(file)
            self._infos.update((name, info) for name, info in held.items() if self._files.get(name, file) == file)
            missing = [name for name, where in self._files.items() if where == file and name not in held and name]
            if missing:
                raise ModelError(
                    f"{folder}: the index says that {file} holds '{missing[0]}', but it does not. "
                    "Fetch the model again: index and shards are from different versions."
                )
        self._files = {name: self._files.get(name, WEIGHTS) for name in self._infos}
        self._opened = {file: _stamp(folder / file) for file in self.files}

    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor's shape and dtype, from the headers alone."""
        return self._infos

    @property
    def files(self) -> list[str]:
        """The names of the files that hold them."""
        return sorted(set(self._files.values()))

    def changed(self) -> str | None:
        """The first file that is no longer as it was when it was opened, by size and time."""
        return next((file for file, stamp in self._opened.items() if _stamp(self._folder / file) != stamp), None)

    def leave_out(self, names: Collection[str]) -> None:
        """Be as if these tensors were not there."""
        self._infos = {name: info for name, info in self._infos.items() if name not in names}

    def rename(self, new: Mapping[str, str]) -> None:
        """Have tensors under other names than those in the files: name -> new name."""
        self._infos = {new.get(known, known): info for known, info in self._infos.items()}
        self._renamed |= {other: self._renamed.get(name, name) for name, other in new.items()}

    def read(self, name: str) -> Tensor:
        """One tensor, read from its shard."""
        stored = self._renamed.get(name, name)
        with self._open(self._files[stored]) as shard:
            tensor: Tensor = shard.get_tensor(stored)
            return tensor

    def read_all(self, names: Collection[str]) -> dict[str, Tensor]:
        """Several tensors; each shard is opened once, and mapped until the last of its tensors is gone."""
        stored, found = {name: self._renamed.get(name, name) for name in names}, dict[str, Tensor]()
        for file in dict.fromkeys(self._files[own] for own in stored.values()):
            with self._open(file) as shard:
                found.update({n: shard.get_tensor(own) for n, own in stored.items() if self._files[own] == file})
        return found

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start..stop-1 of one tensor; only they are read."""
        stored = self._renamed.get(name, name)
        with self._open(self._files[stored]) as shard:
            rows: Tensor = shard.get_slice(stored)[start:stop]
            return rows

    def stretch(self, name: str) -> Stretch:
        """Where the bytes of one tensor are."""
        stored = self._renamed.get(name, name)
        path = self._folder / self._files[stored]
        if path not in self._starts:
            with self._open(self._files[stored]), open_plain(path) as file:  # which sees that its header is in order
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
            places = {own: said["data_offsets"] for own, said in header.items() if own != "__metadata__"}
            self._starts[path] = {own: 8 + length + start for own, (start, _) in places.items()}
        return Stretch(path, self._starts[path][stored], self._infos[name].nbytes)

    def _read_header(self, file: str) -> dict[str, TensorInfo]:
        infos = {}
        with self._open(file) as shard:
            for name in shard.keys():  # noqa: SIM118 - not a dict
                piece = shard.get_slice(name)
                dtype = DTYPES.get(piece.get_dtype())
                if dtype is None:
                    raise ModelError(
                        f"{self._folder / file}: tensor '{name}' has dtype {piece.get_dtype()}, which cannot "
                        "be pruned. Use the checkpoint in bf16, fp16 or fp32."
                    )
                infos[name] = TensorInfo(tuple(piece.get_shape()), dtype)
        return infos

    @contextmanager
    def _open(self, file: str) -> Iterator[Any]:
        path = self._folder / file
        try:
            check_plain(path)
            with safe_open(path, framework="pt") as shard:
                yield shard
        except FileNotFoundError:
            raise ModelError(
                f"{self._folder}: weight file {file} is missing. Fetch the model again, or finish the download."
            ) from None
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {reason(error)}. Check its permissions.") from None
        except SafetensorError as error:
            raise ModelError(
                f"{path} cannot be read: {error}. The file is truncated or corrupt; fetch it again."
            ) from None


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _one_set(folder: Path) -> dict[str, str]:
    """Tensor name -> file, of the one set of weights that is there; transformers reads model.safetensors before shards.

    A single file is the one entry {"": file}, as its header is the only list of names.
    """
    single = {"": WEIGHTS}
    if not (folder / WEIGHTS).is_file():
        return _weight_map(folder)
    if not (folder / INDEX).is_file():
        return single
    indexed = _weight_map(folder)
    others = sorted({file for file in indexed.values() if file != WEIGHTS})
    if not others:
        return indexed
    if not any((folder / file).is_file() for file in others):  # an index that was left behind
        return single
    if fingerprint(SafetensorsSource(folder, single)) != fingerprint(SafetensorsSource(folder, indexed)):
        raise ModelError(
            f"{folder} holds two different sets of weights, {WEIGHTS} and {INDEX} with {others[0]} ...; transformers "
            "loads the first, others may load the second. Move one of them out of the folder."
        )
    return single


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> file, from the index.

    Raises:
        ModelError: there is none, or a broken one.
    """
    index = folder / INDEX
    try:
        weight_map = read_json(index, TABLES)["weight_map"]
        files = {str(name): str(file) for name, file in weight_map.items()}
    except FileNotFoundError:
        raise ModelError(_no_weights(folder)) from None
    except OSError as error:
        raise ModelError(f"{index} cannot be read: {reason(error)}. Check its permissions.") from None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index} is not a weight index: {error!r}. Fetch the model again.") from None
    for file in files.values():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ModelError(f"{index} names '{file}', which is not a .safetensors file of this folder. Not read.")
    return files


def _no_weights(folder: Path) -> str:
    """What a folder without weights that can be read holds in their place."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    if shards := [n for n in names if re.fullmatch(r"model-\d+-of-\d+\.safetensors", n)]:
        return (
            f"{folder} has shards ({shards[0]}) and no {INDEX} that says which is whose. Fetch that file, or all again."
        )
    if others := [n for n in names if n.endswith(".safetensors")]:
        return (
            f"{folder} has no {WEIGHTS}, and {others[0]} is not read: consolidated files are in the layout of the "
            f"original release, variants and others are to be renamed {WEIGHTS}. Use the release for transformers."
        )
    if pickles := [n for n in names if n.endswith(".bin")] + [n for n in names if Path(n).suffix.startswith(".pt")]:
        return (
            f"{folder} has only pickled weights ({pickles[0]}); pickle can run any code, so dicer does not open it. "
            "Convert the model to safetensors, or use a revision that has them."
        )
    if gguf := [n for n in names if n.endswith(".gguf")]:
        return f"{folder} has no {WEIGHTS}; give the .gguf file itself: {folder / gguf[0]}."
    return f"{folder} has no weights: neither {WEIGHTS} nor {INDEX} is there."


def fingerprint(source: TensorSource) -> str:
    """A hash that tells two models apart without reading them whole: every name, shape, dtype, first and last row.

    The same for every sharding, and for the model in memory.
    """
    digest = hashlib.sha256()
    for name, info in sorted(source.infos().items()):
        digest.update(f"{name} {info.shape} {info.dtype}\n".encode())
        if info.shape and info.shape[0]:
            for start in (0, info.shape[0] - 1):
                row = source.read_rows(name, start, start + 1).detach().cpu().contiguous()
                digest.update(row.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
