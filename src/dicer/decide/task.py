"""A recipe held against a model: all that can be wrong is looked at, and nothing is computed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dicer.ask.methods import Method
from dicer.ask.recipe import Recipe
from dicer.decide.budget import Budget, Decision, Key, decide_beforehand, make_budget
from dicer.decide.grouping import GROUPINGS
from dicer.decide.merging import MERGES
from dicer.decide.plan import LayerPlan, PrunePlan
from dicer.errors import RecipeError, unknown
from dicer.measure.criteria import CRITERIA, Criterion, find_criterion
from dicer.measure.statistics import Need
from dicer.measure.text import Calibration, load_calibration
from dicer.model.source import ModelSource, tokenize_with
from dicer.model.units import AXES, UNITS
from dicer.write.config import layer_shapes
from dicer.write.surgery import Sizes, plan_cut


@dataclass(frozen=True)
class Job:
    """A recipe held against a model: everything that can be wrong has been looked at, and nothing been computed.

    Attributes:
        source: the model.
        recipe: what was asked.
        method: every choice of the recipe made.
        criterion: the scoring function.
        budget: how many parameters are to go, and from where.
        decision: how much of everything stays; None where the model has to run before it can be said.
        calibration: the tokens, or None when nothing of the method looks at text.
    """

    source: ModelSource
    recipe: Recipe
    method: Method
    criterion: Criterion
    budget: Budget
    decision: Decision | None
    calibration: Calibration | None

    @property
    def layers(self) -> list[int]:
        """The layers whose units are scored."""
        return sorted({module.layer for module in self.budget.modules})

    @property
    def needs(self) -> frozenset[Need]:
        """The sums over activations that the method reads."""
        return frozenset().union(*(self._needs(axis) for axis in self.method.axes))

    def _needs(self, axis: str) -> set[Need]:
        kinds = [kind for kind in ("square_sum", "sum") if kind in self.criterion.needs]
        needs = {Need(kind, activation_on(axis, self.method.activation), axis) for kind in kinds}
        if self.method.grouped_by is not None:
            needs.add(Need("gram", activation_on(axis, self.method.grouped_by), axis))
        if self.method.merge == "dominant" and self.method.grouping != "none":
            needs.add(Need("square_sum", "mod", axis))
        if self.recipe.compensate == "bias":
            needs.add(Need("channel_sum", "mod", axis))
        return needs

    @property
    def runs_model(self) -> bool:
        """Whether tokens have to go through the model."""
        measures = self.method.allocate == "transfer-entropy" and self.recipe.entropy_profile is None
        return bool(self.needs) or "gradient" in self.criterion.needs or measures

    @property
    def notes(self) -> list[str]:
        """What the user should know before the result surprises her."""
        notes = list(self.calibration.notes) if self.calibration else []
        if ignored := self.source.ignored:
            notes.append(f"{len(ignored)} tensors that are no part of the model are left out ({ignored[0]} ...)")
        if self.method.merge != "prune" and self.method.grouping == "none":
            notes.append(f"merge '{self.method.merge}' has nothing to merge without groups; name a --grouping")
        for axis in self.method.axes if self.decision else ():
            modules = [module for module in self.budget.modules if module.axis == axis]
            whole = sum(self.decision.keep[axis, m.layer] == m.units for m in modules) if self.decision else 0
            # Of the few heads of a layer all may stay, as rounding goes over all layers; a file may ask for it.
            if whole and not self.method.allocate.endswith(".json") and (axis == "mlp" or whole == len(modules)):
                notes.append(f"{whole} layers keep all their {UNITS[axis]}: the ratio rounds to nothing there")
        return notes

    @property
    def goes_with_its_layer(self) -> bool:
        """Whether a layer without its sub-layers can go whole: nothing of it is left, nor hangs on its number."""
        config = self.source.config
        stays = getattr(config, "scale_attn_by_inverse_layer_idx", False) or self.recipe.compensate == "bias"
        return not stays and getattr(config, "do_layer_norm_before", True)

    def outline(self) -> PrunePlan:
        """A plan with the widths that can be known before anything is computed, and nothing else."""
        layers: dict[Key, LayerPlan] = {}
        for module in self.budget.modules if self.decision else ():
            keep = self.decision.keep[module.axis, module.layer] if self.decision else 0
            layers[module.axis, module.layer] = LayerPlan(module.units, torch.arange(keep), torch.zeros(module.units))
        axes, blocks = without_empty(self, layers)
        return PrunePlan({}, {}, {}, {}, axes, blocks)

    def sizes(self) -> tuple[Sizes, Sizes]:
        """What the model has and what it will have; the same again where the model has to run first."""
        return plan_cut(self.source, self.outline()).sizes()


def activation_on(axis: str, activation: str) -> str:
    """The activation by its name on an axis: heads have but one, what goes into the output projection."""
    return activation if axis == "mlp" else "mod"


def prepare(
    source: ModelSource, recipe: Recipe, tokenizer: Any | None = None, calibration: Calibration | None = None
) -> Job:
    """Hold a recipe against a model.

    Args:
        source: the model.
        recipe: what was asked.
        tokenizer: for models in memory; others bring their own.
        calibration: what the recipe's text gave before, so that it need not be read again.

    Raises:
        RecipeError: names that are in no registry, layers that do not exist, a ratio that leaves no neuron.
        CalibrationError: the text cannot be had or is too short.
    """
    method = recipe.resolve()
    criterion = find_criterion(method.criterion, CRITERIA)
    for kind, name, known in (("grouping", method.grouping, GROUPINGS), ("merge", method.merge, MERGES)):
        if name not in known:
            raise RecipeError(unknown(kind, name, known))
    if method.axis == "block" and getattr(source.config, "scale_attn_by_inverse_layer_idx", False):
        raise RecipeError(f"{source.name} scales attention by the layer's number, so no layer can go whole.")
    budget = make_budget(source, recipe, method)
    decision = decide_beforehand(source, budget, method, recipe)
    for (axis, index), keep in decision.keep.items() if decision else ():
        if method.groups is not None and method.groups > keep > 0:
            raise RecipeError(
                f"--groups {method.groups} is more than the {keep} {UNITS[axis]} that layer {index} keeps; "
                f"ask for at most {keep}."
            )
    job = Job(source, recipe, method, criterion, budget, decision, None)
    if len(job.outline().blocks) == budget.layers:
        raise RecipeError("this removes every layer whole, and one has to stay: ask for less.")
    if not job.runs_model:
        return job
    calibration = calibration or load_calibration(recipe, tokenize_with(tokenizer or source.tokenizer()))
    check_tokens(calibration.tokens, source)
    return replace(job, calibration=calibration)


def check_tokens(tokens: Tensor, source: ModelSource) -> None:
    """See to it that a model can run on these samples.

    Args:
        tokens: int64 [S, T].
        source: the model.

    Raises:
        RecipeError: ids that the model does not know, or more tokens in a row than it has positions.
    """
    vocabulary, limit = int(source.config.vocab_size), int(source.config.max_position_embeddings)
    if int(tokens.max()) >= vocabulary:
        raise RecipeError(
            f"calibration has token id {int(tokens.max())}, and the model knows 0 to {vocabulary - 1}: these ids are "
            "from another tokenizer."
        )
    if source.family.learned_positions and tokens.shape[1] > limit:
        raise RecipeError(f"samples of {tokens.shape[1]} tokens are longer than the model's {limit} positions.")


def without_empty(job: Job, layers: Mapping[Key, LayerPlan]) -> tuple[dict[str, dict[int, LayerPlan]], tuple[int, ...]]:
    """(axis -> layer -> what stays, layers that go whole because nothing of them would stay)."""
    shapes = layer_shapes(job.source.family, job.source.config)

    def keeps(axis: str, index: int) -> bool:
        if (axis, index) in layers:
            return len(layers[axis, index].keep) > 0
        return bool(shapes[index].units[axis]) or axis in shapes[index].output_bias

    empty = [i for i in job.layers if job.goes_with_its_layer and not any(keeps(axis, i) for axis in AXES)]
    axes: dict[str, dict[int, LayerPlan]] = {axis: {} for axis in job.method.axes}
    for (axis, index), layer in sorted(layers.items()):
        if index not in empty:
            axes[axis][index] = layer
    return axes, tuple(empty)


def portable(recipe: Recipe, method: Method) -> dict[str, Any]:
    """The recipe with every choice made and without paths of this machine."""
    criterion, allocate = method.criterion, method.allocate
    if ".py:" in criterion:
        file, _, name = criterion.rpartition(":")
        criterion = f"{Path(file).name}:{name} ({_digest(file)})"
    if allocate.endswith(".json"):
        allocate = f"{Path(allocate).name} ({_digest(allocate)})"
    calib = Path(recipe.calib).name if recipe.calib.endswith((".txt", ".jsonl", ".gz")) else recipe.calib
    choices = method._asdict()
    named = {"criterion": criterion, "allocate": allocate, "calib": calib}
    if profile := recipe.entropy_profile:
        named["entropy_profile"] = f"{Path(profile).name} ({_digest(profile)})"
    return {**recipe.model_dump(), "method": choices.pop("preset"), **choices, **named}


def _digest(file: str) -> str:
    try:
        return f"sha256 {hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]}"
    except OSError as error:
        raise RecipeError(f"{file} cannot be read: {error.strerror or error}.") from None
