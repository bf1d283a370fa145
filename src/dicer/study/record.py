"""What a record must hold for its readers: tables and figures find every key, and a value of the right kind there."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

_Number = float | Literal["inf", "-inf", "nan"]  # as :func:`dicer.files.finite` writes them
_Index = Annotated[str, Field(pattern="^[0-9]{1,6}$")]  # of a layer
_Units = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    """What the readers of records rely on; more keys may stand beside."""

    model_config = ConfigDict(strict=True, extra="allow")


class _Model(_Part):
    name: str
    fingerprint: str


class _Evaluation(_Part):
    protocol: str | None = None
    tasks: list[str] = []
    task_prefix: str = ""
    limit: int | None = None
    limits: dict[str, int] = {}


class _Record(_Part):
    """Every record."""

    format: Literal[1]
    id: str
    status: Literal["done", "failed"]
    method: str = Field(pattern=r"^[^$\s/]+$")  # a folder's name, and text in figures, where $ begins a formula
    text: str
    model: _Model
    recipe: dict[str, Any]
    evaluation: _Evaluation
    environment: dict[str, Any]
    versions: dict[str, Any]
    git: str | None
    computed_on: str | None = None


class _Failed(_Part):
    error: str


class _Value(_Part):
    value: _Number


class _Entry(_Part):
    metrics: dict[str, _Value]


class _Window(_Part):
    window: int
    value: _Number


class _Perplexity(_Part):
    text: str
    window: int
    value: _Number
    also: _Window | None = None


class _Metrics(_Part):
    summary: dict[str, _Number | None] = {}
    tasks: dict[str, _Entry] = {}
    groups: dict[str, _Entry] = {}
    perplexity: _Perplexity | None = None


class _Memory(_Part):
    score: dict[str, FiniteFloat] = {}


class _Done(_Part):
    """What was measured."""

    metrics: _Metrics
    seconds: dict[str, FiniteFloat]
    memory: _Memory


class _Recipe(_Part):
    ratio: float = Field(ge=0, le=1)
    seed: int
    samples: int
    seq_len: int
    dtype: str
    layers: str = "all"
    axis: str | None = None
    ratio_of: str = "chosen"
    calib: str | None = None
    calib_config: str | None = None
    calib_split: str | None = None
    calib_field: str | None = None


class _Sides(_Part):
    kept: _Number
    dropped: _Number


class _Layer(_Part):
    units: int
    keep: str
    norm: _Sides | None = None

    @model_validator(mode="after")
    def _one_bit_a_unit(self) -> _Layer:
        if len(base64.b64decode(self.keep, validate=True)) != -(-self.units // 8):
            raise ValueError("keep must have one bit for each unit")
        return self


class _Kept(_Part):
    attention: dict[_Index, tuple[_Units, _Units]] = {}
    mlp: dict[_Index, tuple[_Units, _Units]] = {}
    blocks: list[int] = []

    @model_validator(mode="after")
    def _kept_of_units(self) -> _Kept:
        if any(not kept <= units > 0 for layers in (self.attention, self.mlp) for units, kept in layers.values()):
            raise ValueError("more is kept than there is")
        return self


class _Allocation(_Part):
    transfer_entropy: dict[str, list[_Number]] = {}


class _Pruned(_Part):
    """What was cut, of a run that is done."""

    recipe: _Recipe
    layers: dict[_Index, _Layer]
    kept: _Kept = _Kept()
    allocation: _Allocation = _Allocation()


def validate(text: bytes) -> None:
    """Hold a record's JSON against all that it needs: more where the run is done, and more where it pruned.

    Raises:
        pydantic.ValidationError: with the place of the first fault.
    """
    record = _Record.model_validate_json(text)
    pruned = (_Pruned,) if record.method != "original" else ()
    for part in (_Done, *pruned) if record.status == "done" else (_Failed,):
        part.model_validate_json(text)
