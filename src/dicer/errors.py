"""What can go wrong, as one tree of exceptions.

DicerError              anything that a user can mend; the command line turns it into one line and exit code 2
├── RecipeError         what was asked for contradicts itself, the model, or the registries
├── ModelError          the model cannot be read, or is not what its config says
│   └── UnknownFamily   its structure cannot be found, or does not hold
├── CalibrationError    the text cannot be had, or gives not one sample
├── EvaluationError     a benchmark task, or the data that it needs, cannot be had
├── PlanError           the plan file is broken, or was made for another model
├── OutputError         the result cannot be written where it was asked for
└── ExperimentError     an experiment file, a record or a results folder is not what it should be

Every message says what was asked, what was found and what to do, in one line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_MOST, _NEAREST = 60, 6  # names in a message: all of a registry, and only the nearest of thousands


class DicerError(Exception):
    """Something that the user can mend; its text is one complete line."""


class RecipeError(DicerError):
    """What was asked for contradicts itself, the model, or the registries."""


class ModelError(DicerError):
    """The model cannot be read, or is not what its config says."""


class UnknownFamily(ModelError):  # noqa: N818 - reads as a sentence where it is raised
    """The structure of the model cannot be found, or what was found does not hold."""


class CalibrationError(DicerError):
    """The calibration text cannot be had, or gives not one sample."""


class EvaluationError(DicerError):
    """A benchmark task, or the data that it needs, cannot be had."""


class PlanError(DicerError):
    """The plan file is broken, or was made for another model."""


class OutputError(DicerError):
    """The result cannot be written where it was asked for."""


class ExperimentError(DicerError):
    """An experiment file, a record or a results folder is not what it should be."""


def unknown(kind: str, name: str, options: Iterable[str]) -> str:
    """The one line for a name that is in no registry: what was asked, the nearest name, all names (or the nearest)."""
    known = sorted(options)
    close = difflib.get_close_matches(name, known, n=_NEAREST, cutoff=0.5)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    if len(known) > _MOST and not close:
        return f"unknown {kind} '{name}', and none of the {len(known):,} that there are has a name like it."
    shown = known if len(known) <= _MOST else [*close, f"{len(known) - len(close):,} more"]
    return f"unknown {kind} '{name}'.{hint} Available: {', '.join(shown) or 'none'}."
