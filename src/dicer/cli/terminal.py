"""What the commands share: printing, a progress bar, a result file that appears whole or not at all."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from dicer.errors import OutputError
from dicer.files import as_output_error, finite
from dicer.holds import check_output, check_single, claimed, taken
from dicer.reading import read_json
from dicer.words import LINE, plain

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, folder, .gguf file or builtin:smollm2.")]

FamilyOption = Annotated[
    str | None, typer.Option(metavar="FILE.toml", help="The model's structure, where it cannot be found.")
]
OverwriteOption = Annotated[
    bool,
    typer.Option(
        "--overwrite", metavar="", rich_help_panel="Output", help="Replace what is there, once the new one is whole."
    ),
]

_SHOW_AFTER = 2.0  # seconds; a bar for less is noise
_LARGEST_RESULT = 64 * 1024**2  # bytes; whatever is larger is no result of ours, and need not be read to know it


class Stopped(BaseException):
    """A signal that ends the program, once what is unfinished was cleared away."""

    def __init__(self, number: int, more: str = "Nothing unfinished is left.") -> None:
        super().__init__(number)
        self.number, self.more = number, more


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


def show(table: Table) -> None:
    """Print a table; where rich would have to cut its words, every row as lines of its own."""
    _clean(table)
    out = console()
    with out.capture() as drawn:
        out.print(table)
    if "…" in drawn.get():
        lines = Table(show_header=False, title=table.title)
        lines.add_column(no_wrap=True)
        lines.add_column(overflow="fold")
        for row in zip(*(column.cells for column in table.columns), strict=True):
            for column, cell in zip(table.columns, row, strict=True):
                lines.add_row(column.header, cell)
            lines.add_section()
        table = lines
    _print(table)


def _clean(table: Table) -> None:
    """Words of others in a table, as they can be printed; lines in a cell stay lines."""
    if isinstance(table.title, str):
        table.title = plain(table.title, LINE)
    for column in table.columns:
        column._cells = [plain(cell, LINE, keep="\n") if isinstance(cell, str) else cell for cell in column.cells]


def say(text: str, *, whole: bool = False) -> None:
    """Print a line; of a long one the middle goes, unless it is to be copied ``whole``."""
    _print(plain(text, None if whole else LINE))


def _print(what: Table | str) -> None:
    try:
        console().print(what, markup=False, soft_wrap=isinstance(what, str))
    except OSError as error:
        raise OutputError(f"cannot print: {error.strerror}. Send the output to where there is room.") from None


def output_path(text: str) -> Path:
    """What follows ``-o``; ``~`` is the user's home also where no shell has put it in.

    Raises:
        typer.BadParameter: it is empty, or names the home of a user that is not there.
    """
    if not text:
        raise typer.BadParameter("the name is empty.")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise typer.BadParameter(f"'{text}' begins with the home folder of a user that is not known.") from None


def quiet_transformers() -> None:
    """Its bars and warnings speak to programmers; dicer has its own. Bars of downloads stay, on a terminal."""
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import enable_progress_bars
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()  # those of huggingface_hub, too
    if sys.stderr.isatty() and not constants.HF_HUB_DISABLE_PROGRESS_BARS:
        enable_progress_bars()


@contextmanager
def holding(
    output: Path, *, overwrite: bool, inputs: Iterable[str | os.PathLike[str] | None] = (), only_look: bool = False
) -> Iterator[None]:
    """See to it that an output folder can be written, and hold it while the block lasts.

    Args:
        output: the folder.
        overwrite: whether an earlier checkpoint there may be replaced.
        inputs: what the run reads, as it was typed.
        only_look: nothing will be written, so nothing is held.

    Raises:
        OutputError: something else is there, or another run holds it.
    """
    check_output(output, overwrite=overwrite, inputs=inputs)
    with claimed(None if only_look else output):
        yield


def check_file(path: Path | None, *, overwrite: bool, keys: Collection[str], inputs: Iterable[str | None] = ()) -> None:
    """See to it that a result file can be written, before hours go into the result.

    Args:
        path: the file.
        overwrite: whether an earlier result may be replaced.
        keys: what a result has at its top level; nothing else is replaced.
        inputs: what the run reads, as it was typed; no path, where that is a name.

    Raises:
        OutputError: it is there already, or no earlier result, or nothing may be written there.
    """
    if path is None:
        return
    target = check_single(path, overwrite=overwrite, inputs=inputs)
    if target.exists() and not _is_result(target, keys):
        raise OutputError(f"{path} is no result of this command, so --overwrite leaves it; choose another name.")


def _is_result(path: Path, keys: Collection[str]) -> bool:
    try:
        found = read_json(path, _LARGEST_RESULT)
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.keys() >= set(keys)


def write_result(path: Path, value: object) -> None:
    """Write a JSON file that appears whole or not at all, and its folder where there is none.

    Raises:
        OutputError: it cannot be written.
    """
    with taken(path) as place, as_output_error(path):
        place.new.write_text(json.dumps(finite(value), indent=2) + "\n", encoding="utf-8")
        place.finish()
