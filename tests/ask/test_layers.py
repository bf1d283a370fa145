"""Layer lists."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicer.ask.layers import select_layers
from dicer.ask.recipe import Recipe
from dicer.errors import RecipeError

COUNT = 12


@pytest.mark.parametrize(
    ("text", "count", "expected"),
    [
        (" all ", 3, [0, 1, 2]),
        ("5-26", 30, [*range(5, 27)]),
        ("-4--1", 30, [26, 27, 28, 29]),
        ("-30", 30, [0]),
        ("2-", 4, [2, 3]),
        ("-2-", 4, [2, 3]),
        (" 1 , 2-3,007 ", 8, [1, 2, 3, 7]),
    ],
)
def test_spellings_by_hand(text, count, expected):
    assert select_layers(text, count) == expected
    assert Recipe(layers=text).layers == text


@given(st.lists(st.tuples(st.integers(0, COUNT - 1), st.integers(0, COUNT - 1)), min_size=1), st.data())
def test_any_spelling(ranges, data):
    def index(layer):
        return str(layer - COUNT if data.draw(st.booleans()) else layer)

    ranges = [sorted(ends) for ends in ranges]
    pieces = [index(first) + (f"-{index(last)}" if last > first else "") for first, last in ranges]
    assert select_layers(",".join(pieces), COUNT) == sorted({i for a, b in ranges for i in range(a, b + 1)})


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["", ",", "1,", "-", "1-2-3", "a", "1:3", "1 2", "--1", "1.0", "all,1", "1--", "9999999"], "cannot be read"),
        (["30", "-31", "5-30", "0,999999"], "does not exist: the model has layers 0 to 29"),
        (["3-2", "-1-0", "-1--2", "0-1,5-4"], "runs backwards"),
    ],
)
def test_bad_spellings(texts, says):
    for text in texts:
        with pytest.raises(RecipeError, match=says):
            select_layers(text, 30)
        if says == "cannot be read":  # at once, before there is a model
            with pytest.raises(RecipeError, match=says):
                Recipe(layers=text)
