"""Units: which rows each owns, and the unfused view of a layer's weights."""

from __future__ import annotations

import pytest
import torch
from heads import CASES, layers_of, make, matrices, owned
from hypothesis import given
from hypothesis import strategies as st
from tiny import FAMILIES, HIDDEN, NEURONS, family_of, tiny_model

from dicer.measure.stores.resident import axis_weights
from dicer.model.units import Slice, SubLayer, unit_weights


def view(model, family, name):
    """(The unit weights of layer 1, the tensors that they were made of)."""
    axis = family_of(model).axes[name]
    tensors = {key: weight.detach() for key, weight in axis_weights(axis, layers_of(model, family)[1]).items()}
    return unit_weights(axis, tensors), tensors


def test_order_and_names_of_sub_layers():
    places = [SubLayer(layer, axis) for layer in (0, 10, 2) for axis in ("mlp", "attention")]
    assert [place.key for place in sorted(places)] == [
        f"{axis}.{i}" for i in (0, 2, 10) for axis in ("attention", "mlp")
    ]
    assert str(places[0]) == "mlp of layer 0"


@given(st.integers(1, 12), st.lists(st.integers(1, 4), min_size=1, max_size=3), st.data())
def test_rows_of_a_slice(count, blocks, data):
    units = data.draw(st.lists(st.integers(0, count - 1), unique=True))
    piece = Slice("x", 0, ("gate",) * len(blocks), tuple(blocks))
    owner = [(segment, unit) for segment, block in enumerate(blocks) for unit in range(count) for _ in range(block)]
    expected = [row for s in range(len(blocks)) for unit in units for row, o in enumerate(owner) if o == (s, unit)]
    assert piece.rows(torch.tensor(units, dtype=torch.int64), count).tolist() == expected


@pytest.mark.parametrize(("family", "groups"), CASES)
def test_rows_of_heads(family, groups):
    model = make(family, groups)
    weights, parts = view(model, family, "attention")[0], matrices(layers_of(model, family)[1], family, groups)
    assert weights.units == len(weights.gate) == weights.down.shape[1] == groups
    for group in range(groups):
        query, key, value, output = owned(parts, group, groups)
        assert torch.equal(weights.gate[group], torch.cat(query))
        assert torch.equal(weights.up[group], torch.cat(key + value))
        assert torch.equal(weights.down[:, group], torch.cat(output))


@pytest.mark.parametrize("family", FAMILIES)
def test_views_that_compute_the_mlp(family):
    model = tiny_model(family, **({"mlp_bias": True} if family == "llama" else {}))
    axis, layer = family_of(model).axes["mlp"], layers_of(model, family)[1]
    weights, tensors = view(model, family, "mlp")
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    parts = [part for part in (weights.gate, weights.up, weights.down) if part is not None]
    assert {part.untyped_storage().data_ptr() for part in parts} == storages, "nothing is copied"
    assert [tuple(part.shape) for part in parts] == [(NEURONS, HIDDEN)] * (len(parts) - 1) + [(HIDDEN, NEURONS)]
    assert (weights.gate is None) == (family in ("gpt2", "opt"))

    held, bias = layer.state_dict(), {"gate_bias": 0.0, "up_bias": 0.0}
    bias |= {piece.roles[0]: held[piece.name] for piece in axis.slices if piece.optional and piece.name in held}
    x = torch.randn(3, HIDDEN)
    activation = layer.get_submodule(axis.activation)
    up = x @ weights.up.T + bias["up_bias"]  # [3, U]
    mod = activation(up) if weights.gate is None else activation(x @ weights.gate.T + bias["gate_bias"]) * up
    output = layer.get_submodule(axis.output)
    expected = layer.fc2(layer.activation_fn(layer.fc1(x))) if family == "opt" else layer.mlp(x)
    made = mod @ weights.down.T + (0 if getattr(output, "bias", None) is None else output.bias)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)
