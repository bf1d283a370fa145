"""A few-layer random model of every type that the installed transformers can build, made in milliseconds.

:data:`~families.sizes.SIZES` gives each config key a small size; it is laid over the keys that a type's default config
really has, nested configs included. What a type needs beyond that is in :data:`~families.sizes.CHANGES`, and what
cannot be built in :data:`~families.sizes.CANNOT_BUILD`. Kinds of layers alternate, so that four layers show all.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from families.sizes import CHANGES, LAYERS, SIZES, TOWER_SIZES

CAUSAL = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
# Whole classes with a vision tower; the causal mapping lacks some of them, and has others without their tower.
IMAGE_TEXT = (
    *("gemma3", "gemma4", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
    *("mistral3", "llava", "internvl", "idefics3", "smolvlm", "llama4", "emu3", "mllama"),
)
TYPES = tuple(sorted({*CAUSAL, *IMAGE_TEXT}))


def tiny_config(model_type: str, **changes: Any) -> Any:
    """The type's config at a toy size. A change goes to the text config of a type that has one, if it has that key.

    A nested config (``vision_config={...}``) is changed in the keys that are given; lists of layer kinds are four long,
    so that another number of layers wants its own.
    """
    default = CONFIG_MAPPING[model_type]()
    own = dict(CHANGES.get(model_type, {}))
    values: dict[str, Any] = _sized(default, SIZES) | _alternating(default)
    for part in default.sub_configs:
        nested, more = getattr(default, part, None), own.pop(part, {}) | changes.pop(part, {})
        if part == "text_config":
            inside = {key: value for key, value in changes.items() if hasattr(nested, key)}
            values[part] = tiny_config(nested.model_type, **(more | inside))
            changes = {key: value for key, value in changes.items() if key not in inside or hasattr(default, key)}
        elif isinstance(nested, PreTrainedConfig):
            values[part] = {"model_type": nested.model_type, **_sized(nested, TOWER_SIZES), **more}
        elif more:
            values[part] = more
    return AutoConfig.for_model(model_type, **(values | own | changes))


def _sized(default: PreTrainedConfig, sizes: dict[str, Any]) -> dict[str, Any]:
    present = default.to_dict()
    return {key: size for key, size in sizes.items() if key in present}


def _alternating(default: PreTrainedConfig) -> dict[str, list[str]]:
    """Layer kinds in turn. Those of the MLP change every second layer: so each meets each kind of attention."""
    lists: dict[str, list[str]] = {}
    for key, step in (("layer_types", 1), ("layers_block_type", 1), ("block_types", 1), ("mlp_layer_types", 2)):
        kinds = list(dict.fromkeys(default.to_dict().get(key) or ()))
        if kinds:
            lists[key] = [kinds[layer // step % len(kinds)] for layer in range(LAYERS)]
    return lists


def auto_class(model_type: str) -> Any:
    """The auto class that makes the whole of the type, tower included."""
    return AutoModelForImageTextToText if model_type in IMAGE_TEXT else AutoModelForCausalLM


def tiny_model(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """A random model in eval mode, float32: matrices with deviation 0.2, vectors 0.1 to 0.2 around what they start as.

    So norms lie near one (or near zero, where the class adds the one), no bias is zero, and the rates of a state space
    stay such that it forgets.
    """
    torch.manual_seed(seed)
    model = auto_class(model_type).from_config(tiny_config(model_type, **changes), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and not name.endswith("A_log"):
                parameter.normal_(std=0.2)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1 if "norm" in name else 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith(("e_score_correction_bias", "expert_bias")):
                buffer.normal_(std=0.2)
    return model


def tiny_input(samples: int = 2, length: int = 16) -> torch.Tensor:
    """Random ids of plain tokens, int64 [samples, length]."""
    return torch.randint(4, 260, (samples, length), generator=torch.Generator().manual_seed(0))
