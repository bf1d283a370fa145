"""Runs damaged files through dicer, each in a process of its own with limits, and says what went wrong.

``python -m fuzz.runner --seed S --count N`` prints one JSON line for each mutant that was not handled as it should be,
and a summary at the end. Everything is imported once; a mutant costs a fork and what the command does. One of 75 is run
as a user would, in a fresh process.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch

from dicer.cli.main import main
from fuzz.goods import KINDS, make_goods

LINE = 400  # characters
MEMORY = 3 * 2**30  # bytes that a mutant may have beyond what is there before it
FILE = 2**28  # bytes of a file that it may write
REFUSED, BROKE = 2, 70
BY_COMMAND = 75  # one of so many is run as a user does it, in a fresh process


@dataclass(frozen=True)
class Ended:
    """How a mutant ended: exit code (negative: the signal), what was printed, seconds, and the faults found."""

    code: int
    out: str
    err: str
    seconds: float
    faults: list[str]


@dataclass(frozen=True)
class Mutant:
    """A damaged file and the command that reads it, found again by seed and number."""

    number: int
    seed: int
    kind: str
    how: str
    words: tuple[str, ...]
    content: bytes


def mutant(goods: Path, number: int, seed: int) -> Mutant:
    """The mutant of this number; kinds take turns."""
    rng = Random(f"{seed}/{number}")
    name = list(KINDS)[number % len(KINDS)]
    kind = KINDS[name]
    change, words = rng.choice(kind.mutators), rng.choice(kind.commands)
    return Mutant(number, seed, name, change.__name__, words, change((goods / kind.file).read_bytes(), rng))


def attempt(goods: Path, place: Path, one: Mutant, limit: float) -> Ended:
    """Run one in an own folder, and look at what it did."""
    kind = KINDS[one.kind]
    work = place / "work"
    for part in kind.parts:
        source = goods / part
        (shutil.copytree if source.is_dir() else shutil.copy)(source, _made(work) / part)
    (work / kind.file).write_bytes(one.content)
    for name in ("home", "temporary", "outside"):
        (place / name).mkdir()
    before = tree(place)
    start = time.perf_counter()
    child = os.fork()
    if not child:
        _run(place, work, one)
    code = _ended(child, limit)
    out, err = ((place / name).read_text("utf-8", "surrogateescape") for name in ("stdout", "stderr"))
    faults = faults_of(code, out, err, limit) + [
        f"touched {name}" for name in sorted(before ^ tree(place)) if name not in ("stdout", "stderr")
    ]
    if code == REFUSED:
        faults += [f"left {path.name}" for path in work.glob("out*") if path.name not in kind.parts]
    faults += [f"left {path.name}" for path in work.glob("*.partial")]
    return Ended(code, out, err, time.perf_counter() - start, faults)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def tree(place: Path) -> set[str]:
    """Every file below that is not the output or in the cache, with its size and time."""
    found = set()
    for path in place.rglob("*"):
        name = path.relative_to(place).as_posix()
        if not name.startswith(("work/out", "cache")) and name not in ("stdout", "stderr"):
            held = path.lstat()
            is_file = path.is_file() and not path.is_symlink()
            found.add(f"{name} {held.st_size} {held.st_mtime_ns}" if is_file else name)
    return found


def _run(place: Path, work: Path, one: Mutant) -> None:
    """What the child does; it never returns."""
    code = BROKE
    try:
        faulthandler.disable()  # of the one who runs this
        os.chdir(work)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(place / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.environ.update(HOME=str(place / "home"), TMPDIR=str(place / "temporary"), DICER_CACHE=str(place / "cache"))
        tempfile.tempdir = None
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE, FILE))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
        if one.number % BY_COMMAND == BY_COMMAND - 1:
            os.execv(sys.executable, [sys.executable, "-W", "ignore", "-m", "dicer", *one.words])
        code = main(one.words)
        sys.stdout.flush()
    except BaseException:  # it is what is looked for
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stderr.flush()
        os._exit(code)


def _ended(child: int, limit: float) -> int:
    """Its exit code, or what signal ended it; SIGKILL where that is the limit."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -signal.SIGKILL


def faults_of(code: int, out: str, err: str, limit: float = 0) -> list[str]:
    """What is wrong with an exit code and what was printed."""
    found = []
    if code == -signal.SIGKILL:
        found.append(f"still ran after {limit:.0f} s")
    elif code not in (0, REFUSED):
        found.append(f"ended with {code}")
    text = out + err
    found += [
        word for word in ("Traceback", "MemoryError", "memory of this machine is used up", "panicked") if word in text
    ]
    lines = text.split("\n")
    if any(len(line) > LINE for line in lines):
        found.append(f"a line of {max(map(len, lines))} characters")
    strange = {c for line in lines for c in line if not c.isprintable()}
    if strange:
        found.append(f"raw {sorted(strange)!r}")
    if code == REFUSED and not (err.startswith("dicer: ") and err.count("\n") == 1):
        found.append("no single line")
    if code == 0 and err:
        found.append("words on stderr")
    return found


def attempts(goods: Path, numbers: Sequence[int], seed: int, limit: float) -> Iterator[tuple[Mutant, Ended]]:
    """Run these, one after the other."""
    for number in numbers:
        with tempfile.TemporaryDirectory(prefix="mutant-") as place:
            one = mutant(goods, number, seed)
            yield one, attempt(goods, Path(place), one, limit)


@contextlib.contextmanager
def goods_made() -> Iterator[Path]:
    """A folder with one good file of each kind; what making them needs is then imported."""
    home = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="goods-") as folder:
        goods = Path(os.path.realpath(folder))
        os.environ.update(DICER_CACHE=str(goods / "cache"), MPLCONFIGDIR=str(goods / "matplotlib"))
        os.chdir(goods)
        make_goods(goods)
        os.chdir(home)
        yield goods


def run(words: Sequence[str] | None = None) -> int:
    """Try the mutants that a command names; 1 where one was not handled as it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutant")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--limit", type=float, default=20, help="seconds of one")
    parser.add_argument("--keep", type=Path, help="folder for the damaged files that were not handled")
    asked = parser.parse_args(words)
    torch.set_num_threads(1)
    codes: Counter[int] = Counter()
    ends: Counter[str] = Counter()
    failed, slowest, start = 0, 0.0, time.perf_counter()
    with goods_made() as goods:
        for one, ended in attempts(goods, range(asked.first, asked.first + asked.count), asked.seed, asked.limit):
            codes[ended.code] += 1
            ends[f"{one.kind}: {ended.code}"] += 1
            slowest = max(slowest, ended.seconds)
            if ended.faults:
                failed += 1
                _say(asdict(one) | asdict(ended) | {"content": None, "out": ended.out[-600:], "err": ended.err[-1500:]})
                if asked.keep:
                    (_made(asked.keep) / f"{one.number}-{Path(KINDS[one.kind].file).name}").write_bytes(one.content)
    seconds = {"seconds": round(time.perf_counter() - start, 1), "slowest": round(slowest, 2)}
    _say({"mutants": asked.count, "failed": failed, "codes": codes, "by kind": dict(sorted(ends.items())), **seconds})
    return 1 if failed else 0


def _say(values: Any) -> None:
    print(json.dumps(values), flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(run())
