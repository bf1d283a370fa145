"""What the user wants done, validated, and the choices that it comes to."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import Field, PrivateAttr, field_validator

from dicer.ask.axes import AXES
from dicer.ask.compute import COMPUTE_KEYS, Compute
from dicer.ask.layers import layer_ranges
from dicer.ask.methods import (
    ALLOCATIONS,
    DEFAULT_METHOD,
    PRESETS,
    Activation,
    AxisName,
    Method,
    Propagate,
    RatioOf,
    Repairs,
    complete,
    is_preset,
)
from dicer.ask.panels import ENTROPY, HOW, REPAIR, WHAT
from dicer.ask.strict import LARGEST, Strict
from dicer.ask.text import TEXT_KEYS, Text, sources_of
from dicer.errors import RecipeError, unknown

# What recipes did not say before: said in files only where it is not what was then, so that what was is the same.
_ADDED = {
    "repair": None,
    "ridge": "auto",
    "propagate": None,
    "target": "own",
    "rolls": 1,
    "skip_first": 0,
    "distill": 0,
    "distill_calib": None,
    "distill_samples": 0,
}
_FOR_REPAIR = {"samples": 32, "seq_len": 512}  # ten tokens for each of a small model's neurons, not less than one
Settings = tuple[tuple[str, str | int | float | bool | None], ...]  # parameter of a part -> value


class Recipe(Strict):
    """What the user wants done to a model, beside the model itself; how it is computed is :class:`.Compute`.

    Every field, and every field of ``text`` under the name that :class:`.Text` says, is also a flag and a TOML key.
    """

    method: str | None = Field(
        default=None, description="preset of the paper; 'dicer methods' lists them (default: rc-a)"
    )
    criterion: str | None = Field(
        default=None, description="criterion by name, or FILE.py:NAME for your own", json_schema_extra=HOW
    )
    activation: Activation | None = Field(
        default=None, description="which activation is read: pre, post or mod", json_schema_extra=HOW
    )
    grouping: str | None = Field(default=None, description="none, random or similarity", json_schema_extra=HOW)
    merge: str | None = Field(
        default=None, description="what a group leaves: prune, mean or dominant", json_schema_extra=HOW
    )
    groups: int | None = Field(
        default=None,
        ge=1,
        le=LARGEST,
        description="random groups C that keep K/C neurons each (default: C = K)",
        json_schema_extra=HOW,
    )
    axis: AxisName | None = Field(
        default=None,
        description="what is pruned: mlp (neurons, also those inside experts), attention (heads; key-value heads with "
        "all their query heads), all (both), experts (whole ones), block (whole layers) (default: mlp)",
    )
    ratio: float = Field(default=0.25, description="fraction of the parameters that goes, between 0 and 1")
    ratio_of: RatioOf | None = Field(
        default=None,
        description="fraction of what: chosen (the units of the chosen axis and layers), or all of the mlp, decoder "
        "or model (default: chosen)",
        json_schema_extra=WHAT,
    )
    allocate: str | None = Field(
        default=None,
        description="how the ratio is shared out: uniform, cosine, transfer-entropy, global, or FILE.json "
        "(default: uniform)",
    )
    max_ratio: float = Field(
        default=1.0, description="no module loses more than this fraction", gt=0, le=1, json_schema_extra=WHAT
    )
    min_width: int = Field(
        default=1, ge=1, le=LARGEST, description="neurons that every layer keeps at least", json_schema_extra=WHAT
    )
    drop_threshold: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="a module whose ratio reaches this is removed whole (default: none is)",
        json_schema_extra=WHAT,
    )
    compensate: Literal["none", "bias"] = Field(
        default="none",
        description="bias: the removed units' mean output stays, as a bias of the output projection",
        json_schema_extra=WHAT,
    )
    repair: Repairs | None = Field(
        default=None,
        description="least-squares: the kept columns of output projections are solved anew, so that outputs stay what "
        "they were; samples are then 32, of 512 tokens each (default: none)",
        json_schema_extra=REPAIR,
    )
    ridge: float | Literal["auto"] = Field(
        default="auto",
        description="of repair, relative to the mean diagonal; auto: the best of 1e-4 to 1e-1 on held-out samples",
        json_schema_extra=REPAIR | {"metavar": "auto|X"},
    )
    propagate: Propagate | None = Field(
        default=None,
        description="pruned: a sub-layer sees what the cuts before it have done; dense: it does not (default: pruned "
        "with repair, else dense)",
        json_schema_extra=REPAIR,
    )
    target: Literal["own", "dense"] = Field(
        default="own",
        description="what repair aims at: own, the sub-layer's own output on what it sees; dense, what the dense "
        "model's hidden state would need",
        json_schema_extra=REPAIR,
    )
    distill: int = Field(
        default=0,
        ge=0,
        le=1000,
        description="passes over the calibration text in which what stays of all repaired sub-layers learns together "
        "from the dense model's answers; the whole model is in memory then",
        json_schema_extra=REPAIR,
    )
    distill_calib: str | None = Field(
        default=None,
        description="text that distillation reads, named as calibration's is (default: the same text)",
        json_schema_extra=REPAIR,
    )
    distill_samples: int = Field(
        default=0,
        ge=0,
        le=LARGEST,
        description="samples that distillation reads; 0: as many as are for calibration",
        json_schema_extra=REPAIR,
    )
    rolls: int = Field(
        default=1,
        ge=1,
        le=10_000,
        description="random partitions that are tried in each layer; the one with the least error stays",
        json_schema_extra=HOW,
    )
    schedule: str = Field(
        default="linear",
        description="how ratios fall with transfer entropy: linear, softmax or rank",
        json_schema_extra=ENTROPY,
    )
    split: str = Field(
        default="share",
        description="how a block's ratio is split between attention and MLP: share, model or equal; "
        "module: no blocks, every module by its own transfer entropy",
        json_schema_extra=ENTROPY,
    )
    entropy_search: str = Field(
        default="independent",
        description="transfer entropy of each module by itself (independent) or greedy",
        json_schema_extra=ENTROPY,
    )
    entropy_at: str = Field(
        default="norm",
        description="entropy after the final norm (norm) or before it (hidden)",
        json_schema_extra=ENTROPY,
    )
    entropy_profile: str | None = Field(
        default=None,
        description="transfer entropy from this file of 'dicer entropy'; it is not measured then",
        json_schema_extra=ENTROPY,
    )
    layers: str = Field(
        default="all", description="'all', or indices and ranges as in 5,6,9-12 or 5-; -1 is the last layer"
    )
    width_multiple: int = Field(
        default=1, ge=1, le=LARGEST, description="round the kept width to a multiple of this", json_schema_extra=WHAT
    )
    stock: bool = Field(
        default=False,
        description="every layer keeps the same number, one that transformers' own class can have, so that what is "
        "written needs no code",
        json_schema_extra=WHAT,
    )
    family: str | None = Field(
        default=None,
        description="FILE.toml that says the model's structure, where it cannot be found ('dicer info MODEL "
        "--family-row' prints the form)",
        json_schema_extra=WHAT,
    )
    seed: int = Field(
        default=42, ge=0, lt=2**63, description="seed of random criteria and groupings", json_schema_extra=HOW
    )
    set: Settings = Field(
        default=(),
        description="NAME=VALUE: a parameter of the criterion, grouping or merge ('dicer methods' lists them)",
        json_schema_extra={**HOW, "metavar": "NAME=VALUE", "repeat": True},
    )
    text: Text = Field(default_factory=Text, description="what is read")
    _compute: Compute | None = PrivateAttr(default=None)

    @classmethod
    def keys(cls) -> Iterable[str]:
        """The fields as users spell them, those of the text among them."""
        return [*(name for name in cls.model_fields if name != "text"), *TEXT_KEYS]

    @classmethod
    def _prepared(cls, values: Any) -> Any:
        """Fields of the text may stand beside the recipe's own, as flags and TOML keys do; repair wants more of it."""
        values = cls._text_apart(values)
        if not isinstance(values, Mapping):
            return values
        preset, text = PRESETS.get(str(values.get("method"))), values.get("text", Text())
        repair = values.get("repair") or (preset.repair if preset else "none")
        if repair == "none" or not isinstance(text, Text | Mapping):
            return values
        text = Text(**text) if isinstance(text, Mapping) else text
        return {**values, "text": text.with_defaults(_FOR_REPAIR)}

    @classmethod
    def _text_apart(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or not (flat := {k: v for k, v in values.items() if k in TEXT_KEYS}):
            return values
        own = values.get("text", Text())
        own = Text(**own) if isinstance(own, Mapping) else own
        if not isinstance(own, Text):
            raise RecipeError(f"text: a dicer.Text is expected, got {own!r}.")
        text = own.model_dump(by_alias=True, exclude_unset=True)
        return {**{k: v for k, v in values.items() if k not in flat}, "text": Text(**{**text, **flat})}

    def __init__(self, **values: Any) -> None:
        machine = {name: values.pop(name) for name in COMPUTE_KEYS if name in values}
        super().__init__(**values)
        if machine:
            self._compute = Compute(**machine)
            warnings.warn(
                f"{', '.join(machine)}: no part of a recipe any more; give dicer.Compute({next(iter(machine))}=...) as "
                "compute= to what runs it.",
                DeprecationWarning,
                stacklevel=2,
            )

    def compute_or(self, compute: Compute | None) -> Compute:
        """Machine options: those that are given, else those that an old call put into the recipe, else the default."""
        return compute or self._compute or Compute()

    @property
    def lesson(self) -> Text | None:
        """What distillation reads, where that is another text, or more of it."""
        if not self.distill_calib and not self.distill_samples:
            return None
        return self.text.part(self.distill_calib or self.text.source, self.distill_samples or self.text.samples)

    @property
    def texts(self) -> tuple[Text, ...]:
        """Everything that is read."""
        return (self.text,) if self.lesson is None else (self.text, self.lesson)

    def files(self) -> list[str]:
        """What it may name on the disk: text, ratios, a profile, and the files of parts of one's own."""
        parts = (part.rpartition(":")[0] for part in (self.criterion, self.grouping, self.merge) if part)
        texts = (*sources_of(self.text.source), *sources_of(self.distill_calib or ""))
        named = (*texts, self.allocate, self.entropy_profile, self.family, *parts)
        return [name for name in named if name]

    def flat(self) -> dict[str, Any]:
        """Every value by the name that users spell; ``stock``, and ``set`` as a table, where they say something."""
        values = self.model_dump(exclude={"text", "set", *(() if self.stock else ("stock",))}) | self.text.flat()
        values = {name: value for name, value in values.items() if name not in _ADDED or value != _ADDED[name]}
        return {**values, **({"set": dict(self.set)} if self.set else {})}

    @field_validator("set", mode="before")
    @classmethod
    def _settings_apart(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            return tuple(value.items())
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list | tuple):
            raise RecipeError(f"set: a table of parameters or a list of NAME=VALUE is expected, got {value!r}.")
        return tuple(_setting(pair) if isinstance(pair, str) else pair for pair in value)

    @field_validator("ridge", mode="before")
    @classmethod
    def _ridge_read(cls, value: Any) -> Any:
        found = _number(value) if isinstance(value, str) else value
        good = isinstance(found, int | float) and not isinstance(found, bool) and 0 <= found < float("inf")
        if found != "auto" and not good:
            raise RecipeError(f"ridge is 'auto' or a number from 0 on; got {value!r}.")
        return found if found == "auto" else float(found)

    @field_validator("ratio")
    @classmethod
    def _ratio_inside(cls, value: float) -> float:
        if not 0.0 < value < 1.0:
            raise RecipeError(f"ratio must lie between 0 and 1, both excluded; got {value}.")
        return value

    @field_validator("method")
    @classmethod
    def _method_known(cls, value: str | None) -> str | None:
        if value is not None and value not in PRESETS:
            raise RecipeError(unknown("method", value, PRESETS))
        return value

    @field_validator("layers")
    @classmethod
    def _layers_readable(cls, value: str) -> str:
        layer_ranges(value)
        return value

    def resolve(self) -> Method:
        """Every choice made: the preset's parts, with the parts that were named on top.

        Without ``method``, naming any part starts from plain pruning (act-l2, no groups); naming none means rc-a.

        Raises:
            RecipeError: for a combination that has no meaning.
        """
        named = (self.criterion, self.activation, self.grouping, self.merge)
        plain = self.method is None and any(part is not None for part in named)
        base = PRESETS["act-l2" if plain else self.method or DEFAULT_METHOD]
        grouping = self.grouping or base.grouping
        merge = self.merge or base.merge
        usual = None if plain else base.activation
        if self.groups is not None and grouping != "random":
            raise RecipeError(f"--groups {self.groups} needs --grouping random, and the grouping is '{grouping}'.")
        if self.groups is not None and merge != "prune":
            raise RecipeError(
                f"--groups {self.groups} keeps several neurons of a group, which merge '{merge}' cannot do; "
                "use --merge prune, or leave --groups out."
            )
        axis = self.axis or base.axis
        ranked = "transfer-entropy" if axis == "block" else base.allocate
        how = (axis, self.allocate or ranked, self.ratio_of or base.ratio_of)
        parts = complete(self.criterion or base.criterion, self.activation, grouping, merge, usual)
        repair = self.repair or base.repair
        propagate: Propagate = self.propagate or ("dense" if repair == "none" else "pruned")
        method = Method(None, *parts, self.groups, *how, repair, propagate)
        _check_axis(self, method)
        _check_allocation(self, method)
        _check_repair(self, method)
        same = (name for name, preset in PRESETS.items() if is_preset(preset, method))
        none = (
            bool(self.groups or self.set or self.rolls > 1 or self.distill) or axis == "block"
        )  # nothing is scored where whole layers go
        return method._replace(preset=None if none else next(same, None))


def _check_repair(recipe: Recipe, method: Method) -> None:
    """Refuse options of repair where there is none, and rolls where nothing is rolled."""
    if method.axis == "block" and method.walks_alone:
        raise RecipeError("--axis block leaves whole layers as they are, so there is nothing to repair; leave it out.")
    for name in ("ridge", "target", "distill"):
        if method.repair == "none" and getattr(recipe, name) != Recipe.model_fields[name].default:
            raise RecipeError(f"--{name} {getattr(recipe, name)} needs --repair least-squares.")
    for name in ("distill_calib", "distill_samples"):
        if getattr(recipe, name) and not recipe.distill:
            raise RecipeError(f"--{name.replace('_', '-')} {getattr(recipe, name)} needs --distill.")
    if recipe.rolls > 1 and (method.grouping != "random" or method.merge != "prune"):
        raise RecipeError(
            f"--rolls {recipe.rolls} tries random partitions, which needs --grouping random and --merge prune; these "
            f"are '{method.grouping}' and '{method.merge}'."
        )


def _check_axis(recipe: Recipe, method: Method) -> None:
    """Refuse what an axis cannot do."""
    unable = next((AXES[axis] for axis in method.axes if not AXES[axis].can_merge), None)
    if unable is not None and method.merge != "prune":
        raise RecipeError(
            f"merge '{method.merge}' is for neurons, and --axis {method.axis} has {unable.units}, which stay or go; "
            "use --merge prune, or --axis mlp."
        )
    if method.axes and not any(AXES[axis].rounds_each_layer for axis in method.axes):
        for name in ("min_width", "width_multiple"):
            if getattr(recipe, name) != Recipe.model_fields[name].default:
                raise RecipeError(
                    f"--{name.replace('_', '-')} is for neurons and has no effect on --axis {method.axis}."
                )
    if method.axis != "block":
        return
    unread = (
        *("criterion", "activation", "grouping", "merge", "groups", "set", "schedule", "split"),
        *("drop_threshold", "max_ratio", "min_width", "width_multiple"),
    )
    named = [name for name in unread if getattr(recipe, name) != Recipe.model_fields[name].default]
    named += ["method"] if recipe.method not in (None, "let-llm") else []
    if named:
        flag = named[0].replace("_", "-")
        raise RecipeError(f"--axis block removes whole layers by transfer entropy, so --{flag} has no effect.")
    if method.allocate != "transfer-entropy":
        raise RecipeError(f"--axis block ranks layers by transfer entropy; --allocate {method.allocate} cannot.")
    if recipe.compensate == "bias":
        raise RecipeError("--axis block leaves no projection to put a bias on; leave --compensate out.")


# What transfer entropy leaves open, the default first; by_entropy.py and profile.py say what each means.
CHOICES: Mapping[str, tuple[str, ...]] = {
    "schedule": ("linear", "softmax", "rank"),
    "split": ("share", "model", "equal", "module"),
    "entropy_search": ("independent", "greedy"),
    "entropy_at": ("norm", "hidden"),
}


def _check_allocation(recipe: Recipe, method: Method) -> None:
    """Refuse an allocation that is not known, and options that it does not read."""
    if method.allocate not in ALLOCATIONS and not method.allocate.endswith(".json"):
        raise RecipeError(unknown("allocation", method.allocate, ALLOCATIONS))
    for name, known in CHOICES.items():
        value = getattr(recipe, name)
        if value not in known:
            raise RecipeError(unknown(name.replace("_", " "), value, known))
        if value != known[0] and method.allocate != "transfer-entropy":
            raise RecipeError(
                f"--{name.replace('_', '-')} {value} needs --allocate transfer-entropy, "
                f"and the allocation is '{method.allocate}'."
            )
    if recipe.entropy_profile is not None:
        if method.allocate != "transfer-entropy":
            raise RecipeError(
                f"--entropy-profile needs --allocate transfer-entropy, and the allocation is '{method.allocate}'."
            )
        if {"entropy_search", "entropy_at"} & recipe.model_fields_set:
            raise RecipeError(f"{recipe.entropy_profile} was measured already; leave the other --entropy flags out.")
    if recipe.split != "share" and method.axis != "all":
        raise RecipeError(f"--split {recipe.split} is between attention and MLP and needs --axis all.")
    if recipe.drop_threshold is not None and method.allocate not in ("transfer-entropy", "global"):
        raise RecipeError(
            f"--drop-threshold needs --allocate transfer-entropy or global, and the allocation is '{method.allocate}'."
        )
    if method.allocate.endswith(".json") and "ratio" in recipe.model_fields_set:
        raise RecipeError(f"{method.allocate} says the ratios; leave --ratio out.")
    if recipe.stock and method.axes and method.allocate != "uniform":
        raise RecipeError(
            f"--stock keeps the same number in every layer, and --allocate {method.allocate} does not: say --allocate "
            "uniform; 'dicer export OUT --to stock' pads layers that differ."
        )


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _setting(pair: str) -> tuple[str, Any]:
    """NAME=VALUE; a number or a truth value is one, whichever way it was typed."""
    name, equals, value = (part.strip() for part in pair.partition("="))
    if not (name and equals and value):
        raise RecipeError(f"--set {pair!r} cannot be read: write NAME=VALUE, as in --set linkage=average.")
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        found = value
    return name, found if isinstance(found, str | int | float | bool) or found is None else value
