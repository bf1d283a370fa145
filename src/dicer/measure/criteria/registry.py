"""The registry of criteria, and how a user's own file joins it."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from dicer.errors import DicerError, RecipeError, unknown
from dicer.measure.statistics import LayerStatistics
from dicer.model.units import UnitWeights

Score = Callable[[UnitWeights, LayerStatistics], Tensor]
CriterionNeed = Literal["square_sum", "sum", "gradient"]


@dataclass(frozen=True)
class Criterion:
    """A scoring function with what it needs and where it comes from.

    Attributes:
        name: what users type.
        score: (weights, statistics) -> [U], higher = keep.
        needs: statistics that must be collected: ``square_sum``, ``sum`` (of the recipe's activation), ``gradient``.
        source: paper and equation.
    """

    name: str
    score: Score
    needs: tuple[CriterionNeed, ...]
    source: str

    def __call__(self, weights: UnitWeights, statistics: LayerStatistics) -> Tensor:
        """Scores, float32 [U] on the CPU, checked.

        Raises:
            RecipeError: the function returned another shape, or a value that is not finite.
        """
        scores = self.score(weights, statistics)
        if not isinstance(scores, Tensor):
            raise RecipeError(f"criterion '{self.name}' returned {type(scores).__name__}, expected a tensor of scores.")
        scores = scores.detach().to("cpu", torch.float32)
        if scores.shape != (weights.units,):
            raise RecipeError(
                f"criterion '{self.name}' returned shape {tuple(scores.shape)}, expected one score for each of the "
                f"{weights.units} units: ({weights.units},)."
            )
        if not torch.isfinite(scores).all():
            raise RecipeError(
                f"criterion '{self.name}' returned {int((~torch.isfinite(scores)).sum())} scores that are not finite; "
                "if it is a built-in one, the model overflows on this text: try --dtype float32."
            )
        return scores


def criterion(name: str, *, needs: tuple[CriterionNeed, ...] = (), source: str) -> Callable[[Score], Criterion]:
    """Decorator that makes a scoring function a criterion.

    Args:
        name: what users type.
        needs: ``square_sum``, ``sum``, ``gradient``; empty for weights alone.
        source: paper and equation.
    """
    for need in needs:
        if need not in get_args(CriterionNeed):
            raise RecipeError(f"criterion '{name}': " + unknown("need", need, get_args(CriterionNeed)))
    return lambda score: Criterion(name, score, needs, source)


def find_criterion(name: str, registry: Mapping[str, Criterion]) -> Criterion:
    """A criterion by registry name, or ``FILE.py:NAME`` from the user's own file (which is run).

    Raises:
        RecipeError: no such name, file, or object in the file.
    """
    file, colon, attribute = name.rpartition(":")
    if not (colon and file.endswith(".py")):
        if name not in registry:
            raise RecipeError(unknown("criterion", name, registry) + " Your own: FILE.py:NAME.")
        return registry[name]
    path = Path(file)
    if not path.is_file():
        raise RecipeError(f"criterion file {path} does not exist.")
    private = "_dicer_criterion_" + hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]
    spec = importlib.util.spec_from_file_location(private, path)
    if spec is None or spec.loader is None:
        raise RecipeError(f"criterion file {path} cannot be imported.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a script that ends itself, too
        del sys.modules[spec.name]
        raise RecipeError(f"criterion file {path} cannot be run: {type(error).__name__}: {error}.") from error
    found = getattr(module, attribute, None)
    if not isinstance(found, Criterion):
        own = [key for key, value in vars(module).items() if isinstance(value, Criterion)]
        raise RecipeError(f"{path}: " + unknown("criterion", attribute, own) + " Mark it with @dicer.criterion(...).")
    return dataclasses.replace(found, score=_told(found))


def _told(own: Criterion) -> Score:
    """A user's score function whose exceptions say where they come from, in one line."""

    def score(weights: UnitWeights, statistics: LayerStatistics) -> Tensor:
        try:
            return own.score(weights, statistics)
        except (DicerError, torch.OutOfMemoryError):
            raise
        except (Exception, SystemExit) as error:
            raise RecipeError(f"criterion '{own.name}' failed: {type(error).__name__}: {error}.") from error

    return score
