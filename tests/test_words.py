"""What files say is cleaned at one place: on the terminal, in a model card, in a report."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from recorded import record, save
from tiny import save_tiny

import dicer
from dicer.study.report.pages import write_report
from dicer.words import LINE, code, markdown, one_line, plain

HOSTILE = "a\x1b[31mred\x07\r\nb\u202eevil\u200b\x00\ud800\x9b2Jc"
RAW = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b\u202e\ud800-\udfff]")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "llama")


@pytest.mark.parametrize("show", [plain, one_line, markdown, code])
def test_nothing_raw(show):
    shown = show(HOSTILE)
    assert "\n" not in shown
    assert not RAW.search(shown)
    shown.encode()


def test_plain():
    assert plain("a\tb\nc\x1b[0m é") == r"a b c\x1b[0m é"
    assert plain("a\nb\x07", keep="\n") == "a\nb\\x07"
    assert plain("x" * LINE, LINE) == "x" * LINE
    cut = plain("begin" + "x" * 10_000 + "end", LINE)
    assert len(cut) == LINE
    assert (cut[:5], cut[-3:], cut.count(" … ")) == ("begin", "end", 1)


def test_markdown():
    assert markdown("[a](b) <c> *d* `e` |f| \\") == r"\[a\](b) \<c\> \*d\* \`e\` \|f\| \\"
    assert (code("a"), code("a`b"), code("``")) == ("`a`", "`` a`b ``", "``` `` ```")


def _edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.update(model_type=HOSTILE[:20]),
        lambda config: config.update(model_type="x" * 5000),
        lambda config: config.update(architectures=[HOSTILE[:20]]),
        lambda config: config.update(hidden_act=HOSTILE[:20]),
        lambda config: config.update(hidden_act="y" * 5000),
        lambda config: config.update(auto_map={"AutoModelForCausalLM": HOSTILE[:20] + "z" * 5000}),
        lambda config: config.update({HOSTILE[:20] + "num_layers": 10**9}),
        lambda config: config.update(dtype=HOSTILE[:20]),
    ],
)
def test_config(command, tmp_path, model, change):
    folder = shutil.copytree(model, tmp_path / "model")
    _edit(folder / "config.json", change)
    _clean(command("info", folder))
    _clean(command("prune", folder, "-o", tmp_path / "out", "--method", "weight-l2"))


def _clean(ended):
    for text in (ended.out, ended.err):
        assert not RAW.search(text), text
        assert all(len(line) <= LINE for line in text.splitlines())
    assert ended.code == 0 or (ended.err.startswith("dicer: ") and ended.err.count("\n") == 1)


@pytest.mark.parametrize("key", ["name", "model_type"])
def test_plan(command, tmp_path, model, key):
    dicer.make_plan(model, dicer.Recipe(method="weight-l2")).save(tmp_path / "plan")
    hostile = HOSTILE.replace("\ud800", "") + "\n---\nlicense: mit\n" + "x" * 5000
    _edit(tmp_path / "plan" / "dicer_plan.json", lambda plan: plan["model"].update({key: hostile}))
    ended = command("apply", tmp_path / "plan", model, "-o", tmp_path / "out")
    _clean(ended)
    if key == "name":
        card = (tmp_path / "out" / "README.md").read_text()
        assert not RAW.search(card)
        assert "license: mit" not in card.partition("\n---\n")[0]
        assert "\nlicense" not in card


def test_files_of_words(command, tmp_path, model):
    for name, text in {
        "a.toml": 'method = "\\u001b[2J"',
        "b.toml": '"\\u001b[2J" = 1',
        "c.toml": f"method = '{'x' * 5000}'",
    }.items():
        (tmp_path / name).write_text(text)
        _clean(command("prune", model, "-o", tmp_path / "out", "--recipe", tmp_path / name))
        _clean(command("run", tmp_path / name, "-o", tmp_path / "r"))
    (tmp_path / "a.jsonl").write_text(json.dumps({"\x1b[2J": "a", "y" * 5000: "b"}))
    _clean(command("prune", model, "-o", tmp_path / "out", "--calib", tmp_path / "a.jsonl"))
    (tmp_path / "a.json").write_text(json.dumps({"\x1b[2J": [0.5], "z" * 5000: 1}))
    _clean(command("prune", model, "-o", tmp_path / "out", "--allocate", tmp_path / "a.json"))
    _clean(command("prune", "\x1b[2J", "-o", tmp_path / "out"))
    _clean(command("\x1b[2J"))


def test_report(tmp_path):
    words = "[x](http://y) <script>alert(1)</script> | `a` $\\frac$ \x1b[2J"
    failed = record("rc-a", 0.75, status="failed", error=f"{words}\nsecond")
    done = [record("original", also={"text": words}), record("rc-a", 0.25, also={"text": words, "git": words})]
    write_report(save([*done, failed], tmp_path / "results"), tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert not RAW.search(text)
    assert "](http" not in text.replace(r"\](http", "")
    assert "<script>" not in text
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script>" not in page
    assert not RAW.search(page)
