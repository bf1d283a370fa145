"""What was asked for, as a file may hold it: every choice made, no path of this machine, files by their content."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from dicer.ask.compute import UNRECORDED, Compute
from dicer.ask.evaluation import Evaluation
from dicer.ask.methods import Method
from dicer.ask.recipe import Recipe
from dicer.ask.text import sources_of
from dicer.errors import RecipeError
from dicer.reading import open_plain, reason

_TEXTS = (".txt", ".text", ".md", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".gz")


def portable(recipe: Recipe, method: Method, compute: Compute) -> dict[str, Any]:
    """A recipe with the choices that it comes to and how it was computed; flat, under the names that users spell."""
    choices = method._asdict()
    named = {
        "criterion": _part(method.criterion),
        "grouping": _part(method.grouping),
        "merge": _part(method.merge),
        "allocate": _by_content(method.allocate) if method.from_file else method.allocate,
        "calib": ",".join(map(base_name, sources_of(recipe.text.source))),
    }
    if recipe.distill_calib:
        named["distill_calib"] = ",".join(map(base_name, sources_of(recipe.distill_calib)))
    if recipe.entropy_profile:
        named["entropy_profile"] = _by_content(recipe.entropy_profile)
    if recipe.family:
        named["family"] = _by_content(recipe.family)
    found = {**recipe.flat(), **compute.flat(), "method": choices.pop("preset"), **choices, **named}
    unsaid = UNRECORDED if method.walks_alone else (*UNRECORDED, "repair", "propagate")  # as it was recorded before
    return {name: value for name, value in found.items() if name not in unsaid}


def portable_evaluation(evaluation: Evaluation) -> dict[str, Any]:
    """An evaluation as JSON values; folders and texts by name, local texts also by content."""
    values = evaluation.record()
    if evaluation.perplexity:
        values["perplexity"] = portable_text(evaluation.perplexity)
    if evaluation.text:
        values["text"] = [portable_text(text) for text in evaluation.text]
    if evaluation.questions:
        values["questions"] = portable_text(evaluation.questions)
    return values


def portable_text(source: str) -> str:
    """A text (each of several) by its name, and where it is a file also by its content."""
    return ",".join(
        _by_content(one) if one.endswith(_TEXTS) and Path(one).is_file() else base_name(one)
        for one in sources_of(source)
    )


def base_name(source: str) -> str:
    """A text's name without the folder that it lies in; OWNER/NAME of the hub stays."""
    hub = source.count("/") < 2 and not source.startswith(("/", ".", "~")) and not source.endswith("/")
    if hub and not source.lower().endswith(_TEXTS):
        return source
    return Path(source).name or source


def _part(name: str) -> str:
    if ".py:" not in name:
        return name
    file, _, attribute = name.rpartition(":")
    return f"{Path(file).name}:{attribute} ({_digest(file)})"


def _by_content(file: str) -> str:
    return f"{Path(file).name} ({_digest(file)})"


def _digest(file: str) -> str:
    try:
        with open_plain(file) as content:
            return f"sha256 {hashlib.file_digest(content, 'sha256').hexdigest()[:16]}"
    except OSError as error:
        raise RecipeError(f"{file} cannot be read: {reason(error)}.") from None
