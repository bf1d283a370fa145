"""What a run will take is said beforehand, and what memory there is decides how it is done."""

from __future__ import annotations

import json
import os
import re

import pytest
import torch
from families.tiny import tiny_input
from families.tiny import tiny_model as tiny_of_type
from tiny import LAYERS, save_tiny, tiny_model

import dicer
from dicer.ask.compute import Compute
from dicer.ask.recipe import Recipe
from dicer.decide import cost
from dicer.decide.cost import as_foreseen, foresee, open_store, planned_bytes, weigh
from dicer.decide.decide import score
from dicer.decide.task import prepare, with_text
from dicer.errors import ModelError, RecipeError
from dicer.measure.stores.hidden import HiddenStates
from dicer.measure.stores.streamed import StreamedStore
from dicer.model.source import open_model

LAYER = 4 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 40 + 2 * 32)  # bytes: attention of 4 heads in 2 groups, MLP, norms
TABLE = 4 * 264 * 32


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_model(save_tiny(tmp_path_factory.mktemp("models") / "llama"))


@pytest.fixture(autouse=True)
def nothing_held(monkeypatch):
    """The process itself would drown a tiny model."""
    monkeypatch.setattr(cost, "held_memory", lambda: 0)


def asked(source, calib, compute=None, **recipe):
    return with_text(prepare(source, Recipe(calib=calib, **recipe), compute or Compute()))


def test_weights(source):
    weights = weigh(source, Compute())
    assert weights.layers == (LAYER,) * LAYERS
    assert (weights.outside, weights.head, weights.copied) == (TABLE + 4 * 32, TABLE, False)
    assert weights.whole == sum(info.nbytes for info in source.tensors.infos().values())
    half = weigh(source, Compute(dtype="bfloat16"))
    assert (half.layers, half.copied) == ((LAYER // 2,) * LAYERS, True)


@pytest.mark.parametrize("axis", ["mlp", "all"])
def test_what_a_plan_holds(source, calib, axis):
    """No less than what it has of repaired and of learned tensors, and nothing without."""
    sizes = []
    for more in ({}, {"repair": "least-squares"}, {"repair": "least-squares", "distill": 1}):
        recipe = Recipe(calib=calib, axis=axis, ratio=0.5, **more)
        layers = [layer for own in dicer.make_plan(source.folder, recipe).axes.values() for layer in own.values()]
        held = [t.nbytes for layer in layers for name, t in layer.tensors().items() if name.startswith(("rep", "lear"))]
        foreseen = planned_bytes(asked(source, calib, axis=axis, ratio=0.5, **more))
        assert sum(held) <= foreseen <= 2 * sum(held)
        sizes.append(foreseen)
    assert sizes[0] == 0 < sizes[1] < sizes[2]


def test_ways(source, calib):
    """In memory, where it fits; else layer by layer, sample by sample, with the states in files."""
    ways = [foresee(asked(source, calib), "cpu")]
    for _ in range(3):
        limit = ways[-1].memory - 1
        compute = Compute(memory=f"{limit / 1e6:.6f}MB")
        ways.append(foresee(asked(source, calib, compute), "cpu"))
    assert [(way.streamed, way.samples, way.on_disk) for way in ways] == [
        (False, None, False),
        (True, None, False),
        (True, 1, False),
        (True, 1, True),
    ]
    assert ways[0].memory - ways[1].memory == weigh(source, Compute()).whole - 2 * LAYER
    with pytest.raises(RecipeError, match="one layer at a time it takes about 0 MB"):
        foresee(asked(source, calib, Compute(memory="0.001MB")), "cpu")


def test_what_repair_keeps_of_all_tokens(source, calib, monkeypatch):
    """The MLP's inner activations and what goes past it, so that a layer runs but once, where there is room."""
    task = asked(source, calib, repair="least-squares", samples=6, seq_len=24)
    kept = foresee(task, "cpu").memory
    monkeypatch.setattr(cost, "HALFWAY", 0)
    assert kept - foresee(task, "cpu").memory == 6 * 24 * (40 + 32) * 4
    heads = asked(source, calib, repair="least-squares", axis="attention", samples=6, seq_len=24)
    without = foresee(heads, "cpu").memory
    monkeypatch.undo()
    monkeypatch.setattr(cost, "held_memory", lambda: 0)
    assert foresee(heads, "cpu").memory == without  # which run again in any case


@pytest.mark.parametrize("method", ["rc-a", "act-l2"])
def test_same_plan_any_way(source, calib, method):
    plans = []
    for compute in (Compute(batch_size=1), Compute(stream=True, batch_size=1), Compute(memory="0.15MB")):
        task = asked(source, calib, compute, method=method)
        found = foresee(task, "cpu")
        plans.append(score([as_foreseen(task, found)], open_store(task, found, "cpu"))[0])
    assert found.samples == 1
    assert plans[0].files() == plans[1].files() == plans[2].files()


def test_states_in_files(source, calib, tmp_path):
    task, plans = asked(source, calib, method="rc-a"), []
    for folder in (None, tmp_path):
        plans.append(score([task], StreamedStore(source, folder=folder))[0])
        assert [*tmp_path.iterdir()] == []  # gone as soon as they are mapped
    assert plans[0].files() == plans[1].files()


def test_states_do_not_run_into_each_other(tmp_path):
    first = HiddenStates([torch.ones(1, 2, 3), torch.zeros(1, 2, 3)], folder=tmp_path)
    second = first.__copy__()
    second[0] = torch.full((1, 2, 3), 5.0)
    assert [float(states.mean()) for states in first] == [1, 0]
    assert [float(states.mean()) for states in second] == [5, 0]
    assert len(second) == 2
    first[:] = [torch.full((1, 2, 3), 7.0), torch.full((1, 2, 3), 8.0)]
    assert [float(states.mean()) for states in first[1:]] == [8]
    assert [float(states.mean()) for states in first] == [7, 8]
    assert [float(states.mean()) for states in second] == [5, 0]


def test_too_large_for_the_machine(source, calib, monkeypatch):
    monkeypatch.setattr(cost, "free_memory", lambda _: 100_000)
    found = foresee(asked(source, calib), "cpu")
    assert found.streamed
    assert "do not fit in 0 MB" in found.line
    assert not found.on_disk
    monkeypatch.setattr(cost, "free_memory", lambda _: 30_000)  # hidden states of 6 x 24 tokens take 18 kB
    assert foresee(asked(source, calib), "cpu").on_disk
    assert not foresee(asked(source, calib, method="taylor"), "cpu").streamed
    plain, learns = (foresee(asked(source, calib, method="best", distill=n), "cpu", whole=True) for n in (0, 1))
    assert not foresee(asked(source, calib, method="best", distill=1), "cpu").streamed
    assert learns.memory > plain.memory
    assert not foresee(asked(source, calib), "cpu", whole=True).streamed


@pytest.mark.parametrize("method", ["random", "weight-l2"])
def test_no_activations_no_model(model, tmp_path, monkeypatch, method):
    """Nothing is loaded where only weights are read, and what is written is the same."""
    told = []
    dicer.prune(tiny_model("llama"), Recipe(method=method), output=tmp_path / "in memory")
    monkeypatch.setattr("dicer.model.source.ModelSource.load_model", None)
    dicer.prune(model, Recipe(method=method), output=tmp_path / "out", tell=told.append)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "in memory")]
    assert weights[0] == weights[1]
    assert told[0].startswith("To do: read layer by layer from disk: about ")


@pytest.mark.parametrize("axis", ["mlp", "experts", "attention"])
def test_experts(tmp_path, axis):
    """Whatever the units are, it is foreseen, and the plan is that of the model in memory."""
    tiny_of_type("qwen3_moe").save_pretrained(tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in tiny_input(4).tolist()))
    recipe = Recipe(criterion="act-l2", axis=axis, calib=str(rows))
    plans = [dicer.make_plan(tmp_path / "model", recipe, Compute(stream=stream)) for stream in (False, True)]
    assert plans[0].files() == plans[1].files()


@pytest.mark.parametrize("compute", [Compute(stream=True), Compute(memory="8GB")], ids=["stream", "memory"])
def test_model_in_memory(compute):
    with pytest.raises(RecipeError, match="in memory already"):
        dicer.prune(tiny_model("llama"), Recipe(method="random"), compute)


def test_told(model, calib):
    told = []
    dicer.make_plan(model, Recipe(calib=calib), Compute(stream=True), tell=told.append)
    assert re.fullmatch(r"To do: read layer by layer from disk: about .* of memory, 0 MB to read\.", told[0])
    assert re.fullmatch(r"Scored in [\d.]+ s; [\d.]+ GB of memory at the peak, 0\.00 GB read\.", told[1])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--stream", "--method", "taylor"), "gradients of the loss need the whole model"),
        (("--stream", "--perplexity", "builtin"), "run the whole model"),
        (("--memory", "lots"), "memory: Value error, a number with MB, GB or TB"),
        (("--memory", "1MB"), "is less than this run needs: one layer at a time"),
        (("--memory", "1MB", "--method", "taylor"), "is less than this run needs: with the whole model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_refused(model, rows, tmp_path, command, words, says, monkeypatch):
    monkeypatch.setattr(cost, "held_memory", lambda: 10**9)
    ended = command("prune", model, "-o", tmp_path / "out", "--calib", rows, *words)
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert says in ended.err
    assert [*tmp_path.iterdir()] == []


def test_changed_meanwhile(calib, tmp_path):
    model = save_tiny(tmp_path / "model", shards=True)
    shard = sorted(model.glob("*.safetensors"))[0]

    def touch(stage, *_):
        if stage == "calibration":
            os.utime(shard)

    with pytest.raises(ModelError, match=f"{shard.name} was changed while it was read"):
        dicer.prune(model, Recipe(calib=calib), Compute(stream=True), output=tmp_path / "out", progress=touch)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ModelError, match="was changed"):
        dicer.make_plan(model, Recipe(calib=calib), progress=touch)
