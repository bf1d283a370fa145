"""Distillation: what a plain loop over the pruned model's own parameters gives, and nothing else changed."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from families.tiny import tiny_input
from families.tiny import tiny_model as tiny_of_type
from safetensors.torch import load_file, save_file
from tiny import LAYERS, PLACES, save_tiny, tiny_model, tiny_tokens
from torch.nn.functional import kl_div

import dicer
from dicer.decide import distill
from dicer.decide.cost import check_streams
from dicer.decide.task import prepare, with_text
from dicer.errors import CalibrationError, PlanError, RecipeError
from dicer.model.source import open_model
from dicer.write.verify.masked import masked_model

TOKENS = tiny_tokens(100, 24)


def written(folder, tokens):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in tokens.tolist()))
    return str(path)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return written(tmp_path_factory.mktemp("rows"), TOKENS)


@pytest.fixture(scope="module")
def pruned(many):
    def prune(model, **recipe):
        asked = {"method": "rc-a", "repair": "least-squares", "ratio": 0.3, "calib": many, **recipe}
        return dicer.prune(model, dicer.Recipe(**asked), dicer.Compute(batch_size=8))

    prune.rows = many
    return prune


_GATED = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
_SPLIT = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")
LEARN = {  # what the units run through, but for the output projection's bias
    "llama": {"mlp": ("mlp", _GATED), "attention": ("self_attn", _SPLIT)},
    "gemma2": {"mlp": ("mlp", _GATED)},
    "gpt2": {"mlp": ("mlp", ("c_fc.weight", "c_fc.bias", "c_proj.weight"))},
    "opt": {"mlp": ("", ("fc1.weight", "fc1.bias", "fc2.weight"))},
    "phi3": {"attention": ("self_attn", ("qkv_proj.weight", "o_proj.weight"))},
}


def learning(model, family, axes, numbers=range(LAYERS)):
    """The parameters that learn."""
    layers = model.get_submodule(PLACES[family][0])
    where = [(layers[index].get_submodule(LEARN[family][axis][0]), axis) for index in numbers for axis in axes]
    return [module.get_parameter(name) for module, axis in where for name in LEARN[family][axis][1]]


def answers(model, tokens=TOKENS):
    return model(input_ids=tokens, use_cache=False).logits.log_softmax(-1)


def loss_of(model, dense, tokens=TOKENS):
    with torch.no_grad():
        apart = kl_div(answers(model, tokens), answers(dense, tokens), log_target=True, reduction="sum")
    return float(apart) / tokens.numel()


def taught(model, dense, weights, passes, seed):
    """AdamW over the weights, on KL(dense || pruned), 1,024 tokens a step as far as samples are whole."""
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is weight for weight in weights))
    batches, generator = TOKENS.split(1024 // TOKENS.shape[1]), torch.Generator().manual_seed(seed)
    order = [n for _ in range(passes) for n in torch.randperm(len(batches), generator=generator).tolist()]
    optimizer = torch.optim.AdamW(weights, lr=0.0, betas=(0.9, 0.99), weight_decay=0.0)
    for step, number in enumerate(order):
        rising = min(1.0, (step + 1) / max(1.0, 0.05 * len(order)))
        for group in optimizer.param_groups:
            group["lr"] = distill.RATE * rising * (1 + math.cos(math.pi * step / len(order))) / 2
        batch = {"input_ids": batches[number], "use_cache": False}
        with torch.no_grad():
            wanted = dense(**batch).logits.log_softmax(-1)
        found = model(**batch).logits.log_softmax(-1)
        loss = (wanted.exp() * (wanted - found)).sum() / batches[number].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        ("llama", {"axis": "all", "ratio": 0.5}),
        ("gpt2", {"compensate": "bias"}),
        ("opt", {}),
        ("phi3", {"axis": "attention", "ratio": 0.5}),
        ("gemma2", {"criterion": "obs"}),
        ("llama", {"method": "sim-mean", "compensate": "bias"}),
        ("llama", {"layers": "1"}),
    ],
)
def test_as_the_pruned_model_learns(family, recipe, pruned):
    """The dense model with columns left out learns what the pruned model itself does."""
    dense = tiny_model(family)
    model, learned = (pruned(dense, distill=passes, seed=7, **recipe).model for passes in (0, 3))
    axes = {"mlp": ["mlp"], "attention": ["attention"], "all": ["attention", "mlp"]}[recipe.get("axis", "mlp")]
    numbers = [int(recipe["layers"])] if "layers" in recipe else range(LAYERS)
    own, found = (learning(one, family, axes, numbers) for one in (model, learned))
    before = [weight.detach().clone() for weight in own]
    taught(model, dense, own, passes=3, seed=7)
    for old, wanted, weight in zip(before, own, found, strict=True):
        moved = (wanted - old).norm()
        assert moved > 1e-4
        assert (weight - wanted).norm() < 2e-2 * moved
    mine, theirs = dict(learned.named_parameters()), dict(model.named_parameters())
    same = [name for name in mine if not any(mine[name] is weight for weight in found)]
    assert all(torch.equal(mine[name], theirs[name]) for name in same)


def test_nearer_to_the_dense_model(pruned):
    dense = tiny_model("llama")
    losses = [loss_of(pruned(dense, distill=passes).model, dense) for passes in (0, 5, 40)]
    assert losses[2] < losses[1] < losses[0]


def test_tokens_that_do_not_count(tmp_path):
    """What stands before the first token that counts teaches nothing: as if there were no other."""
    many = written(tmp_path, TOKENS[:40])  # one step
    dense = tiny_model("llama")
    recipe = dicer.Recipe(repair="least-squares", ridge=0.1, ratio=0.3, calib=many, skip_first=20, distill=1)
    made = dicer.prune(dense, recipe, dicer.Compute(batch_size=24)).model
    model = dicer.prune(
        dense, recipe.model_copy(update={"distill": 0}), dicer.Compute(batch_size=24)
    ).model.requires_grad_(True)
    with torch.no_grad():
        wanted = answers(dense)[:40, 20:]
    (wanted.exp() * (wanted - answers(model)[:40, 20:])).sum().div(wanted[..., 0].numel()).backward()
    for old, new in zip(*(learning(one, "llama", ["mlp"]) for one in (model, made)), strict=True):
        step = new - old  # Adam's first goes against the gradient's sign
        clear = old.grad.abs() > 1e-3 * old.grad.abs().max()
        assert torch.equal(step[clear].sign(), -old.grad[clear].sign())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_same_twice_and_dense_left_as_it_was(dtype, pruned):
    dense = tiny_model("llama", dtype=dtype)
    before = {name: (p.data_ptr(), p.requires_grad, p.detach().clone()) for name, p in dense.named_parameters()}
    first, second = (pruned(dense, method="sim-mean", compensate="bias", distill=2) for _ in range(2))
    assert first.plan.files() == second.plan.files()
    for name, parameter in dense.named_parameters():
        assert (parameter.data_ptr(), parameter.requires_grad) == before[name][:2]
        assert torch.equal(parameter, before[name][2])
        assert parameter.grad is None
    assert all("forward" not in vars(m) and not m._forward_hooks for m in dense.modules())


def test_plan_written_and_applied(many, tmp_path):
    model = save_tiny(tmp_path / "model", "llama")
    recipe = dicer.Recipe(ratio=0.3, repair="least-squares", calib=many, distill=2)
    dicer.prune(model, recipe, output=tmp_path / "pruned")
    made = dicer.make_plan(model, recipe)
    assert made.recipe["distill"] == 2
    made.save(tmp_path / "plan")
    dicer.apply_plan(tmp_path / "plan", model, tmp_path / "applied")
    for name in ("model.safetensors", "dicer_plan.json", "dicer_plan.tensors"):
        assert (tmp_path / "pruned" / name).read_bytes() == (tmp_path / "applied" / name).read_bytes()
    assert json.loads((tmp_path / "plan" / "dicer_plan.json").read_text())["format"] == 5
    assert made.diff(dicer.load_plan(tmp_path / "plan")) == []
    plain = dicer.make_plan(model, recipe.model_copy(update={"distill": 0}))
    assert "layer 0 mlp: the same kept, repaired differently" in plain.diff(made)
    layer = made.mlp[0]
    other = {name: tensor + 1 for name, tensor in layer.repair.learned.items()}
    layers = {**made.mlp, 0: replace(layer, repair=replace(layer.repair, learned=other))}
    assert made.diff(replace(made, axes={"mlp": layers})) == ["layer 0 mlp: the same kept, repaired differently"]


_GLU = {"mlp.gate_proj", "mlp.up_proj"}
_QKV = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}
LEARNED = {  # in a type's first layer, beside the output projection
    "falcon": {"mlp": {"mlp.dense_h_to_4h"}},
    "gpt_neox": {"mlp": {"mlp.dense_h_to_4h"}},
    "bloom": {"mlp": {"mlp.dense_h_to_4h"}},
    "qwen3": {"mlp": _GLU, "attention": _QKV},
    "phi": {"mlp": {"mlp.fc1"}, "attention": _QKV},
    "phi3": {"mlp": {"mlp.gate_up_proj"}, "attention": {"self_attn.qkv_proj"}},
    "glm": {"mlp": {"mlp.gate_up_proj"}, "attention": _QKV},
    "gpt_bigcode": {"mlp": {"mlp.c_fc"}},
    "starcoder2": {"mlp": {"mlp.c_fc"}},
    "cohere": {"mlp": _GLU},
    "nemotron": {"mlp": {"mlp.up_proj"}},
    "exaone4": {"mlp": _GLU},
    "olmo2": {"mlp": _GLU},
}


@pytest.mark.parametrize("kind", LEARNED)
def test_written_as_it_was_learned(kind, tmp_path):
    """Whatever form a type keeps its tensors in: written, it is nearer to the dense model, and what verify expects."""
    tiny_of_type(kind).save_pretrained(tmp_path / "model")
    axis = "all" if "attention" in LEARNED[kind] else "mlp"
    tokens, asked = tiny_input(60), {"axis": axis, "ratio": 0.5, "repair": "least-squares"}
    source, losses = open_model(tmp_path / "model"), []
    dense = dicer.load(tmp_path / "model")
    for passes in (0, 10):
        recipe = dicer.Recipe(calib=written(tmp_path, tokens), distill=passes, **asked)
        dicer.prune(tmp_path / "model", recipe, output=tmp_path / f"{passes}")
        losses.append(loss_of(dicer.load(tmp_path / f"{passes}"), dense, tokens))
    assert losses[1] < losses[0]
    plan = dicer.load_plan(tmp_path / "10")
    assert not any("learned along" in note for note in plan.notes)
    for own in LEARNED[kind]:
        repair = plan.axes[own][0].repair
        found = {name.rpartition(".")[0] for name, change in repair.learned.items() if change.abs().max() > 0}
        assert found == LEARNED[kind][own], own
    with torch.no_grad():
        expected = answers(masked_model(source, plan), tokens)
        torch.testing.assert_close(answers(dicer.load(tmp_path / "10"), tokens), expected, rtol=1e-4, atol=1e-3)


def test_learned_tensors_that_do_not_fit(many, tmp_path):
    model = save_tiny(tmp_path / "model", "gpt2")
    made = dicer.make_plan(model, dicer.Recipe(ratio=0.3, repair="least-squares", calib=many, distill=1))
    made.save(tmp_path / "plan")
    path = tmp_path / "plan" / "dicer_plan.tensors"
    tensors = load_file(path)
    name = "mlp.2.learned.mlp.c_fc.bias"
    for changed in (
        {key: tensor for key, tensor in tensors.items() if key != name},
        {**tensors, name: tensors[name] + 1},
        {**tensors, "mlp.2.learned.another": tensors[name].clone()},
    ):
        save_file(changed, path)
        with pytest.raises(PlanError, match="layer 2 has another repaired output projection than its JSON file says"):
            dicer.load_plan(tmp_path / "plan")
    layer = made.mlp[2]
    inputs = layer.repair.learned
    for other in (
        {**inputs, "mlp.c_fc.bias": torch.zeros(3)},
        {**inputs, "mlp.c_proj.weight": layer.repair.weight.clone()},
        {**inputs, "mlp.nowhere": torch.zeros(3)},
    ):
        layers = {**made.mlp, 2: replace(layer, repair=replace(layer.repair, learned=other))}
        replace(made, axes={"mlp": layers}).save(tmp_path / "other")
        with pytest.raises(PlanError, match=r"the plan's learned 'mlp.* in layer 2 is not the model's"):
            dicer.apply_plan(tmp_path / "other", model, tmp_path / "applied")
    endless = {"mlp.c_fc.bias": inputs["mlp.c_fc.bias"] * torch.inf}
    layers = {**made.mlp, 2: replace(layer, repair=replace(layer.repair, learned=endless))}
    replace(made, axes={"mlp": layers}).save(tmp_path / "other")
    with pytest.raises(PlanError, match="layer 2 has a repaired output projection that does not fit"):
        dicer.load_plan(tmp_path / "other")
    assert not (tmp_path / "applied").exists()


def test_nothing_learned_is_nothing_changed(pruned, tmp_path, monkeypatch):
    """What is computed in bfloat16 does not round what was not learned."""
    monkeypatch.setattr(distill, "_share", lambda *_: 0.0)
    recipe = dicer.Recipe(ratio=0.3, repair="least-squares", calib=pruned.rows, distill=1)
    model, half = save_tiny(tmp_path / "model", "llama"), dicer.Compute(dtype="bfloat16")
    dicer.prune(model, recipe, half, output=tmp_path / "learned")
    dicer.prune(model, recipe.model_copy(update={"distill": 0}), half, output=tmp_path / "solved")
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("learned", "solved")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gradients_of_half_precision(dtype, pruned, monkeypatch):
    """They point where those of float32 do: a mean over 1,024 tokens would be too small for float16."""
    slopes = []

    def stepping(self, closure=None):
        slopes.append(torch.cat([weight.grad.flatten() for weight in self.param_groups[0]["params"]]))

    monkeypatch.setattr(torch.optim.AdamW, "step", stepping)
    for model in (tiny_model("llama"), tiny_model("llama", dtype=getattr(torch, dtype))):
        pruned(model, criterion="weight-l2", ridge=0.1, distill=1)
    first, other = slopes[0], slopes[len(slopes) // 2]
    assert torch.cosine_similarity(first, other, dim=0) > 0.98
    assert first.norm() == pytest.approx(float(other.norm()), rel=0.1)


def test_gradients_that_are_not_finite(pruned, monkeypatch):
    """The last step's, too, behind which no loss would tell."""
    take = distill._Learner.take_gradient

    def taking(self, count):
        take(self, count)
        self.weight.grad.view(-1)[0] = torch.inf

    monkeypatch.setattr(distill._Learner, "take_gradient", taking)
    with pytest.raises(RecipeError, match="not finite while it learns"):
        pruned(tiny_model("llama"), distill=1)


def test_what_does_not_learn_is_said(pruned, monkeypatch):
    """Tensors that lie in memory in another form than in the files."""
    pieces = distill._pieces
    monkeypatch.setattr(distill, "_pieces", lambda *given: (one for one in pieces(*given) if "up" not in one[0]))
    plan = pruned(tiny_model("llama"), distill=1).plan
    assert set(plan.mlp[0].repair.learned) == {"mlp.gate_proj.weight"}
    assert [note for note in plan.notes if "learned along" in note] == [
        "mlp.up_proj.weight: in memory in another form than in the files, so cut and not learned along"
    ]


def test_layers_that_share_a_tensor(pruned):
    dense = tiny_model("llama")
    dense.model.layers[1].mlp = dense.model.layers[0].mlp
    with pytest.raises(RecipeError, match="share a tensor"):
        pruned(dense, distill=1)


def test_text_of_its_own(pruned, tmp_path):
    """Distillation reads another text than repair does."""
    dense, some = tiny_model("llama"), written(tmp_path, TOKENS[:40])
    asked = [{"calib": some, "distill": 0}, {"calib": some}, {}, {"calib": some, "distill_calib": pruned.rows}]
    solved, few, whole, more = (pruned(dense, **{"distill": 1, "ridge": 0.1, **one}) for one in asked)
    assert more.plan.calibration == {**few.plan.calibration, "distill": whole.plan.calibration}
    assert more.plan.recipe["distill_calib"] == "rows.jsonl"
    for layer in range(LAYERS):
        one, other = solved.plan.mlp[layer], more.plan.mlp[layer]
        assert torch.equal(one.keep, other.keep)
        assert one.repair.about == other.repair.about
        assert not torch.equal(other.repair.weight, few.plan.mlp[layer].repair.weight)
    assert loss_of(more.model, dense) < loss_of(few.model, dense) < loss_of(solved.model, dense)


def test_more_samples(tmp_path):
    """Of a text that samples are cut of, as many as it was told."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{word} and {word * 7} are two of {word + 1}. " for word in range(4000)))
    recipe = dicer.Recipe(ratio=0.3, repair="least-squares", calib=str(text), samples=50, seq_len=20)
    model = save_tiny(tmp_path / "model", "llama")
    asked = recipe.model_copy(update={"distill": 1, "distill_samples": 120})
    made = dicer.make_plan(model, asked)
    assert made.calibration["samples"] == 50
    assert made.calibration["distill"]["samples"] == 120
    assert made.calibration["distill"]["tokens_sha256"] != made.calibration["tokens_sha256"]


def test_what_cannot_be(many, tmp_path, monkeypatch):
    with pytest.raises(RecipeError, match="--distill 1 needs --repair least-squares"):
        dicer.Recipe(distill=1).resolve()
    with pytest.raises(RecipeError, match="distill"):
        dicer.Recipe(repair="least-squares", distill=-1)
    for name, value in (("distill_samples", 9), ("distill_calib", "c4")):
        with pytest.raises(RecipeError, match=f"--{name.replace('_', '-')} {value} needs --distill"):
            dicer.Recipe(repair="least-squares", **{name: value}).resolve()
    source = open_model(save_tiny(tmp_path / "model", "llama"))
    recipe = dicer.Recipe(repair="least-squares", calib=many, distill=1)
    with pytest.raises(RecipeError, match="--distill-samples 9: ready input_ids are all read"):
        with_text(prepare(source, recipe.model_copy(update={"distill_samples": 9})))
    nowhere = recipe.model_copy(update={"distill_calib": "no such text"})
    with pytest.raises(CalibrationError, match="no such text"):
        with_text(prepare(source, nowhere))
    with pytest.raises(CalibrationError, match="no such text"):
        dicer.look(tmp_path / "model", nowhere)
    with pytest.raises(RecipeError, match="leave --stream out, or what reads them"):
        check_streams(prepare(source, recipe, dicer.Compute(stream=True)), whole=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="--distill learns in one process"):
        check_streams(prepare(source, recipe), whole=False)


def test_answers_that_are_not_finite(pruned, monkeypatch):
    monkeypatch.setattr(distill, "_divergence", lambda *_: float("nan"))
    with pytest.raises(RecipeError, match="not finite while it learns"):
        pruned(tiny_model("llama"), distill=1)
