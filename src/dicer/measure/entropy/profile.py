"""A transfer-entropy profile as a value and as JSON: how much the output's entropy hangs on each module of a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, field
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import ConfigDict, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from dicer.errors import RecipeError, unknown
from dicer.model.units import SubLayer
from dicer.reading import read_text, reason

At = Literal["norm", "hidden"]
Search = Literal["independent", "greedy"]

PLACES: Mapping[str, str] = {"norm": "behind the final norm", "hidden": "in front of the final norm"}
SEARCHES: Mapping[str, str] = {
    "independent": "each module bypassed alone",
    "greedy": "one module after the other, the earlier ones staying bypassed",
}
LISTS = ("blocks", "attention", "mlp")


def sub_layers(lists: Sequence[str], layers: int) -> list[SubLayer]:
    """What the chosen lists measure, in the order in which a model runs it."""
    return sorted({SubLayer(layer, name.removesuffix("s")) for name in lists for layer in range(layers)})


_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, config=_STRICT)
class Entry:
    """One module.

    Attributes:
        layer: which decoder layer it is, or lies in.
        te: transfer entropy, nats: |H of the model - H without the module|.
        entropy: H without the module (greedy: and without those that were picked before it), nats.
        pick: greedy only: which pick it was, from 0; blocks are picked apart from attention and MLP.
    """

    layer: int
    te: float
    entropy: float
    pick: int | None = None


@dataclass(frozen=True, config=_STRICT)
class Profile:
    """What was measured of a model; a list that was not asked for is empty.

    Attributes:
        entropy: H of the whole model, nats.
        search: ``independent`` or ``greedy``.
        at: ``norm`` or ``hidden``: which state is the final one.
        tokens: calibration tokens.
        channels: channels of the final hidden state.
        blocks: whole blocks, in layer order.
        attention: their attention.
        mlp: their MLPs.
        notes: what the user should know before she trusts the numbers.
        about: where they come from (model, calibration, versions), for people and for checks.
    """

    entropy: float
    search: Search
    at: At
    tokens: int
    channels: int
    blocks: tuple[Entry, ...] = ()
    attention: tuple[Entry, ...] = ()
    mlp: tuple[Entry, ...] = ()
    notes: tuple[str, ...] = ()
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def lists(self) -> dict[str, tuple[Entry, ...]]:
        """The lists that were measured, by name."""
        return {name: entries for name in LISTS if (entries := getattr(self, name))}

    def te_lists(self) -> dict[str, list[float]]:
        """The transfer entropies alone, by the name of their list, in layer order."""
        return {name: [entry.te for entry in entries] for name, entries in self.lists.items()}

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.tokens < 1 or self.channels < 1:
            raise RecipeError("tokens and channels must be at least 1")
        if not self.lists:
            raise RecipeError(f"none of the lists {', '.join(LISTS)} is there")
        for name, entries in self.lists.items():
            if [entry.layer for entry in entries] != list(range(len(entries))):
                raise RecipeError(f"{name}: the layers must be 0 to {len(entries) - 1}, in order")
            if any(entry.te < 0 for entry in entries):
                raise RecipeError(f"{name}: a transfer entropy cannot be negative")
        if len({len(entries) for entries in self.lists.values()}) > 1:
            raise RecipeError("the lists are of different lengths")
        for pool in (self.blocks, self.attention + self.mlp):
            picks = [entry.pick for entry in pool]
            if set(picks) != (set(range(len(pool))) if self.search == "greedy" else {None} if pool else set()):
                raise RecipeError(f"the picks do not fit to search '{self.search}'")
        return self

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the lists ``blocks``, ``attention`` and ``mlp``, as far as they were measured."""
        value = {name: content for name, content in asdict(self).items() if content != () and content != {}}
        for name in self.lists:
            value[name] = [{k: v for k, v in entry.items() if v is not None} for entry in value[name]]
        return value | {"notes": list(self.notes)}

    @classmethod
    def from_json(cls, value: object) -> Profile:
        """The profile that :meth:`to_json` wrote.

        Raises:
            RecipeError: one line for the first thing that is wrong.
        """
        # Through text: only there does strict pydantic take a list for a tuple.
        return _parse(json.dumps(value))


def read_profile(path: Path) -> Profile:
    """A profile from the file that ``dicer entropy`` wrote.

    Raises:
        RecipeError: the file cannot be read, or holds no profile; the line names it.
    """
    try:
        return _parse(read_text(path))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"entropy profile {path} cannot be read: {reason(error)}.") from None
    except RecipeError as error:
        raise RecipeError(f"entropy profile {path}: {error}") from None


def _parse(text: str) -> Profile:
    try:
        return TypeAdapter(Profile).validate_json(text)
    except ValidationError as error:
        raise RecipeError(_first_line(error)) from None
    except RecipeError as error:
        raise RecipeError(f"{error}.") from None


def _first_line(error: ValidationError) -> str:
    # A misspelt key is also a missing one, and the spelling is the better hint.
    first = min(error.errors(), key=lambda e: e["type"] != "unexpected_keyword_argument")
    *outer, name = map(str, first["loc"] or [""])
    if first["type"] == "json_invalid":
        return f"no JSON: {first['msg'].removeprefix('Invalid JSON: ')}."
    if first["type"] == "unexpected_keyword_argument":
        return unknown("key", name, (Entry if outer else Profile).__dataclass_fields__)
    if not first["loc"]:
        return "no JSON object with an entropy profile."
    where = ".".join([*outer, name])
    return (
        f"'{where}' is missing." if first["type"] == "missing" else f"{where}: {first['msg']}, got {first['input']!r}."
    )


def check_choices(lists: Sequence[str], search: str, at: str) -> None:
    """See to it that every choice has a known name.

    Raises:
        RecipeError: with the nearest name.
    """
    for kind, names, known in (
        ("list", lists, LISTS),
        ("search", [search], SEARCHES),
        ("place of the final state (at)", [at], PLACES),
    ):
        for name in names:
            if name not in known:
                raise RecipeError(unknown(kind, name, known))
    if not lists:
        raise RecipeError(f"nothing to measure: name at least one of the lists {', '.join(LISTS)}.")


def poor(tokens: int, channels: int, constant: int) -> tuple[str, ...]:
    """What makes an estimate of the entropy doubtful, as notes."""
    notes = []
    if tokens < channels:
        notes.append(
            f"{tokens:,} calibration tokens for {channels:,} channels: the entropy estimate is poor; use at least "
            f"{channels:,}"
        )
    if constant:
        notes.append(f"{constant} of {channels:,} channels of the final state are constant over all tokens")
    return tuple(notes)
