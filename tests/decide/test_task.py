"""A recipe held against a model: what is known when, and what it will read."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import LAYERS, tiny_model, tiny_tokens

from dicer.ask.compute import Compute
from dicer.ask.recipe import Recipe
from dicer.decide.task import Decided, prepare, with_text
from dicer.errors import RecipeError
from dicer.measure.statistics import Need
from dicer.measure.text import Calibration
from dicer.model.source import from_memory
from dicer.model.units import SubLayer


@pytest.fixture(scope="module")
def source():
    return from_memory(tiny_model("llama"))


def calibrated(tokens):
    return Calibration(tokens, {})


@pytest.mark.parametrize(
    ("asked", "decided", "runs"),
    [
        ({}, True, True),
        ({"method": "weight-l2"}, True, False),
        ({"method": "taylor"}, True, True),
        ({"method": "random", "compensate": "bias"}, True, True),  # for the means
        ({"allocate": "global"}, False, True),
        ({"method": "weight-l2", "allocate": "global"}, False, False),
        ({"method": "let-llm"}, False, True),
        ({"axis": "block"}, False, True),
        ({"method": "weight-l2", "allocate": "FILE"}, True, False),
    ],
)
def test_known_beforehand(source, tmp_path, asked, decided, runs):
    (tmp_path / "ratios.json").write_text(json.dumps({"mlp": {"1": 0.5}}))
    asked = {name: str(tmp_path / "ratios.json") if value == "FILE" else value for name, value in asked.items()}
    task = prepare(source, Recipe(**asked, calib="no such text"))  # which nobody has looked for
    assert (isinstance(task, Decided), task.runs_model, task.calibration) == (decided, runs, None)
    assert runs or with_text(task) is task


def test_outline(source):
    task = prepare(source, Recipe(method="weight-l2", axis="all", ratio=0.5, layers="1-2"), Compute(batch_size=3))
    assert task.compute == Compute(batch_size=3)
    assert sorted(task.places) == [SubLayer(layer, axis) for layer in (1, 2) for axis in ("attention", "mlp")]
    outline = task.outline()
    assert {axis: {i: len(layer.keep) for i, layer in found.items()} for axis, found in outline.axes.items()} == {
        "attention": {1: 1, 2: 1},
        "mlp": {1: 20, 2: 20},
    }


def test_needs(source):
    needs = prepare(source, Recipe(method="sim-dominant", activation="pre")).needs
    assert needs == {Need(kind, activation) for kind, activation in (
        ("square_sum", "pre"), ("gram", "pre"), ("square_sum", "mod"),
    )}  # fmt: skip
    needs = prepare(source, Recipe(method="act-mean", axis="all", compensate="bias")).needs
    assert needs == {Need(kind, activation, axis) for kind, activation, axis in (
        ("sum", "post", "mlp"), ("sum", "mod", "attention"), *(("channel_sum", "mod", a) for a in ("mlp", "attention")),
    )}  # fmt: skip
    without_groups = prepare(source, Recipe(merge="dominant"))
    assert without_groups.needs == {Need("square_sum", "post")}
    assert without_groups.notes == ["merge 'dominant' has nothing to merge without groups; name a --grouping"]


def test_rounded_to_nothing(source):
    notes = prepare(source, Recipe(method="weight-l2", ratio=0.01, layers="1-2")).notes
    assert notes == ["2 layers keep all their neurons: the ratio rounds to nothing there"]


def test_text_read_before(source):
    known = calibrated(tiny_tokens())
    task = with_text(prepare(source, Recipe(calib="no such text")), read=lambda _: known)
    assert task.calibration is known
    assert isinstance(task, Decided)
    assert task.amounts.keep == {SubLayer(i, "mlp"): 30 for i in range(LAYERS)}


def test_tokens_of_another_model(source):
    with pytest.raises(
        RecipeError, match=r"token id 264, and the model knows 0 to 263: these ids are from another tok"
    ):
        with_text(prepare(source, Recipe()), read=lambda _: calibrated(torch.tensor([[1, 264]])))
    gpt2 = prepare(from_memory(tiny_model("gpt2")), Recipe())
    with pytest.raises(RecipeError, match="samples of 129 tokens are longer than the model's 128 positions"):
        with_text(gpt2, read=lambda _: calibrated(tiny_tokens(1, 129)))
    with_text(prepare(source, Recipe()), read=lambda _: calibrated(tiny_tokens(1, 129)))  # rotary positions have no end
