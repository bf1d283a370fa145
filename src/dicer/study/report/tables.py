"""Records to tables: what was measured, by setting, in the paper's rows and columns, and how sure it is."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from dicer.study.columns import Measure, clear, floors, lower_is_better, measures
from dicer.study.record import ORIGINAL, Done, Original, Pruned
from dicer.study.report.paper import TABLES, TITLES, PaperRow, PaperTable
from dicer.study.report.settings import Setting, of_its_model, pruned

FLOOR = "one answer for all"
_SIDE_BY_SIDE = 6  # columns of ratios beside one another; more do not fit a laptop's width


class Cell(NamedTuple):
    """A mean over seeds.

    Attributes:
        mean: over the runs; None where there is none.
        error: standard error of a run, or the standard deviation over the runs where that is larger; None where no
            error is known and there is one run.
        runs: how many.
        paper: the paper's own figure, where it is of the same model.
        mark: ``best`` of its column (of pruned models) and ahead of every other by more than two standard errors of
            their difference; ``unsure`` where it is the best and that is not known.
    """

    mean: float | None
    error: float | None
    runs: int
    paper: float | None = None
    mark: Literal["", "best", "unsure"] = ""

    @property
    def measure(self) -> Measure | None:
        """Its number with its error."""
        return None if self.mean is None else Measure(self.mean, self.error)

    def text(self, column: str) -> str:
        """As printed: three decimals, and ``±`` the error."""
        if self.mean is None:
            return "-"
        error = "" if self.error is None else f" ± {shown(self.error, column)}"
        return shown(self.mean, column) + error


class Row(NamedTuple):
    """A title, and one cell for each ratio and column."""

    title: str
    cells: tuple[Cell, ...]

    @property
    def runs(self) -> int | None:
        """How many runs each of its numbers is the mean of; None where that is not the same for all."""
        counts = {cell.runs for cell in self.cells if cell.runs}
        return counts.pop() if len(counts) == 1 else None


@dataclass(frozen=True)
class TableView:
    """A table as it is shown.

    Attributes:
        title: with its number in the paper, if it has one.
        columns: keys of what each cell shows, ratio by ratio.
        groups: heading ("" for none) -> rows; the best of a column is that of its group.
        ratios: fractions removed whose columns stand side by side; () where rows or headings name them.
        first: heading of the first column.
    """

    title: str
    columns: tuple[str, ...]
    groups: Mapping[str, Sequence[Row]]
    ratios: tuple[float, ...] = ()
    first: str = "Method"

    @property
    def rows(self) -> list[Row]:
        """All rows."""
        return [row for rows in self.groups.values() for row in rows]

    @property
    def has_paper(self) -> bool:
        """Whether figures of the paper stand beside."""
        return any(cell.paper is not None for row in self.rows for cell in row.cells)


def cell(records: Iterable[Done], column: str) -> Cell:
    """Mean and error of one column over runs that differ in their seed (the same run is counted once)."""
    unique = {record.id: measures(record) for record in records}
    found = [own[column] for own in unique.values() if column in own]
    if not found:
        return Cell(None, None, 0)
    values = [measure.value for measure in found]
    if not all(math.isfinite(value) for value in values):
        return Cell(math.inf, None, len(values))
    errors = [measure.error for measure in found if measure.error is not None]
    known = [math.sqrt(statistics.fmean(error**2 for error in errors))] if errors else []
    spread = [statistics.stdev(values)] if len(values) > 1 else []
    return Cell(statistics.fmean(values), max(known + spread, default=None), len(values))


def mark_best(rows: Sequence[Row], columns: Sequence[str]) -> list[Row]:
    """Rows with the best cell of each column marked: the lowest perplexity, the highest of anything else."""
    marks = [_mark([row.cells[place] for row in rows], column) for place, column in enumerate(columns)]
    return [
        Row(row.title, tuple(own._replace(mark=mark[i]) for own, mark in zip(row.cells, marks, strict=True)))
        for i, row in enumerate(rows)
    ]


def _mark(cells: Sequence[Cell], column: str) -> list[Literal["", "best", "unsure"]]:
    marks: list[Literal["", "best", "unsure"]] = [""] * len(cells)
    found = [(i, measure) for i, own in enumerate(cells) if (measure := own.measure) is not None]
    if len(found) < 2:
        return marks
    sign = 1 if lower_is_better(column) else -1
    (place, top), *others = sorted(found, key=lambda pair: sign * pair[1].value)
    ahead = [clear(top, other) for _, other in others]
    if math.isfinite(top.value) and top.value != others[0][1].value and False not in ahead:
        marks[place] = "unsure" if None in ahead else "best"
    return marks


def paper_tables(setting: Setting, records: Sequence[Done]) -> list[TableView]:
    """Those of the paper's tables of one text that these records have two pruned rows of."""
    records = of_its_model(records)
    views = [_paper_table(table, setting, records) for table in TABLES if not table.texts]
    return [view for view in views if view is not None]


def paper_text_tables(groups: Mapping[Setting, Sequence[Done]]) -> list[tuple[Setting, TableView]]:
    """Those of the paper's tables that compare texts, of settings that differ only in their text."""
    found = [
        (common, _paper_table(table, common, members))
        for table in TABLES
        for common, members in (_joined(groups, table) if table.texts else ())
    ]
    return [(common, view) for common, view in found if view is not None]


def _joined(groups: Mapping[Setting, Sequence[Done]], table: PaperTable) -> Iterator[tuple[Setting, list[Done]]]:
    """Settings that differ only in their text, put together: one of each text, so that every size stands on its own."""
    alike: dict[Setting, dict[str, list[Setting]]] = {}
    for setting, members in groups.items():
        if (text := members[0].text) in table.texts:
            alike.setdefault(setting._replace(text=""), {}).setdefault(text, []).append(setting)
    for common, texts in alike.items():
        for chosen in itertools.product(*texts.values()):
            members = [record for setting in chosen for record in of_its_model(groups[setting])]
            yield common._replace(text=" and ".join(setting.text for setting in chosen)), members


def _paper_table(table: PaperTable, setting: Setting, records: Sequence[Done]) -> TableView | None:
    same_model = setting.name == table.model
    if not same_model and table.number in (6, 7) and setting.name == TABLES[0].model:
        return None  # these two are about another model than the first
    single = len(table.ratios) == 1
    beside = not single and len(table.ratios) * len(table.columns) <= _SIDE_BY_SIDE
    blocks = {"": table.ratios} if single or beside else {f"{ratio:.0%} pruning": (ratio,) for ratio in table.ratios}
    groups = {head: _paper_rows(table, records, ratios, same_model) for head, ratios in blocks.items()}
    # A table that compares needs two rows that are there; Table 4's seeds make one method several rows.
    there = zip(table.rows, *groups.values(), strict=True)
    if sum(own.method != ORIGINAL and any(_has_numbers(row) for row in rows) for own, *rows in there) < 2:
        return None
    ratio = f", {table.ratios[0]:.0%} pruning" if single else ""
    title = f"Table {table.number}: {table.caption}{ratio}"
    return TableView(title, table.columns, groups, table.ratios if beside else ())


def _has_numbers(row: Row) -> bool:
    return any(own.mean is not None for own in row.cells)


def _paper_rows(table: PaperTable, records: Sequence[Done], ratios: Sequence[float], same_model: bool) -> list[Row]:
    rows = [Row(row.title, tuple(_cells(table, row, records, ratios, same_model))) for row in table.rows]
    first = sum(row.method == ORIGINAL for row in table.rows)
    return [*rows[:first], *mark_best(rows[first:], table.columns * len(ratios))]


def _cells(
    table: PaperTable, row: PaperRow, records: Sequence[Done], ratios: Sequence[float], same_model: bool
) -> Iterator[Cell]:
    for ratio in ratios:
        chosen = [record for record in records if _matches(record, row, ratio)]
        for place, column in enumerate(table.columns):
            yield cell(chosen, column)._replace(paper=row.figures[ratio][place] if same_model else None)


def _matches(record: Done, row: PaperRow, ratio: float) -> bool:
    if record.method != row.method or not isinstance(record, Pruned):
        return record.method == row.method
    return record.recipe.ratio == ratio and row.seed in (None, record.recipe.seed) and row.text in (None, record.text)


def full_table(records: Sequence[Done]) -> TableView:
    """Every method and ratio of a setting, with everything that was measured."""
    columns = measured_columns(records)
    originals: dict[str, list[Original]] = {}
    for record in records:
        if isinstance(record, Original):
            originals.setdefault(record.model.name, []).append(record)
    runs: dict[tuple[float, str], list[Pruned]] = {}
    for record in pruned(records):
        runs.setdefault((record.recipe.ratio, record.method), []).append(record)
    first = {record.model.name for record in of_its_model(records)}
    groups = {"": [_row(ORIGINAL if name in first else name, own, columns) for name, own in originals.items()]}
    groups[""] += _floor_rows(records, columns)
    groups = {head: rows for head, rows in groups.items() if rows}
    for ratio in sorted({ratio for ratio, _ in runs}):
        rows = [_row(method, members, columns) for (own, method), members in sorted(runs.items()) if own == ratio]
        groups[f"{ratio * 100:g}%"] = mark_best(rows, columns)
    return TableView("All runs", columns, groups)


def _floor_rows(records: Sequence[Done], columns: Sequence[str]) -> list[Row]:
    found = {column: measure for record in records for column, measure in floors(record).items()}
    cells = [Cell(found[column].value, None, 1) if column in found else Cell(None, None, 0) for column in columns]
    return [Row(FLOOR, tuple(cells))] if any(column in found for column in columns) else []


def _row(title: str, records: Sequence[Done], columns: Sequence[str]) -> Row:
    return Row(title, tuple(cell(records, column) for column in columns))


def text_tables(groups: Mapping[Setting, Sequence[Done]]) -> list[tuple[Setting, TableView]]:
    """Runs that differ only in their calibration text or its size, side by side, one table a setting."""
    alike: dict[Setting, list[Setting]] = {}
    for setting in groups:
        alike.setdefault(setting._replace(text=""), []).append(setting)
    views = []
    for common, members in alike.items():
        columns = measured_columns(record for setting in members for record in groups[setting])
        shared = _shared_methods([pruned(groups[setting]) for setting in members])
        by_size = sorted(members, key=lambda setting: _size_of(groups[setting]))
        compared = {
            f"{method}, {ratio * 100:g}%": mark_best(_text_rows(method, ratio, by_size, groups, columns), columns)
            for method, ratio in sorted(shared)
        }
        if compared:
            views.append((common, TableView("Calibration texts", columns, compared, first="Text")))
    return views


def _text_rows(
    method: str,
    ratio: float,
    members: Sequence[Setting],
    groups: Mapping[Setting, Sequence[Done]],
    columns: Sequence[str],
) -> list[Row]:
    chosen = {
        setting.text: [r for r in pruned(groups[setting]) if (r.method, r.recipe.ratio) == (method, ratio)]
        for setting in members
    }
    return [_row(text, runs, columns) for text, runs in chosen.items() if runs]


def _shared_methods(groups: Sequence[Sequence[Pruned]]) -> set[tuple[str, float]]:
    """Methods and ratios that at least two groups have."""
    found = [{(record.method, record.recipe.ratio) for record in group} for group in groups]
    return {pair for a, b in itertools.combinations(found, 2) for pair in a & b}


def _size_of(records: Sequence[Done]) -> tuple[str, int]:
    first = next(iter(pruned(records)), None)
    return ("", 0) if first is None else (first.text, first.recipe.samples * first.recipe.seq_len)


def measured_columns(records: Iterable[Done]) -> tuple[str, ...]:
    """What was measured, in the paper's order, then the rest by name, the average last."""
    found = {column for record in records for column in measures(record)}
    rest = sorted(found - set(TITLES))
    return tuple([c for c in TITLES if c in found and c != "average"] + rest + [c for c in ("average",) if c in found])


def shown(value: float, column: str) -> str:
    """Three decimals; large perplexities without."""
    return f"{value:,.0f}" if "perplexity" in column.lower() and abs(value) >= 1000 else f"{value:.3f}"
