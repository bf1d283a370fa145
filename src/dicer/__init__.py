"""dicer: structured pruning of language models, to checkpoints that simply load.

Importing this package is cheap: torch and transformers are imported when something is used. As soon as transformers is
imported, by whomever, its auto classes learn to load checkpoints whose widths differ, without a flag.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from dicer.ask.compute import Compute as Compute
    from dicer.ask.evaluation import Evaluation as Evaluation
    from dicer.ask.recipe import Recipe as Recipe
    from dicer.ask.text import Text as Text
    from dicer.decide.grouping import GROUPINGS as GROUPINGS
    from dicer.decide.grouping import grouping as grouping
    from dicer.decide.merging import MERGES as MERGES
    from dicer.decide.merging import Survivors as Survivors
    from dicer.decide.merging import merge as merge
    from dicer.decide.plan import Merge as Merge
    from dicer.decide.plan import PrunePlan as PrunePlan
    from dicer.decide.plan import load_plan as load_plan
    from dicer.errors import DicerError as DicerError
    from dicer.evaluate.quality import perplexity as perplexity
    from dicer.evaluate.speed import bench as bench
    from dicer.measure.criteria import CRITERIA as CRITERIA
    from dicer.measure.criteria import Criterion as Criterion
    from dicer.measure.criteria import criterion as criterion
    from dicer.measure.statistics import LayerStatistics as LayerStatistics
    from dicer.model.units import UnitWeights as UnitWeights
    from dicer.pipeline import Result as Result
    from dicer.pipeline import apply_plan as apply_plan
    from dicer.pipeline import load as load
    from dicer.pipeline import make_plan as make_plan
    from dicer.pipeline import prune as prune
    from dicer.preflight import look as look

_WHERE = {
    "CRITERIA": "measure.criteria",
    "Criterion": "measure.criteria",
    "criterion": "measure.criteria",
    "DicerError": "errors",
    "perplexity": "evaluate.quality",
    "UnitWeights": "model.units",
    "LayerStatistics": "measure.statistics",
    "Result": "pipeline",
    "apply_plan": "pipeline",
    "load": "pipeline",
    "make_plan": "pipeline",
    "prune": "pipeline",
    "PrunePlan": "decide.plan",
    "load_plan": "decide.plan",
    "Evaluation": "ask.evaluation",
    "Recipe": "ask.recipe",
    "Compute": "ask.compute",
    "Text": "ask.text",
    "GROUPINGS": "decide.grouping",
    "MERGES": "decide.merging",
    "Merge": "decide.plan",
    "Survivors": "decide.merging",
    "grouping": "decide.grouping",
    "merge": "decide.merging",
    "look": "preflight",
    "bench": "evaluate.speed",
}

__all__ = [*_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'dicer' has no attribute '{name}'")
    return getattr(importlib.import_module(f"dicer.{_WHERE[name]}"), name)


def _register(_: Any) -> None:
    importlib.import_module("dicer.write.export.registration").register()


# Not on the auto classes' own module: transformers imports that one half-way through others, too early to add to it.
wrapt.register_post_import_hook(_register, "transformers")
