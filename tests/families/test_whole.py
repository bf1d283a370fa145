"""The families that people use, by ``dicer prune`` from a folder to a process without dicer; what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

import dicer
from dicer.decide.plan import LayerPlan, PrunePlan, load_plan
from dicer.model.source import from_memory, open_model
from dicer.write.prove import prove
from families.independent import load, logits, masked_logits, tensors_of
from families.load_elsewhere import logits_elsewhere
from families.odd_names import WRITERS
from families.sizes import LAYERS, NEURONS
from families.tiny import auto_class, tiny_input, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")
Command = Callable[..., Any]
Refused = Callable[..., str]

# The thirty: N neurons, K key-value heads, B whole layers, E experts; small: it has them, and they are refused.
FAMILIES = {
    **{"llama": "NKB", "qwen2": "NKB", "qwen3": "NKB", "qwen3_5": "NKB", "qwen3_5_moe": "NKBE", "qwen3_moe": "NKBE"},
    **{"qwen3_next": "NKBE", "qwen2_5_vl": "NB", "qwen3_vl": "NKB", "gemma3": "NKB", "gemma4_text": "NKbE"},
    **{"gemma2": "NKB", "ministral3": "NKB", "mistral3": "NKB", "mixtral": "NKBE", "gpt_oss": "NKBE"},
    **{"deepseek_v3": "NKBE", "deepseek_v2": "NKBE", "deepseek_v4": "NkBe", "glm4_moe": "NKBE", "glm_moe_dsa": "NKbE"},
    **{"minimax_m2": "NkBE", "phi3": "NKB", "olmo2": "NkB", "olmoe": "NkBE", "smollm3": "NKB"},
    **{"granitemoehybrid": "NKBE", "nemotron_h": "NKBE", "lfm2_moe": "NKBE", "llama4_text": "NKBE"},
}
AXES = {"N": ("mlp", 0.4), "K": ("attention", 0.5), "E": ("experts", 0.25)}
SHARE = 5  # families of one test, whose folders one process loads


class Pruned(NamedTuple):
    """One run, and what the dense model without what went computes."""

    name: str
    model_type: str
    folder: Path
    wanted: torch.Tensor


def held(runs: list[Pruned]) -> None:
    """What a process without dicer computes with each folder."""
    loaded = logits_elsewhere([(run.folder, auto_class(run.model_type).__name__) for run in runs], tiny_input())
    bad = [
        f"{run.name}: {found if isinstance(found, str) else float((found - run.wanted).abs().max() / run.wanted.std())}"
        for run, found in zip(runs, loaded, strict=True)
        if isinstance(found, str) or not (found - run.wanted).abs().max() <= 1e-4 * run.wanted.std()
    ]
    assert not bad, "\n".join(bad)


def written(
    command: Command, model_type: str, model: Path, out: Path, *words: Any, dense: Path | None = None
) -> Pruned:
    """Type ``dicer prune``; the plan in the folder says what went."""
    ended = command("prune", model, "--device", "cpu", "--dtype", "float32", *words, "-o", out)
    assert ended.code == 0, f"{model_type} {words}: {ended.err}"
    return Pruned(out.name, model_type, out, masked_logits(model_type, dense or model, out, load_plan(out)))


def words_for(letter: str, calib: str) -> list[Any]:
    if letter.upper() == "B":
        return ["--axis", "block", "--ratio", "0.25", "--calib", calib, "--samples", "2", "--seq-len", "12"]
    axis, ratio = AXES[letter.upper()]
    return ["--axis", axis, "--criterion", "random", "--ratio", ratio]


NAMES = [*FAMILIES]


@pytest.mark.parametrize("share", [NAMES[i : i + SHARE] for i in range(0, len(NAMES), SHARE)], ids=lambda own: own[0])
def test_families(share: list[str], command: Command, calib: str, own_cache: None, tmp_path: Path) -> None:
    runs = []
    for name in share:
        dense = tmp_path / name
        tiny_model(name).save_pretrained(dense)
        for letter in FAMILIES[name]:
            out, words = tmp_path / f"{name}_{letter}", words_for(letter, calib)
            if letter.isupper():
                runs.append(written(command, name, dense, out, *words))
                continue
            code, _, err = command("prune", dense, *words, "-o", out)
            assert (code, err.count("\n")) == (2, 1), err
            assert re.search(rf"does not hold|--axis {dict(AXES, B=('block',))[letter.upper()][0]}", err)
            assert not out.exists()
    held(runs)


def test_thirty() -> None:
    assert len(FAMILIES) == 30


@pytest.mark.parametrize("name", WRITERS)
def test_hub_names(name: str, command: Command, tmp_path: Path) -> None:
    hub, dense = tmp_path / "hub", tmp_path / "dense"
    WRITERS[name](hub).save_pretrained(dense)
    runs = [written(command, name, hub, tmp_path / "mlp", *words_for("N", ""), dense=dense)]
    if name in ("mixtral", "deepseek_v3", "gpt_oss", "qwen3_moe"):
        runs.append(written(command, name, hub, tmp_path / "experts", *words_for("E", ""), dense=dense))
    if name != "qwen2_5_vl":
        runs.append(written(command, name, hub, tmp_path / "heads", *words_for("K", ""), dense=dense))
    held(runs)


def test_layers_that_predict_further_ahead(command: Command, tmp_path: Path) -> None:
    hub, out = tmp_path / "hub", tmp_path / "out"
    WRITERS["deepseek_v3"](hub)
    assert any(name.startswith(f"model.layers.{LAYERS}.") for name in tensors_of(hub))
    assert any("predict further ahead" in note for note in open_model(hub).notes)

    ended = command("prune", hub, *words_for("N", ""), "-o", out)

    assert ended.code == 0
    assert "predict further ahead" in " ".join((ended.out + ended.err).split())
    assert not any(name.startswith(f"model.layers.{LAYERS}.") for name in tensors_of(out))
    assert json.loads((out / "config.json").read_text()).get("num_nextn_predict_layers", 0) == 0


@pytest.mark.parametrize("model_type", ["minicpm3", "diffllama", "beam"])
def test_block_by_the_number_of_its_layer(
    model_type: str, refused: Refused, calib: str, own_cache: None, tmp_path: Path
) -> None:
    tiny_model(model_type).save_pretrained(tmp_path / "model")
    says = ("block", model_type, "something goes by the layer's number")
    refused("prune", tmp_path / "model", *words_for("B", calib), "-o", tmp_path / "out", says=says)


def test_smollm3_block(tmp_path: Path, command: Command, calib: str, own_cache: None) -> None:
    tiny_model("smollm3").save_pretrained(tmp_path / "model")
    before = json.loads((tmp_path / "model" / "config.json").read_text())
    run = written(command, "smollm3", tmp_path / "model", tmp_path / "out", *words_for("B", calib))
    (gone,) = load_plan(run.folder).blocks
    after = json.loads((run.folder / "config.json").read_text())
    for key in ("no_rope_layers", "layer_types"):
        assert after[key] == [item for layer, item in enumerate(before[key]) if layer != gone]
    assert after["num_hidden_layers"] == LAYERS - 1
    held([run])


def _changed(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


QUANTIZED = {
    "gpt_oss": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]},
    "deepseek_v3": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
}


@pytest.mark.parametrize("model_type", QUANTIZED)
def test_quantized_experts(model_type: str, refused: Refused, tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny_model(model_type).save_pretrained(model)
    _changed(model, quantization_config=QUANTIZED[model_type])
    says = (QUANTIZED[model_type]["quant_method"], "bf16")
    refused("prune", model, *words_for("E", ""), "-o", tmp_path / "out", says=says)


def test_quantized_experts_unsaid(refused: Refused, tmp_path: Path) -> None:
    """The file has blocks and scales, and the config does not say so."""
    model = tmp_path / "model"
    tiny_model("gpt_oss").save_pretrained(model)
    tensors = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        if name.endswith("experts.gate_up_proj"):
            tensors |= {f"{name}_blocks": torch.zeros(8, 4, 1, 16, dtype=torch.uint8)}
            tensors |= {f"{name}_scales": torch.zeros(8, 4, 1, dtype=torch.uint8)}
        else:
            tensors[name] = tensor
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    refused("prune", model, *words_for("E", ""), "-o", tmp_path / "out", says=("gate_up_proj",))


@pytest.mark.parametrize(
    ("model_type", "values", "says"),
    [
        ("granite", {"intermediate_size": NEURONS + 8}, ("mlp.", "config")),
        ("qwen3_moe", {"moe_intermediate_size": 32}, ("experts", "config")),
        ("qwen3_moe", {"num_local_experts": 12}, ("experts",)),
        ("qwen3_moe", {"num_local_experts": 4}, ("mlp.gate", "config")),
        ("granite", {"num_hidden_layers": LAYERS + 1}, (f"layers.{LAYERS}.",)),
        ("granite", {"num_hidden_layers": LAYERS - 1}, (f"layers.{LAYERS - 1}.",)),
    ],
)
def test_config_of_another_model(
    model_type: str, values: dict[str, Any], says: tuple[str, ...], refused: Refused, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    tiny_model(model_type).save_pretrained(model)
    _changed(model, **values)
    refused("prune", model, *words_for("N", ""), "-o", tmp_path / "out", says=says)


@pytest.mark.parametrize(
    ("model_type", "axis", "output"),
    [
        ("qwen3_next", "attention", "self_attn.o_proj.weight"),
        ("jamba", "attention", "self_attn.o_proj.weight"),
        ("solar_open", "mlp.shared", "mlp.shared_experts.down_proj.weight"),
        ("kimi_linear", "mlp.shared", "block_sparse_moe.shared_experts.down_proj.weight"),
        ("laguna", "mlp.shared", "mlp.shared_expert.down_proj.weight"),
    ],
)
def test_sub_layer_goes_whole(model_type: str, axis: str, output: str, tmp_path: Path) -> None:
    """Behind experts, or of another name in memory: as if its output projection were zero."""
    dense, zero, out = (tmp_path / name for name in ("dense", "zero", "out"))
    model = tiny_model(model_type)
    model.save_pretrained(dense)
    source = open_model(dense)
    layer, units = next((i, n) for i, n in enumerate(source.family.counts[axis]) if n)
    said = {"name": source.name, "model_type": model_type, "fingerprint": source.fingerprint}
    gone = LayerPlan(units, torch.arange(0), torch.zeros(units))
    dicer.apply_plan(
        PrunePlan(said, {"method": "random", "axis": axis, "ratio": 0.25}, {}, {}, {axis: {layer: gone}}), dense, out
    )

    tensors = load_file(dense / "model.safetensors")
    tensors[f"model.layers.{layer}.{output}"].zero_()
    shutil.copytree(dense, zero)
    save_file(tensors, zero / "model.safetensors", metadata={"format": "pt"})
    held([Pruned(model_type, model_type, out, logits(load(model_type, zero)))])
    assert len(load_file(out / "model.safetensors")) < len(tensors)


def test_list_of_widths() -> None:
    """Gemma 3n lists the widths of its layers; without its sparse activations neurons can go."""
    model = tiny_model("gemma3n_text", activation_sparsity_pattern=[0.0] * LAYERS)
    assert [proof.why_not for proof in prove(from_memory(model), ["mlp"])] == [""]


def test_without_units(command: Command, refused: Refused, calib: str, own_cache: None, tmp_path: Path) -> None:
    """A Mamba has neither heads nor an MLP: its layers can go, and all else says so."""
    model = tmp_path / "model"
    tiny_model("mamba").save_pretrained(model)
    info = command("info", model)
    assert (info.code, "mlp: not found" in info.out, "neurons a layer" in info.out) == (0, True, False)
    refused("prune", model, *words_for("N", calib), "-o", tmp_path / "out", says=("nothing left along --axis mlp",))
    refused("export", model, "--to", "stock", "-o", tmp_path / "out", says=("'mamba'", "nothing that can be cut"))
    held([written(command, "mamba", model, tmp_path / "out", *words_for("B", calib))])


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gemma4_text"])
def test_not_padded(model_type: str, refused: Refused, tmp_path: Path) -> None:
    tiny_model(model_type).save_pretrained(tmp_path / "model")
    says = (f"'{model_type}'", "key-value heads", "--stock")
    refused("export", tmp_path / "model", "--to", "stock", "-o", tmp_path / "out", says=says)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3"])
def test_too_few_experts(model_type: str, refused: Refused, tmp_path: Path) -> None:
    tiny_model(model_type).save_pretrained(tmp_path / "model")
    words = ("--axis", "experts", "--criterion", "random", "--ratio", "0.9")
    refused("prune", tmp_path / "model", *words, "-o", tmp_path / "out", says=("experts", "2"))


def test_in_python(tmp_path: Path) -> None:
    """A model in memory, pruned and saved: what another process loads."""
    model = tiny_model("glm4")
    model.save_pretrained(tmp_path / "dense")
    result = dicer.prune(model, dicer.Recipe(criterion="random", axis="all", ratio=0.5))
    result.model.save_pretrained(tmp_path / "out")
    wanted = masked_logits("glm4", tmp_path / "dense", tmp_path / "out", result.plan)
    held([Pruned("glm4", "glm4", tmp_path / "out", wanted)])
