"""Every criterion against a loop written from its formula, and a user's own."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
import torch
from tiny import LAYERS, NEURONS, tiny_model, tiny_tokens

import dicer
from dicer.errors import RecipeError
from dicer.measure.criteria import CRITERIA, find_criterion
from dicer.measure.statistics import LayerStatistics, Need, Sums, stream
from dicer.measure.stores.resident import ResidentStore
from dicer.measure.walk import walk
from dicer.model.families import family_of
from dicer.model.units import UnitWeights

UNITS, WIDTH, TOKENS = 7, 5, 11
both_kinds = pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
every_activation = pytest.mark.parametrize("activation", ["pre", "post", "mod"])


def random_weights(gated=True, seed=0):
    draw = torch.Generator().manual_seed(seed)
    gate, up = torch.randn(2, UNITS, WIDTH, generator=draw)
    return UnitWeights(gate if gated else None, up, torch.randn(WIDTH, UNITS, generator=draw))


def random_activations(seed=0):
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(TOKENS, UNITS, generator=draw) for name in ("pre", "post", "mod")}


def statistics(activation="post", activations=None, gradient=None, seed=0, layer=0):
    """What the walk would hand over, collected in two batches."""
    sums = Sums({Need(kind, activation) for kind in ("square_sum", "sum")})
    for name, values in (activations or random_activations()).items():
        for batch in values.split(4):
            sums.add(name, batch)
    sums.count = TOKENS
    return LayerStatistics(activation, sums, stream(seed, layer, "criterion"), gradient)


def permuted(weights, order):
    return UnitWeights(None if weights.gate is None else weights.gate[order], weights.up[order], weights.down[:, order])


def rows_of(weights, unit):
    """All weights that a unit owns, as one list of numbers."""
    gate = [] if weights.gate is None else weights.gate[unit].tolist()
    return gate + weights.up[unit].tolist() + weights.down[:, unit].tolist()


# The formulas of METHODS section 2, one number at a time


@every_activation
def test_act_l2_is_the_root_of_the_sum_of_squares(activation):
    acts = random_activations()
    naive = [math.sqrt(sum(float(acts[activation][t, i]) ** 2 for t in range(TOKENS))) for i in range(UNITS)]
    scores = CRITERIA["act-l2"](random_weights(), statistics(activation, acts))
    torch.testing.assert_close(scores, torch.tensor(naive))


@every_activation
def test_act_mean_is_the_signed_mean(activation):
    acts = random_activations()
    naive = [sum(float(acts[activation][t, i]) for t in range(TOKENS)) / TOKENS for i in range(UNITS)]
    assert min(naive) < 0 < max(naive), "the sign must be there to be lost"
    scores = CRITERIA["act-mean"](random_weights(), statistics(activation, acts))
    torch.testing.assert_close(scores, torch.tensor(naive))


@both_kinds
def test_weight_l2_is_the_norm_of_all_weights_of_a_unit(gated):
    weights = random_weights(gated)
    naive = [math.sqrt(sum(w * w for w in rows_of(weights, i))) for i in range(UNITS)]
    torch.testing.assert_close(CRITERIA["weight-l2"](weights, LayerStatistics()), torch.tensor(naive))


@both_kinds
def test_taylor_is_the_sum_of_absolute_weight_times_gradient(gated):
    weights, gradient = random_weights(gated), random_weights(gated, seed=1)
    pairs = [zip(rows_of(weights, i), rows_of(gradient, i), strict=True) for i in range(UNITS)]
    naive = [sum(abs(w * g) for w, g in pair) for pair in pairs]
    torch.testing.assert_close(CRITERIA["taylor"](weights, statistics(gradient=gradient)), torch.tensor(naive))


@every_activation
def test_output_l2_is_the_activation_times_the_norm_of_the_output_weights(activation):
    acts, weights = random_activations(), random_weights()
    strength = [math.sqrt(sum(float(acts[activation][t, i]) ** 2 for t in range(TOKENS))) for i in range(UNITS)]
    naive = [a * math.sqrt(sum(float(w) ** 2 for w in weights.down[:, i])) for i, a in enumerate(strength)]
    torch.testing.assert_close(CRITERIA["output-l2"](weights, statistics(activation, acts)), torch.tensor(naive))


# What holds for all of them


@both_kinds
@every_activation
@pytest.mark.parametrize("name", CRITERIA)
def test_scores_are_one_finite_float32_for_each_unit_and_the_same_again(name, activation, gated):
    weights, gradient = random_weights(gated), random_weights(gated, seed=1)
    first, second = (CRITERIA[name](weights, statistics(activation, gradient=gradient)) for _ in range(2))
    assert (first.shape, first.dtype) == ((UNITS,), torch.float32)
    assert torch.isfinite(first).all()
    assert torch.equal(first, second)
    assert len(first.unique()) == UNITS


@both_kinds
@pytest.mark.parametrize("name", sorted(CRITERIA.keys() - {"random"}))
def test_permuting_the_units_permutes_the_scores(name, gated):
    weights, gradient, acts = random_weights(gated), random_weights(gated, seed=1), random_activations()
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    scores = CRITERIA[name](weights, statistics(activations=acts, gradient=gradient))
    moved = {key: values[:, order] for key, values in acts.items()}
    again = CRITERIA[name](permuted(weights, order), statistics(activations=moved, gradient=permuted(gradient, order)))
    torch.testing.assert_close(again, scores[order])


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_says_where_it_comes_from_and_declares_all_that_it_reads(name):
    criterion = CRITERIA[name]
    assert criterion.name == name
    assert ("Yang et al. 2025" if name == "output-l2" else "Xu et al. 2025, B.") in criterion.source
    sums = Sums({Need(kind, "post") for kind in criterion.needs})
    sums.add("post", torch.randn(TOKENS, UNITS))
    sums.count = TOKENS
    gradient = random_weights() if "gradient" in criterion.needs else None
    assert len(criterion(random_weights(), LayerStatistics("post", sums, loss_gradient=gradient))) == UNITS


# random


def plan_of(method, model=None, **recipe):
    return dicer.prune(model or tiny_model("llama"), dicer.Recipe(method=method, **recipe)).plan


def test_random_scores_differ_between_layers_and_between_seeds():
    plans = [plan_of("random", seed=seed).mlp for seed in (0, 1, 7, 42)]
    scores = [tuple(layer.scores.tolist()) for plan in plans for layer in plan.values()]
    assert len(set(scores)) == 4 * LAYERS
    flat = torch.tensor(scores).flatten()
    assert 0 <= flat.min() < 0.05
    assert 0.95 < flat.max() < 1
    assert abs(flat.mean() - 0.5) < 0.05


def test_a_layers_random_scores_do_not_depend_on_which_other_layers_are_chosen():
    alone, among_all = plan_of("random", layers="2").mlp, plan_of("random").mlp
    assert torch.equal(alone[2].scores, among_all[2].scores)


def test_the_draws_of_criterion_and_grouping_do_not_share_a_stream():
    assert not np.allclose(stream(42, 0, "criterion").random(8), stream(42, 0, "grouping").random(8))


# taylor: the gradient


def naive_taylor(model, layers):
    """Autograd over the whole calibration set in one batch, then number by number over the three matrices."""
    model.eval().zero_grad()
    tokens = tiny_tokens()
    logits = model(input_ids=tokens).logits
    predicted = [(s, t) for s in range(tokens.shape[0]) for t in range(tokens.shape[1] - 1)]
    losses = [-logits[s, t].log_softmax(-1)[tokens[s, t + 1]] for s, t in predicted]
    (sum(losses) / len(losses)).backward()
    scores = []
    for parts in layers:
        products = [(p * p.grad).detach().abs() for p, _ in parts]
        by_unit = [p if by_row else p.T for p, (_, by_row) in zip(products, parts, strict=True)]  # [U, d]
        scores.append(torch.tensor([sum(float(p[i].sum()) for p in by_unit) for i in range(NEURONS)]))
    model.zero_grad()
    return scores


def llama_parts(model):
    mlps = [layer.mlp for layer in model.model.layers]
    return [[(m.gate_proj.weight, True), (m.up_proj.weight, True), (m.down_proj.weight, False)] for m in mlps]


def gpt2_parts(model):
    return [[(layer.mlp.c_fc.weight, False), (layer.mlp.c_proj.weight, True)] for layer in model.transformer.h]


def opt_parts(model):
    return [[(layer.fc1.weight, True), (layer.fc2.weight, False)] for layer in model.model.decoder.layers]


DROPOUT = {"gpt2": dict.fromkeys(("resid_pdrop", "attn_pdrop", "embd_pdrop"), 0.5), "opt": {"dropout": 0.5}}
PARTS = {"llama": llama_parts, "gpt2": gpt2_parts, "opt": opt_parts}


@pytest.fixture
def tokens_file(tmp_path):
    path = tmp_path / "tokens.jsonl"
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in tiny_tokens().tolist()))
    return str(path)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("family", PARTS)
def test_taylor_scores_are_those_of_one_batch_at_every_batch_size(family, checkpointing, tokens_file):
    model = tiny_model(family, **DROPOUT.get(family, {}))
    naive = naive_taylor(model, PARTS[family](model))
    for batch_size in (1, 4, 6):
        model.train()  # dropout must stay off all the same
        options = {"batch_size": batch_size, "gradient_checkpointing": checkpointing, "calib": tokens_file}
        plan = plan_of("taylor", model, **options)
        for index, expected in enumerate(naive):
            torch.testing.assert_close(plan.mlp[index].scores, expected, rtol=1e-4, atol=1e-7)


def test_taylor_sums_the_gradients_of_a_bf16_model_in_float32():
    model = tiny_model("llama", dtype=torch.bfloat16)
    batches, predicted = tiny_tokens().split(1), tiny_tokens()[:, 1:].numel()
    expected = torch.zeros(NEURONS, 32)
    for batch in batches:
        model.zero_grad()
        logits = model(input_ids=batch).logits[0, :-1].float()
        torch.nn.functional.cross_entropy(logits, batch[0, 1:], reduction="sum").backward()
        expected += model.model.layers[1].mlp.gate_proj.weight.grad.float() / predicted
    model.zero_grad()
    (visit,) = walk(ResidentStore(model, family_of("llama")), [1], batches, gradient=True)
    gradient = visit.axes["mlp"].gradient
    assert {part.dtype for part in (gradient.gate, gradient.up, gradient.down)} == {torch.float32}
    torch.testing.assert_close(gradient.gate, expected, rtol=1e-6, atol=0)
    assert not torch.equal(expected, expected.bfloat16().float()), "more than bf16 can hold"


def test_checkpointing_stores_less_for_the_way_back():
    model, stored = tiny_model("llama"), []

    def note(tensor):
        stored.append(tensor.numel())
        return tensor

    sizes = []
    for checkpointing in (False, True):
        stored.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            options = {"gradient": True, "checkpointing": checkpointing}
            list(walk(ResidentStore(model, family_of("llama")), [1], [tiny_tokens()], **options))
        sizes.append(sum(stored))
    assert sizes[1] < sizes[0]


# A user's own

OWN = """
import dicer

@dicer.criterion("own", needs=("square_sum",), source="a test")
def own(weights, statistics):
    return statistics.square_sum * weights.down.norm(dim=0)

@dicer.criterion("wide", source="a test")
def wide(weights, statistics):
    return weights.up

@dicer.criterion("not-a-number", source="a test")
def not_a_number(weights, statistics):
    return weights.up.sum(1) * float("nan")

@dicer.criterion("undeclared", source="a test")
def undeclared(weights, statistics):
    return statistics.square_sum

@dicer.criterion("undeclared-gradient", source="a test")
def undeclared_gradient(weights, statistics):
    return statistics.gradient.up.sum(1)

def unmarked(weights, statistics):
    return weights.up.sum(1)
"""


@pytest.fixture
def own_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    return path


def test_a_criterion_of_ones_own_takes_ten_lines_and_a_flag(own_file, tokens_file):
    model = tiny_model("llama")
    own = dicer.prune(model, dicer.Recipe(criterion=f"{own_file}:own", activation="mod", calib=tokens_file)).plan
    strength = dicer.prune(model, dicer.Recipe(criterion="act-l2", activation="mod", calib=tokens_file)).plan
    for index, layer in own.mlp.items():
        norms = model.model.layers[index].mlp.down_proj.weight.detach().norm(dim=0)
        torch.testing.assert_close(layer.scores, strength.mlp[index].scores.square() * norms)
        assert layer.keep.tolist() == sorted(layer.scores.topk(30).indices.tolist())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wide", r"criterion 'wide' returned shape \(40, 32\), expected one score for each of the 40 units: \(40,\)"),
        ("not_a_number", r"criterion 'not-a-number' returned 40 scores that are not finite"),
        ("undeclared", r"statistic 'square_sum' was not collected: .* needs=\(\"square_sum\",\)"),
        ("undeclared_gradient", r"statistic 'gradient' was not collected: .* needs=\(\"gradient\",\)"),
        ("unmarked", r"mine.py: unknown criterion 'unmarked'\..*Available: .*own.* Mark it with @dicer.criterion"),
        ("missing", r"mine.py: unknown criterion 'missing'\..*Available: .*own"),
    ],
)
def test_what_is_wrong_with_a_criterion_of_ones_own_is_said_in_one_line(name, message, own_file):
    with pytest.raises(RecipeError, match=message) as caught:
        plan_of(None, criterion=f"{own_file}:{name}")
    assert "\n" not in str(caught.value)


def test_a_criterion_file_that_is_not_there_and_a_name_that_nobody_knows_are_said(tmp_path):
    with pytest.raises(RecipeError, match=r"criterion file .*none\.py does not exist"):
        find_criterion(str(tmp_path / "none.py:own"), CRITERIA)
    with pytest.raises(RecipeError, match=r"unknown criterion 'tailor'\. Did you mean 'taylor'\? Available: act-l2"):
        find_criterion("tailor", CRITERIA)


def test_a_need_that_does_not_exist_is_said_where_it_is_declared():
    with pytest.raises(RecipeError, match=r"criterion 'mine': unknown need 'gradients'\. Did you mean 'gradient'\?"):
        dicer.criterion("mine", needs=("gradients",), source="a test")


def test_a_file_of_ones_own_may_hold_dataclasses(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    file = tmp_path / "json.py"  # no module of that name is put aside
    file.write_text(
        "from __future__ import annotations\n"
        "import dataclasses, dicer\n"
        "@dataclasses.dataclass\nclass Options:\n    power: int = 2\n"
        "@dicer.criterion('own', source='x')\ndef score(w, s): return w.up.pow(Options().power).sum(1)\n"
    )
    before = sys.modules["json"]
    assert find_criterion(f"{file}:score", CRITERIA).name == "own"
    assert sys.modules["json"] is before
