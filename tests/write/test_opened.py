"""What is written opens: held before the run where that is known, and again before the folder gets its name."""

from __future__ import annotations

import json

import pytest
import torch
from by_hand import assert_near, logits_of, masked, plan_for
from safetensors.torch import load_file, save_file
from tiny import LAYERS, NEURONS, save_tiny
from transformers.models.llama.modeling_llama import LlamaMLP

import dicer
from dicer.decide.plan import LayerPlan
from dicer.errors import DicerError, ModelError, OutputError
from dicer.model.source import open_model
from dicer.write import checkpoint, config
from dicer.write.opened import check_cut, check_written
from dicer.write.surgery import plan_cut

FACTORS = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0, 3.0, 4.0, 5.0]}  # one a rotary pair of 8
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 1.0, **FACTORS}
PART = {**LONG, "partial_rotary_factor": 0.5, **{name: values[:2] for name, values in FACTORS.items()}}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
# Configs with something in them that hangs on hidden size / heads, or on what each layer is.
HANGING = {
    "phi3, longrope": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 32}),
    "phi3, longrope of half a head": ("phi3", {"rope_parameters": PART, "original_max_position_embeddings": 32}),
    "qwen2, yarn": ("qwen2", {"rope_parameters": YARN}),
    "llama, llama3": ("llama", {"rope_parameters": LLAMA}),
    "mistral, dynamic": ("mistral", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
}
HALF = {i: LayerPlan(2, torch.tensor([1]), torch.zeros(2)) for i in range(LAYERS)}
CUTS = {
    "heads alike": ({"attention": HALF}, ()),
    "heads differ": ({"attention": {1: HALF[1]}}, ()),
    "neurons and blocks": ({"mlp": {1: LayerPlan(40, torch.arange(9), torch.zeros(40))}}, (0, 3)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("kind", HANGING)
def test_config_that_hangs_on_the_heads(kind, cut, tmp_path):
    family, options = HANGING[kind]
    dense = save_tiny(tmp_path / "dense", family, **options)
    plan = plan_for(open_model(dense), *CUTS[cut])
    dicer.apply_plan(plan, dense, tmp_path / "out")
    written = logits_of(dicer.load(tmp_path / "out"))
    assert_near(written, logits_of(masked(dicer.load(dense), family, plan)))


@pytest.mark.parametrize("kind", ["full_attention", "sliding_attention"])
def test_all_layers_of_one_attention_removed(kind, tmp_path):
    """Gemma 3 has rotary parameters for each kind of attention, and then one kind only."""
    dense = save_tiny(tmp_path / "dense", "gemma3_text")
    blocks = tuple(i for i, found in enumerate(open_model(dense).config.layer_types) if found == kind)
    plan = plan_for(open_model(dense), {}, blocks)
    dicer.apply_plan(plan, dense, tmp_path / "out")
    assert_near(logits_of(dicer.load(tmp_path / "out")), logits_of(masked(dicer.load(dense), "gemma3_text", plan)))


def test_config_that_nothing_takes_is_refused_before_the_run(model, calib, monkeypatch, tmp_path):
    monkeypatch.setattr(config, "_heads", lambda *_: {"num_attention_heads": 3, "head_dim": None})
    monkeypatch.setattr(config, "_is", lambda *_: True)
    monkeypatch.setattr("dicer.preflight.prove", lambda *_: [])  # which would see it before
    with pytest.raises(ModelError, match=r"the checkpoint that this would be cannot be loaded: .*not a multiple"):
        dicer.prune(model, dicer.Recipe(calib="no such file", method="weight-l2"), output=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_cut_with_a_tensor_of_another_shape(model):
    cut = plan_cut(open_model(model), plan_for(open_model(model), {"attention": HALF}))
    check_cut(cut)
    name = "model.layers.2.self_attn.o_proj.weight"
    cut.infos[name] = cut.before[name]
    with pytest.raises(ModelError, match=r"o_proj.weight' would be \(32, 32\), and its config calls for \(32, 16\)"):
        check_cut(cut)


def _rewritten(folder, name, change):
    value = json.loads((folder / name).read_text())
    change(value)
    (folder / name).write_text(json.dumps(value))


def _cut_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


DAMAGE = {
    "a width": (lambda f: _rewritten(f, "config.json", lambda c: c.update(intermediate_size=9)), "config.json calls"),
    "a layer more": (lambda f: _rewritten(f, "config.json", lambda c: c.update(num_hidden_layers=5)), "is missing"),
    "a layer less": (lambda f: _rewritten(f, "config.json", lambda c: c.update(num_hidden_layers=3)), "says 3 layers"),
    "a name": (lambda f: _rewritten(f, "model.safetensors.index.json", lambda i: i["weight_map"].update(x="y")), "'y'"),
    "a tensor": (_cut_tensor, "the file has (31,)"),
    "the tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "the tokenizer cannot be loaded"),
    "how it generates": (
        lambda f: (f / "generation_config.json").write_text("{"),
        "generation_config.json cannot be read",
    ),
    "the plan of positions": (lambda f: _rewritten(f, "config.json", lambda c: c.update(head_dim=4)), "calls for"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_between_writing_and_naming(damage, model, calib, tmp_path, monkeypatch):
    hurt, says = DAMAGE[damage]

    def after(folder, *more):
        hurt(folder)
        return check_written(folder, *more)

    monkeypatch.setattr(checkpoint, "check_written", after)
    with pytest.raises(OutputError) as caught:
        dicer.prune(model, dicer.Recipe(layers="1-2", calib=calib), output=tmp_path / "out")
    assert str(caught.value).startswith(f"{tmp_path / 'out'} was not written, as it could not be opened again: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_forward_that_does_not_fit_together(model, monkeypatch, tmp_path):
    """Shapes can be those of the config and still not go through the layers."""
    forward = LlamaMLP.forward

    def other(self, hidden):
        return forward(self, hidden if self.up_proj.out_features == NEURONS else hidden[..., :3])

    monkeypatch.setattr(LlamaMLP, "forward", other)
    monkeypatch.setattr("dicer.preflight.prove", lambda *_: [])  # which would see it before
    with pytest.raises(DicerError, match=r"could not be opened again|cannot be loaded"):
        dicer.prune(model, dicer.Recipe(method="weight-l2"), output=tmp_path / "out")
    assert not list(tmp_path.iterdir())
