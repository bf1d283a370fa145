"""The output folder: what may be written where, and a checkpoint that appears whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import filelock
from torch import Tensor

from dicer.errors import OutputError
from dicer.files import as_output_error, check_writable
from dicer.model.tensors import INDEX, WEIGHTS, TensorInfo
from dicer.write.tensor_file import Read, write_file

SHARD_BYTES = 2 * 1024**3  # of one file of the output
_MARKER = ".dicer-partial"  # tells our own unfinished folder from one of the user's
_OLD = "old"  # inside it: the checkpoint that --overwrite replaces, between two renames
_MADE_BY_DICER = "dicer_plan.json"  # in every checkpoint and plan of ours; nothing else is overwritten
MADE_BY_EXPORT = "dicer_export.json"  # instead of it in every stock checkpoint that was padded
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # what file systems without locks answer
_MARGIN = 16 * 1024**2  # configs, tokenizer and plan, beside the weights


class CheckpointSink:
    """A checkpoint folder in the making: written inside ``<out>.partial``, renamed when whole.

    Use as a context manager. After an exception the partial folder is removed; after a kill it stays under a name that
    nothing loads and that the next run clears away. With ``overwrite`` the old folder is replaced only after the new
    one is whole; a kill between the two renames leaves it in the partial folder, and the next run puts it back. A lock
    on the marker, which ends with the process, keeps a second run away from the folder of a first that still writes.

    Raises:
        OutputError: the folder is there and not empty, or is no folder, another run writes it, it cannot be written, or
            the disk is too full.
    """

    def __init__(self, out: Path, *, overwrite: bool = False, shard_bytes: int = SHARD_BYTES) -> None:
        check_output(out, overwrite=overwrite)
        self.out = out.resolve()  # of a link, the folder that it points to is replaced
        self._partial = _partial(self.out)
        self._marker = self._partial / _MARKER
        self.folder = self._partial / "new"
        self._overwrite = overwrite
        self._shard_bytes = shard_bytes

    def __enter__(self) -> CheckpointSink:
        with as_output_error(self.out):
            if self._partial.exists() and not self._marker.exists():
                self._refuse_others()
            self._partial.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self._marker, self.out)
            try:
                self._put_back()
                self._refuse_others()
                self.folder.mkdir()
            except BaseException:
                self._lock.release()
                raise
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: object) -> None:
        with as_output_error(self.out):
            try:
                if error is None:
                    try:
                        self._finish()
                    finally:
                        self._clear()
                    return
                with suppress(OSError):
                    self._clear()
                if isinstance(error, OSError):
                    raise error
            finally:
                self._lock.release()

    def _refuse_others(self) -> None:
        if any(path != self._marker for path in self._partial.iterdir()):
            raise OutputError(f"{self._partial} is in the way and was not made by dicer; move it away.")

    def _finish(self) -> None:
        _check_held(self.out, self.out, self._overwrite)  # once more: hours may have gone by
        if self.out.exists():
            self.out.rename(self._partial / _OLD)
        self.folder.rename(self.out)

    def _put_back(self) -> None:
        """Put back what a kill or an error left aside, and take away what it left unfinished."""
        old = self._partial / _OLD
        if old.is_dir() and not self.out.exists():
            old.rename(self.out)
        for inner in (self.folder, old):
            if inner.is_dir():  # anything else is none of ours
                shutil.rmtree(inner)

    def _clear(self) -> None:
        """Then take the partial folder away, its marker last."""
        self._put_back()
        with suppress(PermissionError):  # Windows keeps an open file; there it goes with the lock
            self._marker.unlink()
        self._lock.release()
        try:
            self._partial.rmdir()
        except OSError:
            if not self._marker.exists():  # else the next run is in already
                raise

    def write_tensors(self, infos: Mapping[str, TensorInfo], read: Read, progress: Callable[[int], None]) -> None:
        """Write all weights, one tensor in memory at a time.

        Args:
            infos: every tensor that will be written, in the order of writing; the shards are laid out from this.
            read: makes one tensor, or its rows a few at a time.
            progress: called with the number of tensors done.
        """
        shards = list(_shards(infos, self._shard_bytes))
        names = [WEIGHTS] if len(shards) == 1 else [_shard_name(i, len(shards)) for i in range(len(shards))]
        done = 0

        def counted(name: str) -> Tensor | Iterator[Tensor]:
            nonlocal done
            progress(done := done + 1)
            return read(name)

        for file, members in zip(names, shards, strict=True):
            write_file(self.folder / file, {name: infos[name] for name in members}, counted)
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


def check_output(out: Path, *, overwrite: bool, inputs: Iterable[str | os.PathLike[str] | None] = ()) -> None:
    """Refuse an output folder that would lose something or cannot be made, before any work is done.

    Args:
        out: the folder to write.
        overwrite: whether what dicer wrote there before may be replaced.
        inputs: what the run reads (model folder, plan, recipe, text); none of it may lie in ``out``.

    Raises:
        OutputError: it is no folder, or not empty without ``overwrite``, or was not written by dicer, or holds an
            input, or lies where nothing can be written.
    """
    target = check_writable(out, inputs)
    with as_output_error(out):
        marker = _partial(target) / _MARKER
        if marker.exists():
            _locked(marker, out, keep=True).release()
        _check_held(target, out, overwrite)


def _check_held(target: Path, out: Path, overwrite: bool) -> None:
    """Refuse what is there already, or was set aside, unless it may go."""
    if target.exists() and not target.is_dir():
        kind = "a file" if target.is_file() else "no folder"
        raise OutputError(f"output {out} is {kind}; choose a folder that does not exist yet.")
    held = target if target.exists() else _partial(target) / _OLD  # set aside by a run that was killed
    if not held.is_dir() or not any(held.iterdir()):
        return
    if not overwrite:
        raise OutputError(f"output folder {out} is not empty. Choose another, or pass --overwrite to replace it.")
    if not any((held / name).is_file() for name in (_MADE_BY_DICER, MADE_BY_EXPORT)):
        raise OutputError(
            f"{out} holds no {_MADE_BY_DICER}, so dicer did not write it; --overwrite leaves it. Choose another folder."
        )


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


def _partial(target: Path) -> Path:
    return target.with_name(target.name + ".partial")


def _locked(marker: Path, out: Path, *, keep: bool = False) -> filelock.BaseFileLock:
    """The lock on a marker file, held by this process where the file system has locks.

    Args:
        marker: the file, made where there is none.
        out: the folder that it stands for.
        keep: leave the file where it is on release; Windows removes it else.

    Raises:
        OutputError: another run holds it.
    """
    # No soft lock in place of a missing one: that outlives a kill.
    lock = filelock.FileLock(marker, timeout=0, fallback_to_soft=False, preserve_lock_file=keep)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise OutputError(
            f"another run of dicer writes {out} now; wait for its end, or choose another folder."
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return lock


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
    return any((place / _MARKER).exists() for place in (folder, folder.resolve().parent))
