"""Flags and TOML files: one spelling, one meaning."""

from __future__ import annotations

import pytest

from dicer import pipeline
from dicer.ask.compute import COMPUTE_KEYS, Compute
from dicer.ask.recipe import Recipe
from dicer.ask.spelling import FIELDS, make_wanted, read_recipe
from dicer.errors import RecipeError

# A value of each field that is not its default, and no other field's.
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
    "min_width": 5,
    "drop_threshold": 0.7,
    "compensate": "bias",
    "schedule": "rank",
    "repair": "least-squares",
    "ridge": 0.5,
    "propagate": "dense",
    "target": "dense",
    "rolls": 4,
    "distill": 3,
    "distill_calib": "c4",
    "distill_samples": 64,
    "split": "equal",
    "entropy_search": "greedy",
    "entropy_at": "hidden",
    "entropy_profile": "profile.json",
    "family": "family.toml",
    "layers": "1,2-3",
    "width_multiple": 16,
    "stock": True,
    "calib": "owner/name",
    "calib_config": "en",
    "calib_split": "test",
    "calib_field": "body",
    "samples": 3,
    "seq_len": 17,
    "skip_first": 6,
    "calib_seed": 8,
    "seed": 2**40,
    "batch_size": 2,
    "device": "cpu",
    "dtype": "float32",
    "gradient_checkpointing": True,
    "stream": True,
    "memory": "8GB",
    "set": {"linkage": "average", "grouping.power": 2},
}


def _toml(values):
    def spelled(value):
        if isinstance(value, dict):
            return "{" + ", ".join(f"'{key}' = {spelled(inner)}" for key, inner in value.items()) + "}"
        return str(value).lower() if isinstance(value, bool) else repr(value)

    return "".join(f"{key} = {spelled(value)}\n" for key, value in values.items())


def _flags(values):
    for key, value in values.items():
        flag = "--" + key.replace("_", "-")
        each = [f"{k}={v}" for k, v in value.items()] if isinstance(value, dict) else [value]
        for one in each:
            yield from [flag] if one is True else [flag, str(one)]


@pytest.fixture
def asked(command, monkeypatch, tmp_path):
    """Type ``dicer plan`` with some words; what reaches the library."""

    def typed(*words):
        caught = []

        def make_plan(model, recipe, compute, **_):
            caught.append((recipe, compute))
            raise RecipeError("far enough")

        monkeypatch.setattr(pipeline, "make_plan", make_plan)
        assert command("plan", "model", "-o", tmp_path / "out", *words).code == 2
        return caught[0]

    return typed


@pytest.fixture
def recipe_file(tmp_path):
    def write(values):
        path = tmp_path / "recipe.toml"
        path.write_text(_toml(values))
        return path

    return write


def test_every_field_as_flag_and_toml_key(asked, recipe_file):
    nothing, something = ({**recipe.flat(), **compute.flat()} for recipe, compute in map(make_wanted, ({}, OTHER)))
    assert OTHER.keys() == FIELDS.keys()
    assert something == OTHER
    assert all(OTHER[key] != value for key, value in nothing.items())
    file = recipe_file(OTHER)
    assert asked(*_flags(OTHER)) == asked("--recipe", file) == make_wanted(read_recipe(file)) == make_wanted(OTHER)


@pytest.mark.parametrize(
    ("in_file", "flags", "expected"),
    [
        ({"ratio": 0.5, "seed": 1}, {"ratio": 0.1}, {"ratio": 0.1, "seed": 1}),
        ({"ratio": 0.5}, {"ratio": 0.25}, {"ratio": 0.25}),  # a flag that says the default still overrides
        ({"method": "sim-a"}, {"merge": "mean"}, {"method": "sim-a", "merge": "mean"}),
        ({"device": "cuda", "samples": 3}, {"device": "cpu"}, {"device": "cpu", "samples": 3}),
        ({}, {}, {}),
    ],
)
def test_flags_over_file(asked, recipe_file, in_file, flags, expected):
    assert asked("--recipe", recipe_file(in_file), *_flags(flags)) == make_wanted(expected)


def test_layer_from_the_end_as_flag(asked):
    assert [asked(*words)[0].layers for words in (("--layers", "-4--1"), ("--layers=-1",))] == ["-4--1", "-1"]


def test_none_is_default():
    assert make_wanted(dict.fromkeys(FIELDS)) == make_wanted({}) == (Recipe(), Compute())


def test_unknown_key(recipe_file):
    with pytest.raises(RecipeError, match=r"^recipe .*recipe.toml: unknown recipe key 'ration'\. Did you mean 'ratio'"):
        read_recipe(recipe_file({"ration": 0.5}))


def test_machine_option_inside_recipe():
    with pytest.warns(
        DeprecationWarning, match=r"device, batch_size: no part of a recipe .*dicer\.Compute\(device="
    ) as seen:
        recipe = Recipe(method="rc-a", device="cpu", batch_size=3)
    assert seen[0].filename == __file__
    assert recipe.flat() == Recipe(method="rc-a").flat()
    assert recipe.compute_or(None) == Compute(device="cpu", batch_size=3)
    assert recipe.compute_or(Compute(batch_size=2)) == Compute(batch_size=2)
    assert Recipe().compute_or(None) == Compute()
    with pytest.raises(RecipeError, match=r"batch_size: .*got 0"):
        Recipe(batch_size=0)


def test_machine_options_apart():
    assert not {*COMPUTE_KEYS} & {*Recipe.keys()}
    assert Recipe(calib="c4", samples=3).text.flat() == Recipe().text.flat() | {"calib": "c4", "samples": 3}
