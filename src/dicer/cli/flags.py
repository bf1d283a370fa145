"""Recipe fields as flags of a command."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Annotated, Any, get_args

import typer

from dicer.ask.recipe import Recipe

Command = Callable[..., None]


def recipe_flags(fields: Collection[str] = tuple(Recipe.model_fields)) -> Callable[[Command], Command]:
    """Give a command one flag for each of these fields of Recipe; those that were typed arrive in ``flags``.

    Args:
        fields: names of fields; the flags come in the order of Recipe.
    """
    chosen = [name for name in Recipe.model_fields if name in fields]
    added = [_flag(name) for name in chosen]

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.name != "flags"]

        def run(**values: Any) -> None:
            flags = {name: values.pop(name) for name in chosen}
            command(**values, flags=flags)

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        keyword_only = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        run.__signature__ = signature.replace(parameters=[*keyword_only, *added])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in (*keyword_only, *added)}
        return run

    return decorate


def _flag(name: str) -> inspect.Parameter:
    field = Recipe.model_fields[name]
    kinds = (field.annotation, *get_args(field.annotation))
    kind: Any = next((t for t in (bool, int, float) if t in kinds), str)
    default = "" if field.default is None or kind is bool else f" [default: {field.default}]"
    text = f"{field.description}{default}"
    option = typer.Option("--" + name.replace("_", "-"), help=text, show_default=False, rich_help_panel="Recipe")
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )
