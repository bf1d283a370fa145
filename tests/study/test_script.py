"""The paper's own command line, alone and in two processes."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_tokens

from dicer.errors import DicerError
from dicer.measure.statistics import Need, Sums
from dicer.study.records import read_records

SCRIPT = Path(__file__).parents[2] / "scripts" / "run_experiment.py"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Seven samples, so that two processes have four and three."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in tiny_tokens(samples=7).tolist()))
    path.with_name("short.txt").write_text("All happy families are alike. " * 20)  # what perplexity is measured on
    return path


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("run_experiment", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("method", "mode", "preset"),
    [
        ("random-prune", None, "random"),
        ("gradient-magnitude", None, "taylor"),
        ("squared-magnitude", None, "act-l2"),
        ("weight-l2", "prune", "weight-l2"),
        ("random-merge", "prune", "rc-a"),
        ("activation-merge", "prune", "sim-a"),
        ("activation-merge", "mean", "sim-mean"),
        ("activation-merge", "dominant", "sim-dominant"),
        ("post-activation-merge", "prune", "sim-a-post"),
        ("sim-dominant", None, "sim-dominant"),
    ],
)
def test_the_names_of_the_paper_s_code_mean_its_methods(script, method, mode, preset):
    assert script.preset_of(method, mode) == preset


@pytest.mark.parametrize(
    ("method", "mode", "says"),
    [
        ("random-merge", None, "'random-merge' needs --apply-mode prune, and it is missing."),
        ("random-merge", "mean", "'random-merge' needs --apply-mode prune, got 'mean'."),
        ("activation-merge", None, "needs --apply-mode prune or mean or dominant, and it is missing."),
        ("weight-l2", "mean", "--apply-mode mean means nothing for 'weight-l2'; leave it out."),
        ("random-prun", None, "unknown method 'random-prun'. Did you mean 'random-prune'?"),
    ],
)
def test_an_apply_mode_that_is_missing_or_wrong_is_told(script, method, mode, says):
    with pytest.raises(DicerError, match=r".*") as caught:
        script.preset_of(method, mode)
    assert says in str(caught.value)


def _flags(model, rows, out, method, *more):
    text = ["--dataset", rows, "--perplexity", rows.with_name("short.txt"), "--device", "cpu", "--output-dir", out]
    return [str(word) for word in ("--model", model, "--method", method, "--layers", "1,2", *text, *more)]


def test_a_wrong_flag_is_one_line(model, rows, tmp_path):
    command = [sys.executable, SCRIPT, *_flags(model, rows, tmp_path / "out", "random-merge")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("run_experiment: 'random-merge' needs --apply-mode prune")
    assert not (tmp_path / "out").exists()


# One launch for all methods: what the script does, for a recipe each, and the sums themselves beside it.
DRIVER = """
import json, os, runpy, sys
from pathlib import Path
script, out, calls = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
codes = []
for call in calls:
    sys.argv = [script, *call]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        codes.append(end.code)
assert codes == [0] * len(calls), codes

import torch
if "RANK" in os.environ:
    from accelerate import PartialState
    PartialState(cpu=True)
from dicer.processes import rank
from dicer.measure.batches import share
from dicer.measure.entropy.cache import entropy_profile
from dicer.measure.statistics import Need
from dicer.model.source import open_model
from dicer.measure.stores.resident import ResidentStore
from dicer.measure.walk import walk

source = open_model(calls[0][1])
rows = Path(calls[0][calls[0].index("--dataset") + 1]).read_text().splitlines()
tokens = torch.tensor([json.loads(row)["input_ids"] for row in rows])
needs = [Need("square_sum", "post"), Need("sum", "pre"), Need("gram", "mod")]
found = {}
for samples in (7, 1):  # of one sample, the second process sees nothing
    mine = share(tokens[:samples])
    batches = mine.split(2) if len(mine) else ()
    store = ResidentStore(source.load_model(), source.family)
    for visit in walk(store, [1, 2], batches, needs=needs, gradient=True):
        name = f"{samples}.{visit.place.layer}"
        found |= {f"{name}.{need.kind}": visit.sums.get(*need[:2]) for need in needs}
        found |= {f"{name}.gradient": visit.gradient.down, f"{name}.count": torch.tensor(visit.sums.count)}
    for turn in ("measured", "cached"):
        profile = entropy_profile(source, store, tokens[:samples], batch_size=2)
        assert profile.tokens == samples * 24
        entries = profile.blocks + profile.attention + profile.mlp
        found[f"{samples}.{turn}.entropy"] = torch.tensor([profile.entropy, *(entry.entropy for entry in entries)])
assert len(list((out / "cache" / "entropy").iterdir())) == 2
torch.save(found, out / f"sums{rank()}.pt")
"""
METHODS = (
    ("random-merge", "--apply-mode", "prune"),
    ("gradient-magnitude",),
    ("post-activation-merge", "--apply-mode", "prune"),
)


def _words(model, rows, out):
    """The driver, written, and what it is called with."""
    driver = out / "driver.py"
    driver.write_text(DRIVER)
    return [str(driver), str(SCRIPT), str(out), json.dumps([_flags(model, rows, out / "results", *m) for m in METHODS])]


def _records(out):
    return {record.method: record for record in read_records(out / "results")}


@pytest.fixture(scope="module")
def alone(model, rows, tmp_path_factory):
    """Records, and the sums."""
    out = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DICER_CACHE", str(out / "cache"))
        patch.setattr(sys, "argv", _words(model, rows, out))
        runpy.run_path(sys.argv[0], run_name="__main__")
    return _records(out), torch.load(out / "sums0.pt")


@pytest.fixture(scope="module")
def together(model, rows, tmp_path_factory):
    """What was printed, records, and the sums of either process."""
    out = tmp_path_factory.mktemp("together")
    # --multi_gpu is accelerate's word for several processes here; on the CPU alone it would want MPI.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DICER_CACHE": str(out / "cache")}
    command = [*launch, *_words(model, rows, out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, _records(out), [torch.load(out / f"sums{rank}.pt") for rank in range(2)]


def test_two_processes_keep_the_same_neurons_and_one_writes(alone, together):
    (one, _), (printed, two, _) = alone, together
    assert set(one) == set(two) == {"rc-a", "taylor", "sim-a-post"}
    assert printed.count("done: ") == len(METHODS)
    for method, record in one.items():
        assert record.environment["processes"] == 1
        assert two[method].environment["processes"] == 2
        assert two[method].id == record.id
        measured = two[method].metrics.perplexity.value
        assert measured == pytest.approx(record.metrics.perplexity.value, rel=1e-5)
        for index, layer in record.layers.items():
            other = two[method].layers[index]
            assert np.array_equal(layer.mask, other.mask), (method, index)
            assert other.norm.kept == pytest.approx(layer.norm.kept, rel=1e-6)


def test_sums_and_gradients_of_two_processes_add_up(alone, together):
    (_, whole), (_, _, (first, second)) = alone, together
    assert whole["7.1.count"] == 7 * 24
    for name, value in whole.items():
        torch.testing.assert_close(first[name], value, rtol=1e-6, atol=1e-6)
        assert torch.equal(first[name], second[name]), name  # the same bits, or plans could part


def test_one_process_reduces_nothing():
    sums = Sums([Need("sum", "post")])
    sums.add("post", torch.ones(3, 4))
    sums.all_reduce(4, torch.device("cpu"))
    assert sums.get("sum", "post").tolist() == [3.0] * 4
