"""A recipe held against a model: all that can be wrong is looked at, and nothing is computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor

from dicer.ask.axes import axes_of, kind_name, kind_of
from dicer.ask.compute import Compute
from dicer.ask.methods import Method
from dicer.ask.recipe import Recipe
from dicer.ask.text import Text
from dicer.decide.budget import Amounts, Budget, known_beforehand, make_budget
from dicer.decide.grouping import GROUPINGS, Grouping
from dicer.decide.merging import MERGES, Merging
from dicer.decide.plan import LayerPlan, PrunePlan
from dicer.errors import RecipeError
from dicer.measure.criteria import CRITERIA, Criterion
from dicer.measure.parts import ROUTED, Part, bind, find_part
from dicer.measure.statistics import Kind, Need
from dicer.measure.text import Calibration, load_calibration
from dicer.model.shapes import layer_shapes
from dicer.model.source import ModelSource, tokenize_with
from dicer.model.structure.idle import is_shell
from dicer.model.units import SubLayer

_BEYOND = 8  # times a model's positions, which may be exceeded where they are rotary


class Parts(NamedTuple):
    """What a method is made of, with the parameters that were set."""

    criterion: Criterion
    grouping: Grouping
    merge: Merging


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A recipe held against a model, before it is known how much stays.

    Attributes:
        source: the model.
        recipe: what was asked.
        compute: how it is computed.
        method: every choice of the recipe made.
        parts: the functions of the method.
        budget: how many parameters are to go, and from where.
        calibration: the tokens; None until they are read, and where nothing of the method looks at text.
        lesson: those that distillation reads, where they are others.
    """

    source: ModelSource
    recipe: Recipe
    compute: Compute
    method: Method
    parts: Parts
    budget: Budget
    calibration: Calibration | None = None
    lesson: Calibration | None = None

    @property
    def places(self) -> frozenset[SubLayer]:
        """The sub-layers whose units are scored."""
        return frozenset(sub_layer.place for sub_layer in self.budget.sub_layers)

    @property
    def layers(self) -> list[int]:
        """The layers that they lie in."""
        return sorted({place.layer for place in self.places})

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes of the model whose units are scored; a layer may have several of one kind."""
        return axes_of(self.method.axes, self.source.family.axes)

    @property
    def needs(self) -> frozenset[Need]:
        """The sums over activations that the method reads."""
        return frozenset(need for axis in self.axes for need in self._needs(axis))

    def _needs(self, axis: str) -> set[Need]:
        read: list[tuple[Part, str]] = [(self.parts.criterion, self.method.activation), (self.parts.merge, "mod")]
        read.append((self.parts.grouping, self.method.grouped_by or self.method.activation))
        kinds: tuple[Kind, ...] = get_args(Kind)
        needs = {
            Need(kind, "mod" if kind in ROUTED else kind_of(axis).activation(activation), axis)
            for part, activation in read
            for kind in kinds
            if kind in part.needs
        }
        if needs and kind_of(axis).routed:
            needs.add(Need("tokens", "mod", axis))  # too few are warned of
        needs |= {Need("channel_gram", "mod", axis)} if self.recipe.rolls > 1 else set()
        return needs | ({Need("channel_sum", "mod", axis)} if self.recipe.compensate == "bias" else set())

    @property
    def walked_needs(self) -> frozenset[Need]:
        """The same with what repair reads; where the cuts go along, something is always read."""
        kind: Kind = "channel_sum" if self.method.repair == "none" else "channel_gram"
        return self.needs | {Need(kind, "mod", axis) for axis in self.axes}

    @property
    def needs_gradient(self) -> bool:
        """Whether the criterion reads the gradient of the loss."""
        return "gradient" in self.parts.criterion.needs

    @property
    def needs_whole(self) -> bool:
        """Whether the whole model has to be in memory, as a gradient goes through all of it."""
        return self.needs_gradient or self.recipe.distill > 0

    @property
    def runs_model(self) -> bool:
        """Whether tokens have to go through the model."""
        measures = self.method.allocate == "cosine" or (
            self.method.allocate == "transfer-entropy" and self.recipe.entropy_profile is None
        )
        return bool(self.needs) or self.needs_gradient or self.method.walks_alone or measures

    @property
    def notes(self) -> list[str]:
        """What the user should know before the result surprises her."""
        read = [note for text in (self.calibration, self.lesson) if text for note in text.notes]
        notes = [*self.source.notes, *dict.fromkeys(read)]
        if ignored := self.source.ignored:
            notes.append(f"{len(ignored)} tensors that are no part of the model are left out ({ignored[0]} ...)")
        if self.method.merge != "prune" and self.method.grouping == "none":
            notes.append(f"merge '{self.method.merge}' has nothing to merge without groups; name a --grouping")
        return notes

    def goes_with_its_layer(self, layer: int) -> bool:
        """Whether a layer without its sub-layers can go whole: nothing of it is left, nor hangs on its number."""
        source = self.source
        if getattr(source.config, "scale_attn_by_inverse_layer_idx", False) or self.recipe.compensate == "bias":
            return False
        if "block" in source.family.refused:
            return False
        return is_shell(source.family, source.config, [*source.tensors.infos()], layer)

    def decided(self, amounts: Amounts) -> Decided:
        """The same, now that it is known how much stays.

        Raises:
            RecipeError: nothing of the model would stay.
        """
        task = Decided(**{field.name: getattr(self, field.name) for field in fields(Asked)}, amounts=amounts)
        if len(task.outline().blocks) == self.budget.layers:
            raise RecipeError("this removes every layer whole, and one has to stay: ask for less.")
        return task


@dataclass(frozen=True, kw_only=True)
class Decided(Asked):
    """A recipe held against a model, and how much of everything stays.

    Attributes:
        amounts: units of each sub-layer, and the blocks that go.
    """

    amounts: Amounts

    @property
    def notes(self) -> list[str]:
        """What the user should know before the result surprises her; also where a ratio rounds to nothing."""
        notes = super().notes
        for axis in self.method.axes if not self.method.from_file else ():  # a file may ask for it
            own = [sub_layer for sub_layer in self.budget.sub_layers if kind_name(sub_layer.axis) == axis]
            whole = [s.layer for s in own if self.amounts.keep[s.place] == s.units]
            # Of the few heads of a layer all may stay, as rounding goes over all layers.
            if whole and (kind_of(axis).rounds_each_layer or len(whole) == len(own)):
                notes.append(
                    f"{len({*whole})} layers keep all their {kind_of(axis).units}: the ratio rounds to nothing there"
                )
            few = self.recipe.stock and own and not kind_of(axis).rounds_each_layer
            if few and (keep := self.amounts.keep[own[0].place]) != (units := own[0].units) * (1 - self.recipe.ratio):
                notes.append(
                    f"every layer keeps {keep} of {units} {kind_of(axis).units}, the number nearest to the ratio that "
                    f"a stock {self.source.family.causal_lm} can have ({1 - keep / units:.1%} go)"
                )
        return notes

    def outline(self) -> PrunePlan:
        """A plan with the widths that are decided, and nothing else."""
        layers: dict[SubLayer, LayerPlan] = {}
        for sub_layer in self.budget.sub_layers:
            keep = torch.arange(self.amounts.keep[sub_layer.place])
            layers[sub_layer.place] = LayerPlan(sub_layer.units, keep, torch.zeros(sub_layer.units))
        axes, blocks = without_empty(self, layers)
        return PrunePlan({}, {}, {}, {}, axes, blocks)


def prepare(source: ModelSource, recipe: Recipe, compute: Compute | None = None) -> Asked:
    """Hold a recipe against a model; no text is read.

    Args:
        source: the model.
        recipe: what was asked.
        compute: how it is to be computed.

    Returns:
        What is asked; :class:`Decided` already, where how much stays is known beforehand.

    Raises:
        RecipeError: names that are in no registry, layers that do not exist, a ratio that leaves no neuron.
    """
    method = recipe.resolve()
    parts = _parts(recipe, method)
    if method.axis == "block" and getattr(source.config, "scale_attn_by_inverse_layer_idx", False):
        raise RecipeError(f"{source.name} scales attention by the layer's number, so no layer can go whole.")
    _check_routed(source, recipe, method, parts)
    _check_second_order(source, recipe, method, parts)
    budget = make_budget(source, recipe, method)
    task = Asked(
        source=source,
        recipe=recipe,
        compute=recipe.compute_or(compute),
        method=method,
        parts=parts,
        budget=budget,
    )
    amounts = known_beforehand(source, budget, method, recipe)
    if amounts is None:
        return task
    for (layer, axis), keep in amounts.keep.items():
        if asked_groups(parts) > keep > 0:
            raise RecipeError(
                f"--groups {asked_groups(parts)} is more than the {keep} {kind_of(axis).units} that layer {layer} "
                f"keeps; ask for at most {keep}."
            )
    return task.decided(amounts)


def _check_routed(source: ModelSource, recipe: Recipe, method: Method, parts: Parts) -> None:
    """Refuse what cannot be asked of units that tokens are sent to, and of those to which none are."""
    if any(need in ROUTED for need in parts.criterion.needs) and not all(kind_of(a).routed for a in method.axes):
        raise RecipeError(
            f"criterion '{parts.criterion.name}' is for experts, which tokens are sent to; use --axis experts."
        )
    inside = [a for a in axes_of(method.axes, source.family.axes) if source.family.axes[a].routed]
    if inside and recipe.compensate == "bias":
        raise RecipeError(
            f"{source.name}: --compensate bias adds to the bias of an output projection, and experts' have none in "
            "most stock classes, so dicer adds to none of them: leave it out, or use --axis attention."
        )
    if inside and method.allocate == "transfer-entropy":
        raise RecipeError(
            "transfer entropy is measured of attention, MLPs and blocks, and not of experts: use --allocate uniform "
            "or global."
        )


def _check_second_order(source: ModelSource, recipe: Recipe, method: Method, parts: Parts) -> None:
    """Refuse what reads the inputs of one output projection where units have several, or share the tokens out."""
    axes = [source.family.axes[name] for name in axes_of(method.axes, source.family.axes)]
    several = next((axis.name for axis in axes if axis.routed or axis.parts > 1), None)
    needs = {need for need in parts.criterion.needs if need in ("channel_gram", "channel_square_sum")}
    if several is not None and (method.walks_alone or recipe.rolls > 1 or needs):
        raise RecipeError(
            f"--repair, --propagate, --rolls and criteria such as '{parts.criterion.name if needs else 'obs'}' read "
            f"one output projection, and {several} of {source.name} has several: use others, or --axis attention."
        )


def asked_groups(parts: Parts) -> int:
    """How many random groups were asked for; 0 where nothing was said."""
    return int(parts.grouping.settings.get("groups") or 0) if parts.grouping.name == "random" else 0


def _parts(recipe: Recipe, method: Method) -> Parts:
    asked = {**dict(recipe.set), **({"groups": method.groups} if method.groups is not None else {})}
    grouping = find_part(Grouping, method.grouping, GROUPINGS)
    merge = find_part(Merging, method.merge, MERGES)
    if grouping is GROUPINGS["none"]:  # without groups there is nothing to merge
        merge = MERGES["prune"]
    parts = (find_part(Criterion, method.criterion, CRITERIA), grouping, merge)
    return Parts(*bind(parts, asked))


T = TypeVar("T", bound=Asked)


def with_text(task: T, tokenizer: Any | None = None, read: Callable[[Text], Calibration] | None = None) -> T:
    """The same with its calibration tokens, where its method looks at text.

    Args:
        task: from :func:`prepare`.
        tokenizer: for models in memory; others bring their own.
        read: what gives a text's tokens, where it is not this that reads them.

    Raises:
        CalibrationError: the text cannot be had or is too short.
        RecipeError: the tokens are not the model's.
    """
    if not task.runs_model:
        return task
    source, recipe = task.source, task.recipe
    read = read or partial(load_calibration, tokenize=tokenize_with(tokenizer or source.tokenizer()))
    calibration, lesson = read(recipe.text), None if recipe.lesson is None else read(recipe.lesson)
    if lesson is not None and recipe.distill_samples and lesson.provenance["kind"] == "input_ids":
        raise RecipeError(
            f"--distill-samples {recipe.distill_samples}: ready input_ids are all read; leave it out, and name those "
            "that distillation reads as --distill-calib."
        )
    for found in (calibration, lesson):
        if found is not None:
            check_tokens(found.tokens, source)
    return replace(task, calibration=calibration, lesson=lesson)


def check_tokens(tokens: Tensor, source: ModelSource) -> None:
    """See to it that a model can run on these samples.

    Args:
        tokens: int64 [S, T].
        source: the model.

    Raises:
        RecipeError: ids that the model does not know, or more tokens in a row than it has positions.
    """
    text = source.text_config
    vocabulary, limit = int(text.vocab_size), int(getattr(text, "max_position_embeddings", None) or 2**31)
    if int(tokens.max()) >= vocabulary:
        raise RecipeError(
            f"calibration has token id {int(tokens.max())}, and the model knows 0 to {vocabulary - 1}: these ids are "
            "from another tokenizer."
        )
    if source.family.learned_positions and tokens.shape[1] > limit:
        raise RecipeError(f"samples of {tokens.shape[1]} tokens are longer than the model's {limit} positions.")
    if tokens.shape[1] > _BEYOND * limit:
        raise RecipeError(
            f"samples of {tokens.shape[1]:,} tokens are more than {_BEYOND} times as long as the model's {limit:,} "
            "positions, where nothing that it computes means anything; give shorter ones."
        )


def without_empty(
    task: Asked, layers: Mapping[SubLayer, LayerPlan]
) -> tuple[dict[str, dict[int, LayerPlan]], tuple[int, ...]]:
    """(axis -> layer -> what stays, layers that go whole because nothing of them would stay)."""
    shapes = layer_shapes(task.source.family, task.source.config)

    def keeps(place: SubLayer) -> bool:
        if place in layers:
            return len(layers[place].keep) > 0
        shape = shapes[place.layer]
        return bool(shape.units[place.axis]) or place.axis in shape.output_bias

    places = {i: [SubLayer(i, axis) for axis in task.source.family.axes] for i in task.layers}
    empty = [i for i in task.layers if not any(map(keeps, places[i])) and task.goes_with_its_layer(i)]
    axes: dict[str, dict[int, LayerPlan]] = {axis: {} for axis in task.axes}
    for place, layer in sorted(layers.items()):
        if place.layer not in empty:
            axes[place.axis][place.layer] = layer
    return axes, tuple(empty)
