"""The entropy command: what it prints and writes, and bad input as one line."""

from __future__ import annotations

import json
import re

import pytest
from tiny import family_of, save_tiny, tiny_model, tiny_tokens

from dicer.decide.plan import load_plan
from dicer.measure.entropy import cache as entropy_cache
from dicer.measure.entropy.profile import read_profile
from dicer.measure.entropy.transfer import layer_forwards, measure
from dicer.measure.stores.resident import ResidentStore


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    """A cache of its own for every test."""
    monkeypatch.setenv("DICER_CACHE", str(tmp_path_factory.mktemp("cache")))


def _rows(out):
    cells = ([cell.strip() for cell in line.strip("│┃").split("│")] for line in out.splitlines() if "│" in line)
    return [row for row in cells if row[0].isdigit()]


def test_table_and_profile(run, model, rows, tmp_path):
    file = tmp_path / "profile.json"
    out = run("entropy", model, "-o", file, "--calib", rows, "--device", "cpu")
    profile = read_profile(file)
    store = ResidentStore(tiny_model("llama"), family_of(tiny_model("llama")))
    expected = measure(store, [tiny_tokens()])
    assert profile.lists == expected.lists
    assert f"To run: {layer_forwards(4)} layer forwards, as many as in 7.5 forward passes" in out
    assert "over 6 x 24 tokens" in out
    assert f"H of the model: {profile.entropy:.4f}" in out
    shown = zip(profile.blocks, profile.attention, profile.mlp, strict=True)
    assert _rows(out) == [[str(e[0].layer), *(f"{entry.te:.4f}" for entry in e)] for e in shown]
    assert "Note: 6 ready samples of 24 tokens are used as they are." in out
    assert f"Profile: {file}" in out
    assert profile.about["model"]["name"] == "llama"
    assert profile.about["calibration"]["seq_len"] == 24
    assert profile.about["dtype"] == "float32"
    assert str(tmp_path.parent) not in file.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]


def test_second_time(run, model, rows, tmp_path, monkeypatch):
    flags = ("--calib", rows, "--lists", "mlp, attention", "--at", "hidden")
    run("entropy", model, "-o", tmp_path / "a.json", *flags)
    monkeypatch.setattr(entropy_cache, "measure", lambda *a, **k: pytest.fail("measured again"))
    run("entropy", model, "-o", tmp_path / "b.json", *flags, "--batch-size", 2)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert list(read_profile(tmp_path / "a.json").lists) == ["attention", "mlp"]


def test_greedy_search(run, model, rows, tmp_path):
    file = tmp_path / "profile.json"
    out = run("entropy", model, "-o", file, "--calib", rows, "--search", "greedy", "--dtype", "bfloat16")
    assert f"To run: at most {layer_forwards(4, search='greedy')} layer forwards" in out
    profile = read_profile(file)
    picks = [int(re.search(r"\((\d+)\)", row[1])[1]) for row in _rows(out)]
    assert picks == [entry.pick + 1 for entry in profile.blocks]
    assert profile.about["dtype"] == "bfloat16"
    blocks = run(
        "entropy", model, "-o", tmp_path / "b.json", "--calib", rows, "--search", "greedy", "--lists", "blocks"
    )
    assert f"To run: {layer_forwards(4, ['blocks'], 'greedy')} layer" in blocks


def test_few_tokens_of_a_text(run, model, tmp_path):
    words = ("--samples", 1, "--seq-len", 8, "--calib-seed", 3, "--lists", "blocks")
    out = run("entropy", model, "-o", tmp_path / "profile.json", *words)
    assert "Note: 8 calibration tokens for 32 channels: the entropy estimate is poor" in out
    assert read_profile(tmp_path / "profile.json").about["calibration"]["seed"] == 3


def test_profile_that_is_there(run, refused, model, rows, tmp_path):
    file = tmp_path / "deep" / "er" / "profile.json"
    words = ("entropy", model, "-o", file, "--calib", rows, "--lists")
    run(*words, "mlp")
    assert refused(*words, "blocks") == f"dicer: {file} exists; choose another name or pass --overwrite.\n"
    run(*words, "blocks", "--overwrite")
    assert read_profile(file).blocks


def test_file_that_is_no_profile(refused, rows, tmp_path):
    model, own = save_tiny(tmp_path / "model"), tmp_path / "rows.jsonl"
    own.write_bytes(rows.read_bytes())
    for file, says in (
        (own, "which this run reads"),
        (model / "config.json", "is no result of this command"),
        (model / "model.safetensors", "is no result of this command"),
    ):
        refused("entropy", model, "-o", file, "--calib", own, "--overwrite", says=[says])


def test_stopped_run(command, model, rows, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(entropy_cache, "measure", stop)
    code, _, err = command("entropy", model, "-o", tmp_path / "p.json", "--calib", rows)
    assert (code, err) == (130, "dicer: stopped. The same command goes on where it stopped.\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--search", "gredy"), "unknown search 'gredy'. Did you mean 'greedy'?"),
        (("--at", "hiden"), "Did you mean 'hidden'?"),
        (("--lists", "blocks,atention"), "unknown list 'atention'. Did you mean 'attention'?"),
        (("--lists", ""), "unknown list ''"),
        (("--calib", "none.txt"), "none.txt cannot be read"),
        (("--samples", "0"), "samples: "),
        (("--dtype", "int8"), "dtype: "),
        (("--ratio", "0.5"), "No such option: --ratio"),
        (("--device", "cuda:99"), "device 'cuda:99' cannot be used"),
        (("-o", "x" * 300), "File name too long"),
        (("-o", ""), "the name is empty"),
    ],
)
def test_bad_input(refused, monkeypatch, model, tmp_path, words, says):
    monkeypatch.chdir(tmp_path)
    output = () if "-o" in words else ("-o", "profile.json")
    refused("entropy", model, *output, *words, says=[says])


def test_tokens_that_the_model_does_not_know(refused, model, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"input_ids": [1, 9999]}) + "\n")
    says = ["calibration has token id 9999"]
    refused("entropy", model, "-o", tmp_path / "p.json", "--calib", rows, says=says)


def test_model_that_overflows(command, rows, tmp_path):
    broken = tiny_model("llama")
    broken.model.layers[1].mlp.down_proj.weight.data[0] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    code, _, err = command("entropy", tmp_path / "broken", "-o", tmp_path / "p.json", "--calib", rows)
    assert (code, err.count("\n")) == (2, 1)
    assert "layer 1 gives NaN or infinite values" in err
    assert not (tmp_path / "p.json").exists()


@pytest.mark.parametrize(
    ("search", "method"),
    [
        ("independent", ("--method", "let-llm", "--ratio", "0.3")),
        ("greedy", ("--axis", "block")),
        ("independent", ("--criterion", "weight-l2", "--allocate", "transfer-entropy")),
    ],
)
def test_plan_from_a_profile(run, model, rows, tmp_path, monkeypatch, search, method):
    text, profile = ("--calib", rows, "--device", "cpu"), tmp_path / "profile.json"
    run("entropy", model, "-o", profile, "--search", search, *text)
    flags = ("--entropy-search", search) if search != "independent" else ()
    run("plan", model, "-o", tmp_path / "measured", *method, *text, *flags)
    monkeypatch.setattr(entropy_cache, "measure", lambda *a, **k: pytest.fail("measured again"))
    monkeypatch.setenv("DICER_CACHE", str(tmp_path / "empty"))
    out = run("plan", model, "-o", tmp_path / "given", *method, *text, "--entropy-profile", profile)
    assert "not measured on these weights" not in out
    measured, given = (load_plan(tmp_path / name) for name in ("measured", "given"))
    assert measured.diff(given) == []
    assert measured.blocks == given.blocks
    assert measured.allocation["transfer_entropy"].items() <= given.allocation["transfer_entropy"].items()
    assert given.recipe["entropy_profile"].startswith("profile.json (sha256 ")
    if "weight-l2" in method:
        run("plan", model, "-o", tmp_path / "no-text", *method, "--entropy-profile", profile)
        assert load_plan(tmp_path / "no-text").calibration == {}, "nothing has to be run"


def test_profile_that_does_not_fit(run, refused, model, rows, tmp_path):
    text, profile = ("--calib", rows, "--device", "cpu"), tmp_path / "profile.json"
    run("entropy", model, "-o", profile, "--lists", "mlp", *text)
    tiny_model("llama", num_hidden_layers=2).save_pretrained(tmp_path / "short")
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "other")
    entropy = ("--allocate", "transfer-entropy", "--entropy-profile", profile)
    for words, says in (
        ((model, "--method", "let-llm", "--entropy-profile", profile), "profile.json has no 'blocks': measure them"),
        ((tmp_path / "short", *entropy), "profile.json is of 4 layers, and the model has 2"),
        ((model, *entropy, "--entropy-at", "norm"), "was measured already"),
        ((model, "--entropy-profile", profile), "--entropy-profile needs --allocate transfer-entropy"),
        ((model, *entropy[:3], tmp_path / "none.json"), "none.json cannot be read: No such file"),
        ((model, *entropy[:3], rows), "no JSON"),
    ):
        refused("plan", *words, "-o", tmp_path / "plan", *text, says=[says])
    out = run("plan", tmp_path / "other", "-o", tmp_path / "plan", *entropy, *text)
    assert "Note: the profile profile.json was not measured on these weights." in out


def test_streamed(run, model, rows, tmp_path, monkeypatch):
    for name, more in (("whole", ()), ("streamed", ("--stream",))):
        monkeypatch.setenv("DICER_CACHE", str(tmp_path / f"cache of {name}"))
        run("entropy", model, "-o", tmp_path / f"{name}.json", "--calib", rows, *more)
    assert (tmp_path / "whole.json").read_bytes() == (tmp_path / "streamed.json").read_bytes()
