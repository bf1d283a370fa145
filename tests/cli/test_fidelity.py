"""What was lost of the dense model, on the command line: eval --against, prune --fidelity, run and report."""

from __future__ import annotations

import json
import re

import pytest
from tiny import save_tiny, tiny_model, tiny_tokenizer

import dicer
from dicer.cli.main import main
from dicer.errors import ModelError
from dicer.study.records import read_records
from dicer.study.report.pages import write_report

TEXT = "a text that is long enough for some windows of a tiny model, " * 8
QUESTIONS = [{"question": f"Q{i}", "choices": ["yes", "no"], "answer": i % 2} for i in range(8)]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("DICER_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def pruned(tmp_path_factory, model):
    out = tmp_path_factory.mktemp("pruned") / "out"
    words = ["prune", str(model), "-o", str(out), "--method", "weight-l2", "--ratio", "0.5"]
    assert main(words) == 0
    return out


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return path


def _cells(out, name):
    line = next(line for line in out.splitlines() if name in line and "│" in line)
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_eval_against(run, model, pruned, text, questions, tmp_path):
    file = tmp_path / "result.json"
    words = ("--against", model, "--text", f"builtin,{text}", "--window", 32, "--windows", 3, "--questions", questions)
    out = run("eval", pruned, *words, "--limit", 4, "-o", file)
    result = json.loads(file.read_text())
    found = result["fidelity"]
    first, second = found["texts"]
    assert [one["text"] for one in found["texts"]] == ["builtin", "text.txt"]
    assert found["bytes"] < found["against"]["bytes"]
    assert f"out ({found['bytes']:,} bytes) against llama ({found['against']['bytes']:,} bytes)" in out
    assert _cells(out, "KL, mean")[1:] == [f"{o['kl']['mean']:.6f} ± {o['kl']['stderr']:.6f}" for o in (first, second)]
    assert _cells(out, "same most likely")[1].startswith(f"{first['same_token']['value']:.3f} ± ")
    assert f"{found['leakage']['value']:+.3f} ± {found['leakage']['stderr']:.3f}." in out
    assert _cells(out, "tokens alike")[1].startswith(f"{found['greedy']['agreed']['value']:.1f} ± ")
    assert found["questions"]["n"] == 4
    assert _cells(out, "as a choice")[3] == "0.500"
    assert str(tmp_path) not in file.read_text()
    assert run("eval", pruned, *words, "--limit", 4, "-o", file, "--overwrite") == out  # from the cache


def test_model_against_itself_in_other_words(run, model):
    out = run("eval", model, "--against", model, "--text", "builtin:code", "--windows", 1)
    assert _cells(out, "KL, mean")[1] == "0.000000"
    assert _cells(out, "the worst fifth")[1] == "-"
    assert "Perplexity is" not in out  # of one text nothing can be told apart


def test_prune_says_what_was_lost(run, model, text, tmp_path):
    out = tmp_path / "out"
    printed = run("prune", model, "-o", out, "--fidelity", f"{text},builtin:code", "--ratio", "0.5")
    card = (out / "README.md").read_text()
    alone = run("eval", out, "--against", model, "--text", f"{text},builtin:code")
    for row in ("KL, mean", "same most likely", "times the dense", "tokens alike"):
        assert _cells(printed, row) == _cells(alone, row)
    kl = _cells(printed, "KL, mean")[1:]
    assert f"| KL(dense, pruned), nats a token | {kl[0]} | {kl[1]} |" in card
    assert "| | text.txt | builtin:code |" in card
    assert "Not measured" not in card
    assert re.search(r"is the same for the first [\d.]+ ± [\d.]+ of 64 tokens", card)


def test_model_in_memory(text):
    recipe = dicer.Recipe(method="weight-l2", ratio=0.5)
    result = dicer.prune(tiny_model("llama"), recipe, tokenizer=tiny_tokenizer(), fidelity_text=str(text))
    assert result.model is not None
    assert result.fidelity["bytes"] == result.after.nbytes
    assert result.fidelity["texts"][0]["kl"]["mean"] > 0
    with pytest.raises(ModelError, match="has no tokenizer"):
        dicer.prune(tiny_model("llama"), recipe, fidelity_text=str(text))


@pytest.fixture
def other_tokenizer(tmp_path):
    folder = save_tiny(tmp_path / "other")
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"A":', '"X1":').replace('"B":', '"A":').replace('"X1":', '"B":'))
    return folder


def test_other_tokenizer(refused, model, other_tokenizer):
    refused("eval", model, "--against", other_tokenizer, "--window", 32, says=["llama and other have different token"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("eval", "MODEL", "--text", "builtin"), "--text has no effect without --against"),
        (("eval", "MODEL", "--perplexity", "builtin", "--questions", "q"), "--questions has no effect without --agai"),
        (("eval", "MODEL", "--against", "nowhere/at/all"), "there is no folder nowhere/at/all"),
        (("eval", "MODEL", "--against", ""), "the name of the model is empty"),
        (("eval", "MODEL", "--against", "MODEL", "--text", "builtin:cod"), "Did you mean 'builtin:code'?"),
        (("eval", "MODEL", "--against", "MODEL", "--text", "none.txt"), "none.txt cannot be read"),
        (("eval", "MODEL", "--against", "MODEL", "--window", "4096"), "use --window 128"),
        (("eval", "MODEL", "--against", "MODEL", "--questions", "none.jsonl"), "there is no file none.jsonl"),
        (("eval", "MODEL", "--against", "MODEL", "--limit", "3"), "--limit has no effect without"),
        (("prune", "MODEL", "-o", "out", "--fidelity", "builtin:cod"), "Did you mean 'builtin:code'?"),
        (("prune", "MODEL", "-o", "out", "--fidelity", "none.txt"), "none.txt cannot be read"),
        (("prune", "MODEL", "-o", "out", "--fidelity", "none.txt", "--dry-run"), "none.txt cannot be read"),
    ],
)
def test_bad_input(refused, monkeypatch, model, tmp_path, words, says):
    monkeypatch.chdir(tmp_path)
    refused(*(model if word == "MODEL" else word for word in words), says=[says])


EXPERIMENT = """
models = ["{model}"]
methods = ["weight-l2", "random"]
beside = ["{beside}"]
[evaluation]
against = "original"
text = ["{text}", "builtin:code"]
window = 32
windows = 3
questions = "{questions}"
"""


def test_experiment_with_a_model_beside(command, model, pruned, text, questions, tmp_path):
    file, results = tmp_path / "e.toml", tmp_path / "results"
    file.write_text(EXPERIMENT.format(model=model, beside=pruned, text=text, questions=questions))
    code, out, err = command("run", file, "-o", results)
    assert (code, err) == (0, ""), out
    records = {(r.model.name, r.method): r for r in read_records(results)}
    assert sorted(records) == [("llama", "original"), ("llama", "random"), ("llama", "weight-l2"), ("out", "original")]
    lost = {key: record.metrics.fidelity for key, record in records.items()}
    assert {fidelity.against.name for fidelity in lost.values()} == {"llama"}
    assert lost["llama", "original"].texts[0].kl.mean == 0
    assert lost["llama", "weight-l2"].texts[0].kl.mean > 0
    assert (
        command("run", file, "-o", results).out.startswith("4 skipped")
        or "4 skipped" in command("run", file, "-o", results).out
    )
    write_report(results, tmp_path / "report")
    page = (tmp_path / "report" / "report.md").read_text()
    rows = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("| ")}
    assert "KL, text.txt" in page
    for title in ("original", "out", "one answer for all", "weight-l2", "random"):
        assert title in rows


def test_each_run_with_its_own_dense_model(command, model, rows, text, tmp_path):
    other = save_tiny(tmp_path / "other", seed=1)
    file, results = tmp_path / "e.toml", tmp_path / "results"
    lines = (f'models = ["{model}", "{other}"]', 'methods = ["weight-l2"]', "original = false", "[evaluation]")
    file.write_text("\n".join((*lines, 'against = "original"', f'text = "{text}"', "window = 32\n")))
    code, _, err = command("run", file, "-o", results)
    assert (code, err) == (0, "")
    assert {(r.model.name, r.metrics.fidelity.against.name) for r in read_records(results)} == {
        ("llama", "llama"),
        ("other", "other"),
    }


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ('beside = ["x"]\n[evaluation]\nperplexity = "builtin"', "beside: name in evaluation.against"),
        ('[evaluation]\nagainst = "original"\ntext = "none.txt"', "none.txt cannot be read"),
        ('[evaluation]\nagainst = "original"\nquestions = "none.jsonl"', "there is no file none.jsonl"),
        ('[evaluation]\nagainst = "nowhere/at/all"', "there is no folder nowhere/at/all"),
    ],
)
def test_experiment_that_cannot_run(refused, model, tmp_path, tmp_path_factory, more, says):
    file = tmp_path / "e.toml"
    file.write_text(f'models = ["{model}"]\nmethods = ["weight-l2"]\n{more}\n')
    refused("run", file, "-o", tmp_path_factory.mktemp("results"), says=[says])
