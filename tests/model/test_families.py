"""The family table against the real classes of transformers, and its copy in the model file."""

from __future__ import annotations

from operator import attrgetter

import pytest
import torch
import transformers
from tiny import FAMILIES as TINY
from tiny import HIDDEN, LAYERS, NEURONS, VOCABULARY, tiny_config, tiny_model

from dicer.errors import ModelError, UnknownFamily
from dicer.model.families import FAMILIES, family_of
from dicer.write.export import modeling_pruned

every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())


def model_of(family):
    return tiny_model(family.model_type, **({"mlp_bias": True} if family.model_type == "llama" else {}))


def test_tiny_models_of_all_families():
    assert set(FAMILIES) == set(TINY) == modeling_pruned.FAMILIES.keys()
    assert not {NEURONS, 2 * NEURONS} & {HIDDEN, 3 * HIDDEN, VOCABULARY, 8, 16}, "the width is told from other sizes"
    with pytest.raises(AttributeError, match="PrunedNothingForCausalLM"):
        _ = modeling_pruned.PrunedNothingForCausalLM


@every_family
def test_names_of_stock_classes(family):
    config_class = getattr(transformers, f"{family.stem}Config")
    assert config_class.model_type == family.model_type
    stock = transformers.AutoModelForCausalLM._model_mapping[config_class]
    assert stock is getattr(transformers, family.causal_lm)
    assert transformers.AutoModel._model_mapping[config_class] is getattr(transformers, f"{family.stem}Model")


@every_family
def test_slices_of_the_mlp(family):
    """Each is a tensor of the width, and no other tensor of a layer is."""
    model, axis = model_of(family), family.axes["mlp"]
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
    optional = {piece.name for piece in axis.slices if piece.optional}
    assert all(name.endswith(".bias") for name in optional)
    if axis.slices != FAMILIES["llama"].axes["mlp"].slices or family.model_type == "llama":
        assert optional <= tensors.keys()  # the others share Llama's row, and have no biases there


@every_family
def test_widths_of_a_config(family):
    config = tiny_config(family.model_type)
    assert family.widths(config) == [NEURONS] * LAYERS
    setattr(config, family.axes["mlp"].width_keys[0], 24)
    assert family.widths(config) == [24] * LAYERS


def test_gpt2_without_n_inner():
    assert FAMILIES["gpt2"].widths(tiny_config("gpt2", n_inner=None)) == [4 * HIDDEN] * LAYERS
    mlp = tiny_model("gpt2", n_inner=None).transformer.h[0].mlp
    assert mlp.c_fc.weight.shape == (HIDDEN, 4 * HIDDEN)


@every_family
def test_names_and_positions_of_a_model(family):
    """Names are understood with and without the outermost prefix; learned positions are a table that has an end."""
    model = model_of(family)
    for name in model.state_dict():
        place = family.locate(name)
        inside = name.startswith(f"{family.layers}.")
        assert (place is not None) == inside
        if inside:
            assert family.tensor_name(*place) == name
            assert family.locate(name.split(".", 1)[1]) == place
            assert family.renumbered(name, 12) == family.tensor_name(12, place[1])
    assert family.locate(f"vision.{family.layers}.0.mlp.up_proj.weight") is None
    assert family.locate(f"{family.layers}.x.mlp.up_proj.weight") is None
    tables = [m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m.num_embeddings != VOCABULARY]
    assert bool(tables) == family.learned_positions


@every_family
def test_copy_in_the_model_file(family):
    config_name, base_name, causal_name, layers, *parts = modeling_pruned.FAMILIES[family.model_type]
    assert (config_name, base_name, causal_name) == (f"{family.stem}Config", f"{family.stem}Model", family.causal_lm)
    assert family.layers.endswith(f".{layers}")
    model = model_of(family)
    assert attrgetter(layers)(model.base_model) is attrgetter(family.layers)(model)
    for axis, part in zip(family.axes.values(), parts, strict=True):
        maps = {piece.name.rsplit(".", 1)[0]: piece.is_output for piece in axis.required}
        assert maps == {**dict.fromkeys(part.inputs, False), part.output: True}
        assert (part.modules, part.units, part.output) == (axis.modules, axis.width_keys[-1], axis.output)
    classes = {auto: getattr(modeling_pruned, name) for auto, name in family.pruned_classes.items()}
    assert classes["AutoConfig"].model_type == family.pruned_type
    assert issubclass(classes["AutoConfig"], getattr(transformers, config_name))
    assert issubclass(classes["AutoModel"], getattr(transformers, base_name))
    assert issubclass(classes["AutoModelForCausalLM"], getattr(transformers, causal_name))


def test_family_of_a_model_type():
    for model_type, family in FAMILIES.items():
        assert family_of(model_type) is family_of(f"pruned_{model_type}") is family
        assert family.model_type == model_type
    with pytest.raises(
        UnknownFamily, match=r"model family 'mamba' is not supported\. Known: gemma, gemma2, .*"
    ) as error:
        family_of("mamba")
    text = str(error.value)
    assert all(name in text for name in FAMILIES)
    assert "CONTRIBUTING.md, section 'Add a family'" in text
    assert "src/dicer/model/families.py" in text
    assert "\n" not in text
    assert isinstance(error.value, ModelError)
