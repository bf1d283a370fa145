"""Tables: the paper's rows and columns, what is put together, and how sure a number is."""

from __future__ import annotations

from math import inf, sqrt

import numpy as np
import pytest
from recorded import METHODS, grid, record, scored

from dicer.study.columns import Measure, clear, floors, lower_is_better, measures
from dicer.study.report.paper import PERPLEXITY, TABLES, TITLES
from dicer.study.report.settings import describe, of_its_model, settings
from dicer.study.report.tables import (
    Cell,
    Row,
    cell,
    full_table,
    mark_best,
    paper_tables,
    paper_text_tables,
    text_tables,
)

FULL, SHORT = tuple(TITLES), (PERPLEXITY, "mmlu", "average")


def _paper(records):
    return [view for setting, members in settings(records).items() for view in paper_tables(setting, members)]


def test_paper_figures():
    by_number = {table.number: table for table in TABLES}
    assert sorted(by_number) == list(range(1, 10))
    columns = {**dict.fromkeys((1, 2, 9), SHORT), **dict.fromkeys((4, 5, 6, 7, 8), FULL), 3: FULL[:-1]}
    assert {number: table.columns for number, table in by_number.items()} == columns
    for table in TABLES:
        for row in table.rows:
            assert tuple(row.figures) == table.ratios
            assert all(len(figures) == len(table.columns) for figures in row.figures.values())
            for figures in row.figures.values():  # the average is the mean of the six, as far as three decimals tell
                if table.columns == FULL:
                    assert figures[-1] == pytest.approx(np.mean(figures[1:7]), abs=0.0021), (table.number, row.title)
    # What several tables print is the same in all: RC+A at 25% in Tables 1, 2, 4 and 9.
    found = {next(r for r in by_number[n].rows if r.method == "rc-a").figures[0.25] for n in (1, 2, 9)}
    assert found == {(14.944, 0.618, 0.524)}
    four = next(row for row in by_number[4].rows if row.seed == 42).figures[0.25]
    assert (four[0], four[4], four[-1]) == (14.944, 0.618, 0.524)


# As the paper's text has them, one row of each table: table, row, fraction removed, figures.
PRINTED = [
    (1, "Weight L2", 0.5, (190214.389, 0.251, 0.287)),
    (2, "Similarity Cluster + Mean Merge", 0.5, (15838.9, 0.266, 0.312)),
    (3, "Activation Mean (C4)", 0.25, (15.944, 0.352, 0.657, 0.505, 0.567, 0.244, 0.610)),
    (4, "Seed 7", 0.25, (14.948, 0.371, 0.660, 0.501, 0.617, 0.290, 0.658, 0.516)),
    (5, "Seed 0", 0.5, (35.790, 0.271, 0.519, 0.382, 0.479, 0.230, 0.573, 0.409)),
    (6, "RC+A", 0.25, (14.126, 0.414, 0.712, 0.502, 0.555, 0.272, 0.706, 0.527)),
    (7, "Random Prune", 0.5, (412660.209, 0.212, 0.262, 0.257, 0.248, 0.164, 0.508, 0.275)),
    (8, "Modulated-act Mean (C4)", 0.5, (82.340, 0.322, 0.549, 0.385, 0.330, 0.210, 0.564, 0.393)),
    (9, "Similarity Cluster (Post-act) + Activation L2", 0.5, (46.703, 0.412, 0.375)),
]


@pytest.mark.parametrize(("number", "title", "ratio", "figures"), PRINTED, ids=lambda value: str(value)[:12])
def test_paper_row(number, title, ratio, figures):
    rows = {row.title: row for row in TABLES[number - 1].rows}
    assert rows[title].figures[ratio] == figures


def test_rows_and_columns_of_the_paper():
    views = {view.title.split(":")[0]: view for view in _paper(grid())}
    assert {"Table 1", "Table 2"} <= set(views)
    assert "Table 6" not in views  # of another model than the first
    first = views["Table 1"]
    titles = ["Original", "Taylor", "Random Prune", "RC+A", "Activation Mean", "Activation L2", "Weight L2"]
    assert [row.title for row in first.rows] == titles
    assert (first.columns, first.ratios) == (SHORT, (0.25, 0.5))
    taylor = first.rows[1].cells
    assert [c.paper for c in taylor] == [15.244, 0.607, 0.504, 31.839, 0.476, 0.394]
    assert taylor[0].mean == pytest.approx(42.1)
    assert taylor[0].error == pytest.approx(np.std([40.0, 44.2], ddof=1))
    assert [c.mark for c in taylor] == ["best"] * 6
    assert not any(c.mark for row in first.rows if row.title != "Taylor" for c in row.cells)
    assert (first.rows[1].runs, taylor[0].text("perplexity")) == (2, "42.100 ± 2.970")


def test_wide_paper_table_ratio_by_ratio():
    texts = [record("act-mean", r, text=t, perplexity=100 * r) for r in (0.25, 0.5) for t in ("bookcorpus", "c4")]
    (view,) = (view for _, view in paper_text_tables(settings(texts)) if view.title.startswith("Table 8"))
    assert (view.ratios, list(view.groups)) == ((), ["25% pruning", "50% pruning"])
    assert [rows[1].cells[0].mean for rows in view.groups.values()] == [25.0, 50.0]


def test_another_model():
    views = _paper(grid("SmolLM2"))
    assert any(view.title.startswith("Table 6") for view in views)
    assert not any(view.has_paper for view in views)


def test_rows_of_seeds_and_of_texts():
    seeds = [record("rc-a", 0.25, seed, perplexity=10.0 + seed) for seed in (42, 0, 1, 7)]
    view = next(v for v in _paper([record("original"), *seeds]) if v.title.startswith("Table 4"))
    assert [row.cells[0].mean for row in view.rows] == [20.0, 52.0, 10.0, 11.0, 17.0]
    texts = [record("act-mean", 0.25, text=text, perplexity=p) for text, p in (("bookcorpus", 5.0), ("c4", 6.0))]
    view = next(v for _, v in paper_text_tables(settings(texts)) if v.title.startswith("Table 3"))
    assert [row.cells[0].mean for row in view.rows] == [5.0, 6.0]
    assert view.columns == FULL[:-1]


def test_settings_apart():
    others = [{"layers": "all"}, {"dtype": "bfloat16"}, {"calib_seed": 7}]
    records = [record("rc-a", 0.25, seed, also={"recipe": more}) for seed, more in enumerate(others)]
    records += [record("rc-a", 0.25, 8, also={"evaluation": {"limit": 10, "protocol": "let-llm"}})]
    groups = settings([record("original"), record("rc-a", 0.25), *records])
    assert [len(members) for members in groups.values()] == [2, 2, 1, 2, 1]  # measured as no original was
    common, apart = describe(list(groups))
    assert common == "Qwen/Qwen2.5-7B-Instruct, calibration bookcorpus 10 x 128"
    usual = "layers 5-26, protocol randomness"
    assert apart == [
        usual,
        "layers all, protocol randomness",
        f"{usual}, bfloat16",
        f"{usual}, calib_seed 7",  # said where nothing else tells two apart
        "layers 5-26, protocol let-llm, only 10 documents a task",
    ]


def test_settings_together():
    """How it was computed makes no setting, nor does a key that an earlier version did not know."""
    others = [{}, {"device": "cuda", "batch_size": 4, "gradient_checkpointing": True}, {"entropy_profile": None}]
    records = [record("rc-a", 0.25, seed, also={"recipe": more}) for seed, more in enumerate(others)]
    assert [len(members) for members in settings(records).values()] == [3]


def test_sizes_and_sources_of_texts_are_no_seeds():
    runs = [record("act-mean", 0.25, text="c4", perplexity=6.0)]
    for place, samples in enumerate((10, 100)):
        more = {"recipe": {"samples": samples}}
        runs.append(record("act-mean", 0.25, perplexity=4.0 + place, id=str(samples), also=more))
    stand_in = {"recipe": {"calib": "a-novel.txt"}}
    runs.append(record("act-mean", 0.25, perplexity=9.0, id="other", also=stand_in))
    found = [(setting, view) for setting, view in paper_text_tables(settings(runs)) if view.title.startswith("Table 3")]
    means = [[row.cells[0].mean for row in view.rows] for _, view in found]
    assert sorted(means) == [[4.0, 6.0], [5.0, 6.0], [9.0, 6.0]]
    assert not any(row.cells[0].error for _, view in found for row in view.rows)
    texts = [setting.text for setting, _ in found]
    assert any("bookcorpus 100 x 128" in text for text in texts)
    assert any("bookcorpus (a-novel.txt) 10 x 128" in text for text in texts)


def test_originals_of_several_models():
    records = [record("original", model=name, perplexity=value) for name, value in (("a", 5.0), ("b", 9.0))]
    groups = settings([*records, record("rc-a", 0.25, model="b")])
    found = {setting.name: full_table(members).rows[0].cells[0].mean for setting, members in groups.items()}
    assert found == {"a": 5.0, "b": 9.0}


def test_all_runs():
    ((_, members),) = settings(grid()).items()
    view = full_table(members)
    assert view.columns == FULL
    assert [(head, len(rows)) for head, rows in view.groups.items()] == [("", 1), ("25%", 9), ("50%", len(METHODS))]
    ((_, members),) = settings([record("rc-a", 0.125), record("rc-a", 0.12)]).items()
    assert list(full_table(members).groups) == ["12%", "12.5%"]


def test_sizes_of_the_text_side_by_side():
    sized = [(128, 20.0, "rc-a"), (16, 30.0, "rc-a"), (64, 25.0, "rc-a"), (16, 40.0, "act-l2")]
    records = [
        record(method, 0.25, perplexity=p, id=f"{method}-{samples}", also={"recipe": {"samples": samples}})
        for samples, p, method in sized
    ]
    ((_, view),) = text_tables(settings(records))
    assert list(view.groups) == ["rc-a, 25%"]
    assert [row.title for row in view.rows] == ["bookcorpus 16 x 128", "bookcorpus 64 x 128", "bookcorpus 128 x 128"]
    place = view.columns.index(PERPLEXITY)
    assert [(row.cells[place].mean, row.cells[place].mark) for row in view.rows] == [
        (30.0, ""),
        (25.0, ""),
        (20.0, "unsure"),
    ]


def _measured(tasks, groups, summary=None, named=(), **metrics):
    """The values of a record without a protocol's summary, or with one."""
    entries = [
        {
            name: {"metrics": {metric: {"value": value, "stderr": None} for metric, value in values.items()}}
            for name, values in kind.items()
        }
        for kind in (tasks, groups)
    ]
    more = {"tasks": entries[0], "groups": entries[1], "summary": summary or {}, **metrics}
    asked = {"tasks": list(named), "task_prefix": "local_"}
    found = measures(record("rc-a", 0.25, also={"evaluation": asked, "metrics": more}))
    return {column: measure.value for column, measure in found.items()}


def test_columns_without_a_protocol():
    tasks = {"local_piqa": {"acc": 0.7, "acc_norm": 0.8}, "local_wikitext": {"word_perplexity": 12.5}}
    assert _measured(tasks, {}) == {"piqa": 0.7, "perplexity": 12.5}
    token = {"text": "a.txt", "window": 64, "value": "inf", "also": {"window": 1024, "value": 3.0}}
    assert _measured({}, {}, perplexity=token) == {"perplexity": inf, "perplexity, windows of 1,024": 3.0}
    assert _measured({"gsm8k": {"exact_match,strict-match": 0.25}, "text": {"byte_perplexity": 3.0}}, {}) == {
        "gsm8k exact_match,strict-match": 0.25,
        "text byte_perplexity": 3.0,
    }


def test_columns_of_tasks_by_name():
    """The paper's six have their average, MMLU's subjects no columns, and a tag shows what it stands for."""
    names = ("arc_challenge", "arc_easy", "hellaswag", "openbookqa", "winogrande")
    scores = {name: {"acc": (i + 1) / 10, "acc_norm": 0.9} for i, name in enumerate(names)}
    tasks = {**scores, "mmlu_law": {"acc": 0.1}, "wikitext": {"word_perplexity": 12.0}}
    found = _measured(tasks, {"mmlu": {"acc": 0.6}}, named=["wikitext", "mmlu", *names])
    own = {name: (i + 1) / 10 for i, name in enumerate(names)}
    assert found == {"perplexity": 12.0, **own, "mmlu": 0.6, "average": pytest.approx(2.1 / 6)}
    assert _measured({"a": {"acc": 0.5}, "b": {"acc": 0.7}}, {}, named=["tag"]) == {"a": 0.5, "b": 0.7}
    both = _measured({"arc_easy": {"acc": 0.5}, "piqa": {"acc": 0.7}}, {}, {"arc_easy": 0.5}, named=["piqa"])
    assert both == {"arc_easy": 0.5, "piqa": 0.7}


def test_errors_of_a_record():
    found = measures(scored("rc-a", 0.3, 20))
    each = sqrt(0.3 * 0.7 / 19)
    assert found["mmlu"] == (0.3, pytest.approx(each))
    assert found["average"] == (0.3, pytest.approx(each / sqrt(6)))  # of six independent tasks
    assert found["perplexity"] == (20.0, None)
    assert measures(record("rc-a", 0.25))["average"].error is None  # one unknown is enough
    normed = {
        "arc_easy": {"metrics": {"acc": {"value": 0.4, "stderr": 0.1}, "acc_norm": {"value": 0.6, "stderr": 0.2}}}
    }
    more = {"metrics": {"tasks": normed, "summary": {"arc_easy": 0.6, "average": 0.6}}}
    found = measures(record("rc-a", 0.25, also=more))
    assert (found["arc_easy"].error, found["average"].error) == (0.2, 0.2)  # of the metric that the protocol takes


@pytest.mark.parametrize(("value", "stderr", "n"), [(0.0, 0.0, 20), (1.0, 0.0, 20), (0.25, None, 20)])
def test_error_where_the_harness_knows_none(value, stderr, n):
    """0 of 20 right is no certainty, and MMLU at one document a subject is none either."""
    task = {"piqa": {"metrics": {"acc": {"value": value, "stderr": stderr}}, "n": n}}
    found = measures(record("rc-a", 0.25, also={"metrics": {"tasks": task, "summary": {}}}))
    share = (value * n + 1) / (n + 2)
    assert found["piqa"].error == pytest.approx(sqrt(share * (1 - share) / (n + 2)))


def test_error_over_seeds():
    """The spread where it is larger than what the documents leave open, and that where seeds agree by luck."""
    apart = [scored("rc-a", share, 10_000, seed=seed) for seed, share in enumerate((0.2, 0.4))]
    assert cell(apart, "mmlu").error == pytest.approx(sqrt(2) / 10)
    alike = [scored("rc-a", 0.3, 20, seed=seed) for seed in range(3)]
    assert cell(alike, "mmlu").error == pytest.approx(sqrt(0.3 * 0.7 / 19))
    assert cell([record("rc-a", 0.25, perplexity=inf)], "perplexity").text("perplexity") == "inf"


def test_two_standard_errors():
    assert clear(Measure(1.0, 0.1), Measure(1.29, 0.1)) is True
    assert clear(Measure(1.0, 0.1), Measure(1.28, 0.1)) is False
    assert clear(Measure(1.0, 0.1), Measure(9.0)) is None


@pytest.mark.parametrize(
    ("column", "cells", "marks"),
    [
        ("average", [(0.5, 0.01), (0.4, 0.01)], ["best", ""]),
        ("average", [(0.5, 0.1), (0.4, 0.1), (0.3, 0.1)], ["", "", ""]),  # 20 documents a task: no best
        ("average", [(0.5, 0.01), (0.4, 0.01), (0.3, 0.2)], ["", "", ""]),  # the third may be as good
        ("average", [(0.5, 0.01), (0.4, None)], ["unsure", ""]),
        ("perplexity", [(50.0, None), (40.0, None)], ["", "unsure"]),
        ("perplexity", [(40.0, None), (40.0, None)], ["", ""]),
        ("text byte_perplexity", [(3.0, 0.1), (4.0, 0.1)], ["best", ""]),
        ("perplexity", [(inf, None), (inf, None)], ["", ""]),
        ("perplexity", [(40.0, None), (None, None)], ["", ""]),
    ],
)
def test_marks(column, cells, marks):
    rows = [Row(str(i), (Cell(mean, error, 1),)) for i, (mean, error) in enumerate(cells)]
    assert [row.cells[0].mark for row in mark_best(rows, [column])] == marks


def _compared(method, kl, ratio=None, name="Qwen2.5-7B-Instruct", floor=0.25):
    """A record of a model that was held against one with the fingerprint of QWEN."""
    score = {"value": 0.5, "stderr": 0.1}
    one = {"text": "t", "kl": {"mean": kl, "stderr": 0.01}, "same_token": score, "perplexity": {"ratio": 1 + kl}}
    answered = {"choice": {**score, "floor": floor}, "open": {**score, "floor": 0.1}}
    fidelity = {
        "against": {"name": "dense", "fingerprint": "Qwen2.5-7B-Instruct"},
        "texts": [one, {**one, "text": "u"}],
        "greedy": {"agreed": {"value": 9.0, "stderr": None}, "degenerate": score},
        "questions": answered,
    }
    tasks = {"mmlu": {"metrics": {"acc": score}, "n": 10, "floor": 0.3}}
    more = {"summary": {}, "tasks": tasks, "fidelity": fidelity}
    return record(method, ratio, also={"metrics": more, "evaluation": {"against": "dense"}}, model=name)


def test_what_was_lost():
    found = measures(_compared("rc-a", 0.2, 0.25))
    assert (found["KL, t"], found["perplexity over dense, u"]) == (Measure(0.2, 0.01), Measure(1.2))
    assert (found["tokens alike"], found["degenerate"]) == (Measure(9.0), Measure(0.5, 0.1))
    assert [lower_is_better(name) for name in found] == [
        name.startswith("KL") or "perplexity" in name or name == "degenerate" for name in found
    ]
    assert floors(_compared("rc-a", 0.2, 0.25)) == {
        "mmlu": Measure(0.3),
        "questions, choice": Measure(0.25),
        "questions, open": Measure(0.1),
    }


def test_model_beside_and_floors_are_rows():
    runs = [_compared("original", 0.0), _compared("original", 0.1, name="Q4.gguf"), _compared("rc-a", 0.2, 0.25)]
    (members,) = settings(runs).values()  # the other model stands in the setting of the dense one
    view = full_table(members)
    titles = [row.title for row in view.groups[""]]
    assert titles == ["original", "Q4.gguf", "one answer for all"]
    place = view.columns.index("KL, t")
    assert [row.cells[place].mean for row in view.groups[""]] == [0.0, 0.1, None]
    assert view.groups[""][2].cells[view.columns.index("mmlu")].mean == 0.3
    assert {record.model.name for record in of_its_model(members)} == {"Qwen/Qwen2.5-7B-Instruct"}
    assert "one answer for all" not in [r.title for r in full_table([record("rc-a", 0.25)]).groups["25%"]]
