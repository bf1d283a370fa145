"""Records to tables: what was measured, by setting, in the paper's rows and columns."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dicer.study.columns import lower_is_better, measures
from dicer.study.report.paper import TABLES, TITLES, PaperRow, PaperTable

ORIGINAL = "original"
_METHOD_PARTS = (
    *("method", "criterion", "activation", "grouping", "grouped_by", "merge", "groups", "ratio", "seed"),
    *("axis", "allocate", "max_ratio", "min_width", "drop_threshold", "compensate"),
    *("schedule", "split", "entropy_search", "entropy_at"),
)
_SOURCE_PARTS = ("calib", "calib_config", "calib_split", "calib_field")
_TEXT_PARTS = (*_SOURCE_PARTS, "samples", "seq_len")
_NOT_SHOWN = ("device", "batch_size", "gradient_checkpointing")


class Cell(NamedTuple):
    """A mean over seeds.

    Attributes:
        mean: over the runs.
        spread: standard deviation over the runs; None for one run.
        runs: how many.
        paper: the paper's own figure, where it is of the same model.
        best: whether it is the best of its column (of pruned models).
    """

    mean: float | None
    spread: float | None
    runs: int
    paper: float | None = None
    best: bool = False

    def text(self, column: str) -> str:
        """As printed: three decimals, ``±`` the spread over seeds."""
        if self.mean is None:
            return "-"
        spread = "" if self.spread is None else f" ± {shown(self.spread, column)}"
        return shown(self.mean, column) + spread


class Row(NamedTuple):
    """A title, and one cell for each ratio and column."""

    title: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class TableView:
    """A table as it is shown.

    Attributes:
        title: with its number in the paper, if it has one.
        columns: keys of what each cell shows, ratio by ratio.
        ratios: fractions removed; () where the rows name their own.
        rows: in order.
    """

    title: str
    columns: tuple[str, ...]
    ratios: tuple[float, ...]
    rows: tuple[Row, ...]

    @property
    def has_paper(self) -> bool:
        """Whether figures of the paper stand beside."""
        return any(cell.paper is not None for row in self.rows for cell in row.cells)


class Setting(NamedTuple):
    """Everything but method, ratio and seed: only runs of one setting can be compared.

    Attributes:
        model: name and fingerprint.
        common: recipe and evaluation without the text, as JSON.
        text: name and size of the calibration text.
    """

    model: tuple[str, str]
    common: str
    text: str

    @property
    def title(self) -> str:
        """For people."""
        common = json.loads(self.common)
        asked = common.get("evaluation", {})
        single = "".join(f", {name} {count}" for name, count in (asked.get("limits") or {}).items())
        part = f", only {asked['limit']} documents a task{single}" if asked.get("limit") else single
        dtype = common["recipe"].get("dtype", "auto")
        more = "".join(f", {name}" for name in (asked.get("protocol"), dtype) if name not in (None, "auto"))
        whole = common["recipe"].get("ratio_of", "chosen")
        more += f", ratio of the {whole}" if whole != "chosen" else ""
        layers = common["recipe"].get("layers", "all")
        return f"{self.model[0]}, layers {layers}, calibration {self.text}{more}{part}"


def setting_of(record: dict[str, Any]) -> Setting:
    """The setting of a pruned model's record."""
    recipe = record["recipe"]
    dropped = {*_METHOD_PARTS, *_TEXT_PARTS, *_NOT_SHOWN}
    rest = {"recipe": {k: v for k, v in recipe.items() if k not in dropped}, "evaluation": _evaluation(record)}
    usual = (None, record["text"], "train", "text")  # names of hub configurations, splits, fields; of a stand-in's file
    source = [value for name in _SOURCE_PARTS if (value := recipe.get(name)) not in usual]
    named = f"{record['text']} ({', '.join(source)})" if source else record["text"]
    return Setting(
        _model(record), json.dumps(rest, sort_keys=True), f"{named} {recipe['samples']} x {recipe['seq_len']}"
    )


def _evaluation(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record["evaluation"].items() if name != "batch_size"}


def _model(record: dict[str, Any]) -> tuple[str, str]:
    return (record["model"]["name"], record["model"]["fingerprint"])


def done(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that have metrics."""
    return [record for record in records if record["status"] == "done"]


def settings(records: Iterable[dict[str, Any]]) -> dict[Setting, list[dict[str, Any]]]:
    """Setting -> its pruned runs, and the original model measured in the same way; one without such runs is alone."""
    found = done(records)
    groups: dict[Setting, list[dict[str, Any]]] = {}
    for record in found:
        if record["method"] != ORIGINAL:
            groups.setdefault(setting_of(record), []).append(record)
    for setting, members in groups.items():
        members += _originals(found, setting)
    held = {record["id"] for members in groups.values() for record in members}
    for record in found:
        if record["id"] not in held:
            common = {"recipe": {"dtype": record["recipe"].get("dtype")}, "evaluation": _evaluation(record)}
            groups[Setting(_model(record), json.dumps(common, sort_keys=True), "none")] = [record]
    return groups


def _originals(records: Iterable[dict[str, Any]], setting: Setting) -> list[dict[str, Any]]:
    asked = json.loads(setting.common)
    return [
        record
        for record in records
        if record["method"] == ORIGINAL
        and _model(record) == setting.model
        and _evaluation(record) == asked["evaluation"]
        and record["recipe"].get("dtype") == asked["recipe"].get("dtype")
    ]


def paper_tables(records: Sequence[dict[str, Any]]) -> list[TableView]:
    """Each of the paper's tables that these records have a pruned row of, once for each setting."""
    views: list[TableView] = []
    groups = settings(records)
    for table in TABLES:
        for setting, members in _joined(groups, table) if table.texts else groups.items():
            view = _paper_table(table, setting, members)
            if view is not None:
                views.append(view)
    return views


def _joined(
    groups: dict[Setting, list[dict[str, Any]]], table: PaperTable
) -> Iterator[tuple[Setting, list[dict[str, Any]]]]:
    """Settings that differ only in their text, put together: one of each text, so that every size stands on its own."""
    alike: dict[Setting, dict[str, list[Setting]]] = {}
    for setting, members in groups.items():
        if (text := members[0]["text"]) in table.texts:
            alike.setdefault(setting._replace(text=""), {}).setdefault(text, []).append(setting)
    for common, texts in alike.items():
        for chosen in itertools.product(*texts.values()):
            members = [record for setting in chosen for record in groups[setting]]
            yield common._replace(text=" and ".join(setting.text for setting in chosen)), members


def _paper_table(table: PaperTable, setting: Setting, records: list[dict[str, Any]]) -> TableView | None:
    same_model = setting.model[0].rsplit("/", 1)[-1] == table.model
    if not same_model and table.number in (6, 7) and setting.model[0].rsplit("/", 1)[-1] == TABLES[0].model:
        return None  # these two are about another model than the first
    rows = [Row(row.title, tuple(_cells(table, row, records, same_model))) for row in table.rows]
    pruned = [row for row, source in zip(rows, table.rows, strict=True) if source.method != ORIGINAL]
    # A table that compares needs two rows that are there; Table 4's seeds make one method several rows.
    if sum(any(cell.mean is not None for cell in row.cells) for row in pruned) < 2:
        return None
    first = sum(row.method == ORIGINAL for row in table.rows)
    shown_rows = (*rows[:first], *mark_best(rows[first:], table.columns * len(table.ratios)))
    ratio = "" if len(table.ratios) > 1 else f", {table.ratios[0]:.0%} pruning"
    title = f"Table {table.number}: {table.caption}{ratio} ({setting.title})"
    return TableView(title, table.columns, table.ratios, shown_rows)


def _cells(table: PaperTable, row: PaperRow, records: list[dict[str, Any]], same_model: bool) -> Iterable[Cell]:
    for ratio in table.ratios:
        chosen = [record for record in records if _matches(record, row, ratio)]
        for place, column in enumerate(table.columns):
            paper = row.figures[ratio][place] if same_model else None
            yield cell(chosen, column)._replace(paper=paper)


def _matches(record: dict[str, Any], row: PaperRow, ratio: float) -> bool:
    if record["method"] != row.method:
        return False
    if row.method == ORIGINAL:
        return True
    if row.seed is not None and record["recipe"]["seed"] != row.seed:
        return False
    return bool(record["recipe"]["ratio"] == ratio) and row.text in (None, record["text"])


def cell(records: Iterable[dict[str, Any]], column: str) -> Cell:
    """Mean and spread of one column over runs that differ in their seed (the same run is counted once)."""
    unique = {record["id"]: measures(record) for record in records}
    values = [found[column] for found in unique.values() if column in found]
    if not values:
        return Cell(None, None, 0)
    finite = len(values) > 1 and all(math.isfinite(value) for value in values)
    mean = statistics.fmean(values) if all(math.isfinite(value) for value in values) else math.inf
    return Cell(mean, statistics.stdev(values) if finite else None, len(values))


def mark_best(rows: Sequence[Row], columns: Sequence[str]) -> list[Row]:
    """Rows with the best cell of each column marked: the lowest perplexity, the highest of anything else."""
    best: dict[int, float] = {}
    for place, column in enumerate(columns):
        means = [m for row in rows if (m := row.cells[place].mean) is not None]
        top = min(means, default=math.inf) if lower_is_better(column) else max(means, default=math.inf)
        if len(means) > 1 and math.isfinite(top):
            best[place] = top
    return [
        Row(
            row.title,
            tuple(c._replace(best=c.mean is not None and c.mean == best.get(i)) for i, c in enumerate(row.cells)),
        )
        for row in rows
    ]


def full_table(setting: Setting, records: list[dict[str, Any]]) -> TableView:
    """Every method and ratio of a setting, with everything that was measured."""
    columns = measured_columns(records)
    originals = [record for record in records if record["method"] == ORIGINAL]
    groups: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for record in records:
        if record["method"] != ORIGINAL:
            groups.setdefault((record["recipe"]["ratio"], record["method"]), []).append(record)
    rows = [Row("original", tuple(cell(originals, column) for column in columns))] if originals else []
    for ratio in sorted({ratio for ratio, _ in groups}):
        block = [
            Row(f"{method}, {ratio * 100:g}%", tuple(cell(members, column) for column in columns))
            for (own, method), members in sorted(groups.items())
            if own == ratio
        ]
        rows += mark_best(block, columns)
    return TableView(f"All runs ({setting.title})", columns, (), tuple(rows))


def text_tables(groups: dict[Setting, list[dict[str, Any]]]) -> list[TableView]:
    """Runs that differ only in their calibration text or its size, side by side."""
    alike: dict[Setting, list[Setting]] = {}
    for setting in groups:
        alike.setdefault(setting._replace(text=""), []).append(setting)
    views = []
    for common, members in alike.items():
        shared = _shared_methods([groups[setting] for setting in members]) if len(members) > 1 else set()
        columns = measured_columns(record for setting in members for record in groups[setting])
        for method, ratio in sorted(shared):
            rows = []
            for setting in sorted(members, key=lambda s: _size_of(groups[s])):
                chosen = [r for r in groups[setting] if (r["method"], r["recipe"].get("ratio")) == (method, ratio)]
                if chosen:
                    rows.append(Row(setting.text, tuple(cell(chosen, column) for column in columns)))
            title = f"Calibration of {method}, {ratio:.0%} ({common._replace(text='of several texts').title})"
            views.append(TableView(title, columns, (), tuple(mark_best(rows, columns))))
    return views


def _shared_methods(groups: Sequence[list[dict[str, Any]]]) -> set[tuple[str, float]]:
    """Methods and ratios that at least two groups have."""
    found = [{(r["method"], r["recipe"]["ratio"]) for r in group if r["method"] != ORIGINAL} for group in groups]
    return {pair for a, b in itertools.combinations(found, 2) for pair in a & b}


def _size_of(records: list[dict[str, Any]]) -> tuple[str, int]:
    recipe = next(r["recipe"] for r in records if r["method"] != ORIGINAL)
    return records[0]["text"], recipe["samples"] * recipe["seq_len"]


def measured_columns(records: Iterable[dict[str, Any]]) -> tuple[str, ...]:
    """What was measured, in the paper's order, then the rest by name, the average last."""
    found = {column for record in records for column in measures(record)}
    rest = sorted(found - set(TITLES))
    return tuple([c for c in TITLES if c in found and c != "average"] + rest + [c for c in ("average",) if c in found])


def shown(value: float, column: str) -> str:
    """Three decimals; large perplexities without."""
    return f"{value:,.0f}" if "perplexity" in column.lower() and abs(value) >= 1000 else f"{value:.3f}"
