"""Places: each is held by one run from its first moment, and what is made there is whole or not there."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Self

import filelock

from dicer.errors import ExperimentError, OutputError
from dicer.files import as_output_error, check_writable, is_own, remove_unfinished, undisturbed
from dicer.reading import read_json

MARKER = ".dicer-partial"  # tells our own unfinished folder from one of the user's, and is locked by who makes it
MADE_BY_DICER = "dicer_plan.json"  # in every checkpoint and plan of ours; nothing else is overwritten
MADE_BY_EXPORT = "dicer_export.json"  # instead of it in every stock checkpoint that was padded
_OLD, _NEW = "old", "new"  # inside: what --overwrite replaces, where the system cannot exchange two names; what is made
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # what file systems without locks answer
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)
_TRIES, _BETWEEN = 20, 0.01  # seconds
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD, RENAME_EXCHANGE


class Place:
    """Where a run makes a file or a folder: ``<out>.partial`` is this run's alone until the block ends.

    What is to be there is made as :attr:`new`, and :meth:`finish` gives it its name. Without that nothing of it is left
    after the block. After a kill it stays under a name that nothing loads, and the next run clears it away. A lock on
    the marker, which ends with the process, keeps every other run away.

    Raises:
        OutputError: another run holds it (with who that is), something else is in the way, or it cannot be made.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = Path(os.path.realpath(out))  # of a link, what it points to is replaced
        self.folder = partial(self.path)
        self.new = self.folder / _NEW
        self.is_taken = False  # by who makes something in it, after it was claimed
        self._old = self.folder / _OLD
        self._marker = self.folder / MARKER
        self._lock: filelock.BaseFileLock | None = None
        self._parents: list[Path] = []  # those that were made for it

    def __enter__(self) -> Self:
        if self._lock is not None:
            return self
        try:
            with as_output_error(self.out), undisturbed():
                self._take()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def _take(self) -> None:
        self._parents = [parent for parent in self.path.parents if not parent.exists()]
        if self.folder.is_symlink() or (self.folder.exists() and not is_own(self.folder)):
            raise self._in_the_way()
        if self.folder.exists() and not self._marker.exists():
            self._refuse_others()
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(self.folder.parent)
        self._lock = locked(self._marker, self.out)
        try:
            self.put_back()
            self._refuse_others()
            _say_who(self._marker)
        except BaseException:
            self._lock.release()
            self._lock = None
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with undisturbed():
            try:
                with as_output_error(self.out) if error is None else suppress(OSError):
                    if self._lock is not None:
                        self._clear()
            finally:
                if self._lock is not None:
                    self._lock.release()
                self._lock = None
                if not self.path.exists():
                    self._leave_parents()

    def finish(self) -> None:
        """Give what was made its name; what had it goes, at the same moment where the system can do that."""
        if not self.path.is_dir() or not self.new.is_dir():
            self.new.replace(self.path)
        elif not exchange(self.new, self.path):
            self.path.rename(self._old)
            self.new.rename(self.path)

    def put_back(self) -> None:
        """Put back what a kill or an error left aside, and take away what it left unfinished."""
        if self._old.is_dir() and not self.path.exists():
            self._old.rename(self.path)
        for inner in (self.new, self._old):
            if inner.is_dir():  # of other things only a file is ours
                shutil.rmtree(inner)
            elif inner.is_file() and inner == self.new:
                inner.unlink()

    def _clear(self) -> None:
        """Take the folder away, its marker last."""
        self.put_back()
        with suppress(PermissionError):  # Windows keeps an open file; there it goes with the lock
            self._marker.unlink()
        assert self._lock is not None
        self._lock.release()
        try:
            self.folder.rmdir()
        except OSError:
            if not self._marker.exists():  # else the next run is in already
                raise

    def _leave_parents(self) -> None:
        for parent in self._parents:
            with suppress(OSError):  # somebody put something there
                parent.rmdir()

    def _refuse_others(self) -> None:
        if any(path != self._marker for path in self.folder.iterdir()):
            raise self._in_the_way()

    def _in_the_way(self) -> OutputError:
        return OutputError(f"{self.folder} is in the way and was not made by dicer; move it away.")


_claims: ContextVar[tuple[Place, ...]] = ContextVar("claims", default=())  # those of this thread


@contextmanager
def claimed(out: Path | None) -> Iterator[None]:
    """Hold a place from now on, for what will be made there by :func:`taken` while the block lasts.

    Args:
        out: the file or folder; None for none. Of several processes the first one holds it.

    Raises:
        OutputError: another run holds it.
    """
    if out is None or os.environ.get("RANK", "0") != "0" or _claim_of(out) is not None:
        yield
        return
    with Place(out) as place:
        token = _claims.set((*_claims.get(), place))
        try:
            yield
        finally:
            _claims.reset(token)


def taken(out: Path) -> Place:
    """The place that was claimed for this, or a new one; to be entered."""
    place = _claim_of(out)
    if place is None or place.is_taken:
        return Place(out)
    place.is_taken = True
    return place


def _claim_of(out: Path) -> Place | None:
    path = Path(os.path.realpath(out))
    return next((place for place in _claims.get() if place.path == path), None)


_folders: ContextVar[tuple[Path, ...]] = ContextVar("folders", default=())  # those that this thread holds


@contextmanager
def held_folder(folder: Path, marker: Path) -> Iterator[None]:
    """Hold a folder that runs fill one after the other, made where there is none; it stays if something is in it.

    Who holds it already does so.

    Args:
        folder: the folder.
        marker: the file in it that is locked.

    Raises:
        ExperimentError: another run holds it.
        OutputError: it cannot be made.
    """
    path = Path(os.path.realpath(folder))
    if path in _folders.get():
        yield
        return
    with ExitStack() as stack:
        with undisturbed():
            stack.enter_context(_locked_folder(folder, path, marker))
        token = _folders.set((*_folders.get(), path))
        try:
            yield
        finally:
            _folders.reset(token)


@contextmanager
def _locked_folder(folder: Path, path: Path, marker: Path) -> Iterator[None]:
    made = [place for place in (path, *path.parents) if not place.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = locked(marker, folder)
    except OutputError as error:
        raise ExperimentError(str(error)) from None
    except OSError as error:
        raise OutputError(f"cannot use the results folder {folder}: {error.strerror or error}.") from error
    _say_who(marker)
    try:
        yield
    finally:
        with undisturbed():
            with suppress(OSError):
                marker.unlink()
            lock.release()
            for place in made:
                with suppress(OSError):  # it is filled, as it should be
                    place.rmdir()


def partial(path: Path) -> Path:
    """The folder in which something is made."""
    return path.with_name(path.name + ".partial")


def exchange(first: Path, second: Path) -> bool:
    """Let two names change places at one moment; False where the system, or the disk, cannot (it can on Linux)."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    if not call(_HERE, os.fsencode(first), _HERE, os.fsencode(second), _EXCHANGE):
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(second))


def locked(marker: Path, out: Path, *, keep: bool = False) -> filelock.BaseFileLock:
    """The lock on a marker file, held by this process where the file system has locks.

    Args:
        marker: the file, made where there is none.
        out: what it stands for.
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
            f"another run of dicer writes {out} now{_who(marker)}; wait for its end, or choose another place."
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return lock


def _say_who(marker: Path) -> None:
    """Write down who holds a marker's lock."""
    now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    with suppress(OSError):  # Windows lets nobody write a locked file
        marker.write_text(json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": now}))


def _who(marker: Path) -> str:
    """Who holds a marker's lock, where that is written down; it is soon after it was locked."""
    for _ in range(_TRIES):
        try:
            found = read_json(marker, 2**12)
            return f" (process {int(found['process'])} on {found['host']!s:.60}, since {found['since']!s:.25})"
        except (OSError, ValueError, TypeError, KeyError):
            time.sleep(_BETWEEN)
    return ""


def check_output(out: Path, *, overwrite: bool, inputs: Iterable[str | os.PathLike[str] | None] = ()) -> None:
    """Refuse an output folder that would lose something or cannot be made, before any work is done.

    Args:
        out: the folder to write.
        overwrite: whether what dicer wrote there before may be replaced.
        inputs: what the run reads (model folder, plan, recipe, text); none of it may lie in ``out``.

    Raises:
        OutputError: it is no folder, or not empty without ``overwrite``, or was not written by dicer, or holds an
            input, or lies where nothing can be written, or another run holds it.
    """
    target = check_writable(out, inputs)
    with as_output_error(out):
        marker = partial(target) / MARKER
        if marker.exists() and _claim_of(out) is None:
            locked(marker, out, keep=True).release()
        check_held(target, out, overwrite)


def check_single(out: Path, *, overwrite: bool, inputs: Iterable[str | os.PathLike[str] | None] = ()) -> Path:
    """Refuse a place where no file can be made, or where one is that may not go.

    Returns:
        The path, links followed.

    Raises:
        OutputError: with what is there.
    """
    with as_output_error(out):
        if out.is_dir():
            raise OutputError(f"{out} is a folder; name a file.")
        target = check_writable(out, inputs)
        if target.exists() and not target.is_file():
            raise OutputError(f"{out} is no regular file; choose another name.")
        if target.exists() and not overwrite:
            raise OutputError(f"{out} exists; choose another name or pass --overwrite.")
    return target


def check_held(target: Path, out: Path, overwrite: bool) -> None:
    """Refuse what is there already, or was set aside, unless it may go."""
    if target.exists() and not target.is_dir():
        kind = "a file" if target.is_file() else "no folder"
        raise OutputError(f"output {out} is {kind}; choose a folder that does not exist yet.")
    aside = partial(target) / _OLD
    held = target if target.exists() else aside  # set aside by a run that was killed
    if not held.is_dir() or not any(held.iterdir()):
        return
    if not overwrite and held == aside:
        raise OutputError(
            f"a run that was to replace {out} was killed, and the old one lies in {aside}. Move it back, or pass "
            "--overwrite to replace it."
        )
    if not overwrite:
        raise OutputError(f"output folder {out} is not empty. Choose another, or pass --overwrite to replace it.")
    if not any((held / name).is_file() for name in (MADE_BY_DICER, MADE_BY_EXPORT)):
        raise OutputError(
            f"{out} holds no {MADE_BY_DICER}, so dicer did not write it; --overwrite leaves it. Choose another folder."
        )
