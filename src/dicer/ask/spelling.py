"""Flags and TOML files: one spelling for what is wanted, what is read and how it is computed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from pydantic.fields import FieldInfo

from dicer.ask.compute import COMPUTE_KEYS, Compute
from dicer.ask.recipe import Recipe
from dicer.ask.strict import given
from dicer.ask.text import Text
from dicer.errors import RecipeError, unknown
from dicer.reading import read_toml, reason

# Every flag and TOML key -> its field; the order is that of the help.
FIELDS: Mapping[str, FieldInfo] = MappingProxyType(
    {
        info.alias or name: info
        for kind in (Recipe, Text, Compute)
        for name, info in kind.model_fields.items()
        if info.annotation is not Text
    }
)


class Wanted(NamedTuple):
    """What flags or a file come to."""

    recipe: Recipe
    compute: Compute


def make_wanted(values: Mapping[str, Any]) -> Wanted:
    """What flags or a TOML table come to; None values are left to their defaults.

    Raises:
        RecipeError: one line for the first thing that is wrong.
    """
    for key in values:
        if key not in FIELDS:
            raise RecipeError(unknown("recipe key", key, FIELDS))
    recipe = Recipe(**given(values, (key for key in values if key not in COMPUTE_KEYS)))
    return Wanted(recipe, Compute(**given(values, COMPUTE_KEYS)))


def read_recipe(path: Path) -> dict[str, Any]:
    """The values of a recipe file, to be overridden by flags and given to :func:`make_wanted`.

    Raises:
        RecipeError: the file cannot be read, is no TOML, or has a key or value that no recipe has; the line names it.
    """
    try:
        values = read_toml(path)
        make_wanted(values)
    except (OSError, ValueError) as error:
        raise RecipeError(f"recipe {path} cannot be read: {reason(error)}.") from None
    except RecipeError as error:
        raise RecipeError(f"recipe {path}: {error}") from None
    return values
