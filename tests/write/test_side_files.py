"""What goes along with the weights: all but weights, code and what is dicer's own; and who says what a tokenizer is."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import save_tiny
from transformers import AutoTokenizer

import dicer
from dicer.errors import ModelError
from dicer.model import beside
from dicer.model.source import open_model

WEIGHT_ONLY = dicer.Recipe(method="weight-l2", layers="1-2")
GO = (
    *("tekken.json", "merges.txt.gz", "vocab.bpe", "spiece.model", "qwen.tiktoken", "preprocessor_config.json"),
    *("NOTICE.md", "Licence.PDF", "USE_POLICY.md", "system_prompt.txt", "trainer_state.json", "template.jinja"),
    *("eval_results.yaml", "figure.png", "no-ending", "sentencepiece.bpe.model", "wordlist.tsv"),
)
STAY = (
    *("pytorch_model.bin", "PYTORCH_MODEL.BIN", "consolidated.00.pth", "model.gguf", "model.onnx", "model.onnx_data"),
    *("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "tf_model.h5", "flax_model.msgpack"),
    *("extra.safetensors", "pytorch_model.bin.index.json", "adapter_model.safetensors", "params.json"),
    *("modeling_own.py", "Run.SH", "notes.ipynb", "kernel.cu", ".gitattributes", "dicer_plan.json"),
    *("BASE_MODEL_CARD.md", "openvino_model.xml", "model.safetensors.bak", "pytorch_model.bin.part"),
)


@pytest.fixture
def model(tmp_path):
    return save_tiny(tmp_path / "model")


def pruned(model, **options):
    out = model.with_name("out")
    return dicer.prune(model, WEIGHT_ONLY, output=out, **options), out


def test_all_but_weights_and_code(model):
    for name in (*GO, *STAY):
        (model / name).write_text(name)
    for folder in ("original", "onnx", "additional_chat_templates"):
        (model / folder).mkdir()
        (model / folder / "a.jinja").write_text(folder)
    (model / "README.md").write_text("of the dense one")
    os.mkfifo(model / "pipe.txt")
    result, out = pruned(model)
    assert [name for name in GO if (out / name).read_text() != name] == []
    left = [name for name in STAY if (out / name).is_file() and (out / name).read_text() == name]
    assert left == []
    assert (out / "BASE_MODEL_CARD.md").read_text() == "of the dense one"
    assert [path.name for path in sorted(out.iterdir()) if path.is_dir()] == ["additional_chat_templates"]
    assert [note.split()[0] for note in result.notes if "taken along" in note] == ["modeling_own.py"]
    AutoTokenizer.from_pretrained(out)


def test_links(model, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (model / "LICENSE").symlink_to(tmp_path / "secret")
    (model / "folder").symlink_to(tmp_path)
    (model / "text").write_text("inside")
    (model / "NOTICE").symlink_to(model / "text")
    (model / "gone.txt").symlink_to(model / "nowhere")
    result, out = pruned(model)
    assert (out / "NOTICE").read_text() == "inside"
    assert not any((out / name).exists() for name in ("LICENSE", "folder", "gone.txt"))
    assert "LICENSE is a link out of the folder, so it is not taken along" in result.notes


def test_cache_of_the_hub(model, tmp_path):
    """Snapshots are folders of links to blobs beside them."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1234", tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (model / "tekken.json").write_text("{}")
    for number, file in enumerate(model.iterdir()):
        shutil.move(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    _, out = pruned(snapshot)
    assert {"tekken.json", "tokenizer.json", "generation_config.json"} <= {path.name for path in out.iterdir()}


def test_size(model, monkeypatch):
    monkeypatch.setattr(beside, "MOST_BYTES", 2**20)
    (model / "log.txt").write_bytes(b"x" * (2**20 + 1))
    (model / "log.json").write_bytes(b"x" * 2**20)
    result, out = pruned(model)
    assert ((out / "log.txt").exists(), (out / "log.json").exists()) == (False, True)
    assert "log.txt has more than 1 MB, so it is not taken along" in result.notes


# Tokenizers


def without_tokenizer(model):
    for file in model.glob("*token*"):
        file.unlink()
    return model


def tekken(folder):
    special = [{"rank": i, "token_str": f"<S{i}>", "is_control": True} for i in range(4)]
    vocab = [{"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode(), "token_str": None} for i in range(256)]
    sizes = {"num_vocab_tokens": 256, "default_vocab_size": 260, "default_num_special_tokens": 4}
    said = {"config": {"pattern": r"\p{L}+|\s+", **sizes, "version": "v7"}, "vocab": vocab, "special_tokens": special}
    (folder / "tekken.json").write_text(json.dumps(said))


def test_tekken(tmp_path):
    model = without_tokenizer(save_tiny(tmp_path / "model", "mistral"))
    tekken(model)
    assert len(open_model(model).tokenizer()("Hello").input_ids) == 5
    result = dicer.prune(model, dicer.Recipe(samples=2, seq_len=16), output=tmp_path / "out")
    assert (tmp_path / "out" / "tekken.json").read_bytes() == (model / "tekken.json").read_bytes()
    assert result.plan.calibration["source"] == "builtin"


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma", "qwen2", "gpt2", "opt"])
def test_no_tokenizer(tmp_path, family):
    """Some classes come up without any file, and know nothing."""
    model = without_tokenizer(save_tiny(tmp_path / "model", family))
    assert open_model(model).tokenizer() is None


@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.json", "tekken.json", "own.tiktoken"])
def test_broken_tokenizer(tmp_path, file):
    model = without_tokenizer(save_tiny(tmp_path / "model"))
    (model / file).write_text("{")
    with pytest.raises(ModelError, match="the tokenizer cannot be loaded"):
        open_model(model).tokenizer()


@pytest.mark.parametrize(
    "named", [{"AutoTokenizer": ["own.Own", None]}, {"AutoTokenizer": "own.Own"}, ["own.Own", None]]
)
def test_tokenizer_with_code(tmp_path, named):
    model = without_tokenizer(save_tiny(tmp_path / "model"))
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Own", "auto_map": named}))
    with pytest.raises(ModelError, match=r"its tokenizer needs code of its own \(own\.Own\).* input_ids") as caught:
        open_model(model).tokenizer()
    assert "\n" not in str(caught.value)
    pruned(model)  # which reads no text


def test_no_question_about_code(model, tmp_path):
    """Without dicer, AutoTokenizer reads the config first; told not to trust, it asks nothing and runs nothing."""
    dicer.prune(model, WEIGHT_ONLY, output=tmp_path / "differ")
    dicer.prune(model, dicer.Recipe(method="weight-l2", stock=True), output=tmp_path / "stock")
    script = (
        "import sys; from transformers import AutoTokenizer; "
        "ids = [AutoTokenizer.from_pretrained(f, **o)('Two words.').input_ids for f, o in "
        "((sys.argv[1], {'trust_remote_code': False}), (sys.argv[2], {}))]; "
        "assert not [m for m in sys.modules if m.startswith(('transformers_modules', 'dicer'))]; print(ids)"
    )
    command = [sys.executable, "-c", script, tmp_path / "differ", tmp_path / "stock"]
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    ids = AutoTokenizer.from_pretrained(model)("Two words.")["input_ids"]
    assert done.stdout.strip() == str([ids, ids])
