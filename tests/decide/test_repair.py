"""Repair: output projections as numpy's least squares has them, on the activations of the pruned model itself."""

from __future__ import annotations

import copy
import json
from operator import attrgetter

import families.tiny
import numpy as np
import pytest
import torch
from by_hand import logits_of
from tiny import LAYERS, PLACES, save_tiny, tiny_model, tiny_tokens

import dicer
from dicer.ask.spelling import Wanted
from dicer.decide import walk_cut
from dicer.decide.together import score_all
from dicer.decide.walk_cut import held_out
from dicer.errors import RecipeError
from dicer.measure import propagate, runner, statistics
from dicer.measure.stores.resident import ResidentStore
from dicer.measure.text import Calibration
from dicer.model.source import from_memory, open_model
from dicer.write.verify.masked import masked_model

AXES = ("attention", "mlp")
TOKENS = tiny_tokens(24, 24)
SOME = ("llama", "phi3", "gpt2", "opt")


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in TOKENS.tolist()))
    return str(path)


@pytest.fixture(scope="module")
def repaired(many):
    def prune(model, **recipe):
        asked = {"method": "rc-a", "repair": "least-squares", "axis": "all", "ratio": 0.5, "calib": many, **recipe}
        if asked["axis"] == "mlp":
            asked["ratio"] = 0.3
        return dicer.prune(model, dicer.Recipe(**asked), dicer.Compute(batch_size=8))

    return prune


def layers_of(model, family):
    return attrgetter(PLACES[family][0])(model)


def output_of(layer, family, axis):
    return layer.get_submodule(PLACES[family][1 + (axis == "mlp")])


def seen(model, module):
    """Inputs of a module over all tokens, float64 [T, ...]."""
    found = []
    handle = module.register_forward_pre_hook(
        lambda _, inputs: found.append(inputs[0].detach().double().flatten(0, -2))
    )
    with torch.no_grad():
        model(input_ids=TOKENS, use_cache=False)
    handle.remove()
    return found[0]


def columns(module, family):
    """[inputs, d], float64."""
    weight = module.weight.detach().double()
    return weight if family == "gpt2" else weight.T


def before_cut(dense, pruned, family, index, axis, *, propagated=True):
    """The dense model in which all that comes before a sub-layer is the pruned model's."""
    mixed = copy.deepcopy(dense)
    layers, cut = layers_of(mixed, family), layers_of(pruned, family)
    for i in range(index if propagated else 0):
        layers[i] = cut[i]
    if axis == "mlp" and propagated:
        name = PLACES[family][1].partition(".")[0]
        setattr(layers[index], name, getattr(cut[index], name))
    return mixed


def pairs(dense, result, family, *, propagated=True):
    """(axis, plan, all inputs, inputs that stay, dense columns, repaired columns) of every sub-layer."""
    for index in range(LAYERS):
        for axis in AXES:
            if index not in result.plan.axes.get(axis, {}):
                continue
            mixed = before_cut(dense, result.model, family, index, axis, propagated=propagated)
            old = output_of(layers_of(mixed, family)[index], family, axis)
            new = output_of(layers_of(result.model, family)[index], family, axis)
            inputs = seen(mixed, old)
            plan = result.plan.axes[axis][index]
            kept = inputs[:, plan.rows(inputs.shape[1] // plan.units)]
            if plan.merge is not None:
                kept = seen(result.model, new)
            yield axis, plan, inputs, kept, columns(old, family), columns(new, family), new.bias


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        *((family, {"axis": "attention" if family == "opt" else "all"}) for family in SOME),
        ("gemma2", {"criterion": "obs"}),
        ("llama", {"criterion": "obs", "propagate": "dense"}),
        ("llama", {"method": "sim-dominant", "axis": "mlp"}),
        ("llama", {"method": "sim-mean", "axis": "mlp"}),
    ],
)
def test_least_squares_of_numpy(family, recipe, repaired):
    """Every column of every sub-layer; in float64, so that the walk and this test have the same inputs to round."""
    dense = tiny_model(family, dtype=torch.float64)
    result = repaired(dense, ridge=0.0, **recipe)
    propagated = recipe.get("propagate") != "dense"
    for *_, inputs, kept, old, new, _ in pairs(dense, result, family, propagated=propagated):
        inputs, kept = inputs.float().double(), kept.float().double()  # as the sums take them in
        wanted, *_ = np.linalg.lstsq(kept.numpy(), (inputs @ old).numpy(), rcond=None)
        assert np.abs(new.numpy() - wanted).max() <= 1e-6 * np.abs(wanted).max()


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        ("llama", {"ridge": 0.0}),
        ("opt", {"ridge": 1e-9}),  # neurons that never fire
        ("opt", {"ridge": 1e-9, "method": "sim-mean", "axis": "mlp"}),
    ],
)
def test_least_squares_of_numpy_float32(family, recipe, repaired):
    """Outputs: the two forward passes round apart, and columns are only as sure as the inputs differ."""
    dense = tiny_model(family)
    for *_, inputs, kept, old, new, _ in pairs(dense, repaired(dense, **recipe), family):
        wanted, *_ = np.linalg.lstsq(kept.numpy(), (inputs @ old).numpy(), rcond=None)
        near(kept @ new, kept.numpy() @ wanted)


def near(found, wanted, tolerance=3e-5):
    """As the size of all goes."""
    assert np.linalg.norm(found.numpy() - wanted) <= tolerance * np.linalg.norm(wanted)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_bias_solved_along(family, repaired):
    dense = tiny_model(family)
    result = repaired(dense, ridge=0.0, compensate="bias")
    for index, (*_, inputs, kept, old, new, bias) in enumerate(pairs(dense, result, family)):
        before = output_of(layers_of(dense, family)[index // 2], family, AXES[index % 2]).bias
        ones = np.concatenate([kept.numpy(), np.ones((len(kept), 1))], 1)
        wanted, *_ = np.linalg.lstsq(ones, (inputs @ old).numpy(), rcond=None)
        added = bias.detach().double() - (0 if before is None else before.detach().double())
        near(kept @ new + added, ones @ wanted)


@pytest.mark.parametrize("ridge", ["auto", 0.0, 1e-4, 1.0, 1e3])
@pytest.mark.parametrize("more", [{}, {"method": "sim-mean", "axis": "mlp"}, {"criterion": "random"}])
def test_error_not_above_the_unrepaired(ridge, more, repaired):
    dense = tiny_model("llama")
    result = repaired(dense, ridge=ridge, **more)
    for _, plan, inputs, kept, old, new, _ in pairs(dense, result, "llama"):
        plain = plan.__class__(plan.units, plan.keep, plan.scores, plan.merge).output(old.float()).double()
        wanted = inputs @ old
        errors = [float((kept @ own - wanted).square().sum()) for own in (plain, new)]
        assert errors[1] <= errors[0] * (1 + 1e-6)
        assert plan.repair.about["error"] == pytest.approx(errors, rel=2e-3)


def test_factors_where_tokens_are_few(repaired, tmp_path):
    rows = tmp_path / "few.jsonl"
    rows.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in TOKENS[:2].tolist()))
    result = repaired(tiny_model("llama"), axis="mlp", calib=str(rows))
    note = next(note for note in result.notes if "calibration tokens" in note)
    assert note == (
        "48 calibration tokens are 1.7 for each of the 28 inputs that stay of a layer's neurons, so one factor a "
        "column is solved for, not the columns; 10 for each would be --samples 12 --seq-len 24"
    )
    for index, layer in result.plan.mlp.items():
        assert (layer.repair.about["form"], layer.repair.about["ridge"]) == ("factors", 0.1)
        before, after = layer.repair.about["error"]
        assert after < before
        old = tiny_model("llama").model.layers[index].mlp.down_proj.weight.detach()[:, layer.keep]
        ratio = layer.repair.weight / old
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("more", [{}, {"criterion": "obs"}, {"rolls": 3}, {"compensate": "bias"}, {"target": "dense"}])
def test_factors_of_numpy(more, repaired, tmp_path):
    """Of the first MLP: each kept column times its activations is one unknown's row, all outputs of all tokens long."""
    rows = tmp_path / "few.jsonl"
    rows.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in TOKENS[:2].tolist()))
    dense = tiny_model("llama", dtype=torch.float64)
    layer = repaired(dense, axis="mlp", calib=str(rows), ridge=0.1, **more).plan.mlp[0]
    down = dense.model.layers[0].mlp.down_proj
    acts, old = seen(dense, down)[: 2 * TOKENS.shape[1]].numpy(), columns(down, "llama").numpy()
    gone = [unit for unit in range(40) if unit not in layer.keep.tolist()]
    brought = np.stack([np.outer(acts[:, k], old[k]) for k in layer.keep.tolist()])  # [K, T * d], as [K, T, d]
    lacks = acts[:, gone] @ old[gone]
    gram = np.einsum("itd,jtd->ij", brought, brought)
    if layer.repair.bias is not None:  # beside the mean: around it, of inputs and what is lacking
        centred = acts - acts.mean(0)
        gram = (centred.T @ centred)[np.ix_(layer.keep, layer.keep)] * (old[layer.keep] @ old[layer.keep].T)
        brought = np.stack([np.outer(centred[:, k], old[k]) for k in layer.keep.tolist()])
    gram += 0.1 * np.diag(gram).mean() * np.eye(len(gram))
    change = np.linalg.solve(gram, np.einsum("ktd,td->k", brought, lacks))
    found = layer.repair.weight.double().numpy() / old[layer.keep].T - 1
    assert np.abs(found - change).max() <= 1e-5 * np.abs(change).max()


def test_neurons_that_others_make_up_for(repaired):
    """Of four neurons with one gate two are sums of the others; half of all go, and nothing changes."""
    dense = tiny_model("llama")
    with torch.no_grad():
        for layer in dense.model.layers:
            gate, up = layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight
            for first in range(0, len(gate), 4):
                gate[first : first + 4] = gate[first].clone()
                up[first + 2], up[first + 3] = up[first] + up[first + 1], up[first] - 2 * up[first + 1]
    recipe = {"criterion": "obs", "grouping": "none", "set": {"ridge": 1e-7, "block": 1}, "ridge": 1e-10, "axis": "mlp"}
    asked = {"repair": "least-squares", "ratio": 0.5, **recipe}
    rows = {"calib": str(repaired.__closure__[0].cell_contents)}
    result = dicer.prune(dense, dicer.Recipe(**asked, **rows))
    assert all(len(layer.keep) == 20 for layer in result.plan.mlp.values())
    torch.testing.assert_close(logits_of(result.model), logits_of(dense), rtol=0, atol=1e-5)  # of 1.2


def test_target_dense_is_nearer_to_the_dense_model(repaired):
    dense = tiny_model("llama")
    found = {}
    for target in ("own", "dense"):
        result = repaired(dense, ridge=1e-6, target=target)
        with torch.no_grad():
            hidden = [m(input_ids=TOKENS, output_hidden_states=True).hidden_states[-1] for m in (dense, result.model)]
        found[target] = float((hidden[0] - hidden[1]).square().mean())
    assert found["dense"] < found["own"]


@pytest.mark.parametrize("method", ["rc-a", "sim-mean"])
@pytest.mark.parametrize("family", SOME)
def test_target_dense_by_hand(family, method, repaired):
    """Of the second layer's MLP: numpy on what the dense hidden state would need."""
    dense = tiny_model(family, dtype=torch.float64)
    result = repaired(dense, ridge=1e-9, target="dense", axis="mlp", layers="0,1", method=method)
    mixed = before_cut(dense, result.model, family, 1, "attention")
    with torch.no_grad():
        states = [m(input_ids=TOKENS, output_hidden_states=True).hidden_states[2] for m in (dense, mixed)]
    output = output_of(layers_of(mixed, family)[1], family, "mlp")
    inputs, layer = seen(mixed, output), result.plan.mlp[1]
    wanted = inputs @ columns(output, family) + (states[0] - states[1]).flatten(0, 1)
    kept = inputs[:, layer.keep]
    if method == "sim-mean":
        kept = seen(result.model, output_of(layers_of(result.model, family)[1], family, "mlp"))
    solved, *_ = np.linalg.lstsq(kept.numpy(), wanted.numpy(), rcond=None)
    found = layer.repair.weight.T.double()
    assert (kept @ found - kept @ torch.from_numpy(solved)).norm() <= 1e-4 * wanted.norm()


def test_ridge_of_the_held_out(repaired):
    plan = repaired(tiny_model("llama"), axis="mlp").plan
    assert {layer.repair.about["ridge"] for layer in plan.mlp.values()} <= {1e-4, 1e-3, 1e-2, 1e-1}
    assert {layer.repair.about["tokens"] for layer in plan.mlp.values()} == {TOKENS.numel()}


@pytest.mark.parametrize(
    ("family", "once", "target"),
    [("llama", True, "own"), ("opt", True, "own"), ("gpt2", True, "dense"), ("gemma2", False, "own")],
)
def test_layers_run_once(family, once, target, repaired, monkeypatch):
    """From the MLP's output projection on, where no norm comes behind it: the same to the last bit."""
    calls, onward = [], runner.Runner.onward
    monkeypatch.setattr(
        runner.Runner, "onward", lambda self, values, *rest: calls.append(0) or onward(self, values, *rest)
    )
    found = repaired(tiny_model(family), axis="mlp", target=target).plan
    assert (len(calls) > LAYERS) == once  # on the probe alone, it is once a layer
    monkeypatch.setattr(propagate, "HALFWAY", 0)
    assert repaired(tiny_model(family), axis="mlp", target=target).plan.diff(found) == []


@pytest.mark.parametrize("recipe", [{"compensate": "bias"}, {"target": "dense"}, {"method": "taylor"}])
def test_model_in_memory_left_as_it_was(recipe, repaired):
    dense = tiny_model("llama")
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in dense.named_parameters()}
    repaired(dense, **recipe)
    for name, parameter in dense.named_parameters():
        assert parameter.data_ptr() == before[name][0]
        assert torch.equal(parameter, before[name][1])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in dense.modules())


def test_model_left_as_it_was_after_an_error(repaired, monkeypatch):
    dense = tiny_model("llama")
    before = {name: p.data_ptr() for name, p in dense.named_parameters()}
    calls = []

    def fails(visit, layer, ridge):
        calls.append(visit.place)
        if len(calls) == 4:
            raise RecipeError("not this one.")
        return layer

    monkeypatch.setattr(walk_cut, "repaired", fails)
    with pytest.raises(RecipeError, match="not this one"):
        repaired(dense)
    assert {name: p.data_ptr() for name, p in dense.named_parameters()} == before


# Bad input


def refused(says, run):
    with pytest.raises(RecipeError) as caught:
        run()
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_held_out_that_is_the_calibration():
    same = Calibration(TOKENS[:1].repeat(16, 1), {})
    refused("--ridge auto holds samples out, and of these 16 none differs", lambda: held_out(same))
    refused("of these 1 none differs", lambda: held_out(Calibration(TOKENS[:1], {})))
    assert held_out(Calibration(TOKENS[:16], {})).nonzero()[:, 0].tolist() == [7, 15]
    twice = Calibration(torch.cat([TOKENS[:8], TOKENS[7:8], TOKENS[8:15]]), {})
    assert held_out(twice).nonzero()[:, 0].tolist() == [15]


def test_singular_gram(repaired):
    dense = tiny_model("llama")
    with torch.no_grad():
        mlp = dense.model.layers[2].mlp
        mlp.up_proj.weight[1:] = mlp.up_proj.weight[:1]
        mlp.gate_proj.weight[1:] = mlp.gate_proj.weight[:1]
    refused("mlp of layer 2 is singular at ridge 0", lambda: repaired(dense, ridge=0.0, axis="mlp"))


def test_numbers_that_are_not_finite(repaired):
    dense = tiny_model("llama")
    with torch.no_grad():
        dense.model.layers[1].mlp.up_proj.weight[3] = float("inf")
    asked = {"axis": "mlp", "layers": "1-3", "method": "random"}
    refused("the Gram matrix of mlp of layer 1 is not finite", lambda: repaired(dense, **asked))
    refused("behind layer 1 are not finite", lambda: repaired(dense, axis="mlp", method="random", layers="3"))


def test_gram_too_large(repaired, monkeypatch):
    monkeypatch.setattr(statistics, "free_memory", lambda device: 30_000)
    says = "the Gram matrix of 40 inputs takes 0.0 GB (float64), and solving it as much again twice, but cpu has 0.0 GB"
    refused(says, lambda: repaired(tiny_model("llama"), axis="mlp"))


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_target_dense_behind_a_norm(family, repaired):
    refused("--target dense needs outputs that join", lambda: repaired(tiny_model(family), target="dense"))


@pytest.mark.parametrize(
    "asked",
    [{"repair": "least-squares"}, {"propagate": "pruned"}, {"rolls": 3, "grouping": "random"}, {"criterion": "obs"}],
)
@pytest.mark.parametrize("axis", ["mlp", "experts", "all"])
def test_experts(axis, asked, many):
    model = families.tiny.tiny_model("mixtral")
    recipe = dicer.Recipe(axis=axis, calib=many, **{"method": "random", **asked})
    refused(
        "read one output projection, and mlp" if axis != "experts" else "and experts",
        lambda: dicer.prune(model, recipe),
    )


def test_attention_beside_experts(many):
    model = families.tiny.tiny_model("mixtral")
    recipe = dicer.Recipe(axis="attention", ratio=0.5, calib=many, method="best", target="dense")
    plan = dicer.prune(model, recipe).plan
    assert all(layer.repair for layer in plan.axes["attention"].values())


def test_processes_with_other_layers(repaired, monkeypatch):
    monkeypatch.setattr(propagate, "from_first", lambda value: [0])
    refused("the processes do not prune the same layers", lambda: repaired(tiny_model("llama"), target="dense"))


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ({"ridge": 0.1}, "--ridge 0.1 needs --repair"),
        ({"target": "dense"}, "--target dense needs --repair"),
        ({"repair": "least-squares", "ridge": "much"}, "ridge is 'auto' or a number from 0 on; got 'much'"),
        ({"repair": "least-squares", "ridge": -1}, "ridge is 'auto' or a number from 0 on; got -1"),
        ({"repair": "least-squares", "axis": "block"}, "--axis block leaves whole layers as they are"),
        ({"method": "act-l2", "rolls": 4}, "--rolls 4 tries random partitions"),
        ({"grouping": "random", "merge": "mean", "rolls": 4}, "these are 'random' and 'mean'"),
    ],
)
def test_recipes_that_contradict_themselves(recipe, says):
    refused(says, lambda: dicer.Recipe(**recipe).resolve())


# The plan


def test_plan_with_repaired_tensors(many, tmp_path):
    model = save_tiny(tmp_path / "model", "gpt2")
    recipe = dicer.Recipe(axis="all", ratio=0.5, repair="least-squares", compensate="bias", calib=many)
    pruned = dicer.prune(model, recipe, output=tmp_path / "pruned")
    made = dicer.make_plan(model, recipe)
    made.save(tmp_path / "plan")
    dicer.apply_plan(tmp_path / "plan", model, tmp_path / "applied")
    names = ("model.safetensors", "dicer_plan.json", "dicer_plan.tensors")
    assert all((tmp_path / "pruned" / n).read_bytes() == (tmp_path / "applied" / n).read_bytes() for n in names)
    said = json.loads((tmp_path / "plan" / "dicer_plan.json").read_text())
    assert said["format"] == 4
    one = said["axes"]["mlp"]["0"]["repair"]
    assert one.keys() == {"form", "ridge", "tokens", "error", "sha256"}
    plain = dicer.make_plan(model, dicer.Recipe(axis="all", ratio=0.5, compensate="bias", calib=many))
    assert "layer 0 mlp: the same kept, repaired differently" in plain.diff(made)
    assert dicer.load_plan(tmp_path / "pruned").diff(pruned.plan) == []
    one["sha256"] = "0" * 64
    (tmp_path / "plan" / "dicer_plan.json").write_text(json.dumps(said))
    with pytest.raises(dicer.DicerError, match="layer 0 has another repaired output projection than its"):
        dicer.load_plan(tmp_path / "plan")
    del said["axes"]["mlp"]["0"]["repair"]
    (tmp_path / "plan" / "dicer_plan.json").write_text(json.dumps(said))
    with pytest.raises(dicer.DicerError, match="stands in one of its files only"):
        dicer.load_plan(tmp_path / "plan")


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3"])
def test_cut_as_the_walk_had_it(family, many, tmp_path):
    """What was written computes what the dense model of full size does with the repaired columns and zeros."""
    model = save_tiny(tmp_path / "model", family)
    recipe = dicer.Recipe(axis="all", ratio=0.5, repair="least-squares", compensate="bias", calib=many)
    dicer.prune(model, recipe, output=tmp_path / "pruned")
    plan = dicer.load_plan(tmp_path / "pruned")
    assert all(layer.repair for layer in plan.mlp.values())
    expected = logits_of(masked_model(open_model(model), plan))
    torch.testing.assert_close(logits_of(dicer.load(tmp_path / "pruned")), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, repaired):
    result = repaired(tiny_model("llama", dtype=dtype), target="dense")
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    for layers in result.plan.axes.values():
        for layer in layers.values():
            assert layer.repair.weight.dtype == torch.float32
            assert layer.repair.about["error"][1] < layer.repair.about["error"][0]


def test_float32_above_so_many_inputs(repaired, monkeypatch):
    wide = repaired(tiny_model("llama"), ridge=1e-3).plan
    monkeypatch.setattr(statistics, "GRAM_FLOAT64", 8)
    narrow = repaired(tiny_model("llama"), ridge=1e-3).plan
    for axis, layers in wide.axes.items():
        for index, layer in layers.items():
            weight = narrow.axes[axis][index].repair.weight
            assert not torch.equal(weight, layer.repair.weight)
            torch.testing.assert_close(weight, layer.repair.weight, rtol=0, atol=1e-3 * float(weight.abs().max()))


def test_cut_without_repair_goes_along(many):
    """Propagation alone: the second layer's scores are those of the hidden states that the first cut has left."""
    dense = tiny_model("llama")
    recipe = dicer.Recipe(criterion="act-l2", activation="mod", propagate="pruned", calib=many, ratio=0.5)
    result = dicer.prune(dense, recipe)
    assert result.plan.recipe["propagate"] == "pruned"
    mixed = before_cut(dense, result.model, "llama", 1, "attention")
    expected = seen(mixed, mixed.model.layers[1].mlp.down_proj).square().sum(0).sqrt()
    torch.testing.assert_close(result.plan.mlp[1].scores.double(), expected, rtol=1e-5, atol=1e-5)
    plain = dicer.prune(dense, dicer.Recipe(criterion="act-l2", activation="mod", calib=many, ratio=0.5)).plan
    assert torch.equal(plain.mlp[0].scores, result.plan.mlp[0].scores)
    assert not torch.equal(plain.mlp[1].scores, result.plan.mlp[1].scores)


def test_one_of_many_recipes_in_a_study(many):
    """A recipe that walks alone gets the plan that it would have had by itself."""
    model = tiny_model("llama")
    source = from_memory(model)
    asked = [dicer.Recipe(method="act-l2", calib=many), dicer.Recipe(method="best", calib=many)]
    wanted = [Wanted(recipe, dicer.Compute(dtype="float32", device="cpu")) for recipe in asked]
    found = score_all(source, ResidentStore(model, source.family), wanted, None)
    for recipe, one in zip(asked, found, strict=True):
        assert one.plan.diff(dicer.prune(model, recipe).plan) == []


def test_more_text_by_default():
    repaired = dicer.Recipe(repair="least-squares").text
    assert (repaired.samples, repaired.seq_len) == (32, 512)
    named = dicer.Recipe(method="best", samples=3).text
    assert (named.samples, named.seq_len, named.model_fields_set) == (3, 512, {"samples"})
    plain = dicer.Recipe(method="best", repair="none").text
    assert (plain.samples, plain.seq_len) == (10, 128)
