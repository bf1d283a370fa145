"""How much of each module goes: what holds for any model, and results against slow and naive versions."""

from __future__ import annotations

import json
import math
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dicer.decide.amounts.by_entropy import SCHEDULES, SPLITS, entropy_ratios, water_fill, weights_of
from dicer.decide.amounts.by_rank import block_removal, global_units
from dicer.decide.amounts.from_file import read_ratios
from dicer.decide.amounts.prunable import Bounds, Prunable, allowed_widths, most, total
from dicer.decide.amounts.rounding import whole_units
from dicer.decide.amounts.uniform import uniform_units
from dicer.errors import RecipeError
from dicer.model.units import SubLayer

ROUNDING = 1e-9
FRACTIONS = st.floats(0, 1)
IMPORTANCES = st.floats(0, 100).map(lambda x: round(x, 3))
NEVER, THRESHOLDS, MULTIPLES = st.none(), st.floats(0.3, 1), st.sampled_from([1, 4])
GIVING = st.floats(0, 10).map(lambda x: round(x, 3))
SCHEDULE, SPLIT = st.sampled_from(sorted(SCHEDULES)), st.sampled_from(sorted(SPLITS))


def sub_layer(axis, layer, units, unit_parameters):
    return Prunable(SubLayer(layer, axis), units, unit_parameters)


@st.composite
def models(draw):
    """Modules of one axis or both, the same in each layer or each its own."""
    axes = draw(st.sampled_from([("attention",), ("mlp",), ("attention", "mlp")]))
    layers = draw(st.lists(st.integers(0, 30), min_size=1, max_size=6, unique=True).map(sorted))
    same = draw(st.booleans())
    shape = st.tuples(st.integers(1, 40), st.integers(1, 20))
    shapes = {axis: draw(shape) for axis in axes}
    return [sub_layer(axis, layer, *(shapes[axis] if same else draw(shape))) for layer in layers for axis in axes]


@st.composite
def bounded(draw, *, drops=NEVER | THRESHOLDS, multiples=MULTIPLES):
    return Bounds(draw(st.floats(0.3, 1)), draw(st.integers(1, 5)), draw(drops), draw(multiples))


STAYS = bounded(drops=NEVER)


def removed(modules, kept):
    return sum((m.units - k) * m.unit_parameters for m, k in zip(modules, kept, strict=True))


def weighted(modules, ratios):
    return sum(m.parameters * ratio for m, ratio in zip(modules, ratios, strict=True))


def assert_widths_are_within(modules, kept, bounds):
    for module, keep in zip(modules, kept, strict=True):
        assert keep in allowed_widths(module, bounds) or (keep == 0 and bounds.drop_threshold is not None), module


def steps(modules, bounds):
    """Parameters of the largest step that any module takes."""
    return max(m.unit_parameters * allowed_widths(m, bounds).step for m in modules)


def entropies(draw, modules):
    te = {(m.layer, m.axis): draw(IMPORTANCES) for m in modules}
    return te, {layer: draw(IMPORTANCES) for layer in {m.layer for m in modules}}


# Bounds


@given(models(), bounded())
def test_widths_keep_to_the_bounds_and_something_of_every_module_stays(modules, bounds):
    for module in modules:
        widths = allowed_widths(module, bounds)
        assert 1 <= widths[0] <= widths[-1] <= module.units
        assert widths[0] >= (min(bounds.min_width, module.units) if module.axis == "mlp" else 1)
        assert 1 - widths[0] / module.units <= bounds.max_ratio + ROUNDING
        if module.axis == "mlp" and list(widths) != [module.units]:
            assert all(width % bounds.multiple == 0 for width in widths)


def test_most_is_all_but_the_smallest_widths_or_all_but_one_where_modules_may_go_whole():
    modules = [sub_layer("attention", 0, 3, 100), sub_layer("mlp", 0, 40, 5)]
    assert most(modules, Bounds()) == 500 - 100 - 5
    assert most(modules, Bounds(max_ratio=0.5, multiple=8)) == 100 + 16 * 5
    assert most(modules, Bounds(min_width=30)) == 200 + 10 * 5, "min_width is for neurons"
    assert most(modules, Bounds(drop_threshold=0.9, min_width=2)) == 500 - 2 * 5


# Water-filling


def by_bisection(weights, parameters, target, maximum):
    def ratios(scale):
        return [min(high, scale * weight) for weight, high in zip(weights, maximum, strict=True)]

    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        short = sum(p * r for p, r in zip(parameters, ratios(middle), strict=True)) < target
        low, high = (middle, high) if short else (low, middle)
    return ratios(high)


def filled(weights, parameters, target, maximum):
    """Ratios from nothing to the maxima, as a list."""
    return list(water_fill(*map(np.array, (weights, parameters)), target, np.zeros(len(weights)), np.array(maximum)))


@st.composite
def tubs(draw, weights=GIVING):
    count = draw(st.integers(1, 8))
    parameters = [draw(st.integers(1, 10**6)) for _ in range(count)]
    maximum = [draw(FRACTIONS) for _ in range(count)]
    return [draw(weights) for _ in range(count)], parameters, maximum


@given(tubs(), FRACTIONS)
def test_water_fill_takes_exactly_the_target_within_the_maxima(tub, share):
    weights, parameters, maximum = tub
    target = share * float(np.dot(parameters, maximum))
    ratios = filled(weights, parameters, target, maximum)
    assert np.dot(ratios, parameters) == pytest.approx(target, rel=ROUNDING, abs=1e-200)
    assert all(0 <= ratio <= high for ratio, high in zip(ratios, maximum, strict=True))
    if any(ratio for ratio, weight in zip(ratios, weights, strict=True) if weight == 0):
        assert all(r == high for r, high, w in zip(ratios, maximum, weights, strict=True) if w > 0)


@given(tubs(weights=st.floats(0.01, 10)), FRACTIONS)
def test_water_fill_is_what_bisection_finds(tub, share):
    weights, parameters, maximum = tub
    target = share * float(np.dot(parameters, maximum))
    slow = by_bisection(weights, parameters, target, maximum)
    assert filled(weights, parameters, target, maximum) == pytest.approx(slow, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    ("weights", "target", "ratios"),
    [
        ([1, 1], 100, [0.5, 0.5]),
        ([3, 1], 100, [0.75, 0.25]),
        ([3, 1], 150, [0.9, 0.6]),  # the first is full, the second takes the rest
        ([1, 0], 60, [0.6, 0]),
        ([1, 0], 100, [0.9, 0.1]),  # only then what has weight 0
        ([0, 0], 30, [0.15, 0.15]),
        ([1e-300, 1], 100, [0.1, 0.9]),
        ([1, 2], 0, [0, 0]),
        ([1, 2], 180, [0.9, 0.9]),
    ],
)
def test_water_fill_by_hand(weights, target, ratios):
    assert filled(weights, [100, 100], target, [0.9, 0.9]) == pytest.approx(ratios, abs=1e-12)


def test_water_fill_names_the_most_that_can_go():
    with pytest.raises(RecipeError, match=r"1,000 of 2,000 parameters \(50.0%\) .* at most 800 \(40.0%\)"):
        filled([1, 0], [1000, 1000], 1000, [0.5, 0.3])


# Schedules


@given(st.lists(IMPORTANCES, min_size=1, max_size=20), SCHEDULE)
def test_weights_fall_with_importance(importances, schedule):
    weights = weights_of(importances, schedule)
    assert all(weight >= 0 for weight in weights)
    by_importance = [weights[i] for i in np.argsort(importances, kind="stable")]
    assert all(a >= b for a, b in pairwise(by_importance))
    assert all(weights[i] == weights[importances.index(x)] for i, x in enumerate(importances))


@given(st.lists(IMPORTANCES, min_size=1, max_size=20), SCHEDULE, st.sampled_from([0.01, 3.0, 1e6]))
def test_weights_do_not_see_the_unit_of_importance(importances, schedule, unit):
    scaled = weights_of([x * unit for x in importances], schedule)
    assert scaled == pytest.approx(weights_of(importances, schedule), rel=1e-6, abs=1e-9)


def test_schedules_by_hand():
    assert weights_of([3, 1, 2], "linear") == [0, 1, 0.5]
    assert weights_of([3, 1, 2, 1000], "rank") == pytest.approx([1 / 3, 1, 2 / 3, 0])
    assert weights_of([1, 1, 5], "rank") == [0.75, 0.75, 0]
    assert weights_of([1, 3], "softmax") == pytest.approx([math.e, 1 / math.e])
    for schedule, equal in (("linear", 1), ("softmax", 1), ("rank", 0.5)):
        assert weights_of([0.1, 0.1, 0.1], schedule) == [equal] * 3
    assert [weights_of([4], schedule) for schedule in sorted(SCHEDULES)] == [[1]] * 3


def test_unknown_names_and_bad_importances_are_one_line():
    with pytest.raises(RecipeError, match=r"unknown schedule 'linea'. Did you mean 'linear'\?"):
        weights_of([1], "linea")
    with pytest.raises(RecipeError, match="not finite"):
        weights_of([1, math.nan], "rank")
    modules = [sub_layer("mlp", 3, 4, 1)]
    with pytest.raises(RecipeError, match="unknown split 'half'"):
        entropy_ratios(modules, {(3, "mlp"): 1}, None, 1, Bounds(), split="half")
    for te in ({(3, "mlp"): math.nan}, {(3, "mlp"): math.inf}, {(3, "mlp"): -1.0}, {}):
        with pytest.raises(RecipeError, match=r"entropy of mlp in layer 3 is (nan|inf|-1.0|None), not"):
            entropy_ratios(modules, te, None, 1, Bounds())
    both = [*modules, sub_layer("attention", 3, 2, 1)]
    with pytest.raises(RecipeError, match="entropy of block 3 is nan"):
        entropy_ratios(both, {(3, "mlp"): 1, (3, "attention"): 1}, {3: math.nan}, 1, Bounds())


# Transfer entropy


@settings(deadline=None)
@given(models(), STAYS, st.data(), SCHEDULE, SPLIT, FRACTIONS, st.booleans())
def test_entropy_ratios_take_the_target_within_the_bounds(modules, bounds, data, schedule, split, share, blocks):
    te, block_te = entropies(data.draw, modules)
    target = share * most(modules, bounds)
    ratios = entropy_ratios(modules, te, block_te if blocks else None, target, bounds, schedule, split)
    assert weighted(modules, ratios) == pytest.approx(target, rel=ROUNDING, abs=1e-6)
    for module, ratio in zip(modules, ratios, strict=True):
        assert 0 <= ratio <= 1 - allowed_widths(module, bounds)[0] / module.units


@settings(deadline=None)
@given(models(), STAYS, st.data(), SCHEDULE, FRACTIONS)
def test_what_matters_more_never_loses_more_in_one_level(modules, bounds, data, schedule, share):
    te, _ = entropies(data.draw, modules)
    ratios = entropy_ratios(modules, te, None, share * most(modules, bounds), bounds, schedule)
    limits = [1 - allowed_widths(m, bounds)[0] / m.units for m in modules]
    rows = list(zip([te[m.layer, m.axis] for m in modules], limits, ratios, strict=True))
    for entropy, limit, ratio in rows:
        for other, other_limit, other_ratio in rows:
            assert not (entropy > other and limit == other_limit) or ratio <= other_ratio + 1e-12


@settings(deadline=None)
@given(models(), STAYS, st.data(), SCHEDULE, SPLIT, FRACTIONS, st.randoms(use_true_random=False))
def test_entropy_ratios_do_not_see_the_order_of_modules(modules, bounds, data, schedule, split, share, random):
    te, block_te = entropies(data.draw, modules)
    target = share * most(modules, bounds)
    ratios = entropy_ratios(modules, te, block_te, target, bounds, schedule, split)
    order = random.sample(range(len(modules)), len(modules))
    shuffled = entropy_ratios([modules[i] for i in order], te, block_te, target, bounds, schedule, split)
    assert shuffled == pytest.approx([ratios[i] for i in order], abs=1e-9)


PAIR = [sub_layer("attention", 0, 10, 10), sub_layer("mlp", 0, 30, 10), sub_layer("attention", 1, 10, 10)]
PAIR += [sub_layer("mlp", 1, 30, 10)]
PAIR_TE = {(0, "attention"): 1.0, (0, "mlp"): 3.0, (1, "attention"): 0.0, (1, "mlp"): 0.0}


@pytest.mark.parametrize(
    ("split", "first", "second"),
    [
        ("equal", (0.2, 0.2), (0.2, 0.2)),
        ("share", (0.4, 0.4 / 3), (0.2, 0.2)),  # weights 3/4 and 1/4 of a block whose MLP is three times as large
        ("model", (0.8, 0.0), (0.2, 0.2)),  # weights 2/3 and 0
    ],
)
def test_splits_of_a_block_by_hand(split, first, second):
    block_te = {0: 5.0, 1: 5.0}
    ratios = entropy_ratios(PAIR, PAIR_TE, block_te, 160, Bounds(), split=split)
    assert ratios == pytest.approx([*first, *second])


def test_blocks_by_hand_the_most_important_gives_nothing():
    ratios = entropy_ratios(PAIR, PAIR_TE, {0: 9.0, 1: 2.0}, 160, Bounds(), split="equal")
    assert ratios == pytest.approx([0, 0, 0.4, 0.4])
    ratios = entropy_ratios(PAIR, PAIR_TE, {0: 9.0, 1: 2.0}, 160, Bounds(max_ratio=0.3), split="equal")
    assert ratios == pytest.approx([0.1, 0.1, 0.3, 0.3])


def test_one_axis_goes_by_its_own_entropy_whatever_the_blocks():
    modules = [sub_layer("mlp", layer, 100, 1) for layer in range(3)]
    te = {(0, "mlp"): 0.0, (1, "mlp"): 1.0, (2, "mlp"): 2.0}
    assert entropy_ratios(modules, te, {0: 9, 1: 0, 2: 0}, 60, Bounds()) == pytest.approx([0.4, 0.2, 0])


def test_an_entropy_target_out_of_reach_names_the_most():
    with pytest.raises(RecipeError, match=r"700 of 800 parameters \(87.5%\) are to go, but at most 400 \(50.0%\)"):
        entropy_ratios(PAIR, PAIR_TE, {0: 1, 1: 1}, 700, Bounds(max_ratio=0.5))


# Modules that go whole


@settings(deadline=None)
@given(models(), bounded(drops=THRESHOLDS), st.data(), SCHEDULE, SPLIT, FRACTIONS, st.booleans())
def test_modules_go_whole_only_where_they_fit(modules, bounds, data, schedule, split, share, blocks):
    te, block_te = entropies(data.draw, modules)
    target = share * most(modules, bounds)
    try:
        ratios = entropy_ratios(modules, te, block_te if blocks else None, target, bounds, schedule, split)
    except RecipeError as error:
        assert "at most" in str(error)  # noqa: PT017 - modules below the threshold cannot give more than max_ratio
        assert target > most(modules, Bounds(bounds.max_ratio, bounds.min_width, None, bounds.multiple))
        return
    assert weighted(modules, ratios) == pytest.approx(target, rel=ROUNDING, abs=1e-6)
    for module, ratio in zip(modules, ratios, strict=True):
        assert ratio == 1 or 0 <= ratio <= 1 - allowed_widths(module, bounds)[0] / module.units
    assert any(ratio < 1 for ratio in ratios)


def test_dropping_by_hand():
    te = {(layer, "mlp"): float(layer) for layer in range(3)}
    modules = [sub_layer("mlp", layer, 100, 1) for layer in range(3)]
    assert entropy_ratios(modules, te, None, 120, Bounds()) == pytest.approx([0.8, 0.4, 0])
    assert entropy_ratios(modules, te, None, 120, Bounds(drop_threshold=0.8)) == pytest.approx([1, 0.2, 0])
    assert entropy_ratios(modules, te, None, 120, Bounds(drop_threshold=0.81)) == pytest.approx([0.8, 0.4, 0])
    # A layer of three heads reaches 0.8 although it cannot keep less than one; where it is too large, it keeps one.
    heads = [sub_layer("attention", 0, 3, 10), sub_layer("attention", 1, 3, 10)]
    te = {(0, "attention"): 0.0, (1, "attention"): 1.0}
    assert entropy_ratios(heads, te, None, 36, Bounds(drop_threshold=0.8)) == pytest.approx([1, 0.2])
    assert entropy_ratios(heads, te, None, 28, Bounds(drop_threshold=0.8)) == pytest.approx([2 / 3, 4 / 15])


def test_a_dropped_sub_layer_counts_for_its_block():
    te = {**PAIR_TE, (0, "attention"): 0.0}
    ratios = entropy_ratios(PAIR, te, {0: 1.0, 1: 1.0}, 320, Bounds(drop_threshold=0.9))
    assert ratios == pytest.approx([1, 0.2, 0.4, 0.4])  # block 0 still gives 40%, and block 1 too


@pytest.mark.parametrize("target", [800, 795])
def test_not_every_sub_layer_can_go(target):
    with pytest.raises(RecipeError, match="at most 790"):
        entropy_ratios(PAIR, PAIR_TE, {0: 1, 1: 1}, target, Bounds(drop_threshold=0.1))
    with pytest.raises(RecipeError, match="removes every sub-layer whole"):
        whole_units(PAIR, [1.0] * 4, Bounds(drop_threshold=1.0), target)


# Whole units from ratios


@settings(deadline=None)
@given(models(), STAYS, st.data(), FRACTIONS)
def test_whole_units_meet_the_target_each_near_its_ratio(modules, bounds, data, share):
    te, block_te = entropies(data.draw, modules)
    target = share * most(modules, bounds)
    ratios = entropy_ratios(modules, te, block_te, target, bounds)
    kept = whole_units(modules, ratios, bounds, target)
    assert_widths_are_within(modules, kept, bounds)
    for module, ratio, keep in zip(modules, ratios, kept, strict=True):
        step = allowed_widths(module, bounds).step
        assert abs(keep - module.units * (1 - ratio)) <= step + ROUNDING
    if all(allowed_widths(m, bounds)[-1] == m.units for m in modules):  # else the multiple alone takes some
        assert abs(removed(modules, kept) - target) <= steps(modules, bounds) / 2 + 1e-6
    assert whole_units(modules, ratios, bounds, target) == kept


@given(st.lists(st.floats(0, 0.9), min_size=1, max_size=12), st.integers(2, 50))
def test_largest_remainders_lose_one_more(ratios, units):
    modules = [sub_layer("attention", layer, units, 7) for layer in range(len(ratios))]
    bounds = Bounds()
    exact = [min(units * ratio, units - 1) for ratio in ratios]
    kept = whole_units(modules, [x / units for x in exact], bounds, 7 * sum(exact))
    more = {i for i, keep in enumerate(kept) if units - keep > math.floor(exact[i] + ROUNDING)}
    remainder = [round(x - math.floor(x + ROUNDING), 9) for x in exact]
    assert all(remainder[i] >= remainder[j] for i in more for j in set(range(len(ratios))) - more)
    assert sum(units - keep for keep in kept) in (math.floor(sum(exact) + 0.5), math.ceil(sum(exact) - 0.5))
    for first in range(len(ratios)):
        assert all(exact[first] <= x + 1 or kept[first] <= keep for x, keep in zip(exact, kept, strict=True))


@given(st.integers(1, 40), st.integers(2, 50), st.floats(0, 0.9))
def test_equal_modules_with_equal_ratios_differ_by_at_most_one(layers, units, ratio):
    modules = [sub_layer("attention", layer, units, 7) for layer in range(layers)]
    ratio = min(ratio, 1 - 1 / units)
    kept = whole_units(modules, [ratio] * layers, Bounds(), ratio * total(modules))
    assert max(kept) - min(kept) <= 1


def test_equal_remainders_are_taken_evenly_over_the_layers():
    modules = [sub_layer("attention", layer, 3, 100) for layer in range(30)]
    kept = whole_units(modules, [0.2] * 30, Bounds(), 0.2 * 9000)
    assert removed(modules, kept) == 1800
    thirds = [sum(3 - keep for keep in kept[start : start + 10]) for start in (0, 10, 20)]
    assert max(thirds) - min(thirds) <= 2


def test_small_units_take_up_what_large_ones_miss():
    modules = [sub_layer("attention", 0, 3, 100), sub_layer("mlp", 0, 100, 3), sub_layer("mlp", 1, 100, 3)]
    # 60 of attention rounds to 100; each MLP has 30.5 units to lose, and may lose only one less for it.
    kept = whole_units(modules, [0.2, 0.305, 0.305], Bounds(), 60 + 2 * 91.5)
    assert kept == [2, 70, 70]


def test_a_ratio_of_one_is_whole_only_where_a_threshold_says_so():
    modules = [sub_layer("attention", 0, 3, 10), sub_layer("mlp", 0, 32, 1)]
    assert whole_units(modules, [1.0, 0.25], Bounds(drop_threshold=1.0, multiple=8), 38) == [0, 24]
    assert whole_units(modules, [1.0, 0.25], Bounds(multiple=8), 38) == [1, 24]
    with pytest.raises(RecipeError, match=r"at most 44 \(71.0%\)"):
        whole_units(modules, [1.0, 1.0], Bounds(multiple=8), 62)


# The same ratio everywhere


def test_uniform_attention_of_three_groups_is_spread_over_the_layers():
    modules = [sub_layer("attention", layer, 3, 100) for layer in range(30)]
    kept = uniform_units(modules, 0.2, Bounds())
    assert kept == [2, 3, 2, 3, 2] * 6
    assert removed(modules, kept) == 18 * 100


def test_uniform_mlp_is_one_width_in_multiples():
    modules = [sub_layer("mlp", layer, 1536, 100) for layer in range(4)]
    assert uniform_units(modules, 0.25, Bounds()) == [1152] * 4
    assert uniform_units(modules, 0.2, Bounds(multiple=256)) == [1280] * 4
    assert uniform_units(modules, 0.3, Bounds(max_ratio=0.3)) == [1076] * 4  # 1075 would lose a little more than 0.3
    with pytest.raises(RecipeError, match="leaves no neuron of 100"):
        uniform_units([sub_layer("mlp", 0, 100, 1)], 0.2, Bounds(multiple=256))


@given(models(), st.floats(0, 0.9), st.floats(0.3, 1))
def test_uniform_attention_never_misses_by_more_than_half_a_unit(modules, ratio, max_ratio):
    modules = [m for m in modules if m.axis == "attention"]
    assume(modules)
    assume(ratio <= max_ratio)
    bounds = Bounds(max_ratio=max_ratio)
    try:
        kept = uniform_units(modules, ratio, bounds)
    except RecipeError as error:
        assert "at most" in str(error)  # noqa: PT017
        assert ratio * total(modules) > most(modules, bounds)
        return
    assert_widths_are_within(modules, kept, bounds)
    lost = sum(module.units - keep for module, keep in zip(modules, kept, strict=True))
    wanted = ratio * sum(module.units for module in modules)
    room = any(keep > allowed_widths(module, bounds)[0] for module, keep in zip(modules, kept, strict=True))
    assert not room or lost >= wanted - 0.5 - ROUNDING
    assert lost <= wanted + 0.5 + ROUNDING


@given(st.integers(1, 40), st.integers(1, 16), st.floats(0, 0.9))
def test_uniform_attention_is_never_half_a_unit_off_in_the_first_layers_either(layers, units, ratio):
    modules = [sub_layer("attention", layer, units, 100) for layer in range(layers)]
    assume(ratio <= (units - 1) / units)
    lost = 0
    for layer, keep in enumerate(uniform_units(modules, ratio, Bounds())):
        lost += units - keep
        assert abs(lost - (layer + 1) * units * ratio) <= 0.5 + ROUNDING


def test_uniform_attention_takes_from_wide_layers_what_narrow_last_ones_cannot_give():
    modules = [sub_layer("attention", layer, units, 100) for layer, units in enumerate([4, 4, 1, 1])]
    assert uniform_units(modules, 0.5, Bounds()) == [1, 2, 1, 1]
    assert uniform_units(modules, 0.2, Bounds()) == [3, 3, 1, 1]


def test_a_layer_narrower_than_the_multiple_stays_where_others_are_wider():
    modules = [sub_layer("mlp", layer, units, 100) for layer, units in enumerate([40, 5, 40])]
    assert uniform_units(modules, 0.25, Bounds(multiple=8)) == [32, 5, 32]


@pytest.mark.parametrize(
    ("ratio", "bounds", "message"),
    [
        (0.5, Bounds(max_ratio=0.4), "more than the 0.4 that any may lose"),
        (0.9, Bounds(), r"\(90.0%\) are to go, but at most 6,000 \(66.7%\)"),
        (0.5, Bounds(max_ratio=0.5), r"at most 3,000 \(33.3%\)"),
    ],
)
def test_uniform_says_what_the_bounds_do_not_allow(ratio, bounds, message):
    with pytest.raises(RecipeError, match=message):
        uniform_units([sub_layer("attention", layer, 3, 100) for layer in range(30)], ratio, bounds)


# One ranking


def one_after_the_other(modules, scores, target, bounds):
    """Take the lowest unit that may still go, until the target is reached or the next would miss it by more."""
    z = []
    for values in scores:
        values = np.sort(values.double().numpy())
        z.append((values - values.mean()) / (values.std() if values[0] < values[-1] else 1) * (values[0] < values[-1]))
    lost, gone = [0] * len(modules), 0
    rank = {"attention": 0, "mlp": 1}
    while True:
        open_ = [m for m, mod in enumerate(modules) if mod.units - lost[m] > allowed_widths(mod, bounds)[0]]
        if not open_:
            return [m.units - n for m, n in zip(modules, lost, strict=True)]
        best = min(open_, key=lambda m: (z[m][lost[m]], modules[m].layer, rank[modules[m].axis]))
        cost = modules[best].unit_parameters
        if abs(gone + cost - target) >= abs(gone - target):
            return [m.units - n for m, n in zip(modules, lost, strict=True)]
        lost[best], gone = lost[best] + 1, gone + cost


def scores_for(modules, seed, *, ties):
    draw = torch.Generator().manual_seed(seed)
    make = (lambda n: torch.randint(0, 3, (n,), generator=draw).float()) if ties else None
    return [make(m.units) if make else torch.randn(m.units, generator=draw) * (m.layer + 1) for m in modules]


@settings(deadline=None)
@given(models(), bounded(drops=NEVER, multiples=st.just(1)), st.integers(0, 2**31), st.booleans(), FRACTIONS)
def test_global_units_are_those_of_taking_one_after_the_other(modules, bounds, seed, ties, share):
    scores, target = scores_for(modules, seed, ties=ties), share * most(modules, bounds)
    kept = global_units(modules, scores, target, bounds)
    assert kept == one_after_the_other(modules, scores, target, bounds)
    assert kept == global_units(modules, [4 * values for values in scores], target, bounds)
    assert kept == global_units(modules, [values.flip(0) for values in scores], target, bounds)


@settings(deadline=None)
@given(models(), bounded(), st.integers(0, 2**31), st.booleans(), FRACTIONS)
def test_global_units_meet_the_target_within_the_bounds(modules, bounds, seed, ties, share):
    scores, target = scores_for(modules, seed, ties=ties), share * most(modules, bounds)
    try:
        kept = global_units(modules, scores, target, bounds)
    except RecipeError as error:
        assert "at most" in str(error)  # noqa: PT017 - what is left is too large to go whole
        assert bounds.drop_threshold is not None
        return
    assert_widths_are_within(modules, kept, bounds)
    assert any(kept)
    least = removed(modules, [allowed_widths(m, bounds)[-1] for m in modules])
    assert abs(removed(modules, kept) - max(target, least)) <= steps(modules, bounds) / 2 + 1e-6


def test_a_global_ranking_by_hand():
    modules = [sub_layer("attention", 0, 4, 10), sub_layer("mlp", 0, 8, 1)]
    scores = [torch.tensor([1.0, 2, 3, 100]), torch.tensor([5.0, 1, 1, 1, 9, 9, 9, 9])]
    # z of attention: -0.60, -0.58, -0.55, 1.73; of the MLP: three at -1.28, one at -0.14, four at 0.99
    assert global_units(modules, scores, 3, Bounds()) == [4, 5]
    assert global_units(modules, scores, 13, Bounds()) == [3, 5]
    assert global_units(modules, scores, 34, Bounds()) == [1, 4]
    assert global_units(modules, scores, 4, Bounds(multiple=4)) == [4, 4]
    assert global_units(modules, scores, 33, Bounds(drop_threshold=0.75)) == [1, 5]  # going whole is too much
    assert global_units(modules, scores, 43, Bounds(drop_threshold=0.75)) == [0, 5]
    assert global_units(modules, scores, 13, Bounds(drop_threshold=0.4)) == [3, 5]
    assert global_units(modules, scores, 38, Bounds(drop_threshold=0.5)) == [1, 0]


def test_constant_scores_go_from_the_lowest_layer_attention_first():
    modules = [sub_layer("mlp", 1, 4, 1), sub_layer("mlp", 0, 4, 1), sub_layer("attention", 0, 2, 1)]
    constant = [torch.full((m.units,), 0.1) for m in modules]
    assert [global_units(modules, constant, target, Bounds()) for target in (1, 3, 6)] == [
        [4, 4, 1],
        [4, 2, 1],
        [2, 1, 1],
    ]


def test_global_errors():
    modules = [sub_layer("mlp", 2, 4, 10)]
    with pytest.raises(RecipeError, match=r"at most 30 \(75.0%\)"):
        global_units(modules, [torch.arange(4.0)], 31, Bounds())
    with pytest.raises(RecipeError, match="scores of mlp of layer 2 are not finite"):
        global_units(modules, [torch.tensor([1, math.nan, 2, 3])], 10, Bounds())


@pytest.mark.parametrize("bounds", [Bounds(), Bounds(multiple=256, drop_threshold=0.6)], ids=["units", "packs"])
def test_the_units_of_a_70b_model_are_ranked_in_seconds(bounds):
    modules = [
        sub_layer(axis, i, n, p) for i in range(80) for axis, n, p in (("attention", 8, 9000), ("mlp", 28672, 12))
    ]
    scores = [torch.randn(m.units, generator=torch.Generator().manual_seed(m.layer)) for m in modules]
    start = time.process_time()
    kept = global_units(modules, scores, 0.4 * total(modules), bounds)
    assert time.process_time() - start < 10
    assert removed(modules, kept) == pytest.approx(0.4 * total(modules), abs=9000)


# Whole blocks


@given(st.lists(st.tuples(IMPORTANCES, st.integers(1, 100)), min_size=2, max_size=12), FRACTIONS)
def test_blocks_go_from_the_lowest_entropy_to_what_is_nearest(blocks, share):
    te, parameters = [b[0] for b in blocks], [b[1] for b in blocks]
    order = sorted(range(len(blocks)), key=lambda i: (te[i], i))
    ways = [sorted(order[:count]) for count in range(len(blocks))]
    target = share * sum(parameters[i] for i in ways[-1])
    missed = [abs(sum(parameters[i] for i in way) - target) for way in ways]
    gone = block_removal(te, parameters, target)
    assert gone in ways
    assert missed[len(gone)] == pytest.approx(min(missed))


def test_blocks_by_hand():
    assert block_removal([3, 1, 2, 1], [10, 10, 10, 10], 20) == [1, 3]
    assert block_removal([1, 1, 1, 1], [10, 10, 10, 10], 14) == [0]
    assert block_removal([1, 1, 1, 1], [10, 10, 10, 10], 15) == [0]
    assert block_removal([1, 1, 1, 1], [10, 10, 10, 10], 4) == []
    assert block_removal([1, 1, 1, 1], [10, 10, 10, 10], 35) == [0, 1, 2]
    with pytest.raises(RecipeError, match=r"36 of 40 parameters \(90.0%\) are to go, but at most 30 \(75.0%\)"):
        block_removal([1, 1, 1, 1], [10, 10, 10, 10], 36)
    with pytest.raises(RecipeError, match="not a number"):
        block_removal([1, math.nan], [10, 10], 5)


# Ratios from a file


CHOSEN = [sub_layer("mlp", layer, 40, 10) for layer in (1, 2, 3)] + [sub_layer("attention", 3, 4, 10)]


def test_a_file_gives_lists_or_tables(tmp_path):
    path = tmp_path / "ratios.json"
    path.write_text(json.dumps({"mlp": [0, 0.25, 0.5, 1], "attention": {"3": 0.5}}))
    assert read_ratios(path, CHOSEN, 4) == [0.25, 0.5, 1.0, 0.5]
    path.write_text(json.dumps({"mlp": {"2": 1}}))
    assert read_ratios(str(path), CHOSEN, 4) == [0, 1.0, 0, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"mlp": [0.1', "is not JSON"),
        ("\xff", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[0.1]", "holds no object"),
        ('{"mpl": [0.1]}', "unknown axis 'mpl'. Did you mean 'mlp'?"),
        ('{"mlp": [0.1]}', "mlp has 1 ratios for 4 layers"),
        ('{"mlp": 0.1}', "mlp is neither a list nor a table"),
        ('{"mlp": {"4": 0.1}}', "mlp names layer '4', but the model has layers 0 to 3"),
        ('{"mlp": {"01": 0.1}}', "mlp names layer '01'"),
        ('{"mlp": {"0": 0.1}}', "mlp of layer 0 is not being pruned"),
        ('{"mlp": [0.1, 0, 0, 0]}', "mlp of layer 0 is not being pruned"),
        ('{"mlp": {"1": true}}', "mlp of layer 1 is true, not a number from 0 to 1"),
        ('{"mlp": {"1": NaN}}', "mlp of layer 1 is NaN"),
        ('{"mlp": {"1": 1.5}}', "mlp of layer 1 is 1.5"),
        ('{"mlp": {"1": -0.1}}', "mlp of layer 1 is -0.1"),
        ('{"mlp": {"1": "0.1"}}', 'mlp of layer 1 is "0.1"'),
        ('{"mlp": {"1": null}}', "mlp of layer 1 is null"),
    ],
)
def test_a_broken_file_is_one_line_that_names_it(tmp_path, text, message):
    path = tmp_path / "ratios.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(RecipeError) as caught:
        read_ratios(path, CHOSEN, 4)
    assert message in str(caught.value)
    assert "ratios.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_axis_that_is_not_pruned_and_a_missing_file_are_named(tmp_path):
    path = tmp_path / "ratios.json"
    with pytest.raises(RecipeError, match=r"ratios.json cannot be read \(No such file"):
        read_ratios(path, CHOSEN, 4)
    path.write_text('{"attention": {"3": 0.5}}')
    with pytest.raises(RecipeError, match=r"ratios.json has ratios for attention, which is not being pruned"):
        read_ratios(path, CHOSEN[:3], 4)
