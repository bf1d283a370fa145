"""The output folder: what may be written where, and a checkpoint that appears whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event, Lock

from dicer.errors import OutputError
from dicer.files import as_output_error
from dicer.holds import MADE_BY_EXPORT as MADE_BY_EXPORT
from dicer.holds import MARKER, check_held, taken
from dicer.holds import check_output as check_output
from dicer.model.tensors import INDEX, WEIGHTS, TensorInfo
from dicer.write.tensor_file import Found, Read, write_file

SHARD_BYTES = 2 * 1024**3  # of one file of the output
_AT_ONCE = 2  # shards; more only wait for the same disk
_MARGIN = 16 * 1024**2  # configs, tokenizer and plan, beside the weights


class CheckpointSink:
    """A checkpoint folder in the making (:class:`dicer.holds.Place`).

    Use as a context manager. With ``overwrite`` the old folder is replaced only after the new one is whole.

    Raises:
        OutputError: the folder is there and not empty, or is no folder, another run writes it, it cannot be written, or
            the disk is too full.
    """

    def __init__(self, out: Path, *, overwrite: bool = False, shard_bytes: int = SHARD_BYTES) -> None:
        check_output(out, overwrite=overwrite)
        self.out = out.resolve()
        self._place = taken(out)
        self.folder = self._place.new
        self._overwrite = overwrite
        self._shard_bytes = shard_bytes

    def __enter__(self) -> CheckpointSink:
        self._place.__enter__()
        with as_output_error(self.out):
            try:
                self.folder.mkdir()
            except BaseException as error:
                self._place.__exit__(type(error), error, None)
                raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        with as_output_error(self.out):
            try:
                if error is None:
                    check_held(self.out, self.out, self._overwrite)  # once more: hours may have gone by
                    self._place.finish()
            except BaseException as other:
                kind, error = type(other), other
                raise
            finally:
                self._place.__exit__(kind, error, None)
            if isinstance(error, OSError):
                raise error

    def write_tensors(self, infos: Mapping[str, TensorInfo], read: Read, progress: Callable[[int], None]) -> None:
        """Write all weights, two shards at once; of each one tensor is written and the next one made.

        Args:
            infos: every tensor that will be written, in the order of writing; the shards are laid out from this.
            read: makes one tensor, or says where its bytes are; called in threads.
            progress: called with the number of tensors done.
        """
        shards = list(_shards(infos, self._shard_bytes))
        names = [WEIGHTS] if len(shards) == 1 else [_shard_name(i, len(shards)) for i in range(len(shards))]
        done, one_by_one, stop = 0, Lock(), Event()

        def counted(name: str) -> Found:
            nonlocal done
            with one_by_one:
                if stop.is_set():
                    raise InterruptedError("the other shard could not be written")
                progress(done := done + 1)
            return read(name)

        def write(file: str, members: list[str]) -> None:
            write_file(self.folder / file, {name: infos[name] for name in members}, counted)

        with ThreadPoolExecutor(_AT_ONCE) as writers:
            try:
                coming = [writers.submit(write, *shard) for shard in zip(names, shards, strict=True)]
                for shard in wait(coming, return_when=FIRST_EXCEPTION).done:
                    shard.result()
            except BaseException:
                stop.set()
                writers.shutdown(wait=False, cancel_futures=True)
                raise
        counts = {
            "total_parameters": sum(info.numel for info in infos.values()),
            "total_size": sum(info.nbytes for info in infos.values()),
        }
        files = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        # Also of one shard: without an index some loaders read whatever ends in .safetensors. Last, so that it never
        # points at a shard that is not there.
        self.write_json(INDEX, {"metadata": counts, "weight_map": files})

    def write_json(self, name: str, value: object) -> None:
        """One JSON file, keys sorted, so that the same content gives the same bytes."""
        self.write_text(name, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """One text file."""
        (self.folder / name).write_text(text, encoding="utf-8")


def check_space(out: Path, weight_bytes: int) -> None:
    """Refuse, before any work is done, when the disk cannot hold the weights.

    Raises:
        OutputError: with the bytes that are needed and those that are free.
    """
    parent = next(p for p in out.resolve().parents if p.exists())
    need, free = weight_bytes + _MARGIN, shutil.disk_usage(parent).free
    if need > free:
        raise OutputError(
            f"{out} needs {need / 1e9:.2f} GB and {free / 1e9:.2f} GB are free on that disk. Make room, or choose "
            "another folder."
        )


def _shards(infos: Mapping[str, TensorInfo], limit: int) -> Iterable[list[str]]:
    shard: list[str] = []
    size = 0
    for name, info in infos.items():
        if shard and size + info.nbytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += info.nbytes
    yield shard


def _shard_name(index: int, count: int) -> str:
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def is_unfinished(folder: Path) -> bool:
    """Whether a folder is one that a :class:`CheckpointSink` writes, or that a kill left behind."""
    return any((place / MARKER).exists() for place in (folder, folder.resolve().parent))
