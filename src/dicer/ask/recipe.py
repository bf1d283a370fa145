"""What the user asks, validated: Recipe, the presets of the paper, layer lists, and their TOML form."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dicer.ask.methods import (
    ALLOCATIONS,
    DEFAULT_METHOD,
    PRESETS,
    Activation,
    AxisName,
    Method,
    RatioOf,
    complete,
    is_preset,
)
from dicer.errors import RecipeError, unknown


class Recipe(BaseModel):
    """Everything that decides the result, in one value; every field is also a flag and a TOML key."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)

    method: str | None = Field(
        default=None, description="preset of the paper; 'dicer methods' lists them (default: rc-a)"
    )
    criterion: str | None = Field(default=None, description="criterion by name, or FILE.py:NAME for your own")
    activation: Activation | None = Field(default=None, description="which activation is read: pre, post or mod")
    grouping: str | None = Field(default=None, description="none, random or similarity")
    merge: str | None = Field(default=None, description="what a group leaves: prune, mean or dominant")
    groups: int | None = Field(
        default=None, ge=1, description="random groups C that keep K/C neurons each (default: C = K)"
    )
    axis: AxisName | None = Field(
        default=None,
        description="what is pruned: mlp (neurons), attention (heads; key-value heads with all their query heads), "
        "all (both), block (whole layers) (default: mlp)",
    )
    ratio: float = Field(default=0.25, description="fraction of the parameters that goes, in (0, 1)")
    ratio_of: RatioOf | None = Field(
        default=None,
        description="fraction of what: chosen (the units of the chosen axis and layers), or all of the mlp, decoder "
        "or model (default: chosen)",
    )
    allocate: str | None = Field(
        default=None,
        description="how the ratio is shared out: uniform, transfer-entropy, global, or FILE.json (default: uniform)",
    )
    max_ratio: float = Field(default=1.0, description="no module loses more than this fraction", gt=0, le=1)
    min_width: int = Field(default=1, ge=1, description="neurons that every layer keeps at least")
    drop_threshold: float | None = Field(
        default=None, gt=0, le=1, description="a module whose ratio reaches this is removed whole (default: none is)"
    )
    compensate: Literal["none", "bias"] = Field(
        default="none", description="bias: the removed units' mean output stays, as a bias of the output projection"
    )
    schedule: str = Field(
        default="linear", description="how ratios fall with transfer entropy: linear, softmax or rank"
    )
    split: str = Field(
        default="share",
        description="how a block's ratio is split between attention and MLP: share, model or equal; "
        "module: no blocks, every module by its own transfer entropy",
    )
    entropy_search: str = Field(
        default="independent", description="transfer entropy of each module by itself (independent) or greedy"
    )
    entropy_at: str = Field(default="norm", description="entropy after the final norm (norm) or before it (hidden)")
    entropy_profile: str | None = Field(
        default=None, description="transfer entropy from this file of 'dicer entropy'; it is not measured then"
    )
    layers: str = Field(
        default="all", description="'all', or indices and ranges as in 5,6,9-12 or 5-; -1 is the last layer"
    )
    width_multiple: int = Field(default=1, ge=1, description="round the kept width to a multiple of this")
    calib: str = Field(
        default="builtin", description="builtin, bookcorpus, c4, wikitext2, OWNER/NAME, or a .txt/.jsonl(.gz)"
    )
    calib_config: str | None = Field(default=None, description="configuration of the hub data set OWNER/NAME")
    calib_split: str = Field(default="train", description="split of the hub data set OWNER/NAME")
    calib_field: str = Field(default="text", description="text field of the hub data set or of the .jsonl file")
    samples: int = Field(default=10, ge=1, description="calibration samples")
    seq_len: int = Field(default=128, ge=2, description="tokens in a sample")
    calib_seed: int = Field(
        default=42, ge=0, lt=2**63, description="seed of the choice of calibration samples, apart from --seed"
    )
    seed: int = Field(default=42, ge=0, lt=2**63, description="seed of random criteria and groupings")
    batch_size: int | None = Field(
        default=None, ge=1, description="samples in a forward pass (default: 4,096 tokens' worth)"
    )
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1, mps ...")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="dtype that calibration computes in (auto: the checkpoint's own, which the output keeps)",
    )
    gradient_checkpointing: bool = Field(default=False, description="taylor only: less memory, one more forward pass")

    @model_validator(mode="wrap")
    @classmethod
    def _one_line(cls, values: Any, handler: Callable[[Any], Recipe]) -> Recipe:
        try:
            return handler(values)
        except ValidationError as error:
            raise RecipeError(first_line(error, "recipe key", Recipe.model_fields)) from None

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
        _layer_ranges(value)
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
        preset_activation = None if plain else base.activation
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
        parts = complete(self.criterion or base.criterion, self.activation or preset_activation, grouping, merge)
        method = Method(None, *parts, self.groups, *how)
        _check_axis(self, method)
        _check_allocation(self, method)
        same = (name for name, preset in PRESETS.items() if is_preset(preset, method))
        none = self.groups is not None or axis == "block"  # nothing is scored where whole layers go
        return method._replace(preset=None if none else next(same, None))


def _check_axis(recipe: Recipe, method: Method) -> None:
    """Refuse what an axis cannot do."""
    if "attention" in method.axes and method.merge != "prune":
        raise RecipeError(
            f"merge '{method.merge}' is for neurons, and --axis {method.axis} has heads, which stay or go; "
            "use --merge prune, or --axis mlp."
        )
    if method.axis == "attention":
        for name in ("min_width", "width_multiple"):
            if getattr(recipe, name) != Recipe.model_fields[name].default:
                raise RecipeError(f"--{name.replace('_', '-')} is for neurons and has no effect on --axis attention.")
    if method.axis != "block":
        return
    unread = (
        *("criterion", "activation", "grouping", "merge", "groups", "schedule", "split"),
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


# What transfer entropy leaves open, the default first; ratios.py and profile.py say what each means.
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


def make_recipe(values: Mapping[str, Any]) -> Recipe:
    """A Recipe from flags or a TOML table; None values are left to their defaults.

    Raises:
        RecipeError: one line for the first thing that is wrong.
    """
    return Recipe(**{key: value for key, value in values.items() if value is not None})


def read_recipe(path: Path) -> dict[str, Any]:
    """The values of a recipe file, to be overridden by flags and given to :func:`make_recipe`.

    Raises:
        RecipeError: the file cannot be read, is no TOML, or has a key or value that no recipe has; the line names it.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RecipeError(f"recipe {path} cannot be read: {reason}.") from None
    for key in values:
        if key not in Recipe.model_fields:
            raise RecipeError(f"recipe {path}: " + unknown("key", key, Recipe.model_fields))
    try:
        make_recipe(values)
    except RecipeError as error:
        raise RecipeError(f"recipe {path}: {error}") from None
    return values


def select_layers(text: str, count: int) -> list[int]:
    """The layer indices that ``--layers`` names, sorted, each once.

    Args:
        text: as in ``5-26``, ``5,6,9-12``, ``all``, ``5-`` (to the last), ``-4--1``; ranges include both ends.
        count: how many layers the model has.

    Raises:
        RecipeError: a layer that does not exist, or a range that runs backwards.
    """
    if text.strip() == "all":
        return list(range(count))
    chosen: set[int] = set()
    for first, last in _layer_ranges(text):
        ends = []
        for index in (first, last):
            if not -count <= index < count:
                raise RecipeError(f"layer {index} does not exist: the model has layers 0 to {count - 1}.")
            ends.append(index % count)
        if ends[0] > ends[1]:
            raise RecipeError(f"layer range '{first}-{last}' runs backwards (layers {ends[0]} to {ends[1]}).")
        chosen.update(range(ends[0], ends[1] + 1))
    return sorted(chosen)


def _layer_ranges(text: str) -> list[tuple[int, int]]:
    if text.strip() == "all":
        return []
    ranges = []
    for piece in text.split(","):
        match = re.fullmatch(r"\s*(-?\d{1,6})(-(-?\d{1,6})?)?\s*", piece)
        if match is None:
            raise RecipeError(
                f"layers '{text}' cannot be read at '{piece}'; write 'all', or as in 5,6,9-12,15- or -4--1."
            )
        last = match[3] or "-1" if match[2] else match[1]
        ranges.append((int(match[1]), int(last)))
    return ranges


def first_line(error: ValidationError, kind: str, fields: Iterable[str]) -> str:
    """The first thing that is wrong, as one line; ``kind`` is what an unknown field is called."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return unknown(kind, field, fields)
    return f"{field}: {first['msg']}, got {first['input']!r}."
