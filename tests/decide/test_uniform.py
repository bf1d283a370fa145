"""Legal widths of one layer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicer.decide.amounts.uniform import legal
from dicer.errors import RecipeError


@given(st.integers(1, 3000), st.floats(0.001, 0.999), st.sampled_from([1, 2, 8, 64, 256]))
def test_nearest_multiple(width, ratio, multiple):
    exact = round(width * (1 - ratio))
    if 2 * exact <= multiple or width < multiple:  # no neuron is at least as near
        with pytest.raises(RecipeError, match=rf"ratio {ratio} leaves no neuron of {width}"):
            legal(width, ratio, multiple)
        return
    keep = legal(width, ratio, multiple)
    possible = range(multiple, width + 1, multiple)
    assert keep in possible
    assert abs(keep - exact) == min(abs(candidate - exact) for candidate in possible)


@pytest.mark.parametrize(
    ("width", "ratio", "multiple", "keep"),
    [
        (18944, 0.25, 1, 14208),  # Qwen2.5-7B in the paper
        (1536, 0.3, 64, 1088),  # 1075.2 -> 1075 -> 16.8 x 64
        (1000, 0.01, 256, 768),  # 990 is nearest to 1024, which the layer does not have
        (10, 0.25, 1, 8),  # 7.5: Python rounds a half to the even neighbour
    ],
)
def test_widths_by_hand(width, ratio, multiple, keep):
    assert legal(width, ratio, multiple) == keep
