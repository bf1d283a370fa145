"""Every choice that a recipe comes to, and those that do not go together."""

from __future__ import annotations

import re
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dicer.ask.axes import CHOSEN
from dicer.ask.methods import DEFAULT_METHOD, PRESETS, Method
from dicer.ask.recipe import CHOICES, Recipe
from dicer.decide.amounts.by_entropy import SCHEDULES, SPLITS
from dicer.decide.grouping import GROUPINGS
from dicer.decide.merging import MERGES
from dicer.errors import RecipeError
from dicer.measure.criteria import CRITERIA
from dicer.measure.entropy.profile import PLACES, SEARCHES


def test_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Recipe().ratio = 0.5


# docs/methods.md: what each preset is.
RESOLVED = {
    "random": Method("random", "random", "post", "none", None, "prune", None),
    "act-l2": Method("act-l2", "act-l2", "post", "none", None, "prune", None),
    "act-mean": Method("act-mean", "act-mean", "post", "none", None, "prune", None),
    "weight-l2": Method("weight-l2", "weight-l2", "post", "none", None, "prune", None),
    "taylor": Method("taylor", "taylor", "post", "none", None, "prune", None),
    "rc-a": Method("rc-a", "act-l2", "post", "random", None, "prune", None),
    "sim-a": Method("sim-a", "act-l2", "mod", "similarity", "mod", "prune", None),
    "sim-a-post": Method("sim-a-post", "act-l2", "post", "similarity", "post", "prune", None),
    "sim-mean": Method("sim-mean", "act-l2", "mod", "similarity", "mod", "mean", None),
    "sim-dominant": Method("sim-dominant", "act-l2", "mod", "similarity", "mod", "dominant", None),
    "let-llm": Method(
        *("let-llm", "output-l2", "mod", "none", None, "prune", None), *("all", "transfer-entropy", "decoder")
    ),
}
RESOLVED["best"] = Method(
    *("best", "obs", "mod", "none", None, "prune", None),
    allocate="cosine",
    repair="least-squares",
    propagate="pruned",
)
XU = RESOLVED.keys() - {"let-llm", "best"}  # they say nothing of what is pruned how much


def test_presets_of_the_papers():
    assert {name: Recipe(method=name).resolve() for name in PRESETS} == RESOLVED
    assert Recipe().resolve() == RESOLVED[DEFAULT_METHOD] == RESOLVED["rc-a"]
    for method in RESOLVED.values():
        assert (method.criterion in CRITERIA, method.grouping in GROUPINGS, method.merge in MERGES) == (True,) * 3


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        # Without a method, naming a part starts from plain pruning.
        ({"criterion": "weight-l2"}, RESOLVED["weight-l2"]),
        ({"activation": "post"}, RESOLVED["act-l2"]),
        ({"grouping": "none"}, RESOLVED["act-l2"]),
        ({"merge": "prune"}, RESOLVED["act-l2"]),
        ({"grouping": "random"}, RESOLVED["rc-a"]),
        ({"activation": "pre"}, Method(None, "act-l2", "pre", "none", None, "prune", None)),
        # Similarity clusters mod unless an activation is named; the criterion reads post unless it is.
        ({"grouping": "similarity"}, Method(None, "act-l2", "post", "similarity", "mod", "prune", None)),
        ({"grouping": "similarity", "activation": "mod"}, RESOLVED["sim-a"]),
        ({"grouping": "similarity", "activation": "mod", "merge": "mean"}, RESOLVED["sim-mean"]),
        (
            {"criterion": "weight-l2", "grouping": "random", "merge": "mean"},
            Method(None, "weight-l2", "post", "random", None, "mean", None),
        ),
        ({"criterion": "my.py:own"}, Method(None, "my.py:own", "post", "none", None, "prune", None)),
        # With a method, a part that is named replaces the preset's.
        ({"method": "rc-a", "activation": "mod"}, Method(None, "act-l2", "mod", "random", None, "prune", None)),
        ({"method": "rc-a", "grouping": "none"}, RESOLVED["act-l2"]),
        ({"method": "sim-a", "merge": "mean"}, RESOLVED["sim-mean"]),
        ({"method": "sim-a", "activation": "post"}, RESOLVED["sim-a-post"]),
        (
            {"method": "sim-a-post", "merge": "mean"},
            Method(None, "act-l2", "post", "similarity", "post", "mean", None),
        ),
        # A criterion that reads an activation of its own does so in a preset that was made for another.
        ({"method": "rc-a", "criterion": "output-l2"}, Method(None, "output-l2", "mod", "random", None, "prune", None)),
        (
            {"method": "sim-a-post", "criterion": "obs"},
            Method(None, "obs", "mod", "similarity", "post", "prune", None),
        ),
        (
            {"method": "rc-a", "criterion": "output-l2", "activation": "post"},
            Method(None, "output-l2", "post", "random", None, "prune", None),
        ),
        (
            {"method": "sim-a", "criterion": "act-mean"},
            Method(None, "act-mean", "mod", "similarity", "mod", "prune", None),
        ),
        # A number of groups, or another parameter, is no preset.
        ({"set": {"linkage": "average"}, "method": "sim-a"}, RESOLVED["sim-a"]._replace(preset=None)),
        ({"method": "rc-a", "groups": 3}, RESOLVED["rc-a"]._replace(preset=None, groups=3)),
        ({"groups": 1, "grouping": "random"}, RESOLVED["rc-a"]._replace(preset=None, groups=1)),
        # What is pruned how much replaces the preset's say, and leaves its name where the preset says nothing of it.
        ({"axis": "attention"}, RESOLVED["rc-a"]._replace(axis="attention")),
        ({"method": "taylor", "axis": "all"}, RESOLVED["taylor"]._replace(axis="all")),
        ({"allocate": "global", "ratio_of": "model"}, RESOLVED["rc-a"]._replace(allocate="global", ratio_of="model")),
        ({"allocate": "mine.json"}, RESOLVED["rc-a"]._replace(allocate="mine.json")),
        ({"method": "let-llm", "axis": "mlp"}, RESOLVED["let-llm"]._replace(preset=None, axis="mlp")),
        ({"method": "let-llm", "ratio_of": "model"}, RESOLVED["let-llm"]._replace(preset=None, ratio_of="model")),
        ({"method": "let-llm", "allocate": "uniform"}, RESOLVED["let-llm"]._replace(preset=None, allocate="uniform")),
        (
            {
                "criterion": "output-l2",
                "activation": "mod",
                "axis": "all",
                "allocate": "transfer-entropy",
                "ratio_of": "decoder",
            },
            RESOLVED["let-llm"],
        ),
        ({"method": "best", "allocate": "uniform"}, RESOLVED["best"]._replace(preset=None, allocate="uniform")),
        ({"criterion": "obs", "repair": "least-squares", "allocate": "cosine"}, RESOLVED["best"]),
        # Whole blocks go by transfer entropy, and by no preset.
        ({"axis": "block"}, RESOLVED["rc-a"]._replace(preset=None, axis="block", allocate="transfer-entropy")),
    ],
)
def test_named_parts(named, expected):
    assert Recipe(**named).resolve() == expected


@given(*map(st.sampled_from, (sorted(CRITERIA), ("pre", "post", "mod"), sorted(GROUPINGS), sorted(MERGES))))
def test_any_combination(criterion, activation, grouping, merge):
    method = Recipe(criterion=criterion, activation=activation, grouping=grouping, merge=merge).resolve()
    parts = (criterion, activation, grouping, activation if grouping == "similarity" else None, merge)
    assert method[1:6] == parts
    same = [name for name in XU if RESOLVED[name][1:6] == parts]
    assert [method.preset] == (same or [None])


LET, BLOCK = {"method": "let-llm"}, {"axis": "block"}
AGAINST_BLOCKS = {"criterion": "taylor", "grouping": "random", "groups": 3, "method": "rc-a", "max_ratio": 0.5}
AGAINST_BLOCKS |= {"width_multiple": 8, "schedule": "rank", "split": "equal", "drop_threshold": 0.5, "set": {"a": 1}}


@pytest.mark.parametrize(
    ("named", "says"),
    [
        ({"groups": 3, "grouping": "none"}, "needs --grouping random, and the grouping is 'none'"),
        ({"groups": 3, "method": "rc-a", "merge": "mean"}, "which merge 'mean' cannot do"),
        *((BLOCK | {name: value}, f"so --{name.replace('_', '-')} has no") for name, value in AGAINST_BLOCKS.items()),
        (LET | {"axis": "mlp", "split": "equal"}, "--split equal is between attention and MLP and needs"),
        (BLOCK | {"allocate": "global"}, "--allocate global cannot"),
        (BLOCK | {"compensate": "bias"}, "no projection to put a bias on"),
        ({"axis": "attention", "method": "sim-mean"}, "merge 'mean' is for neurons"),
        ({"axis": "all", "method": "sim-dominant"}, "merge 'dominant' is for neurons"),
        ({"allocate": "globl"}, "unknown allocation 'globl'. Did you mean 'global'?"),
        (LET | {"schedule": "linar"}, "unknown schedule 'linar'. Did you mean 'linear'?"),
        (LET | {"entropy_search": "gredy"}, "unknown entropy search 'gredy'. Did you mean 'greedy'?"),
        ({"schedule": "rank"}, "--schedule rank needs --allocate transfer-entropy, and the allocation is 'uniform'"),
        ({"entropy_at": "hidden"}, "--entropy-at hidden needs --allocate transfer-entropy"),
        ({"entropy_profile": "p.json"}, "--entropy-profile needs --allocate transfer-entropy"),
        (LET | {"entropy_profile": "p.json", "entropy_at": "hidden"}, "p.json was measured already"),
        ({"axis": "attention", "min_width": 9}, "--min-width is for neurons"),
        ({"axis": "attention", "width_multiple": 8}, "--width-multiple is for neurons"),
        ({"drop_threshold": 0.9, "allocate": "a.json"}, "--drop-threshold needs --allocate transfer-entropy or global"),
        ({"allocate": "a.json", "ratio": 0.25}, "a.json says the ratios; leave --ratio out"),
    ],
)
def test_contradictions(named, says):
    with pytest.raises(RecipeError, match=re.escape(says)) as caught:
        Recipe(**named).resolve()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("max_ratio", (0.0, 1.1, -1.0)),
        ("min_width", (0, -1)),
        ("drop_threshold", (0.0, 1.5)),
        ("axis", ("heads",)),
        ("set", ("linkage", "=1", "linkage=")),
        ("samples", (0, "3")),
        ("ratio_of", ("all",)),
        ("compensate", ("mean",)),
    ],
)
def test_values_out_of_range(field, wrong):
    for value in wrong:
        with pytest.raises(RecipeError, match=field):
            Recipe(**{field: [value] if field == "set" else value})


@pytest.mark.parametrize(
    ("typed", "value"),
    [("3", 3), ("0.5", 0.5), ("true", True), ("null", None), ("average", "average"), ("[1]", "[1]"), ("a=b", "a=b")],
)
def test_typed_settings(typed, value):
    assert Recipe(set=[f"name={typed}"]).set == Recipe(set={"name": value}).set == (("name", value),)


def test_axes_of_an_axis():
    axes = {axis: Recipe(axis=axis).resolve().axes for axis in CHOSEN}
    one = {name: (name,) for name in ("mlp", "attention", "experts")}
    assert axes == {**one, "all": ("attention", "mlp"), "block": ()}


def test_help_of_choices():
    activation = Recipe.model_fields["activation"]
    values = [v for kind in get_args(activation.annotation) for v in get_args(kind)]
    assert values == ["pre", "post", "mod"]
    assert all(value in activation.description for value in values)
    assert all(name in Recipe.model_fields["grouping"].description for name in GROUPINGS)
    assert all(name in Recipe.model_fields["merge"].description for name in MERGES)


def test_choices_of_entropy():
    done = {"schedule": SCHEDULES, "split": SPLITS, "entropy_search": SEARCHES, "entropy_at": PLACES}
    assert {name: set(known) for name, known in CHOICES.items()} == {name: set(known) for name, known in done.items()}
    assert {name: known[0] for name, known in CHOICES.items()} == {name: getattr(Recipe(), name) for name in CHOICES}
