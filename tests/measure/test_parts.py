"""Criteria, groupings and merges as parts: parameters from the signature, and parts from the user's own file."""

from __future__ import annotations

import re
import sys
from typing import Literal

import pytest
import torch
from tiny import NEURONS, tiny_model

import dicer
from dicer.decide.grouping import GROUPINGS
from dicer.decide.merging import MERGES
from dicer.errors import RecipeError
from dicer.measure.criteria import CRITERIA
from dicer.measure.criteria.registry import find_criterion
from dicer.measure.parts import bind


@dicer.criterion("scaled", source="a test")
def scaled(weights, statistics, *, power: float = 2, steps: int | None = None, shift: Literal["up", "down"] = "up"):
    """One line.

    And more.
    """


@dicer.grouping("halves", source="a test")
def halves(scores, keep, statistics, *, power: int = 1, exact: bool = False, name="x"):
    """Another line."""


def settings_of(asked, parts=(scaled, halves)):
    return [dict(part.settings) for part in bind(parts, asked)]


def test_parameters_of_a_signature():
    assert scaled.about == "One line."
    assert {name: parameter.default for name, parameter in scaled.parameters.items()} == {
        "power": 2,
        "steps": None,
        "shift": "up",
    }
    assert str(scaled.parameters["power"]) == "float = 2"
    assert str(GROUPINGS["similarity"].parameters["linkage"]).endswith("= 'complete'")
    own = {part.name: [*part.parameters] for part in (*CRITERIA.values(), *MERGES.values()) if part.parameters}
    assert own == {"leverage": ["ridge"], "obs": ["ridge", "block"]}


@pytest.mark.parametrize(
    ("asked", "criterion", "grouping"),
    [
        ({}, {}, {}),
        ({"criterion.power": 3}, {"power": 3.0}, {}),
        ({"scaled.power": "0.5", "grouping.power": 2}, {"power": 0.5}, {"power": 2}),
        ({"steps": 4, "shift": "down", "exact": True}, {"steps": 4, "shift": "down"}, {"exact": True}),
        ({"steps": None, "name": "true"}, {"steps": None}, {"name": "true"}),
        ({"exact": "yes"}, {}, {"exact": True}),
    ],
)
def test_conversion_by_annotation(asked, criterion, grouping):
    found = settings_of(asked)
    assert found == [criterion, grouping]
    assert [{k: type(v) for k, v in part.items()} for part in found] == [
        {k: type(v) for k, v in part.items()} for part in (criterion, grouping)
    ]
    assert not scaled.settings, "the registered part stays as it is"


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"step": 1}, "--set step: unknown parameter 'step'. Did you mean 'steps'? Available: "),
        ({"grouping.powers": 1}, "unknown parameter 'grouping.powers'. Did you mean 'grouping.power'?"),
        ({"power": 1}, "--set power: more than one part has it; write criterion.power or grouping.power."),
        ({"steps": "many"}, "--set steps: criterion 'scaled': Input should be a valid integer"),
        ({"grouping.power": 1.5}, "--set grouping.power: grouping 'halves': Input should be a valid integer"),
        ({"shift": "left"}, "--set shift: criterion 'scaled': Input should be 'up' or 'down', got 'left'."),
    ],
)
def test_wrong_parameters(asked, says):
    with pytest.raises(RecipeError, match=re.escape(says)) as caught:
        settings_of(asked)
    assert "\n" not in str(caught.value)


def test_wrong_declarations():
    with pytest.raises(RecipeError, match=r"criterion 'mine': unknown need 'gradients'\. Did you mean 'gradient'\?"):
        dicer.criterion("mine", needs=("gradients",), source="a test")
    for what in ("criterion", "grouping", "merge"):
        with pytest.raises(RecipeError, match=rf"^{what} 'mine': its parameter 'power' has no default; give it one\.$"):
            getattr(dicer, what)("mine", source="a test")(lambda *_, power: power)


# From a file

OWN = """
import torch
import dicer

@dicer.criterion("own", needs=("square_sum",), source="a test")
def own(weights, statistics, *, power: float = 1.0):
    return statistics.square_sum * weights.down.norm(dim=0) ** power

@dicer.criterion("wide", source="a test")
def wide(weights, statistics):
    return weights.up

@dicer.criterion("words", source="a test")
def words(weights, statistics):
    return "many"

@dicer.criterion("not-a-number", source="a test")
def not_a_number(weights, statistics):
    return weights.up.sum(1) * float("nan")

@dicer.criterion("undeclared", source="a test")
def undeclared(weights, statistics):
    return statistics.square_sum

@dicer.criterion("failing", source="a test")
def failing(weights, statistics):
    return weights.upp

def unmarked(weights, statistics):
    return weights.up.sum(1)

@dicer.grouping("neighbours", source="a test")
def neighbours(scores, keep, statistics, *, shift: int = 0):
    return (torch.arange(len(scores)) + shift) % len(scores) * keep // len(scores)

@dicer.grouping("many", source="a test")
def many(scores, keep, statistics):
    return torch.arange(len(scores))

@dicer.grouping("gap", source="a test")
def gap(scores, keep, statistics):
    return (torch.arange(len(scores)) % 2) * 2

@dicer.grouping("floats", source="a test")
def floats(scores, keep, statistics):
    return scores

@dicer.merge("last", source="a test")
def last(scores, labels, keep, statistics):
    members = [torch.nonzero(labels == group).flatten() for group in range(keep)]
    weight = torch.ones(len(scores))
    place = torch.stack([m[-1] for m in members]).argsort().argsort()
    keep = torch.stack([m[-1] for m in members]).sort().values
    return dicer.Survivors(keep, dicer.Merge(place[labels], weight, weight * 2))

@dicer.merge("few", source="a test")
def few(scores, labels, keep, statistics):
    return dicer.Survivors(torch.arange(keep - 1))

@dicer.merge("beyond", source="a test")
def beyond(scores, labels, keep, statistics):
    return dicer.Survivors(torch.arange(keep) + 11)

@dicer.merge("doubles", source="a test")
def doubles(scores, labels, keep, statistics):
    weight = torch.ones(len(scores), dtype=torch.float64)
    return dicer.Survivors(torch.arange(keep), dicer.Merge(labels, weight, weight))

@dicer.merge("nothing", source="a test")
def nothing(scores, labels, keep, statistics):
    return None
"""


@pytest.fixture
def own_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    return path


def test_own_criterion(own_file, calib):
    model = tiny_model("llama")
    asked = {"activation": "mod", "calib": calib}
    strength = dicer.prune(model, dicer.Recipe(criterion="act-l2", **asked)).plan.mlp
    for power in (1.0, 3):
        recipe = dicer.Recipe(criterion=f"{own_file}:own", set={"power": power}, **asked)
        plan = dicer.prune(model, recipe).plan
        assert plan.recipe["criterion"].startswith("mine.py:own (sha256 ")
        assert plan.recipe["set"] == {"power": power}
        for index, layer in plan.mlp.items():
            norms = model.model.layers[index].mlp.down_proj.weight.detach().norm(dim=0)
            torch.testing.assert_close(layer.scores, strength[index].scores.square() * norms**power)
            assert layer.keep.tolist() == sorted(layer.scores.topk(30).indices.tolist())


def test_own_grouping_and_merge(own_file):
    """Neighbouring pairs, shifted by one; the last of each stands for both."""
    model = tiny_model("llama")
    recipe = dicer.Recipe(
        criterion="weight-l2",
        grouping=f"{own_file}:neighbours",
        merge=f"{own_file}:last",
        ratio=0.5,
        set={"shift": 1},
    )
    result = dicer.prune(model, recipe)
    before, after = model.model.layers[2].mlp, result.model.model.layers[2].mlp
    pairs = [(39, 0), *((i, i + 1) for i in range(1, 39, 2))]
    groups = sorted(pairs, key=max)  # in the order of who stays
    assert result.plan.mlp[2].keep.tolist() == [max(pair) for pair in groups]
    for place, (one, other) in enumerate(groups):
        torch.testing.assert_close(after.up_proj.weight[place], before.up_proj.weight[[one, other]].sum(0))
        torch.testing.assert_close(
            after.down_proj.weight[:, place], 2 * before.down_proj.weight[:, [one, other]].sum(1)
        )


@pytest.mark.parametrize(
    ("named", "says"),
    [
        (
            "criterion wide",
            r"criterion 'wide' returned shape \(40, 32\), expected one score for each of the 40 units: ",
        ),
        ("criterion words", r"criterion 'words' returned str, expected a tensor of scores"),
        ("criterion not_a_number", r"criterion 'not-a-number' returned 40 scores that are not finite"),
        ("criterion undeclared", r"statistic 'square_sum' was not collected: .* needs=\(\"square_sum\",\)"),
        ("criterion failing", r"criterion 'failing' failed: AttributeError: .*upp"),
        ("criterion unmarked", r"mine.py: unknown criterion 'unmarked'\..*Available: .*own.* Mark it with @dicer.crit"),
        ("criterion neighbours", r"mine.py: unknown criterion 'neighbours'"),
        ("grouping many", r"grouping 'many' must number its groups .* make at most 30 of them"),
        ("grouping gap", r"grouping 'gap' must number its groups from 0 without a gap"),
        ("grouping floats", r"grouping 'floats' must return one group for each of the 40 units, int64 \(40,\)"),
        ("merge few", r"merge 'few' must keep 30 of the 40 units, sorted"),
        ("merge beyond", r"merge 'beyond' must keep 30 of the 40 units, sorted"),
        ("merge doubles", r"merge 'doubles' gives maps that do not fit"),
        ("merge nothing", r"merge 'nothing' returned NoneType, expected dicer.Survivors"),
    ],
)
def test_wrong_own_parts(named, says, own_file):
    what, name = named.split()
    more = {"grouping": "random"} if what == "merge" else {}
    with pytest.raises(RecipeError, match=says) as caught:
        dicer.prune(tiny_model("llama"), dicer.Recipe(**{"criterion": "weight-l2", **more, what: f"{own_file}:{name}"}))
    assert "\n" not in str(caught.value)


def test_unknown_parts(tmp_path):
    with pytest.raises(RecipeError, match=r"criterion file .*none\.py does not exist"):
        find_criterion(str(tmp_path / "none.py:own"), CRITERIA)
    with pytest.raises(RecipeError, match=r"unknown criterion 'tailor'\. Did you mean 'taylor'\? Available: act-l2"):
        find_criterion("tailor", CRITERIA)
    for what, near in (("grouping", "similarity"), ("merge", "dominant")):
        with pytest.raises(RecipeError, match=rf"unknown {what} '{near}x'\. Did you mean '{near}'\?.*FILE.py:NAME"):
            dicer.prune(tiny_model("llama"), dicer.Recipe(**{what: near + "x"}))


def test_dataclass_in_own_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    file = tmp_path / "json.py"  # no module of that name is put aside
    file.write_text(
        "from __future__ import annotations\n"
        "import dataclasses, dicer\n"
        "@dataclasses.dataclass\nclass Options:\n    power: int = 2\n"
        "@dicer.criterion('own', source='x')\n"
        "def score(w, s, *, more: int = 0): return w.up.pow(Options().power + more).sum(1)\n"
    )
    before = sys.modules["json"]
    found = find_criterion(f"{file}:score", CRITERIA)
    assert sys.modules["json"] is before
    assert bind([found], {"more": "1"})[0].settings == {"more": 1}
    assert len(dicer.prune(tiny_model("llama"), dicer.Recipe(criterion=f"{file}:score")).plan.mlp[0].scores) == NEURONS
