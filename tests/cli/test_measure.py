"""dicer eval and dicer bench: what they print, and what they leave on disk."""

from __future__ import annotations

import json
import os
import socket

import pytest
from tiny import save_tiny
from tiny_tasks import CHOICES, write_choice

from dicer.cli import measure as cli_measure
from dicer.cli import terminal
from dicer.errors import OutputError

TEXT = "a text that is long enough for some windows of a tiny model, " * 8


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "llama")


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


def test_eval_prints_a_table_and_writes_the_same_numbers(command, own_cache, model, tasks, text, tmp_path):
    file = tmp_path / "result.json"
    words = ("--tasks", "tiny_choice", "--include-path", tasks, "--perplexity", text, "--window", 32, "--windows", 4)
    code, out, err = command("eval", model, *words, "--batch-size", 2, "-o", file)
    assert (code, err) == (0, "")
    result = json.loads(file.read_text())
    metrics = result["tasks"]["tiny_choice"]["metrics"]
    acc = metrics["acc"]
    shown = ["tiny_choice", "1.5", str(len(CHOICES)), "0", "acc", f"{acc['value']:.4f}", f"± {acc['stderr']:.4f}"]
    assert _cells(out, "tiny_choice") == shown
    assert _cells(out, "acc_norm")[4:6] == ["acc_norm", f"{metrics['acc_norm']['value']:.4f}"]
    assert f"Perplexity of llama on text.txt: {result['perplexity']['value']:.4f} per token (4 windows" in out
    assert "Measured with lm_eval " in out
    assert f"Results: {file}" in out
    assert result["model"] == "llama"
    assert result["evaluation"]["batch_size"] == 2
    assert str(tasks.parent) not in file.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result.json", "text.txt"]


def test_eval_of_a_protocol_prints_its_row(command, own_cache, model, tasks, text):
    words = ("--protocol", "let-llm", "--task-prefix", "mine_", "--include-path", tasks, "--limit", 2)
    code, out, err = command("eval", model, *words, "--perplexity", text, "--window", 32)
    assert (code, err) == (0, "")
    assert _cells(out, " piqa")[0] == "piqa"
    summary = out[out.index("Summary") :]
    accuracies = [float(_cells(summary, name)[1]) for name in ("piqa", "winogrande", "hellaswag", "arc_easy")]
    assert _cells(summary, "average")[1] == f"{accuracies[0]:.4f}"  # all five tasks hold the same documents
    assert _cells(summary, "perplexity")[0] == "perplexity"


def test_a_result_is_overwritten_only_when_asked(command, model, text, tmp_path):
    file = tmp_path / "result.json"
    words = ("eval", model, "--perplexity", text, "--window", 16, "--windows", 1, "-o", file)
    assert command(*words)[0] == 0
    first = file.read_bytes()
    code, _, err = command(*words)
    assert (code, err) == (2, f"dicer: {file} exists; choose another name or pass --overwrite.\n")
    assert command(*words, "--overwrite")[0] == 0
    assert file.read_bytes() == first


def test_other_processes_than_the_first_say_nothing(command, monkeypatch, model, text, tmp_path):
    monkeypatch.setenv("RANK", "1")
    file = tmp_path / "result.json"
    assert command("eval", model, "--perplexity", text, "--window", 16, "-o", file) == (0, "", "")
    assert not file.exists()


def test_bench_prints_and_writes(command, model, tmp_path):
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
        (("eval", "MODEL", "--perplexity", "builtin", "-o", "x" * 300), "cannot be written: File name too long"),
        (("eval", "MODEL", "--perplexity", "builtin", "-o", ""), "the name is empty"),
        (("bench", "MODEL", "-o", "x" * 300), "cannot be written: File name too long"),
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
        (("bench",), "Missing argument"),
        (("bench", "MODEL", "--batch-sizes", "1,many"), "batch sizes '1,many' cannot be read"),
        (("bench", "MODEL", "--tokens", "500"), "too few for"),
        (("bench", "MODEL", "MODEL", "--rounds", "0"), "rounds must be at least 1"),
    ],
)
def test_bad_input_is_one_line_and_nothing_on_disk(command, monkeypatch, model, tmp_path, words, says):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(*(str(model) if word == "MODEL" else word for word in words))
    assert (code, out) == (2, "")
    assert err.startswith("dicer: ")
    assert err.count("\n") == 1
    assert says in err
    assert not list(tmp_path.iterdir())


@pytest.fixture
def words(text):
    """A measurement of a second."""
    return ("--perplexity", text, "--window", 16, "--windows", 1)


def _fifo(path):
    os.mkfifo(path)


def _socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_fifo, "is no regular file"),
        (_socket, "is no regular file"),
        (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
        (lambda path: path.write_text("mine"), "is no result of this command"),
        (lambda path: path.write_bytes(b"\xff"), "is no result of this command"),
        (lambda path: path.write_text("[]"), "is no result of this command"),
        (lambda path: path.write_text("[" * 10**5), "is no result of this command"),
        (lambda path: path.write_text('{"model": "mine", "evaluation": {}}'), "is no result of this command"),
    ],
)
def test_what_is_no_result_is_never_replaced(command, monkeypatch, model, words, tmp_path, make, says):
    monkeypatch.chdir(tmp_path)  # the names of sockets are short
    file = tmp_path / "result.json"
    make(file)
    before = file.lstat()
    for asked in (("eval", model, *words), ("bench", model)):
        code, out, err = command(*asked, "-o", file, "--overwrite")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert says in err
    assert file.lstat() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result.json", "text.txt"]


def test_a_large_file_is_not_read_to_know_that_it_is_no_result(tmp_path, monkeypatch):
    file = tmp_path / "large.json"
    file.write_text('{"a": 1}')
    terminal.check_file(file, overwrite=True, keys=["a"])
    monkeypatch.setattr(terminal, "_LARGEST_RESULT", 7)
    with pytest.raises(OutputError, match="is no result"):
        terminal.check_file(file, overwrite=True, keys=["a"])


def test_what_a_run_reads_is_never_replaced(command, model, words, text):
    before = text.read_bytes()
    code, _, err = command("eval", model, *words, "-o", text, "--overwrite")
    assert (code, err) == (2, f"dicer: {text} is what this run reads; choose another name.\n")
    assert text.read_bytes() == before


def test_results_of_bench_are_overwritten_and_those_of_eval_are_not(command, model, words, tmp_path):
    speed = ("bench", model, "--tokens", 2, "--batch-sizes", 1, "--prompt-length", 4, "--rounds", 1)
    files = {"bench": tmp_path / "bench.json", "eval": tmp_path / "eval.json"}
    for _ in range(2):
        assert command(*speed, "-o", files["bench"], "--overwrite")[0] == 0
        assert command("eval", model, *words, "-o", files["eval"], "--overwrite")[0] == 0
    assert command(*speed, "-o", files["eval"], "--overwrite")[0] == 2
    assert command("eval", model, *words, "-o", files["bench"], "--overwrite")[0] == 2


def test_the_folder_of_a_result_is_made_and_a_link_kept(command, model, words, tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "deep" / "result.json")
    assert command("eval", model, *words, "-o", tmp_path / "link.json")[0] == 0
    assert (tmp_path / "link.json").is_symlink()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["result.json"]


@pytest.mark.parametrize(("place", "says"), [("text.txt/r.json", "Not a directory"), ("no/r.json", "no permission")])
def test_a_folder_that_cannot_be_made(command, monkeypatch, model, words, tmp_path, place, says):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root
    code, _, err = command("eval", model, *words, "-o", tmp_path / place)
    assert (code, err.count("\n")) == (2, 1)
    assert says in err


def test_a_result_is_written_before_it_is_printed(command, monkeypatch, model, words, tmp_path):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cli_measure, "say", full)
    code, _, err = command("eval", model, *words, "-o", tmp_path / "result.json")
    assert (code, err.count("\n")) == (2, 1)
    assert json.loads((tmp_path / "result.json").read_text())["perplexity"]


def test_a_result_that_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    file = tmp_path / "result.json"
    terminal.write_result(file, {"a": 1})

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(terminal.Path, "replace", full)
    with pytest.raises(OutputError, match="No space left"):
        terminal.write_result(file, {"a": 2})
    assert json.loads(file.read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_a_result_file_is_json_whatever_the_numbers(tmp_path):
    terminal.write_result(tmp_path / "result.json", {"value": float("inf")})
    found = json.loads((tmp_path / "result.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert float(found["value"]) == float("inf")
