"""What the commands share: printing, a progress bar, a result file that appears whole or not at all."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from dicer.errors import OutputError

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, folder, .gguf file or builtin:smollm2.")]

_SHOW_AFTER = 2.0  # seconds; a bar for less is noise


class Bar:
    """A progress bar with the time left, on a terminal, for whatever takes longer than two seconds."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        # Bound to today's stderr, and never put in its place: libraries whose own bars are silenced redirect it.
        console = Console(file=sys.stderr)
        self._progress = Progress(
            *columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False
        )
        self._stage, self._began = "", 0.0
        self._task: TaskID | None = None

    def __enter__(self) -> Callable[[str, int, int], None]:
        return self._update

    def __exit__(self, *_: object) -> None:
        if self._progress.live.is_started:  # else rich ends a line that was never begun
            self._progress.stop()

    def _update(self, stage: str, done: int, total: int) -> None:
        if not self._progress.console.is_terminal:
            return
        if stage != self._stage or done == 0:  # a stage that comes again begins anew
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._stage, self._began, self._task = stage, time.monotonic(), None
        if self._task is None and time.monotonic() - self._began > _SHOW_AFTER:
            self._task = self._progress.add_task(stage, total=total)
            self._progress.start()
        if self._task is not None:
            self._progress.update(self._task, completed=done, total=total)


def console() -> Console:
    """Where tables go; as wide as the terminal."""
    # A pipe has no width; without one rich would fold tables at 80 columns.
    return Console(width=None if sys.stdout.isatty() else 160, highlight=False, emoji=False)


def say(text: str) -> None:
    """Print a line as it stands."""
    console().print(text, markup=False, soft_wrap=True)


def quiet_transformers() -> None:
    """Its bars and warnings speak to programmers; dicer has its own. Bars of downloads stay, on a terminal."""
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import enable_progress_bars
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()  # those of huggingface_hub, too
    if sys.stderr.isatty() and not constants.HF_HUB_DISABLE_PROGRESS_BARS:
        enable_progress_bars()


def check_file(path: Path | None, *, overwrite: bool) -> None:
    """See to it that a result file can be written, before hours go into the result.

    Raises:
        OutputError: it is there already, its folder is missing, or nothing may be written there.
    """
    if path is None:
        return
    if path.is_dir():
        raise OutputError(f"{path} is a folder; name a file.")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists; choose another name or pass --overwrite.")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"there is no folder {path.absolute().parent} to write {path.name} into.")
    if not os.access(path.absolute().parent, os.W_OK):
        raise OutputError(f"{path} cannot be written: no permission in its folder.")


def write_result(path: Path, value: object) -> None:
    """Write a JSON file that appears whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    from dicer.records import finite  # brings numpy, which the start of the program does without

    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(finite(value), indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}.") from None
    finally:
        partial.unlink(missing_ok=True)
