"""What ``dicer_plan.json`` holds: the form that is held against whatever claims to be one."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, field_validator, model_validator

from dicer.ask.axes import AXES, kind_name

# 1 knew neurons alone, and of 1 and 2 the tensors had another name; all are still read. 4 is written where output
# projections were solved anew, and 5 where more has learned, so that a dicer that does not know that refuses it.
FORMAT, WITHOUT_LEARNED, WITHOUT_REPAIR = 5, 4, 3
TENSORS = "dicer_plan.tensors"  # no .safetensors beside the weights, which loaders take for more of them
_OLD_TENSORS = "dicer_plan.safetensors"


class Widths(BaseModel):
    """What the JSON file says of one sub-layer; the tensors must agree with it."""

    model_config = ConfigDict(strict=True)

    units: int = Field(ge=1)
    keep: int = Field(ge=0)
    repair: dict[str, Any] | None = None


class _Model(BaseModel):
    name: str
    model_type: str
    fingerprint: str


class _Allocation(BaseModel):
    """What is shown of an allocation: numbers, and what they are a fraction of."""

    model_config = ConfigDict(strict=True, extra="allow")

    target: int | FiniteFloat
    whole: Annotated[int | FiniteFloat, Field(gt=0)]


class PlanFile(BaseModel):
    """dicer_plan.json; more keys may stand beside."""

    format: Literal[1, 2, 3, 4, 5]
    model: _Model
    recipe: dict[str, Any]
    calibration: dict[str, Any]
    versions: dict[str, Any]
    axes: dict[str, dict[Annotated[str, Field(pattern="^[0-9]{1,6}$")], Widths]]
    blocks: list[Annotated[int, Field(strict=True, ge=0)]] = []
    allocation: _Allocation | None = None
    proof: list[dict[str, Any]] = []

    @property
    def tensors(self) -> str:
        """The name of the file beside it."""
        return TENSORS if self.format >= WITHOUT_REPAIR else _OLD_TENSORS

    @field_validator("allocation", mode="before")
    @classmethod
    def _none_is_none(cls, value: Any) -> Any:
        return None if value == {} else value

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if "method" not in self.recipe:
            raise ValueError("its recipe does not say 'method'")
        if self.allocation is not None and not isinstance(self.recipe.get("ratio_of"), str):
            raise ValueError("its recipe does not say 'ratio_of'")
        if self.blocks != sorted(set(self.blocks)):
            raise ValueError("'blocks' is no sorted list of layers")
        if not {kind_name(axis) for axis in self.axes} <= AXES.keys() or not (self.blocks or any(self.axes.values())):
            raise ValueError(f"its axes are {sorted(self.axes)}, expected layers of {' or '.join(AXES)}")
        if any(str(index) in layers for index in self.blocks for layers in self.axes.values()):
            raise ValueError("a layer that goes whole is also cut")
        return self


def first_fault(error: ValidationError) -> str:
    """What is wrong with a file, in a few words."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"'{where}' is missing"
    if where == "format":
        return f"it has format {first['input']!r:.60}, and this version of dicer reads 1 to {FORMAT}"
    reason = str(first["msg"]).removeprefix("Value error, ")
    return f"'{where}': {reason}, got {first['input']!r:.60}" if where else reason
