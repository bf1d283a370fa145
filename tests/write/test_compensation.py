"""Biases that make up for a cut, against means from plain hooks and products written out."""

from __future__ import annotations

import json
from operator import attrgetter

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import HIDDEN, LAYERS, NEURONS, PLACES, save_tiny, tiny_model, tiny_tokens

import dicer
from dicer.errors import RecipeError

SOME = ("llama", "phi3", "gpt2", "opt", "gemma2")
every_family = pytest.mark.parametrize("family", SOME)
both_axes = pytest.mark.parametrize("axis", ["attention", "mlp"])


@pytest.fixture(scope="module")
def compensated(calib):
    def prune(model, **recipe):
        asked = {"criterion": "weight-l2", "compensate": "bias", "calib": calib, **recipe}
        return dicer.prune(model, dicer.Recipe(**asked), dicer.Compute(batch_size=4))

    return prune


def output_of(model, family, axis, index):
    """An output projection; where the sub-layer is gone, what is there instead."""
    layer, at = attrgetter(PLACES[family][0])(model)[index], PLACES[family][1 + (axis == "mlp")]
    gone = layer.get_submodule(at.partition(".")[0])
    return gone if type(gone).__name__.startswith("Skipped") else layer.get_submodule(at)


def weight_of(output, family):
    """[d, C], float64."""
    weight = output.weight.detach().double()
    return weight.T if family == "gpt2" else weight


def bias_of(output):
    return 0.0 if output.bias is None else output.bias.detach().double()


def means(model, family, axis):
    """Mean input and mean output of each layer's output projection over all tokens, float64, in the plain forward."""
    found, handles = {}, []

    def note(index, inputs, output):
        output = output[0] if isinstance(output, tuple) else output  # attention that is gone also has no weights
        both = (*inputs, output)  # what is gone may be called by keywords
        found[index] = [values.detach().double().flatten(0, -2).mean(0) for values in (both[0], output)]

    for index in range(LAYERS):
        output = output_of(model, family, axis, index)
        hook = output.register_forward_hook(lambda _, x, y, index=index: note(index, x, y))
        handles.append(hook)
    with torch.no_grad():
        model(input_ids=tiny_tokens(), use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def channels(axis, layer, unit):
    """Inputs of the output projection that belong to a unit; heads have 8 each, four of them are in all groups."""
    size = 1 if axis == "mlp" else HIDDEN // layer.units
    return range(unit * size, (unit + 1) * size)


def assert_near(found, expected):
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=3e-6)


@both_axes
@every_family
def test_the_bias_is_the_mean_that_the_removed_units_added(family, axis, compensated):
    model = tiny_model(family)
    result = compensated(model, axis=axis, ratio=0.5)
    dense = means(model, family, axis)
    for index, layer in result.plan.axes[axis].items():
        before = output_of(model, family, axis, index)
        weight, kept = weight_of(before, family), layer.keep.tolist()
        lost = torch.zeros(HIDDEN, dtype=torch.float64)
        for unit in set(range(layer.units)) - set(kept):
            for channel in channels(axis, layer, unit):
                lost += weight[:, channel] * dense[index][0][channel]
        assert lost.abs().max() > 1e-3, "else nothing is tested"
        after = output_of(result.model, family, axis, index)
        assert_near(after.bias, bias_of(before) + lost)
        mine = [channel for unit in kept for channel in channels(axis, layer, unit)]
        assert torch.equal(weight_of(after, family), weight[:, mine])
        assert_near(layer.means, dense[index][0])


@pytest.mark.parametrize("merge", ["mean", "dominant"])
@every_family
def test_with_a_merge_it_is_what_the_merged_units_do_not_add(family, merge, compensated):
    model = tiny_model(family)
    result = compensated(model, grouping="similarity", merge=merge, ratio=0.5)
    dense = means(model, family, "mlp")
    for index, layer in result.plan.mlp.items():
        groups = [torch.nonzero(layer.merge.row == k).flatten().tolist() for k in range(len(layer.keep))]
        assert sorted(unit for group in groups for unit in group) == list(range(NEURONS))
        mean = dense[index][0]  # a
        inputs = [sum(mean[i] for i in group) / len(group) for group in groups]  # M_in a
        if merge == "dominant":
            inputs = [mean[unit] for unit in layer.keep.tolist()]
        before, after = (output_of(m, family, "mlp", index) for m in (model, result.model))
        expected = weight_of(before, family) @ mean - weight_of(after, family) @ torch.stack(inputs)
        assert expected.abs().max() > 1e-3
        assert_near(after.bias, bias_of(before) + expected)


@pytest.mark.parametrize(("axis", "merge"), [("attention", "prune"), ("mlp", "prune"), ("mlp", "dominant")])
@every_family
def test_the_mean_output_of_a_single_layer_that_is_cut_is_the_dense_ones(family, axis, merge, compensated):
    how = {"axis": axis, "layers": "1", "ratio": 0.5, "merge": merge}
    how["grouping"] = "none" if merge == "prune" else "similarity"
    model = tiny_model(family)
    cut, bare = (compensated(model, **how, compensate=kind).model for kind in ("bias", "none"))
    dense, same, other = (means(m, family, axis)[1][1] for m in (model, cut, bare))
    assert_near(same, dense)
    assert (other - dense).abs().max() > 1e-3


@both_axes
@every_family
def test_a_sub_layer_that_is_gone_leaves_its_mean_output(family, axis, compensated, tmp_path):
    model, file = tiny_model(family), tmp_path / "one.json"
    file.write_text(json.dumps({axis: {"1": 1}}))
    result = compensated(model, axis=axis, allocate=str(file))
    assert len(result.plan.axes[axis][1].keep) == 0
    expected = means(model, family, axis)[1][1]
    shell = output_of(result.model, family, axis, 1)
    assert [name for name, _ in shell.named_parameters()] == ["bias"]
    assert_near(shell.bias, expected)
    assert_near(means(result.model, family, axis)[1][1], expected)


def test_a_layer_that_keeps_everything_needs_no_bias(compensated, tmp_path):
    file = tmp_path / "one.json"
    file.write_text(json.dumps({"mlp": [0, 0.5, 0, 0.25]}))
    result = compensated(tiny_model("llama"), allocate=str(file))
    assert [layer.means is None for layer in result.plan.mlp.values()] == [True, False, True, False]
    biases = [output_of(result.model, "llama", "mlp", index).bias is None for index in range(LAYERS)]
    assert biases == [True, False, True, False]


@pytest.mark.parametrize(("axis", "switch"), [("mlp", "mlp_bias"), ("attention", "attention_bias")])
def test_layers_that_are_all_alike_make_a_stock_llama_with_zeros_elsewhere(axis, switch, compensated):
    model = tiny_model("llama")
    pruned = compensated(model, axis=axis, ratio=0.5).model
    assert type(pruned).__name__ == "LlamaForCausalLM"
    assert getattr(pruned.config, switch) is True
    biases = {name: p for name, p in pruned.named_parameters() if name.endswith(".bias")}
    output = PLACES["llama"][1 + (axis == "mlp")]
    wanted = {name for name in biases if f"{output}.bias" in name}
    assert len(wanted) == LAYERS
    assert len(biases) == LAYERS * {"mlp": 3, "attention": 4}[axis]
    for name, bias in biases.items():
        assert bool(bias.any()) == (name in wanted)


@pytest.mark.parametrize("axis", ["mlp", "attention"])
def test_names_without_their_prefix_get_biases_too(axis, calib, tmp_path):
    """As ``AutoModel.save_pretrained`` writes them."""
    folders = [save_tiny(tmp_path / name, "llama", tied=True) for name in ("with", "without")]
    tensors = load_file(folders[1] / "model.safetensors")
    short = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(short, folders[1] / "model.safetensors", metadata={"format": "pt"})
    recipe = dicer.Recipe(criterion="weight-l2", compensate="bias", calib=calib, axis=axis, ratio=0.5)
    logits = []
    for folder in folders:
        dicer.prune(folder, recipe, output=folder.with_suffix(".out"))
        with torch.no_grad():
            logits.append(dicer.load(folder.with_suffix(".out"))(tiny_tokens(2)).logits)
    torch.testing.assert_close(*logits, rtol=0, atol=1e-6)


def test_means_that_overflowed_make_no_bias(compensated):
    model = tiny_model("llama", dtype=torch.float16)
    with torch.no_grad():
        for projection in (model.model.layers[1].mlp.up_proj, model.model.layers[1].mlp.gate_proj):
            projection.weight[3] = 6e4
    with pytest.raises(RecipeError, match="mean activations of mlp of layer 1 are not finite"):
        compensated(model, layers="1", ratio=0.5)


def test_the_bias_has_the_dtype_of_the_checkpoint(compensated):
    result = compensated(tiny_model("llama", dtype=torch.bfloat16), ratio=0.5)
    exact = compensated(tiny_model("llama"), ratio=0.5).model
    for index in range(LAYERS):
        bias = output_of(result.model, "llama", "mlp", index).bias
        assert bias.dtype == torch.bfloat16
        torch.testing.assert_close(
            bias.float(), bias_of(output_of(exact, "llama", "mlp", index)).float(), rtol=0.1, atol=0.1
        )


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2"])
def test_means_of_any_batch_size(calib, tmp_path, family):
    """Bit for bit: they are added up sample by sample."""
    model = save_tiny(tmp_path / family, family)
    recipe = dicer.Recipe(criterion="weight-l2", axis="all", compensate="bias", calib=calib)
    plans = [dicer.make_plan(model, recipe, dicer.Compute(batch_size=size)) for size in (None, 1, 3)]
    for axis, layers in plans[0].axes.items():
        for index, layer in layers.items():
            for plan in plans[1:]:
                if layer.means is not None:  # of a few heads all may stay
                    assert torch.equal(layer.means, plan.axes[axis][index].means)
        assert axis == "attention" or all(layer.means is not None for layer in layers.values())
