"""The tables of Xu et al. 2025, *The Surprising Effectiveness of Randomness in LLM Pruning*: ``paper.toml``, read."""

from __future__ import annotations

import importlib.resources
import tomllib
from typing import Any, NamedTuple

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
ACCURACIES = tuple(name for name in TITLES if name not in (PERPLEXITY, "average"))


def heading(column: str) -> str:
    """A column's heading; perplexities in a second window length have that in brackets."""
    length = column.removeprefix("perplexity, windows of ")
    return TITLES.get(column, column) if length == column else f"{TITLES[PERPLEXITY]} ({length})"


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
        ratios: fractions removed.
        rows: in the paper's order.
    """

    number: int
    caption: str
    model: str
    columns: tuple[str, ...]
    ratios: tuple[float, ...]
    rows: tuple[PaperRow, ...]

    @property
    def texts(self) -> frozenset[str]:
        """The calibration texts that its rows name, if they do."""
        return frozenset(row.text for row in self.rows if row.text)


def _table(values: dict[str, Any]) -> PaperTable:
    ratios = tuple(values["ratios"])
    lists = [dict(zip(ratios, map(tuple, row["figures"]), strict=True)) for row in values["rows"]]
    rows = tuple(PaperRow(**{**row, "figures": own}) for row, own in zip(values["rows"], lists, strict=True))
    return PaperTable(**{**values, "columns": tuple(values["columns"]), "ratios": ratios, "rows": rows})


_DATA = importlib.resources.files("dicer.study.report").joinpath("paper.toml").read_text(encoding="utf-8")
TABLES = tuple(map(_table, tomllib.loads(_DATA)["table"]))
