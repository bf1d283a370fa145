"""The tables of Xu et al. 2025, *The Surprising Effectiveness of Randomness in LLM Pruning*: form and figures."""

from __future__ import annotations

from typing import NamedTuple

PERPLEXITY = "perplexity"
TITLES = {
    PERPLEXITY: "Perplexity",
    "arc_challenge": "ARC-c",
    "arc_easy": "ARC-e",
    "hellaswag": "HellaSwag",
    "mmlu": "MMLU",
    "openbookqa": "OpenBookQA",
    "winogrande": "Winogrande",
    "average": "Average",
}
SHORT = (PERPLEXITY, "mmlu", "average")
TASKS = tuple(name for name in TITLES if name != "average")
ACCURACIES = TASKS[1:]
FULL = tuple(TITLES)
QWEN, LLAMA = "Qwen2.5-7B-Instruct", "Llama-3.1-8B-Instruct"


class PaperRow(NamedTuple):
    """One row.

    Attributes:
        title: as printed.
        method: whose runs it shows.
        figures: fraction removed -> the paper's figures, in the order of the columns.
        seed: of the run; None for the mean over all seeds.
        text: what the calibration text is called; None for the setting's own.
    """

    title: str
    method: str
    figures: dict[float, tuple[float, ...]]
    seed: int | None = None
    text: str | None = None


class PaperTable(NamedTuple):
    """One table.

    Attributes:
        number: in the paper.
        caption: shortened, without the model's name.
        model: the model that the figures are of.
        columns: keys of TITLES.
        rows: in the paper's order.
    """

    number: int
    caption: str
    model: str
    columns: tuple[str, ...]
    rows: tuple[PaperRow, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        """Fractions removed, in the paper's order."""
        return tuple(dict.fromkeys(ratio for row in self.rows for ratio in row.figures))

    @property
    def texts(self) -> frozenset[str]:
        """The calibration texts that its rows name, if they do."""
        return frozenset(row.text for row in self.rows if row.text)


def _pair(at_25: tuple[float, ...], at_50: tuple[float, ...]) -> dict[float, tuple[float, ...]]:
    return {0.25: at_25, 0.5: at_50}


_QWEN = (9.589, 0.526, 0.819, 0.620, 0.718, 0.348, 0.702, 0.622)
# Table 8 prints 0.629 for HellaSwag of the original model at 50%, and 0.620 everywhere else.
_QWEN_50 = (9.589, 0.526, 0.819, 0.629, 0.718, 0.348, 0.702, 0.622)
_LLAMA = (8.641, 0.520, 0.819, 0.591, 0.680, 0.336, 0.743, 0.615)
_RC_A = _pair((14.944, 0.618, 0.524), (34.204, 0.455, 0.396))
_RC_A_25 = (14.944, 0.397, 0.681, 0.510, 0.618, 0.288, 0.650, 0.524)
_RC_A_50 = (34.204, 0.265, 0.488, 0.381, 0.455, 0.220, 0.567, 0.396)
_MEAN_25 = (15.995, 0.357, 0.654, 0.504, 0.587, 0.266, 0.601, 0.495)
_MEAN_C4_25 = (15.944, 0.352, 0.657, 0.505, 0.567, 0.244, 0.610, 0.489)

_TABLE_1 = PaperTable(
    1,
    "Pruning methods",
    QWEN,
    SHORT,
    (
        PaperRow("Original", "original", _pair((9.589, 0.718, 0.622), (9.589, 0.718, 0.622))),
        PaperRow("Taylor", "taylor", _pair((15.244, 0.607, 0.504), (31.839, 0.476, 0.394))),
        PaperRow("Random Prune", "random", _pair((15.382, 0.601, 0.529), (71.295, 0.442, 0.382))),
        PaperRow("RC+A", "rc-a", _RC_A),
        PaperRow("Activation Mean", "act-mean", _pair((15.995, 0.587, 0.495), (56.585, 0.401, 0.362))),
        PaperRow("Activation L2", "act-l2", _pair((17.159, 0.614, 0.511), (42.404, 0.462, 0.391))),
        PaperRow("Weight L2", "weight-l2", _pair((485.878, 0.435, 0.427), (190214.389, 0.251, 0.287))),
    ),
)
_TABLE_2 = PaperTable(
    2,
    "Similarity clustering against RC+A",
    QWEN,
    SHORT,
    (
        PaperRow("RC+A", "rc-a", _RC_A),
        PaperRow("Similarity Cluster + Activation L2", "sim-a", _pair((16.930, 0.607, 0.516), (49.134, 0.424, 0.395))),
        PaperRow("Similarity Cluster + Mean Merge", "sim-mean", _pair((91.430, 0.497, 0.454), (15838.9, 0.266, 0.312))),
        PaperRow(
            "Similarity Cluster + Dominant Merge",
            "sim-dominant",
            _pair((20.241, 0.562, 0.485), (72.560, 0.346, 0.335)),
        ),
    ),
)
_TABLE_3 = PaperTable(
    3,
    "Effect of calibration data",
    QWEN,
    TASKS,
    (
        PaperRow("Activation Mean (BookCorpus)", "act-mean", {0.25: _MEAN_25[:-1]}, text="bookcorpus"),
        PaperRow("Activation Mean (C4)", "act-mean", {0.25: _MEAN_C4_25[:-1]}, text="c4"),
    ),
)
_TABLE_4 = PaperTable(
    4,
    "Effect of the seed on RC+A",
    QWEN,
    FULL,
    (
        PaperRow("Original model", "original", {0.25: _QWEN}),
        PaperRow("Seed 42 (reported)", "rc-a", {0.25: _RC_A_25}, seed=42),
        PaperRow("Seed 0", "rc-a", {0.25: (14.867, 0.391, 0.674, 0.508, 0.623, 0.290, 0.657, 0.524)}, seed=0),
        PaperRow("Seed 1", "rc-a", {0.25: (14.913, 0.408, 0.686, 0.503, 0.610, 0.292, 0.642, 0.524)}, seed=1),
        PaperRow("Seed 7", "rc-a", {0.25: (14.948, 0.371, 0.660, 0.501, 0.617, 0.290, 0.658, 0.516)}, seed=7),
    ),
)
_TABLE_5 = PaperTable(
    5,
    "Effect of the seed on RC+A",
    QWEN,
    FULL,
    (
        PaperRow("Original model", "original", {0.5: _QWEN}),
        PaperRow("Seed 42 (reported)", "rc-a", {0.5: _RC_A_50}, seed=42),
        PaperRow("Seed 0", "rc-a", {0.5: (35.790, 0.271, 0.519, 0.382, 0.479, 0.230, 0.573, 0.409)}, seed=0),
        PaperRow("Seed 1", "rc-a", {0.5: (34.286, 0.271, 0.548, 0.378, 0.454, 0.200, 0.582, 0.406)}, seed=1),
        PaperRow("Seed 7", "rc-a", {0.5: (34.394, 0.279, 0.540, 0.379, 0.423, 0.224, 0.556, 0.400)}, seed=7),
    ),
)
_TABLE_6 = PaperTable(
    6,
    "Another model",
    LLAMA,
    FULL,
    (
        PaperRow("Original model", "original", {0.25: _LLAMA}),
        PaperRow("Taylor", "taylor", {0.25: (14.332, 0.409, 0.718, 0.495, 0.561, 0.268, 0.679, 0.522)}),
        PaperRow("Random Prune", "random", {0.25: (24.224, 0.340, 0.594, 0.443, 0.382, 0.206, 0.632, 0.433)}),
        PaperRow("RC+A", "rc-a", {0.25: (14.126, 0.414, 0.712, 0.502, 0.555, 0.272, 0.706, 0.527)}),
        PaperRow("Activation L2", "act-l2", {0.25: (13.176, 0.388, 0.722, 0.517, 0.556, 0.284, 0.701, 0.528)}),
        PaperRow("Activation Mean", "act-mean", {0.25: (22218.949, 0.212, 0.301, 0.298, 0.251, 0.152, 0.515, 0.288)}),
        PaperRow("Weight L2", "weight-l2", {0.25: (5973.610, 0.238, 0.407, 0.283, 0.273, 0.168, 0.541, 0.318)}),
    ),
)
_TABLE_7 = PaperTable(
    7,
    "Another model",
    LLAMA,
    FULL,
    (
        PaperRow("Original model", "original", {0.5: _LLAMA}),
        PaperRow("Taylor", "taylor", {0.5: (33.552, 0.277, 0.533, 0.378, 0.359, 0.176, 0.595, 0.386)}),
        PaperRow("Random Prune", "random", {0.5: (412660.209, 0.212, 0.262, 0.257, 0.248, 0.164, 0.508, 0.275)}),
        PaperRow("RC+A", "rc-a", {0.5: (30.528, 0.307, 0.540, 0.392, 0.414, 0.212, 0.618, 0.414)}),
        PaperRow("Activation L2", "act-l2", {0.5: (30.420, 0.302, 0.551, 0.402, 0.404, 0.218, 0.617, 0.416)}),
        PaperRow("Activation Mean", "act-mean", {0.5: (647082.039, 0.220, 0.271, 0.262, 0.242, 0.182, 0.528, 0.284)}),
        PaperRow("Weight L2", "weight-l2", {0.5: (27588.505, 0.225, 0.285, 0.264, 0.229, 0.140, 0.523, 0.278)}),
    ),
)
_TABLE_8 = PaperTable(
    8,
    "Activation types and calibration data",
    QWEN,
    FULL,
    (
        PaperRow("Original model", "original", _pair(_QWEN, _QWEN_50)),
        PaperRow(
            "Post-act Mean (BookCorpus)",
            "act-mean",
            _pair(_MEAN_25, (56.585, 0.235, 0.460, 0.364, 0.401, 0.172, 0.539, 0.362)),
            text="bookcorpus",
        ),
        PaperRow(
            "Post-act Mean (C4)",
            "act-mean",
            _pair(_MEAN_C4_25, (50.750, 0.229, 0.494, 0.376, 0.310, 0.174, 0.551, 0.356)),
            text="c4",
        ),
        PaperRow(
            "Pre-act Mean (C4)",
            "act-mean-pre",
            _pair(
                (26.323, 0.337, 0.617, 0.494, 0.547, 0.278, 0.603, 0.479),
                (81.373, 0.246, 0.458, 0.375, 0.265, 0.204, 0.542, 0.348),
            ),
            text="c4",
        ),
        PaperRow(
            "Modulated-act Mean (C4)",
            "act-mean-mod",
            _pair(
                (30.163, 0.437, 0.696, 0.500, 0.553, 0.296, 0.631, 0.519),
                (82.340, 0.322, 0.549, 0.385, 0.330, 0.210, 0.564, 0.393),
            ),
            text="c4",
        ),
    ),
)
_TABLE_9 = PaperTable(
    9,
    "Similarity clustering with post-act against RC+A",
    QWEN,
    SHORT,
    (
        PaperRow("RC+A", "rc-a", _RC_A),
        PaperRow(
            "Similarity Cluster (Post-act) + Activation L2",
            "sim-a-post",
            _pair((16.606, 0.588, 0.506), (46.703, 0.412, 0.375)),
        ),
    ),
)
TABLES = (_TABLE_1, _TABLE_2, _TABLE_3, _TABLE_4, _TABLE_5, _TABLE_6, _TABLE_7, _TABLE_8, _TABLE_9)
