"""A results folder to a report: tables, figures, one HTML file without outside parts, Markdown for a model card."""

from __future__ import annotations

import base64
import csv
import importlib.resources
import io
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dicer.errors import ExperimentError, OutputError
from dicer.files import as_output_error, check_writable, unfinished
from dicer.holds import taken
from dicer.reading import open_plain
from dicer.study.columns import perplexity_kind
from dicer.study.record import Done, Failed, Record
from dicer.study.records import read_records
from dicer.study.report.figure_style import Picture, plain_text
from dicer.study.report.figures import pictures
from dicer.study.report.paper import heading
from dicer.study.report.settings import Setting, describe, done, settings
from dicer.study.report.tables import TableView, full_table, paper_tables, paper_text_tables, shown, text_tables
from dicer.words import markdown, plain

TITLE = "Pruning experiments"
# How every report begins, below the style of the page: what tells an earlier report from a file of the user's.
_EARLIER = re.compile(rf"{TITLE}\W.*?\d+ finished runs, \d+ failed; settings: \d+\.", re.DOTALL)
_BEGINNING = 8192  # bytes
_OWN = re.compile(r"report\.(html|md)|setting\d+-.+\.(png|csv)")  # the names of its files


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
    with taken(out) as place, as_output_error(f"the report to {out}"):
        files = _files(results)
        place.new.mkdir()
        for path in _others(out) if out.is_dir() else ():  # what the user keeps beside it
            _copy(path, place.new / path.name)
        for name, content in files.items():
            with (place.new / name).open("xb") as file:
                file.write(content)
        place.finish()
    return [out / name for name in files]


def _others(out: Path) -> list[Path]:
    """What lies in the folder of a report and is none of it; what kills have left there is nobody's."""
    return [path for path in out.iterdir() if not _OWN.fullmatch(path.name) and path not in unfinished(out)]


def _copy(path: Path, target: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.copytree(path, target, symlinks=True)
    else:
        shutil.copy2(path, target, follow_symlinks=False)


def _files(results: Path) -> dict[str, bytes]:
    """Name -> content of a report's files."""
    records = read_records(results)
    if not done(records):
        failed = f" ({len(records)} failed)" if records else ""
        raise ExperimentError(f"{results} holds no finished run{failed}; 'dicer run EXPERIMENT.toml' makes them.")
    values = _values(records)
    files = {f"report.{kind}": _render(f"report.{kind}.j2", values).encode() for kind in ("html", "md")}
    for picture in (picture for section in values["sections"] for picture in section["pictures"]):
        files[f"{picture['name']}.png"] = picture["png"]
        files[f"{picture['name']}.csv"] = picture["csv"]
    return files


def check_place(results: Path, out: Path) -> None:
    """See to it that a report can be written and takes nothing away, before it is drawn.

    Raises:
        OutputError: it lies within the results, holds other things than an earlier report, or cannot be written.
    """
    with as_output_error(f"the report to {out}"):
        if out.resolve().is_relative_to(results.resolve()):
            raise OutputError(f"{out} lies within the results {results}; give -o a folder outside them.")
        check_writable(out, [results])
        if out.exists() and not out.is_dir():
            raise OutputError(f"{out} is a file; give -o a folder.")
        held = {path.name for path in set(out.iterdir()) - unfinished(out)} if out.exists() else set()
        if held and not _is_report(out, held):
            raise OutputError(f"{out} is not empty and holds no earlier report; give -o a new or an empty folder.")


def _is_report(folder: Path, names: set[str]) -> bool:
    """Whether each page that a report would replace was written by one, and there is one."""
    beginnings = []
    for name in names & {"report.html", "report.md"}:
        with open_plain(folder / name) as file:
            beginnings.append(file.read(_BEGINNING).decode("utf-8", errors="replace"))
    return bool(beginnings) and all(_EARLIER.search(text) for text in beginnings)


def _values(records: Sequence[Record]) -> dict[str, Any]:
    """What the templates show: what all settings have in common once, then each setting by itself."""
    groups = settings(records)
    common, apart = describe(list(groups))
    failed = [record for record in records if isinstance(record, Failed)]
    sections = [
        _section(number, words, setting, members)
        for number, (words, (setting, members)) in enumerate(zip(apart, groups.items(), strict=True), start=1)
    ]
    across = _across(groups)
    tables = [view for section in [*sections, *across] for view in section["tables"]]
    contents = [(section["id"], f"Setting {number}") for number, section in enumerate(sections, start=1)]
    contents += [("across", "Between settings")] if across else []
    contents += [*([("failed", "Failed runs")] if failed else []), ("environment", "Environment")]
    return {
        "title": TITLE,
        "summary": f"{len(records) - len(failed)} finished runs, {len(failed)} failed; settings: {len(groups)}.",
        "common": common,
        "note": _note(records, any(view.has_paper for view in tables)),
        "contents": contents,
        "sections": sections,
        "across": across,
        "failed": failed,
        "environment": _environment(records),
    }


def _section(number: int, words: str, setting: Setting, members: Sequence[Done]) -> dict[str, Any]:
    with plain_text():
        drawn = pictures(members, f"setting{number}")
    return {
        "id": f"setting{number}",
        "title": f"Setting {number}" + (f": {words}" if words else ""),
        "tables": [*paper_tables(setting, members), full_table(members)],
        "pictures": [_shown(picture) for picture in drawn],
    }


def _across(groups: Mapping[Setting, Sequence[Done]]) -> list[dict[str, Any]]:
    """Tables of settings that differ in their text."""
    views = [*paper_text_tables(groups), *text_tables(groups)]
    kinds = list(dict.fromkeys(setting for setting, _ in views))
    _, apart = describe(kinds)
    return [
        {"title": words, "tables": [view for setting, view in views if setting == kind]}
        for kind, words in zip(kinds, apart, strict=True)
    ]


def _note(records: Sequence[Record], has_paper: bool) -> str:
    kinds = sorted({perplexity_kind(record) for record in done(records)})
    paper = (
        "Beside them, where the model is the same, the figures that the paper prints."
        if has_paper
        else "The paper's own figures are of other models, so they are not shown beside these."
    )
    return (
        "Means over runs that differ in their seed, where there are several. ± is the standard error "
        "over a task's documents, or the standard deviation over seeds where that is larger; where none stands, no "
        "error is known. Bold: the best pruned model of a column, ahead of every other by more than two standard "
        f"errors of the difference; italic: the best where that is not known. Perplexity: {'; '.join(kinds)}; "
        f"with a number in brackets, in windows of so many tokens. {paper}"
    )


def _shown(picture: Picture) -> dict[str, Any]:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(picture.header)
    writer.writerows(picture.rows)
    encoded = base64.b64encode(picture.png).decode("ascii")
    return {**picture._asdict(), "base64": encoded, "csv": text.getvalue().encode()}


def _environment(records: Iterable[Record]) -> list[tuple[str, str]]:
    """Every value that any record has, so that a mixture shows."""
    found: dict[str, set[str]] = {}
    for record in records:
        pairs = {**record.environment, **record.versions, "git revision": record.git}
        pairs["computed on"] = record.computed_on
        for name, value in pairs.items():
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            found.setdefault(name, set()).add(text or "none")
    return [(name, "; ".join(sorted(values))) for name, values in found.items()]


def _render(name: str, values: dict[str, Any]) -> str:
    import jinja2

    text = importlib.resources.files("dicer.study.report.templates").joinpath(name).read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=name.endswith(".html.j2"), undefined=jinja2.StrictUndefined, finalize=_printable
    )
    environment.filters["text"] = markdown
    return environment.from_string(text).render(
        **values, heads=_heads, flat=_flat, heading=heading, percent=_percent, number=shown
    )


def _printable(value: Any) -> Any:
    """Words of records without what moves a cursor or hides; what a template made is left as it is."""
    return plain(value, keep="\n") if type(value) is str else value


def _heads(view: TableView) -> tuple[str, ...]:
    return view.columns * max(1, len(view.ratios))


def _flat(view: TableView) -> list[str]:
    """Headings in one line, as Markdown has no second."""
    if not view.ratios:
        return [heading(column) for column in view.columns]
    return [f"{heading(column)}, {_percent(ratio)}" for ratio in view.ratios for column in view.columns]


def _percent(ratio: float) -> str:
    return f"{ratio * 100:g}%"
