"""The budget: what a ratio comes to in parameters of a model, and how many units of each sub-layer it leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dicer.ask.axes import AXES, axes_of
from dicer.ask.layers import select_layers
from dicer.ask.methods import Method
from dicer.ask.recipe import Recipe
from dicer.decide.amounts.by_cosine import cosine_ratios
from dicer.decide.amounts.by_entropy import entropy_ratios
from dicer.decide.amounts.by_rank import block_removal, global_units
from dicer.decide.amounts.equal import PAD, equal_units, stock_numbers
from dicer.decide.amounts.experts import check_least, reason_against, tied_units, with_experts
from dicer.decide.amounts.from_file import read_ratios
from dicer.decide.amounts.prunable import TOLERANCE, Bounds, Prunable, most, total
from dicer.decide.amounts.rounding import whole_units
from dicer.decide.amounts.uniform import uniform_units
from dicer.errors import RecipeError
from dicer.measure.entropy.profile import Profile, read_profile
from dicer.model.sizes import count_sizes, layer_parameters, sub_layer_parameters
from dicer.model.source import ModelSource
from dicer.model.units import SubLayer


@dataclass(frozen=True)
class Budget:
    """A recipe's ratio, held against a model.

    Attributes:
        sub_layers: every one that units can be taken out of; empty where whole blocks go.
        blocks: layer -> its parameters, where whole blocks go.
        whole: parameters that the ratio is a fraction of.
        target: parameters that are to go.
        bounds: what no allocation may break.
        layers: how many decoder layers the model has.
    """

    sub_layers: tuple[Prunable, ...]
    blocks: dict[int, int]
    whole: int
    target: float
    bounds: Bounds
    layers: int


@dataclass(frozen=True)
class Amounts:
    """How much of everything stays.

    Attributes:
        keep: sub-layer -> units that stay.
        blocks: layers that go whole.
        provenance: what led to it, for the plan.
    """

    keep: dict[SubLayer, int]
    blocks: tuple[int, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)


def make_budget(source: ModelSource, recipe: Recipe, method: Method) -> Budget:
    """Hold a recipe's ratio against a model.

    Raises:
        RecipeError: layers that do not exist, or a ratio that the chosen sub-layers cannot give.
    """
    infos, family = source.tensors.infos(), source.family
    units = {axis: family.units(axis) for axis in family.axes}
    count = family.where.count
    chosen = select_layers(recipe.layers, count)
    owned, inside = sub_layer_parameters(family, infos), layer_parameters(family, infos)
    axes = axes_of(method.axes, family.axes)
    places = {SubLayer(layer, axis): units[axis][layer] for layer in chosen for axis in axes}
    sub_layers = tuple(Prunable(place, n, owned[place] // n) for place, n in places.items() if n)
    sub_layers = with_experts(sub_layers, source, by_default=recipe.width_multiple == 1)
    blocks = {} if method.axes else {layer: inside.get(layer, 0) for layer in chosen}
    sizes, eligible = count_sizes(family, infos), total(sub_layers) + sum(blocks.values())
    whole = {"mlp": sizes.mlp, "decoder": sizes.decoder, "model": sizes.parameters, "chosen": eligible}[method.ratio_of]
    if not eligible:
        why = reason_against(source, method.axis)
        raise RecipeError(f"the chosen layers have nothing left along --axis {method.axis}{why}.")
    threshold = 1.0 if method.from_file else recipe.drop_threshold  # in a file, a ratio of 1 means whole
    bounds = Bounds(recipe.max_ratio, recipe.min_width, threshold, recipe.width_multiple)
    budget = Budget(sub_layers, blocks, whole, recipe.ratio * whole, bounds, count)
    if method.ratio_of == "chosen" and not method.from_file:
        check_least(source, sub_layers, recipe.ratio)
    _check_reach(budget, recipe, method, eligible)
    return budget


def _check_reach(budget: Budget, recipe: Recipe, method: Method, eligible: int) -> None:
    """Refuse a ratio that is more than can go, or less than the smallest step."""
    blocks, whole = budget.blocks, budget.whole
    one_stays = min(blocks.values()) if len(blocks) == budget.layers else 0
    can = most(budget.sub_layers, budget.bounds) if budget.sub_layers else eligible - one_stays
    by_width = method.allocate == "uniform" and method.ratio_of == "chosen"  # whose rounding may pass it by a step
    if not method.from_file and not by_width and budget.target > can:
        raise RecipeError(
            f"ratio {recipe.ratio} of {whole:,} parameters ({method.ratio_of}) is {budget.target:,.0f}, and at most "
            f"{can:,} ({can / whole:.1%}) can go from what was chosen; ask for less, or choose more."
        )
    if blocks and budget.target < min(blocks.values()) / 2:
        raise _less_than_a_layer(recipe.ratio)


def _less_than_a_layer(ratio: float) -> RecipeError:
    return RecipeError(f"ratio {ratio} is less than half of one layer, so none would go: ask for more.")


def known_beforehand(source: ModelSource, budget: Budget, method: Method, recipe: Recipe) -> Amounts | None:
    """What can be said before anything is computed: uniform ratios, and those of a file or a profile; else None.

    Raises:
        RecipeError: a ratio that leaves nothing, a file that does not fit the model, or no stock model that it can be.
    """
    legal = _stock_numbers(source, budget, method, recipe) if recipe.stock else None
    if recipe.entropy_profile is not None:
        lists = lists_needed(method, recipe.split)
        profile = _read_profile(Path(recipe.entropy_profile), source, lists, budget.layers)
        return amounts_by_entropy(budget, recipe, profile)
    if method.from_file:
        return _amounts_from_file(Path(method.allocate), budget)
    if method.allocate != "uniform":
        return None
    ratio = recipe.ratio if method.ratio_of == "chosen" else budget.target / total(budget.sub_layers)
    if legal is not None:
        return _amounts(budget.sub_layers, equal_units(budget.sub_layers, ratio, budget.bounds, legal))
    return _amounts(budget.sub_layers, uniform_units(budget.sub_layers, ratio, budget.bounds))


def _stock_numbers(source: ModelSource, budget: Budget, method: Method, recipe: Recipe) -> dict[str, list[int]]:
    """As :func:`.equal.stock_numbers`, where all layers were chosen."""
    if method.axes and len(select_layers(recipe.layers, budget.layers)) < budget.layers:
        raise RecipeError(
            f"--stock cuts all layers alike, and --layers {recipe.layers} leaves others as they are: leave --layers "
            f"out, or {PAD}."
        )
    return stock_numbers(source, method.axes, biased=recipe.compensate == "bias")


def _read_profile(path: Path, source: ModelSource, lists: Sequence[str], layers: int) -> Profile:
    """A profile of these lists and this number of layers, with a note where it is of another model."""
    profile = read_profile(path)
    for name in lists:
        found = len(getattr(profile, name))
        if not found:
            raise RecipeError(f"{path} has no '{name}': measure them with 'dicer entropy --lists {','.join(lists)}'.")
        if found != layers:
            raise RecipeError(f"{path} is of {found} layers, and the model has {layers}: measure this one.")
    model = profile.about.get("model")
    if isinstance(model, dict) and model.get("fingerprint") == source.fingerprint:
        return profile
    return replace(profile, notes=(*profile.notes, f"the profile {path.name} was not measured on these weights"))


def _amounts_from_file(path: Path, budget: Budget) -> Amounts:
    """A file's ratios: 1 is whole, 0 is untouched, and no bound may change one."""
    asked = dict(zip(budget.sub_layers, read_ratios(path, budget.sub_layers, budget.layers), strict=True))
    if not any(asked.values()):
        raise RecipeError(f"every ratio in {path} is 0, so nothing would go.")
    for tie in {sub_layer.tie for sub_layer in asked if sub_layer.tie}:
        if len(ratios := {ratio for sub_layer, ratio in asked.items() if sub_layer.tie == tie}) > 1 or 1 in ratios:
            raise RecipeError(
                f"{path} has several ratios, or 1, where '{tie}' of config.json says one number for all: "
                "give each layer the same, below 1."
            )
    bounds = replace(budget.bounds, drop_threshold=None)
    cut = {sub_layer: ratio for sub_layer, ratio in asked.items() if 0 < ratio < 1}
    for sub_layer, ratio in cut.items():
        if broken := _broken_bound(sub_layer, ratio, bounds):
            raise RecipeError(f"{path}: {sub_layer.place} is to lose {ratio}, and {broken}: change one.")
    keep = {sub_layer: 0 if ratio == 1 else sub_layer.units for sub_layer, ratio in asked.items()}
    if cut:
        part = sum(ratio * sub_layer.parameters for sub_layer, ratio in cut.items())
        keep |= dict(zip(cut, whole_units(list(cut), list(cut.values()), bounds, part), strict=True))
    provenance = {"target": sum(ratio * sub_layer.parameters for sub_layer, ratio in asked.items())}
    return _amounts(budget.sub_layers, list(keep.values()), provenance)


def _broken_bound(sub_layer: Prunable, ratio: float, bounds: Bounds) -> str:
    """Which bound a ratio of the user's own would break, if one."""
    if ratio > bounds.max_ratio + TOLERANCE:
        return f"--max-ratio is {bounds.max_ratio}"
    least = min(bounds.min_width, sub_layer.units) if sub_layer.kind.rounds_each_layer else 1
    too_narrow = least > max(round(sub_layer.units * (1 - ratio)), 1)
    return f"--min-width is {bounds.min_width}" if too_narrow else ""


def amounts_by_entropy(budget: Budget, recipe: Recipe, profile: Profile) -> Amounts:
    """Ratios from transfer entropy; blocks of the lowest, where whole blocks go.

    Raises:
        RecipeError: a target that the bounds cannot reach.
    """
    blocks = {entry.layer: entry.te for entry in profile.blocks}
    provenance: dict[str, Any] = {"transfer_entropy": profile.te_lists(), "notes": list(profile.notes)}
    if budget.blocks:
        layers = list(budget.blocks)
        sizes = [budget.blocks[i] for i in layers]
        gone = block_removal([blocks[i] for i in layers], sizes, budget.target, all_may_go=len(layers) < budget.layers)
        if not gone:
            raise _less_than_a_layer(recipe.ratio)
        return Amounts({}, tuple(sorted(layers[i] for i in gone)), provenance)
    te = {SubLayer(entry.layer, axis): entry.te for axis in AXES for entry in profile.lists.get(axis, ())}
    ratios = entropy_ratios(
        budget.sub_layers, te, blocks or None, budget.target, budget.bounds, recipe.schedule, recipe.split
    )
    return _amounts(budget.sub_layers, whole_units(budget.sub_layers, ratios, budget.bounds, budget.target), provenance)


def amounts_by_cosine(budget: Budget, turning: Sequence[float]) -> Amounts:
    """Ratios from how much each layer turns the hidden state.

    Args:
        budget: what is to go.
        turning: mean of 1 - cos of every layer's input and output, from the first layer on.

    Raises:
        RecipeError: a target that the bounds cannot reach.
    """
    ratios = cosine_ratios(budget.sub_layers, dict(enumerate(turning)), budget.target, budget.bounds)
    kept = whole_units(budget.sub_layers, ratios, budget.bounds, budget.target)
    return _amounts(budget.sub_layers, kept, {"turning": [float(f"{value:.6g}") for value in turning]})


def amounts_by_rank(budget: Budget, scores: Mapping[SubLayer, Tensor]) -> Amounts:
    """One ranking of all units of all sub-layers.

    Raises:
        RecipeError: a target that the bounds cannot reach.
    """
    ranked = [scores[sub_layer.place] for sub_layer in budget.sub_layers]
    return _amounts(budget.sub_layers, global_units(budget.sub_layers, ranked, budget.target, budget.bounds))


def _amounts(sub_layers: Sequence[Prunable], kept: Sequence[int], provenance: dict[str, Any] | None = None) -> Amounts:
    tied = tied_units(sub_layers, kept)
    keep = {sub_layer.place: units for sub_layer, units in zip(sub_layers, tied, strict=True)}
    return Amounts(keep, provenance=provenance or {})


def lists_needed(method: Method, split: str) -> tuple[str, ...]:
    """The lists of a transfer-entropy profile that an allocation reads."""
    levels = len(method.axes) > 1 and split != "module"
    return (*(["blocks"] if levels or not method.axes else []), *method.axes)
