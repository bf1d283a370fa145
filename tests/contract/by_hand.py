"""The models and cuts of the contract, and what each must come to: written without the library's own table."""

from __future__ import annotations

import copy
import json
from operator import attrgetter
from typing import Any

import torch
from safetensors.torch import load_file
from tiny import FAMILIES, LAYERS, NEURONS, PLACES, tiny_model, tiny_tokens

import dicer
from dicer.decide.plan import LayerPlan
from dicer.measure.statistics import Need, Sums
from dicer.model.source import ModelSource
from dicer.write.checkpoint import build_model
from dicer.write.surgery import plan_cut

_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"{family}-tied-mha": (family, {"tied": True, "kv_heads": 4}) for family in FAMILIES},
    "llama-biases": ("llama", {"mlp_bias": True, "attention_bias": True}),
    "gemma-biases": ("gemma", {"attention_bias": True}),
    "opt-no-biases": ("opt", {"enable_bias": False}),
    "opt-post-norm": ("opt", {"do_layer_norm_before": False}),
}
_HALF = {f"{family}-bf16": (family, {"dtype": torch.bfloat16}) for family in ("qwen2", "gpt2")}
# Each plain family has untied embeddings, and two key-value heads for four heads where it has grouped queries.
CASES = {family: (family, {}) for family in FAMILIES} | _VARIANTS | _HALF

# What a cut keeps: axis -> layer -> quarters of its units; layers that go whole; whether means are compensated.
_ALL = range(LAYERS)
SHAPES: dict[str, tuple[dict[str, dict[int, int]], tuple[int, ...], bool]] = {
    "neurons differ": ({"mlp": {1: 3, 2: 3}}, (), False),
    "neurons alike": ({"mlp": dict.fromkeys(_ALL, 3)}, (), False),
    "neurons alike with biases": ({"mlp": dict.fromkeys(_ALL, 2)}, (), True),
    "heads differ": ({"attention": {1: 2, 2: 2}}, (), False),
    "heads alike": ({"attention": dict.fromkeys(_ALL, 2)}, (), False),
    "heads alike with biases": ({"attention": dict.fromkeys(_ALL, 2)}, (), True),
    "mixed with biases": ({"attention": {0: 2, 3: 2}, "mlp": {1: 1, 2: 3, 3: 3}}, (), True),
    "first attention gone": ({"attention": {0: 0, 2: 2}, "mlp": {1: 3}}, (), False),
    "sub-layers gone with biases": ({"attention": {1: 0, 3: 2}, "mlp": {0: 0, 2: 2, 3: 0}}, (), True),
    "a shell": ({"attention": {1: 0}, "mlp": {1: 0}}, (), False),
    "blocks": ({}, (1, 2), False),
    "first block and more": ({"attention": {1: 2}, "mlp": {2: 2}}, (0,), False),
}
# Every family with every shape; each variant with a quarter of them, so that every shape meets several.
CUTS = [(family, shape) for family in FAMILIES for shape in SHAPES]
CUTS += [(case, shape) for place, case in enumerate(_VARIANTS) for shape in list(SHAPES)[place % 4 :: 4]]
# What is written and read again; two key-value heads or four, a head tied or not, are the same to a file.
FOLDERS = [(case, shape) for place, (case, shape) in enumerate(CUTS) if not case.endswith("mha") or place % 3 == 0]
FOLDERS += [(case, "neurons differ") for case in _HALF]


def dense_model(case: str) -> Any:
    """The random model of a case."""
    family, options = CASES[case]
    return tiny_model(family, **options)


def units_of(case: str, axis: str) -> int:
    """How many units a layer has: neurons, or key-value heads."""
    family, options = CASES[case]
    return NEURONS if axis == "mlp" else 4 if family in ("gpt2", "opt") else options.get("kv_heads", 2)


def channels_of(case: str, axis: str) -> int:
    """How many inputs of the output projection belong to a unit; there are four heads of 8."""
    return 1 if axis == "mlp" else 32 // units_of(case, axis)


def is_stock(case: str, shape: str) -> bool:
    """Whether a stock config of the family can say what the cut came to."""
    family = CASES[case][0]
    switch = {
        "heads alike with biases": ("llama", "qwen3", "gemma", "gemma2", "gemma3_text"),
        "neurons alike with biases": ("llama", "gpt2") if case == "opt-no-biases" else ("llama", "gpt2", "opt"),
        "heads alike": [name for name in FAMILIES if name not in ("gpt2", "opt")],  # whose heads fill the hidden size
    }
    return shape in ("neurons alike", "blocks") or family in switch.get(shape, ())


def plan_of(source: ModelSource, case: str, shape: str) -> dicer.PrunePlan:
    """A plan for a model: random units, and random means where they are compensated."""
    axes, blocks, bias = SHAPES[shape]
    generator, layers = torch.Generator().manual_seed(7), {}
    for axis, quarters in axes.items():
        units, channels = units_of(case, axis), channels_of(case, axis)
        for index, kept in quarters.items():
            keep = torch.randperm(units, generator=generator)[: units * kept // 4].sort().values
            means = torch.randn(units * channels, generator=generator) if bias else None
            layers.setdefault(axis, {})[index] = LayerPlan(units, keep, torch.zeros(units), means=means)
    return plan_for(source, layers, blocks)


def plan_for(source: ModelSource, axes: dict[str, Any], blocks: tuple[int, ...] = ()) -> dicer.PrunePlan:
    """A plan that fits a model and says nothing of where it comes from."""
    model = {"name": source.name, "model_type": source.config.model_type, "fingerprint": source.fingerprint}
    return dicer.PrunePlan(model, {"method": None}, {}, {}, axes, blocks)


def cut_by(plan: dicer.PrunePlan, source: ModelSource) -> Any:
    """What the library makes of a plan, in memory."""
    return build_model(plan_cut(source, plan))


class Passed(torch.nn.Module):
    """A decoder layer that is not there."""

    def forward(self, hidden_states: Any, *_: Any, **__: Any) -> Any:
        """What came in."""
        return hidden_states


def masked(model: Any, case: str, plan: dicer.PrunePlan) -> Any:
    """A copy of the dense model in which what goes no longer reaches the output, and compensated means do."""
    family = CASES[case][0]
    layers_at, *outputs = PLACES[family]
    model = copy.deepcopy(model)
    layers = attrgetter(layers_at)(model)
    for axis, at in zip(("attention", "mlp"), outputs, strict=True):
        for index, layer in plan.axes.get(axis, {}).items():
            _mask(layers[index].get_submodule(at), layer, channels_of(case, axis), transposed=family != "gpt2")
    for index in plan.blocks:
        layers[index] = Passed()
    return model


def _mask(output: Any, layer: LayerPlan, channels: int, *, transposed: bool) -> None:
    """Zero the removed units' inputs of an output projection, and put their means' share into its bias."""
    gone = torch.ones(layer.units, dtype=torch.bool)
    gone[layer.keep] = False
    channel = gone.repeat_interleave(channels)
    by_channel = output.weight.data.T if transposed else output.weight.data  # [C, d]; Conv1D is [C, d] as it is
    lost = layer.means[channel] @ by_channel[channel] if layer.means is not None else 0.0
    by_channel[channel] = 0.0
    if layer.means is not None:
        output.bias = torch.nn.Parameter(lost + (0.0 if output.bias is None else output.bias.data))
    elif output.bias is not None and not len(layer.keep):
        output.bias.data.zero_()  # nothing at all is left of a sub-layer that is gone


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    """Logits of the same two samples for all."""
    return model(input_ids=tiny_tokens(2, 24, seed=5), use_cache=False).logits


def generated_by(model: Any, *, cache: bool = True, new: int = 6) -> list[list[int]]:
    """The tokens that a model goes on with."""
    prompt = tiny_tokens(2, 8, seed=6)
    tokens = model.generate(prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False, use_cache=cache)
    return tokens[:, 8:].tolist()


def assert_near(found, expected, atol=2e-5):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def assert_same_tensors(first, second):
    assert first.keys() == second.keys()
    assert [n for n in first if first[n].dtype != second[n].dtype or not torch.equal(first[n], second[n])] == []


def bytes_in(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def config_in(folder):
    return json.loads((folder / "config.json").read_text())


def tensors_in(folder):
    return {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in load_file(file).items()}


def untied(state, written):
    """A state without the head, if it is not written because it is the embedding."""
    tied = state.keys() - written.keys()
    assert tied <= {"lm_head.weight"}
    return {name: tensor for name, tensor in state.items() if name not in tied}


# What the statistics must come to

# Modules whose outputs are the pre- and the post-activation.
ACTIVATIONS = dict.fromkeys(FAMILIES, ("mlp.gate_proj", "mlp.act_fn")) | {
    "phi3": ("mlp.gate_up_proj", "mlp.activation_fn"),
    "gpt2": ("mlp.c_fc", "mlp.act"),
    "opt": ("fc1", "activation_fn"),
}
NEEDS = {Need(kind, activation) for kind in ("square_sum", "sum", "gram") for activation in ("pre", "post", "mod")}


def plain_activations(model, family, batches):
    """What hooks see in the ordinary forward of the whole model: (layer, activation) -> [B, T, U] of every batch."""
    seen, handles = {}, []

    def note(layer, activation, values):
        seen.setdefault((layer, activation), []).append(values)

    def hooks(index, layer):
        pre, post, output = map(layer.get_submodule, (*ACTIVATIONS[family], PLACES[family][2]))
        yield pre.register_forward_hook(lambda _, __, out: note(index, "pre", out[..., :NEURONS]))  # Phi-3: gate, up
        yield post.register_forward_hook(lambda _, __, out: note(index, "post", out))
        yield output.register_forward_pre_hook(lambda _, inputs: note(index, "mod", inputs[0]))

    for index, layer in enumerate(attrgetter(PLACES[family][0])(model)):
        handles += hooks(index, layer)
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def assert_same_sums(sums, seen, layer):
    """Bit for bit what the same sums make of what the hooks saw."""
    plain = Sums(NEEDS)
    for activation in ("pre", "post", "mod"):
        for values in seen[layer, activation]:
            plain.add(activation, values)
    assert [need for need in NEEDS if not torch.equal(sums.get(*need[:2]), plain.get(*need[:2]))] == []


def assert_exact_within_rounding(sums, seen, layer):
    for activation in ("pre", "post", "mod"):
        flat = torch.cat([v.flatten(0, -2) for v in seen[layer, activation]]).double()  # [T, U]
        exact = {"square_sum": (flat * flat).sum(0), "sum": flat.sum(0), "gram": flat.T @ flat}
        for kind, value in exact.items():
            torch.testing.assert_close(sums.get(kind, activation).double(), value, rtol=1e-5, atol=1e-5 * flat.norm())
