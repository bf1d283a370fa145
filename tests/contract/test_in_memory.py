"""Models in memory: left as they were, pruned as their folders would be, and refused where they are none."""

from __future__ import annotations

import copy
import json
import weakref
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from by_hand import logits_of
from tiny import LAYERS, PLACES, family_of, save_tiny, tiny_model, tiny_tokens
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

import dicer
from dicer.errors import ModelError
from dicer.measure.statistics import Need
from dicer.measure.stores.resident import ResidentStore
from dicer.measure.walk import walk
from dicer.write.export import modeling_pruned

CHECKPOINTING = dicer.Compute(batch_size=4, gradient_checkpointing=True)


@pytest.fixture(scope="module")
def recipe(calib):
    def make(**values):
        return dicer.Recipe(**{"method": "rc-a", "calib": calib, **values})

    return make


def footprint(model):
    """Everything about a model that pruning could leave changed."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

    def held(tensor):
        return None if tensor is None else (tensor.data_ptr(), tensor.detach().numpy().tobytes())

    return {
        "state": {name: held(t) for name, t in model.state_dict().items()},
        "gradients": {name: held(p.grad) for name, p in model.named_parameters()},
        "flags": {name: p.requires_grad for name, p in model.named_parameters()},
        "gradient hooks": [n for n, p in model.named_parameters() if p._post_accumulate_grad_hooks],
        "hooks": {name: [len(getattr(m, h)) for h in hooks] for name, m in model.named_modules()},
        "forwards": {name: m.__dict__.get("forward") for name, m in model.named_modules()},
        "training": {name: m.training for name, m in model.named_modules()},
        "config": model.config.to_dict(),
    }


def parts_that_differ(before, after):
    return [part for part in before if before[part] != after[part]]


@pytest.mark.parametrize(
    ("family", "method"),
    [("llama", "rc-a"), ("llama", "taylor"), ("phi3", "sim-dominant"), ("gpt2", "taylor"), ("opt", "let-llm")],
)
def test_left_as_it_was(family, method, recipe):
    model = tiny_model(family).train()
    layers = attrgetter(PLACES[family][0])(model)
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 > 0)
    model(input_ids=tiny_tokens(2, 8)).logits.sum().backward()
    layers[1].forward = layers[1].forward  # a forward of the layer's own, as accelerate gives it
    layers[3].eval()
    layers[2].register_forward_hook(lambda *_: None)
    before = footprint(model)
    dicer.prune(model, recipe(method=method, layers="1-2"), CHECKPOINTING)
    assert parts_that_differ(before, footprint(model)) == []


def test_left_as_it_was_when_scoring_fails(recipe):
    model = tiny_model("llama")
    layers = model.model.layers
    before = footprint(model)

    def broken(*_):
        raise RuntimeError("the device is lost")

    handle = layers[2].mlp.down_proj.register_forward_hook(broken)
    for method in ("rc-a", "taylor"):
        with pytest.raises(RuntimeError, match="the device is lost"):
            dicer.prune(model, recipe(method=method), CHECKPOINTING)
    handle.remove()
    assert parts_that_differ(before, footprint(model)) == []


def test_gradients_held_already(recipe):
    clean, used = tiny_model("llama"), tiny_model("llama")
    used(input_ids=tiny_tokens(2, 8)).logits.sum().backward()
    scores = [dicer.prune(model, recipe(method="taylor")).plan.mlp[1].scores for model in (clean, used)]
    assert torch.equal(*scores)


def test_dropout_of_a_model_in_training(recipe):
    model = tiny_model("gpt2", resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)
    quiet = [dicer.prune(model, recipe(method=m)).plan.files() for m in ("rc-a", "taylor")]
    value = dicer.perplexity(model, tiny_tokens())
    model.train()
    assert [dicer.prune(model, recipe(method=m)).plan.files() for m in ("rc-a", "taylor")] == quiet
    assert dicer.perplexity(model, tiny_tokens()) == value
    assert model.training


def test_no_memory_shared_with_the_dense_model():
    dense = tiny_model("llama", tied=True)
    dense.generation_config.max_new_tokens = 77
    pruned = dicer.prune(dense, dicer.Recipe(method="weight-l2", layers="1-2")).model
    assert not {p.data_ptr() for p in dense.parameters()} & {p.data_ptr() for p in pruned.parameters()}
    assert pruned.generation_config.max_new_tokens == 77


def test_generation_config_of_a_folder(tmp_path):
    folder = save_tiny(tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6], "repetition_penalty": 1.3}))
    pruned = dicer.prune(folder, dicer.Recipe(method="weight-l2")).model
    assert (pruned.generation_config.eos_token_id, pruned.generation_config.repetition_penalty) == ([5, 6], 1.3)


def test_code_saved_along(tmp_path, recipe):
    pruned = dicer.prune(tiny_model("llama"), recipe(layers="1-2")).model
    pruned.save_pretrained(tmp_path)
    assert (tmp_path / "modeling_pruned.py").read_bytes() == Path(modeling_pruned.__file__).read_bytes()
    assert set(json.loads((tmp_path / "config.json").read_text())["auto_map"]) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
    }
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path)), logits_of(pruned))


@pytest.mark.parametrize("wrong", ["nothing", "module", "headless", "classifier"])
def test_no_language_model(wrong):
    dense = tiny_model("llama")
    given = {"nothing": None, "module": torch.nn.Linear(2, 2), "headless": dense.model}
    given["classifier"] = LlamaForSequenceClassification(dense.config)
    with pytest.raises(ModelError, match=r"is no transformers model|cannot be pruned"):
        dicer.prune(given[wrong])


def test_another_dtype_asked_for():
    with pytest.raises(dicer.DicerError, match="dtype bfloat16 is asked for, and the model in memory has float32"):
        dicer.prune(tiny_model("llama"), compute=dicer.Compute(dtype="bfloat16"))


def test_load_of_what_is_not_there():
    with pytest.raises(ModelError, match="cannot be loaded"):
        dicer.load("/nonexistent/model")


def test_taylor_in_half_precision():
    model, tokens = tiny_model("llama"), tiny_tokens(8, 64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    kept = {}
    for dtype in (torch.float32, torch.float16):
        store = ResidentStore(copy.deepcopy(model).to(dtype), family_of(model))
        found = store.gradients(tokens.split(2), [1], ["mlp"], checkpointing=False, progress=lambda *_: None)[1]["mlp"]
        kept[dtype] = (found.up * model.model.layers[1].mlp.up_proj.weight.detach()).abs().sum(1)
    torch.testing.assert_close(kept[torch.float16], kept[torch.float32], rtol=0.02, atol=1e-5)


def test_one_layers_sums_at_a_time():
    alive: list[weakref.ref] = []
    most = []
    visits = walk(
        ResidentStore(tiny_model("llama"), family_of(tiny_model("llama"))),
        range(LAYERS),
        tiny_tokens().split(3),
        needs={Need("gram", "mod")},
        progress=lambda *_: most.append(sum(ref() is not None for ref in alive)),
    )
    for visit in visits:
        alive.append(weakref.ref(visit.sums))
        del visit
    assert most == [0] * LAYERS
