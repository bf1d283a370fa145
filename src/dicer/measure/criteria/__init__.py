"""Criteria: one score for each unit, higher = keep (docs/methods.md)."""

from collections.abc import Mapping
from types import MappingProxyType

from dicer.measure.criteria.activation import act_l2, act_mean
from dicer.measure.criteria.experts import frequency, reap
from dicer.measure.criteria.obs import leverage, obs
from dicer.measure.criteria.output import act_weight, cfsp, fluctuation, output_l2
from dicer.measure.criteria.random import random
from dicer.measure.criteria.registry import Criterion, criterion, find_criterion
from dicer.measure.criteria.taylor import taylor
from dicer.measure.criteria.weight import weight_l2
from dicer.measure.parts import registry

CRITERIA: Mapping[str, Criterion] = MappingProxyType(
    registry(
        (
            *(random, act_l2, act_mean, weight_l2, taylor, output_l2, act_weight, fluctuation, cfsp, leverage, obs),
            *(reap, frequency),
        )
    )
)

__all__ = ["CRITERIA", "Criterion", "criterion", "find_criterion"]
