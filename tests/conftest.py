"""Fixtures that several test modules share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

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
