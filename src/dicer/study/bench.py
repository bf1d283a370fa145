"""What the runs of an experiment share: what each is, where it is done, what it tells, and what measures it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from dicer.ask.compute import Compute
from dicer.ask.evaluation import Evaluation
from dicer.model.source import ModelSource
from dicer.progress import Progress, silent
from dicer.study.grid import Run
from dicer.study.record import Record
from dicer.study.records import write_record


class Evaluate(Protocol):
    """:func:`dicer.evaluate.quality.evaluate`; ``reference`` is there where models are compared with a dense one."""

    def __call__(
        self,
        model: Any,
        tokenizer: Any,
        evaluation: Evaluation,
        *,
        reference: Any = None,
        name: str = "",
        progress: Progress = silent,
    ) -> dict[str, Any]:
        """What was measured; {} in processes other than the first."""
        ...


class Refer(Protocol):
    """:func:`dicer.evaluate.reference.refer`."""

    def __call__(self, evaluation: Evaluation, compute: Compute, held: Any = None, *, progress: Progress) -> Any:
        """The dense model's answers: of the one that is named, or of the one that is held with tokenizer and source."""
        ...


class Event(NamedTuple):
    """What an experiment tells while it runs.

    Attributes:
        kind: ``skipped``, ``waiting``, ``scoring``, ``evaluating``, ``stage``, ``lost``, ``done`` or ``failed``.
        task: the run that it is about; None for a stage.
        text: the stage's name, or why it failed or was lost.
        done: of a stage.
        total: of a stage.
        where: the worker; nothing for this process.
    """

    kind: str
    task: Task | None
    text: str = ""
    done: int = 0
    total: int = 0
    where: str = ""


@dataclass(frozen=True)
class Task:
    """A run with its name, and all that is known before it starts.

    Attributes:
        run: what was asked for.
        name: the run id.
        source: the model.
        recipe: with every choice made; {} for the model as it is.
        path: of the record.
    """

    run: Run
    name: str
    source: ModelSource
    recipe: dict[str, Any]
    path: Path


def _write_here(task: Task, record: Record) -> None:
    write_record(task.path, record)


@dataclass
class Bench:
    """What all runs of an experiment share; ``keep`` puts a record where it belongs."""

    evaluation: Evaluation
    evaluate: Evaluate
    watch: Callable[[Event], None]
    refer: Refer | None = None
    keep: Callable[[Task, Record], None] = _write_here
    counts: dict[str, int] = field(default_factory=lambda: {"done": 0, "skipped": 0, "failed": 0})

    def tell(self, kind: str, task: Task | None, text: str = "", where: str = "") -> None:
        """Count and pass on."""
        if kind in self.counts:
            self.counts[kind] += 1
        self.watch(Event(kind, task, text, where=where))

    def progress(self, stage: str, done: int, total: int) -> None:
        """A progress callback for whatever runs below."""
        self.watch(Event("stage", None, stage, done, total))


class Place(Protocol):
    """Where runs are done: here, or on the machines of :class:`dicer.study.cluster.Cluster`."""

    def check(self, device: str) -> object:
        """Raise a DicerError where there is no such device."""
        ...

    def work(self, groups: Sequence[list[Task]], bench: Bench) -> None:
        """Do them; each group is of one model, dtype and device."""
        ...
