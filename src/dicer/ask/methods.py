"""Methods by name: what a preset is made of, and the choices that a recipe comes to."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

from dicer.ask.axes import CHOSEN

Activation = Literal["pre", "post", "mod"]
AxisName = Literal["mlp", "attention", "experts", "block", "all"]
RatioOf = Literal["chosen", "mlp", "decoder", "model"]
Repairs = Literal["none", "least-squares"]
Propagate = Literal["dense", "pruned"]
DEFAULT_METHOD = "rc-a"
XU_2025 = "https://openreview.net/forum?id=YncWrbIxnN"
ALLOCATIONS: Mapping[str, str] = MappingProxyType(
    {
        "uniform": "the same ratio in every layer (Xu et al. 2025, 3)",
        "transfer-entropy": "less where the output's entropy depends more on a module (Yang et al. 2025, algorithm 1)",
        "global": "all units ranked together by z-score within their module (AL-AM of FLAP, An et al. 2024)",
        "cosine": "less where a layer turns the hidden state more, from 0.5 to 1.5 of the mean (as in FANG, 2026)",
        "FILE.json": "ratios of your own for each axis and layer (docs/what-to-prune.md)",
    }
)


# The activation that a criterion reads where none is named; of the others it is post, as in Xu et al. These weigh an
# activation by the weights that read it, so they mean the one that is read.
READS: Mapping[str, Activation] = MappingProxyType(
    dict.fromkeys(("output-l2", "act-weight", "fluctuation", "cfsp", "leverage", "obs"), "mod")
)


class Preset(NamedTuple):
    """A method of a paper: criterion x grouping x merge (docs/methods.md), and what it prunes how much."""

    criterion: str
    activation: Activation | None
    grouping: str
    merge: str
    seed_code_name: str
    paper: str
    axis: AxisName = "mlp"
    allocate: str = "uniform"
    ratio_of: RatioOf = "chosen"
    repair: Repairs = "none"


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "random": Preset("random", None, "none", "prune", "random-prune", "Table 1"),
        "act-l2": Preset("act-l2", "post", "none", "prune", "squared-magnitude", "Table 1"),
        "act-mean": Preset("act-mean", "post", "none", "prune", "", "Tables 1, 3, 8"),
        "weight-l2": Preset("weight-l2", None, "none", "prune", "weight-l2", "Table 1"),
        "taylor": Preset("taylor", None, "none", "prune", "gradient-magnitude", "Table 1"),
        "rc-a": Preset("act-l2", "post", "random", "prune", "random-merge, --apply-mode prune", "Tables 1, 4, 5"),
        "sim-a": Preset("act-l2", "mod", "similarity", "prune", "activation-merge, --apply-mode prune", "Table 2"),
        "sim-a-post": Preset(
            "act-l2", "post", "similarity", "prune", "post-activation-merge, --apply-mode prune", "Table 9"
        ),
        "sim-mean": Preset("act-l2", "mod", "similarity", "mean", "activation-merge, --apply-mode mean", "Table 2"),
        "sim-dominant": Preset(
            "act-l2", "mod", "similarity", "dominant", "activation-merge, --apply-mode dominant", "Table 2"
        ),
        "let-llm": Preset(
            "output-l2", "mod", "none", "prune", "", "Yang et al. 2025", "all", "transfer-entropy", "decoder"
        ),
        "best": Preset(
            *("obs", "mod", "none", "prune", "", "least-squares repair, ratios by cosine: docs/results/quality"),
            allocate="cosine",
            repair="least-squares",
        ),
    }
)


class Method(NamedTuple):
    """What a recipe comes to: every choice made.

    Attributes:
        preset: the preset that these parts make up, or None.
        criterion: a registry name, or ``file.py:name``.
        activation: what activation criteria read.
        grouping: how neurons are put together.
        grouped_by: the activation whose vectors similarity clusters; None for other groupings.
        merge: what a group leaves.
        groups: number of groups C; None means one group for each kept neuron (C = K).
        axis: what is pruned.
        allocate: how the ratio is shared out over layers and modules.
        ratio_of: what the ratio is a fraction of.
        repair: whether output projections are solved anew.
        propagate: whose hidden states a sub-layer sees: the dense model's, or those that the cuts before it left.
    """

    preset: str | None
    criterion: str
    activation: Activation
    grouping: str
    grouped_by: Activation | None
    merge: str
    groups: int | None
    axis: AxisName = "mlp"
    allocate: str = "uniform"
    ratio_of: RatioOf = "chosen"
    repair: Repairs = "none"
    propagate: Propagate = "dense"

    @property
    def walks_alone(self) -> bool:
        """Whether its walk over the layers serves no other method: what it cuts changes what comes behind."""
        return self.repair != "none" or self.propagate == "pruned"

    @property
    def from_file(self) -> bool:
        """Whether the ratios are the user's own."""
        return self.allocate.endswith(".json")

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes whose units are scored; none where whole blocks go."""
        return CHOSEN[self.axis]


def is_preset(preset: Preset, method: Method) -> bool:
    """Whether a method is a preset; how much goes of what is a part only of those presets that say it."""
    if complete(preset.criterion, preset.activation, preset.grouping, preset.merge) != method[1:6]:
        return False
    if preset.repair != method.repair or (method.propagate == "pruned") != (preset.repair != "none"):
        return False
    return preset[6:9] in ((method.axis, method.allocate, method.ratio_of), ("mlp", "uniform", "chosen"))


def complete(
    criterion: str, activation: Activation | None, grouping: str, merge: str, usual: Activation | None = None
) -> tuple[str, Activation, str, Activation | None, str]:
    """The parts with their activations: the one that is named, else the criterion's own, else a preset's usual one."""
    grouped_by = (activation or usual or "mod") if grouping == "similarity" else None
    return criterion, activation or READS.get(criterion) or usual or "post", grouping, grouped_by, merge
