"""dicer export: what it prints, what it leaves, and what it refuses with one line and exit code 2."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest
from reading import File, know_tiny_tokenizer, save_shaped, save_stock

from dicer.write.export.llama_cpp import file as gguf_file


@pytest.fixture(autouse=True)
def _known(monkeypatch):
    know_tiny_tokenizer(monkeypatch)


@pytest.fixture
def checkpoint(tmp_path):
    """Layers of two widths."""
    return save_shaped(tmp_path / "model", save_stock(tmp_path / "stock"), {0: {"intermediate_size": 24}})


@pytest.mark.parametrize("type", [None, "f32", "f16", "bf16", "q8_0"])
def test_gguf(run, checkpoint, tmp_path, type):
    out = tmp_path / "new" / "model.gguf"
    printed = run("export", checkpoint, "--to", "gguf", "-o", out, *(["--type", type] if type else []))
    size = out.stat().st_size
    lines = printed.splitlines()
    assert lines[0] == f"Wrote {out} ({size:,} bytes): {type or 'f32'}, llama.cpp's architecture 'deci'."
    widths = [32, 64, 64, 64] if type == "q8_0" else [24, 40, 40, 40]
    assert File(out).keys["feed_forward_length"] == widths
    assert lines[1:] == ["Note: padding adds 7,680 parameters (17.7%)."] * (type == "q8_0")
    assert [path.name for path in out.parent.iterdir()] == ["model.gguf"]


def test_stock(run, checkpoint, tmp_path):
    out = tmp_path / "out"
    printed = run("export", checkpoint, "--to", "stock", "-o", out, "--pad", "16")
    assert "stock LlamaForCausalLM, no code" in printed
    assert "parameters are padding" in printed
    assert json.loads((out / "config.json").read_text())["intermediate_size"] == 48
    run("export", checkpoint, "--to", "stock", "-o", out, "--overwrite")
    assert json.loads((out / "config.json").read_text())["intermediate_size"] == 40


def test_overwrite(run, refused, checkpoint, tmp_path):
    out = tmp_path / "model.gguf"
    words = ("export", checkpoint, "--to", "gguf", "-o", out)
    run(*words)
    refused(*words, says=[out, "exists", "--overwrite"])
    run(*words, "--overwrite", "--type", "f16")
    assert File(out).keys["general.file_type"] == 1
    out.write_text("notes")
    refused(*words, "--overwrite", says=["no GGUF file", "leaves it"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--to", "gguf"], ["--output"]),
        (["-o", "OUT"], ["--to"]),
        (["--to", "onnx", "-o", "OUT"], ["'onnx'"]),
        (["--to", "gguf", "-o", "OUT", "--type", "q4_k_m"], ["'q4_k_m'"]),
        (["--to", "gguf", "-o", "OUT", "--pad", "0"], ["--pad", "greater than or equal to 1"]),
        (["--to", "stock", "-o", "OUT", "--type", "f16"], ["--type f16 is of GGUF files"]),
        (["--to", "gguf", "-o", "FOLDER"], ["is a folder; name a file"]),
        (["--to", "gguf", "-o", "MODEL/model.safetensors"], ["exists"]),
        (["--to", "stock", "-o", "MODEL"], ["which this run reads"]),
        (["--to", "stock", "-o", "FOLDER"], ["is not empty"]),
    ],
)
def test_words(refused, checkpoint, tmp_path, words, says):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine")
    places = {"OUT": tmp_path / "out", "FOLDER": tmp_path / "folder", "MODEL": checkpoint}
    places["MODEL/model.safetensors"] = checkpoint / "model.safetensors"
    refused("export", checkpoint, *(places.get(word, word) for word in words), says=says)


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_family(refused, run, tmp_path, family):
    model = save_stock(tmp_path / "model", family)
    words = ("export", model, "--to", "gguf", "-o", tmp_path / "out.gguf")
    if family == "opt":
        refused(*words, says=["no architecture for the family opt", "llama"])
    else:
        run(*words)


def test_unknown_tokenizer(refused, checkpoint, tmp_path, monkeypatch):
    monkeypatch.undo()
    refused("export", checkpoint, "--to", "gguf", "-o", tmp_path / "out.gguf", says=["a name for"])


def test_values_that_f16_cannot_hold(refused, tmp_path):
    from safetensors.torch import load_file, save_file

    model = save_stock(tmp_path / "model")
    held = load_file(model / "model.safetensors")
    held["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e6
    save_file(held, model / "model.safetensors", metadata={"format": "pt"})
    words = ("export", model, "--to", "gguf", "-o", tmp_path / "out.gguf", "--type", "f16")
    refused(*words, says=["'blk.1.ffn_up.weight' has values that f16 cannot hold", "bf16"])


@pytest.mark.parametrize("there", [False, True])
def test_full_disk(command, checkpoint, tmp_path, monkeypatch, there):
    """In the middle of the weights: nothing is left, and what was there stays."""
    out = tmp_path / "out.gguf"
    if there:
        out.write_bytes(b"GGUF of before")
    quantize, calls = gguf_file.quantize, []

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) == 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return quantize(*arguments)

    monkeypatch.setattr(gguf_file, "quantize", fail)
    before = sorted(tmp_path.iterdir())
    code, printed, err = command("export", checkpoint, "--to", "gguf", "-o", out, *["--overwrite"] * there)
    assert (code, printed) == (2, "")
    assert err == f"dicer: cannot write {out}: No space left on device.\n"
    assert sorted(tmp_path.iterdir()) == before
    assert not there or out.read_bytes() == b"GGUF of before"


def test_too_little_room(refused, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("dicer.write.sink.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    for to in ("gguf", "stock"):
        refused("export", checkpoint, "--to", to, "-o", tmp_path / "out", says=["are free on that disk"])


KILLED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell put the tests into the background
sys.path[:0] = {path!r}
import pytest
from reading import know_tiny_tokenizer
from dicer.cli.main import main
from dicer.write.export.llama_cpp import file
know_tiny_tokenizer(pytest.MonkeyPatch())
quantize, calls = file.quantize, []
def kill(*arguments):
    calls.append(1)
    if len(calls) == 12:
        os.kill(os.getpid(), signal.{name})
    return quantize(*arguments)
file.quantize = kill
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_kill(checkpoint, tmp_path, name):
    out = tmp_path / "files" / "out.gguf"
    script = KILLED.format(path=sys.path, name=name)
    words = ["export", str(checkpoint), "--to", "gguf", "-o", str(out)]
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, check=False)
    assert done.returncode != 0
    assert not out.exists()
    left = list(out.parent.iterdir())
    assert all(path.name.startswith(".dicer-") for path in left)
    assert not left or name == "SIGKILL"
