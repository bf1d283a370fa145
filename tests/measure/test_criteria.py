"""Every criterion against loops written from its formula, of neurons and of heads, and the random streams."""

from __future__ import annotations

import math

import pytest
import torch
from heads import CASES, by_unit, heads_outputs, layers_of, make, matrices, owned
from tiny import HIDDEN, LAYERS, NEURONS, tiny_model, tiny_tokens

import dicer
from dicer.measure.criteria import CRITERIA
from dicer.measure.criteria.weight import square_sums
from dicer.measure.statistics import LayerStatistics, Need, Sums, stream
from dicer.model.units import UnitWeights

UNITS, WIDTH, TOKENS = 7, 5, 11
PAPERS = {  # of the criteria that are not Xu et al.'s
    "output-l2": "Yang et al. 2025",
    "act-weight": "Wanda (Sun et al. 2024",
    "fluctuation": "FLAP",
    "cfsp": "CFSP (Wang et al. 2025",
    "leverage": "MoDeGPT",
    "obs": "OSSCAR",
    "reap": "Lasby et al. 2025",
    "frequency": "Lasby et al. 2025",
}


def random_weights(gated, seed=0):
    draw = torch.Generator().manual_seed(seed)
    gate, up = torch.randn(2, UNITS, WIDTH, generator=draw)
    return UnitWeights(gate if gated else None, up, torch.randn(WIDTH, UNITS, generator=draw))


def statistics(name, activation, activations, gradient):
    """What the walk would hand over, collected in two batches; nothing but what the criterion declares."""
    sums = Sums({Need(kind, activation) for kind in CRITERIA[name].needs if kind != "gradient"})
    for key, values in activations.items():
        for batch in values.split(4):
            sums.add(key, batch)
    sums.count = TOKENS
    given = gradient if "gradient" in CRITERIA[name].needs else None
    return LayerStatistics(activation, sums, stream(0, 0, "criterion"), given)


def rows_of(weights, unit):
    """All weights that a unit owns, as one list of numbers."""
    gate = [] if weights.gate is None else weights.gate[unit].tolist()
    return gate + weights.up[unit].tolist() + weights.down[:, unit].tolist()


def root(numbers):
    return math.sqrt(sum(float(number) ** 2 for number in numbers))


# docs/methods.md, one number at a time: weights and gradient of a unit, its activations.
FORMULAS = {
    "act-l2": lambda weights, gradient, i, acts: root(acts),
    "act-mean": lambda weights, gradient, i, acts: sum(map(float, acts)) / TOKENS,
    "output-l2": lambda weights, gradient, i, acts: root(acts) * root(weights.down[:, i]),
    "weight-l2": lambda weights, gradient, i, acts: root(rows_of(weights, i)),
    "taylor": lambda weights, gradient, i, acts: sum(
        abs(w * g) for w, g in zip(rows_of(weights, i), rows_of(gradient, i), strict=True)
    ),
}


def spread(numbers):
    return max(map(float, numbers)) + abs(min(map(float, numbers)))


def naive_cfsp(weights, gradient, i, acts):
    """The range of each matrix's weights of a unit over the largest of all units."""
    parts = [weights.up, weights.down.T, *([] if weights.gate is None else [weights.gate])]
    shares = [spread(part[i].tolist()) / max(spread(row.tolist()) for row in part) for part in parts]
    return sum(shares) * root(acts)


def variance(numbers):
    mean = sum(map(float, numbers)) / len(numbers)
    return sum((float(number) - mean) ** 2 for number in numbers) / (len(numbers) - 1)


FORMULAS |= {
    "act-weight": FORMULAS["output-l2"],
    "fluctuation": lambda weights, gradient, i, acts: variance(acts) * root(weights.down[:, i]) ** 2,
    "cfsp": naive_cfsp,
}


def damped(acts, ridge=1e-2):
    gram = acts.T @ acts
    return gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def naive_leverage(rows, acts):
    gram = acts.T @ acts
    shares = (gram @ torch.linalg.inv(damped(acts))).diagonal().tolist()
    return [share / (1 - share) for share in shares]


def naive_removal(rows, acts, keep=1, channels=1, ridge=1e-2):
    """One unit after the other: the least that the damped output loses when the others are solved anew for it."""
    whole, units = damped(acts, ridge), len(rows) // channels
    alive, scores = list(range(units)), [0.0] * units

    def loss(units_left):
        """What is left of tr(W' H W) once the units that stay make up for the others."""
        mine = [u * channels + c for u in units_left for c in range(channels)]
        right = whole[mine] @ rows
        return float((rows * (whole @ rows)).sum() - (right * torch.linalg.solve(whole[mine][:, mine], right)).sum())

    while len(alive) > keep:
        losses = {unit: loss([other for other in alive if other != unit]) for unit in alive}
        gone = min(losses, key=losses.get)
        alive.remove(gone)
        scores[gone] = losses[gone]
    for unit in alive:
        others = [other for other in alive if other != unit]
        scores[unit] = loss(others) if others else float((rows * (whole @ rows)).sum())
    return scores


SECOND_ORDER = {"leverage": naive_leverage, "obs": naive_removal}


def test_progressive_removal_of_64_neurons():
    draw = torch.Generator().manual_seed(0)
    acts = torch.randn(300, 64, generator=draw) @ torch.randn(64, 64, generator=draw)
    weights = UnitWeights(None, torch.randn(64, 24, generator=draw), torch.randn(24, 64, generator=draw))
    sums = Sums({Need("channel_gram", "mod")})
    sums.add("mod", acts)
    for keep in (16, 48):
        naive = torch.tensor(naive_removal(weights.down.T.double(), acts.double(), keep))
        one = CRITERIA["obs"].run(weights, LayerStatistics("mod", sums, keep=keep))
        torch.testing.assert_close(one, naive.double(), rtol=1e-6, atol=0)
        assert set(one.topk(keep).indices.tolist()) == set(naive.topk(keep).indices.tolist())
    ranks = CRITERIA["obs"].run(weights, LayerStatistics("mod", sums))
    for keep in (16, 48):
        at_once = torch.tensor(naive_removal(weights.down.T.double(), acts.double(), keep))
        assert set(ranks.topk(keep).indices.tolist()) == set(at_once.topk(keep).indices.tolist()), "one order for all"


def test_progressive_removal_in_blocks():
    """Of 512 neurons eight go at once at first; the scores say what least squares loses."""
    draw = torch.Generator().manual_seed(0)
    acts = torch.randn(2000, 512, generator=draw) @ torch.randn(512, 512, generator=draw)
    weights = UnitWeights(None, torch.randn(512, 4, generator=draw), torch.randn(16, 512, generator=draw))
    sums = Sums({Need("channel_gram", "mod")})
    sums.add("mod", acts)
    found, one = (
        CRITERIA["obs"].function(weights, LayerStatistics("mod", sums, keep=384), block=block) for block in (16, 1)
    )
    whole, rows = damped(acts.double()), weights.down.T.double()
    losses = []
    for scores in (found, one):
        kept = scores.topk(384).indices
        right = whole[kept] @ rows
        solved = torch.linalg.solve(whole[kept][:, kept], right)
        losses.append(float((rows * (whole @ rows)).sum() - (right * solved).sum()))
        assert float(scores.topk(128, largest=False).values.max()) == pytest.approx(losses[-1], rel=1e-6)
    assert losses[1] <= losses[0] <= 1.1 * losses[1]


def test_progressive_removal_of_heads():
    draw = torch.Generator().manual_seed(1)
    acts, rows = torch.randn(200, 24, generator=draw) @ torch.randn(24, 24, generator=draw), torch.randn(24, 9)
    weights = UnitWeights(torch.randn(6, 9), torch.randn(6, 9), rows.reshape(6, -1).T)
    sums = Sums({Need("channel_gram", "mod")}, channels=4)
    sums.add("mod", acts)
    naive = torch.tensor(naive_removal(rows.double(), acts.double(), 3, 4))
    found = CRITERIA["obs"].run(weights, LayerStatistics("mod", sums, keep=3))
    torch.testing.assert_close(found, naive.double(), rtol=1e-6, atol=0)


def test_default_activations():
    assert {name: dicer.Recipe(criterion=name).resolve().activation for name in CRITERIA} == {
        name: "mod" if name in PAPERS and name not in ("reap", "frequency") else "post" for name in CRITERIA
    }
    assert dicer.Recipe(criterion="obs", activation="pre").resolve().activation == "pre"


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("name", FORMULAS)
def test_formulas(name, gated):
    weights, gradient = random_weights(gated), random_weights(gated, seed=1)
    draw = torch.Generator().manual_seed(0)
    acts = {key: torch.randn(TOKENS, UNITS, generator=draw) for key in ("pre", "post", "mod")}
    for activation, values in acts.items():
        scores, again = (CRITERIA[name](weights, statistics(name, activation, acts, gradient)) for _ in range(2))
        assert (scores.shape, scores.dtype, len(scores.unique())) == ((UNITS,), torch.float32, UNITS)
        assert torch.equal(scores, again)
        if name in SECOND_ORDER:
            naive = SECOND_ORDER[name](weights.down.T.double(), values.double())
            torch.testing.assert_close(scores, torch.tensor(naive), rtol=1e-4, atol=0)
        elif name != "random":
            naive = [FORMULAS[name](weights, gradient, i, values[:, i]) for i in range(UNITS)]
            torch.testing.assert_close(scores, torch.tensor(naive))
        if name == "act-mean":
            assert scores.min() < 0 < scores.max(), "the sign must not be lost"


def test_names_and_sources():
    for name, criterion in CRITERIA.items():
        assert criterion.name == name
        assert PAPERS.get(name, "Xu et al. 2025, B.") in criterion.source


def test_undeclared_statistics():
    for kind, read in (("square_sum", "square_sum"), ("gradient", "gradient")):
        with pytest.raises(dicer.DicerError, match=rf"statistic '{kind}' was not collected: .* needs=\(\"{kind}\",\)"):
            getattr(LayerStatistics(), read)


# random


def plan_of(method, model=None, **recipe):
    return dicer.prune(model or tiny_model("llama"), dicer.Recipe(method=method, **recipe)).plan


def test_random_scores():
    plans = [plan_of("random", seed=seed).mlp for seed in (0, 1, 7, 42)]
    scores = [tuple(layer.scores.tolist()) for plan in plans for layer in plan.values()]
    assert len(set(scores)) == 4 * LAYERS, "layers and seeds differ"
    flat = torch.tensor(scores).flatten()
    assert 0 <= flat.min() < 0.05
    assert 0.95 < flat.max() < 1
    assert abs(flat.mean() - 0.5) < 0.05
    alone = plan_of("random", layers="2").mlp
    assert torch.equal(alone[2].scores, plans[3][2].scores), "whichever other layers are chosen"


# taylor: the gradient


def naive_taylor(model, layers):
    """Autograd over the whole calibration set in one batch, then number by number over the matrices."""
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


PARTS = {  # (weight, whether a unit is a row of it)
    "llama": lambda layer: [(layer.mlp.gate_proj, True), (layer.mlp.up_proj, True), (layer.mlp.down_proj, False)],
    "gpt2": lambda layer: [(layer.mlp.c_fc, False), (layer.mlp.c_proj, True)],
    "opt": lambda layer: [(layer.fc1, True), (layer.fc2, False)],
}
DROPOUT = {"gpt2": dict.fromkeys(("resid_pdrop", "attn_pdrop", "embd_pdrop"), 0.5), "opt": {"dropout": 0.5}}


@pytest.mark.parametrize("family", PARTS)
def test_taylor_at_every_batch_size(family, calib):
    model = tiny_model(family, **DROPOUT.get(family, {}))
    parts = [[(module.weight, by_row) for module, by_row in PARTS[family](layer)] for layer in layers_of(model, family)]
    naive = naive_taylor(model, parts)
    for size, checkpointing in ((1, True), (4, False), (6, True), (6, False)):
        model.train()  # dropout must stay off all the same
        compute = dicer.Compute(batch_size=size, gradient_checkpointing=checkpointing)
        plan = dicer.prune(model, dicer.Recipe(method="taylor", calib=calib), compute).plan
        for index, expected in enumerate(naive):
            torch.testing.assert_close(plan.mlp[index].scores, expected, rtol=1e-4, atol=1e-7)


# Heads


@pytest.fixture(scope="module")
def heads_plan(calib):
    def plan(model, axis="attention", **recipe):
        asked = dicer.Recipe(**{"axis": axis, "ratio": 0.5, "calib": calib, **recipe})
        return dicer.prune(model, asked, dicer.Compute(batch_size=4)).plan

    return plan


def naive_scores(model, family, groups):
    """criterion -> [layer][unit], number by number from the definitions (docs/methods.md, docs/what-to-prune.md)."""
    names = ("weight-l2", "act-l2", "act-mean", "output-l2", "act-weight", "fluctuation", "taylor")
    tokens, found = tiny_tokens(), {name: [] for name in names}
    outputs = heads_outputs(model, family, [tokens])
    model.zero_grad()
    logits = model(input_ids=tokens).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for layer, values in zip(layers_of(model, family), outputs, strict=True):
        weights = matrices(layer, family, groups)
        gradients = matrices(layer, family, groups, take=lambda parameter: parameter.grad)
        for group, unit in enumerate(by_unit(values, groups)):
            mine, theirs = ([r for rows in owned(p, group, groups) for r in rows] for p in (weights, gradients))
            strength = root(unit.flatten())
            rows = torch.cat(owned(weights, group, groups)[3]).reshape(-1, HIDDEN).double()  # a channel each
            channels = range(unit.shape[1])
            for name, value in {
                "weight-l2": root(torch.cat(mine).double()),
                "act-l2": strength,
                "act-mean": float(unit.sum()) / len(unit),
                "output-l2": strength * root(torch.cat(owned(weights, group, groups)[3]).double()),
                "act-weight": root([root(unit[:, c]) * root(rows[c]) for c in channels]),
                "fluctuation": sum(variance(unit[:, c].tolist()) * root(rows[c]) ** 2 for c in channels),
                "taylor": sum(float((a * b).abs().sum()) for a, b in zip(mine, theirs, strict=True)),
            }.items():
                found[name].append(value)
    model.zero_grad()
    return {name: torch.tensor(values).reshape(-1, groups) for name, values in found.items()}


@pytest.mark.parametrize(("family", "groups"), CASES)
def test_heads_by_loops(family, groups, heads_plan):
    model = make(family, groups)
    for name, expected in naive_scores(model, family, groups).items():
        layers = heads_plan(model, criterion=name).axes["attention"]
        assert list(layers) == list(range(LAYERS))
        for index, layer in layers.items():
            assert (layer.scores.shape, layer.scores.dtype) == ((groups,), torch.float32)
            torch.testing.assert_close(layer.scores, expected[index], rtol=2e-4, atol=1e-6)
            strongest = sorted(range(groups), key=lambda unit: -float(layer.scores[unit]))[: groups // 2]
            assert layer.keep.tolist() == sorted(strongest)


def test_one_activation_of_heads(heads_plan):
    model = make("llama", 2)
    plans = [
        heads_plan(model, criterion="act-l2", activation=name).axes["attention"] for name in ("pre", "post", "mod")
    ]
    outputs = heads_outputs(model, "llama", [tiny_tokens()])
    for index, values in enumerate(outputs):
        expected = torch.stack([unit.norm() for unit in by_unit(values, 2)]).float()
        for plan in plans:
            torch.testing.assert_close(plan[index].scores, expected, rtol=1e-5, atol=0)


def test_draws_of_heads_and_neurons(heads_plan):
    model = make("gpt2", 4)
    both, neurons, heads = (heads_plan(model, axis, method="random").axes for axis in ("all", "mlp", "attention"))
    for index in range(LAYERS):
        units = both["attention"][index].units
        assert torch.equal(both["mlp"][index].scores, neurons["mlp"][index].scores)
        assert torch.equal(both["attention"][index].scores, heads["attention"][index].scores)
        assert not torch.equal(both["attention"][index].scores, both["mlp"][index].scores[:units])
    assert len({tuple(layer.scores.tolist()) for layer in heads["attention"].values()}) == LAYERS
    alone, with_heads = (heads_plan(model, axis, method="rc-a", ratio=0.25) for axis in ("mlp", "all"))
    assert all(torch.equal(alone.mlp[i].keep, with_heads.mlp[i].keep) for i in range(LAYERS))
    gone = [layer.units - len(layer.keep) for layer in with_heads.axes["attention"].values()]
    assert gone == [1] * LAYERS


def test_groups_of_heads(heads_plan):
    model = make("llama", 4)
    plan = heads_plan(model, criterion="weight-l2", grouping="similarity", ratio=0.25).axes["attention"]
    for values, layer in zip(heads_outputs(model, "llama", [tiny_tokens()]), plan.values(), strict=True):
        units = torch.stack([unit.flatten() for unit in by_unit(values, 4)])
        units = units / units.norm(dim=1, keepdim=True)
        alike = divmod(int((units @ units.T - 9 * torch.eye(4)).argmax()), 4)  # three groups of four: one pair
        weaker = min(alike, key=lambda unit: float(layer.scores[unit]))
        assert layer.keep.tolist() == [unit for unit in range(4) if unit != weaker]


@pytest.mark.parametrize("over", [0, 1])
@pytest.mark.parametrize("shape", [(1, 1), (64, 256), (300, 70), (70, 600), (129, 257)])
def test_squares_of_large_matrices(shape, over):
    """They are summed in pieces; against float64 at once."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = (weight.double() ** 2).sum(over)
    assert torch.allclose(square_sums(weight, over).double(), expected, rtol=1e-6)
    assert square_sums(weight.bfloat16(), over).dtype == torch.float32
