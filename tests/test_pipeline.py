"""The door: what is looked at before a run, without reading a text or a weight, and what is then done."""

from __future__ import annotations

import pytest
import torch
from tiny import save_tiny, tiny_model

import dicer
from dicer.decide.task import Decided
from dicer.errors import CalibrationError, OutputError, RecipeError
from dicer.model.tensors import SafetensorsSource

OWN = """import dicer

@dicer.criterion("own", source="a test")
def own(weights, statistics):
    return weights.up.sum(1)
"""


@pytest.fixture
def no_weights(monkeypatch):
    """To read a weight is a fault."""
    for name in ("read", "read_rows"):
        monkeypatch.setattr(SafetensorsSource, name, lambda *_: pytest.fail("a weight was read"))


@pytest.mark.usefixtures("no_weights")
def test_look_reads_no_text(model, tmp_path):
    (tmp_path / "broken.jsonl.gz").write_bytes(b"no zip")
    text = str(tmp_path / "broken.jsonl.gz")
    found = dicer.look(model, dicer.Recipe(calib=text), output=tmp_path / "out", perplexity_text=text)
    assert (found.task.runs_model, found.task.calibration) == (True, None)
    with pytest.raises(CalibrationError, match=r"none\.txt cannot be read"):
        dicer.look(model, dicer.Recipe(calib=str(tmp_path / "none.txt")))
    assert [path.name for path in tmp_path.iterdir()] == ["broken.jsonl.gz"]


def test_broken_text_after_the_look(model, tmp_path):
    (tmp_path / "broken.jsonl.gz").write_bytes(b"no zip")
    with pytest.raises(CalibrationError, match=r"broken\.jsonl\.gz cannot be read"):
        dicer.prune(model, dicer.Recipe(calib=str(tmp_path / "broken.jsonl.gz")), output=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["broken.jsonl.gz"]


@pytest.mark.parametrize("allocate", ["uniform", "global"])
def test_look_at_sizes(model, calib, allocate):
    recipe = dicer.Recipe(calib=calib, allocate=allocate)
    found, result = dicer.look(model, recipe), dicer.prune(model, recipe)
    assert isinstance(found.task, Decided) == (allocate == "uniform")
    assert found.before == result.before
    assert found.after == (result.after if allocate == "uniform" else found.before)
    assert found.device == str(result.model.device) == "cpu"


@pytest.fixture
def overwritten(model, tmp_path):
    """An earlier output that holds whatever a run could read."""
    dicer.prune(model, dicer.Recipe(method="weight-l2"), output=tmp_path / "out")
    (tmp_path / "out" / "mine.py").write_text(OWN)
    for name in ("text.txt", "ratios.json"):
        (tmp_path / "out" / name).write_text("{}")
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("asked", "more"),
    [
        ({"criterion": "OUT/mine.py:own"}, {}),
        ({"grouping": "OUT/mine.py:own"}, {}),
        ({"merge": "OUT/mine.py:own"}, {}),
        ({"calib": "OUT/text.txt"}, {}),
        ({"allocate": "OUT/ratios.json"}, {}),
        ({"method": "let-llm", "entropy_profile": "OUT/ratios.json"}, {}),
        ({}, {"perplexity_text": "OUT/text.txt"}),
        ({}, {"inputs": ["OUT/text.txt"]}),
    ],
)
def test_output_that_holds_what_is_read(model, overwritten, asked, more):
    def placed(value):
        return [placed(v) for v in value] if isinstance(value, list) else value.replace("OUT", str(overwritten))

    recipe = dicer.Recipe(**{name: placed(value) for name, value in asked.items()})
    more = {name: placed(value) for name, value in more.items()}
    before = {path.name: path.read_bytes() for path in overwritten.iterdir()}
    for run in (dicer.look, dicer.prune):
        with pytest.raises(OutputError, match="which this run reads"):
            run(model, recipe, output=overwritten, overwrite=True, **more)
    assert {path.name: path.read_bytes() for path in overwritten.iterdir()} == before


def test_output_that_is_the_model(tmp_path):
    made = dicer.prune(save_tiny(tmp_path / "llama"), dicer.Recipe(method="weight-l2"), output=tmp_path / "out").path
    with pytest.raises(OutputError, match="which this run reads"):
        dicer.prune(made, dicer.Recipe(method="weight-l2"), output=made, overwrite=True)
    own = dicer.Recipe(criterion=f"{tmp_path / 'mine.py'}:own")
    (tmp_path / "mine.py").write_text(OWN)
    result = dicer.prune(tmp_path / "llama", own, output=made, overwrite=True)  # from beside it
    assert result.plan.recipe["criterion"].startswith("mine.py:own (sha256")


def test_machine_option_inside_recipe(model, calib):
    with pytest.warns(DeprecationWarning, match="no part of a recipe any more") as seen:
        old = dicer.Recipe(calib=calib, device="cpu", batch_size=1)
    assert len(seen) == 1
    plans = [dicer.prune(m, old).plan for m in (model, tiny_model("llama"))] + [dicer.make_plan(model, old)]
    assert [plan.recipe["batch_size"] for plan in plans] == [1, 1, 1]
    assert dicer.prune(model, old, dicer.Compute(batch_size=2)).plan.recipe["batch_size"] == 2
    with pytest.warns(DeprecationWarning, match="device: no part"):
        elsewhere = dicer.Recipe(calib=calib, device="nowhere")
    for run in (dicer.look, dicer.prune, dicer.make_plan):
        with pytest.raises(RecipeError, match="nowhere"):
            run(model, elsewhere)


def test_machine_options(model, calib):
    recipe = dicer.Recipe(calib=calib)
    result = dicer.prune(model, recipe, dicer.Compute(dtype="bfloat16"))
    assert result.model.dtype == torch.bfloat16
    assert result.plan.recipe["dtype"] == "bfloat16"
    assert dicer.prune(model, recipe).plan.recipe["dtype"] == "auto"
