"""Heads as units: which rows they own, what the walk sums of them, and their scores, against loops over heads."""

from __future__ import annotations

import copy
import json
import math
from operator import attrgetter

import pytest
import torch
from tiny import FAMILIES, HIDDEN, LAYERS, tiny_model, tiny_tokens

import dicer
from dicer.measure.statistics import Need
from dicer.measure.stores.resident import ResidentStore, axis_weights
from dicer.measure.walk import walk
from dicer.model.families import family_of
from dicer.model.units import unit_weights

HEADS, SIZE = 4, 8  # of the tiny models
# Where each family keeps attention, written down apart from the library's own table.
PLACES = dict.fromkeys(FAMILIES, ("model.layers", "self_attn.o_proj")) | {
    "gpt2": ("transformer.h", "attn.c_proj"),
    "opt": ("model.decoder.layers", "self_attn.out_proj"),
}
CASES = [(family, 2) for family in FAMILIES if family not in ("gpt2", "opt")] + [(family, HEADS) for family in FAMILIES]
every_case = pytest.mark.parametrize(("family", "groups"), CASES)


def make(family, groups, **options):
    return tiny_model(family, kv_heads=groups, **options)


def layers_of(model, family):
    return attrgetter(PLACES[family][0])(model)


def query_rows(group, groups):
    """Rows of the query projection (columns of the output projection) that belong to a key-value head."""
    heads = HEADS // groups
    return [head * SIZE + row for head in range(group * heads, (group + 1) * heads) for row in range(SIZE)]


def key_rows(group):
    return [group * SIZE + row for row in range(SIZE)]


def matrices(layer, family, groups, take=lambda parameter: parameter.detach()):
    """Query, key, value [rows, d] and output [d, columns], cut out of whatever the family has."""
    if family == "gpt2":
        query, key, value = take(layer.attn.c_attn.weight).T.split(HIDDEN)
        return query, key, value, take(layer.attn.c_proj.weight).T
    attention, output = layer.self_attn, layer.get_submodule(PLACES[family][1])
    if family == "phi3":
        query, key, value = take(attention.qkv_proj.weight).split([HEADS * SIZE, groups * SIZE, groups * SIZE])
        return query, key, value, take(output.weight)
    return *(take(p.weight) for p in (attention.q_proj, attention.k_proj, attention.v_proj)), take(output.weight)


def owned(parts, group, groups):
    """All that a unit owns, by row: queries, keys, values, columns of the output."""
    query, key, value, output = parts
    mine = query_rows(group, groups)
    return [
        [query[row] for row in mine],
        [key[row] for row in key_rows(group)],
        [value[row] for row in key_rows(group)],
        [output[:, column] for column in mine],
    ]


def view(model, family, index=1):
    layer, axis = layers_of(model, family)[index], family_of(family).axes(model.config)["attention"]
    return unit_weights(axis, {name: weight.detach() for name, weight in axis_weights(axis, layer).items()})


# The view of the weights


@every_case
def test_a_unit_has_the_rows_of_its_key_value_head_and_of_its_query_heads(family, groups):
    model = make(family, groups)
    weights, parts = view(model, family), matrices(layers_of(model, family)[1], family, groups)
    assert weights.units == len(weights.gate) == weights.down.shape[1] == groups
    for group in range(groups):
        query, key, value, output = owned(parts, group, groups)
        assert torch.equal(weights.gate[group], torch.cat(query))
        assert torch.equal(weights.up[group], torch.cat(key + value))
        assert torch.equal(weights.down[:, group], torch.cat(output))


@every_case
def test_permuting_key_value_groups_permutes_the_view(family, groups):
    model, order = make(family, groups), [1, 0] if groups == 2 else [2, 0, 3, 1]
    before = view(copy.deepcopy(model), family)
    parts = matrices(layers_of(model, family)[1], family, groups)
    queries = [row for group in order for row in query_rows(group, groups)]
    keys = [row for group in order for row in key_rows(group)]
    with torch.no_grad():
        for part, rows in zip(parts, (queries, keys, keys, None), strict=True):
            part.copy_(part[rows].clone() if rows else part[:, queries].clone())
    after = view(model, family)
    assert torch.equal(after.gate, before.gate[order])
    assert torch.equal(after.up, before.up[order])
    assert torch.equal(after.down, before.down[:, order])


# What the walk sums


def heads_outputs(model, family, batches):
    """What goes into each layer's output projection in the ordinary forward, float64 [T, channels] for each layer."""
    seen = [[] for _ in range(LAYERS)]
    handles = [
        layer.get_submodule(PLACES[family][1]).register_forward_pre_hook(
            lambda _, inputs, index=index: seen[index].append(inputs[0].flatten(0, -2).double())
        )
        for index, layer in enumerate(layers_of(model, family))
    ]
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return [torch.cat(found) for found in seen]


def by_unit(values, groups):
    """The channels of each unit, [T, C] each."""
    return [values[:, query_rows(group, groups)] for group in range(groups)]


KINDS = ("square_sum", "sum", "gram", "channel_sum")


@every_case
def test_the_walk_sums_the_heads_outputs_that_plain_hooks_see(family, groups):
    model, batches = make(family, groups), tiny_tokens().split(4)
    needs = {Need(kind, "mod", "attention") for kind in KINDS}
    visits = walk(ResidentStore(model, family_of(family)), range(LAYERS), batches, axes=("attention",), needs=needs)
    for visit, values in zip(visits, heads_outputs(model, family, batches), strict=True):
        assert visit.axes.keys() == {"attention"}
        sums, units = visit.axes["attention"].sums, by_unit(values, groups)
        naive = {
            "square_sum": [sum(float((unit[:, c] ** 2).sum()) for c in range(unit.shape[1])) for unit in units],
            "sum": [sum(float(unit[:, c].sum()) for c in range(unit.shape[1])) for unit in units],
            "gram": [[float((a * b).sum()) for b in units] for a in units],
            "channel_sum": [float(values[:, c].sum()) for c in range(HEADS * SIZE)],
        }
        assert sums.count == len(values) == 6 * 24
        for kind, expected in naive.items():
            wanted = torch.tensor(expected, dtype=torch.float64)
            found = sums.get(kind, "mod").double()
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(values.norm()))


def test_both_axes_are_summed_in_one_walk_as_each_by_itself():
    model, batches = make("llama", 2), tiny_tokens().split(4)
    needs = {Need("square_sum", "mod", axis) for axis in ("attention", "mlp")}
    store = ResidentStore(model, family_of("llama"))
    (both,) = walk(store, [2], batches, axes=("attention", "mlp"), needs=needs)
    for need in needs:
        (alone,) = walk(store, [2], batches, axes=(need.axis,), needs={need})
        sums = [visit.axes[need.axis].sums.get("square_sum", "mod") for visit in (both, alone)]
        assert torch.equal(*sums)
        assert len(sums[0]) == {"attention": 2, "mlp": 40}[need.axis]


# Scores


@pytest.fixture(scope="module")
def tokens_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("calibration") / "tokens.jsonl"
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in tiny_tokens().tolist()))
    return str(path)


@pytest.fixture(scope="module")
def plan_of(tokens_file):
    def plan(model, axis="attention", **recipe):
        asked = {"axis": axis, "ratio": 0.5, "batch_size": 4, "calib": tokens_file, **recipe}
        return dicer.prune(model, dicer.Recipe(**asked)).plan

    return plan


def naive_gradients(model):
    """dL/dW of all weights, L the mean cross-entropy of every next token, in one ordinary backward pass."""
    tokens = tiny_tokens()
    model.zero_grad()
    logits = model(input_ids=tokens).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()


def length(rows):
    return math.sqrt(sum(float(row.double().square().sum()) for row in rows))


def naive_scores(model, family, groups):
    """criterion -> [layer][unit], number by number from the definitions (METHODS sections 2 and 5)."""
    outputs = heads_outputs(model, family, [tiny_tokens()])
    naive_gradients(model)
    found = {name: [] for name in ("weight-l2", "act-l2", "act-mean", "output-l2", "taylor")}
    for layer, values in zip(layers_of(model, family), outputs, strict=True):
        weights = matrices(layer, family, groups)
        gradients = matrices(layer, family, groups, take=lambda parameter: parameter.grad)
        mine = [owned(weights, group, groups) for group in range(groups)]
        theirs = [owned(gradients, group, groups) for group in range(groups)]
        units = by_unit(values, groups)
        strength = [math.sqrt(sum(float(a) ** 2 for a in unit.flatten())) for unit in units]
        found["weight-l2"].append([length([row for rows in unit for row in rows]) for unit in mine])
        found["act-l2"].append(strength)
        found["act-mean"].append([float(unit.sum()) / len(unit) for unit in units])
        found["output-l2"].append([a * length(unit[3]) for a, unit in zip(strength, mine, strict=True)])
        found["taylor"].append(
            [
                sum(
                    float((row * slope).abs().sum())
                    for rows, slopes in zip(w, g, strict=True)
                    for row, slope in zip(rows, slopes, strict=True)
                )
                for w, g in zip(mine, theirs, strict=True)
            ]
        )
    model.zero_grad()
    return found


@every_case
def test_scores_of_heads_are_those_of_loops_over_what_they_own(family, groups, plan_of):
    model = make(family, groups)
    for name, expected in naive_scores(model, family, groups).items():
        plans = [plan_of(model, criterion=name).axes["attention"] for _ in range(2)]
        assert list(plans[0]) == list(range(LAYERS))
        for index, layer in plans[0].items():
            assert (layer.scores.shape, layer.scores.dtype) == ((groups,), torch.float32)
            torch.testing.assert_close(layer.scores, torch.tensor(expected[index]), rtol=2e-4, atol=1e-6)
            assert torch.equal(layer.scores, plans[1][index].scores)
            strongest = sorted(range(groups), key=lambda unit: -float(layer.scores[unit]))[: groups // 2]
            assert layer.keep.tolist() == sorted(strongest)


@pytest.mark.parametrize("activation", ["pre", "post", "mod"])
def test_heads_have_one_activation_whatever_is_named(activation, plan_of):
    model = make("llama", 2)
    named = plan_of(model, criterion="act-l2", activation=activation).axes["attention"]
    outputs = heads_outputs(model, "llama", [tiny_tokens()])
    for index, layer in named.items():
        expected = torch.stack([unit.norm() for unit in by_unit(outputs[index], 2)]).float()
        torch.testing.assert_close(layer.scores, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_heads_and_neurons_are_drawn_apart_and_neurons_as_ever(family, plan_of):
    model = make(family, 2)
    both, neurons, heads = (plan_of(model, axis, method="random").axes for axis in ("all", "mlp", "attention"))
    for index in range(LAYERS):
        units = both["attention"][index].units
        assert torch.equal(both["mlp"][index].scores, neurons["mlp"][index].scores)
        assert torch.equal(both["attention"][index].scores, heads["attention"][index].scores)
        assert not torch.equal(both["attention"][index].scores, both["mlp"][index].scores[:units])
        assert bool(both["attention"][index].scores.isfinite().all())
    assert len({tuple(layer.scores.tolist()) for layer in heads["attention"].values()}) == LAYERS


@pytest.mark.parametrize("family", ["llama", "phi3", "opt"])
def test_rc_a_keeps_the_same_neurons_whether_heads_go_too_or_not(family, plan_of):
    model = make(family, 2)
    alone, both = (plan_of(model, axis, method="rc-a", ratio=0.25) for axis in ("mlp", "all"))
    assert {i: layer.keep.tolist() for i, layer in alone.mlp.items()} == {
        i: layer.keep.tolist() for i, layer in both.mlp.items()
    }
    gone = sum(layer.units - len(layer.keep) for layer in both.axes["attention"].values())
    assert gone == sum(layer.units for layer in both.axes["attention"].values()) // 4


def test_groups_of_heads_keep_one_of_each(plan_of):
    model = make("llama", 4)
    plan = plan_of(model, criterion="weight-l2", grouping="similarity").axes["attention"]
    outputs = heads_outputs(model, "llama", [tiny_tokens()])
    for index, layer in plan.items():
        units = [unit.flatten() for unit in by_unit(outputs[index], 4)]
        groups = complete_linkage(units, 2)
        best = {max(group, key=lambda unit: float(layer.scores[unit])) for group in groups}
        assert set(layer.keep.tolist()) == best


def complete_linkage(vectors, count):
    """Merge the two clusters whose farthest members are nearest, until as many are left as asked for."""
    apart = [[1 - float(a @ b / (a.norm() * b.norm())) for b in vectors] for a in vectors]
    clusters = [[i] for i in range(len(vectors))]
    while len(clusters) > count:
        pairs = [(a, b) for b in range(len(clusters)) for a in range(b)]
        first, second = min(pairs, key=lambda p: max(apart[i][j] for i in clusters[p[0]] for j in clusters[p[1]]))
        clusters[first] += clusters.pop(second)
    return clusters
