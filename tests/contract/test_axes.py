"""Heads, sub-layers, whole blocks and biases, over every family: cut == masked, reload, cache, plan round trip."""

from __future__ import annotations

import copy
from operator import attrgetter

import pytest
import torch
from test_contract import CASES, run_without_dicer
from tiny import FAMILIES, LAYERS, NEURONS, PLACES, save_tiny, tiny_model, tiny_tokens

import dicer
from dicer.decide.plan import LayerPlan, PrunePlan, load_plan
from dicer.errors import PlanError
from dicer.model.source import from_memory, open_model
from dicer.pipeline import build_model
from dicer.write.surgery import plan_cut

GROUPED = dict.fromkeys(FAMILIES, 2) | {"gpt2": 4, "opt": 4}  # key-value heads of the tiny models; 4 heads of 8
EMPTY = torch.empty(0, dtype=torch.int64)

# What each plan keeps: axis -> layer -> kept quarters of the units; blocks that go; whether means are compensated.
SHAPES = {
    "heads differ": ({"attention": {1: 2, 2: 2}}, (), False),
    "heads everywhere": ({"attention": dict.fromkeys(range(LAYERS), 2)}, (), False),
    "heads alike with biases": ({"attention": dict.fromkeys(range(LAYERS), 2)}, (), True),
    "neurons alike with biases": ({"mlp": dict.fromkeys(range(LAYERS), 2)}, (), True),
    "mixed with biases": ({"attention": {0: 2, 3: 2}, "mlp": {1: 1, 2: 3, 3: 3}}, (), True),
    "first attention gone": ({"attention": {0: 0, 2: 2}, "mlp": {1: 3}}, (), False),
    "sub-layers gone with biases": ({"attention": {1: 0, 3: 2}, "mlp": {0: 0, 2: 2, 3: 0}}, (), True),
    "a shell": ({"attention": {1: 0}, "mlp": {1: 0}}, (), False),
    "blocks": ({}, (1, 2), False),
    "first block and more": ({"attention": {1: 2}, "mlp": {2: 2}}, (0,), False),
}
CACHED = ("heads differ", "first attention gone", "sub-layers gone with biases")
RELOADED = (*FAMILIES, "llama-tied-mha", "llama-biases", "opt-no-biases", "opt-post-norm")


def units_of(case, axis):
    family, options = CASES[case]
    return (
        NEURONS if axis == "mlp" else options.get("kv_heads", GROUPED[family]) if family not in ("gpt2", "opt") else 4
    )


def channels_of(case, axis):
    return 1 if axis == "mlp" else 4 * 8 // units_of(case, "attention")


def make_plan(case, source, shape):
    """Random choices of what stays, and random means where a bias is to make up for the rest."""
    axes, blocks, bias = SHAPES[shape]
    generator = torch.Generator().manual_seed(7)
    made = {}
    for axis, layers in axes.items():
        units, channels = units_of(case, axis), channels_of(case, axis)
        for index, quarters in layers.items():
            keep = torch.randperm(units, generator=generator)[: units * quarters // 4].sort().values
            means = torch.randn(units * channels, generator=generator) if bias else None
            made.setdefault(axis, {})[index] = LayerPlan(units, keep, torch.zeros(units), means=means)
    model = {"name": source.name, "model_type": source.config.model_type, "fingerprint": source.fingerprint}
    return PrunePlan(model, {"method": None}, {}, {}, made, blocks)


class Passed(torch.nn.Module):
    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states


def mask(model, case, plan):
    """The dense model with the removed units' inputs of the output projections zeroed, and their means added."""
    family = CASES[case][0]
    layers_at, *outputs = PLACES[family]
    masked = copy.deepcopy(model)
    layers = attrgetter(layers_at)(masked)
    for axis, at in zip(("attention", "mlp"), outputs, strict=True):
        for index, layer in plan.axes.get(axis, {}).items():
            output, size = layers[index].get_submodule(at), channels_of(case, axis)
            gone = torch.ones(layer.units, dtype=torch.bool)
            gone[layer.keep] = False
            channel = gone.repeat_interleave(size)
            by_channel = output.weight.data if family == "gpt2" else output.weight.data.T  # [C, d]
            lost = layer.means[channel] @ by_channel[channel] if layer.means is not None else 0.0
            by_channel[channel] = 0.0
            if len(layer.keep) == 0 and layer.means is None and output.bias is not None:
                output.bias.data.zero_()  # nothing at all is left of a sub-layer that is gone
            if layer.means is not None:
                old = 0.0 if output.bias is None else output.bias.data
                output.bias = torch.nn.Parameter(old + lost)
    for index in plan.blocks:
        layers[index] = Passed()
    return masked


@torch.no_grad()
def logits_of(model):
    return model(input_ids=tiny_tokens(2, 24, seed=5), use_cache=False).logits


def generated_by(model, *, cache):
    prompt = tiny_tokens(2, 8, seed=6)
    tokens = model.generate(prompt, max_new_tokens=12, min_new_tokens=12, do_sample=False, use_cache=cache)
    return tokens[:, 8:].tolist()


every_case = pytest.mark.parametrize("case", CASES)


@pytest.mark.parametrize("shape", SHAPES)
@every_case
def test_a_cut_model_says_what_the_masked_one_says(case, shape):
    family, options = CASES[case]
    model = tiny_model(family, **options)
    source = from_memory(model)
    plan = make_plan(case, source, shape)
    pruned = build_model(source, plan)
    torch.testing.assert_close(logits_of(pruned), logits_of(mask(model, case, plan)), rtol=0, atol=2e-5)
    assert (logits_of(pruned) - logits_of(model)).abs().max() > 1e-4, "what went must have mattered"
    if shape in CACHED:
        assert generated_by(pruned, cache=True) == generated_by(pruned, cache=False)


@pytest.mark.parametrize("case", RELOADED)
def test_the_cache_shrinks_with_the_groups(case):
    family, options = CASES[case]
    source = from_memory(tiny_model(family, **options))
    pruned = build_model(source, make_plan(case, source, "first attention gone"))
    cache = pruned(input_ids=tiny_tokens(2, 12), use_cache=True).past_key_values
    groups = units_of(case, "attention")
    assert [layer.keys.shape[1] for layer in cache.layers] == [1, groups, groups // 2, groups]
    assert cache.layers[0].keys.shape[-1] == 1, "an attention that is gone holds one number a token"
    assert cache.get_seq_length() == 12


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Pruned folders, what their plans came to in memory, and what became of them in a process without dicer."""
    root, models, load = tmp_path_factory.mktemp("written"), {}, {}
    for case in RELOADED:
        family, options = CASES[case]
        dense = save_tiny(root / f"{case} dense", family, **options)
        source = open_model(dense)
        for shape in SHAPES:
            plan, out = make_plan(case, source, shape), root / f"{case} {shape}"
            dicer.apply_plan(plan, dense, out)
            models[case, shape] = out, build_model(source, plan)
            load[str(out)] = str(root / f"{case} {shape} again") if shape == "sub-layers gone with biases" else None
    job = {"ids": tiny_tokens(2, 24, seed=5).tolist(), "prompt": tiny_tokens(1, 8, seed=6).tolist()}
    return models, load, *run_without_dicer(root, {**job, "refused": [], "load": load})


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", RELOADED)
def test_the_folder_loads_without_dicer_and_says_the_same(case, shape, written):
    models, load, report, logits = written
    out, model = models[case, shape]
    family = CASES[case][0]
    fixed_heads = family in ("gpt2", "opt")
    own_bias = case.removesuffix("-post-norm") in ("gpt2", "opt")  # the others have a switch for it, or none at all
    switch = {"heads": ("llama", "qwen3", "gemma", "gemma2", "gemma3_text"), "neurons": ("llama",)}
    part = shape.partition(" ")[0]
    stock = shape == "blocks" or (shape == "heads everywhere" and not fixed_heads)
    stock |= shape == f"{part} alike with biases" and (family in switch[part] or (own_bias and part == "neurons"))
    assert (out / "modeling_pruned.py").exists() is not stock
    for name in filter(None, (str(out), load[str(out)])):
        assert report[name]["not clean"] == {}
        assert torch.equal(logits[name], logits_of(model))
        assert report[name]["class"].startswith("Pruned") is not stock
    again = dicer.load(out)
    assert torch.equal(logits_of(again), logits_of(model)), "with dicer imported"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_saved_plan_gives_the_same_bytes_again(family, shape, tmp_path):
    dense = save_tiny(tmp_path / "dense", family)
    plan = make_plan(family, open_model(dense), shape)
    plan.save(tmp_path / "plan")
    dicer.apply_plan(plan, dense, tmp_path / "first")
    dicer.apply_plan(tmp_path / "plan", dense, tmp_path / "second")
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("first", "second"))
    assert first == second
    assert plan.diff(load_plan(tmp_path / "plan")) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_copied_cut_or_dropped_and_the_sizes_add_up(family):
    source = from_memory(tiny_model(family))
    plan = make_plan(family, source, "sub-layers gone with biases")
    cut = plan_cut(source, plan)
    before, after = cut.sizes()
    pruned = build_model(source, plan)
    held = dict(pruned.named_parameters())
    assert after.parameters == sum(info.numel for info in cut.infos.values()) == sum(p.numel() for p in held.values())
    removed = sum(info.numel for name, info in cut.before.items() if name not in cut.infos)
    shrunk = sum(cut.before[n].numel - info.numel for n, info in cut.infos.items() if n in cut.before)
    added = sum(info.numel for name, info in cut.infos.items() if name not in cut.before)
    assert before.parameters - after.parameters == removed + shrunk - added


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_a_pruned_model_can_be_pruned_again(family, tmp_path):
    dense = save_tiny(tmp_path / "dense", family)
    source = open_model(dense)
    dicer.apply_plan(make_plan(family, source, "sub-layers gone with biases"), dense, tmp_path / "once")
    once = open_model(tmp_path / "once")
    units = {axis: once.family.units(once.config, axis) for axis in ("attention", "mlp")}
    keep = torch.arange(units["mlp"][1] // 2)
    layer = LayerPlan(units["mlp"][1], keep, torch.zeros(units["mlp"][1]))
    model = {"name": "x", "model_type": once.config.model_type, "fingerprint": once.fingerprint}
    twice = build_model(once, PrunePlan(model, {}, {}, {}, {"mlp": {1: layer}}, (3,)))
    masked = copy.deepcopy(dicer.load(tmp_path / "once"))
    layers_at, _, output = PLACES[family]
    weight = attrgetter(layers_at)(masked)[1].get_submodule(output).weight.data
    (weight if family == "gpt2" else weight.T)[len(keep) :] = 0.0
    attrgetter(layers_at)(masked)[3] = Passed()
    torch.testing.assert_close(logits_of(twice), logits_of(masked), rtol=0, atol=2e-5)
    assert once.family.units(twice.config, "attention") == units["attention"][:3]
    assert once.family.units(twice.config, "mlp") == [0, len(keep), units["mlp"][2]]


def test_a_plan_for_other_sizes_is_refused():
    source = from_memory(tiny_model("llama"))
    for axes, blocks, found in (
        ({"attention": {1: LayerPlan(3, torch.arange(2), torch.zeros(3))}}, (), "3 units of attention in layer 1"),
        ({"mlp": {9: LayerPlan(40, torch.arange(2), torch.zeros(40))}}, (), "40 units of mlp in layer 9"),
        ({}, (4,), "removes layer 4, and the model has 4 layers"),
        ({"attention": {1: LayerPlan(2, EMPTY, torch.zeros(2), means=torch.zeros(6))}}, (), "means of 6"),
    ):
        with pytest.raises(PlanError, match=found):
            plan_cut(source, PrunePlan({}, {}, {}, {}, axes, blocks))


@pytest.mark.parametrize(("family", "stock"), [("llama", False), ("gemma2", False), ("mistral", True), ("qwen2", True)])
def test_heads_that_a_stock_config_refuses_get_the_form_with_a_say_for_every_layer(family, stock, tmp_path):
    dense = save_tiny(tmp_path / "dense", family, kv_heads=4)  # three of four heads: 32 is no multiple of 3
    source = open_model(dense)
    layers = {i: LayerPlan(4, torch.tensor([0, 2, 3]), torch.zeros(4)) for i in range(LAYERS)}
    model = {"name": "x", "model_type": family, "fingerprint": source.fingerprint}
    plan = PrunePlan(model, {"method": None}, {}, {}, {"attention": layers})
    dicer.apply_plan(plan, dense, tmp_path / "out")
    assert (tmp_path / "out" / "modeling_pruned.py").exists() is not stock
    loaded = dicer.load(tmp_path / "out")
    torch.testing.assert_close(
        logits_of(loaded), logits_of(mask(dicer.load(dense), f"{family}-tied-mha", plan)), rtol=0, atol=2e-5
    )
    if stock:
        assert (loaded.config.num_attention_heads, loaded.config.head_dim) == (3, 8)


@pytest.mark.parametrize("case", [case for case in RELOADED if case != "gemma2"])  # which has no sdpa
def test_a_pruned_model_changes_its_attention_implementation_as_a_stock_one_does(case, written):
    folder, _ = written[0][case, "heads differ"]
    model = dicer.load(folder, attn_implementation="eager")
    expected = logits_of(model)
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(logits_of(model), expected, rtol=0, atol=2e-5)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(input_ids=tiny_tokens(2), output_attentions=True).attentions
    assert len(weights) == LAYERS
