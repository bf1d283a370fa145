from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from families.odd_names import WRITERS
from families.sizes import EXPERTS, HIDDEN, LAYERS, NEURONS
from families.tiny import auto_class, tiny_input

# Of each file: names that the hub has, and shapes that say which dimension is which.
NAMES = {
    "gpt2": {"wte.weight": None, "h.0.attn.bias": (1, 1, 128, 128), "h.3.mlp.c_fc.weight": (HIDDEN, 4 * HIDDEN)},
    "mixtral": {
        "model.layers.0.block_sparse_moe.gate.weight": (EXPERTS, HIDDEN),
        "model.layers.3.block_sparse_moe.experts.7.w1.weight": (NEURONS, HIDDEN),
        "model.layers.3.block_sparse_moe.experts.7.w2.weight": (HIDDEN, NEURONS),
    },
    "deepseek_v3": {
        f"model.layers.{LAYERS}.eh_proj.weight": (HIDDEN, 2 * HIDDEN),
        f"model.layers.{LAYERS}.mlp.gate.e_score_correction_bias": (EXPERTS,),
        f"model.layers.{LAYERS}.shared_head.head.weight": (264, HIDDEN),
        "model.layers.3.mlp.experts.0.gate_proj.weight": (24, HIDDEN),
    },
    "gpt_oss": {
        "model.layers.0.mlp.experts.gate_up_proj": (EXPERTS, HIDDEN, 2 * NEURONS),
        "model.layers.0.mlp.experts.gate_up_proj_bias": (EXPERTS, 2 * NEURONS),
        "model.layers.0.mlp.experts.down_proj": (EXPERTS, NEURONS, HIDDEN),
        "model.layers.0.self_attn.sinks": (4,),
    },
    "qwen3_moe": {
        "model.layers.0.mlp.experts.0.gate_proj.weight": (24, HIDDEN),
        "model.layers.0.mlp.gate.weight": None,
    },
    "gemma3": {
        "language_model.model.layers.0.mlp.down_proj.weight": (HIDDEN, NEURONS),
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight": (24, 16),
        "multi_modal_projector.mm_input_projection_weight": None,
    },
    "qwen2_5_vl": {"model.layers.0.mlp.down_proj.weight": (HIDDEN, NEURONS), "visual.blocks.0.attn.qkv.weight": None},
}


@pytest.mark.parametrize("name", WRITERS)
def test_hub_names(name: str, tmp_path: Path) -> None:
    model = WRITERS[name](tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for tensor, shape in NAMES[name].items():
        assert shape is None or tensors[tensor].shape == shape, tensor

    loaded, report = auto_class(name).from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)

    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    with torch.no_grad():
        expected, found = (each.eval()(input_ids=tiny_input()).logits for each in (model, loaded))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_hub_configs(tmp_path: Path) -> None:
    configs = {}
    for name in ("deepseek_v3", "qwen3_moe", "qwen2_5_vl"):
        WRITERS[name](tmp_path / name)
        configs[name] = json.loads((tmp_path / name / "config.json").read_text())

    assert all("rope_parameters" not in config and "torch_dtype" in config for config in configs.values())
    assert configs["deepseek_v3"]["num_nextn_predict_layers"] == 1
    assert configs["deepseek_v3"]["num_hidden_layers"] == LAYERS
    assert configs["qwen3_moe"]["num_experts"] == EXPERTS
    assert "num_local_experts" not in configs["qwen3_moe"]
    assert configs["qwen2_5_vl"]["intermediate_size"] == NEURONS
    assert "text_config" not in configs["qwen2_5_vl"]
