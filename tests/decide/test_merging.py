"""What a group leaves, against dense matrices written from the formulas of docs/methods.md."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import NEURONS, family_of, tiny_model, tiny_tokens

import dicer
from dicer.decide.merging import dominant_of_groups, keep_strongest, mean_of_groups
from dicer.decide.plan import LayerPlan
from dicer.model.units import Slice
from dicer.write.surgery import slice_tensor

UNITS, WIDTH, GROUPS = 12, 5, 4
MERGES = {"mean": mean_of_groups, "dominant": dominant_of_groups}


def grouped(seed=0, units=UNITS, groups=GROUPS):
    """(scores, labels) of a random layer; the scores are positive, as norms are."""
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(units, generator=draw) + 0.1, (torch.arange(units) % groups)[
        torch.randperm(units, generator=draw)
    ]


def naive_matrices(name, scores, labels):
    """(keep, M_in, M_out) by loops over groups, the survivors in the order of their numbers.

    Where all norms of a group are zero (OPT's dead ReLUs) the formula says 0/0; the first neuron then stays as it is.
    """
    groups = [[i for i in range(len(labels)) if labels[i] == g] for g in range(int(labels.max()) + 1)]
    groups.sort(key=lambda group: max(group, key=lambda i: float(scores[i])))
    keep = [max(group, key=lambda i: float(scores[i])) for group in groups]
    m_in, m_out = torch.zeros(2, len(groups), len(labels))
    for row, (group, dominant) in enumerate(zip(groups, keep, strict=True)):
        for i in group:
            m_in[row, i] = 1 / len(group) if name == "mean" else float(i == dominant)
            share = scores[i] / scores[dominant] if scores[dominant] > 0 else float(i == dominant)
            m_out[row, i] = 1 / len(group) if name == "mean" else share
    return keep, m_in, m_out


def merged_layer(name, scores, labels):
    survivors = MERGES[name](scores, labels)
    return LayerPlan(len(scores), survivors.keep, scores, survivors.merge)


@pytest.mark.parametrize("name", MERGES)
@given(st.integers(1, 30), st.data())
def test_maps_of_the_formula(name, units, data):
    groups, seed = data.draw(st.integers(1, units)), data.draw(st.integers(0, 2**32 - 1))
    scores, labels = grouped(seed, units, groups)
    layer = merged_layer(name, scores, labels)
    keep, m_in, m_out = naive_matrices(name, scores, labels)
    assert layer.keep.tolist() == keep == keep_strongest(scores, labels, groups).keep.tolist()
    made = [matrix.to_dense() for matrix in layer.merge_matrices()]
    torch.testing.assert_close(made, [m_in, m_out])


@pytest.mark.parametrize("name", MERGES)
def test_rows_and_columns_of_a_group(name):
    scores, labels = grouped()
    layer = merged_layer(name, scores, labels)
    up, down = torch.randn(UNITS, WIDTH), torch.randn(WIDTH, UNITS)
    new_up = slice_tensor(up, Slice("up", 0, ("up",)), layer)
    new_down = slice_tensor(down, Slice("down", 1, ("down",)), layer)
    for place, unit in enumerate(layer.keep):
        group = torch.nonzero(labels == labels[unit]).flatten()
        assert scores[unit] == scores[group].max()
        if name == "mean":
            torch.testing.assert_close(new_up[place], up[group].mean(0))
            torch.testing.assert_close(new_down[:, place], down[:, group].mean(1))
        else:  # the dominant's own input weights, bit for bit, and the outputs by relative strength
            assert torch.equal(new_up[place], up[unit])
            torch.testing.assert_close(new_down[:, place], sum(scores[i] / scores[unit] * down[:, i] for i in group))


def test_group_that_never_fired():
    norms, labels = torch.tensor([0.0, 0.0, 2.0, 1.0]), torch.tensor([0, 0, 1, 1])
    layer = merged_layer("dominant", norms, labels)
    assert layer.keep.tolist() == [0, 2]
    down = torch.randn(3, 4)
    new = slice_tensor(down, Slice("down", 1, ("down",)), layer)
    torch.testing.assert_close(new, torch.stack([down[:, 0], down[:, 2] + 0.5 * down[:, 3]], dim=1))


@pytest.mark.parametrize("name", MERGES)
def test_groups_of_one(name):
    scores = grouped()[0]
    layer = merged_layer(name, scores, torch.randperm(UNITS, generator=torch.Generator().manual_seed(0)))
    weights = torch.randn(UNITS, WIDTH)
    assert torch.equal(slice_tensor(weights, Slice("up", 0, ("up",)), layer), weights)
    assert torch.equal(slice_tensor(weights.T, Slice("down", 1, ("down",)), layer), weights.T)


# Through the surgery, for every way in which a family stores its tensors


def naive_tensor(tensor, piece, m_in, m_out):
    """The new tensor by plain matrix products, from the meaning of its segments."""
    matrix = m_out if piece.roles == ("down",) else m_in
    by_unit = tensor.movedim(piece.dim, 0)
    parts = [torch.tensordot(matrix, part, dims=1) for part in by_unit.split(matrix.shape[1])]
    return torch.cat(parts).movedim(0, piece.dim)


def shape_of(piece):
    units = UNITS * len(piece.roles)
    if piece.name.endswith(".bias"):
        return (units,)
    return (units, WIDTH) if piece.dim == 0 else (WIDTH, units)


# One of each way: both dimensions, one segment or two, weights and biases.
PIECES = {
    f"{family}-{piece.name}": piece
    for family, names in {"phi3": "gate_up_proj down_proj", "gpt2": "c_fc c_proj"}.items()
    for piece in family_of(tiny_model(family)).axes["mlp"].slices
    if any(name in piece.name for name in names.split())
}


@pytest.mark.parametrize("name", MERGES)
@pytest.mark.parametrize("piece", PIECES.values(), ids=PIECES.keys())
def test_merged_tensors(piece, name):
    scores, labels = grouped(seed=1)
    tensor = torch.randn(shape_of(piece))
    new = slice_tensor(tensor, piece, merged_layer(name, scores, labels))
    torch.testing.assert_close(new, naive_tensor(tensor, piece, *naive_matrices(name, scores, labels)[1:]))
    assert new.is_contiguous() or piece.dim == 1


@pytest.mark.parametrize("piece", PIECES.values(), ids=PIECES.keys())
def test_kept_rows_bit_for_bit(piece):
    scores, labels = grouped(seed=1)
    keep = keep_strongest(scores, labels, GROUPS).keep
    tensor = torch.randn(shape_of(piece)).bfloat16()
    new = slice_tensor(tensor, piece, LayerPlan(UNITS, keep, scores))
    segments = tensor.movedim(piece.dim, 0).split(UNITS)
    expected = torch.stack([segment[unit] for segment in segments for unit in keep.tolist()])
    assert torch.equal(new.movedim(piece.dim, 0), expected)


def test_bfloat16_rounded_once():
    scores, labels = grouped(units=64, groups=2)
    tensor = torch.randn(WIDTH, 64).bfloat16()
    new = slice_tensor(tensor, Slice("down", 1, ("down",)), merged_layer("mean", scores, labels))
    m_out = naive_matrices("mean", scores, labels)[2]
    assert new.dtype == torch.bfloat16
    exact = tensor.double() @ m_out.double().T
    assert ((new.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()


# The whole path


MLPS = {
    "llama": ("model.layers.1.mlp", {"gate_proj.weight": 0, "up_proj.weight": 0}, ("down_proj.weight", 1)),
    "gpt2": ("transformer.h.1.mlp", {"c_fc.weight": 1, "c_fc.bias": 0}, ("c_proj.weight", 0)),
    "opt": ("model.decoder.layers.1", {"fc1.weight": 0, "fc1.bias": 0}, ("fc2.weight", 1)),
}


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("family", MLPS)
def test_weights_of_the_model(family, merge, calib):
    model = tiny_model(family)
    result = dicer.prune(model, dicer.Recipe(method=f"sim-{merge}", ratio=0.6, calib=calib))
    layer = result.plan.mlp[1]
    assert torch.bincount(layer.merge.row).tolist() != [1] * 16, "some group has several members"
    m_in, m_out = (matrix.to_dense() for matrix in layer.merge_matrices())
    assert m_in.shape == m_out.shape == (16, NEURONS)
    keep, *naive = naive_matrices(merge, layer.scores, layer.merge.row)
    assert keep == layer.keep.tolist()
    torch.testing.assert_close([m_in, m_out], naive, rtol=1e-5, atol=1e-6)
    prefix, inputs, (output, output_dim) = MLPS[family]
    before, after = model.state_dict(), result.model.state_dict()
    for name, dim, matrix in [*((n, d, m_in) for n, d in inputs.items()), (output, output_dim, m_out)]:
        expected = torch.tensordot(matrix, before[f"{prefix}.{name}"].movedim(dim, 0), dims=1).movedim(0, dim)
        torch.testing.assert_close(after[f"{prefix}.{name}"], expected)


def test_strength_of_the_dominant(calib):
    """The criterion only names the survivor; what is dominant, and how strong, is the norm alone (eq. 3)."""
    model, seen = tiny_model("llama"), []
    handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(input_ids=tiny_tokens())
    handle.remove()
    norms = seen[0].flatten(0, 1).norm(dim=0)
    recipe = dicer.Recipe(method="sim-dominant", criterion="weight-l2", ratio=0.6, calib=calib)
    layer = dicer.prune(model, recipe).plan.mlp[1]
    keep, m_in, m_out = naive_matrices("dominant", norms, layer.merge.row)
    assert layer.keep.tolist() == keep
    made = [matrix.to_dense() for matrix in layer.merge_matrices()]
    torch.testing.assert_close(made, [m_in, m_out], rtol=1e-4, atol=1e-6)
