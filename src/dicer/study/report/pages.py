"""A results folder to a report: tables, figures, one HTML file without outside parts, Markdown for a model card."""

from __future__ import annotations

import base64
import csv
import importlib.resources
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dicer.errors import ExperimentError, OutputError
from dicer.files import as_output_error, check_writable, remove_unfinished, unfinished, write_whole
from dicer.study.columns import perplexity_kind
from dicer.study.records import read_records
from dicer.study.report.figure_style import Picture
from dicer.study.report.figures import pictures
from dicer.study.report.paper import TITLES
from dicer.study.report.tables import TableView, done, full_table, paper_tables, settings, shown, text_tables

TITLE = "Pruning experiments"
# How every report begins, below the style of the page: what tells an earlier report from a file of the user's.
_EARLIER = re.compile(rf"{TITLE}\W.*?\d+ finished runs, \d+ failed; settings: \d+\.", re.DOTALL)
_BEGINNING = 8192  # characters


def write_report(results: Path, out: Path) -> list[Path]:
    """Make a report from records alone.

    Args:
        results: the folder of ``dicer run``.
        out: where ``report.html``, ``report.md`` and each figure's PNG and CSV go; an earlier report is replaced.

    Returns:
        The files that were written.

    Raises:
        ExperimentError: there is no record, one cannot be read, or matplotlib or jinja2 is missing.
        OutputError: ``out`` has other things in it, lies within ``results``, or cannot be written.
    """
    check_place(results, out)
    records = read_records(results)
    if not done(records):
        failed = f" ({len(records)} failed)" if records else ""
        raise ExperimentError(f"{results} holds no finished run{failed}; 'dicer run EXPERIMENT.toml' makes them.")
    values = _values(records)
    files = {f"report.{kind}": _render(f"report.{kind}.j2", values).encode() for kind in ("html", "md")}
    for group in values["figures"]:
        for picture in group["pictures"]:
            files[f"{picture['name']}.png"] = picture["png"]
            files[f"{picture['name']}.csv"] = picture["csv"]
    with as_output_error(f"the report to {out}"):
        remove_unfinished(out)  # of a report that was killed
        for name, content in files.items():
            write_whole(out / name, content)
    return [out / name for name in files]


def check_place(results: Path, out: Path) -> None:
    """See to it that a report can be written and takes nothing away, before it is drawn.

    Raises:
        OutputError: it lies within the results, holds other things than an earlier report, or cannot be written.
    """
    check_writable(out / "report.html")
    with as_output_error(f"the report to {out}"):
        if out.resolve().is_relative_to(results.resolve()):
            raise OutputError(f"{out} lies within the results {results}; give -o a folder outside them.")
        held = {path.name for path in set(out.iterdir()) - unfinished(out)} if out.exists() else set()
        if held and not _is_report(out, held):
            raise OutputError(f"{out} is not empty and holds no earlier report; give -o a new or an empty folder.")


def _is_report(folder: Path, names: set[str]) -> bool:
    """Whether each page that a report would replace was written by one, and there is one."""
    beginnings = []
    for name in names & {"report.html", "report.md"}:
        with (folder / name).open(encoding="utf-8", errors="replace") as file:
            beginnings.append(file.read(_BEGINNING))
    return bool(beginnings) and all(_EARLIER.search(text) for text in beginnings)


def _values(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the templates show."""
    groups = settings(records)
    paper = paper_tables(records)
    figures = [
        {"title": setting.title, "pictures": [_shown(p) for p in pictures(members, f"setting{number}")]}
        for number, (setting, members) in enumerate(groups.items(), start=1)
    ]
    failed = [record for record in records if record["status"] == "failed"]
    finished = len(records) - len(failed)
    contents = [("paper", "The paper's tables")] if paper else []
    contents += [("all", "All runs"), *([("failed", "Failed runs")] if failed else [])]
    contents += [("figures", "Figures"), ("environment", "Environment")]
    return {
        "title": TITLE,
        "summary": f"{finished} finished runs, {len(failed)} failed; settings: {len(groups)}.",
        "note": _note(records, paper),
        "contents": contents,
        "paper": paper,
        "full": [full_table(setting, members) for setting, members in groups.items()] + text_tables(groups),
        "failed": failed,
        "figures": figures,
        "environment": _environment(records),
    }


def _note(records: Sequence[dict[str, Any]], paper: Sequence[TableView]) -> str:
    kinds = sorted({perplexity_kind(record) for record in done(records)})
    lines = ["Means over seeds ± standard deviation (number of runs); the best pruned model of a column is in bold."]
    lines.append(f"Perplexity: {'; '.join(kinds)}.")
    if any(view.has_paper for view in paper):
        lines.append("Beside them, where the model is the same, the figures that the paper prints.")
    else:
        lines.append("The paper's own figures are of other models, so they are not shown beside these.")
    return " ".join(lines)


def _shown(picture: Picture) -> dict[str, Any]:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(picture.header)
    writer.writerows(picture.rows)
    encoded = base64.b64encode(picture.png).decode("ascii")
    return {**picture._asdict(), "base64": encoded, "csv": text.getvalue().encode()}


def _environment(records: Iterable[dict[str, Any]]) -> list[tuple[str, str]]:
    """Every value that any record has, so that a mixture shows."""
    found: dict[str, set[str]] = {}
    for record in records:
        pairs = {**record["environment"], **record["versions"], "git revision": record["git"]}
        pairs["computed on"] = record.get("computed_on")
        for name, value in pairs.items():
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            found.setdefault(name, set()).add(text or "none")
    return [(name, "; ".join(sorted(values))) for name, values in found.items()]


def _render(name: str, values: dict[str, Any]) -> str:
    try:
        import jinja2
    except ImportError:
        raise ExperimentError("reports need jinja2: pip install 'dicer[report]'.") from None
    text = importlib.resources.files("dicer.study.report.templates").joinpath(name).read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=name.endswith(".html.j2"), undefined=jinja2.StrictUndefined)
    return environment.from_string(text).render(
        **values, heads=_heads, flat=_flat, heading=_heading, percent=_percent, number=shown
    )


def _heads(view: TableView) -> tuple[str, ...]:
    return view.columns * max(1, len(view.ratios))


def _flat(view: TableView) -> list[str]:
    """Headings in one line, as Markdown has no second."""
    if len(view.ratios) < 2:
        return [_heading(column) for column in view.columns]
    return [f"{_heading(column)}, {_percent(ratio)}" for ratio in view.ratios for column in view.columns]


def _heading(column: str) -> str:
    return TITLES.get(column, column)


def _percent(ratio: float) -> str:
    return f"{ratio * 100:g}%"
