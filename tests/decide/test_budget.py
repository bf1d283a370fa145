"""What a ratio takes away: parameters counted from the tensors, bounds, and who gives most."""

from __future__ import annotations

import json
import re
from itertools import combinations, product
from operator import attrgetter

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import pdist
from tiny import FAMILIES, HIDDEN, LAYERS, NEURONS, PLACES, tiny_model, tiny_tokens

import dicer
from dicer.errors import RecipeError

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def pruned(calib):
    def prune(model, **recipe):
        return dicer.prune(model, dicer.Recipe(calib=calib, **recipe))

    return prune


def layers_of(model, family):
    return attrgetter(PLACES[family][0])(model)


def held(module):
    return sum(parameter.numel() for parameter in module.parameters())


def unit_cost(family, axis):
    """Parameters that go with one neuron, or with one key-value head and its query heads."""
    ungated = family in ("gpt2", "opt")
    if axis == "mlp":
        return 2 * HIDDEN + 1 if ungated else 3 * HIDDEN
    bias, queries = int(family in ("gpt2", "opt", "qwen2")), 8 if ungated else 16
    return (queries + 8 + 8) * (HIDDEN + bias) + HIDDEN * queries


def units(family, axis):
    return NEURONS if axis == "mlp" else 4 if family in ("gpt2", "opt") else 2


def axes_of(axis):
    return ("attention", "mlp") if axis == "all" else (axis,)


def eligible(model, family, axis, layers):
    if axis == "block":
        return sum(held(layers_of(model, family)[i]) for i in layers)
    return len(layers) * sum(units(family, name) * unit_cost(family, name) for name in axes_of(axis))


def wholes(model, family, axis, layers):
    """What each --ratio-of is a fraction of."""
    return {
        "chosen": eligible(model, family, axis, layers),
        "mlp": LAYERS * NEURONS * unit_cost(family, "mlp"),
        "decoder": sum(map(held, layers_of(model, family))),
        "model": held(model),
    }


# What really goes


FRACTION = {"mlp": 0.4, "attention": 0.3, "all": 0.37, "block": 0.45}  # of what can be chosen
FACTORS = {
    "family": ("llama", "qwen2", "phi3", "gpt2"),
    "axis": tuple(FRACTION),
    "of": ("chosen", "mlp", "decoder", "model"),
    "layers": ("all", "1-2"),
    "allocate": ("uniform", "transfer-entropy", "global"),
}


def pairwise(factors, possible):
    """A few of all combinations, in which every two values that can meet do so."""
    rows = [row for row in product(*factors.values()) if possible(dict(zip(factors, row, strict=True)))]
    pairs = {row: set(combinations(enumerate(row), 2)) for row in rows}
    missing = set().union(*pairs.values())
    while missing:
        best = max(rows, key=lambda row: len(pairs[row] & missing))
        missing -= pairs[best]
        yield best


CASES = list(pairwise(FACTORS, lambda row: row["axis"] != "block" or row["allocate"] == "transfer-entropy"))


@pytest.mark.parametrize(tuple(FACTORS), CASES)
def test_the_ratio_is_what_really_goes(family, axis, of, layers, allocate, pruned):
    model, chosen = tiny_model(family), range(LAYERS) if layers == "all" else (1, 2)
    whole = wholes(model, family, axis, chosen)[of]
    target = FRACTION[axis] * eligible(model, family, axis, chosen)
    how = {"axis": axis, "ratio_of": of, "layers": layers, "allocate": allocate, "ratio": target / whole}
    result = pruned(model, criterion=None if axis == "block" else "output-l2", **how)
    gone = held(model) - held(result.model)
    assert result.before.parameters - result.after.parameters == gone
    assert result.plan.allocation["target"] == pytest.approx(target)
    assert result.plan.allocation["whole"] == whole
    if axis == "block":
        limit = max(map(held, layers_of(model, family))) / 2
    elif allocate == "uniform":  # half a neuron in each layer; heads even their rounding out
        limit = sum(unit_cost(family, name) * (len(chosen) if name == "mlp" else 1) for name in axes_of(axis)) / 2
    else:
        limit = max(unit_cost(family, name) for name in axes_of(axis)) / 2
    assert abs(gone - target) <= limit
    cut = {index for found in result.plan.axes.values() for index in found} | set(result.plan.blocks)
    assert cut <= set(chosen)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loses_the_units_that_its_plan_counts(family, pruned):
    model = tiny_model(family)
    result = pruned(model, method="let-llm", ratio=0.3)
    plan = result.plan
    expected = sum(
        (layer.units - len(layer.keep)) * unit_cost(family, axis)
        for axis, layers in plan.axes.items()
        for layer in layers.values()
    )
    assert held(model) - held(result.model) == expected
    target = 0.3 * sum(map(held, layers_of(model, family)))
    assert abs(expected - target) <= unit_cost(family, "attention") / 2
    assert plan.recipe["method"] == "let-llm"
    assert {name: len(values) for name, values in plan.allocation["transfer_entropy"].items()} == dict.fromkeys(
        ("blocks", "attention", "mlp"), LAYERS
    )
    assert bool(result.model(tiny_tokens(1)).logits.isfinite().all())


def test_the_written_checkpoint_has_the_parameters_that_were_asked_for(pruned, calib, tmp_path):
    model = tiny_model("llama")
    dicer.prune(model, dicer.Recipe(method="let-llm", ratio=0.35, calib=calib), output=tmp_path / "out")
    target = 0.35 * sum(map(held, model.model.layers))
    gone = held(model) - held(dicer.load(tmp_path / "out"))
    assert abs(gone - target) <= unit_cost("llama", "attention") / 2


# Ratios of one's own


def write(path, ratios):
    path.write_text(json.dumps(ratios))
    return str(path)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_ratios_of_a_file_are_those_of_the_layers(family, pruned, tmp_path):
    ratios = {"mlp": [0.1, 0.33, 0.5, 0], "attention": {"1": 0.5, "3": 0.25}}
    result = pruned(tiny_model(family), axis="all", allocate=write(tmp_path / "mine.json", ratios))
    wanted = {("mlp", i): ratio for i, ratio in enumerate(ratios["mlp"])}
    wanted |= {("attention", i): ratios["attention"].get(str(i), 0) for i in range(LAYERS)}
    gone, target = 0, 0.0
    for (axis, index), ratio in wanted.items():
        layer = result.plan.axes[axis][index]
        assert abs(layer.units - len(layer.keep) - ratio * layer.units) < 1
        gone += (layer.units - len(layer.keep)) * unit_cost(family, axis)
        target += ratio * layer.units * unit_cost(family, axis)
    assert result.before.parameters - result.after.parameters == gone
    assert abs(gone - target) <= unit_cost(family, "attention") / 2
    assert result.plan.allocation["target"] == pytest.approx(target)
    assert re.fullmatch(r"mine\.json \(sha256 [0-9a-f]{16}\)", result.plan.recipe["allocate"]), (
        "no path of this machine"
    )


def test_a_ratio_of_one_in_a_file_removes_the_module_and_both_of_a_layer_the_layer(pruned, calib, tmp_path):
    model = tiny_model("llama")
    file = write(tmp_path / "mine.json", {"mlp": [0, 1, 1, 0.5], "attention": {"0": 1, "2": 1}})
    result = pruned(model, axis="all", allocate=file)
    assert result.plan.blocks == (2,)
    assert {i: len(layer.keep) for i, layer in result.plan.mlp.items()} == {0: 40, 1: 0, 3: 20}
    assert {i: len(layer.keep) for i, layer in result.plan.axes["attention"].items()} == {0: 0, 1: 2, 3: 2}
    assert result.model.config.num_hidden_layers == 3
    assert bool(result.model(tiny_tokens(1)).logits.isfinite().all())
    found = dicer.look(model, dicer.Recipe(axis="all", allocate=file, calib=calib))
    assert (found.before, found.after) == (result.before, result.after), "what a dry run says"


@pytest.mark.parametrize(
    ("ratios", "says"),
    [
        ({"mlp": [0, 0, 0, 0]}, "every ratio in .*mine.json is 0"),
        ({}, "every ratio in .*mine.json is 0"),
        ({"mlp": {"0": 0.6, "1": 0.2}}, "mlp of layer 0 is to lose 0.6, and --max-ratio is 0.5"),
        ({"mlp": {"1": 0.5}}, "mlp of layer 1 is to lose 0.5, and --min-width is 21"),
    ],
)
def test_a_file_that_does_not_fit_the_model_is_refused(ratios, says, pruned, tmp_path):
    how = {"criterion": "weight-l2", "max_ratio": 0.5, "min_width": 21}
    with pytest.raises(RecipeError, match=says):
        pruned(tiny_model("llama"), allocate=write(tmp_path / "mine.json", ratios), **how)


def test_what_a_file_does_not_name_is_left_alone_also_with_a_multiple(pruned, tmp_path):
    file = write(tmp_path / "mine.json", {"mlp": {"1": 0.5}})
    plan = pruned(tiny_model("llama"), criterion="weight-l2", allocate=file, width_multiple=16).plan
    assert [len(layer.keep) for layer in plan.mlp.values()] == [40, 16, 40, 40]
    assert plan.notes == []


def test_a_file_may_remove_all_of_one_kind_but_not_every_layer(pruned, tmp_path):
    how = {"criterion": "weight-l2", "axis": "all"}
    file = write(tmp_path / "mine.json", {"mlp": [1] * LAYERS})
    assert [len(layer.keep) for layer in pruned(tiny_model("llama"), allocate=file, **how).plan.mlp.values()] == [0] * 4
    file = write(tmp_path / "mine.json", {"mlp": [1] * LAYERS, "attention": [1] * LAYERS})
    with pytest.raises(RecipeError, match="removes every layer whole"):
        pruned(tiny_model("llama"), allocate=file, **how)


def test_a_layer_emptied_in_two_steps_goes_as_in_one(pruned, tmp_path):
    model = tiny_model("llama")
    for axis in ("attention", "mlp"):
        file = write(tmp_path / f"{axis}.json", {axis: {"1": 1}})
        model = pruned(model, criterion="weight-l2", axis=axis, allocate=file).model
    assert type(model).__name__ == "LlamaForCausalLM"
    assert len(model.model.layers) == LAYERS - 1


# One ranking


def naive_widths(scores, gone):
    """Neurons that each layer keeps when the lowest z-scores go."""
    ranked = []
    for index, values in scores.items():
        mean, deviation = float(values.double().mean()), float(np.std(values.double().numpy()))
        ranked += [((float(value) - mean) / deviation, index) for value in values]
    lost = [index for _, index in sorted(ranked)[:gone]]
    return {index: NEURONS - lost.count(index) for index in scores}


def activations(model, family="llama"):
    """Inputs of each MLP's output projection, [T, N] for each layer, from hooks on the ordinary forward."""
    seen, handles = {}, []
    for index, layer in enumerate(layers_of(model, family)):
        output = layer.get_submodule(PLACES[family][2])
        handles.append(
            output.register_forward_pre_hook(lambda _, x, index=index: seen.update({index: x[0].flatten(0, -2)}))
        )
    with torch.no_grad():
        model(input_ids=tiny_tokens())
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("grouping", ["none", "random", "similarity"])
def test_one_ranking_says_how_many_stay_and_groups_say_which(grouping, pruned):
    model, acts = tiny_model("llama"), activations(tiny_model("llama"))
    plan = pruned(model, criterion="act-l2", activation="mod", grouping=grouping, allocate="global", ratio=0.4).plan
    scores = {index: values.double().norm(dim=0) for index, values in acts.items()}
    widths = naive_widths(scores, gone=64)  # of 4 x 40
    assert len(set(widths.values())) > 1, "else nothing is tested"
    assert {index: len(layer.keep) for index, layer in plan.mlp.items()} == widths
    for index, layer in plan.mlp.items():
        strongest = sorted(range(NEURONS), key=lambda i: -float(scores[index][i]))[: widths[index]]
        if grouping == "similarity":
            tree = linkage(pdist(acts[index].T.double().numpy(), "cosine"), "complete")
            labels = fcluster(tree, widths[index], "maxclust")
            groups = [np.flatnonzero(labels == label).tolist() for label in np.unique(labels)]
            strongest = [max(group, key=lambda i: float(scores[index][i])) for group in groups]
        if grouping != "random":
            assert layer.keep.tolist() == sorted(strongest)
        else:
            assert layer.keep.tolist() != sorted(strongest)


def test_transfer_entropy_shares_out_and_rc_a_says_which(pruned):
    model = tiny_model("llama")
    how = {"allocate": "transfer-entropy", "ratio": 0.3}
    top, rc_a = pruned(model, method="act-l2", **how).plan, pruned(model, method="rc-a", **how).plan
    assert rc_a.recipe["method"] == "rc-a"
    widths = [{i: len(layer.keep) for i, layer in plan.mlp.items()} for plan in (top, rc_a)]
    assert widths[0] == widths[1]
    assert len(set(widths[0].values())) > 1
    assert any(not torch.equal(top.mlp[i].keep, rc_a.mlp[i].keep) for i in range(LAYERS))


@pytest.mark.parametrize("allocate", ["transfer-entropy", "global"])
def test_modules_that_keep_fewer_than_the_groups_asked_for_are_counted_in_a_note(allocate, pruned):
    how = {"criterion": "act-l2", "grouping": "random", "allocate": allocate, "ratio": 0.4}
    free = pruned(tiny_model("llama"), **how).plan
    assert free.notes == []
    widths = sorted(len(layer.keep) for layer in free.mlp.values())
    few = pruned(tiny_model("llama"), groups=widths[1], **how).plan
    assert widths[0] < widths[1], "else nothing is tested"
    assert few.notes == [f"--groups {widths[1]} is more than 1 of 4 modules keep; those have a group a unit"]
    assert sorted(len(layer.keep) for layer in few.mlp.values()) == widths


@pytest.mark.parametrize(
    ("family", "config"),
    [("opt", {"do_layer_norm_before": False}), ("gpt2", {"scale_attn_by_inverse_layer_idx": True})],
)
def test_an_empty_layer_stays_where_its_norm_or_its_number_still_counts(family, config, pruned, tmp_path):
    """Norms behind the residual stream change what passes; with a layer less, the others would be scaled anew."""
    model = tiny_model(family, **config)
    file = write(tmp_path / "mine.json", {"mlp": {"1": 1}, "attention": {"1": 1}})
    result = pruned(tiny_model(family, **config), criterion="weight-l2", axis="all", allocate=file)
    assert result.plan.blocks == ()
    layer, (_, attention, mlp) = layers_of(model, family)[1], PLACES[family]
    with torch.no_grad():
        for output in (attention, mlp):
            layer.get_submodule(output).weight.zero_()
            layer.get_submodule(output).bias.zero_()
        expected = model(tiny_tokens(2)).logits
        torch.testing.assert_close(result.model(tiny_tokens(2)).logits, expected, rtol=0, atol=2e-5)


def test_blocks_of_a_model_that_scales_attention_by_the_layers_number_stay(pruned):
    with pytest.raises(RecipeError, match="scales attention by the layer's number, so no layer can go whole"):
        pruned(tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True), axis="block", ratio=0.25)


def test_all_chosen_blocks_may_go_where_others_stay(pruned):
    assert pruned(tiny_model("llama"), axis="block", layers="1-2", ratio=0.95).plan.blocks == (1, 2)


@pytest.mark.parametrize("split", ["share", "module"])
def test_blocks_are_measured_only_where_they_decide(split, pruned):
    plan = pruned(tiny_model("llama"), method="let-llm", ratio=0.3, split=split).plan
    assert ("blocks" in plan.allocation["transfer_entropy"]) == (split == "share")


# Bounds


@pytest.mark.parametrize("allocate", ["transfer-entropy", "global"])
def test_no_module_loses_more_than_the_bounds_allow(allocate, pruned):
    model = tiny_model("llama", kv_heads=4)
    how = {"criterion": "output-l2", "axis": "all", "allocate": allocate, "ratio": 0.27}
    free = pruned(model, **how).plan
    assert min(len(layer.keep) for layer in free.mlp.values()) < 28, "else the bounds have nothing to do"
    for layers in pruned(model, max_ratio=0.3, **how).plan.axes.values():
        assert all(len(layer.keep) >= 0.7 * layer.units for layer in layers.values())
    narrow = pruned(model, min_width=29, **how).plan
    assert min(len(layer.keep) for layer in narrow.mlp.values()) >= 29
    assert any(len(layer.keep) < 4 for layer in narrow.axes["attention"].values()), "it is for neurons"
    eights = pruned(model, width_multiple=8, **how).plan
    assert {len(layer.keep) % 8 for layer in eights.mlp.values()} == {0}


def test_uniform_ratios_round_to_the_nearest_multiple_also_past_the_bounds(pruned):
    plan = pruned(tiny_model("llama"), method="weight-l2", ratio=0.85, width_multiple=8).plan
    assert {len(layer.keep) for layer in plan.mlp.values()} == {8}  # 6 rounds to 8, and 80% is the most that can go


# What adds nothing goes first


def plant(model, family, index, axes=("attention", "mlp")):
    """Make sub-layers add nothing."""
    for axis, at in zip(("attention", "mlp"), PLACES[family][1:], strict=True):
        if axis in axes:
            for parameter in layers_of(model, family)[index].get_submodule(at).parameters():
                parameter.data.zero_()
    return model


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=tiny_tokens(2, 24, seed=5), use_cache=False).logits


PLANTED = [*(("llama", index) for index in range(LAYERS)), ("gpt2", 0), ("gemma2", 1), ("phi3", 2), ("opt", 3)]


@pytest.mark.parametrize(("family", "index"), PLANTED)
def test_a_block_that_adds_nothing_is_the_first_to_go(family, index, pruned):
    model = plant(tiny_model(family), family, index)
    result = pruned(model, axis="block", ratio=0.25)
    assert result.plan.blocks == (index,)
    assert len(layers_of(result.model, family)) == LAYERS - 1
    torch.testing.assert_close(logits_of(result.model), logits_of(model), rtol=0, atol=1e-5)


def shares(plan, family):
    """layer -> the fraction of its units' parameters that goes."""
    gone, whole = dict.fromkeys(range(LAYERS), 0), dict.fromkeys(range(LAYERS), 0)
    for axis, layers in plan.axes.items():
        for index, layer in layers.items():
            gone[index] += (layer.units - len(layer.keep)) * unit_cost(family, axis)
            whole[index] += layer.units * unit_cost(family, axis)
    return {index: gone[index] / whole[index] for index in gone}


@pytest.mark.parametrize("axis", ["mlp", "attention", "all"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_block_that_adds_nothing_gets_the_highest_ratio(family, axis, pruned):
    model = plant(tiny_model(family), family, 2)
    plan = pruned(model, criterion="output-l2", axis=axis, allocate="transfer-entropy", ratio=0.25).plan
    found = shares(plan, family)
    assert found[2] == max(found.values())
    assert found[2] > min(found.values())
    assert plan.allocation["transfer_entropy"]["mlp" if axis == "mlp" else "attention"][2] == 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_sub_layer_that_adds_nothing_is_removed_whole_at_the_threshold(family, pruned):
    for axis in ("attention", "mlp"):
        model = plant(tiny_model(family), family, 1, (axis,))
        # The highest ratio is not less than the mean of all.
        how = {"axis": axis, "allocate": "transfer-entropy", "ratio": 0.3, "drop_threshold": 0.3}
        result = pruned(model, criterion="weight-l2", **how)
        assert len(result.plan.axes[axis][1].keep) == 0
        assert result.plan.blocks == ()
        assert len(layers_of(result.model, family)) == LAYERS
        wanted = 0.3 * eligible(model, family, axis, range(LAYERS))
        shell = unused(model, family, axis) if axis == "attention" or family in ("gpt2", "opt") else 0
        removed = sum(1 for layer in result.plan.axes[axis].values() if not len(layer.keep))
        gone = held(model) - held(result.model) - removed * shell
        assert abs(gone - wanted) <= unit_cost(family, axis)


def unused(model, family, axis):
    """Parameters of a sub-layer that no unit owns, which go with it all the same: output biases, norms of heads."""
    layer = layers_of(model, family)[0]
    parts = {"attention": PLACES[family][1].partition(".")[0], "mlp": PLACES[family][2].partition(".")[0]}
    inside = [layer.fc1, layer.fc2] if (family, axis) == ("opt", "mlp") else [layer.get_submodule(parts[axis])]
    return sum(map(held, inside)) - units(family, axis) * unit_cost(family, axis)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_layer_of_which_nothing_stays_goes_whole_unless_biases_are_to_stay(family, pruned):
    model = plant(tiny_model(family), family, 2)
    how = {"criterion": "output-l2", "axis": "all", "allocate": "transfer-entropy", "ratio": 0.47}
    how |= {"schedule": "rank", "drop_threshold": 0.8}  # blocks: 0.94, 0.63, 0.31 and 0
    whole = pruned(model, **how)
    assert whole.plan.blocks == (2,)
    assert not any(2 in layers for layers in whole.plan.axes.values())
    assert len(layers_of(whole.model, family)) == LAYERS - len(whole.plan.blocks)
    shells = pruned(model, compensate="bias", **how)
    assert shells.plan.blocks == ()
    assert [len(shells.plan.axes[axis][2].keep) for axis in ("attention", "mlp")] == [0, 0]
    assert len(layers_of(shells.model, family)) == LAYERS
    for index in range(LAYERS):
        if index not in whole.plan.blocks:
            for axis in ("attention", "mlp"):
                assert torch.equal(whole.plan.axes[axis][index].keep, shells.plan.axes[axis][index].keep)


def test_one_ranking_removes_what_reaches_the_threshold(pruned):
    model = tiny_model("llama")
    with torch.no_grad():  # nearly all of its neurons are alike and weak
        model.model.layers[1].mlp.down_proj.weight[:, 1:] = 1e-4
    how = {"criterion": "output-l2", "allocate": "global", "ratio": 0.5}
    free = pruned(model, **how).plan
    dropped = pruned(model, drop_threshold=0.6, **how).plan
    for index, layer in dropped.mlp.items():
        assert len(layer.keep) == 0 or len(layer.keep) > 0.4 * NEURONS
        assert len(free.mlp[index].keep) >= 1
    gone = sum(NEURONS - len(layer.keep) for layer in dropped.mlp.values())
    assert abs(gone - 0.5 * LAYERS * NEURONS) <= NEURONS / 2
