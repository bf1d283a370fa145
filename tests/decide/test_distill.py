"""Distillation: what a plain loop over the pruned model's own parameters gives, and nothing else changed."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tiny import LAYERS, PLACES, save_tiny, tiny_model, tiny_tokens
from torch.nn.functional import kl_div

import dicer
from dicer.decide import distill
from dicer.decide.cost import check_streams
from dicer.decide.task import prepare
from dicer.errors import RecipeError
from dicer.model.source import open_model

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

    return prune


def outputs_of(model, family, axes):
    layers, *names = PLACES[family]
    names = [name for name, axis in zip(names, ("attention", "mlp"), strict=True) if axis in axes]
    found = [model.get_submodule(f"{layers}.{index}.{name}") for index in range(LAYERS) for name in names]
    return [module.weight for module in found]


def answers(model):
    return model(input_ids=TOKENS, use_cache=False).logits.log_softmax(-1)


def loss_of(model, dense):
    with torch.no_grad():
        return float(kl_div(answers(model), answers(dense), log_target=True, reduction="sum")) / TOKENS.numel()


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
    own, found = outputs_of(model, family, axes), outputs_of(learned, family, axes)
    if "layers" in recipe:
        own, found = own[1:2], found[1:2]
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
    for old, new in zip(outputs_of(model, "llama", ["mlp"]), outputs_of(made, "llama", ["mlp"]), strict=True):
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
    plain = dicer.make_plan(model, recipe.model_copy(update={"distill": 0}))
    assert "layer 0 mlp: the same kept, repaired differently" in plain.diff(made)


def test_what_cannot_be(many, tmp_path, monkeypatch):
    with pytest.raises(RecipeError, match="--distill 1 needs --repair least-squares"):
        dicer.Recipe(distill=1).resolve()
    with pytest.raises(RecipeError, match="distill"):
        dicer.Recipe(repair="least-squares", distill=-1)
    source = open_model(save_tiny(tmp_path / "model", "llama"))
    recipe = dicer.Recipe(repair="least-squares", calib=many, distill=1)
    with pytest.raises(RecipeError, match="leave --stream out, or what reads them"):
        check_streams(prepare(source, recipe, dicer.Compute(stream=True)), whole=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="--distill learns in one process"):
        check_streams(prepare(source, recipe), whole=False)


def test_answers_that_are_not_finite(pruned, monkeypatch):
    monkeypatch.setattr(distill, "_divergence", lambda *_: float("nan"))
    with pytest.raises(RecipeError, match="not finite while its output projections learn"):
        pruned(tiny_model("llama"), distill=1)
