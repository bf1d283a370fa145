"""Which neurons belong together: properties for any number of neurons, and clusters against a naive clustering."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model

import dicer
from dicer.decide.grouping import random_groups, similarity_groups
from dicer.decide.merging import keep_strongest, keep_top
from dicer.model.units import legal

SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def units_and_groups(draw, most=300):
    units = draw(st.integers(1, most))
    return units, draw(st.integers(1, units))


def scores_of(units, seed, *, ties=False):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 3, (units,), generator=draw).float() if ties else torch.randn(units, generator=draw)


def as_partition(labels):
    """The groups as a set of sets of units, whatever they are called."""
    return {frozenset(torch.nonzero(labels == label).flatten().tolist()) for label in labels.unique()}


# random


@given(units_and_groups(), SEEDS)
def test_random_groups_are_never_empty_and_differ_by_at_most_one(sizes, seed):
    units, groups = sizes
    labels = random_groups(units, groups, np.random.default_rng(seed))
    assert (labels.shape, labels.dtype) == ((units,), torch.int64)
    members = torch.bincount(labels)
    assert len(members) == groups
    assert members.min() >= 1
    assert members.max() - members.min() <= 1


def test_random_groups_come_from_the_permutation_alone():
    first, second, other = (random_groups(60, 20, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, second)
    assert as_partition(first) != as_partition(other)
    assert as_partition(first) != as_partition(torch.arange(60) % 20), "neighbours must not decide"


# How many stay


@given(units_and_groups(), SEEDS, st.booleans(), st.data())
def test_groups_keep_exactly_k_and_k_over_c_each(sizes, seed, ties, data):
    units, keep = sizes
    groups = data.draw(st.integers(1, keep))
    scores = scores_of(units, seed, ties=ties)
    labels = random_groups(units, groups, np.random.default_rng(seed))
    kept = keep_strongest(scores, labels, keep).keep
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert len(kept) == keep
    each = torch.bincount(labels[kept], minlength=groups)
    assert each.max() - each.min() <= 1
    for group in range(groups):
        inside = set(torch.nonzero(labels == group).flatten().tolist())
        stays, goes = inside & set(kept.tolist()), inside - set(kept.tolist())
        assert not goes or scores[list(stays)].min() >= scores[list(goes)].max()


@given(units_and_groups(), SEEDS, st.booleans())
def test_one_group_is_the_top_k(sizes, seed, ties):
    units, keep = sizes
    scores = scores_of(units, seed, ties=ties)
    labels = random_groups(units, 1, np.random.default_rng(seed))
    top = sorted(range(units), key=lambda i: (-float(scores[i]), i))[:keep]
    assert keep_strongest(scores, labels, keep).keep.tolist() == sorted(top)
    assert keep_top(scores, keep).keep.tolist() == sorted(top)


def kept_by(**recipe):
    plan = dicer.prune(tiny_model("llama"), dicer.Recipe(**recipe)).plan
    return {index: layer.keep.tolist() for index, layer in plan.mlp.items()}


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.9])
def test_as_many_groups_as_neurons_stay_is_rc_a_and_one_group_is_plain_pruning(ratio, multiple):
    keep = legal(40, ratio, multiple)
    parts = {"criterion": "weight-l2", "ratio": ratio, "width_multiple": multiple}
    rc_a = kept_by(**parts, grouping="random")
    assert {len(kept) for kept in rc_a.values()} == {keep}
    assert kept_by(**parts, grouping="random", groups=keep) == rc_a
    assert kept_by(**parts, grouping="random", groups=1) == kept_by(**parts, grouping="none")


@pytest.mark.parametrize("groups", [2, 7, 29])
def test_a_number_of_groups_in_between_keeps_as_many(groups):
    kept = kept_by(criterion="weight-l2", grouping="random", groups=groups)
    assert {len(units) for units in kept.values()} == {30}
    assert kept not in (
        kept_by(criterion="weight-l2", grouping="none"),
        kept_by(criterion="weight-l2", grouping="random"),
    )


def test_more_groups_than_neurons_that_stay_is_an_error():
    with pytest.raises(dicer.DicerError, match=r"--groups 31 is more than the 30 neurons that layer 0 keeps"):
        kept_by(criterion="weight-l2", grouping="random", groups=31)


# similarity


def naive_complete_linkage(vectors, groups):
    """Merge the two clusters whose farthest members are nearest, until as many are left as asked for."""

    def distance(a, b):
        return 1 - float(a @ b) / float(a.norm() * b.norm())

    apart = [[distance(a, b) for b in vectors] for a in vectors]
    clusters = [[i] for i in range(len(vectors))]
    while len(clusters) > groups:
        pairs = [(a, b) for b in range(len(clusters)) for a in range(b)]
        first, second = min(pairs, key=lambda p: max(apart[i][j] for i in clusters[p[0]] for j in clusters[p[1]]))
        clusters[first] += clusters.pop(second)
    return {frozenset(cluster) for cluster in clusters}


@settings(deadline=None, max_examples=50)
@given(units_and_groups(most=14), SEEDS)
def test_similarity_groups_are_those_of_a_naive_complete_linkage(sizes, seed):
    units, groups = sizes
    vectors = torch.randn(units, 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    labels = similarity_groups(vectors @ vectors.T, groups)
    assert as_partition(labels) == naive_complete_linkage(vectors, groups)


def test_similarity_does_not_see_how_long_a_vector_is():
    vectors = torch.randn(24, 30, generator=torch.Generator().manual_seed(0))
    longer = vectors * torch.linspace(0.01, 100, 24)[:, None]
    first, second = (similarity_groups(v @ v.T, 9) for v in (vectors, longer))
    assert as_partition(first) == as_partition(second)


def test_the_gram_matrix_gathered_batch_by_batch_gives_the_same_groups():
    tokens = torch.randn(50, 24, generator=torch.Generator().manual_seed(1))  # [T, N]
    batches = sum(batch.T @ batch for batch in tokens.split(7))
    assert as_partition(similarity_groups(batches, 9)) == as_partition(similarity_groups(tokens.T @ tokens, 9))


@settings(deadline=None)
@given(units_and_groups(most=40), st.integers(1, 4), SEEDS)
def test_similarity_makes_exactly_k_groups_also_of_ties_duplicates_and_zeros(sizes, tokens, seed):
    units, groups = sizes
    values = torch.randint(-1, 2, (units, tokens), generator=torch.Generator().manual_seed(seed)).float()
    labels = similarity_groups(values @ values.T, groups)
    assert (labels.shape, labels.dtype) == ((units,), torch.int64)
    assert labels.unique().tolist() == list(range(groups))


@pytest.mark.parametrize("gram", [torch.zeros(9, 9), torch.ones(9, 9), torch.eye(9)], ids=["zero", "equal", "apart"])
@pytest.mark.parametrize("groups", [1, 4, 8, 9])
def test_neurons_that_are_all_alike_or_all_apart_make_k_groups(gram, groups):
    assert similarity_groups(gram, groups).unique().tolist() == list(range(groups))


def test_duplicates_are_put_together_before_anything_else_and_zeros_are_far_from_all():
    base = torch.randn(5, 12, generator=torch.Generator().manual_seed(2))
    vectors = torch.cat([base, 2 * base, torch.zeros(1, 12)])
    partition = as_partition(similarity_groups(vectors @ vectors.T, 6))
    assert partition == {frozenset({i, i + 5}) for i in range(5)} | {frozenset({10})}
