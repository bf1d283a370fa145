"""Damaged files of every kind: one clear line or a result, and nothing else (``make fuzz`` tries 5,000)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fuzz import runner
from fuzz.goods import KINDS
from fuzz.runner import MEMORY, Mutant, attempt, faults_of

TESTS = Path(__file__).parents[1]
MUTANTS, PARTS = 300, 3  # each part in a process of its own, so that they can run side by side
SEED = int(os.environ.get("DICER_FUZZ_SEED", "0"))


def fuzz(*words: object) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(map(str, (TESTS, TESTS / "write" / "export", os.environ.get("PYTHONPATH", ""))))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "fuzz.runner", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("part", range(PARTS))
def test_mutants(part: int) -> None:
    count = MUTANTS // PARTS
    done = fuzz("--seed", SEED, "--first", part * count, "--count", count, "--limit", 60)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines, done.stderr
    *failed, summary = lines
    assert failed == []
    assert done.returncode == 0
    assert summary["mutants"] == count
    # Both ends are met, and every kind: a fuzzer whose files are all refused at the door, or all good, tries nothing.
    assert set(summary["codes"]) == {"0", "2"}
    assert {name.rpartition(":")[0] for name in summary["by kind"]} == set(KINDS)


@pytest.mark.parametrize(
    ("code", "out", "err", "fault"),
    [
        (1, "", "", "ended with 1"),
        (-6, "", "", "ended with -6"),
        (-9, "", "", "still ran after 0 s"),
        (2, "", "dicer: a\nb\n", "no single line"),
        (2, "", "a\n", "no single line"),
        (0, "", "dicer: a\n", "words on stderr"),
        (0, "x" * 401 + "\n", "", "a line of 401 characters"),
        (0, "a\x1b[2J\n", "", "raw ['\\x1b']"),
        (2, "", "dicer: a\u202eb\n", "raw ['\\u202e']"),
        (2, "", "dicer: the memory of this machine is used up.\n", "memory of this machine is used up"),
        (70, "", "Traceback (most recent call last):\n", "Traceback"),
    ],
)
def test_what_is_a_fault(code: int, out: str, err: str, fault: str) -> None:
    assert fault in faults_of(code, out, err)
    assert faults_of(0, "a table\n", "") == []
    assert faults_of(2, "", "dicer: one line.\n") == []


def _outside() -> int:
    Path("../outside/a").write_text("a")
    return 0


def _input() -> int:
    Path("ratios.json").write_text("another")
    return 0


def _left() -> int:
    Path("out").mkdir()
    return 2


def _unfinished() -> int:
    Path("out.partial").mkdir()
    return 0


def _endless() -> int:
    while True:
        pass


def _memory() -> int:
    return len(bytearray(MEMORY * 2)) * 0


DEEDS = {
    _outside: "touched outside/a",
    _input: "touched work/ratios.json",
    _left: "left out",
    _unfinished: "left out.partial",
    _endless: "still ran after 1 s",
    _memory: "MemoryError",
    os.abort: "ended with -6",
}


@pytest.mark.parametrize("deed", DEEDS, ids=lambda deed: deed.__name__)
def test_what_a_mutant_may_not_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deed: Callable[[], int]) -> None:
    goods, place = tmp_path / "goods", tmp_path / "place"
    (goods / "model").mkdir(parents=True)
    place.mkdir()
    (goods / "ratios.json").write_text("{}")
    one = Mutant(0, 0, "ratios", "", (), b"{}")
    monkeypatch.setattr(runner, "main", lambda _: deed())
    faults = attempt(goods, place, one, 1).faults
    assert any(DEEDS[deed] in fault for fault in faults), faults
