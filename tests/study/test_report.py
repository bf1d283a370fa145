"""The report: figures that hold their numbers and their noise, one HTML file that a browser shows, Markdown."""

from __future__ import annotations

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
from recorded import LAYERS, METHODS, QWEN, UNITS, grid, record, save, scored, values

from dicer.cli import main as cli
from dicer.errors import ExperimentError, OutputError
from dicer.study.columns import Measure
from dicer.study.record import make_record, pack
from dicer.study.records import copy_records
from dicer.study.report.figure_style import COLOURS, GREY, ordered
from dicer.study.report.figures import one_each, pictures
from dicer.study.report.figures_quality import _dots, _lines, points
from dicer.study.report.pages import write_report

CHROMIUM = Path("/usr/bin/chromium")
RESULTS = Path(__file__).parents[2] / "docs" / "results"
FAILED = record("rc-a", 0.75, status="failed", error="no <memory> &\nno luck")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A report of a whole grid, and a run that failed."""
    results = save([*grid(), FAILED], tmp_path_factory.mktemp("results"))
    out = tmp_path_factory.mktemp("report") / "deep" / "report"
    write_report(results, out)
    return out


def test_like_against_like():
    records = [record("rc-a", 0.25, seed) for seed in (7, 42)] + [record("weight-l2", 0.25, 42)]
    assert {method: one.recipe.seed for method, one in one_each(records, 0.25).items()} == {"rc-a": 42, "weight-l2": 42}
    assert ordered(["zzz", "rc-a", "taylor", "original"]) == ["taylor", "rc-a", "zzz"]


def _size(png):
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", png[16:24])


def _rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_figure_has_its_numbers(made):
    kinds = ["cost", "norms-25", "norms-50", "overlap-25", "overlap-50", "quality", "tasks"]
    kinds += ["overlap-by-layer-25", "overlap-by-layer-50"]
    assert {path.stem for path in made.glob("*.png")} == {f"setting1-{kind}" for kind in kinds}
    for path in made.glob("*.png"):
        assert min(_size(path.read_bytes())) > 300
        rows = _rows(path.with_suffix(".csv"))
        assert rows
        assert all(None not in row and None not in row.values() for row in rows)


def test_numbers_of_figures(made):
    rows = _rows(made / "setting1-overlap-by-layer-25.csv")
    assert len(rows) == len(METHODS) * (len(METHODS) - 1) // 2 * len(LAYERS)
    a, b = (record(method, 0.25, 0).layers["6"].mask for method in ("taylor", "rc-a"))
    row = next(r for r in rows if (r["method"], r["other"], r["layer"]) == ("taylor", "rc-a", "6"))
    assert float(row["jaccard"]) == pytest.approx((a & b).sum() / (a | b).sum())
    rows = _rows(made / "setting1-quality.csv")
    assert {row["column"] for row in rows} == {"perplexity", "average"}
    assert len(rows) == 2 * (1 + 4 * len(METHODS))
    picture = pictures([scored("rc-a", 0.3, 20)], "x")[1]
    assert (picture.name, picture.header) == ("x-tasks", ("column", "method", "ratio", "seed", "value", "error"))
    assert picture.rows[0] == ("arc_challenge", "rc-a", 0.25, 42, 0.3, pytest.approx((0.3 * 0.7 / 19) ** 0.5))


def _told(records, column="average"):
    return {point.method: point.is_told for point in points(records, column)}


def test_grey_is_what_noise_hides():
    shares = {"taylor": 0.30, "rc-a": 0.35, "act-l2": 0.40}
    assert _told([scored(method, share, 20) for method, share in shares.items()]) == dict.fromkeys(shares, False)
    assert _told([scored(method, share, 20_000) for method, share in shares.items()]) == dict.fromkeys(shares, True)
    far = [scored(method, share, 20) for method, share in {**shares, "random": 0.05}.items()]
    assert _told(far) == {"taylor": True, "rc-a": True, "act-l2": True, "random": True}
    assert _told(far, "perplexity") == dict.fromkeys(_told(far), True)  # no noise is known of it
    assert _told([scored("rc-a", 0.3, 20), scored("rc-a", 0.3, 20, 0.5)]) == {"rc-a": True}  # nothing stands beside
    assert "Grey: within two standard errors of every other method" in pictures(far, "x")[0].caption


def _drawn_colours(axis):
    """Of the dots that are drawn with an error."""
    from matplotlib.colors import to_hex

    return [to_hex(container.lines[0].get_color()).upper() for container in axis.containers]


def test_few_methods_are_lines_with_their_names_and_errors():
    runs = [scored(m, s, 20, r) for m, s in (("taylor", 0.3), ("rc-a", 0.9)) for r in (0.25, 0.5)]
    runs += [scored("act-l2", 0.9, 20, 0.5)]
    drawn = _lines({"average": (points(runs, "average"), Measure(0.9, 0.1))}, "neurons")
    (axis,) = drawn.axes
    assert [text.get_text() for text in axis.texts] == ["taylor", "rc-a", "act-l2"]
    assert len(set(_drawn_colours(axis))) == 3
    errors = [
        point.measure.error
        for method in ordered(METHODS)
        for point in points(runs, "average")
        if point.method == method
    ]
    bars = [container.lines[2][0].get_segments()[0][:, 1] for container in axis.containers]
    assert [high - low for low, high in bars] == pytest.approx([2 * error for error in errors])
    near = [scored(method, 0.3, 20, ratio) for method in ("taylor", "rc-a") for ratio in (0.25, 0.5)]
    (axis,) = _lines({"average": (points(near, "average"), None)}, "neurons").axes
    assert set(_drawn_colours(axis)) == {GREY.upper()}
    heights = [text.get_position()[1] for text in axis.texts]
    assert heights[1] - heights[0] >= 0.05  # one line of text, where both lines end in the same place


def test_many_methods_are_rows_of_dots():
    """One row a method and one colour a ratio: a hundred methods can still be told apart."""
    methods = [f"method-{i:02}" for i in range(30)]
    runs = [record(m, r, perplexity=100.0 - i + r) for i, m in enumerate(methods) for r in (0.25, 0.5)]
    runs += [record("broken", 0.25, perplexity=float("inf"))]
    assert len(pictures(runs, "x")) > 1
    (axis,) = _dots({"perplexity": (points(runs, "perplexity"), None)}, [*methods[::-1], "broken"]).axes
    assert [label.get_text() for label in axis.get_yticklabels()] == [*methods[::-1], "broken"]
    assert set(_drawn_colours(axis)) == {colour.upper() for colour in COLOURS[:2]}
    assert [text.get_text() for text in axis.texts] == ["inf "]


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


def test_page_needs_nothing_outside_itself(made):
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
    assert "<td>Taylor (2 runs)</td>" in text
    assert '<b>42.100</b> <span class="error">± 2.970</span><span class="paper">paper 15.244</span>' in text


def test_markdown(made):
    text = (made / "report.md").read_text(encoding="utf-8")
    lines = text.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("**Table 1")) + 2
    assert lines[head].count("|") == lines[head + 1].count("|") == lines[head + 2].count("|") == 8
    assert lines[head + 3].startswith("| Taylor (2 runs) | **42.100 ± 2.970** [15.244] |")
    for name in re.findall(r"\]\((.*?\.png)\)", text):
        assert (made / name).is_file()
    assert "&lt;" not in text
    assert any(line.endswith(r": no \<memory\> \& no luck") for line in lines)


def test_a_setting_is_said_once(made, tmp_path):
    for name in ("report.md", "report.html"):
        assert (made / name).read_text().count("layers 5-26") == 1
    records = [
        record(method, 0.25, also={"recipe": {"layers": r}}) for method in ("rc-a", "taylor") for r in ("1-", "2-")
    ]
    write_report(
        save([one.model_copy(update={"id": str(i)}) for i, one in enumerate(records)], tmp_path / "r"), tmp_path / "o"
    )
    text = (tmp_path / "o" / "report.md").read_text()
    assert f"In all settings: Qwen/{QWEN}, calibration bookcorpus 10 x 128, protocol randomness." in text
    assert re.findall(r"^## (Setting.*)$", text, re.MULTILINE) == ["Setting 1: layers 1-", "Setting 2: layers 2-"]


def test_same_report_from_folder_and_packed_file(made, tmp_path):
    results = save([*grid(), FAILED], tmp_path / "results")
    copy_records(results, tmp_path / "a.jsonl.gz")
    write_report(tmp_path / "a.jsonl.gz", tmp_path / "out")
    for path in made.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_originals_alone(tmp_path):
    write_report(save([record("original")], tmp_path / "results"), tmp_path / "out")
    assert "| original | 20.000 |" in (tmp_path / "out" / "report.md").read_text()


def test_models_that_are_broken_throughout(tmp_path):
    nothing = {str(i): {"units": 8, "keep": "AA==", "norm": {"kept": 0.0, "dropped": 0.0}} for i in LAYERS}
    records = [record(m, r, perplexity=float("inf"), layers=nothing) for m in ("rc-a", "random") for r in (0.25, 0.5)]
    write_report(save(records, tmp_path / "results"), tmp_path / "out")
    assert "| inf |" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of matplotlib, at the edges of floats
@pytest.mark.parametrize("value", [10**30, 1e308, 5e-324, -1.0])
def test_numbers_of_any_size(tmp_path, value):
    """No scale of a figure is made of numbers that it cannot have."""
    said = values("rc-a", 0.25)
    for layer in said["layers"].values():
        layer["norm"]["dropped"] = layer["score"]["kept"] = value
    said["metrics"]["summary"]["word_perplexity"] = said["seconds"]["score"] = value
    save([make_record(said), record("random", 0.25)], tmp_path / "results")
    write_report(tmp_path / "results", tmp_path / "out")
    assert (tmp_path / "out" / "report.html").is_file()


def test_odd_records(tmp_path):
    """Numbers that are none, layers that keep nothing or that only one method has, integers beyond any float."""
    nothing = {"units": UNITS, "keep": pack(np.arange(0), UNITS), "norm": {"kept": "nan", "dropped": "inf"}}
    kept, short = {"mlp": {"5": (4, 0), "6": (4, 2)}}, {"transfer_entropy": {"mlp": ["nan"], "blocks": []}}
    first = record("rc-a", 0.25, average=1e300, layers={"5": nothing}, kept=kept, allocation=short)
    second = record("act-l2", 0.25, layers={"6": {**nothing, "norm": None}})
    (path, *_) = save([first], tmp_path / "results").rglob("*.json")
    path.write_text(path.read_text().replace("1e+300", "1" + "0" * 400))
    write_report(save([second], tmp_path / "results"), tmp_path / "out")
    rows = (tmp_path / "out" / "setting1-overlap-25.csv").read_text().splitlines()
    assert rows[1:] == ["rc-a,rc-a,1.0", "rc-a,act-l2,nan", "act-l2,rc-a,nan", "act-l2,act-l2,1.0"]


def test_allocation_where_it_differs():
    entropy = {"blocks": [5.0, 1.0], "attention": [2.0, 0.5], "mlp": [3.0, 0.25]}
    kept = {"attention": {"0": (4, 4)}, "mlp": {"0": (40, 30)}, "blocks": [1]}
    even = {"attention": {}, "mlp": {"0": (40, 30), "1": (40, 30)}, "blocks": []}
    records = [record("let-llm", 0.25, kept=kept, allocation={"transfer_entropy": entropy})]
    records += [record("act-l2", 0.25, kept=even)]
    (made,) = (p for p in pictures(records, "x") if "allocation" in p.name)
    assert {row for row in made.rows if row[0] == "let-llm"} == {
        ("let-llm", "attention", 0, 0.0, 2.0),
        ("let-llm", "mlp", 0, 0.25, 3.0),
        ("let-llm", "blocks", 0, 0.0, 5.0),
        ("let-llm", "blocks", 1, 1.0, 1.0),
    }
    assert not any("allocation" in p.name for p in pictures(records[1:], "x"))


def _command(monkeypatch, capfd, *words):
    """``dicer`` with these words: exit code, output, errors."""
    return cli.main([*map(str, words)]), *capfd.readouterr()


def test_commands(tmp_path, monkeypatch, capfd):
    save([record("original")], tmp_path / "results")
    packed, out = tmp_path / "a.jsonl.gz", tmp_path / "out"
    assert _command(monkeypatch, capfd, "pack", tmp_path / "results", "-o", packed)[:2] == (
        0,
        f"1 records to {packed}\n",
    )
    code, said, _ = _command(monkeypatch, capfd, "report", packed, "-o", out)
    assert (code, said.endswith(f"open {out / 'report.html'}\n")) == (0, True)
    back = _command(monkeypatch, capfd, "pack", packed, "-o", tmp_path / "back")
    assert back[:2] == (0, f"1 records to {tmp_path / 'back'}\n")
    code, said, line = _command(monkeypatch, capfd, "pack", tmp_path / "results", "-o", packed)
    assert (code, said, line.count("\n")) == (2, "", 1)


def test_nothing_to_report(tmp_path):
    with pytest.raises(ExperimentError, match="holds no finished run; 'dicer run"):
        write_report(tmp_path / "results", tmp_path / "out")
    save([FAILED], tmp_path / "results")
    with pytest.raises(ExperimentError, match=r"holds no finished run \(1 failed\)"):
        write_report(tmp_path / "results", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_library(tmp_path, monkeypatch):
    library = "matplotlib"
    results = save([record("original"), record("rc-a", 0.25)], tmp_path / "results")
    for name in [name for name in sys.modules if name.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ExperimentError, match=rf"need {library}: pip install 'dicer\[report\]'"):
        write_report(results, tmp_path / "out")


def _refused(tmp_path, monkeypatch, capfd, out, results="results"):
    """The one line that ``dicer report`` ends with, before anything is drawn."""
    monkeypatch.setattr("dicer.study.report.pages.pictures", lambda *_: pytest.fail("a figure was drawn"))
    code, written, line = _command(monkeypatch, capfd, "report", tmp_path / results, "-o", tmp_path / out)
    assert (code, written, line.count("\n")) == (2, "", 1)
    return line


@pytest.mark.parametrize(
    ("out", "there", "says"),
    [
        ("out", {"report.html": "my thesis"}, "is not empty and holds no earlier report"),
        ("out", {"notes.txt": "mine"}, "is not empty and holds no earlier report"),
        ("out", {"report.html": "mine", "report.md": "{}"}, "is not empty and holds no earlier report"),
        ("out", {"report.md/inside": "mine"}, "cannot write the report to"),
        ("results", {}, "lies within the results"),
        ("results/deep/report", {}, "lies within the results"),
        ("other/../results/report", {}, "lies within the results"),
        ("link", {}, "lies within the results"),
    ],
)
def test_what_others_wrote_is_left_alone(tmp_path, monkeypatch, capfd, out, there, says):
    save([record("original"), record("rc-a", 0.25)], tmp_path / "results")
    (tmp_path / "link").symlink_to(tmp_path / "results")
    for name, text in there.items():
        (tmp_path / out / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / out / name).write_text(text)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert says in _refused(tmp_path, monkeypatch, capfd, out)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_report_over_an_earlier_one(tmp_path):
    results, out = save([record("original")], tmp_path / "results"), tmp_path / "out"
    left = out / ".dicer-killed.partial"  # of a first report that was killed
    left.mkdir(parents=True)
    (left / "new").write_text("<half")
    for more in ([], [record("rc-a", 0.25)]):
        write_report(save(more, results), out)
        (out / "notes.txt").write_text("mine")
    assert "2 finished runs" in (out / "report.html").read_text()
    (out / "report.html").unlink()  # who keeps the Markdown alone
    write_report(results, out)
    assert (out / "notes.txt").read_text() == "mine"
    assert not list(out.glob("*.partial"))


def test_place_that_cannot_be_written(tmp_path, monkeypatch, capfd):
    save([record("original")], tmp_path / "results")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        write_report(tmp_path / "results", tmp_path / "file")
    monkeypatch.setattr(os, "access", lambda _, mode: not mode & os.W_OK)  # root is denied nothing
    assert f"no permission to write in {tmp_path}" in _refused(tmp_path, monkeypatch, capfd, "out/deep")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "closed"), [("is_dir", "results"), ("iterdir", "results"), ("iterdir", "logs")])
def test_results_that_may_not_be_read(tmp_path, monkeypatch, capfd, name, closed):
    """A folder, or one of records inside it, which must not be passed over."""
    save([record("original"), record("rc-a", 0.25)], tmp_path / "results")
    found = getattr(Path, name)

    def denied(path, *rest, **more):
        if closed in path.parts:
            raise PermissionError(13, "Permission denied", str(path))
        return found(path, *rest, **more)

    monkeypatch.setattr(Path, name, denied)  # root is denied nothing
    assert "cannot be read: Permission denied." in _refused(tmp_path, monkeypatch, capfd, "out")


def test_committed_figures_are_those_that_are_shown():
    text = (RESULTS / "README.md").read_text(encoding="utf-8")
    shown = {RESULTS / name for name in re.findall(r"!\[[^\]]+\]\(([^)]+\.png)\)", text)}
    assert shown == set(RESULTS.rglob("*.png"))
    assert sum(path.stat().st_size for path in RESULTS.rglob("*") if path.is_file()) < 1.5e6


PROBE = """<script>
addEventListener("load", () => {
  const sizes = [...document.querySelectorAll("img, svg")].map(
    (e) => [e.getBoundingClientRect().width, e.getBoundingClientRect().height, e.naturalWidth || 1]);
  const wide = [document.documentElement, ...document.querySelectorAll(".scroll")].some(
    (e) => e.scrollWidth > e.clientWidth);
  document.body.setAttribute("data-probe", JSON.stringify({sizes, wide, width: innerWidth}));
});
</script></body>"""


@pytest.mark.skipif(not CHROMIUM.exists(), reason="no /usr/bin/chromium to open the report with")
def test_browser(made, tmp_path):
    """Every figure is there, nothing complains, and no table is wider than a laptop's screen."""
    page = tmp_path / "page.html"
    page.write_text((made / "report.html").read_text(encoding="utf-8").replace("</body>", PROBE), encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    flags += "--disable-component-update --disable-sync --virtual-time-budget=5000 --enable-logging=stderr "
    flags += "--window-size=1280,800"
    command = [str(CHROMIUM), *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr
    probe = json.loads(html.unescape(re.search(r'data-probe="(.*?)"', done.stdout)[1]))
    assert len(probe["sizes"]) == len(list(made.glob("*.png")))
    assert all(min(size) > 0 for size in probe["sizes"])
    assert (probe["width"], probe["wide"]) == (1280, False)


def test_records_without_one_column(tmp_path):
    """What was measured may be damaged in all that is drawn; the tables are still made."""
    runs = [record(method, 0.25) for method in ("rc-a", "taylor")]
    runs = [
        run.model_copy(update={"metrics": run.metrics.model_copy(update={"summary": {}, "perplexity": None})})
        for run in runs
    ]
    write_report(save(runs, tmp_path / "results"), tmp_path / "out")
    assert (tmp_path / "out" / "report.html").is_file()
