"""An experiment file: a grid of models, methods, ratios, seeds, texts and sample counts, and the runs that it names."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dicer.ask.compute import WITHOUT_EFFECT, Compute
from dicer.ask.evaluation import Evaluation
from dicer.ask.methods import PRESETS, Method
from dicer.ask.portable import base_name, portable_evaluation, portable_text
from dicer.ask.recipe import Recipe
from dicer.ask.spelling import make_wanted
from dicer.errors import ExperimentError, RecipeError, unknown
from dicer.reading import read_toml, reason

ORIGINAL = "original"
_PATHS = (
    *("against", "allocate", "beside", "calib", "criterion", "entropy_profile", "include_path", "models", "perplexity"),
    *("questions", "text"),
)
_AXES = {"ratio": "ratios", "seed": "seeds", "samples": "samples", "calib": "calib"}  # recipe value -> key of the grid
# Recipe fields that earlier records do not have: what they held then, so that those runs are still known.
_LATER = {"entropy_profile": None}

_MOST_RUNS = 100_000

Entry = str | dict[str, Any]


class Grid(BaseModel):
    """The keys of an experiment file; lists multiply, tables in them name more recipe values."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    models: list[str] = Field(min_length=1)
    methods: list[Entry] = Field(min_length=1)
    ratios: list[float] = Field(default=[0.25], min_length=1)
    seeds: list[int] = Field(default=[42], min_length=1)
    calib: list[Entry] = Field(default=["builtin"], min_length=1)
    samples: list[int] = Field(default=[10], min_length=1)
    original: bool = True
    beside: list[str] = []
    recipe: dict[str, Any] = {}
    evaluation: dict[str, Any] = {}


class Run(NamedTuple):
    """One recipe for one model.

    Attributes:
        model: as it is typed.
        recipe: what to do; None for the model as it is.
        text: what the calibration text is called; for stand-ins, what they stand in for.
        compute: how it is computed; the model is loaded once for all runs with the same.
    """

    model: str
    recipe: Recipe | None
    text: str
    compute: Compute

    @property
    def method(self) -> str:
        """The name of its folder."""
        return ORIGINAL if self.recipe is None else method_name(self.recipe)

    @property
    def opened(self) -> tuple[str, str | None]:
        """What is opened for it: the model, and the file that says its structure."""
        return self.model, None if self.recipe is None else self.recipe.family


@dataclass(frozen=True)
class Experiment:
    """What an experiment file comes to.

    Attributes:
        runs: every run once; the models as they are come before their pruned forms.
        evaluation: what is measured of each.
    """

    runs: list[Run] = field(default_factory=list)
    evaluation: Evaluation = field(default_factory=Evaluation)

    def refuse_code(self) -> None:
        """Refuse whatever would run code that this file names.

        Raises:
            ExperimentError: with the first such name.
        """
        recipes = [run.recipe for run in self.runs if run.recipe is not None]
        parts = [part for recipe in recipes for part in (recipe.criterion, recipe.grouping, recipe.merge) if part]
        named = [part for part in parts if ".py:" in part]
        if self.evaluation.include_path is not None:  # task files name functions
            named.append(self.evaluation.include_path)
        if named:
            raise ExperimentError(
                f"it names code, {named[0]}, and --no-code runs none; read it, then leave --no-code out."
            )


def read_experiment(path: Path) -> Experiment:
    """An experiment file, checked.

    Raises:
        ExperimentError: one line with the file, the key and what was expected there.
    """
    try:
        return make_experiment(read_toml(path))
    except (OSError, ValueError) as error:
        raise ExperimentError(f"experiment {path} cannot be read: {reason(error)}.") from None
    except (ExperimentError, RecipeError) as error:
        raise ExperimentError(f"experiment {path}: {error}") from None


def make_experiment(values: Mapping[str, Any]) -> Experiment:
    """The runs that the values of an experiment file name.

    Raises:
        ExperimentError: a key that is not known, or a value of the wrong kind.
        RecipeError: a recipe that has no meaning.
    """
    try:
        grid = Grid(**_expand(values))
        evaluation = Evaluation(**grid.evaluation)
    except ValidationError as error:
        raise ExperimentError(_first_line(error)) from None
    for key, plural in _AXES.items():
        if key in grid.recipe:
            raise ExperimentError(
                f"recipe.{key} is the grid's to say: write {plural} = [{grid.recipe[key]!r}] above it."
            )
    runs: dict[Run, None] = {}
    _check_number(grid)
    for model in grid.models:
        for values_, text in _points(grid):
            recipe, compute = make_wanted(values_)
            recipe.resolve()
            if grid.original:
                runs[Run(model, None, "", compute)] = None
            runs[Run(model, recipe, text, compute)] = None
    for model in grid.beside:  # as it is, computed as the others are
        runs |= {Run(model, None, "", run.compute): None for run in runs}
    evaluation = _against_one(grid, evaluation)
    evaluation.require_something()
    models = [*grid.models, *grid.beside]
    return Experiment(sorted(runs, key=lambda run: (models.index(run.model), run.recipe is not None)), evaluation)


def _check_number(grid: Grid) -> None:
    """Refuse lists that multiply to more runs than anybody can do, before they are made."""
    seeds, ratios = (
        max(len(own) for own in (getattr(grid, name), *_own_lists(grid, name))) for name in ("seeds", "ratios")
    )
    count = len(grid.models) * len(grid.methods) * len(grid.calib) * len(grid.samples) * seeds * ratios
    if count > _MOST_RUNS:
        raise ExperimentError(
            f"the lists multiply to {count:,} runs, and at most {_MOST_RUNS:,} are done. Shorten them."
        )


def _own_lists(grid: Grid, name: str) -> list[list[Any]]:
    tables = (method for method in grid.methods if isinstance(method, dict))
    return [own for table in tables if isinstance(own := table.get(name), list)]


def _against_one(grid: Grid, evaluation: Evaluation) -> Evaluation:
    """The evaluation, with the dense model named where models beside it have no other."""
    if not grid.beside:
        return evaluation
    if evaluation.against is None or (evaluation.against == ORIGINAL and len(grid.models) > 1):
        raise ExperimentError("beside: name in evaluation.against the dense model that these are compared with.")
    if evaluation.against == ORIGINAL:
        return evaluation.model_copy(update={"against": grid.models[0]})
    return evaluation


def _points(grid: Grid) -> Iterator[tuple[dict[str, Any], str]]:
    """Recipe values and text name of every point; what a method's or a text's own table says goes before the grid."""
    for method, calib in itertools.product(grid.methods, grid.calib):
        own = dict(method) if isinstance(method, dict) else {"method": method}
        own_ratios = "ratios" in own
        seeds, ratios = (_own_list(own, name, getattr(grid, name)) for name in ("seeds", "ratios"))
        chosen = own.pop("calib", calib)  # a method may have a text of its own
        text: dict[str, Any] = dict(chosen) if isinstance(chosen, dict) else {"calib": chosen}
        name = text.pop("name", None)
        allocate = str({**grid.recipe, **text, **own}.get("allocate"))
        if allocate.endswith(".json"):
            if own_ratios:
                raise ExperimentError(f"methods.ratios: {allocate} says the ratios; leave them out.")
            ratios = [None]  # one point, and its recipe names no ratio
        for ratio, seed, samples in itertools.product(ratios, seeds, grid.samples):
            point = {**grid.recipe, "ratio": ratio, "seed": seed, "samples": samples, **text, **own}
            yield point, str(name or base_name(str(text.get("calib", "builtin"))))


def _own_list(own: dict[str, Any], name: str, default: list[Any]) -> list[Any]:
    found = own.pop(name, default)
    if not isinstance(found, list) or not found:
        raise ExperimentError(f"methods.{name}: expected a list, got {found!r}.")
    return found


def _expand(values: Any, key: str = "") -> Any:
    """Put environment variables into the values that may be paths: ``${DICER_DATA}/books.txt``."""
    if isinstance(values, Mapping):
        return {name: _expand(value, name) for name, value in values.items()}
    if isinstance(values, list):
        return [_expand(value, key) for value in values]
    if isinstance(values, str) and key in _PATHS:
        if "\0" in values:
            raise ExperimentError(f"{key}: {values!r} is no path.")
        return re.sub(r"\$\{(\w+)\}", lambda found: _variable(found[1], key), values)
    return values


def _variable(name: str, key: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise ExperimentError(f"{key} needs the environment variable {name}, which is not set.")
    return value


def _first_line(error: ValidationError) -> str:
    # A misspelt key is also a missing one, and the spelling is the better hint.
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    where = ".".join(str(part) for part in first["loc"] if part not in ("str", "dict[str,any]"))
    known = Grid.model_fields
    if first["type"] == "extra_forbidden":
        return unknown("key", where, known)
    if first["type"] == "missing":
        return (
            f"the key '{where}' is missing; there must be {', '.join(k for k, f in known.items() if f.is_required())}."
        )
    if first["type"] == "too_short":
        return f"{where}: expected at least one value, got none."
    kind = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"{where}: expected {kind}, got {first['input']!r}."


def method_name(recipe: Recipe) -> str:
    """A preset's name, or the parts of a combination that is none, with what else was chosen; fit for a folder."""
    method = recipe.resolve()
    how = _how(recipe, method)
    parts: list[str | None]
    if method.preset is not None or method.axis == "block":
        parts = [method.preset or "block"]
    else:
        reads = method.criterion.startswith("act-") or method.grouping == "similarity"
        parts = [Path(method.criterion).name.replace(".py:", "-"), method.activation if reads else None]
        parts += [name if name not in ("none", "prune") else None for name in (method.grouping, method.merge)]
        parts += [f"{method.groups}-groups" if method.groups else None]
    parts += how
    return re.sub(r"[^\w.-]", "_", "-".join(part for part in parts if part))


_SAID_BY_VALUE = ("compensate", "schedule", "entropy_search", "entropy_at")
_SAID_BY_NAME = {
    **{"max_ratio": "max", "min_width": "min", "drop_threshold": "drop", "split": "split", "rolls": "rolls"},
    **{"ridge": "ridge", "target": "target-", "distill": "distill", "distill_samples": "lesson"},
    **{"width_multiple": "multiple", "stock": "stock-"},
}


def _how(recipe: Recipe, method: Method) -> list[str]:
    """What is pruned how much, as far as it is not the preset's own way, in short words."""
    preset = PRESETS.get(method.preset or "", PRESETS["rc-a"])
    usual = "transfer-entropy" if method.axis == "block" else preset.allocate
    words: list[str] = [method.axis] if method.axis not in (preset.axis, "block") else []
    words += [Path(method.allocate).stem] if method.allocate != usual else []
    words += [Path(recipe.entropy_profile).stem] if recipe.entropy_profile else []
    words += [Path(recipe.distill_calib).stem] if recipe.distill_calib else []
    words += [f"of-{method.ratio_of}"] if method.ratio_of not in (preset.ratio_of, "chosen") else []
    words += [method.repair] if method.repair != preset.repair else []
    words += [f"propagate-{method.propagate}"] if (method.propagate == "pruned") != (method.repair != "none") else []
    fields = Recipe.model_fields
    changed = {name: v for name in fields if (v := getattr(recipe, name)) != fields[name].default}
    words += [str(changed[name]) for name in _SAID_BY_VALUE if name in changed]
    words += [f"{name}-{value}" for name, value in recipe.set]
    return [*words, *(f"{word}{changed[name]}" for name, word in _SAID_BY_NAME.items() if name in changed)]


def identity(run: Run, recipe: dict[str, Any], evaluation: Evaluation, fingerprint: str) -> dict[str, Any]:
    """What decides a run's result, without paths of this machine: local texts count by their content.

    Args:
        run: what was asked for.
        recipe: with every choice made, as a plan holds it.
        evaluation: what is measured.
        fingerprint: of the model.
    """
    decides = {name: value for name, value in recipe.items() if name not in WITHOUT_EFFECT}
    decides = {name: value for name, value in decides.items() if name not in _LATER or value != _LATER[name]}
    if run.recipe is not None:
        decides["calib"] = portable_text(run.recipe.text.source)
        decides |= {"distill_calib": portable_text(text)} if (text := run.recipe.distill_calib) else {}
    measured = portable_evaluation(evaluation)
    measured.pop("batch_size", None)
    return {"recipe": decides, "text": run.text, "evaluation": measured, "fingerprint": fingerprint}
