"""What the user asks: TOML and flags, layer lists, and every choice that a method comes to."""

from __future__ import annotations

import itertools
import re
import tomllib
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dicer import pipeline
from dicer.ask.layers import select_layers
from dicer.ask.methods import DEFAULT_METHOD, PRESETS, Method
from dicer.ask.recipe import CHOICES, Recipe, make_recipe
from dicer.ask.spelling import read_recipe
from dicer.decide.amounts.by_entropy import SCHEDULES, SPLITS
from dicer.decide.grouping import GROUPINGS
from dicer.decide.merging import MERGES
from dicer.errors import RecipeError
from dicer.measure.criteria import CRITERIA
from dicer.measure.entropy.profile import PLACES, SEARCHES

# A value of each field that is not its default.
OTHER = {
    "method": "sim-a",
    "criterion": "act-mean",
    "activation": "pre",
    "grouping": "random",
    "merge": "mean",
    "groups": 7,
    "axis": "all",
    "ratio": 0.4,
    "ratio_of": "decoder",
    "allocate": "global",
    "max_ratio": 0.8,
    "min_width": 2,
    "drop_threshold": 0.7,
    "compensate": "bias",
    "schedule": "rank",
    "split": "equal",
    "entropy_search": "greedy",
    "entropy_at": "hidden",
    "entropy_profile": "profile.json",
    "layers": "1,2-3",
    "width_multiple": 8,
    "calib": "owner/name",
    "calib_config": "en",
    "calib_split": "test",
    "calib_field": "body",
    "samples": 3,
    "seq_len": 17,
    "calib_seed": 8,
    "seed": 2**40,
    "batch_size": 2,
    "device": "cpu",
    "dtype": "float32",
    "gradient_checkpointing": True,
}


def _toml(values):
    """The values as a TOML file; these kinds look the same in both languages but for the booleans."""
    lines = (f"{key} = {str(v).lower() if isinstance(v, bool) else repr(v)}" for key, v in values.items())
    return "\n".join(lines) + "\n"


def _flags(values):
    for key, value in values.items():
        flag = "--" + key.replace("_", "-")
        yield from [flag] if value is True else [flag, str(value)]


@pytest.fixture
def asked(command, monkeypatch, tmp_path):
    """Type ``dicer plan`` with some words; the Recipe that reaches the library."""

    def typed(*words):
        caught = []

        def make_plan(model, recipe, **_):
            caught.append(recipe)
            raise RecipeError("far enough")

        monkeypatch.setattr(pipeline, "make_plan", make_plan)
        assert command("plan", "model", "-o", tmp_path / "out", *words).code == 2
        return caught[0]

    return typed


def test_the_table_of_this_file_names_every_field():
    defaults = Recipe().model_dump()
    assert OTHER.keys() == defaults.keys()
    assert all(OTHER[key] != defaults[key] for key in defaults)


@pytest.mark.parametrize("field", Recipe.model_fields)
def test_every_field_is_a_flag_and_a_toml_key(field, asked, tmp_path):
    values = {field: OTHER[field]}
    file = tmp_path / "recipe.toml"
    file.write_text(_toml(values))
    assert asked(*_flags(values)) == asked("--recipe", file) == Recipe(**values)


def test_all_fields_together_in_a_file_and_as_flags(asked, tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text(_toml(OTHER))
    assert asked(*_flags(OTHER)) == asked("--recipe", file) == make_recipe(read_recipe(file)) == Recipe(**OTHER)
    assert tomllib.loads(file.read_text()) == Recipe(**OTHER).model_dump()


@pytest.mark.parametrize(
    ("in_file", "flags", "expected"),
    [
        ({"ratio": 0.5, "seed": 1}, {"ratio": 0.1}, {"ratio": 0.1, "seed": 1}),
        ({"ratio": 0.5}, {"ratio": 0.25}, {"ratio": 0.25}),  # a flag that says the default still overrides
        ({"method": "taylor"}, {"method": "random"}, {"method": "random"}),
        ({"method": "sim-a"}, {"merge": "mean"}, {"method": "sim-a", "merge": "mean"}),
        ({"layers": "1"}, {"layers": "all"}, {"layers": "all"}),
        ({}, {"samples": 2}, {"samples": 2}),
    ],
)
def test_flags_override_the_file(asked, tmp_path, in_file, flags, expected):
    file = tmp_path / "recipe.toml"
    file.write_text(_toml(in_file))
    assert asked("--recipe", file, *_flags(flags)) == Recipe(**expected)


def test_no_flags_are_the_default_recipe(asked):
    assert asked() == Recipe() == make_recipe({})


def test_a_flag_can_say_a_layer_from_the_end(asked):
    assert asked("--layers", "-4--1").layers == "-4--1"
    assert asked("--layers=-1").layers == "-1"


def test_none_leaves_a_field_to_its_default():
    assert make_recipe(dict.fromkeys(Recipe.model_fields)) == Recipe()


def test_a_recipe_does_not_change():
    with pytest.raises(ValidationError, match="frozen"):
        Recipe().ratio = 0.5


@pytest.mark.parametrize(
    ("text", "count", "expected"),
    [
        ("all", 3, [0, 1, 2]),
        (" all ", 1, [0]),
        ("5-26", 30, [*range(5, 27)]),
        ("5,6,9-12", 13, [5, 6, 9, 10, 11, 12]),
        ("-1", 30, [29]),
        ("-4--1", 30, [26, 27, 28, 29]),
        ("0--1", 4, [0, 1, 2, 3]),
        ("2--2", 4, [2]),
        ("-30", 30, [0]),
        ("3-3", 4, [3]),
        ("2-", 4, [2, 3]),
        ("-2-", 4, [2, 3]),
        ("0,3-", 4, [0, 3]),
        ("3,1,2", 4, [1, 2, 3]),
        ("1,1,0-2,-3", 4, [0, 1, 2]),
        (" 1 , 2-3 ", 4, [1, 2, 3]),
        ("007", 8, [7]),
    ],
)
def test_layers_are_read(text, count, expected):
    assert select_layers(text, count) == expected
    assert Recipe(layers=text).layers == text


@pytest.mark.parametrize(
    "text", ["", ",", "1,", "-", "1-2-3", "a", "1:3", "1 2", "--1", "1.0", "all,1", "1--", "0x1", "1e1", "9999999"]
)
def test_layers_that_cannot_be_read_are_refused_at_once(text):
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe(layers=text)
    with pytest.raises(RecipeError, match="cannot be read"):
        select_layers(text, 10)


@pytest.mark.parametrize(("text", "layer"), [("30", 30), ("-31", -31), ("5-30", 30), ("0,999999", 999999)])
def test_layers_that_do_not_exist_are_refused(text, layer):
    with pytest.raises(RecipeError, match=f"layer {layer} does not exist: the model has layers 0 to 29"):
        select_layers(text, 30)


@pytest.mark.parametrize("text", ["3-2", "-1-0", "-1--2", "0-1,5-4"])
def test_ranges_that_run_backwards_are_refused(text):
    with pytest.raises(RecipeError, match="runs backwards"):
        select_layers(text, 30)


@given(st.lists(st.integers(0, 11), min_size=1), st.data())
def test_any_spelling_of_the_same_layers_selects_them(indices, data):
    spelled = [str(i - 12 if data.draw(st.booleans()) else i) for i in indices]
    assert select_layers(",".join(spelled), 12) == sorted(set(indices))


# METHODS section 2: what each preset is.
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
    "let-llm": Method(  # METHODS section 5
        *("let-llm", "output-l2", "mod", "none", None, "prune", None), *("all", "transfer-entropy", "decoder")
    ),
}
XU = RESOLVED.keys() - {"let-llm"}  # they say nothing of what is pruned how much


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_what_the_paper_says(preset):
    assert Recipe(method=preset).resolve() == RESOLVED[preset]


def test_every_preset_is_in_the_table_and_made_of_known_parts():
    assert RESOLVED.keys() == PRESETS.keys()
    for method in RESOLVED.values():
        assert method.criterion in CRITERIA
        assert method.grouping in GROUPINGS
        assert method.merge in MERGES


def test_nothing_named_is_the_default_method():
    assert Recipe().resolve() == RESOLVED[DEFAULT_METHOD] == RESOLVED["rc-a"]


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        # Without a method, naming a part starts from plain pruning.
        ({"criterion": "weight-l2"}, RESOLVED["weight-l2"]),
        ({"criterion": "act-mean"}, RESOLVED["act-mean"]),
        ({"criterion": "act-l2"}, RESOLVED["act-l2"]),
        ({"activation": "post"}, RESOLVED["act-l2"]),
        ({"grouping": "none"}, RESOLVED["act-l2"]),
        ({"merge": "prune"}, RESOLVED["act-l2"]),
        ({"grouping": "random"}, RESOLVED["rc-a"]),
        ({"activation": "mod"}, Method(None, "act-l2", "mod", "none", None, "prune", None)),
        ({"activation": "pre"}, Method(None, "act-l2", "pre", "none", None, "prune", None)),
        # Similarity clusters mod unless an activation is named; the criterion reads post unless it is.
        ({"grouping": "similarity"}, Method(None, "act-l2", "post", "similarity", "mod", "prune", None)),
        ({"grouping": "similarity", "activation": "mod"}, RESOLVED["sim-a"]),
        ({"grouping": "similarity", "activation": "post"}, RESOLVED["sim-a-post"]),
        ({"grouping": "similarity", "activation": "mod", "merge": "mean"}, RESOLVED["sim-mean"]),
        ({"grouping": "similarity", "activation": "mod", "merge": "dominant"}, RESOLVED["sim-dominant"]),
        (
            {"criterion": "weight-l2", "grouping": "random", "merge": "mean"},
            Method(None, "weight-l2", "post", "random", None, "mean", None),
        ),
        ({"criterion": "my.py:own"}, Method(None, "my.py:own", "post", "none", None, "prune", None)),
        # With a method, a part that is named replaces the preset's.
        ({"method": "rc-a", "activation": "mod"}, Method(None, "act-l2", "mod", "random", None, "prune", None)),
        ({"method": "rc-a", "criterion": "taylor"}, Method(None, "taylor", "post", "random", None, "prune", None)),
        ({"method": "rc-a", "grouping": "none"}, RESOLVED["act-l2"]),
        ({"method": "sim-a", "merge": "mean"}, RESOLVED["sim-mean"]),
        ({"method": "sim-a", "activation": "post"}, RESOLVED["sim-a-post"]),
        ({"method": "sim-mean", "merge": "prune"}, RESOLVED["sim-a"]),
        (
            {"method": "sim-a-post", "merge": "mean"},
            Method(None, "act-l2", "post", "similarity", "post", "mean", None),
        ),
        ({"method": "random", "grouping": "random"}, Method(None, "random", "post", "random", None, "prune", None)),
        # A number of groups is no preset.
        ({"method": "rc-a", "groups": 3}, RESOLVED["rc-a"]._replace(preset=None, groups=3)),
        ({"groups": 3}, RESOLVED["rc-a"]._replace(preset=None, groups=3)),
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
        # Whole blocks go by transfer entropy, and by no preset.
        ({"axis": "block"}, RESOLVED["rc-a"]._replace(preset=None, axis="block", allocate="transfer-entropy")),
    ],
)
def test_parts_that_are_named(named, expected):
    assert Recipe(**named).resolve() == expected


@pytest.mark.parametrize(
    ("criterion", "activation", "grouping", "merge"),
    [*itertools.product(CRITERIA, ("pre", "post", "mod"), GROUPINGS, MERGES)],
)
def test_every_combination_can_be_typed_and_a_preset_is_named_only_where_it_is_one(
    criterion, activation, grouping, merge
):
    method = Recipe(criterion=criterion, activation=activation, grouping=grouping, merge=merge).resolve()
    parts = (criterion, activation, grouping, activation if grouping == "similarity" else None, merge)
    assert method[1:6] == parts
    same = [name for name in XU if RESOLVED[name][1:6] == parts]
    assert [method.preset] == (same or [None])


@pytest.mark.parametrize(
    ("named", "says"),
    [
        ({"groups": 3, "grouping": "none"}, "needs --grouping random, and the grouping is 'none'"),
        ({"groups": 3, "method": "sim-a"}, "needs --grouping random, and the grouping is 'similarity'"),
        ({"groups": 3, "method": "rc-a", "merge": "mean"}, "which merge 'mean' cannot do"),
        ({"groups": 3, "method": "rc-a", "merge": "dominant"}, "which merge 'dominant' cannot do"),
    ],
)
def test_groups_need_a_grouping_that_can_have_them(named, says):
    with pytest.raises(RecipeError, match=re.escape(says)):
        Recipe(**named).resolve()


@pytest.mark.parametrize(
    ("named", "says"),
    [
        ({"axis": "block", "criterion": "taylor"}, "--axis block removes whole layers by transfer entropy, so --crit"),
        ({"axis": "block", "grouping": "random"}, "so --grouping has no effect"),
        ({"axis": "block", "groups": 3}, "so --groups has no effect"),
        ({"axis": "block", "method": "rc-a"}, "so --method has no effect"),
        ({"axis": "block", "max_ratio": 0.5}, "so --max-ratio has no effect"),
        ({"axis": "block", "width_multiple": 8}, "so --width-multiple has no effect"),
        ({"axis": "block", "schedule": "rank"}, "so --schedule has no effect"),
        ({"axis": "block", "split": "equal"}, "so --split has no effect"),
        ({"axis": "block", "drop_threshold": 0.5}, "so --drop-threshold has no effect"),
        (
            {"method": "let-llm", "axis": "mlp", "split": "equal"},
            "--split equal is between attention and MLP and needs",
        ),
        ({"axis": "block", "allocate": "global"}, "--allocate global cannot"),
        ({"axis": "block", "compensate": "bias"}, "no projection to put a bias on"),
        ({"axis": "attention", "method": "sim-mean"}, "merge 'mean' is for neurons"),
        ({"axis": "all", "method": "sim-dominant"}, "merge 'dominant' is for neurons"),
        ({"allocate": "globl"}, "unknown allocation 'globl'. Did you mean 'global'?"),
        ({"method": "let-llm", "schedule": "linar"}, "unknown schedule 'linar'. Did you mean 'linear'?"),
        ({"method": "let-llm", "split": "shared"}, "unknown split 'shared'. Did you mean 'share'?"),
        ({"method": "let-llm", "entropy_search": "gredy"}, "unknown entropy search 'gredy'. Did you mean 'greedy'?"),
        ({"method": "let-llm", "entropy_at": "nrom"}, "unknown entropy at 'nrom'. Did you mean 'norm'?"),
        ({"schedule": "rank"}, "--schedule rank needs --allocate transfer-entropy, and the allocation is 'uniform'"),
        ({"split": "equal", "allocate": "global"}, "and the allocation is 'global'"),
        ({"entropy_search": "greedy"}, "--entropy-search greedy needs --allocate transfer-entropy"),
        ({"entropy_at": "hidden"}, "--entropy-at hidden needs --allocate transfer-entropy"),
        ({"entropy_profile": "p.json"}, "--entropy-profile needs --allocate transfer-entropy"),
        ({"method": "let-llm", "entropy_profile": "p.json", "entropy_at": "hidden"}, "p.json was measured already"),
        ({"axis": "attention", "min_width": 9}, "--min-width is for neurons"),
        ({"axis": "attention", "width_multiple": 8}, "--width-multiple is for neurons"),
        ({"drop_threshold": 0.9}, "--drop-threshold needs --allocate transfer-entropy or global"),
        ({"drop_threshold": 0.9, "allocate": "a.json"}, "--drop-threshold needs"),
        ({"allocate": "a.json", "ratio": 0.25}, "a.json says the ratios; leave --ratio out"),
    ],
)
def test_choices_that_do_not_go_together_are_refused(named, says):
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
        ("ratio_of", ("all",)),
        ("compensate", ("mean",)),
    ],
)
def test_bounds_and_choices_outside_of_what_they_can_be_are_refused(field, wrong):
    for value in wrong:
        with pytest.raises(RecipeError, match=field):
            Recipe(**{field: value})


@pytest.mark.parametrize(
    ("axis", "axes"), [("mlp", ("mlp",)), ("attention", ("attention",)), ("all", ("attention", "mlp")), ("block", ())]
)
def test_the_units_that_an_axis_scores(axis, axes):
    assert Recipe(axis=axis).resolve().axes == axes


def test_the_help_of_a_field_says_every_value_of_a_choice():
    activation = Recipe.model_fields["activation"]
    values = [v for kind in get_args(activation.annotation) for v in get_args(kind)]
    assert values == ["pre", "post", "mod"]
    assert all(value in activation.description for value in values)
    assert all(name in Recipe.model_fields["grouping"].description for name in GROUPINGS)
    assert all(name in Recipe.model_fields["merge"].description for name in MERGES)


def test_a_recipe_knows_all_choices_and_no_others_the_default_first():
    done = {"schedule": SCHEDULES, "split": SPLITS, "entropy_search": SEARCHES, "entropy_at": PLACES}
    assert {name: set(known) for name, known in CHOICES.items()} == {name: set(known) for name, known in done.items()}
    assert {name: known[0] for name, known in CHOICES.items()} == {name: getattr(Recipe(), name) for name in CHOICES}
