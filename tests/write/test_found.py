"""Families that were found, cut and written: what is loaded again is the dense model without the units that went."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import ClassVar

import pytest
import torch
from families.tiny import auto_class, tiny_input, tiny_model

from dicer.decide.plan import LayerPlan, PrunePlan
from dicer.model.source import from_memory, open_model
from dicer.write.checkpoint import build_model
from dicer.write.config import placed
from dicer.write.opened import check_cut
from dicer.write.surgery import plan_cut

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = tiny_input()
# One of each kind of trouble: fused, ungated, biased maps; SSM layers beside attention and a buffer made by the class;
# experts that go by the same key; text inside a wrapper; a key of twice the width; another type's classes.
TYPES = ("granite", "glm4", "starcoder2", "bert", "falcon_h1", "bamba", "deepseek_v3", "gemma3", "moshi", "internlm3")
KINDS = [(name, kind) for name in TYPES for kind in ("neurons", "heads", "both") if (name, kind) != ("bert", "heads")]
DIFFER = {"uniform": 0, "differing": 1}


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS, use_cache=False).logits


def plan_for(family, kind, step):
    """Three fifths stay, in odd layers a step less; heads: one group less, in odd layers all where they may differ."""
    generator, axes = torch.Generator().manual_seed(3), {}
    for name, axis in family.axes.items():
        heads = axis.size_key is not None
        if axis.routed is not None or kind not in ("both", "heads" if heads else "neurons"):
            continue  # experts have tests of their own
        there = [layer for layer, units in enumerate(family.counts[name]) if units]
        for i, layer in enumerate(there):
            units = family.counts[name][layer]
            count = units - 1 + step * (i % 2) if heads else units * 3 // 5 // 4 * 4 - 4 * step * (i % 2)
            keep = torch.randperm(units, generator=generator)[:count].sort().values
            axes.setdefault(name, {})[layer] = LayerPlan(units, keep, torch.zeros(units))
    return PrunePlan({}, {}, {}, {}, axes)


def masked(model, family, plan):
    """The dense model with the units that go at zero, in memory, by a loop over single rows."""
    state = model.state_dict()
    for name, layers in plan.axes.items():
        for layer, own in layers.items():
            gone = sorted({*range(own.units)} - {*own.keep.tolist()})
            for piece in family.axes[name].slices:
                tensor = state.get(f"{family.layers}.{layer}.{piece.memory or piece.name}")
                start = 0
                for block in piece.blocks if tensor is not None else ():
                    for unit in gone:
                        tensor.narrow(piece.dim, start + unit * block, block).zero_()
                    start += own.units * block
    return model


def assert_same(found, wanted):
    assert (found - wanted).abs().max() < 1e-4 * wanted.std()


@pytest.mark.parametrize("differ", DIFFER)
@pytest.mark.parametrize(("model_type", "kind"), KINDS)
def test_cut_and_saved(model_type, kind, differ, tmp_path):
    model = tiny_model(model_type)
    source = from_memory(model)
    plan = plan_for(source.family, kind, DIFFER[differ])
    assert plan.axes
    dense, cut = logits(model), plan_cut(source, plan)
    check_cut(cut)
    own = build_model(cut, torch.float32)
    own.save_pretrained(tmp_path)
    again = auto_class(model_type).from_pretrained(tmp_path)
    assert (tmp_path / "modeling_pruned.py").exists() == ("pruned" in cut.config)
    if differ == "uniform" and model_type != "deepseek_v3":  # whose shared experts go by the key of all experts
        assert "pruned" not in cut.config
    wanted = logits(masked(model, source.family, plan))
    assert (wanted - dense).abs().max() > 0.1 * dense.std()
    assert_same(logits(own), wanted)
    assert torch.equal(logits(again), logits(own))


ELSEWHERE = """
import json, sys
sys.modules["dicer"] = None
import torch, transformers
auto = getattr(transformers, sys.argv[2])
model = auto.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
with torch.no_grad():
    found = model(input_ids=torch.tensor(json.loads(sys.argv[3])), use_cache=False).logits
base = transformers.AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
model.save_pretrained(sys.argv[1] + "/again")
again = auto.from_pretrained(sys.argv[1] + "/again", trust_remote_code=True).eval()
with torch.no_grad():
    same = bool(torch.equal(again(input_ids=torch.tensor(json.loads(sys.argv[3])), use_cache=False).logits, found))
print(json.dumps([type(base).__name__, same, found.flatten()[:50].tolist()]))
"""


@pytest.mark.parametrize("model_type", ["falcon_h1", "deepseek_v3", "gemma3", "internlm3"])
def test_process_without_dicer(model_type, tmp_path):
    source = from_memory(tiny_model(model_type))
    own = build_model(plan_cut(source, plan_for(source.family, "both", 1)), torch.float32)
    own.save_pretrained(tmp_path / "out")
    words = [str(tmp_path / "out"), auto_class(model_type).__name__, json.dumps(IDS.tolist())]
    environment = os.environ | {"HF_HOME": str(tmp_path / "home")}
    process = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *words], capture_output=True, text=True, timeout=300, env=environment
    )
    assert process.returncode == 0, process.stderr[-2000:]
    base, same, found = json.loads(process.stdout.splitlines()[-1])
    assert base.startswith("Pruned")
    assert base.endswith("Model")
    assert same
    assert_same(torch.tensor(found), logits(own).flatten()[:50])


@pytest.mark.parametrize("model_type", ["granite", "gemma3"])
def test_folder_pruned_twice(model_type, tmp_path):
    tiny_model(model_type).save_pretrained(tmp_path / "dense")
    model, source = tmp_path / "dense", open_model(tmp_path / "dense")
    for out in ("once", "twice"):
        plan = plan_for(open_model(model).family, "neurons", 1)
        cut = plan_cut(open_model(model), plan)
        check_cut(cut)
        loaded = open_model(model).load_model("float32")
        own = build_model(cut, torch.float32)
        assert_same(logits(own), logits(masked(loaded, source.family, plan)))
        own.save_pretrained(tmp_path / out)
        model = tmp_path / out
    assert open_model(model).family.counts["mlp"] == (12, 8, 12, 8)
    assert open_model(model).family.causal_lm == source.family.causal_lm


@pytest.mark.parametrize("model_type", ["smollm3", "glm4", "bamba", "gemma3"])
@pytest.mark.parametrize("differ", DIFFER)
def test_blocks_and_neurons(model_type, differ, tmp_path):
    model = tiny_model(model_type)
    source = from_memory(model)
    plan = plan_for(source.family, "neurons", DIFFER[differ])
    blocks = (1,)
    kept = [i for i in range(source.family.where.count) if i not in blocks]
    axes = {name: {i: own for i, own in layers.items() if i in kept} for name, layers in plan.axes.items()}
    cut = plan_cut(source, PrunePlan({}, {}, {}, {}, axes, blocks))
    check_cut(cut)
    build_model(cut, torch.float32).save_pretrained(tmp_path)
    masked(model, source.family, PrunePlan({}, {}, {}, {}, axes))
    layers = model.get_submodule(source.family.layers)
    layers[1].forward = lambda hidden_states, *_, **__: hidden_states
    if model_type == "bamba":
        layers[1].forward = lambda hidden_states, *_, **__: (hidden_states, None)
    assert_same(logits(auto_class(model_type).from_pretrained(tmp_path)), logits(model))


def test_own_record(tmp_path):
    source = from_memory(tiny_model("granite"))
    config = plan_cut(source, plan_for(source.family, "both", 1)).config
    assert (config["model_type"], config["intermediate_size"]) == ("pruned_granite", 24)
    assert config["pruned"]["layers"] == "model.layers"
    own = config["pruned"]["own"]
    hidden = source.config.hidden_size
    assert own["001"]["shapes"]["mlp.down_proj.weight"] == [hidden, 20]
    assert "mlp.down_proj.weight" not in own["000"]["shapes"]  # of the width that the config says
    assert own["000"]["config"]["self_attn"]["num_key_value_heads"] == 1
    assert "self_attn.q_proj.weight" not in own["001"]


def hurt(model, family, plan):
    """The dense model after a plan with means: zero for what goes, and a bias for what its mean gave, in memory."""
    for name, layers in plan.axes.items():
        piece = family.axes[name].output_slice
        for layer, own in layers.items():
            out = model.get_submodule(f"{family.layers}.{layer}.{family.axes[name].output}")
            old = torch.zeros(out.weight.shape[0]) if out.bias is None else out.bias.detach()
            gone = torch.ones(out.weight.shape[1])
            gone[piece.rows(own.keep, own.units)] = 0.0
            made_up = 0 if own.means is None else (out.weight * gone) @ own.means
            out.bias = torch.nn.Parameter((old if len(own.keep) or own.means is not None else 0 * old) + made_up)
            out.weight.data.mul_(1 - gone)
    return model


WHOLE = [("granite", "mlp"), ("granite", "attention"), ("bamba", "mlp"), ("glm4", "attention"), ("starcoder2", "mlp")]
WHOLE += [("gemma3", "mlp"), ("deepseek_v3", "mlp"), ("deepseek_v3", "attention"), ("deepseek_v3", "mlp.shared")]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("model_type", "axis"), WHOLE)
def test_sub_layer_gone(model_type, axis, bias, tmp_path):
    model = tiny_model(model_type)
    source = from_memory(model)
    family = source.family
    layer, units = [(i, n) for i, n in enumerate(family.counts[axis]) if n][-1]
    means = (
        torch.randn(units * family.axes[axis].channels, generator=torch.Generator().manual_seed(2)) if bias else None
    )
    own = LayerPlan(units, torch.empty(0, dtype=torch.int64), torch.zeros(units), means=means)
    plan = PrunePlan({}, {}, {}, {}, {axis: {layer: own}})
    cut = plan_cut(source, plan)
    check_cut(cut)
    build_model(cut, torch.float32).save_pretrained(tmp_path)
    again = auto_class(model_type).from_pretrained(tmp_path)
    assert_same(logits(again), logits(hurt(model, family, plan)))
    with_cache, without = (
        again.generate(IDS, max_new_tokens=3, do_sample=False, use_cache=use) for use in (True, False)
    )
    assert torch.equal(with_cache, without)


@torch.no_grad()
@pytest.mark.parametrize("means", [None, torch.linspace(-1, 1, 40)])
def test_sub_layer_of_several_modules(means):
    """BERT's MLP is two maps that the layer itself holds: both go, and what comes of neither is added."""
    model = tiny_model("bert")
    source = from_memory(model)
    own = LayerPlan(40, torch.empty(0, dtype=torch.int64), torch.zeros(40), means=means)
    plan = PrunePlan({}, {}, {}, {}, {"mlp": {3: own}})
    output = model.bert.encoder.layer[3].output.dense
    constant = 0 if means is None else output.bias + output.weight @ means
    cut = build_model(plan_cut(source, plan), torch.float32)
    model = masked(model, source.family, plan)
    output.bias.copy_(torch.zeros(48) + constant)
    assert_same(logits(cut), logits(model))


@pytest.mark.parametrize("model_type", ["granite", "starcoder2", "gemma3", "deepseek_v3"])
def test_compensation(model_type, tmp_path):
    model = tiny_model(model_type)
    source, generator = from_memory(model), torch.Generator().manual_seed(5)
    axes = {}
    for name, axis in source.family.axes.items():
        for layer, units in enumerate(source.family.counts[name] if axis.routed is None else ()):
            if units and layer != 1:
                keep = torch.randperm(units, generator=generator)[: max(units // 2, 1)].sort().values
                means = torch.randn(units * axis.channels, generator=generator)
                axes.setdefault(name, {})[layer] = LayerPlan(units, keep, torch.zeros(units), means=means)
    plan = PrunePlan({}, {}, {}, {}, axes)
    cut = plan_cut(source, plan)
    check_cut(cut)
    build_model(cut, torch.float32).save_pretrained(tmp_path)
    again = auto_class(model_type).from_pretrained(tmp_path)
    assert_same(logits(again), logits(hurt(model, source.family, plan)))


class Config:
    """As far as where a key is said goes."""

    attribute_map: ClassVar = {"num_experts": "num_local_experts"}


NESTED = {"text_config": {"intermediate_size": 40, "num_local_experts": 8}, "vision_config": {"intermediate_size": 9}}
IN_TEXT = {"text_config.intermediate_size": 24}
PLACES = {
    "flat": ({"intermediate_size": 40}, {"intermediate_size": 24}, {"intermediate_size": 24}),
    "nested": (NESTED, IN_TEXT, {**NESTED, "text_config": {**NESTED["text_config"], "intermediate_size": 24}}),
    "nested path, flat file": (
        {"intermediate_size": 40, "vision_config": {}},
        IN_TEXT,
        {"intermediate_size": 24, "vision_config": {}},
    ),
    "both": (
        {"intermediate_size": 40, "text_config": {"intermediate_size": 40}},
        IN_TEXT,
        {"intermediate_size": 24, "text_config": {"intermediate_size": 24}},
    ),
    "another word": ({"num_experts": 8}, {"num_local_experts": 6}, {"num_experts": 6}),
    "two words": ({"num_experts": 8, "num_local_experts": 8}, {"num_local_experts": 6}, {"num_local_experts": 6}),
    "not there": ({"text_config": {}}, {"text_config.head_dim": 12}, {"text_config": {"head_dim": 12}}),
}  # fmt: skip


@pytest.mark.parametrize("case", PLACES)
def test_place_of_a_key(case):
    raw, values, wanted = PLACES[case]
    before = json.dumps(raw)
    assert placed(raw, values, Config()) == wanted
    assert json.dumps(raw) == before
