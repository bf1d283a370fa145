"""dicer eval and dicer bench: what they print, and what they leave on disk."""

from __future__ import annotations

import json
import os
import re

import pytest
from tiny_tasks import CHOICES, write_choice

from dicer.cli import measure as cli_measure

TEXT = "a text that is long enough for some windows of a tiny model, " * 8


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    path = tmp_path_factory.mktemp("tasks")
    write_choice(path, "tiny_choice")
    for name in ("piqa", "winogrande", "hellaswag", "arc_easy", "arc_challenge"):
        write_choice(path, f"mine_{name}")
    return path


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def own_cache(monkeypatch, tmp_path_factory):
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("lm_eval", reason="pip install 'dicer[eval]' brings the harness")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def _cells(out, name):
    line = next(line for line in out.splitlines() if name in line and "│" in line)
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_eval_of_tasks_and_a_text(command, own_cache, model, tasks, text, tmp_path):
    file = tmp_path / "result.json"
    words = ("--tasks", "tiny_choice", "--include-path", tasks, "--perplexity", text, "--window", 32, "--windows", 4)
    code, out, err = command("eval", model, *words, "--batch-size", 2, "-o", file)
    assert (code, err) == (0, "")
    result = json.loads(file.read_text())
    metrics = result["tasks"]["tiny_choice"]["metrics"]
    acc = metrics["acc"]
    shown = ["tiny_choice", "1.5", str(len(CHOICES)), "0", "acc", f"{acc['value']:.4f}", f"± {acc['stderr']:.4f}"]
    assert _cells(out, "tiny_choice") == [*shown, "0.6000"]  # three of five are the first choice
    assert _cells(out, "acc_norm")[4:6] == ["acc_norm", f"{metrics['acc_norm']['value']:.4f}"]
    assert f"Perplexity of llama on text.txt: {result['perplexity']['value']:.4f} per token (4 windows" in out
    assert "Measured with lm_eval " in out
    assert f"Results: {file}" in out
    assert result["model"] == "llama"
    assert result["evaluation"]["batch_size"] == 2
    assert str(tasks.parent) not in file.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result.json", "text.txt"]


def test_eval_of_a_protocol(command, own_cache, model, tasks, text):
    words = ("--protocol", "let-llm", "--task-prefix", "mine_", "--include-path", tasks, "--limit", 2)
    code, out, err = command("eval", model, *words, "--perplexity", text, "--window", 32)
    assert (code, err) == (0, "")
    assert _cells(out, " piqa")[0] == "piqa"
    summary = out[out.index("Summary") :]
    accuracies = [float(_cells(summary, name)[1]) for name in ("piqa", "winogrande", "hellaswag", "arc_easy")]
    assert _cells(summary, "average")[1] == f"{accuracies[0]:.4f}"  # all five tasks hold the same documents
    assert _cells(summary, "perplexity")[0] == "perplexity"


def test_result_that_is_there(command, refused, model, words, tmp_path):
    file = tmp_path / "result.json"
    asked = ("eval", model, *words, "-o", file)
    assert command(*asked).code == 0
    first = file.read_bytes()
    assert refused(*asked) == f"dicer: {file} exists; choose another name or pass --overwrite.\n"
    assert command(*asked, "--overwrite").code == 0
    assert file.read_bytes() == first


def test_two_windows_of_a_text(run, model, text):
    printed = run("eval", model, "--perplexity", text, "--window", 32, "--windows", 1, "--also-window", 16)
    assert re.findall(r"per token \((\d) windows of (\d+) tokens\)", printed) == [("1", "32"), ("2", "16")]


def test_other_processes_than_the_first(command, monkeypatch, model, text, tmp_path):
    monkeypatch.setattr("dicer.evaluate.quality.rank", lambda: 1)
    file = tmp_path / "result.json"
    assert command("eval", model, "--perplexity", text, "--window", 16, "-o", file) == (0, "", "")
    assert not file.exists()


def test_bench(command, model, tmp_path):
    file = tmp_path / "bench.json"
    flags = ("--tokens", 3, "--batch-sizes", "1,2", "--prompt-length", 4, "--rounds", 2, "--dtype", "bfloat16")
    code, out, err = command("bench", model, model, *flags, "-o", file)
    assert (code, err) == (0, "")
    result = json.loads(file.read_text())
    assert [m["name"] for m in result["models"]] == ["llama", "llama"]
    assert [m["dtype"] for m in result["models"]] == ["bfloat16"] * 2
    assert _cells(out, "llama")[:3] == ["llama", f"{result['models'][0]['parameters']:,}", "1"]
    assert "3 tokens after 4, median of 2 rounds" in out
    assert "Peak of the process, all models together: host" in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("eval", "MODEL"), "nothing to measure"),
        (("eval", "MODEL", "--protocol", "randomnes"), "Did you mean 'randomness'?"),
        (("eval", "MODEL", "--perplexity", "builtin", "--window", "9999"), "use --window 128"),
        (("eval", "MODEL", "--perplexity", "builtin", "--window", "1"), "window: "),
        (("eval", "MODEL", "--perplexity", "none.txt"), "none.txt cannot be read"),
        (("eval", "MODEL", "--perplexity", "builtin", "--dtype", "int8"), "dtype: Input should be"),
        (("eval", "MODEL", "--perplexity", "builtin", "--device", "cuda:99"), "device 'cuda:99' cannot be used"),
        (("eval", "nowhere/at/all", "--perplexity", "builtin"), "there is no folder nowhere/at/all"),
        (("eval", "MODEL", "--perplexity", "builtin", "-o", "x" * 300), "File name too long"),
        (("eval", "MODEL", "--perplexity", "builtin", "-o", ""), "the name is empty"),
        (("bench", "MODEL", "-o", "x" * 300), "File name too long"),
        (("eval", "MODEL", "--perplexity", "builtin", "-o", "."), "is a folder; name a file"),
        (("eval", "MODEL", "--tasks", "x", "--include-path", "nowhere"), "no folder nowhere"),
        (("eval", "MODEL", "--tasks", "x", "--include-path", "x" * 300), "File name too long (--include-path)"),
        (("eval", "MODEL", "--perplexity", "builtin", "--num-fewshot", "0"), "--num-fewshot has no effect without"),
        (
            ("eval", "MODEL", "--perplexity", "builtin", "--limit", "3"),
            "--limit has no effect without --tasks or --pro",
        ),
        (("eval", "MODEL", "--perplexity", "builtin", "--limits", "a=3"), "--limits has no effect without --tasks"),
        (("eval", "MODEL", "--perplexity", "builtin", "--include-path", "."), "--include-path has no effect without"),
        (("eval", "MODEL", "--tasks", "x", "--task-prefix", "a"), "--task-prefix has no effect without --protocol"),
        (("eval", "MODEL", "--tasks", "x", "--windows", "3"), "--windows has no effect without --perplexity or"),
        (("eval", "MODEL", "--tasks", "x", "--also-window", "3"), "--also-window has no effect without --perplexity"),
        (("bench",), "Missing argument"),
        (("bench", "MODEL", "--batch-sizes", "1,many"), "batch sizes '1,many' cannot be read"),
        (("bench", "MODEL", "--tokens", "500"), "too few for"),
        (("bench", "MODEL", "MODEL", "--rounds", "0"), "rounds must be at least 1"),
    ],
)
def test_bad_input(refused, monkeypatch, model, tmp_path, words, says):
    monkeypatch.chdir(tmp_path)
    refused(*(model if word == "MODEL" else word for word in words), says=[says])


@pytest.fixture
def words(text):
    """A measurement of a second."""
    return ("--perplexity", text, "--window", 16, "--windows", 1)


def test_result_over_what_the_run_reads(refused, model, words, text):
    refused("eval", model, *words, "-o", text, "--overwrite", says=[text, "which this run reads"])


def test_results_of_the_other_command(command, refused, model, words, tmp_path):
    speed = ("bench", model, "--tokens", 2, "--batch-sizes", 1, "--prompt-length", 4, "--rounds", 1)
    files = {"bench": tmp_path / "bench.json", "eval": tmp_path / "eval.json"}
    for _ in range(2):
        assert command(*speed, "-o", files["bench"], "--overwrite").code == 0
        assert command("eval", model, *words, "-o", files["eval"], "--overwrite").code == 0
    refused(*speed, "-o", files["eval"], "--overwrite", says=["is no result of this command"])
    refused("eval", model, *words, "-o", files["bench"], "--overwrite", says=["is no result of this command"])


def test_result_behind_a_link_into_a_new_folder(command, model, words, tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "deep" / "result.json")
    assert command("eval", model, *words, "-o", tmp_path / "link.json").code == 0
    assert (tmp_path / "link.json").is_symlink()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["result.json"]


@pytest.mark.parametrize(("place", "says"), [("text.txt/r.json", "text.txt is a file"), ("no/r.json", "no permission")])
def test_folder_that_cannot_be_made(refused, monkeypatch, model, words, tmp_path, place, says):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root
    refused("eval", model, *words, "-o", tmp_path / place, says=[says])


def test_result_that_cannot_be_printed(command, monkeypatch, model, words, tmp_path):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cli_measure, "say", full)
    code, _, err = command("eval", model, *words, "-o", tmp_path / "result.json")
    assert (code, err.count("\n")) == (2, 1)
    assert json.loads((tmp_path / "result.json").read_text())["perplexity"]
