"""The family table against the real classes of transformers, legal widths, and the unfused view of the weights."""

from __future__ import annotations

from operator import attrgetter

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tiny import FAMILIES as TINY
from tiny import HIDDEN, LAYERS, NEURONS, VOCABULARY, tiny_config, tiny_model

from dicer.errors import ModelError, RecipeError, UnknownFamily
from dicer.measure.stores.resident import axis_weights
from dicer.model.families import FAMILIES, family_of
from dicer.model.units import Slice, legal, unit_weights
from dicer.write.export import modeling_pruned

WITH_BIASES = {"llama": {"mlp_bias": True}}
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())

# legal widths


@given(st.integers(1, 3000), st.floats(0.001, 0.999), st.sampled_from([1, 2, 8, 64, 256]))
def test_a_legal_width_is_the_multiple_nearest_to_the_rounded_one_that_the_layer_has(width, ratio, multiple):
    exact = round(width * (1 - ratio))
    if 2 * exact <= multiple or width < multiple:  # no neuron is at least as near
        with pytest.raises(RecipeError, match="leaves no neuron"):
            legal(width, ratio, multiple)
        return
    keep = legal(width, ratio, multiple)
    possible = range(multiple, width + 1, multiple)
    assert keep in possible
    assert abs(keep - exact) == min(abs(candidate - exact) for candidate in possible)


@pytest.mark.parametrize(
    ("width", "ratio", "multiple", "keep"),
    [
        (18944, 0.25, 1, 14208),  # Qwen2.5-7B in the paper
        (14336, 0.5, 1, 7168),
        (1536, 0.3, 64, 1088),  # 1075.2 -> 1075 -> 16.8 x 64
        (1000, 0.01, 256, 768),  # 990 is nearest to 1024, which the layer does not have
        (40, 0.25, 1, 30),
        (10, 0.25, 1, 8),  # 7.5: Python rounds a half to the even neighbour
    ],
)
def test_some_widths_worked_out_by_hand(width, ratio, multiple, keep):
    assert legal(width, ratio, multiple) == keep


@pytest.mark.parametrize(("width", "ratio", "multiple"), [(3, 0.9, 1), (40, 0.5, 64), (100, 0.9, 64)])
def test_a_ratio_that_leaves_nothing_is_said(width, ratio, multiple):
    with pytest.raises(RecipeError, match=rf"ratio {ratio} leaves no neuron of {width}"):
        legal(width, ratio, multiple)


# slices


@given(st.integers(1, 12), st.lists(st.integers(1, 4), min_size=1, max_size=3), st.data())
def test_a_unit_owns_its_block_of_rows_in_every_segment(count, blocks, data):
    units = data.draw(st.lists(st.integers(0, count - 1), unique=True))
    piece = Slice("x", 0, ("gate",) * len(blocks), tuple(blocks))
    owner = [(segment, unit) for segment, block in enumerate(blocks) for unit in range(count) for _ in range(block)]
    expected = [row for s in range(len(blocks)) for unit in units for row, o in enumerate(owner) if o == (s, unit)]
    assert piece.rows(torch.tensor(units, dtype=torch.int64), count).tolist() == expected


# the table against transformers


def model_of(family):
    return tiny_model(family.model_type, **WITH_BIASES.get(family.model_type, {}))


def test_every_family_has_a_tiny_model_and_every_tiny_model_a_family():
    assert set(FAMILIES) == set(TINY)
    assert all(model_type == family.model_type for model_type, family in FAMILIES.items())


@every_family
def test_the_names_are_those_of_the_stock_classes(family):
    config_class = getattr(transformers, f"{family.stem}Config")
    assert config_class.model_type == family.model_type
    stock = transformers.AutoModelForCausalLM._model_mapping[config_class]
    assert stock is getattr(transformers, family.causal_lm)
    assert transformers.AutoModel._model_mapping[config_class] is getattr(transformers, f"{family.stem}Model")


@every_family
def test_every_slice_is_a_tensor_of_the_width_and_no_other_tensor_of_the_mlp_is(family):
    model, axis = model_of(family), family.mlp
    layers = attrgetter(family.layers)(model)
    assert len(layers) == LAYERS
    for index, layer in enumerate(layers):
        tensors = layer.state_dict()
        for piece in axis.slices:
            if piece.optional and piece.name not in tensors:
                continue
            assert tensors[piece.name].shape[piece.dim] == NEURONS * sum(piece.blocks)
            assert family.tensor_name(index, piece.name) in model.state_dict()
            assert len(piece.roles) == len(piece.blocks)
        sized = {name for name, t in tensors.items() if {NEURONS, 2 * NEURONS} & set(t.shape)}
        assert sized == {piece.name for piece in axis.slices} & tensors.keys()
        layer.get_submodule(axis.activation)
        assert f"{axis.output}.weight" in {piece.name for piece in axis.slices if piece.is_output}


def test_the_toy_sizes_tell_the_width_from_all_others():
    assert not {NEURONS, 2 * NEURONS} & {HIDDEN, 3 * HIDDEN, VOCABULARY, 8, 16}


@every_family
def test_optional_slices_are_biases_that_some_config_of_the_family_has(family):
    options = {"opt": {"enable_bias": True}, "llama": {"mlp_bias": True}}.get(family.model_type, {})
    present = attrgetter(family.layers)(tiny_model(family.model_type, **options))[0].state_dict().keys()
    optional = {piece.name for piece in family.mlp.slices if piece.optional}
    assert all(name.endswith(".bias") for name in optional)
    if family.mlp.slices != FAMILIES["llama"].mlp.slices or family.model_type == "llama":
        assert optional <= present  # the others share Llama's row, and have no biases there


@every_family
def test_widths_are_read_from_the_config_layer_by_layer(family):
    config = tiny_config(family.model_type)
    assert family.widths(config) == [NEURONS] * LAYERS
    setattr(config, family.mlp.width_keys[0], 24)
    assert family.widths(config) == [24] * LAYERS


def test_gpt2_without_n_inner_is_four_times_as_wide_as_its_states():
    config = tiny_config("gpt2", n_inner=None)
    assert FAMILIES["gpt2"].widths(config) == [4 * HIDDEN] * LAYERS
    mlp = tiny_model("gpt2", n_inner=None).transformer.h[0].mlp
    assert mlp.c_fc.weight.shape == (HIDDEN, 4 * HIDDEN)


@every_family
def test_learned_positions_are_a_table_that_has_an_end(family):
    model = model_of(family)
    tables = [m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m.num_embeddings != VOCABULARY]
    assert bool(tables) == family.learned_positions


@every_family
def test_tensors_are_located_by_their_names_on_disk_with_and_without_the_outermost_prefix(family):
    for name in model_of(family).state_dict():
        place = family.locate(name)
        inside = name.startswith(f"{family.layers}.")
        assert (place is not None) == inside
        if inside:
            assert family.tensor_name(*place) == name
            assert family.locate(name.split(".", 1)[1]) == place
    assert family.locate(f"vision.{family.layers}.0.mlp.up_proj.weight") is None
    assert family.locate(f"{family.layers}.x.mlp.up_proj.weight") is None


# the unfused view


@every_family
def test_unit_weights_are_views_that_compute_the_mlp(family):
    model = model_of(family)
    layer = attrgetter(family.layers)(model)[1]
    tensors = {name: weight.detach() for name, weight in axis_weights(family.mlp, layer).items()}
    weights = unit_weights(family.mlp, tensors)
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    parts = [part for part in (weights.gate, weights.up, weights.down) if part is not None]
    assert {part.untyped_storage().data_ptr() for part in parts} == storages, "nothing is copied"
    assert [tuple(part.shape) for part in parts] == [(NEURONS, HIDDEN)] * (len(parts) - 1) + [(HIDDEN, NEURONS)]
    assert weights.units == NEURONS

    held, bias = layer.state_dict(), {"gate_bias": 0.0, "up_bias": 0.0}
    bias |= {piece.roles[0]: held[piece.name] for piece in family.mlp.slices if piece.optional and piece.name in held}
    x = torch.randn(3, HIDDEN)
    activation = layer.get_submodule(family.mlp.activation)
    up = x @ weights.up.T + bias["up_bias"]  # [3, U]
    mod = activation(up) if weights.gate is None else activation(x @ weights.gate.T + bias["gate_bias"]) * up
    output = layer.get_submodule(family.mlp.output)
    expected = layer.fc2(layer.activation_fn(layer.fc1(x))) if family.model_type == "opt" else layer.mlp(x)
    made = mod @ weights.down.T + (0 if getattr(output, "bias", None) is None else output.bias)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)


def test_ungated_families_have_no_gate_and_all_others_have_one():
    without = {name for name, f in FAMILIES.items() if not any("gate" in p.roles for p in f.mlp.slices)}
    assert without == {"gpt2", "opt"}


# the copy of the table in the model file


@every_family
def test_the_model_file_agrees_with_the_table(family):
    config_name, base_name, causal_name, layers, *parts = modeling_pruned.FAMILIES[family.model_type]
    assert (config_name, base_name, causal_name) == (f"{family.stem}Config", f"{family.stem}Model", family.causal_lm)
    assert family.layers.endswith(f".{layers}")
    model = model_of(family)
    assert attrgetter(layers)(model.base_model) is attrgetter(family.layers)(model)
    for axis, part in zip((family.attention, family.mlp), parts, strict=True):
        maps = {piece.name.rsplit(".", 1)[0]: piece.is_output for piece in axis.required}
        assert maps == {**dict.fromkeys(part.inputs, False), part.output: True}
        assert (part.modules, part.units, part.output) == (axis.modules, axis.width_keys[-1], axis.output)
    names = family.pruned_classes
    classes = {auto: getattr(modeling_pruned, name) for auto, name in names.items()}
    assert classes["AutoConfig"].model_type == family.pruned_type
    assert issubclass(classes["AutoConfig"], getattr(transformers, config_name))
    assert issubclass(classes["AutoModel"], getattr(transformers, base_name))
    assert issubclass(classes["AutoModelForCausalLM"], getattr(transformers, causal_name))


def test_the_model_file_has_the_same_families_and_makes_no_other_class():
    assert modeling_pruned.FAMILIES.keys() == FAMILIES.keys()
    with pytest.raises(AttributeError, match="PrunedMambaForCausalLM"):
        _ = modeling_pruned.PrunedMambaForCausalLM


# which row


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_is_found_by_its_model_type_pruned_or_not(model_type):
    assert family_of(model_type) is family_of(f"pruned_{model_type}") is FAMILIES[model_type]


def test_an_unknown_family_is_named_with_the_known_ones_and_where_to_read_on():
    with pytest.raises(
        UnknownFamily, match=r"model family 'mamba' is not supported\. Known: gemma, gemma2, .*"
    ) as caught:
        family_of("mamba")
    text = str(caught.value)
    assert all(name in text for name in FAMILIES)
    assert "CONTRIBUTING.md, section 'Add a family'" in text
    assert "\n" not in text
    assert isinstance(caught.value, ModelError)
