"""The commands of experiments: run and report."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dicer.cli.terminal import console, quiet_transformers, say

if TYPE_CHECKING:
    from dicer.study.bench import Event, Place, Task

app = typer.Typer()

_SHOWN = 12  # rows of the live table besides what is going on; a terminal has no more room
_RUNNING = ("scoring", "evaluating")


class Board:
    """What an experiment does: a live table on a terminal, a line for each run that ends elsewhere."""

    def __init__(self) -> None:
        self._console = console()
        self._console.file = sys.stdout  # today's: what silences libraries puts another one in its place
        self._rows: dict[str, tuple[str, str, str, str]] = {}  # run id -> what, state, detail, where
        self._stages: dict[str, str] = {}  # where -> what goes on
        self._began: dict[str, float] = {}  # where -> since when it evaluates
        self._took = [0.0, 0]
        self._live: Live | None = None

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def watch(self, event: Event) -> None:
        """Take in one event."""
        if event.task is None:
            self._stages[event.where] = f"{event.text} {event.done}/{event.total}"
            return
        self._stages.pop(event.where, None)
        if event.kind == "evaluating":
            self._began[event.where] = time.monotonic()
        elif event.kind == "done":
            self._took[0] += time.monotonic() - self._began.pop(event.where)
            self._took[1] += 1
        state, where = ("waiting", "") if event.kind == "lost" else (event.kind, event.where)
        self._rows[event.task.name] = (describe(event.task), state, event.text, where)
        if self._console.is_terminal:
            self._start(event)
        elif event.kind in ("done", "failed", "lost"):
            self._line(event)

    def _start(self, event: Event) -> None:
        """Show the table with the first run that is not done yet: where all are, it would have no rows."""
        if self._live is None and event.kind != "skipped":
            self._live = Live(console=self._console, get_renderable=self.table, refresh_per_second=4)
            self._live.start()

    def _line(self, event: Event) -> None:
        ended = sum(row[1] in ("done", "failed", "skipped") for row in self._rows.values())
        assert event.task is not None
        why = (f" on {event.where}" if event.where else "") + (f": {event.text}" if event.text else "")
        left = f", {self.time_left()}" if self.time_left() else ""
        self._console.print(
            f"[{ended}/{len(self._rows)}] {event.kind} {describe(event.task)}{why}{left}", markup=False, soft_wrap=True
        )

    def time_left(self) -> str:
        """From the mean time of an evaluation, once there is one; workers share what is left."""
        waiting = sum(row[1] in ("waiting", *_RUNNING) for row in self._rows.values())
        if not self._took[1] or not waiting:
            return ""
        workers = len({row[3] for row in self._rows.values() if row[1] in _RUNNING})
        seconds = int(self._took[0] / self._took[1] * waiting / max(1, workers))
        hours, minutes = seconds // 3600, seconds % 3600 // 60
        return f"about {f'{hours} h {minutes} min' if hours else f'{minutes} min' if minutes else f'{seconds} s'} left"

    def table(self) -> Group:
        """What a terminal shows."""
        rows = list(self._rows.values())
        states = [row[1] for row in rows]
        counts = ", ".join(f"{states.count(s)} {s}" for s in ("done", "skipped", "failed", "waiting") if s in states)
        remote = ["where"] if any(row[3] for row in rows) else []
        title = f"{len(states)} runs: {counts or 'starting'}"
        table = Table("run", "state", "", *remote, title=title, title_justify="left")
        ended = [row for row in rows if row[1] in ("done", "failed")]
        going = [row for row in rows if row[1] == "evaluating"]
        coming = [row for row in rows if row[1] in ("scoring", "waiting")]
        for what, state, detail, where in [*ended[-_SHOWN // 2 :], *going[:_SHOWN], *coming[: _SHOWN // 2]]:
            stage = self._stages.get(where, "") if state == "evaluating" else Text(detail, overflow="ellipsis")
            table.add_row(what, state, stage, *([where] if remote else []))
        idle = {where: stage for where, stage in self._stages.copy().items() if all(row[3] != where for row in going)}
        stages = "; ".join(f"{where}: {stage}" if where else stage for where, stage in idle.items())
        return Group(table, Text(" ".join(part for part in (stages, self.time_left()) if part)))


def describe(task: Task) -> str:
    """A run in a few words."""
    recipe = task.run.recipe
    if recipe is None:
        return f"{task.source.name} {task.run.method}"
    text = f"{task.run.text} {recipe.text.samples} x {recipe.text.seq_len}"
    ratio = "" if (recipe.allocate or "").endswith(".json") else f" {recipe.ratio:g}"
    return f"{task.source.name} {task.run.method}{ratio} seed {recipe.seed}, {text}"


@app.command()
def run(
    experiment: Annotated[Path, typer.Argument(metavar="EXPERIMENT.toml", help="A grid of runs; see experiments/.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="RESULTS", help="Folder of the records, one JSON file a run.")
    ] = Path("results"),
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Use a Ray cluster: HOST:PORT, auto (it runs here), local (start one)."),
    ] = None,
    worker_cpus: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Cores of a Ray worker; else a machine's, or its GPU's share."),
    ] = None,
) -> None:
    """Prune and measure every point of a grid; what RESULTS already has is not done again.

    Stop it whenever you like and start it again: finished runs are kept, failed ones are tried again.
    """
    from dicer.study.grid import read_experiment

    asked = read_experiment(experiment)
    from dicer.evaluate.quality import evaluate, load_all_tasks
    from dicer.evaluate.reference import refer
    from dicer.study.run import run_experiment

    quiet_transformers()
    with Board() as board, _place(ray, worker_cpus) as place:
        counts = run_experiment(
            asked, output, evaluate=evaluate, check=load_all_tasks, watch=board.watch, refer=refer, place=place
        )
    say(", ".join(f"{number} {what}" for what, number in counts.items()) + f". Records: {output}")
    say(f"Next: dicer report {output} -o FOLDER")
    if counts["failed"]:
        raise typer.Exit(1)


def _place(address: str | None, cpus: int | None) -> AbstractContextManager[Place]:
    """Where the runs are done: on a Ray cluster, if one is named."""
    from dicer.study.run import Here

    if address is None:
        if cpus is not None:
            raise typer.BadParameter("--worker-cpus is for workers of --ray; OMP_NUM_THREADS sets the cores here.")
        return nullcontext(Here())
    from dicer.study.cluster import connected

    return connected(address, cpus)


@app.command()
def report(
    results: Annotated[
        Path,
        typer.Argument(metavar="RESULTS", help="Folder that 'dicer run' wrote, or the file that 'dicer pack' made."),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Folder for the report.")],
) -> None:
    """Make tables, figures and report.html (one file that needs no network) from the records of RESULTS."""
    from dicer.study.report.pages import write_report

    files = write_report(results, output)
    say(f"{len(files)} files in {output}; open {output / 'report.html'}")


@app.command()
def pack(
    results: Annotated[
        Path, typer.Argument(metavar="RESULTS", help="Folder that 'dicer run' wrote, or a packed file.")
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE.jsonl.gz", help="New file; or a folder, to unpack into.")
    ],
) -> None:
    """Put the records of RESULTS into one compressed file, or those of such a file back into a folder.

    'dicer report' reads both; 'dicer run' goes on in the folder.
    """
    from dicer.study.records import copy_records

    say(f"{copy_records(results, output)} records to {output}")
