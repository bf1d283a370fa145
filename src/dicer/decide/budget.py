"""The budget: what a ratio comes to in parameters of a model, and how many units of each module it leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dicer.ask.methods import Method
from dicer.ask.recipe import Recipe, select_layers
from dicer.decide.amounts.by_entropy import entropy_ratios
from dicer.decide.amounts.by_rank import block_removal, global_units
from dicer.decide.amounts.modules import HAIR, Bounds, Module, most, read_ratios, uniform_units, whole_units
from dicer.errors import RecipeError
from dicer.measure.entropy.profile import Profile, read_profile
from dicer.model.source import ModelSource
from dicer.write.surgery import count_sizes

Key = tuple[str, int]  # axis, layer


@dataclass(frozen=True)
class Budget:
    """A recipe's ratio, held against a model.

    Attributes:
        modules: every module that units can be taken out of; empty where whole blocks go.
        blocks: layer -> its parameters, where whole blocks go.
        whole: parameters that the ratio is a fraction of.
        target: parameters that are to go.
        bounds: what no allocation may break.
        layers: how many decoder layers the model has.
    """

    modules: tuple[Module, ...]
    blocks: dict[int, int]
    whole: int
    target: float
    bounds: Bounds
    layers: int


@dataclass(frozen=True)
class Decision:
    """How much of everything stays.

    Attributes:
        keep: (axis, layer) -> units that stay.
        blocks: layers that go whole.
        told: what led to it, for the plan.
    """

    keep: dict[Key, int]
    blocks: tuple[int, ...] = ()
    told: dict[str, Any] = field(default_factory=dict)


def make_budget(source: ModelSource, recipe: Recipe, method: Method) -> Budget:
    """Hold a recipe's ratio against a model.

    Raises:
        RecipeError: layers that do not exist, or a ratio that the chosen modules cannot give.
    """
    units = {axis: source.family.units(source.config, axis) for axis in ("attention", "mlp")}
    count = len(units["mlp"])
    chosen = select_layers(recipe.layers, count)
    modules = tuple(
        Module(axis, layer, units[axis][layer], _parameters(source, axis, layer) // units[axis][layer])
        for layer in chosen
        for axis in method.axes
        if units[axis][layer]
    )
    infos = source.tensors.infos()
    inside = {name: place[0] for name in infos if (place := source.family.locate(name))}
    blocks = {i: sum(infos[name].numel for name, layer in inside.items() if layer == i) for i in chosen}
    if method.axes:
        blocks = {}
    sizes = count_sizes(source.family, infos)
    eligible = sum(module.parameters for module in modules) + sum(blocks.values())
    whole = {"mlp": sizes.mlp, "decoder": sizes.decoder, "model": sizes.parameters, "chosen": eligible}[method.ratio_of]
    if not eligible:
        raise RecipeError(f"the chosen layers have nothing left along --axis {method.axis}.")
    from_file = method.allocate.endswith(".json")  # there, a ratio of 1 means whole
    threshold = 1.0 if from_file else recipe.drop_threshold
    bounds = Bounds(recipe.max_ratio, recipe.min_width, threshold, recipe.width_multiple)
    budget = Budget(modules, blocks, whole, recipe.ratio * whole, bounds, count)
    can = most(modules, bounds) if modules else eligible - (min(blocks.values()) if len(blocks) == count else 0)
    by_width = method.allocate == "uniform" and method.ratio_of == "chosen"  # whose rounding may pass it by a step
    if not from_file and not by_width and budget.target > can:
        raise RecipeError(
            f"ratio {recipe.ratio} of {whole:,} parameters ({method.ratio_of}) is {budget.target:,.0f}, and at most "
            f"{can:,} ({can / whole:.1%}) can go from what was chosen; ask for less, or choose more."
        )
    if blocks and budget.target < min(blocks.values()) / 2:
        raise _less_than_a_layer(recipe.ratio)
    return budget


def _less_than_a_layer(ratio: float) -> RecipeError:
    return RecipeError(f"ratio {ratio} is less than half of one layer, so none would go: ask for more.")


def _parameters(source: ModelSource, axis: str, layer: int) -> int:
    """What the units of one module own, biases included."""
    places = {(layer, piece.name) for piece in getattr(source.family, axis).slices}
    return sum(info.numel for name, info in source.tensors.infos().items() if source.family.locate(name) in places)


def decide_beforehand(source: ModelSource, budget: Budget, method: Method, recipe: Recipe) -> Decision | None:
    """What can be said before anything is computed: uniform ratios, and those of a file or a profile; else None.

    Raises:
        RecipeError: a ratio that leaves nothing, or a file that does not fit the model.
    """
    modules, bounds = budget.modules, budget.bounds
    if recipe.entropy_profile is not None:
        profile = _read_profile(Path(recipe.entropy_profile), source, lists_needed(method, recipe.split), budget.layers)
        return decide_by_entropy(budget, recipe, profile)
    if method.allocate.endswith(".json"):
        return _decide_by_file(Path(method.allocate), budget)
    if method.allocate != "uniform":
        return None
    eligible = sum(module.parameters for module in modules)
    ratio = recipe.ratio if method.ratio_of == "chosen" else budget.target / eligible
    return _decision(modules, uniform_units(modules, ratio, bounds))


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


def _decide_by_file(path: Path, budget: Budget) -> Decision:
    """A file's ratios: 1 is whole, 0 is untouched, and no bound may change one."""
    asked = dict(zip(budget.modules, read_ratios(path, budget.modules, budget.layers), strict=True))
    if not any(asked.values()):
        raise RecipeError(f"every ratio in {path} is 0, so nothing would go.")
    bounds = replace(budget.bounds, drop_threshold=None)
    cut = {module: ratio for module, ratio in asked.items() if 0 < ratio < 1}
    for module, ratio in cut.items():
        least = min(bounds.min_width, module.units) if module.axis == "mlp" else 1
        if ratio > bounds.max_ratio + HAIR:
            broken = f"--max-ratio is {bounds.max_ratio}"
        elif least > max(round(module.units * (1 - ratio)), 1):
            broken = f"--min-width is {bounds.min_width}"
        else:
            continue
        raise RecipeError(
            f"{path}: {module.axis} of layer {module.layer} is to lose {ratio}, and {broken}: change one."
        )
    keep = {module: 0 if ratio == 1 else module.units for module, ratio in asked.items()}
    if cut:
        part = sum(ratio * module.parameters for module, ratio in cut.items())
        keep |= dict(zip(cut, whole_units(list(cut), list(cut.values()), bounds, part), strict=True))
    told = {"target": sum(ratio * module.parameters for module, ratio in asked.items())}
    return _decision(budget.modules, [keep[module] for module in budget.modules], told)


def decide_by_entropy(budget: Budget, recipe: Recipe, profile: Profile) -> Decision:
    """Ratios from transfer entropy; blocks of the lowest, where whole blocks go.

    Raises:
        RecipeError: a target that the bounds cannot reach.
    """
    blocks = {entry.layer: entry.te for entry in profile.blocks}
    told: dict[str, Any] = {"transfer_entropy": profile.te_lists(), "notes": list(profile.notes)}
    if budget.blocks:
        layers = list(budget.blocks)
        sizes = [budget.blocks[i] for i in layers]
        gone = block_removal([blocks[i] for i in layers], sizes, budget.target, all_may_go=len(layers) < budget.layers)
        if not gone:
            raise _less_than_a_layer(recipe.ratio)
        return Decision({}, tuple(sorted(layers[i] for i in gone)), told)
    te = {(axis, entry.layer): entry.te for axis in ("attention", "mlp") for entry in getattr(profile, axis)}
    ratios = entropy_ratios(
        budget.modules, te, blocks or None, budget.target, budget.bounds, recipe.schedule, recipe.split
    )
    kept = whole_units(budget.modules, ratios, budget.bounds, budget.target)
    return _decision(budget.modules, kept, told)


def decide_by_scores(budget: Budget, scores: Mapping[Key, Tensor]) -> Decision:
    """One ranking of all units of all modules.

    Raises:
        RecipeError: a target that the bounds cannot reach.
    """
    ranked = [scores[module.axis, module.layer] for module in budget.modules]
    return _decision(budget.modules, global_units(budget.modules, ranked, budget.target, budget.bounds))


def _decision(modules: Sequence[Module], kept: Sequence[int], told: dict[str, Any] | None = None) -> Decision:
    return Decision({(m.axis, m.layer): k for m, k in zip(modules, kept, strict=True)}, told=told or {})


def lists_needed(method: Method, split: str) -> tuple[str, ...]:
    """The lists of a transfer-entropy profile that an allocation reads."""
    if method.axis == "all" and split == "module":
        return ("attention", "mlp")
    return {"all": ("blocks", "attention", "mlp"), "block": ("blocks",)}.get(method.axis, (method.axis,))
