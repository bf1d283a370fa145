"""Fields of a model as flags of a command: said once, checked once, explained once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import NoneType
from typing import Annotated, Any, get_args

import typer
from pydantic.fields import FieldInfo

from dicer.ask.panels import PANELS
from dicer.ask.strict import Strict

Command = Callable[..., None]


def fields_of(model: type[Strict], *names: str) -> dict[str, FieldInfo]:
    """Some fields of a model by the names that users spell, in its order; all where none is named."""
    fields = {field.alias or name: field for name, field in model.model_fields.items()}
    return {name: field for name, field in fields.items() if not names or name in names}


def with_flags(fields: Mapping[str, FieldInfo], into: str = "flags") -> Callable[[Command], Command]:
    """Give a command a flag for each of these fields; it gets those that were typed as a dict.

    Of a field come the type and the help, its description. Its ``json_schema_extra`` may say more: ``panel`` (which box
    of the help it stands in), ``metavar`` (what stands for the value) and ``repeat`` (it is typed once for each value).

    Args:
        fields: flag, with underscores -> field.
        into: the argument of the command that takes the dict; decorators with different ones can be stacked.
    """
    added = [_flag(name, field) for name, field in fields.items()]

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        own = [p.replace(kind=p.KEYWORD_ONLY) for p in signature.parameters.values() if p.name != into]
        parameters = sorted((*own, *added), key=_panel)

        def run(**values: Any) -> None:
            typed = {name: values.pop(name) for name in fields}
            command(**values, **{into: {name: value for name, value in typed.items() if value not in (None, [])}})

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def _flag(name: str, field: FieldInfo) -> inspect.Parameter:
    more: Any = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    kinds = {*(get_args(field.annotation) or [field.annotation])} - {NoneType}
    kind: Any = kinds.pop() if kinds in ({bool}, {int}, {float}) else str
    default = "" if field.default in (None, "", (), {}) or kind is bool else f" (default: {field.default})"
    option = typer.Option(
        "--" + name.replace("_", "-"),
        help=f"{field.description}{default}",
        show_default=False,
        metavar="" if kind is bool else more.get("metavar"),
        rich_help_panel=more.get("panel"),
    )
    kind = list[kind] if more.get("repeat") else kind
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _panel(parameter: inspect.Parameter) -> int:
    """Where a parameter stands in the help: with its panel; without one, in front."""
    option = next(iter(getattr(parameter.annotation, "__metadata__", ())), None)
    panel = getattr(option, "rich_help_panel", None)
    return 0 if panel is None else 1 + PANELS.index(panel)
