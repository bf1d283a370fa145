"""Runs that are killed, stopped, or several at once: the output is whole old, whole new or not there, and nothing else.

A tenth of the file operations by turns, a moment and a signal for a third of the scenes; all operations, for signals
too, and a hundred moments for each command by ``make kill``.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import dicer
from kill.scenes import SCENES

ALL = os.environ.get("DICER_KILLS") == "all"
TESTS = Path(__file__).parents[1]
DAY = datetime.datetime.now(datetime.UTC).timetuple().tm_yday
# Of the module, so that the tests of a scene follow one another: each process prepares a scene once.
every_scene = pytest.mark.parametrize("name", SCENES, scope="module")
some_scenes = pytest.mark.parametrize("name", [*SCENES] if ALL else [*SCENES][DAY % 3 :: 3], scope="module")


class Client:
    """Asks a runner in a process of its own (:mod:`kill.runner`)."""

    def __init__(self, base: Path) -> None:
        places = [Path(dicer.__file__).parents[1], TESTS, TESTS / "write" / "export"]
        threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.errors = base / "errors"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "kill.runner", str(base)],
                env={**os.environ, **threads, "PYTHONPATH": os.pathsep.join(map(str, places))},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def ask(self, do: str, **how: Any) -> Any:
        """What the runner's method of this name gives."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": do, **how}) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, self.errors.read_text()
        return json.loads(answer)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    client = Client(tmp_path_factory.mktemp("kills"))
    yield client
    changed = client.ask("given_changed")
    client.process.communicate()
    assert changed == []


def chosen(ends: list[Any], name: str) -> list[Any]:
    """All, or a tenth: another one each day."""
    if ALL:
        return ends
    return ends[(DAY + [*SCENES].index(name)) % 10 :: 10]


def wrong(name: str, end: dict[str, Any], code: int) -> list[str]:
    """What is not right after an end and the run behind it, in words."""
    resume = {"out.resume"} if "--resume" in SCENES[name].words else set()
    strays = [left for left in end["names"] if left not in {"out", "out.partial", *resume}]
    if code == -signal.SIGKILL:
        strays = [left for left in strays if not re.fullmatch(r"\.dicer-\d+-.+\.partial", left)]
    found = [f"beside it {strays}"] if strays else []
    found += [f"exit code {end['code']}"] if end["code"] != code else []
    found += [f"output {end['state']}"] if end["state"] not in SCENES[name].states else []
    found += [f"next run: {end['again']}"] if (end["again"]["code"] or end["again"]["differs"]) else []
    return [f"{end['how']}: {what}" for what in found]


@every_scene
def test_before_file_operations(runner: Client, name: str) -> None:
    events = runner.ask("events", name=name)
    assert len(events) >= 10
    halves = [i for i, (one, _) in enumerate(pairwise(events), start=1) if one.startswith("open ")]
    ends = [(i, False) for i in range(len(events))] + [(i, True) for i in halves]
    ended = [
        runner.ask("kill", name=name, event=event, halves=half, number=signal.SIGKILL)
        for event, half in chosen(ends, name)
    ]
    lines = [line for end in ended for line in wrong(name, end, -signal.SIGKILL)]
    assert not lines, "\n".join(lines)
    if ALL:
        assert {end["state"] for end in ended} == SCENES[name].states


@some_scenes
def test_at_random_moments(runner: Client, name: str) -> None:
    moments = random.Random(name)
    count = math.ceil(100 / sum(scene.command == SCENES[name].command for scene in SCENES.values())) if ALL else 1
    ended = [runner.ask("kill_at", name=name, moment=moments.random()) for _ in range(count)]
    killed = [end for end in ended if end["code"]]  # a run may be quicker than the one that was timed
    lines = [line for end in killed for line in wrong(name, end, -signal.SIGKILL)]
    assert not lines, "\n".join(lines)
    assert not ALL or len(killed) > count // 2


@some_scenes
def test_signals(runner: Client, name: str) -> None:
    events = range(len(runner.ask("events", name=name)))
    numbers = [(event, (signal.SIGTERM, signal.SIGINT)[event % 2]) for event in events]
    lines = []
    for event, number in numbers if ALL else chosen(numbers, name)[:1]:
        end = runner.ask("kill", name=name, event=event, halves=False, number=number)
        lines += wrong(name, end, 128 + number)
        lines += [f"{end['how']}: {end['left']} are left"] if end["left"] else []
        lines += [] if re.fullmatch(r"dicer: stopped\. .+\n", end["said"]) else [f"{end['how']}: said {end['said']}"]
    assert not lines, "\n".join(lines)


@pytest.mark.parametrize("count", [2, 8])
@pytest.mark.parametrize("name", [name for name, scene in SCENES.items() if scene.slow])
def test_several(runner: Client, name: str, count: int) -> None:
    found = runner.ask("several", name=name, count=count)
    assert [code for code, _, _ in found["ended"]] == [2] * (count - 1) + [0]
    for _, seconds, said in found["ended"][:-1]:
        assert re.fullmatch(r"dicer: .*another run of dicer writes .+ now \(process \d+ on .+\n", said)
        assert seconds < 1, found
    assert found["differs"] == []
