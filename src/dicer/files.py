"""Files that are whole or not there, where one may be written, and how numbers are said in them."""

from __future__ import annotations

import math
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock

from dicer.errors import OutputError

_BEGIN, _END = ".dicer-", ".partial"  # how the name of an unfinished thing begins and ends
_LOCK = ".lock"  # in it; held by who makes it
_MOMENT = 60  # seconds, in which a new one may not be locked yet


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """A new folder in which to make what is then renamed to ``path``; it goes when the block ends, however that ends.

    Its name is new and it is open to this user alone, so nobody can have put a link there that would be written
    through. The folder of ``path`` is made where there is none, and what kills have left there goes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(path.parent)
    with ExitStack() as stack:
        with undisturbed():
            folder = Path(stack.enter_context(_new_folder(path.parent)))
            lock = filelock.FileLock(folder / _LOCK, timeout=0, fallback_to_soft=False)
            with suppress(OSError):  # a file system without locks
                lock.acquire()
            stack.callback(lock.release)
        yield folder


@contextmanager
def _new_folder(parent: Path) -> Iterator[str]:
    folder = tempfile.TemporaryDirectory(_END, f"{_BEGIN}{os.getpid()}-", parent, ignore_cleanup_errors=True)
    try:
        yield folder.name
    finally:
        with undisturbed():
            folder.cleanup()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Let signals that raise an exception (Ctrl-C) wait for the end of the block, so that it is done whole."""
    waiting: list[int] = []
    numbers: list[int] = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    own = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in numbers if own and callable(signal.getsignal(number))}
    for number in before:
        signal.signal(number, lambda other, _: waiting.append(other))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in waiting[:1]:
            signal.raise_signal(number)


def write_whole(path: Path, content: str | bytes, *, sync: bool = False) -> None:
    """Write a file so that a kill at any moment leaves the old file, the new one or none.

    Args:
        path: the file. Of a link, the link is replaced; who means the file that it points to resolves it first.
        content: text is written as UTF-8.
        sync: wait until the content is on the disk, before it gets its name.

    Raises:
        OSError: it cannot be written; then all is as it was.
    """
    with folder_beside(path) as folder:
        made = folder / "new"
        with made.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        made.replace(path)


def remove_whole(folder: Path) -> None:
    """Take a folder away, as far as that can be done: a kill leaves all of it, or nothing that a run goes on from."""
    if folder.is_dir():
        with suppress(OSError), folder_beside(folder) as scratch:
            folder.rename(scratch / "old")


def unfinished(folder: Path) -> set[Path]:
    """What kills have left of :func:`folder_beside` in a folder, or what others are writing there now."""
    return set(folder.glob(f"{_BEGIN}*{_END}"))


def remove_unfinished(folder: Path) -> None:
    """Take away what kills have left there; what others write now stays."""
    for left in unfinished(folder):
        if left.is_dir() and not left.is_symlink() and is_own(left) and _is_dead(left):
            shutil.rmtree(left, ignore_errors=True)


def _is_dead(left: Path) -> bool:
    """Whether nobody holds the lock in it; the number in its name says who has made it and not locked it yet."""
    maker = left.name.removeprefix(_BEGIN).partition("-")[0]
    number = int(maker) if maker.isdecimal() else 0
    is_new = time.time() - left.stat().st_mtime < _MOMENT
    if is_new and (number == os.getpid() and not (left / _LOCK).exists()):  # another thread, perhaps
        return False
    if is_new and number != os.getpid() and _is_alive(number):
        return False
    lock = filelock.FileLock(left / _LOCK, timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except (filelock.Timeout, OSError):
        return False
    lock.release()
    return True


def _is_alive(process: int) -> bool:
    """Whether there is a process of this number here; where asking would end it, there may be."""
    if not process:
        return False
    try:
        if os.name == "posix":
            os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def is_own(path: Path) -> bool:
    """Whether this user made it, as far as the system says who made what."""
    return not hasattr(os, "getuid") or path.lstat().st_uid == os.getuid()


@contextmanager
def as_output_error(what: object) -> Iterator[None]:
    """Turn an OSError into the one line that ``what`` cannot be written, and why."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write {what}: {error.strerror or error}.") from error


def check_writable(path: Path, inputs: Iterable[str | os.PathLike[str] | None] = ()) -> Path:
    """See to it that something can be made at a path and that a run reads nothing there, before hours go into it.

    Args:
        path: what will be written, a file or a folder; folders above it may be missing.
        inputs: what the run reads, as it was typed; what is no path that is there counts for nothing.

    Returns:
        The place that the path leads to, links followed.

    Raises:
        OutputError: it is or holds the current folder or an input, or nothing can be made there.
    """
    target = Path(os.path.realpath(path))
    if Path.cwd().is_relative_to(target):
        raise OutputError(f"output {path} is the folder that you are in, or holds it; choose a place of its own.")
    for name in inputs:
        if name and is_there(name) and Path(name).resolve().is_relative_to(target):
            raise OutputError(f"output {path} is or holds {name}, which this run reads; choose another place.")
    with as_output_error(path):
        if any(place.is_symlink() for place in (target, *target.parents)):  # what realpath leaves of a loop
            raise OutputError(f"cannot write {path}: it is or lies in a link that leads to itself.")
        with suppress(FileNotFoundError, NotADirectoryError):
            target.lstat()  # says so where the name is too long
        parent = next(place for place in target.parents if place.exists())
        if not parent.is_dir():
            raise OutputError(f"cannot write {path}: {parent} is a file.")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise OutputError(f"cannot write {path}: no permission to write in {parent}.")
    return target


def nearest_folder(path: Path) -> Path:
    """The folder in which, or in a folder below which, something will be made: one that is there."""
    return next(place for place in Path(os.path.realpath(path)).parents if place.is_dir())


def is_there(name: str | os.PathLike[str]) -> bool:
    """Whether a path is there; not, where nobody may look or no disk takes the name."""
    with suppress(OSError):
        return Path(name).exists()
    return False


def finite(value: Any) -> Any:
    """A value as JSON can say it. JSON has no infinity and no NaN: they become the text that ``float`` reads back."""
    if isinstance(value, Mapping):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
