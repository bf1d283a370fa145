"""A command in a process of its own that ends before its time: before a file operation, at a moment, by a signal."""

from __future__ import annotations

import importlib
import os
import shlex
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from kill.scenes import Scene

# What Python tells of before it does it (PEP 578). Of "open" only where something can be written; renameat2 is called
# through ctypes, by its name.
_WATCHED = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.link", "os.symlink", "os.truncate")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class End(NamedTuple):
    """How a run is ended before its time.

    Attributes:
        event: before which file operation.
        halves: the file that was opened last is cut in half before, as if it was being written.
        number: the signal that it gets there.
    """

    event: int | None = None
    halves: bool = False
    number: int = signal.SIGKILL


class Watch:
    """Counts the file operations of this process below a folder, and ends it before the one that it was told.

    Args:
        stage: the folder.
        end: when it ends, and how.
    """

    def __init__(self, stage: Path, end: End) -> None:
        self.events: list[str] = []  # what was done, and to what
        self._stage, self._end, self._opened, self._over = str(stage), end, "", False
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self._over or (what := self._operation(event, args)) is None:
            return
        if len(self.events) == self._end.event:
            self._over = True
            if self._end.halves and os.path.isfile(self._opened):  # noqa: PTH113 - in the hook of every file operation
                os.truncate(self._opened, os.stat(self._opened).st_size // 2)  # noqa: PTH116
            os.kill(os.getpid(), self._end.number)
        if event == "open":
            self._opened = str(args[0])
        self.events.append(what)

    def _operation(self, event: str, args: tuple[Any, ...]) -> str | None:
        """A file operation in a few words; None if it is none that can change something here."""
        if event == "ctypes.dlsym":
            return "exchange" if args[1] == "renameat2" else None
        if event == "fcntl.flock":
            return "lock"
        if event not in _WATCHED and not (event == "open" and isinstance(args[2], int) and args[2] & _WRITES):
            return None
        if isinstance(args[0], int):
            return None
        path = os.fsdecode(args[0])  # rmtree names files relative to an open folder
        if os.path.isabs(path) and not path.startswith(self._stage):  # noqa: PTH117
            return None
        return f"{event} {path.removeprefix(self._stage)}"


@contextmanager
def on_stage(scene: Scene, stage: Path) -> Iterator[None]:
    """This process as a run of a scene finds it: the folders of the stage are the cache and the temporary folder."""
    kept = {name: os.environ.get(name) for name in ("DICER_CACHE", "TMPDIR")}
    os.environ |= {"DICER_CACHE": str(stage / "cache"), "TMPDIR": str(stage / "tmp")}
    before = []
    for name, value in scene.patches:
        module, _, attribute = name.partition(":")
        held = importlib.import_module(module)
        before.append((held, attribute, getattr(held, attribute)))
        setattr(held, attribute, value)
    tempfile.tempdir = None
    tempfile.gettempdir()  # which tries whether it can write there
    try:
        yield
    finally:
        tempfile.tempdir = None
        for held, attribute, value in before:
            setattr(held, attribute, value)
        for name, value in kept.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def started(
    scene: Scene,
    stage: Path,
    words: str,
    log: Path,
    *,
    end: End | None = None,
    ready: Callable[[], None] | None = None,
) -> int:
    """Start a command in a process of its own.

    Args:
        scene: whose command it is.
        stage: where it runs.
        words: what is typed.
        log: ``.out`` and ``.err`` of this name get what it prints, ``.events`` its file operations, where it comes to
            its end.
        end: how it is ended; None for not at all, and then nothing is watched.
        ready: called in the new process before the command begins.

    Returns:
        The number of the process.
    """
    if child := os.fork():
        return child
    code = 1
    try:
        for number, ending in ((1, ".out"), (2, ".err")):
            os.dup2(os.open(log.with_suffix(ending), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.chdir(stage)
        with on_stage(scene, stage):
            if ready is not None:
                ready()
            watch = Watch(stage, end) if end is not None else None
            code = typed(words)
            if watch is not None:
                events = list(watch.events)
                log.with_suffix(".events").write_text("\n".join(events))
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def typed(words: str) -> int:
    """Run a command in this process; its exit code."""
    from dicer.cli.main import main

    return main(shlex.split(words))


def ended(child: int) -> int:
    """Wait for a process; its exit code, negative for the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
