"""The table of scripts/mutate.py is of today's code; ``make mutants`` runs it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

import dicer

SCRIPT = Path(__file__).parents[1] / "scripts" / "mutate.py"
SPEC = importlib.util.spec_from_file_location("mutate", SCRIPT)
assert SPEC is not None
assert SPEC.loader is not None
mutate = importlib.util.module_from_spec(SPEC)
sys.modules["mutate"] = mutate
SPEC.loader.exec_module(mutate)


@pytest.mark.parametrize("mutation", mutate.MUTATIONS, ids=lambda mutation: mutation.what)
def test_text_stands_once(mutation):
    assert (Path(dicer.__file__).parent / mutation.file).read_text(encoding="utf-8").count(mutation.old) == 1
    assert mutation.old != mutation.new
