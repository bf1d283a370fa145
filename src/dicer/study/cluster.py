"""An experiment on the machines of a Ray cluster: its workers do the runs, this process writes the records."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dicer.errors import DicerError, ExperimentError
from dicer.processes import several
from dicer.study.bench import Bench, Event, Task
from dicer.study.record import Failed, Record
from dicer.study.run import fail
from dicer.study.worker import Part, Word, check_versions, versions_reader, work

_PATIENCE = 10  # seconds for a cluster to answer; Ray itself takes more than five minutes and then ends the process
_TRIES = 3  # a run whose worker dies so often is not tried again
_STORE = 128 * 2**20  # bytes of shared memory of a cluster that is started here; records are small
# How every connection of HTTP/2, which Ray speaks, begins; a server answers with its settings, a frame of type 4.
_HELLO, _SETTINGS = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", b"\4"


class Share(NamedTuple):
    """What a worker gets, and how many the cluster has room for."""

    cpus: int
    gpus: int
    workers: int


@dataclass
class _Going:
    """A part that a worker has: what is left of it, what it gets, where it is, and the run that is being measured."""

    left: list[Task]
    share: Share
    where: str = ""
    now: Task | None = None


@contextlib.contextmanager
def connected(address: str, cpus: int | None = None) -> Iterator[Cluster]:
    """A Ray cluster, left or ended afterwards.

    Args:
        address: ``HOST:PORT``; ``auto`` for one that runs on this machine; ``local`` starts one here.
        cpus: cores that a worker gets; without, all of a machine, or its GPU's share of them.

    Raises:
        ExperimentError: there is no Ray here, none answers there, or a machine has other versions than this one.
    """
    try:
        import ray
    except ImportError:
        raise ExperimentError("--ray needs Ray, which is not installed: pip install 'dicer[ray]'.") from None
    if several():
        raise ExperimentError("--ray starts workers of its own; leave accelerate launch out.")
    with contextlib.redirect_stdout(sys.stderr):  # it says on stdout why a worker died
        _join(ray, address)
        try:
            cluster = Cluster(ray, cpus)
            cluster.check_versions()
            yield cluster
        finally:
            ray.shutdown()


def _join(ray: Any, address: str) -> None:
    more: dict[str, Any] = {}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers
        more = {"include_dashboard": False, "object_store_memory": _STORE}
    try:
        if address not in ("local", "auto"):
            _knock(address)
        ray.init(address=address, logging_level="ERROR", log_to_driver=False, **more)
    except (Exception, SystemExit) as error:  # the latter is how Ray gives up
        reason = " ".join(str(error).split()).rstrip(".")
        raise ExperimentError(
            f"Ray at {address} cannot be used: {reason}. Name HOST:PORT as 'ray start --head' says it, auto or local."
        ) from None


def _knock(address: str) -> None:
    """Raise an OSError or a ValueError where no Ray can be."""
    host, _, port = address.rpartition(":")
    if "/" in address or not host or not port.isdecimal():
        raise ValueError("this is no HOST:PORT")
    with socket.create_connection((host.strip("[]"), int(port)), _PATIENCE) as line:
        line.sendall(_HELLO)
        if os.environ.get("RAY_USE_TLS") != "1" and line.recv(4)[3:] != _SETTINGS:
            raise OSError("what answers there is no Ray")


class Cluster:
    """The place of :func:`dicer.study.run.run_experiment` for a cluster; from :func:`connected`."""

    def __init__(self, ray: Any, cpus: int | None) -> None:
        self._ray, self._cpus = ray, cpus
        self._going: dict[Any, _Going] = {}  # what a worker says, word by word -> its part
        self._losses: Counter[str] = Counter()  # run id -> workers that died on it

    def _machines(self) -> list[dict[str, Any]]:
        return [node for node in self._ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]

    def check_versions(self) -> None:
        """Raise an ExperimentError where a machine has another dicer, torch, transformers or numpy than this one."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        read = versions_reader()
        remote, machines = self._ray.remote(read), self._machines()
        asked = [
            remote.options(
                num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote()
            for node in machines
        ]
        try:
            found = self._ray.get(asked)
        except self._ray.exceptions.RayError as error:
            raise ExperimentError(f"a machine of the Ray cluster does not work: {_line(error)}") from None
        for node, theirs in zip(machines, found, strict=True):
            check_versions(read(), theirs, f"{node['NodeManagerHostname']} of the Ray cluster")

    def check(self, device: str) -> Share:
        """What a worker gets for this device.

        Raises:
            ExperimentError: no machine of the cluster has that.
        """
        machines = [node["Resources"] for node in self._machines()]
        with_gpu = [node for node in machines if node.get("GPU", 0) >= 1]
        if device.startswith("cuda:"):
            raise ExperimentError(f"device '{device}': Ray says which GPU a worker gets; write cuda or auto.")
        if device == "cuda" and not with_gpu:
            raise ExperimentError("device 'cuda': no machine of the Ray cluster has a GPU; write cpu or auto.")
        if with_gpu and device in ("cuda", "auto"):
            cpus = self._cpus or max(1, min(int(node["CPU"] // node["GPU"]) for node in with_gpu))
            share = Share(cpus, 1, sum(int(min(node["GPU"], node["CPU"] // cpus)) for node in with_gpu))
        else:
            cpus = self._cpus or max((int(node["CPU"]) for node in machines), default=1)
            share = Share(cpus, 0, sum(int(node["CPU"] // cpus) for node in machines))
        if not share.workers:
            raise ExperimentError(f"no machine of the Ray cluster has {cpus} CPU cores for a worker; ask for fewer.")
        return share

    def work(self, groups: Sequence[list[Task]], bench: Bench) -> None:
        """Do all runs; those of a worker that is lost go to another.

        Raises:
            DicerError: a worker has another model, text or dicer than this machine, or a record cannot be written.
        """
        try:
            for device in dict.fromkeys(group[0].run.compute.device for group in groups):
                own = [group for group in groups if group[0].run.compute.device == device]
                share = self.check(device)
                for part in deal(own, share.workers):
                    self._start(part, share, bench)
            while self._going:
                ready, _ = self._ray.wait(list(self._going))
                self._hear(ready[0], bench)
        finally:  # after an error the workers need not go on
            for words in self._going:
                self._ray.cancel(words, force=True)
            self._going.clear()
            self._losses.clear()

    def _start(self, tasks: list[Task], share: Share, bench: Bench) -> None:
        runs, names = [task.run for task in tasks], [task.name for task in tasks]
        part = Part(runs, names, bench.evaluation, bench.evaluate, bench.refer, str(Path.cwd()), versions_reader()())
        options = {"num_cpus": share.cpus, "num_gpus": share.gpus, "max_retries": 0, "num_returns": "streaming"}
        self._going[self._ray.remote(work).options(**options).remote(part)] = _Going(tasks, share)

    def _hear(self, words: Any, bench: Bench) -> None:
        going = self._going[words]
        try:
            self._take(going, self._ray.get(next(words)), bench)
        except StopIteration:
            del self._going[words]
            if going.left:
                self._lose(going, "it ended before its runs did", bench)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, DicerError):
                raise ExperimentError(f"on {going.where}: {error.cause}") from None
            raise
        except self._ray.exceptions.RayError as error:
            del self._going[words]
            self._lose(going, _line(error), bench)

    def _take(self, going: _Going, word: Word, bench: Bench) -> None:
        task = next((task for task in going.left if task.name == word.name), None)
        if word.kind == "at":
            going.where = word.text
        elif word.kind == "stage":
            bench.watch(Event("stage", None, word.text, word.done, word.total, going.where))
        elif word.record is not None and task is not None:
            going.left.remove(task)
            going.now = None
            bench.keep(task, word.record)
            bench.tell(word.record.status, task, _reason(word.record), going.where)
        elif task is not None:
            going.now = task if word.kind == "evaluating" else None
            bench.tell(word.kind, task, word.text, going.where)

    def _lose(self, going: _Going, why: str, bench: Bench) -> None:
        """Try again what a dead worker has left; what may have killed it goes alone the next time."""
        suspects = [going.now] if going.now else going.left
        self._losses.update(task.name for task in suspects)
        again: list[list[Task]] = [[]]
        for task in going.left:
            if (losses := self._losses[task.name]) >= _TRIES:
                fail(task, bench, ExperimentError(f"its worker died {losses} times; the last, on {going.where}: {why}"))
                continue
            bench.tell("lost", task, why, going.where)
            if task is going.now or losses > 1:
                again.append([task])
            else:
                again[0].append(task)
        for tasks in filter(None, again):
            self._start(tasks, going.share, bench)


def _reason(record: Record) -> str:
    return record.error.partition("\n")[0] if isinstance(record, Failed) else ""


def _line(error: Exception) -> str:
    """Its first sentence; what follows names Ray's log files."""
    return " ".join(str(error).split()).split(". ")[0].rstrip(".")


def deal(groups: Sequence[list[Task]], workers: int) -> list[list[Task]]:
    """Parts for so many workers, the heaviest first: each worker's share weighs the same, and holds a model once.

    A run weighs as much as its model has parameters. Runs that read the same text stay side by side, as they share
    their passes; at most ``workers - 1`` groups more come out than went in.

    Args:
        groups: runs of one model, dtype and device each.
        workers: how many there are.
    """
    sizes = [sum(info.numel for info in group[0].source.tensors.infos().values()) for group in groups]
    share = sum(size * len(group) for size, group in zip(sizes, groups, strict=True)) / workers
    parts: dict[tuple[int, int], list[Task]] = {}
    dealt = 0.0
    for number, (size, group) in enumerate(zip(sizes, groups, strict=True)):
        for task in _by_text(group):
            parts.setdefault((number, int((dealt + size / 2) / share)), []).append(task)
            dealt += size
    return [part for _, part in sorted(parts.items(), key=lambda item: -sizes[item[0][0]] * len(item[1]))]


def _by_text(tasks: Sequence[Task]) -> list[Task]:
    texts = list(dict.fromkeys(task.run.recipe and task.run.recipe.text for task in tasks))
    return sorted(tasks, key=lambda task: texts.index(task.run.recipe and task.run.recipe.text))
