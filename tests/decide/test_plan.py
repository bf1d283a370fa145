"""Plans: read as they were saved, told apart, and refused where they are broken or do not fit the model."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny

import dicer
from dicer.decide.plan import LayerPlan
from dicer.errors import PlanError

ZEROS, ONES = torch.zeros(40, dtype=torch.int64), torch.ones(40)
MERGE = {"row": ZEROS, "weight_in": ONES, "weight_out": ONES.clone()}
JSON, TENSORS = "dicer_plan.json", "dicer_plan.tensors"


@pytest.fixture(scope="module")
def made(model):
    return dicer.make_plan(model, dicer.Recipe(method="weight-l2"))


@pytest.fixture
def saved(made, tmp_path):
    made.save(tmp_path / "plan")
    return tmp_path / "plan"


def replan(plan, axes, blocks=()):
    return dicer.PrunePlan(plan.model, plan.recipe, {}, {}, axes, blocks)


def refused(path, says):
    with pytest.raises(PlanError) as caught:
        dicer.load_plan(path)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [JSON, TENSORS])
def test_missing_file(saved, name):
    (saved / name).unlink()
    refused(saved, f"no plan at {saved}: {name} is missing. 'dicer plan' writes one.")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *((JSON, content) for content in (b"{", b"[]", b"\xff", b"[" * 10**5, b'{"format": 2}')),
        *((TENSORS, content) for content in (b"", b"\xff" * 99, None)),
    ],
)
def test_broken_file(saved, name, content):
    (saved / name).write_bytes((saved / name).read_bytes()[:-100] if content is None else content)
    refused(saved, "is broken")


RECORDS = [
    (lambda r: r.update(format=6), "it has format 6, and this version of dicer reads 1 to 5"),
    (lambda r: r.pop("format"), "'format' is missing"),
    (lambda r: r.pop("axes"), "'axes' is missing"),
    (lambda r: r["model"].pop("fingerprint"), "'model.fingerprint' is missing"),
    (lambda r: r["recipe"].pop("method"), "does not say 'method'"),
    (lambda r: r["recipe"].pop("ratio_of"), "'ratio_of'"),
    (lambda r: r.update(recipe=[]), "'recipe': Input should be an object, got []"),
    (lambda r: r.update(calibration="x"), "'calibration': Input should be an object, got 'x'"),
    (lambda r: r.update(allocation=[]), "'allocation': Input should be an object, got []"),
    (lambda r: r["allocation"].update(whole="x"), "'allocation.whole"),
    (lambda r: r.update(axes={}), "its axes are []"),
    (lambda r: r["axes"].update(mlp={}), "its axes are ['mlp']"),
    (lambda r: r["axes"].update(heads=r["axes"]["mlp"]), "'heads'"),
    (lambda r: r["axes"]["mlp"].update({"9": {}}), "'axes.mlp.9.units' is missing"),
    (lambda r: r["axes"]["mlp"]["1"].update(units=39), "layer 1 does not keep a sorted selection of its 39 units"),
    (lambda r: r["axes"]["mlp"]["1"].update(keep=29), "layer 1 keeps 30 units in one file and 29 in the other"),
    (lambda r: r.update(blocks=[1]), "a layer that goes whole is also cut"),
    *((lambda r, b=b: r.update(blocks=b), "'blocks' is no sorted list of layers") for b in ([9, 8], [8, 8])),
    *((lambda r, b=b: r.update(blocks=b), "'blocks") for b in ([-1], [True], "all")),
]


@pytest.mark.parametrize(("change", "says"), RECORDS, ids=[says for _, says in RECORDS])
def test_damaged_record(saved, change, says):
    record = json.loads((saved / JSON).read_text())
    change(record)
    (saved / JSON).write_text(json.dumps(record))
    refused(saved, says)


LAYERS = [
    *(({"keep": keep}, "sorted selection of its 40 units") for keep in (
        torch.arange(29, -1, -1), torch.arange(20, 50), torch.arange(-1, 29), torch.arange(30.0),
    )),
    ({"scores": torch.zeros(39)}, "sorted selection of its 40 units"),
    ({"row": ZEROS}, "a part of a merge only"),
    *((MERGE | part, "a merge that does not fit") for part in (
        {"row": ZEROS + 30}, {"row": ZEROS.float()}, {"weight_in": ONES * torch.nan}, {"weight_in": ONES.double()},
    )),
    *(({"means": means}, "layer 1 has means that do not fit") for means in (
        torch.zeros(39), torch.zeros(2, 40), torch.full((40,), torch.nan),
    )),
]  # fmt: skip


@pytest.mark.parametrize(("values", "says"), LAYERS)
def test_damaged_tensors(saved, values, says):
    tensors = load_file(saved / TENSORS)
    tensors |= {f"mlp.1.{name}": value for name, value in values.items()}
    save_file(tensors, saved / TENSORS)
    refused(saved, says)


def test_plan_that_does_not_fit_the_model(model, made, tmp_path):
    """As the two may agree with each other and not with the model."""
    layer = LayerPlan(40, torch.arange(2), torch.zeros(40))
    for axes, blocks, says in (
        ({"attention": {1: LayerPlan(3, torch.arange(2), torch.zeros(3))}}, (), "3 units of attention in layer 1"),
        ({"mlp": {9: layer}}, (), "has 40 units of mlp in layer 9, the model has 0"),
        ({"mlp": {1: LayerPlan(40, torch.arange(2), torch.zeros(40), means=torch.zeros(80))}}, (), "means of 80"),
        ({"attention": {1: LayerPlan(2, torch.arange(0), torch.zeros(2), means=torch.zeros(6))}}, (), "means of 6"),
        ({}, (4,), "removes layer 4, and the model has 4 layers"),
        ({}, (0, 1, 2, 3), "removes all 4 layers, and one has to stay"),
    ):
        with pytest.raises(PlanError, match=says):
            dicer.apply_plan(replan(made, axes, blocks), model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("family", "seed", "says"),
    [
        ("llama", 1, r"made for other weights \(llama, fingerprint .*'dicer plan'"),
        ("qwen2", 0, "made for a 'llama' model .* this is a 'qwen2'.*'dicer plan'"),
    ],
)
def test_plan_of_another_model(made, tmp_path, family, seed, says):
    other = save_tiny(tmp_path / "other", family, seed=seed)
    with pytest.raises(PlanError, match=says):
        dicer.apply_plan(made, other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_layers_in_order_beyond_nine(made, tmp_path):
    layers = {i: LayerPlan(3, torch.tensor([0, 2]), torch.rand(3)) for i in range(8, 13)}
    replan(made, {"mlp": layers}).save(tmp_path)
    assert list(dicer.load_plan(tmp_path).mlp) == [8, 9, 10, 11, 12]


def test_same_units_kept_and_others_merged_differently(model, calib):
    plans = [dicer.make_plan(model, dicer.Recipe(method=method, calib=calib)) for method in ("sim-a", "sim-mean")]
    assert len(plans[0].diff(plans[1])) == 4
    assert plans[1].diff(plans[1]) == []
