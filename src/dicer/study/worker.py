"""What a worker does with its part of an experiment: the runs come as data, and all that happens goes back as data."""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from dicer.ask.evaluation import Evaluation
from dicer.errors import ExperimentError
from dicer.model.source import open_model
from dicer.study.bench import Bench, Evaluate, Event, Refer, Task
from dicer.study.grid import Run
from dicer.study.record import Record
from dicer.study.run import dense_fingerprint, make_task, run_model

_PAUSE = 0.5  # seconds between two words about the same stage; a terminal shows no more


class Part(NamedTuple):
    """Runs of one model, for one worker.

    Attributes:
        runs: what was asked for.
        names: their run ids, where the experiment was started.
        evaluation: what is measured.
        evaluate: what measures a model.
        refer: what has the dense model's answers.
        folder: the current folder there, which relative paths start from.
        versions: of what decides the numbers, there.
    """

    runs: list[Run]
    names: list[str]
    evaluation: Evaluation
    evaluate: Evaluate
    refer: Refer | None
    folder: str
    versions: dict[str, str]


class Word(NamedTuple):
    """What a worker says: an :class:`Event` with a run's name for its task, ``at`` (where it works), or ``record``."""

    kind: str
    name: str = ""
    text: str = ""
    done: int = 0
    total: int = 0
    record: Record | None = None


def work(part: Part) -> Iterator[Word]:
    """Do all runs of a part.

    Raises:
        DicerError: this worker cannot do them as they would be done where the experiment was started.
    """
    box: queue.SimpleQueue[Word | None] = queue.SimpleQueue()
    with ThreadPoolExecutor(1) as pool:
        doing = pool.submit(_do, part, box.put)
        doing.add_done_callback(lambda _: box.put(None))
        while (word := box.get()) is not None:
            yield word
        doing.result()


def _do(part: Part, say: Callable[[Word], None]) -> None:
    say(Word("at", text=_here()))
    check_versions(part.versions, versions_reader()(), "it")
    with contextlib.suppress(OSError):  # not there: no path in it is there, and those are missed below
        os.chdir(part.folder)
    source, dense = open_model(*part.runs[0].opened), dense_fingerprint(part.evaluation)
    tasks = [make_task(run, source, part.evaluation, Path(), dense) for run in part.runs]
    if [task.name for task in tasks] != part.names:
        raise ExperimentError(f"{part.runs[0].model}, or a file that its runs read, differs from the one here.")

    def keep(task: Task, record: Record) -> None:
        say(Word("record", task.name, record=record))

    run_model(tasks, Bench(part.evaluation, part.evaluate, _seldom(say), part.refer, keep))


def _seldom(say: Callable[[Word], None]) -> Callable[[Event], None]:
    """Pass events on, of stages only now and then; how a run ended is in its record."""
    last = 0.0

    def watch(event: Event) -> None:
        nonlocal last
        if event.task is None:
            if time.monotonic() - last < _PAUSE:
                return
            last = time.monotonic()
        if event.kind not in ("done", "failed"):
            say(Word(event.kind, event.task.name if event.task else "", event.text, event.done, event.total))

    return watch


def _here() -> str:
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES")
    return f"{socket.gethostname()} {f'GPU {gpu}' if gpu else f'process {os.getpid()}'}"


def versions_reader() -> Callable[[], dict[str, str]]:
    """What reads the versions that decide the numbers; it needs no dicer, so it can be sent where there may be none."""

    def versions() -> dict[str, str]:
        import hashlib
        import importlib.metadata
        import importlib.util
        from pathlib import Path

        found = {}
        for name in ("dicer", "torch", "transformers", "numpy"):
            try:
                found[name] = importlib.metadata.version(name).split("+")[0]  # +cpu, +cu126: the same release
            except importlib.metadata.PackageNotFoundError:
                found[name] = "none"
        code = importlib.util.find_spec("dicer")
        if code is not None and code.origin is not None:
            files = sorted(Path(code.origin).parent.rglob("*.py"))
            text = b"".join(file.read_bytes().replace(b"\r\n", b"\n") for file in files)
            found["dicer"] += f" ({hashlib.sha256(text).hexdigest()[:8]})"  # of its files; not all have a release
        return found

    return versions


def check_versions(ours: Mapping[str, str], theirs: Mapping[str, str], where: str) -> None:
    """Hold a machine's versions against ours.

    Raises:
        ExperimentError: one differs; the line says which.
    """
    for name, version in ours.items():
        if theirs.get(name) != version:
            raise ExperimentError(
                f"{where} has {name} {theirs.get(name)}, and this machine has {version}; install the same on both."
            )
