"""Which neurons belong together: properties for any number of neurons, and clusters against scipy's and a naive one."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.hierarchy import fcluster, linkage
from tiny import tiny_model

import dicer
from dicer.decide.amounts.uniform import legal
from dicer.decide.grouping import GROUPINGS, clusters
from dicer.decide.merging import keep_strongest
from dicer.errors import RecipeError
from dicer.measure.parts import bind
from dicer.measure.statistics import LayerStatistics, stream

SEEDS = st.integers(0, 2**32 - 1)
LINKAGES = ("complete", "average", "single", "weighted")


@st.composite
def units_and_groups(draw, most=300):
    units = draw(st.integers(1, most))
    return units, draw(st.integers(1, units))


def random_groups(units, groups, seed):
    """Labels of as many groups, drawn from a stream of this seed."""
    (part,) = bind([GROUPINGS["random"]], {"groups": groups})
    return part(torch.zeros(units), units, LayerStatistics(rng=np.random.default_rng(seed)))


def as_partition(labels):
    """The groups as a set of sets of units, whatever they are called."""
    return {frozenset(torch.nonzero(labels == label).flatten().tolist()) for label in labels.unique()}


def vectors_of(units, length, seed):
    return torch.randn(units, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# random


@given(units_and_groups(), SEEDS)
def test_sizes_of_random_groups(sizes, seed):
    units, groups = sizes
    labels = random_groups(units, groups, seed)
    assert (labels.shape, labels.dtype) == ((units,), torch.int64)
    members = torch.bincount(labels)
    assert len(members) == groups
    assert members.max() - members.min() <= 1 <= members.min()


def test_draws_of_random_groups():
    first, second, other = (random_groups(60, 20, seed) for seed in (3, 3, 4))
    assert torch.equal(first, second)
    assert as_partition(first) != as_partition(other)
    assert as_partition(first) != as_partition(torch.arange(60) % 20), "neighbours must not decide"
    drawn = [
        stream(42, layer, purpose).random(8) for layer, purpose in ((0, "criterion"), (0, "grouping"), (1, "grouping"))
    ]
    assert not any(np.allclose(drawn[i], drawn[i - 1]) for i in range(3)), "streams must not be shared"


# How many stay


@given(units_and_groups(), SEEDS, st.booleans(), st.data())
def test_strongest_of_each_group(sizes, seed, ties, data):
    units, keep = sizes
    groups = data.draw(st.integers(1, keep))
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 3, (units,), generator=draw).float() if ties else torch.randn(units, generator=draw)
    labels = random_groups(units, groups, seed)
    kept = keep_strongest(scores, labels, keep).keep
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert len(kept) == keep
    each = torch.bincount(labels[kept], minlength=groups)
    assert each.max() - each.min() <= 1
    for group in range(groups):
        best = sorted(torch.nonzero(labels == group).flatten().tolist(), key=lambda i: (-float(scores[i]), i))
        assert {*kept.tolist()} & {*best} == {*best[: each[group]]}


def kept_by(**recipe):
    plan = dicer.prune(tiny_model("llama"), dicer.Recipe(criterion="weight-l2", **recipe)).plan
    return {index: layer.keep.tolist() for index, layer in plan.mlp.items()}


@pytest.mark.parametrize(("ratio", "multiple"), [(0.25, 1), (0.5, 4), (0.9, 1)])
def test_number_of_groups(ratio, multiple):
    keep, much = legal(40, ratio, multiple), {"ratio": ratio, "width_multiple": multiple}
    rc_a, plain = kept_by(**much, grouping="random"), kept_by(**much, grouping="none")
    assert {len(kept) for kept in rc_a.values()} == {keep}
    assert kept_by(**much, grouping="random", groups=keep) == rc_a
    assert kept_by(**much, grouping="random", groups=1) == plain
    between = kept_by(**much, grouping="random", groups=2)
    assert {len(kept) for kept in between.values()} == {keep}
    assert between not in (plain, rc_a)
    assert kept_by(**much, grouping="random", set={"groups": 2}) == between
    for spelled in ({"groups": keep + 1}, {"set": {"groups": keep + 1}}):
        with pytest.raises(
            RecipeError, match=rf"--groups {keep + 1} is more than the {keep} neurons that layer 0 keeps"
        ):
            kept_by(**much, grouping="random", **spelled)


# similarity


def naive_complete_linkage(vectors, groups):
    """Merge the two clusters whose farthest members are nearest, until as many are left as asked for."""
    apart = [[1 - float(a @ b) / float(a.norm() * b.norm()) for b in vectors] for a in vectors]
    found = [[i] for i in range(len(vectors))]
    while len(found) > groups:
        pairs = [(a, b) for b in range(len(found)) for a in range(b)]
        first, second = min(pairs, key=lambda p: max(apart[i][j] for i in found[p[0]] for j in found[p[1]]))
        found[first] += found.pop(second)
    return {frozenset(cluster) for cluster in found}


@settings(deadline=None, max_examples=30)
@given(units_and_groups(most=14), SEEDS)
def test_naive_complete_linkage(sizes, seed):
    units, groups = sizes
    vectors = vectors_of(units, 20, seed)
    assert as_partition(clusters(vectors @ vectors.T, groups)) == naive_complete_linkage(vectors, groups)


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 60), st.sampled_from(LINKAGES), SEEDS, st.data())
def test_linkages_of_scipy(units, name, seed, data):
    groups, vectors = data.draw(st.integers(1, units)), vectors_of(units, 30, seed)
    expected = fcluster(linkage(vectors.numpy(), name, "cosine"), groups, "maxclust")
    assert as_partition(clusters(vectors @ vectors.T, groups, name)) == as_partition(torch.from_numpy(expected))


def test_linkage_of_a_recipe(rows):
    def partition(**options):
        recipe = dicer.Recipe(method="sim-mean", ratio=0.7, layers="1", calib=str(rows), **options)
        return as_partition(dicer.prune(model, recipe).plan.mlp[1].merge.row)

    model, seen = tiny_model("llama"), []
    handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(input_ids=torch.tensor([json.loads(line)["input_ids"] for line in rows.read_text().splitlines()]))
    handle.remove()
    vectors = seen[0].flatten(0, 1).T.double().numpy()  # [N, T]
    found = {name: partition(set={"linkage": name}) for name in ("average", "complete")}
    for name, groups in found.items():
        expected = fcluster(linkage(vectors, name, "cosine"), 12, "maxclust")
        assert groups == as_partition(torch.from_numpy(expected))
    assert found["average"] != found["complete"] == partition()


@settings(deadline=None)
@given(units_and_groups(most=40), st.integers(0, 4), SEEDS)
def test_ties_duplicates_and_zeros(sizes, tokens, seed):
    units, groups = sizes
    values = torch.randint(-1, 2, (units, tokens), generator=torch.Generator().manual_seed(seed)).float()
    labels = clusters(values @ values.T, groups)
    assert (labels.shape, labels.dtype) == ((units,), torch.int64)
    assert labels.unique().tolist() == list(range(groups))


def test_length_of_a_vector():
    """Which is not seen; duplicates belong together before anything else, and zeros are far from all."""
    vectors = vectors_of(24, 30, 0)
    longer = vectors * torch.linspace(0.01, 100, 24)[:, None]
    assert as_partition(clusters(vectors @ vectors.T, 9)) == as_partition(clusters(longer @ longer.T, 9))
    twice = torch.cat([vectors[:5], 2 * vectors[:5], torch.zeros(1, 30)])
    partition = as_partition(clusters(twice @ twice.T, 6))
    assert partition == {frozenset({i, i + 5}) for i in range(5)} | {frozenset({10})}


def test_overflow():
    with pytest.raises(RecipeError, match=r"activations overflow on this text.*--dtype float32"):
        clusters(torch.full((3, 3), float("inf")), 2)
