"""The matrix is what is checked in: a third of the types by turns, all of them by ``make families``."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import dicer
from families.independent import Wrong, logits, masked_logits, tensors_of
from families.load_elsewhere import logits_elsewhere
from families.matrix import (
    COLUMNS,
    FORMS,
    cells,
    chosen_types,
    compact,
    differences,
    expanded,
    read_expected,
)
from families.matrix import rows as matrix_rows
from families.page import GOALS, PAGE, page, passed
from families.reasons import few_words
from families.tiny import CAUSAL, TYPES, tiny_input, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")
EXPECTED = read_expected()
CHOSEN = chosen_types()
SHARE = 16  # types of one test, which has one process load all that it writes


@pytest.mark.parametrize("share", [CHOSEN[i : i + SHARE] for i in range(0, len(CHOSEN), SHARE)], ids=lambda own: own[0])
def test_as_expected(share: list[str]) -> None:
    lines = differences(matrix_rows(share), EXPECTED)
    assert not lines, "\n".join([*lines, "where that is right: make families-update"])


def test_all_types_listed() -> None:
    assert [*EXPECTED] == [*TYPES]
    assert all([*row] == cells() for row in EXPECTED.values())
    assert {name: expanded(compact(row)) for name, row in EXPECTED.items()} == EXPECTED


def test_none_wrong() -> None:
    wrong = [(name, cell, said) for name, row in EXPECTED.items() for cell, said in row.items() if "WRONG" in said]
    assert wrong == []


@pytest.mark.parametrize("cell", GOALS)
def test_goal(cell: str) -> None:
    assert passed({name: EXPECTED[name] for name in CAUSAL}, cell) >= GOALS[cell]


def test_page() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(EXPECTED)


def test_reasons_do_not_jitter() -> None:
    said = {
        said for row in EXPECTED.values() for said in row.values() if not said.startswith(("PASS", "-", "not built"))
    }
    assert not [reason for reason in said if re.search(r"/tmp|\d+\.\d+|\de[-+]\d", reason)]
    why = "what is cut cannot be built (XError: 48 by 4x8 and 2.5e-03 of a Gemma4 in /tmp/a/b of it. More.)"
    assert few_words(why) == "cannot be built: XError: # by # and # of a Gemma4 in of it"
    assert len(COLUMNS) * len(FORMS) + 1 == len(cells())


# The independent check can fail: each spoils one thing in a folder that is right, or says another plan.


@pytest.fixture(scope="module")
def granite(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("granite")
    tiny_model("granite").save_pretrained(folder / "dense")
    recipe = dicer.Recipe(criterion="random", axis="mlp", ratio=0.4)
    return folder, dicer.prune(folder / "dense", recipe, output=folder / "out")


def _spoilt(folder: Path, name: str, change: Any) -> Path:
    """A copy of the pruned folder with one tensor changed."""
    copy = folder / f"spoilt {name} {change.__name__}"
    shutil.copytree(folder / "out", copy)
    tensors = load_file(copy / "model.safetensors")
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def flipped(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flip(0)


def rescaled(tensor: torch.Tensor) -> torch.Tensor:
    return tensor * 1.001


def test_right_folder(granite: tuple[Path, Any]) -> None:
    folder, result = granite
    wanted = masked_logits("granite", folder / "dense", folder / "out", result.plan)
    (found,) = logits_elsewhere([(folder / "out", "AutoModelForCausalLM")], tiny_input())
    assert (found - wanted).abs().max() < 1e-4 * wanted.std()
    dense = load_file(folder / "dense" / "model.safetensors")
    assert tensors_of(folder / "out").keys() == dense.keys()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.layers.1.mlp.gate_proj.weight", rescaled),
        ("model.layers.1.mlp.gate_proj.weight", flipped),
        ("model.layers.1.self_attn.q_proj.weight", flipped),
    ],
)
def test_spoilt_tensor(granite: tuple[Path, Any], name: str, change: Any) -> None:
    folder, result = granite
    with pytest.raises(Wrong, match=re.escape(name)):
        masked_logits("granite", folder / "dense", _spoilt(folder, name, change), result.plan)


def test_other_plan(granite: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = granite
    recipe = dicer.Recipe(criterion="random", axis="mlp", ratio=0.4, seed=1)
    other = dicer.make_plan(folder / "dense", recipe)
    with pytest.raises(Wrong, match="keeps other rows than its plan says"):
        masked_logits("granite", folder / "dense", folder / "out", other)


def test_folder_that_does_not_load(granite: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = granite
    found = logits_elsewhere(
        [(tmp_path, "AutoModelForCausalLM"), (folder / "dense", "AutoModelForCausalLM")], tiny_input()
    )
    assert isinstance(found[0], str)
    assert torch.allclose(found[1], logits(tiny_model("granite")), atol=1e-5)
