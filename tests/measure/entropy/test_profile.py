"""Profiles as JSON, there and back, and broken ones."""

from __future__ import annotations

import json

import pytest

from dicer.errors import RecipeError
from dicer.measure.entropy.profile import LISTS, Entry, Profile, read_profile


def example(search="greedy"):
    greedy = search == "greedy"

    def entries(first, step):
        return tuple(Entry(i, 0.5 + i, 1.5 - i, first + step * i if greedy else None) for i in range(4))

    lists = {"blocks": entries(0, 1), "attention": entries(0, 2), "mlp": entries(1, 2)}
    return Profile(2.0, search, "norm", 144, 32, **lists, notes=("a note",), about={"model": {"name": "llama"}})


@pytest.mark.parametrize("search", ["independent", "greedy"])
def test_json_there_and_back(search, tmp_path):
    profile = example(search)
    value = json.loads(json.dumps(profile.to_json()))
    assert Profile.from_json(value) == profile
    assert list(value)[:5] == ["entropy", "search", "at", "tokens", "channels"]
    assert [entry["layer"] for entry in value["mlp"]] == [0, 1, 2, 3]
    assert value["blocks"][1]["te"] == profile.te_lists()["blocks"][1] == 1.5
    assert ("pick" in value["mlp"][0]) == (search == "greedy")
    file = tmp_path / "profile.json"
    file.write_text(json.dumps(value))
    assert read_profile(file) == profile


def _with(**changes):
    return lambda value: value | changes


BROKEN = {
    "unknown key": (_with(mlps=[]), "unknown key 'mlps'. Did you mean 'mlp'?"),
    "missing key": (lambda v: {k: x for k, x in v.items() if k != "entropy"}, "'entropy' is missing"),
    "wrong kind": (_with(tokens="many"), "tokens: Input should be a valid integer, got 'many'"),
    "no tokens": (_with(tokens=0), "tokens and channels must be at least 1"),
    "unknown search": (_with(search="brute"), "search: Input should be 'independent' or 'greedy'"),
    "no lists": (lambda v: {k: x for k, x in v.items() if k not in LISTS}, "none of the lists blocks, attention, mlp"),
    "no te": (_with(mlp=[{"layer": 0, "entropy": 1.0}]), "'mlp.0.te' is missing"),
    "NaN": (_with(entropy=float("nan")), "entropy: Input should be a finite number"),
    "negative te": (
        lambda v: v | {"mlp": [{**entry, "te": -1.0} for entry in v["mlp"]]},
        "a transfer entropy cannot be negative",
    ),
    "another order": (lambda v: v | {"mlp": v["mlp"][::-1]}, "mlp: the layers must be 0 to 3, in order"),
    "other lengths": (lambda v: v | {"blocks": v["blocks"][:3]}, "of different lengths"),
    "picks, no search": (_with(search="independent"), "the picks do not fit to search 'independent'"),
    "no object": (lambda v: [v], "no JSON object"),
    "no JSON": (None, "no JSON: "),
    "no text": (b"\xff", "cannot be read"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_profile(case, tmp_path):
    change, says = BROKEN[case]
    file = tmp_path / "profile.json"
    value = change(example().to_json()) if callable(change) else None
    file.write_bytes(json.dumps(value).encode() if callable(change) else change or b"{")
    with pytest.raises(RecipeError, match=r"^entropy profile .*profile.json[^\n]*\.$") as caught:
        read_profile(file)
    assert says in str(caught.value)


def test_missing_profile(tmp_path):
    with pytest.raises(RecipeError, match="No such file"):
        read_profile(tmp_path / "none.json")
