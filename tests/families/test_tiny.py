"""Every type that the installed transformers has: built and run, or known not to be."""

from __future__ import annotations

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from families.sizes import CANNOT_BUILD, VOCABULARY
from families.tiny import CAUSAL, IMAGE_TEXT, TYPES, tiny_config, tiny_input, tiny_model


@pytest.mark.parametrize("model_type", [name for name in TYPES if name not in CANNOT_BUILD])
def test_runs(model_type: str) -> None:
    model = tiny_model(model_type)
    with torch.no_grad():
        logits = model(input_ids=tiny_input()).logits

    assert logits.shape == (2, 16, VOCABULARY)
    assert logits.isfinite().all()
    assert logits.std() > 0.01
    assert not model.training
    parameters = dict(model.named_parameters())
    assert sum(parameter.numel() for parameter in parameters.values()) < 500_000
    named = [*parameters.items(), *model.named_buffers()]
    biases = {name: each for name, each in named if name.endswith(("bias", "biases")) and each.is_floating_point()}
    assert not [name for name, bias in biases.items() if not bias.count_nonzero()]
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}


@pytest.mark.parametrize("model_type", sorted(CANNOT_BUILD.keys() & set(TYPES)))
def test_cannot_be_built(model_type: str) -> None:
    with pytest.raises((AttributeError, ImportError, ValueError, StrictDataclassError)):
        tiny_model(model_type)


def test_same_seed_same_weights() -> None:
    first, second, other = (tiny_model("jamba", seed=seed).state_dict() for seed in (0, 0, 1))

    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_changes_nested() -> None:
    config = tiny_config("qwen2_5_vl", intermediate_size=24, tie_word_embeddings=True, vision_config={"depth": 2})

    assert config.text_config.intermediate_size == 24
    assert config.tie_word_embeddings
    assert config.image_token_id == 260
    assert (config.vision_config.depth, config.vision_config.hidden_size) == (2, 16)


def test_types() -> None:
    assert len(CAUSAL) >= 180
    assert set(IMAGE_TEXT) <= set(TYPES)
    assert CANNOT_BUILD.keys() <= set(TYPES)
