"""The base of what users write down: fields that are checked, and the first fault as one line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator

from dicer.errors import RecipeError, unknown

LARGEST = 2**24  # of a number that something is made of: samples, tokens, windows; no machine has more in memory


class Strict(BaseModel):
    """A value that does not change, knows no other fields than its own, and takes no text for a number."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True, validate_by_name=True)
    kind: ClassVar[str] = "recipe key"  # what an unknown field is called

    @model_validator(mode="wrap")
    @classmethod
    def _one_line(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(cls._prepared(values))
        except ValidationError as error:
            raise RecipeError(first_line(error, cls.kind, cls.keys())) from None

    @classmethod
    def _prepared(cls, values: Any) -> Any:
        """What is validated, from what was given."""
        return values

    @classmethod
    def keys(cls) -> Iterable[str]:
        """The fields as users spell them: flags without dashes, keys of a TOML file, arguments in Python."""
        return [info.alias or name for name, info in cls.model_fields.items()]

    def flat(self) -> dict[str, Any]:
        """Every value by the name that users spell."""
        return self.model_dump(by_alias=True)


def first_line(error: ValidationError, kind: str, fields: Iterable[str]) -> str:
    """The first thing that is wrong, as one line; ``kind`` is what an unknown field is called."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return unknown(kind, field, fields)
    return f"{field}: {first['msg']}, got {first['input']!r}."


def given(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Those of some names that have a value; None is none."""
    return {name: values[name] for name in names if values.get(name) is not None}
