"""What is found of ten families, against the real classes of transformers, and the classes of the model file."""

from __future__ import annotations

from operator import attrgetter

import pytest
import torch
import transformers
from tiny import FAMILIES, HIDDEN, LAYERS, NEURONS, VOCABULARY, family_of, tiny_model

from dicer.write.export import modeling_pruned

every_family = pytest.mark.parametrize("name", FAMILIES)


def found(name):
    """A model and what is found of it."""
    model = tiny_model(name, **({"mlp_bias": True} if name == "llama" else {}))
    return model, family_of(model)


def test_tiny_models_of_all_families():
    assert not {NEURONS, 2 * NEURONS} & {HIDDEN, 3 * HIDDEN, VOCABULARY, 8, 16}, "the width is told from other sizes"
    with pytest.raises(AttributeError, match="PrunedNothingForCausalLM"):
        _ = modeling_pruned.PrunedNothingForCausalLM


@every_family
def test_names_of_stock_classes(name):
    _, family = found(name)
    config_class = getattr(transformers, f"{family.stem}Config")
    assert config_class.model_type == family.model_type
    stock = transformers.AutoModelForCausalLM._model_mapping[config_class]
    assert stock is getattr(transformers, family.causal_lm)
    assert transformers.AutoModel._model_mapping[config_class] is getattr(transformers, f"{family.stem}Model")


@every_family
def test_slices_of_the_mlp(name):
    """Each is a tensor of the width, and no other tensor of a layer is."""
    model, family = found(name)
    axis = family.axes["mlp"]
    layers = attrgetter(family.layers)(model)
    assert len(layers) == LAYERS
    for index, layer in enumerate(layers):
        tensors = layer.state_dict()
        for piece in axis.slices:
            assert tensors[piece.name].shape[piece.dim] == NEURONS * sum(piece.blocks)
            assert family.tensor_name(index, piece.name) in model.state_dict()
            assert len(piece.roles) == len(piece.blocks)
        sized = {name for name, t in tensors.items() if {NEURONS, 2 * NEURONS} & set(t.shape)}
        assert sized == {piece.name for piece in axis.slices}
        layer.get_submodule(axis.activation)
        assert f"{axis.output}.weight" in {piece.name for piece in axis.slices if piece.is_output}
    assert all(piece.name.endswith(".bias") == piece.optional for piece in axis.slices)
    assert family.units("mlp") == [NEURONS] * LAYERS


def test_gpt2_without_n_inner():
    model = tiny_model("gpt2", n_inner=None)
    assert family_of(model).units("mlp") == [4 * HIDDEN] * LAYERS
    mlp = model.transformer.h[0].mlp
    assert mlp.c_fc.weight.shape == (HIDDEN, 4 * HIDDEN)


@every_family
def test_names_and_positions_of_a_model(name):
    """Names inside the layers are told from others; learned positions are a table that has an end."""
    model, family = found(name)
    for name in model.state_dict():
        place = family.locate(name)
        inside = name.startswith(f"{family.layers}.")
        assert (place is not None) == inside
        if inside:
            assert family.tensor_name(*place) == name
            assert family.renumbered(name, 12) == family.tensor_name(12, place[1])
    assert family.locate(f"vision.{family.layers}.0.mlp.up_proj.weight") is None
    assert family.locate(f"{family.layers}.x.mlp.up_proj.weight") is None
    tables = [m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m.num_embeddings != VOCABULARY]
    assert bool(tables) == family.learned_positions


@every_family
def test_classes_of_the_model_file(name):
    _, family = found(name)
    classes = {auto: getattr(modeling_pruned, own) for auto, own in family.pruned_classes.items()}
    assert classes["AutoConfig"].model_type == family.pruned_type == f"pruned_{name}"
    assert issubclass(classes["AutoConfig"], getattr(transformers, f"{family.stem}Config"))
    assert issubclass(classes["AutoModel"], getattr(transformers, f"{family.stem}Model"))
    assert issubclass(classes["AutoModelForCausalLM"], getattr(transformers, family.causal_lm))
