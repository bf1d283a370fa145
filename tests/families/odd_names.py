"""Tiny checkpoints with the names and the configs that files of the hub have, where transformers 5 would write others.

Each ``write_NAME(folder)`` gives the stock model in memory that has the same weights. They begin with what
``save_pretrained`` writes and rename, split or add tensors; what a hub's config.json says otherwise than today's is
undone in the same way (rotary settings flat, ``torch_dtype``, no list of layer kinds).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from families.sizes import EXPERTS, HIDDEN, LAYERS, POSITIONS, TOP_K
from families.tiny import tiny_model

Tensors = dict[str, Tensor]


def write_gpt2(folder: Path) -> Any:
    """openai-community/gpt2: no ``transformer.`` before a name, the causal mask as a buffer, no ``n_inner``."""
    mask = torch.ones(POSITIONS, POSITIONS).tril()[None, None]

    def tensors(saved: Tensors) -> Tensors:
        plain = {name.removeprefix("transformer."): tensor for name, tensor in saved.items()}
        return plain | {f"h.{layer}.attn.bias": mask.clone() for layer in range(LAYERS)}

    return _write(folder, tiny_model("gpt2", n_inner=None), tensors, {"n_ctx": POSITIONS}, without=("n_inner",))


def write_mixtral(folder: Path) -> Any:
    """mistralai/Mixtral-8x7B-v0.1: ``block_sparse_moe.experts.N.w1`` (gate), ``w3`` (up) and ``w2`` (down)."""
    return _write(folder, tiny_model("mixtral", sliding_window=None), dict, {"rope_theta": 1e6})


def write_deepseek_v3(folder: Path) -> Any:
    """deepseek-ai/DeepSeek-V3 in bf16's names: one layer more than ``num_hidden_layers``, and an ``auto_map``."""
    groups = {"n_group": 2, "topk_group": 1}
    more = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1, "num_nextn_predict_layers": 1}
    remote = {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}
    changes = {
        **more,
        "rope_theta": 1e4,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config", **remote},
    }
    return _write(
        folder, tiny_model("deepseek_v3", **groups), _with_mtp_layer, changes, without=("head_dim", "qk_head_dim")
    )


def _with_mtp_layer(saved: Tensors) -> Tensors:
    """A decoder layer with weights of its own, copies of both embeddings, and what joins it to the model."""
    generator = torch.Generator().manual_seed(1)
    last, mtp = f"model.layers.{LAYERS - 1}.", f"model.layers.{LAYERS}."
    layer = {
        name.replace(last, mtp): tensor + torch.randn(tensor.shape, generator=generator)
        for name, tensor in saved.items()
        if name.startswith(last)
    }
    joined = {
        "embed_tokens.weight": saved["model.embed_tokens.weight"].clone(),
        "enorm.weight": torch.ones(HIDDEN),
        "hnorm.weight": torch.ones(HIDDEN),
        "eh_proj.weight": torch.randn(HIDDEN, 2 * HIDDEN, generator=generator),
        "shared_head.norm.weight": torch.ones(HIDDEN),
        "shared_head.head.weight": saved["lm_head.weight"].clone(),
    }
    return saved | layer | {mtp + name: tensor for name, tensor in joined.items()}


def write_gpt_oss(folder: Path) -> Any:
    """gpt-oss in bf16: batched experts [E, d, 2I] with gate and up in turn, a bias for each, sinks."""
    model = tiny_model("gpt_oss")
    with torch.no_grad():
        for parameter in model.parameters():  # the file rounds them; the rotary frequencies stay as they are
            parameter.copy_(parameter.to(torch.bfloat16))
    rope = model.config.rope_parameters
    changes = {
        "experts_per_token": TOP_K,
        "initial_context_length": POSITIONS // 2,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {key: value for key, value in rope.items() if key != "rope_theta"},
        "torch_dtype": "bfloat16",
    }
    return _write(folder, model, lambda saved: {n: t.to(torch.bfloat16) for n, t in saved.items()}, changes)


def write_qwen3_moe(folder: Path) -> Any:
    """Qwen/Qwen3-30B-A3B: ``mlp.experts.N``, counted by ``num_experts``, where transformers 5 has another key."""
    changes = {"num_experts": EXPERTS, "rope_theta": 1e4, "rope_scaling": None, "max_window_layers": LAYERS}
    return _write(folder, tiny_model("qwen3_moe"), dict, changes, without=("num_local_experts",))


def write_gemma3(folder: Path) -> Any:
    """google/gemma-3-4b-it: the text in ``language_model.model``, the tower in ``vision_tower.vision_model``."""
    model = tiny_model("gemma3", vision_config={"vision_use_head": False})

    def tensors(saved: Tensors) -> Tensors:
        return {
            re.sub(r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model.", n): t for n, t in saved.items()
        }

    text = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 2}
    return _write(folder, model, tensors, {"text_config": text})


def write_qwen2_5_vl(folder: Path) -> Any:
    """Qwen/Qwen2.5-VL-7B-Instruct: ``model.layers`` beside ``visual``, and the text's keys beside ``vision_config``."""
    model = tiny_model("qwen2_5_vl")
    rope = model.config.text_config.rope_parameters
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    changes = {"rope_theta": rope["rope_theta"], "rope_scaling": scaling, "model_type": "qwen2_5_vl"}
    _write(folder, model, dict, {})
    config = json.loads((folder / "config.json").read_text())
    vision = config["vision_config"]
    vision["in_chans"] = vision.pop("in_channels")
    _dump(config.pop("text_config") | config | changes, folder / "config.json")
    return model


WRITERS: dict[str, Callable[[Path], Any]] = {
    "gpt2": write_gpt2,
    "mixtral": write_mixtral,
    "deepseek_v3": write_deepseek_v3,
    "gpt_oss": write_gpt_oss,
    "qwen3_moe": write_qwen3_moe,
    "gemma3": write_gemma3,
    "qwen2_5_vl": write_qwen2_5_vl,
}


def _write(
    folder: Path,
    model: Any,
    tensors: Callable[[Tensors], Tensors],
    changes: dict[str, Any],
    without: tuple[str, ...] = (),
) -> Any:
    """The model's checkpoint with other tensors and an older config; gives the model back."""
    model.save_pretrained(folder)
    weights = folder / "model.safetensors"
    save_file(tensors(load_file(weights)), weights, metadata={"format": "pt"})
    config = _aged(json.loads((folder / "config.json").read_text()))
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(config.get(key), dict) else value
    _dump({key: value for key, value in config.items() if key not in without}, folder / "config.json")
    return model


def _aged(config: dict[str, Any]) -> dict[str, Any]:
    """As transformers 4 wrote it, nested configs too."""
    aged = {key: _aged(value) if isinstance(value, dict) else value for key, value in config.items()}
    for key in ("rope_parameters", "_sliding_window_pattern"):
        aged.pop(key, None)
    if "dtype" in aged:
        aged["torch_dtype"] = aged.pop("dtype")
    if aged.get("model_type") != "gpt_oss":  # it came with its list
        aged.pop("layer_types", None)
    if "transformers_version" in aged:
        aged["transformers_version"] = "4.50.0"
    return aged


def _dump(config: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(config, indent=2) + "\n")
