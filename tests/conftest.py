"""Fixtures that several test modules share."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import pytest
from tiny import save_tiny, tiny_tokens

from dicer.cli.main import main

# A busy machine is no fault of the code; where CI is set, hypothesis also tries the same examples each time.
hypothesis.settings.register_profile("patient", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("patient")
DATA = Path(os.environ.get("DICER_DATA", Path(__file__).parents[2] / "shared" / "data"))
COLOURS = ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "CLICOLOR_FORCE")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-clean-env", action="store_true", help="build the clean virtual environment (slow)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--run-clean-env"):
        return
    skip = pytest.mark.skip(reason="builds a virtual environment; run 'make clean-env'")
    for item in items:
        if "clean_env" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Real texts for tests; found through DICER_DATA."""
    if not DATA.is_dir():
        pytest.skip("no evaluation data: set DICER_DATA to a folder with wikitext2/ and the rest")
    return DATA


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Llama."""
    return save_tiny(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ready calibration tokens."""
    path: Path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in tiny_tokens().tolist()))
    return path


@pytest.fixture(scope="module")
def calib(rows: Path) -> str:
    """The same, as a recipe names them."""
    return str(rows)


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of transfer entropies that no other test and no user has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DICER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def in_time(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever waits, or never ends, is woken after the module's SECONDS, as a failure."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits, or takes too long"))
    signal.alarm(request.module.SECONDS)
    yield
    signal.alarm(0)


class Ended(NamedTuple):
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def no_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes rich believe in a terminal is not set, here and in the processes that a test starts."""
    for name in COLOURS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def command(no_colours: None, capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Type a command: ``command("prune", model, "-o", out)``."""

    def typed(*words: Any) -> Ended:
        capfd.readouterr()
        return Ended(main([str(word) for word in words]), *capfd.readouterr())

    return typed


@pytest.fixture
def run(command: Callable[..., Ended]) -> Callable[..., str]:
    """Type a command that must succeed and say nothing on stderr, which is no terminal here; what it printed."""

    def typed(*words: Any) -> str:
        code, out, err = command(*words)
        assert (code, err) == (0, "")
        assert "\r" not in out
        plain = re.sub(r"\x1b\[[\d;]*m", "", out)
        # typer decides on the colours of its help when it is imported, so only a process of its own can tell.
        assert plain == out or "Usage:" in plain
        return plain

    return typed


@pytest.fixture
def refused(command: Callable[..., Ended], tmp_path: Path) -> Callable[..., str]:
    """Type a command that must be refused with one line, exit code 2 and nothing on disk; the line."""

    def typed(*words: Any, says: Iterable[object] = ()) -> str:
        before = _tree(tmp_path)
        code, out, err = command(*words)
        assert code == 2, out + err
        assert err.startswith("dicer: ")
        assert err.count("\n") == 1, err
        assert [line for line in out.splitlines() if not line.startswith(("To do: ", "Scored in "))] == []
        for part in says:
            assert str(part) in err
        assert _tree(tmp_path) == before
        return err

    return typed


def _tree(folder: Path) -> dict[Path, tuple[int, int]]:
    """Every file below a folder, with its content's size and time."""
    return {p.relative_to(folder): (s.st_size, s.st_mtime_ns) for p in folder.rglob("*") if (s := p.lstat())}
