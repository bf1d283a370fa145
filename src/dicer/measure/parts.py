"""The parts that a method is made of - criteria, groupings, merges - all registered in the same way."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import inspect
import os
import sys
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError

from dicer.errors import DicerError, RecipeError, unknown

SUMS = ("square_sum", "sum", "gram", "channel_sum", "channel_square_sum", "channel_gram")  # over tokens
ROUTED = ("tokens", "routed_norm")  # of what tokens are sent to: experts
NEEDS = (*SUMS, *ROUTED, "gradient")


class Parameter(NamedTuple):
    """A part's own parameter: a keyword-only argument with a default.

    Attributes:
        default: its value where nothing is said.
        kind: its annotation, which values are converted to.
    """

    default: Any
    kind: Any

    def converted(self, value: Any) -> Any:
        """A value as its annotation says; raises pydantic's ValidationError."""
        adapter: TypeAdapter[Any] = TypeAdapter(self.kind)
        return adapter.validate_python(value)

    def __str__(self) -> str:
        return f"{getattr(self.kind, '__name__', self.kind)} = {self.default!r}"


@dataclass(frozen=True)
class Part:
    """A function with a name, what it needs, where it comes from, and its own parameters.

    Attributes:
        name: what users type.
        function: what it does.
        needs: statistics of a layer that must be collected for it, of the names in ``NEEDS``.
        source: paper and equation.
        link: where to read it; empty for one's own.
        settings: values of its parameters that are not the defaults.
    """

    what: ClassVar[str] = "part"

    name: str
    function: Callable[..., Any]
    needs: tuple[str, ...]
    source: str
    link: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def about(self) -> str:
        """The first line of its docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    @property
    def parameters(self) -> dict[str, Parameter]:
        """Its own parameters, from the signature of the function."""
        kinds = typing.get_type_hints(self.function)
        found = inspect.signature(self.function).parameters.values()
        return {
            p.name: Parameter(p.default, kinds.get(p.name, str))
            for p in found
            if p.kind is inspect.Parameter.KEYWORD_ONLY
        }

    def run(self, *arguments: Any) -> Any:
        """Call the function with the parameters that were set."""
        return self.function(*arguments, **self.settings)

    def refuse(self, why: str) -> RecipeError:
        """The error for a result that is not what this part has to give."""
        return RecipeError(f"{self.what} '{self.name}' {why}")


P = TypeVar("P", bound=Part)


def registered(
    kind: type[P], name: str, needs: tuple[str, ...], source: str, link: str, known: tuple[str, ...] = NEEDS
) -> Callable[[Callable[..., Any]], P]:
    """Decorator that makes a function a part.

    Raises:
        RecipeError: a need that nothing collects, or a parameter without a default.
    """
    for need in needs:
        if need not in known:
            raise RecipeError(f"{kind.what} '{name}': " + unknown("need", need, known))

    def make(function: Callable[..., Any]) -> P:
        part = kind(name, function, needs, source, link)
        for parameter, (default, _) in part.parameters.items():
            if default is inspect.Parameter.empty:
                raise RecipeError(f"{kind.what} '{name}': its parameter '{parameter}' has no default; give it one.")
        return part

    return make


def registry(parts: Iterable[P]) -> dict[str, P]:
    """Parts by their names."""
    return {part.name: part for part in parts}


def bind(parts: Iterable[Part], asked: Mapping[str, Any]) -> list[Any]:
    """Parts with the values that were asked for, converted as their signatures say.

    Args:
        parts: those of one method.
        asked: parameter -> value, as it was typed; ``part.parameter`` where two parts have one of that name.

    Raises:
        RecipeError: none of the parts has such a parameter, more than one has, or the value is of another kind.
    """
    found = list(parts)
    for name, value in asked.items():
        prefix, _, plain = name.rpartition(".")
        owners = [
            i for i, part in enumerate(found) if plain in part.parameters and prefix in ("", part.name, part.what)
        ]
        if not owners:
            known = [f"{part.what}.{own}" if prefix else own for part in found for own in part.parameters]
            raise RecipeError(f"--set {name}: " + unknown("parameter", name, known) + " 'dicer methods' lists them.")
        if len(owners) > 1:
            both = " or ".join(f"{found[i].what}.{plain}" for i in owners)
            raise RecipeError(f"--set {name}: more than one part has it; write {both}.")
        part = found[owners[0]]
        settings = {**part.settings, plain: _converted(part, name, value)}
        found[owners[0]] = dataclasses.replace(part, settings=settings)
    return found


def _converted(part: Part, name: str, value: Any) -> Any:
    try:
        return part.parameters[name.rpartition(".")[2]].converted(value)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise RecipeError(f"--set {name}: {part.what} '{part.name}': {reason}, got {value!r}.") from None


def find_part(kind: type[P], name: str, known: Mapping[str, P]) -> P:
    """A part by its name in a registry, or ``FILE.py:NAME`` from the user's own file (which is run).

    Raises:
        RecipeError: no such name, file, or object in the file.
    """
    file, colon, attribute = name.rpartition(":")
    if not (colon and file.endswith(".py")):
        if name not in known:
            raise RecipeError(unknown(kind.what, name, known) + " Your own: FILE.py:NAME.")
        return known[name]
    module = _run_file(kind.what, Path(file))
    found = getattr(module, attribute, None)
    if not isinstance(found, kind):
        own = [key for key, value in vars(module).items() if isinstance(value, kind)]
        raise RecipeError(f"{file}: " + unknown(kind.what, attribute, own) + f" Mark it with @dicer.{kind.what}(...).")
    return dataclasses.replace(found, function=_explained(found))


def _run_file(what: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise RecipeError(f"{what} file {path} does not exist.")
    private = f"_dicer_{what}_" + hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]
    spec = importlib.util.spec_from_file_location(private, path)
    if spec is None or spec.loader is None:
        raise RecipeError(f"{what} file {path} cannot be imported.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a script that ends itself, too
        del sys.modules[spec.name]
        raise RecipeError(f"{what} file {path} cannot be run: {type(error).__name__}: {error}.") from error
    return module


def _explained(own: Part) -> Callable[..., Any]:
    """A user's function whose exceptions say where they come from, in one line; its signature stays."""

    @functools.wraps(own.function)
    def run(*arguments: Any, **settings: Any) -> Any:
        try:
            return own.function(*arguments, **settings)
        except (DicerError, torch.OutOfMemoryError):
            raise
        except (Exception, SystemExit) as error:
            raise own.refuse(f"failed: {type(error).__name__}: {error}.") from error

    return run
