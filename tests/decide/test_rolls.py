"""Rolls and ratios by cosine, against what is written out with numpy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from tiny import LAYERS, family_of, tiny_model, tiny_tokens

import dicer
from dicer.decide.amounts.by_cosine import cosine_ratios
from dicer.decide.amounts.prunable import Bounds, Prunable
from dicer.decide.merging import Survivors
from dicer.decide.rolls import best_roll
from dicer.errors import RecipeError
from dicer.measure.gram import joint
from dicer.measure.statistics import Need, Sums
from dicer.measure.stores.resident import ResidentStore
from dicer.measure.turning import turning
from dicer.measure.walk import Visit
from dicer.model.units import SubLayer, UnitWeights

UNITS, CHANNELS, KEEP, WIDTH = 8, 2, 5, 7


def draws(count):
    generator = np.random.default_rng(0)
    every = [torch.tensor(keep) for keep in itertools.combinations(range(UNITS), KEEP)]
    return [every[i] for i in generator.permutation(len(every))[:count]]


@pytest.mark.parametrize("ridge", [None, 1e-12])
def test_best_of_the_draws(ridge):
    """The error of each by brute force: of the columns as they are, or of numpy's least squares."""
    acts = np.random.default_rng(1).normal(size=(200, UNITS * CHANNELS)) @ np.diag(np.arange(1, UNITS * CHANNELS + 1))
    acts = acts.astype(np.float32).astype(float)  # which is what the sums take in
    rows, kept = np.random.default_rng(2).normal(size=(UNITS * CHANNELS, WIDTH)), draws(20)
    errors = []
    for keep in kept:
        mine = [unit * CHANNELS + c for unit in keep.tolist() for c in range(CHANNELS)]
        own = rows[mine] if ridge is None else np.linalg.lstsq(acts[:, mine], acts @ rows, rcond=None)[0]
        errors.append(((acts @ rows - acts[:, mine] @ own) ** 2).sum())
    each = iter(kept)
    sums = Sums([Need("channel_gram", "mod")], CHANNELS)
    sums.add("mod", torch.from_numpy(acts))
    weights = UnitWeights(None, torch.empty(UNITS, 1), torch.from_numpy(rows).reshape(UNITS, -1).T)
    visit = Visit(SubLayer(0, "attention"), weights, sums, None)
    found = best_roll(lambda: Survivors(next(each)), 20, visit, ridge)
    assert torch.equal(found.keep, kept[int(np.argmin(errors))])
    assert len(set(errors)) == 20


@pytest.mark.parametrize("inputs", [6, 300])
def test_what_two_inputs_bring_together(inputs):
    acts, rows = (np.random.default_rng(n).normal(size=shape) for n, shape in enumerate([(9, inputs), (inputs, 4)]))
    found = joint(torch.from_numpy(acts.T @ acts), torch.from_numpy(rows)).double().numpy()
    brought = np.stack([np.outer(acts[:, i], rows[i]).ravel() for i in range(inputs)])  # [N, T * d]
    np.testing.assert_allclose(found, brought @ brought.T, rtol=0, atol=1e-5 * np.abs(found).max())


def test_rolls_of_a_recipe(calib):
    model, errors = tiny_model("llama"), {}
    for rolls in (1, 2, 32):
        recipe = dicer.Recipe(method="rc-a", rolls=rolls, calib=calib, ratio=0.4, axis="all")
        plan = dicer.prune(model, recipe).plan
        errors[rolls] = plan
        assert ("rolls" in plan.recipe) == (rolls > 1)
    plain = dicer.prune(model, dicer.Recipe(method="rc-a", calib=calib, ratio=0.4, axis="all")).plan
    assert errors[1].diff(plain) == []

    def lost(plan, index):
        inputs = []
        down = model.model.layers[index].mlp.down_proj
        handle = down.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().flatten(0, 1)))
        with torch.no_grad():
            model(input_ids=tiny_tokens())
        handle.remove()
        gone = [unit for unit in range(40) if unit not in plan.mlp[index].keep.tolist()]
        return float((inputs[0][:, gone] @ down.weight[:, gone].detach().T).square().sum())

    for index in range(LAYERS):
        assert lost(errors[32], index) <= lost(errors[2], index) <= lost(errors[1], index)
    assert lost(errors[32], 0) < lost(errors[1], 0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_turning_of_the_hidden_states(family):
    model, tokens = tiny_model(family), tiny_tokens()
    inputs, outputs = {}, {}
    layers = model.model.layers if family == "llama" else model.transformer.h
    for index, layer in enumerate(layers):
        layer.register_forward_hook(
            lambda _, args, out, i=index: [inputs.update({i: args[0]}), outputs.update({i: out})][0]
        )
    store = ResidentStore(model, family_of(model))
    found = turning(store, LAYERS - 1, tokens.split(4))
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    for index, value in enumerate(found):
        a, b = (x[index].double().flatten(0, 1).numpy() for x in (inputs, outputs))
        cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        assert value == pytest.approx(1 - cosine.mean(), rel=1e-4)


def some(units=100):
    return [Prunable(SubLayer(layer, "mlp"), units, 10) for layer in range(4)]


def test_ratios_by_cosine():
    """In proportion to 1 / (1 - cos), the mean 0.2: the first would give more than 1.5x, the last less than 0.5."""
    turned = {0: 0.1, 1: 0.4, 2: 0.5, 3: 5.0}
    ratios = cosine_ratios(some(), turned, 0.2 * 4000, Bounds())
    assert ratios[0] == pytest.approx(0.3)
    assert ratios[3] == pytest.approx(0.1)
    assert sum(ratios) == pytest.approx(0.8)
    assert ratios[1] / ratios[2] == pytest.approx(0.5 / 0.4)


def test_ratios_by_cosine_at_their_bounds():
    turned = {0: 0.1, 1: 0.4, 2: 0.5, 3: 5.0}
    ratios = cosine_ratios(some(), turned, 0.8 * 4000, Bounds(max_ratio=0.85))
    assert ratios == pytest.approx([0.85, 0.85, 0.85, 0.65])
    with pytest.raises(RecipeError, match="at most"):
        cosine_ratios(some(), turned, 0.9 * 4000, Bounds(max_ratio=0.85))


def test_cosine_of_a_recipe(calib):
    recipe = dicer.Recipe(method="act-l2", allocate="cosine", calib=calib, ratio=0.25)
    plan = dicer.prune(tiny_model("llama"), recipe).plan
    gone = [1 - len(layer.keep) / layer.units for layer in plan.mlp.values()]
    assert sum(gone) == pytest.approx(1.0)
    assert len(plan.allocation["turning"]) == LAYERS
    order = np.argsort(plan.allocation["turning"])
    assert [gone[i] for i in order] == sorted(gone, reverse=True)
    assert all(0.125 - 0.02 <= ratio <= 0.375 + 0.02 for ratio in gone)
