"""The report: tables in the paper's form, figures that hold their numbers, and one HTML file that a browser shows."""

from __future__ import annotations

import base64
import copy
import csv
import html
import json
import os
import re
import struct
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from dicer.errors import ExperimentError, OutputError
from dicer.study.columns import measures
from dicer.study.records import pack, read_record, record_path, write_record
from dicer.study.report import pages as report
from dicer.study.report.figures import one_each, ordered, pictures
from dicer.study.report.pages import write_report
from dicer.study.report.paper import FULL, PERPLEXITY, QWEN, SHORT, TABLES, TASKS
from dicer.study.report.tables import Cell, Row, cell, full_table, mark_best, paper_tables, settings, text_tables

CHROMIUM = Path("/usr/bin/chromium")
METHODS = ("taylor", "random", "rc-a", "act-mean", "act-l2", "weight-l2", "sim-a", "sim-mean", "sim-dominant")
ACCURACIES = ("arc_challenge", "arc_easy", "hellaswag", "mmlu", "openbookqa", "winogrande", "average")
RECORDS = Path(__file__).parents[2] / "docs" / "results"
LAYERS, UNITS = (5, 6, 7, 8), 64


def _record(method, ratio=None, seed=42, *, model=QWEN, text="bookcorpus", average=0.5, perplexity=20.0, **more):
    rng = np.random.default_rng([len(method), int(100 * (ratio or 0)), seed])
    recipe = {"dtype": "auto"}
    layers = {}
    if ratio is not None:
        recipe |= {"ratio": ratio, "seed": seed, "layers": "5-26", "calib": text, "samples": 10, "seq_len": 128}
        for index in LAYERS:
            keep = np.sort(rng.permutation(UNITS)[: int(UNITS * (1 - ratio))])
            norm = {"kept": 10.0 + index + rng.random(), "dropped": 5.0 + index + rng.random()}
            layers[str(index)] = {"units": UNITS, "keep": pack(keep, UNITS), "norm": norm, "score": norm}
    summary = {"word_perplexity": perplexity, **dict.fromkeys(ACCURACIES, average)}
    return {
        "format": 1,
        "id": f"{method}-{ratio}-{seed}-{text}-{model}",
        "status": "done",
        "error": None,
        "method": method,
        "text": text if ratio is not None else "",
        "model": {"name": f"Qwen/{model}" if model == QWEN else model, "model_type": "qwen2", "fingerprint": model},
        "recipe": recipe,
        "evaluation": {"protocol": "randomness", "task_prefix": "", "batch_size": 8},
        "metrics": {"perplexity": None, "tasks": {}, "groups": {}, "summary": summary, "versions": {}},
        "seconds": {"load": 1.0, "score": 2.0 + len(method), "build": 0.5, "evaluate": 30.0},
        "memory": {"score": {"host": 3_000_000_000}, "evaluate": {"host": 2_000_000_000}},
        "layers": layers,
        "versions": {"dicer": "0.1.0", "python": "3.11"},
        "environment": {"system": "Linux", "accelerators": []},
        "git": "0" * 40,
        "computed_on": "cpu float32",
        **more,
    }


def _grid(model=QWEN):
    """Every method at two ratios and two seeds; the better, the earlier in METHODS."""
    records = [_record("original", model=model, average=0.622, perplexity=9.6)]
    for place, method in enumerate(METHODS):
        for ratio in (0.25, 0.5):
            for seed in (42, 0):
                average = 0.6 - place / 50 - ratio / 4 + seed / 10_000
                worse = 3.0**place * 20 * (1 + 4 * ratio) + seed / 10
                records.append(_record(method, ratio, seed, model=model, average=average, perplexity=worse))
    return records


def _save(records, folder):
    for record in records:
        write_record(
            record_path(folder, record["model"]["name"], record["method"], record["id"].replace("/", "-")), record
        )
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A report of a whole grid, and a run that failed."""
    failed = _record("rc-a", 0.75, status="failed", error="no <memory> &\nno luck")
    results = _save([*_grid(), failed], tmp_path_factory.mktemp("results"))
    out = tmp_path_factory.mktemp("report") / "deep" / "report"
    write_report(results, out)
    return out


def test_the_paper_s_figures_agree_with_one_another():
    by_number = {table.number: table for table in TABLES}
    assert sorted(by_number) == list(range(1, 10))
    for table in TABLES:
        for row in table.rows:
            assert all(len(figures) == len(table.columns) for figures in row.figures.values())
            # The average is the mean of the six, as far as three decimals tell.
            for figures in row.figures.values():
                if table.columns == FULL:
                    assert figures[-1] == pytest.approx(np.mean(figures[1:7]), abs=0.0021), (table.number, row.title)
    # What several tables print is the same in all: RC+A at 25% in Tables 1, 2, 4 and 9.
    found = {t.number: next(r for r in t.rows if r.method == "rc-a").figures[0.25] for t in TABLES[:2] + TABLES[8:]}
    assert set(found.values()) == {(14.944, 0.618, 0.524)}
    four = next(row for row in by_number[4].rows if row.seed == 42).figures[0.25]
    assert (four[0], four[4], four[-1]) == (14.944, 0.618, 0.524)
    assert {t.number: t.columns for t in TABLES} == {
        **dict.fromkeys((1, 2, 9), SHORT),
        **dict.fromkeys((4, 5, 6, 7, 8), FULL),
        3: TASKS,
    }


def test_rows_and_columns_are_the_paper_s_with_its_figures_beside():
    views = {view.title.split(":")[0]: view for view in paper_tables(_grid())}
    assert {"Table 1", "Table 2"} <= set(views)
    first = views["Table 1"]
    titles = ["Original", "Taylor", "Random Prune", "RC+A", "Activation Mean", "Activation L2", "Weight L2"]
    assert [row.title for row in first.rows] == titles
    assert (first.columns, first.ratios) == (SHORT, (0.25, 0.5))
    taylor = first.rows[1].cells
    assert [c.paper for c in taylor] == [15.244, 0.607, 0.504, 31.839, 0.476, 0.394]
    assert taylor[0].mean == pytest.approx(42.1)
    assert taylor[0].spread == pytest.approx(np.std([40.0, 44.2], ddof=1))
    assert [c.best for c in taylor] == [True] * 6
    assert not any(c.best for row in first.rows if row.title != "Taylor" for c in row.cells)
    assert (taylor[0].runs, taylor[0].text("perplexity")) == (2, "42.100 ± 2.970")


def test_another_model_stands_without_the_paper_s_figures():
    views = paper_tables(_grid("SmolLM2"))
    assert any(view.title.startswith("Table 6") for view in views)
    assert not any(view.has_paper for view in views)
    assert not any(view.title.startswith("Table 6") for view in paper_tables(_grid()))


def test_seeds_and_texts_have_rows_of_their_own():
    seeds = [_record("rc-a", 0.25, seed, perplexity=10.0 + seed) for seed in (42, 0, 1, 7)]
    view = next(v for v in paper_tables([_record("original"), *seeds]) if v.title.startswith("Table 4"))
    assert [row.cells[0].mean for row in view.rows] == [20.0, 52.0, 10.0, 11.0, 17.0]
    texts = [_record("act-mean", 0.25, text=text, perplexity=p) for text, p in (("bookcorpus", 5.0), ("c4", 6.0))]
    view = next(v for v in paper_tables(texts) if v.title.startswith("Table 3"))
    assert [row.cells[0].mean for row in view.rows] == [5.0, 6.0]
    assert view.columns == TASKS


def test_only_runs_of_one_setting_are_put_together():
    other = _record("rc-a", 0.25, seed=1)
    other["recipe"]["layers"] = "all"
    limited = _record("rc-a", 0.25, seed=2)
    limited["evaluation"]["limit"] = 10
    groups = settings([_record("original"), _record("rc-a", 0.25), other, limited])
    assert [len(members) for members in groups.values()] == [2, 2, 1]  # the limited one has no original
    assert [setting.title.endswith(", only 10 documents a task") for setting in groups] == [False, False, True]


def test_sizes_and_sources_of_texts_are_not_taken_for_seeds():
    runs = [_record("act-mean", 0.25, text="c4", perplexity=6.0)]
    for place, samples in enumerate((10, 100)):
        run = _record("act-mean", 0.25, perplexity=4.0 + place)
        run["recipe"]["samples"] = samples
        runs.append({**run, "id": str(samples)})
    other = _record("act-mean", 0.25, text="bookcorpus", perplexity=9.0, id="other")
    other["recipe"]["calib"] = "a-novel.txt"  # it stands in for bookcorpus
    views = [view for view in paper_tables([*runs, other]) if view.title.startswith("Table 3")]
    assert sorted([cell.mean for row in view.rows for cell in row.cells[:1]] for view in views) == [
        [4.0, 6.0],
        [5.0, 6.0],
        [9.0, 6.0],
    ]
    assert not any(row.cells[0].spread for view in views for row in view.rows)
    titles = [view.title for view in views]
    assert any("bookcorpus 100 x 128" in title for title in titles)
    assert any("bookcorpus (a-novel.txt) 10 x 128" in title for title in titles)


def test_settings_have_titles_of_their_own():
    first, second, third = (_record("rc-a", 0.25) for _ in range(3))
    second["evaluation"]["protocol"] = "let-llm"
    third["recipe"]["dtype"] = "bfloat16"
    assert len({setting.title for setting in settings([first, second, third])}) == 3


def test_originals_of_several_models_are_not_averaged():
    records = [_record("original", model=name, perplexity=value) for name, value in (("a", 5.0), ("b", 9.0))]
    groups = settings([*records, _record("rc-a", 0.25, model="b")])
    views = [full_table(setting, members) for setting, members in groups.items()]
    found = {view.title.split(",")[0]: view.rows[0].cells[0].mean for view in views}
    assert found == {"All runs (a": 5.0, "All runs (b": 9.0}


def test_what_was_measured_without_a_protocol_is_found_too():
    record = _record("rc-a", 0.25)
    record["evaluation"]["task_prefix"] = "local_"
    tasks = {
        "local_piqa": {"metrics": {"acc": {"value": 0.7, "stderr": 0.1}, "acc_norm": {"value": 0.8, "stderr": 0.1}}},
        "local_wikitext": {"metrics": {"word_perplexity": {"value": 12.5, "stderr": None}}},
    }
    record["metrics"] |= {"summary": {}, "tasks": tasks, "groups": {}}
    assert measures(record) == {"piqa": 0.7, "perplexity": 12.5}
    record["metrics"] |= {"tasks": {}, "perplexity": {"text": "a.txt", "window": 64, "value": "inf"}}
    assert measures(record) == {"perplexity": float("inf")}
    assert cell([record], "perplexity").text("perplexity") == "inf"


def _measured(tasks, groups, summary=None, named=()):
    record = _record("rc-a", 0.25)
    record["evaluation"] = {"tasks": list(named)}
    metrics = {"tasks": tasks, "groups": groups}
    for entries in metrics.values():
        for name, values in entries.items():
            entries[name] = {"metrics": {metric: {"value": value, "stderr": None} for metric, value in values.items()}}
    record["metrics"] |= {**metrics, "summary": summary or {}}
    return measures(record)


def test_the_paper_s_six_tasks_by_name_have_their_average_and_no_columns_for_the_subjects():
    names = ("arc_challenge", "arc_easy", "hellaswag", "openbookqa", "winogrande")
    scores = {name: {"acc": (i + 1) / 10, "acc_norm": 0.9} for i, name in enumerate(names)}
    subjects = {f"mmlu_{name}": {"acc": 0.1} for name in ("anatomy", "law")}
    asked = ["wikitext", "mmlu", *names]  # as the paper's own command names them
    found = _measured(
        {**scores, **subjects, "wikitext": {"word_perplexity": 12.0}}, {"mmlu": {"acc": 0.6}}, named=asked
    )
    assert found == {
        "perplexity": 12.0,
        **{name: (i + 1) / 10 for i, name in enumerate(names)},
        "mmlu": 0.6,
        "average": pytest.approx((0.1 + 0.2 + 0.3 + 0.4 + 0.5 + 0.6) / 6),
    }


def test_tasks_beside_a_protocol_tags_and_other_metrics_are_shown():
    found = _measured({"arc_easy": {"acc": 0.5}, "piqa": {"acc": 0.7}}, {}, {"arc_easy": 0.5}, named=["piqa"])
    assert found == {"arc_easy": 0.5, "piqa": 0.7}
    assert _measured({"a": {"acc": 0.5}, "b": {"acc": 0.7}}, {}, named=["tag"]) == {"a": 0.5, "b": 0.7}
    found = _measured({"gsm8k": {"exact_match,strict-match": 0.25}, "text": {"byte_perplexity": 3.0}}, {})
    assert found == {"gsm8k exact_match,strict-match": 0.25, "text byte_perplexity": 3.0}
    rows = [Row(str(value), (Cell(value, None, 1),)) for value in (3.0, 4.0)]
    assert [row.cells[0].best for row in mark_best(rows, ["text byte_perplexity"])] == [True, False]


def test_all_runs_are_listed_with_every_column():
    ((setting, members),) = settings(_grid()).items()
    view = full_table(setting, members)
    assert view.columns == FULL
    assert len(view.rows) == 1 + 2 * len(METHODS)
    assert view.rows[0].title == "original"
    ((setting, members),) = settings([_record("rc-a", 0.125), _record("rc-a", 0.12)]).items()
    assert [row.title for row in full_table(setting, members).rows] == ["rc-a, 12%", "rc-a, 12.5%"]


def test_like_is_held_against_like():
    records = [_record("rc-a", 0.25, seed) for seed in (7, 42)] + [_record("weight-l2", 0.25, 42)]
    assert {m: r["recipe"]["seed"] for m, r in one_each(records, 0.25).items()} == {"rc-a": 42, "weight-l2": 42}
    assert ordered(["zzz", "rc-a", "taylor", "original"]) == ["taylor", "rc-a", "zzz"]


def _size(png):
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", png[16:24])


def test_every_figure_is_a_png_and_a_table(made):
    kinds = ["cost", "norms-25", "norms-50", "overlap-25", "overlap-50", "quality", "tasks"]
    kinds += ["overlap-by-layer-25", "overlap-by-layer-50"]
    assert {path.stem for path in made.glob("*.png")} == {f"setting1-{kind}" for kind in kinds}
    for path in made.glob("*.png"):
        assert min(_size(path.read_bytes())) > 300
        with path.with_suffix(".csv").open(newline="") as file:
            header, *rows = csv.reader(file)
        assert rows
        assert all(len(row) == len(header) for row in rows)


def test_the_numbers_of_the_figures_are_those_of_the_records(made):
    with (made / "setting1-overlap-by-layer-25.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(METHODS) * (len(METHODS) - 1) // 2 * len(LAYERS)
    keeps = {}
    for record in _grid():
        if record["recipe"].get("ratio") == 0.25 and record["recipe"]["seed"] == 0:
            bits = np.unpackbits(np.frombuffer(base64.b64decode(record["layers"]["6"]["keep"]), dtype=np.uint8))
            keeps[record["method"]] = set(np.flatnonzero(bits))
    row = next(r for r in rows if (r["method"], r["other"], r["layer"]) == ("taylor", "rc-a", "6"))
    a, b = keeps["taylor"], keeps["rc-a"]
    assert float(row["jaccard"]) == pytest.approx(len(a & b) / len(a | b))
    with (made / "setting1-quality.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["column"] for row in rows} == {"perplexity", "average"}
    assert len(rows) == 2 * (1 + 4 * len(METHODS))


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.outside, self.images, self.tables, self.ids, self.links = [], [], 0, set(), []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tables += tag == "table"
        self.ids |= {values["id"]} if "id" in values else set()
        if tag == "img":
            self.images.append(values)
        for name in ("src", "href"):
            target = values.get(name) or ""
            if target.startswith("#"):
                self.links.append(target[1:])
            elif target and not target.startswith("data:"):
                self.outside.append(target)


def test_the_page_needs_nothing_outside_itself(made):
    text = (made / "report.html").read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    assert not page.outside
    assert not re.search(r"https?://|url\(|@import", re.sub(r"base64,[^\"]*", "", text))
    assert len(page.images) == len(list(made.glob("*.png")))
    assert all(image["alt"] for image in page.images)
    assert set(page.links) <= page.ids
    assert page.tables >= 4
    assert "no &lt;memory&gt; &amp;\nno luck" in text
    assert '<b>42.100 ± 2.970</b> (2)<span class="paper">paper 15.244</span>' in text


def test_the_markdown_has_the_tables_and_the_figures(made):
    text = (made / "report.md").read_text(encoding="utf-8")
    lines = text.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("**Table 1")) + 2
    assert lines[head].count("|") == lines[head + 1].count("|") == lines[head + 2].count("|") == 8
    assert lines[head + 3].startswith("| Taylor | **42.100 ± 2.970** (2) [15.244] |")
    for name in re.findall(r"\]\((.*?\.png)\)", text):
        assert (made / name).is_file()
    assert "&lt;" not in text
    assert any(line.endswith(": no <memory> & no luck") for line in lines)


def test_the_same_records_make_the_same_report(made, tmp_path):
    failed = _record("rc-a", 0.75, status="failed", error="no <memory> &\nno luck")
    write_report(_save([*_grid(), failed], tmp_path / "results"), tmp_path / "out")
    for path in made.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_originals_alone_make_a_report(tmp_path):
    write_report(_save([_record("original")], tmp_path / "results"), tmp_path / "out")
    assert "| original | 20.000 |" in (tmp_path / "out" / "report.md").read_text()


def test_models_that_are_broken_throughout_make_a_report(tmp_path):
    records = [_record(method, 0.25, perplexity=float("inf")) for method in ("rc-a", "random")]
    for record in records:
        for layer in record["layers"].values():
            layer["norm"] = {"kept": 0.0, "dropped": 0.0}
    write_report(_save(records, tmp_path / "results"), tmp_path / "out")
    assert "| inf |" in (tmp_path / "out" / "report.md").read_text()


def _sized(samples, perplexity, method="rc-a"):
    record = _record(method, 0.25, perplexity=perplexity, id=f"{method}-{samples}")
    record["recipe"] |= {"samples": samples}
    return record


def test_sizes_of_the_calibration_text_stand_side_by_side():
    records = [_sized(128, 20.0), _sized(16, 30.0), _sized(64, 25.0), _sized(16, 40.0, "act-l2")]
    (view,) = text_tables(settings(records))
    assert view.title.startswith("Calibration of rc-a, 25%")
    assert [row.title for row in view.rows] == ["bookcorpus 16 x 128", "bookcorpus 64 x 128", "bookcorpus 128 x 128"]
    place = view.columns.index(PERPLEXITY)
    assert [row.cells[place].mean for row in view.rows] == [30.0, 25.0, 20.0]
    assert [row.cells[place].best for row in view.rows] == [False, False, True]


def test_what_goes_from_each_layer_is_drawn_where_it_differs(tmp_path):
    entropy = {"blocks": [5.0, 1.0], "attention": [2.0, 0.5], "mlp": [3.0, 0.25]}
    told = {"allocation": {"transfer_entropy": entropy}}
    kept = {"attention": {"0": [4, 4]}, "mlp": {"0": [40, 30]}, "blocks": [1]}
    even = {"attention": {}, "mlp": {"0": [40, 30], "1": [40, 30]}, "blocks": []}
    records = [_record("let-llm", 0.25, kept=kept, **told), _record("act-l2", 0.25, kept=even)]
    (made,) = (p for p in pictures(records, "x") if "allocation" in p.name)
    assert {row for row in made.rows if row[0] == "let-llm"} == {
        ("let-llm", "attention", 0, 0.0, 2.0),
        ("let-llm", "mlp", 0, 0.25, 3.0),
        ("let-llm", "blocks", 0, 0.0, 5.0),
        ("let-llm", "blocks", 1, 1.0, 1.0),
    }
    assert not any("allocation" in p.name for p in pictures(records[1:], "x"))


def test_the_command_says_where_the_report_is(tmp_path, command):
    _save([_record("original")], tmp_path / "results")
    code, out, _ = command("report", tmp_path / "results", "-o", tmp_path / "out")
    assert code == 0
    assert out.endswith(f"open {tmp_path / 'out' / 'report.html'}\n")


def test_nothing_to_report_is_one_line(tmp_path):
    with pytest.raises(ExperimentError, match="holds no finished run; 'dicer run"):
        write_report(tmp_path / "results", tmp_path / "out")
    _save([_record("rc-a", 0.25, status="failed", error="x")], tmp_path / "results")
    with pytest.raises(ExperimentError, match=r"holds no finished run \(1 failed\)"):
        write_report(tmp_path / "results", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_older_record_is_one_line(tmp_path):
    results = tmp_path / "results"
    (path,) = _save([_record("original")], results).rglob("*.json")
    path.write_text(json.dumps({"format": 0}))
    with pytest.raises(ExperimentError, match="has format 0, and this version of dicer reads 1"):
        write_report(results, tmp_path / "out")


@pytest.mark.parametrize("library", ["jinja2", "matplotlib"])
def test_a_missing_library_is_one_line(tmp_path, monkeypatch, library):
    results = _save([_record("original"), _record("rc-a", 0.25)], tmp_path / "results")
    for name in [name for name in sys.modules if name.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ExperimentError, match=rf"need {library}: pip install 'dicer\[report\]'"):
        write_report(results, tmp_path / "out")


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(OutputError, match="cannot be written to"):
        write_report(_save([_record("original")], tmp_path / "results"), tmp_path / "out")


@pytest.fixture
def report_refused(refused, tmp_path, monkeypatch):
    """The one line that ``dicer report`` ends with, before anything is drawn."""
    monkeypatch.setattr("dicer.study.report.pages.pictures", lambda *_: pytest.fail("a figure was drawn"))
    return lambda out, results="results": refused("report", tmp_path / results, "-o", tmp_path / out)


@pytest.mark.parametrize(
    ("out", "there", "says"),
    [
        ("out", {"report.html": "my thesis"}, "is not empty and holds no earlier report"),
        ("out", {"notes.txt": "mine"}, "is not empty and holds no earlier report"),
        ("out", {"report.html": "mine", "report.md": "{}"}, "is not empty and holds no earlier report"),
        ("out", {"report.md/inside": "mine"}, "cannot be written to"),
        ("results", {}, "lies within the results"),
        ("results/deep/report", {}, "lies within the results"),
        ("other/../results/report", {}, "lies within the results"),
        ("link", {}, "lies within the results"),
    ],
)
def test_what_others_wrote_is_left_alone(tmp_path, report_refused, out, there, says):
    _save([_record("original"), _record("rc-a", 0.25)], tmp_path / "results")
    (tmp_path / "link").symlink_to(tmp_path / "results")
    for name, text in there.items():
        (tmp_path / out / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / out / name).write_text(text)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert says in report_refused(out)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_report_is_made_again_over_an_earlier_one(tmp_path):
    results, out = _save([_record("original")], tmp_path / "results"), tmp_path / "out"
    out.mkdir()
    (out / "report.html.partial").write_text("<half")  # of a first report that was killed
    for more in ([], [_record("rc-a", 0.25)]):
        write_report(_save(more, results), out)
        (out / "notes.txt").write_text("mine")
    assert "2 finished runs" in (out / "report.html").read_text()
    (out / "report.html").unlink()  # as in docs/results, where the page is too large to keep
    write_report(results, out)
    assert (out / "notes.txt").read_text() == "mine"
    assert not list(out.glob("*.partial"))


def test_the_committed_reports_are_known_as_such():
    for folder in (RECORDS / "paper-tables", RECORDS / "what-to-prune"):
        assert report._is_report(folder, {path.name for path in folder.iterdir()})


def test_a_place_without_permission_is_told_before_anything_is_drawn(tmp_path, monkeypatch, report_refused):
    _save([_record("original")], tmp_path / "results")
    monkeypatch.setattr(os, "access", lambda _, mode: not mode & os.W_OK)  # root is denied nothing
    assert f"no permission in {tmp_path}" in report_refused("out/deep")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["is_dir", "iterdir"])
def test_results_that_may_not_be_read_are_one_line(tmp_path, monkeypatch, report_refused, name):
    _save([_record("original")], tmp_path / "closed" / "results")
    found = getattr(Path, name)

    def denied(path, *rest, **more):
        if "closed" in path.parts:
            raise PermissionError(13, "Permission denied", str(path))
        return found(path, *rest, **more)

    monkeypatch.setattr(Path, name, denied)  # root is denied nothing
    assert "Permission denied" in report_refused("out", "closed/results")


def test_a_folder_of_records_that_may_not_be_read_is_not_passed_over(tmp_path, monkeypatch, report_refused):
    _save([_record("original"), _record("rc-a", 0.25)], tmp_path / "results")
    found = Path.iterdir

    def denied(path):
        if path.parts[-2:] == ("rc-a", "logs"):
            raise PermissionError(13, "Permission denied", str(path))
        return found(path)

    monkeypatch.setattr(Path, "iterdir", denied)
    assert "rc-a/logs cannot be read: Permission denied." in report_refused("out")


def _changed(record, where, value):
    """A record with another value at a dotted place; without it for ``...``."""
    changed = copy.deepcopy(record)
    *way, last = where.split(".")
    inner = changed
    for name in way:
        inner = inner[name]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return changed


ALWAYS = ("id", "status", "method", "text", "model", "recipe", "evaluation", "environment", "versions", "git")
DAMAGES = [
    *((name, ..., f"('{name}' is missing)") for name in (*ALWAYS, "metrics", "seconds", "memory", "layers")),
    *((name, 5, f"({name}: ") for name in (*ALWAYS, "metrics", "seconds", "memory", "layers")),
    *((name, None, f"({name}: ") for name in (*ALWAYS, "metrics", "seconds", "memory", "layers") if name != "git"),
    ("method", "$\\frac$", "(method: "),
    ("status", "odd", "(status: "),
    ("recipe.ratio", ..., "('recipe.ratio' is missing)"),
    ("recipe.ratio", "0.25", "(recipe.ratio: "),
    ("recipe.seed", [], "(recipe.seed: "),
    ("recipe.samples", ..., "('recipe.samples' is missing)"),
    ("recipe.calib", {}, "(recipe.calib: "),
    ("model.name", 1, "(model.name: "),
    ("evaluation.tasks", 1, "(evaluation.tasks: "),
    ("metrics.summary", [], "(metrics.summary: "),
    ("metrics.summary.average", "high", "(metrics.summary.average."),
    ("metrics.tasks", {"a": {}}, "('metrics.tasks.a.metrics' is missing)"),
    ("metrics.perplexity", {"text": "a"}, "('metrics.perplexity.window' is missing)"),
    ("seconds.score", "long", "(seconds.score: "),
    ("memory.score", 1, "(memory.score: "),
    ("layers.5", [], "(layers.5: "),
    ("layers.5.keep", "?", "(layers.5: "),
    ("layers.5.keep", "AAAA", "(layers.5: Value error, keep must have one bit for each unit"),
    ("layers.five", {"units": 1, "keep": "AA=="}, "(layers.five."),
    ("kept", {"mlp": {"5": [0, 0]}}, "(kept: Value error, more is kept than there is"),
    ("kept", {"mlp": {"5": [4, 5]}}, "(kept: Value error, more is kept than there is"),
    ("kept", {"mlp": {"5": [4]}}, "('kept.mlp.5.1' is missing)"),
    ("allocation", {"transfer_entropy": {"mlp": 1}}, "(allocation.transfer_entropy.mlp: "),
]


@pytest.mark.parametrize(("where", "value", "says"), DAMAGES, ids=lambda part: str(part)[:30])
def test_a_damaged_record_is_one_line_that_says_where(tmp_path, report_refused, where, value, says):
    _save([_record("original")], tmp_path / "results")
    path = tmp_path / "results" / "a" / "rc-a" / "logs" / "b.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(_changed(_record("rc-a", 0.25), where, value)))
    line = report_refused("out")
    assert f"{path} is no whole record of a run {says}" in line
    assert line.endswith("; move it out of the results folder.\n")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 5_000 + "1" + "}" * 5_000, '"\\ud800"', "\0", ""])
def test_what_is_no_json_object_is_one_line(tmp_path, report_refused, text):
    path = tmp_path / "results" / "a" / "b" / "logs" / "c.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert f"{path} is no record of a run" in report_refused("out")


def test_odd_records_that_are_whole_make_a_report(tmp_path):
    """Numbers that are none, layers that keep nothing or that only one method has, integers beyond any float."""
    first, second = _record("rc-a", 0.25), _record("act-l2", 0.25)
    nothing = {"units": UNITS, "keep": pack(np.arange(0), UNITS), "norm": {"kept": "nan", "dropped": "inf"}}
    first["layers"], second["layers"] = {"5": nothing}, {"6": {**nothing, "norm": None}}
    first["metrics"]["summary"]["average"] = 10**400
    kept, short = {"mlp": {"5": [4, 0], "6": [4, 2]}}, {"transfer_entropy": {"mlp": ["nan"], "blocks": []}}
    first |= {"kept": kept, "allocation": short}
    write_report(_save([first, second], tmp_path / "results"), tmp_path / "out")
    rows = (tmp_path / "out" / "setting1-overlap-25.csv").read_text().splitlines()
    assert rows[1:] == ["rc-a,rc-a,1.0", "rc-a,act-l2,nan", "act-l2,rc-a,nan", "act-l2,act-l2,1.0"]


@pytest.mark.parametrize("path", sorted(RECORDS.glob("*/records/*/*/logs/*.json")), ids=lambda path: path.stem)
def test_the_committed_records_are_whole(path):
    assert read_record(path) == json.loads(path.read_bytes())


PROBE = """<script>
addEventListener("load", () => {
  const sizes = [...document.querySelectorAll("img, svg")].map(
    (e) => [e.getBoundingClientRect().width, e.getBoundingClientRect().height, e.naturalWidth || 1]);
  const wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
  document.body.setAttribute("data-probe", JSON.stringify({sizes, wide}));
});
</script></body>"""


@pytest.mark.skipif(not CHROMIUM.exists(), reason="no /usr/bin/chromium to open the report with")
def test_a_browser_shows_every_figure_and_has_nothing_to_complain_of(made, tmp_path):
    page = tmp_path / "page.html"
    page.write_text((made / "report.html").read_text(encoding="utf-8").replace("</body>", PROBE), encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    flags += "--disable-component-update --disable-sync --virtual-time-budget=5000 --enable-logging=stderr"
    command = [str(CHROMIUM), *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr
    probe = json.loads(html.unescape(re.search(r'data-probe="(.*?)"', done.stdout)[1]))
    assert len(probe["sizes"]) == len(list(made.glob("*.png")))
    assert all(min(size) > 0 for size in probe["sizes"])
    assert not probe["wide"]  # tables scroll in their own boxes
