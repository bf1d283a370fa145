"""Fixtures that several test modules share."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import save_tiny, tiny_tokens

DATA = Path(os.environ.get("DICER_DATA", Path(__file__).parents[2] / "shared" / "data"))


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
