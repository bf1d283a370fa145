"""Grids, records, resuming: what a run does once, what it does again, and what it refuses."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.resources
import json
import math
import os
import re
import subprocess
import sys
import tomllib
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import save_tiny
from tiny_tasks import write_choice

from dicer.ask.compute import Compute
from dicer.ask.evaluation import Evaluation
from dicer.ask.portable import portable
from dicer.ask.recipe import Recipe
from dicer.ask.spelling import Wanted
from dicer.cli.experiments import describe
from dicer.decide import together as passes
from dicer.decide.together import score_all
from dicer.errors import DicerError, ExperimentError, RecipeError
from dicer.measure.stores.resident import ResidentStore
from dicer.measure.text import load_calibration
from dicer.model.source import ModelSource, open_model
from dicer.model.structure import find
from dicer.pipeline import make_plan
from dicer.study import records as stored
from dicer.study.grid import Grid, Run, identity, make_experiment, method_name, read_experiment
from dicer.study.record import unpack
from dicer.study.records import values_of
from dicer.study.run import run_experiment

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
METHODS = ["random", "rc-a", "act-l2", "weight-l2", "taylor", {"method": "act-mean", "activation": "pre"}, "sim-a"]


def read_records(results):
    """What the records on disk say."""
    return [values_of(record) for record in stored.read_records(results)]


class Measure:
    """Stands in for the evaluation: counts its calls and says how wide the model is."""

    def __init__(self, broken=()):
        self.widths, self.broken = [], broken

    def __call__(self, model, tokenizer, evaluation, *, progress=None):
        width = model.model.layers[1].mlp.up_proj.out_features
        self.widths.append(width)
        if len(self.widths) in self.broken:
            raise ValueError("a number that is none\nand more")
        return {"perplexity": None, "tasks": {}, "groups": {}, "summary": {"average": width / 100}, "versions": {}}


def _values(model, rows, **more):
    base = {"models": [str(model)], "methods": METHODS, "ratios": [0.25, 0.5], "calib": [str(rows)]}
    return {**base, "recipe": {"layers": "1-2"}, "evaluation": {"perplexity": "builtin"}, **more}


def _untimed(record):
    return {name: value for name, value in record.items() if name not in ("seconds", "memory", "ended")}


def test_every_point_of_the_grid_runs_once_and_the_model_itself_too(model, rows, tmp_path):
    asked = make_experiment(_values(model, rows, seeds=[1, 2], methods=["rc-a", {"method": "weight-l2", "seeds": [1]}]))
    measure, seen = Measure(), []
    counts = run_experiment(asked, tmp_path, evaluate=measure, watch=lambda event: seen.append(event.kind))
    assert counts == {"done": 7, "skipped": 0, "failed": 0}
    assert sorted(measure.widths) == [20, 20, 20, 30, 30, 30, 40]
    assert measure.widths[0] == 40  # the dense model, before it goes
    assert seen.count("done") == 7
    records = read_records(tmp_path)
    points = sorted((r["method"], r["recipe"].get("ratio"), r["recipe"].get("seed")) for r in records if r["text"])
    assert points == [
        *(("rc-a", ratio, seed) for ratio in (0.25, 0.5) for seed in (1, 2)),
        ("weight-l2", 0.25, 1),
        ("weight-l2", 0.5, 1),
    ]
    files = sorted(path.relative_to(tmp_path).parts for path in tmp_path.rglob("*.json"))
    assert {parts[:1] + parts[2:3] for parts in files} == {("llama", "logs")}
    assert str(model.parent) not in "".join(path.read_text() for path in tmp_path.rglob("*.json"))


def test_a_record_says_what_stayed_and_how_active_it_was(model, rows, tmp_path):
    asked = make_experiment(_values(model, rows, methods=["act-l2", "weight-l2"], ratios=[0.25], original=False))
    run_experiment(asked, tmp_path, evaluate=Measure())
    for record in read_records(tmp_path):
        plan = make_plan(model, Recipe(method=record["method"], layers="1-2", calib=str(rows)))
        norms = make_plan(model, Recipe(method="act-l2", layers="1-2", calib=str(rows)))
        assert set(record["layers"]) == {"1", "2"}
        for index, layer in plan.mlp.items():
            found = record["layers"][str(index)]
            mask = unpack(found["keep"], found["units"])
            assert np.flatnonzero(mask).tolist() == layer.keep.tolist()
            scores = norms.mlp[index].scores.numpy()
            assert found["norm"]["kept"] == pytest.approx(scores[mask].mean(), rel=1e-5)
            assert found["norm"]["dropped"] == pytest.approx(scores[~mask].mean(), rel=1e-5)
        assert record["parameters"]["before"] - record["parameters"]["after"] == 2 * 10 * 3 * 32
        assert {"load", "score", "build", "evaluate"} == set(record["seconds"])
        assert record["memory"]["score"]["host"] > 0
        assert record["versions"]["torch"] == importlib.metadata.version("torch")


def test_passes_are_shared_and_plans_the_same_as_alone(model, rows, monkeypatch):
    asked = [Wanted(run.recipe, run.compute) for run in make_experiment(_values(model, rows, original=False)).runs]
    source, forwards, reads = open_model(model), [], []
    dense = source.load_model()
    dense.model.layers[1].mlp.register_forward_hook(lambda *_: forwards.append(1))
    monkeypatch.setattr(passes, "load_calibration", lambda *args: reads.append(1) or load_calibration(*args))
    found = score_all(source, ResidentStore(dense, source.family), asked, source.tokenizer())
    assert len(forwards) == 3, "sums (with the norms that all show), gradients, Gram matrices; none for weights"
    assert len(reads) <= 1
    for (recipe, _), scored in zip(asked, found, strict=True):
        assert not scored.plan.diff(make_plan(model, recipe)), recipe.method
        assert scored.sharing in (2, 4, 6)


def test_a_run_that_fails_is_recorded_tried_again_and_stops_no_other(model, rows, tmp_path):
    asked = make_experiment(_values(model, rows, methods=["weight-l2", "random"], ratios=[0.25]))
    assert run_experiment(asked, tmp_path, evaluate=Measure(broken=[2])) == {"done": 2, "skipped": 0, "failed": 1}
    (failed,) = (record for record in read_records(tmp_path) if record["status"] == "failed")
    assert failed["error"] == "ValueError: a number that is none\nand more"
    assert failed["traceback"][-1].startswith("test_run.py:")
    again = Measure()
    assert run_experiment(asked, tmp_path, evaluate=again) == {"done": 1, "skipped": 2, "failed": 0}
    assert len(again.widths) == 1
    assert {record["status"] for record in read_records(tmp_path)} == {"done"}
    assert run_experiment(asked, tmp_path, evaluate=again) == {"done": 0, "skipped": 3, "failed": 0}


BEFOREHAND = [
    ({"methods": [{"method": "rc-a", "layers": "99"}]}, "llama rc-a: layer 99 does not exist: the model has layers 0"),
    ({"methods": [{"method": "rc-a", "criterion": "no-such"}]}, "unknown criterion 'no-such'"),
    ({"methods": [{"method": "rc-a", "max_ratio": 0.1}]}, "llama rc-a-max0.1: ratio 0.25 is more than the 0.1"),
    ({"methods": [{"method": "let-llm", "max_ratio": 0.1}]}, "ask for less, or choose more"),
    ({"methods": [{"method": "rc-a", "groups": 50}]}, "--groups 50 is more than the 30 neurons"),
    ({"methods": [{"method": "rc-a", "allocate": "BAD.json"}]}, "BAD.json holds no object"),
    ({"methods": [{"method": "rc-a", "allocate": "gone.json"}]}, "gone.json cannot be read: No such file"),
    ({"calib": ["gone.txt"]}, "calibration text gone.txt cannot be read: No such file or directory."),
    ({"calib": ["bookcorpos"]}, "unknown calibration text 'bookcorpos'. Did you mean 'bookcorpus'?"),
    ({"evaluation": {"perplexity": "gone.txt"}}, "perplexity text gone.txt cannot be read: No such file or directory."),
    ({"recipe": {"device": "cuda:77"}}, "device 'cuda:77' cannot be used here"),
    ({"recipe": {"memory": "8GB"}}, "memory is for dicer prune and dicer plan"),
    ({"methods": [{"method": "taylor", "stream": True}]}, "gradients of the loss need the whole model in memory"),
]


@pytest.mark.parametrize(("values", "says"), BEFOREHAND, ids=lambda part: str(part)[-40:])
def test_what_is_known_before_a_model_is_loaded_stops_all_runs(model, rows, tmp_path, monkeypatch, values, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "BAD.json").write_text("[]")
    asked = _values(model, rows, methods=["weight-l2"], ratios=[0.25], recipe={}) | values
    asked["methods"] = ["weight-l2", "rc-a", *asked["methods"]]  # a good run in front
    with pytest.raises(DicerError) as caught:
        run_experiment(make_experiment(asked), tmp_path / "results", evaluate=Measure(), watch=pytest.fail)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "results").rglob("*.json"))


def test_what_needs_no_text_runs_where_there_is_none(model, tmp_path):
    asked = make_experiment(_values(model, "gone.txt", methods=["weight-l2"], ratios=[0.25], original=False))
    assert run_experiment(asked, tmp_path, evaluate=Measure())["done"] == 1


def test_family_file(rows, tmp_path, monkeypatch):
    """A file for heads that are not found holds for the runs that name it."""
    file = importlib.resources.files("dicer.model.structure").joinpath("exceptions", "opt.toml")
    (tmp_path / "opt.toml").write_text(file.read_text(encoding="utf-8"))
    monkeypatch.setattr(find, "exception_for", lambda model_type: None)
    opt, recipe = save_tiny(tmp_path / "opt", "opt"), {"axis": "attention", "family": str(tmp_path / "opt.toml")}
    asked = make_experiment(_values(opt, rows, methods=["weight-l2"], ratios=[0.5], recipe=recipe))

    def measure(model, tokenizer, evaluation, *, progress=None):
        width = model.model.decoder.layers[0].self_attn.q_proj.out_features
        return {"perplexity": None, "tasks": {}, "groups": {}, "summary": {"average": width}, "versions": {}}

    assert run_experiment(asked, tmp_path / "r", evaluate=measure)["done"] == 2
    dense, pruned = sorted((r["metrics"]["summary"]["average"] for r in read_records(tmp_path / "r")), reverse=True)
    assert pruned == dense / 2


def test_what_is_done_is_not_looked_at_again(model, rows, tmp_path):
    """A text that has gone meanwhile, or a device of another machine, is no reason to refuse what is there."""
    text = tmp_path / "rows.jsonl"
    text.write_bytes(rows.read_bytes())
    asked = make_experiment(_values(model, rows, methods=["rc-a"], ratios=[0.25]))
    run_experiment(asked, tmp_path / "r", evaluate=Measure())
    moved = make_experiment(_values(model, text, methods=["rc-a"], ratios=[0.25], recipe={"layers": "1-2"}))
    far = [run._replace(compute=Compute(device="cuda:77")) for run in moved.runs]
    counts = run_experiment(replace(moved, runs=far), tmp_path / "r", evaluate=Measure())
    assert counts == {"done": 0, "skipped": 2, "failed": 0}


def test_a_file_of_ratios_is_one_point_and_says_what_it_comes_to(model, rows, tmp_path, monkeypatch):
    monkeypatch.setenv("PLACE", str(tmp_path))
    ratios = tmp_path / "my alloc.json"
    ratios.write_text(json.dumps({"mlp": {"1": 0.5, "2": 0.25}}))
    method = {"method": "act-l2", "allocate": "${PLACE}/my alloc.json"}
    values = _values(model, rows, methods=["act-l2", method], original=False, seeds=[1, 2])
    asked = make_experiment(values)
    assert [run.method for run in asked.runs] == ["act-l2"] * 4 + ["act-l2-my_alloc"] * 2
    measure, seen = Measure(), []
    run_experiment(asked, tmp_path / "r", evaluate=measure, watch=seen.append)
    assert len(measure.widths) == 6
    found = [r for r in read_records(tmp_path / "r") if r["method"] == "act-l2-my_alloc"]
    assert {r["recipe"]["ratio"] for r in found} == {0.375}
    assert all(r["recipe"]["allocate"].startswith("my alloc.json (sha256 ") for r in found)
    assert str(tmp_path) not in json.dumps(found)
    assert "llama act-l2-my_alloc seed 1, rows.jsonl 10 x 128" in {describe(e.task) for e in seen if e.task}
    assert run_experiment(asked, tmp_path / "r", evaluate=measure)["skipped"] == 6
    ratios.write_text(json.dumps({"mlp": {"1": 0.25, "2": 0.5}}))  # its content makes the run
    assert run_experiment(asked, tmp_path / "r", evaluate=measure)["done"] == 2
    everywhere = make_experiment({**values, "methods": ["act-l2", "rc-a"], "recipe": {"allocate": str(ratios)}})
    assert len(everywhere.runs) == 4


def _nan(folder):
    """A criterion's file whose scores are no numbers, which shows only when it runs."""
    own = folder / "own.py"
    own.write_text(
        'import dicer\n@dicer.criterion("nan", needs=("square_sum",), source="a test")\n'
        'def nan(w, s):\n    return s.square_sum * float("nan")\n'
    )
    return own


def test_streamed_without_the_dense_model(model, rows, tmp_path, monkeypatch):
    """Where nothing runs the model as it is, it is read layer by layer, and the plans are the same."""
    methods = [method for method in METHODS if method != "taylor"]
    run_experiment(make_experiment(_values(model, rows, methods=methods)), tmp_path / "whole", evaluate=Measure())
    dense = make_experiment(_values(model, rows, methods=["random"], ratios=[0.25]))
    run_experiment(dense, tmp_path / "streamed", evaluate=Measure())
    monkeypatch.setattr(ModelSource, "load_model", None)
    asked = make_experiment(_values(model, rows, methods=methods, recipe={"layers": "1-2", "stream": True}))
    assert run_experiment(asked, tmp_path / "streamed", evaluate=Measure())["failed"] == 0
    plans = [{r["id"]: r.get("plan_sha256") for r in read_records(tmp_path / name)} for name in ("whole", "streamed")]
    assert plans[0] == plans[1]


def test_one_bad_member_of_a_pass_does_not_take_the_others_along(model, rows, tmp_path):
    methods = ["act-l2", {"criterion": f"{_nan(tmp_path)}:nan"}]
    asked = make_experiment(_values(model, rows, methods=methods, ratios=[0.25], original=False))
    assert run_experiment(asked, tmp_path / "r", evaluate=Measure()) == {"done": 1, "skipped": 0, "failed": 1}
    (failed,) = (record for record in read_records(tmp_path / "r") if record["status"] == "failed")
    assert "not finite" in failed["error"]
    assert failed["method"] == "own-nan"
    assert str(tmp_path) not in json.dumps(failed)


def test_one_bad_recipe_does_not_keep_the_dense_model_alive(model, rows, tmp_path, monkeypatch):
    loaded, alive = [], []
    load = ModelSource.load_model

    def noted(*args):
        found = load(*args)
        loaded.append(weakref.ref(found))
        return found

    def measure(model, tokenizer, evaluation, *, progress=None):
        alive.append(sum(reference() is not None for reference in loaded))
        return _half(model, tokenizer, evaluation)

    monkeypatch.setattr(ModelSource, "load_model", noted)
    methods = [{"criterion": f"{_nan(tmp_path)}:nan"}, "weight-l2"]
    asked = make_experiment(_values(model, rows, methods=methods, ratios=[0.25]))
    assert run_experiment(asked, tmp_path, evaluate=measure)["failed"] == 1
    assert alive == [1, 0]


def test_what_breaks_after_a_record_leaves_it_as_it_is(model, rows, tmp_path):
    def watch(event):
        if event.kind == "done":
            raise BrokenPipeError("the reader of the output has gone")

    asked = make_experiment(_values(model, rows, methods=["weight-l2"], ratios=[0.25]))
    with pytest.raises(BrokenPipeError):
        run_experiment(asked, tmp_path, evaluate=Measure(), watch=watch)
    assert [(record["method"], record["status"]) for record in read_records(tmp_path)] == [("original", "done")]


def test_a_model_is_loaded_once_for_each_dtype_and_the_same_run_written_twice_is_one(
    model, rows, tmp_path, monkeypatch
):
    loads = []
    load = ModelSource.load_model
    monkeypatch.setattr(ModelSource, "load_model", lambda *args: loads.append(args[1]) or load(*args))
    methods = [
        "rc-a",
        {"method": "weight-l2", "dtype": "bfloat16"},
        {"criterion": "act-l2", "grouping": "random"},
        "random",
    ]
    asked = make_experiment(_values(model, rows, methods=methods, ratios=[0.25]))
    assert run_experiment(asked, tmp_path, evaluate=Measure()) == {"done": 5, "skipped": 0, "failed": 0}
    assert sorted(loads) == ["auto", "bfloat16"]


def test_a_task_that_is_not_there_is_told_before_a_model_is_loaded(model, rows, tmp_path, monkeypatch, command):
    pytest.importorskip("lm_eval", reason="pip install 'dicer[eval]' brings the harness")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    write_choice(tasks, "tiny_choice")
    import lm_eval.tasks

    stock = lm_eval.tasks.TaskManager  # whose 14,000 files take seconds
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **options: stock(**options | {"include_defaults": False}))
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal, where no table may flash up first
    toml = tmp_path / "grid.toml"
    toml.write_text(
        f'models = ["{model}"]\nmethods = ["weight-l2"]\ncalib = ["{rows}"]\n'
        f'[evaluation]\ntasks = "tiny_choise"\ninclude_path = "{tasks}"\n'
    )
    code, out, err = command("run", toml, "-o", tmp_path / "results")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "unknown task 'tiny_choise'. Did you mean 'tiny_choice'?" in err
    assert not list((tmp_path / "results").rglob("*.json"))


def test_a_criterion_file_that_is_not_there_is_one_line(model, rows, tmp_path):
    asked = make_experiment(_values(model, rows, methods=[{"criterion": "gone.py:mine"}]))
    with pytest.raises(RecipeError, match=r"^gone.py cannot be read: No such file or directory\.$"):
        run_experiment(asked, tmp_path, evaluate=Measure())


def test_of_several_processes_none_tries_a_pass_again(model, rows, monkeypatch):
    class Full(ResidentStore):
        def record(self, batches):
            calls.append(1)
            raise MemoryError

    calls = []
    monkeypatch.setattr(passes, "world_size", lambda: 2)
    source = open_model(model)
    asked = [Wanted(Recipe(method=name, calib=str(rows)), Compute()) for name in ("act-l2", "rc-a")]
    with pytest.raises(MemoryError):
        score_all(source, Full(source.load_model(), source.family), asked, source.tokenizer())
    assert len(calls) == 1


def test_content_of_a_text_not_its_place_makes_the_run(model, rows, tmp_path):
    moved = tmp_path / "elsewhere" / rows.name
    moved.parent.mkdir()
    moved.write_bytes(rows.read_bytes())
    measure = Measure()
    for text in (rows, moved):
        values = _values(model, text, methods=["rc-a"], ratios=[0.25], original=False)
        run_experiment(make_experiment(values), tmp_path / "r", evaluate=measure)
    assert len(measure.widths) == 1
    moved.write_text(moved.read_text().splitlines()[0] + "\n")
    run_experiment(make_experiment(values), tmp_path / "r", evaluate=measure)
    assert len(measure.widths) == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('models = ["a"]\nmethod = ["rc-a"]\n', "unknown key 'method'. Did you mean 'methods'?"),
        ('methods = ["rc-a"]\n', "the key 'models' is missing"),
        ('models = "a"\nmethods = ["rc-a"]\n', "models: expected a valid list, got 'a'."),
        ('models = ["a"]\nmethods = ["rc-a"]\nratios = ["much"]\n', "ratios.0: expected a valid number, got 'much'."),
        ('models = ["a"]\nmethods = ["rc-a"]\nseeds = [1.5]\n', "seeds.0: expected a valid integer, got 1.5."),
        ('models = ["a"]\nmethods = ["rc-b"]\n', "unknown method 'rc-b'. Did you mean 'rc-a'?"),
        ('models = ["a"]\nmethods = [{method="rc-a", seeds=3}]\n', "methods.seeds: expected a list, got 3."),
        ('models = ["a"]\nmethods = ["rc-a"]\n[recipe]\nseqlen = 3\n', "recipe key 'seqlen'. Did you mean 'seq_len'?"),
        ('models = ["a"]\nmethods = ["rc-a"]\n[evaluation]\nlimt = 3\n', "Did you mean 'limit'?"),
        ('models = ["a"]\nmethods = ["rc-a"]\ncalib = ["${NO_SUCH}/x.txt"]\n', "environment variable NO_SUCH"),
        ('models = ["a"]\nmethods = ["rc-a"]\n[recipe]\nratio = 0.5\n', "write ratios = [0.5] above it."),
        ('models = ["a"]\nmethods = ["rc-a"]\n', "nothing to measure: name --tasks"),
        ('models = ["a"]\nmethods = []\n', "methods: expected at least one value, got none."),
        (
            'models = ["a"]\nmethods = [{method="rc-a", allocate="x.json", ratios=[0.5]}]\n',
            "methods.ratios: x.json says the ratios; leave them out.",
        ),
        ('models = ["a"]\nmethods = [{method="rc-a", allocate="x.json", ratio=0.5}]\n', "leave --ratio out."),
        ('models = ["a"]\nmethods = [{criterion="${NO_SUCH}/x.py:own"}]\n', "environment variable NO_SUCH"),
        ('models = ["a\\u0000b"]\nmethods = ["rc-a"]\n', "models: 'a\\x00b' is no path."),
        ("models = [", "cannot be read:"),
        (f"models = {'[' * 10_000}", "cannot be read: its tables or lists are nested too deeply."),
        (f"a{'.a' * 10_000} = 1", "cannot be read: its tables or lists are nested too deeply."),
        (f"models = {'1' * 5_000}", "cannot be read: "),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, monkeypatch, text, says):
    monkeypatch.delenv("NO_SUCH", raising=False)
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ExperimentError) as caught:
        read_experiment(path)
    assert str(caught.value).startswith(f"experiment {path}")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bad_file_typed_makes_no_folder(refused, tmp_path):
    (tmp_path / "bad.toml").write_text('models = ["a"]\nmethod = ["rc-a"]\n')
    refused("run", tmp_path / "bad.toml", "-o", tmp_path / "results")


def test_variables_are_put_into_paths_only(monkeypatch):
    monkeypatch.setenv("DICER_DATA", "/texts")
    own = {"criterion": "${DICER_DATA}/c.py:own", "allocate": "${DICER_DATA}/r.json"}
    method = {"method": "rc-a", "calib": {"calib": "${DICER_DATA}/a.txt"}, **own}
    values = {"models": ["${DICER_DATA}/m"], "methods": [method]}
    asked = make_experiment({**values, "evaluation": {"perplexity": "${DICER_DATA}/b.txt"}})
    assert [run.model for run in asked.runs] == ["/texts/m"] * 2
    recipe = asked.runs[1].recipe
    assert (recipe.text.source, recipe.criterion, recipe.allocate) == (
        "/texts/a.txt",
        "/texts/c.py:own",
        "/texts/r.json",
    )
    assert asked.evaluation.perplexity == "/texts/b.txt"


def test_every_key_of_an_experiment_file_is_in_its_table():
    text = (EXPERIMENTS.parent / "docs" / "evaluation.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `\[?(\w+)\]?` \| (.*?) \|", text, flags=re.MULTILINE)
    fields = {**Grid.model_fields, **Evaluation.model_fields}
    of_grid = len(Grid.model_fields)
    assert [name for name, _ in rows if name in fields] == [*Grid.model_fields, *(name for name, _ in rows[of_grid:])]
    assert {name for name, _ in rows if name in fields} == set(fields)
    for name, default in rows[2:7]:
        assert json.loads(default) == fields[name].default


WHAT_TO_PRUNE = sorted(p for p in (EXPERIMENTS / "smollm2").glob("*.toml") if not p.stem.startswith("table"))


@pytest.mark.parametrize("path", WHAT_TO_PRUNE, ids=lambda p: p.stem)
def test_the_experiments_of_what_to_prune_can_be_read_and_no_two_runs_have_one_name(path, monkeypatch):
    monkeypatch.setenv("DICER_DATA", "/texts")
    monkeypatch.setenv("DICER_TASKS", "/tasks")
    written = tomllib.loads(path.read_text())
    asked = read_experiment(path)
    pruned = [run for run in asked.runs if run.recipe]
    lists = [written[name] for name in ("methods", "ratios", "calib", "samples") if name in written]
    if not any(isinstance(method, dict) and {"samples", "seq_len"} & method.keys() for method in written["methods"]):
        assert len(pruned) == math.prod(map(len, lists))
    assert len(asked.runs) == len(pruned) + 1
    settings = {(run.method, run.recipe.ratio, run.recipe.text) for run in pruned}
    assert len(settings) == len(pruned)
    assert len({run.recipe.resolve().ratio_of for run in pruned}) == 1


TABLES = [path for path in sorted(EXPERIMENTS.rglob("*.toml")) if path not in WHAT_TO_PRUNE]


@pytest.mark.parametrize("path", TABLES, ids=lambda p: str(p.relative_to(EXPERIMENTS)))
def test_the_experiments_of_the_paper_can_be_read(path, monkeypatch):
    monkeypatch.setenv("DICER_DATA", "/texts")
    monkeypatch.setenv("DICER_TASKS", "/tasks")
    asked = read_experiment(path)
    pruned = [run for run in asked.runs if run.recipe]
    counts = {1: 12, 2: 8, 3: 2, 4: 4, 5: 4, 6: 6, 7: 6, 8: 8, 9: 4}
    assert len(pruned) == counts[int(path.stem.removeprefix("table"))]
    assert len(asked.runs) == len(pruned) + 1
    small = path.parent.name == "smollm2"
    assert {run.recipe.layers for run in pruned} == {"5-28" if small else "5-26"}


def test_there_is_a_file_for_each_of_the_nine_tables():
    for folder in (EXPERIMENTS, EXPERIMENTS / "smollm2"):
        assert {path.name for path in folder.glob("table*.toml")} == {f"table{n}.toml" for n in range(1, 10)}


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        ({"method": "rc-a"}, "rc-a"),
        ({"criterion": "act-l2", "grouping": "random"}, "rc-a"),
        ({"method": "rc-a", "groups": 8}, "act-l2-post-random-8-groups"),
        ({"method": "act-mean", "activation": "pre"}, "act-mean-pre"),
        ({"criterion": "own/file.py:mine"}, "file-mine"),
        ({"criterion": "weight-l2", "grouping": "similarity", "merge": "mean"}, "weight-l2-post-similarity-mean"),
        ({"method": "let-llm"}, "let-llm"),
        ({"method": "let-llm", "entropy_profile": "some/where.json"}, "let-llm-where"),
        ({"method": "let-llm", "schedule": "rank", "drop_threshold": 0.8}, "let-llm-rank-drop0.8"),
        ({"method": "let-llm", "split": "equal", "max_ratio": 0.5}, "let-llm-max0.5-splitequal"),
        ({"axis": "attention", "compensate": "bias"}, "rc-a-attention-bias"),
        ({"axis": "block"}, "block"),
        ({"axis": "block", "entropy_search": "greedy", "entropy_at": "hidden"}, "block-greedy-hidden"),
        ({"method": "taylor", "axis": "all", "allocate": "my/own.json"}, "taylor-all-own"),
        ({"method": "rc-a", "repair": "least-squares"}, "act-l2-post-random-least-squares"),
        ({"method": "best"}, "best"),
        ({"method": "best", "ridge": 0.01, "target": "dense"}, "best-ridge0.01-target-dense"),
        ({"method": "rc-a", "rolls": 64}, "act-l2-post-random-rolls64"),
        ({"method": "rc-a", "ratio_of": "model", "stock": True}, "rc-a-of-model-stock-True"),
        ({"method": "best", "propagate": "dense"}, "obs-cosine-least-squares-propagate-dense"),
    ],
)
def test_the_folder_of_a_method(recipe, name):
    assert method_name(Recipe(**recipe)) == name


HOLDER = """
import sys, time
from pathlib import Path
from dicer.study.records import locked

with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_on_the_same_folder_is_refused_and_a_kill_lets_go(model, rows, tmp_path):
    other = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    asked = make_experiment(_values(model, rows, methods=["weight-l2"], ratios=[0.25], original=False))
    with pytest.raises(ExperimentError, match=r"another run of dicer writes .* \(process \d+ on .*\); wait for"):
        run_experiment(asked, tmp_path, evaluate=Measure())
    assert not list(tmp_path.rglob("*.json"))
    other.kill()
    other.stdout.close()
    other.wait(60)
    assert run_experiment(asked, tmp_path, evaluate=Measure())["done"] == 1


def test_a_record_that_is_broken_stops_a_run(model, rows, tmp_path):
    asked = make_experiment(_values(model, rows, methods=["weight-l2"], ratios=[0.25], original=False))
    run_experiment(asked, tmp_path, evaluate=Measure())
    next(tmp_path.rglob("*.json")).write_text("{")
    with pytest.raises(ExperimentError, match="is no record"):
        run_experiment(asked, tmp_path, evaluate=Measure())


RUNNER = """
import sys, time
from pathlib import Path
from dicer.study.run import run_experiment
from dicer.study.grid import read_experiment

done = []

def measure(model, tokenizer, evaluation, *, progress=None):
    if len(done) == 3:
        print("evaluating", flush=True)
        time.sleep(600)
    return {"perplexity": None, "tasks": {}, "groups": {}, "summary": {"average": 0.5}, "versions": {}}

def watch(event):
    if event.kind == "done":
        done.append(event.task.name)
        print(event.task.name, flush=True)

run_experiment(read_experiment(Path(sys.argv[1])), Path(sys.argv[2]), evaluate=measure, watch=watch)
"""


def _half(model, tokenizer, evaluation, *, progress=None):
    return {"perplexity": None, "tasks": {}, "groups": {}, "summary": {"average": 0.5}, "versions": {}}


def test_a_killed_experiment_goes_on_where_it_was(model, rows, tmp_path):
    toml = tmp_path / "grid.toml"
    toml.write_text(
        f'models = ["{model}"]\nmethods = ["rc-a", "random", "taylor"]\nratios = [0.25, 0.5]\ncalib = ["{rows}"]\n'
        '[evaluation]\nperplexity = "builtin"\n'
    )
    asked, place = read_experiment(toml), tmp_path / "a"
    killed = subprocess.Popen([sys.executable, "-c", RUNNER, str(toml), str(place)], stdout=subprocess.PIPE, text=True)
    *done, last = (killed.stdout.readline().strip() for _ in range(4))
    assert last == "evaluating"
    killed.kill()
    killed.stdout.close()
    killed.wait(60)
    assert sorted(path.stem for path in place.rglob("*.json")) == sorted(done)
    left = next(place.rglob("*.json")).with_name(".dicer-killed.partial")
    left.mkdir()  # as if it had died while it wrote
    (left / "new").write_text('{"half')
    seen = []
    assert run_experiment(asked, place, evaluate=_half, watch=seen.append) == {"done": 4, "skipped": 3, "failed": 0}
    assert sorted(event.task.name for event in seen if event.kind == "skipped") == sorted(done)
    assert not left.exists()
    run_experiment(asked, tmp_path / "b", evaluate=_half)
    resumed, whole = (
        {record["id"]: _untimed(record) for record in read_records(tmp_path / name)} for name in ("a", "b")
    )
    assert resumed == whole


def test_without_a_terminal_each_run_is_a_line(model, rows, tmp_path, monkeypatch, command):
    monkeypatch.setattr("dicer.evaluate.quality.evaluate", Measure(broken=[3]))
    toml = tmp_path / "grid.toml"
    toml.write_text(
        f'models = ["{model}"]\nmethods = ["rc-a", "random"]\ncalib = ["{rows}"]\n'
        '[evaluation]\nperplexity = "builtin"\n'
    )
    code, out, _ = command("run", toml, "-o", tmp_path / "results")
    lines = out.splitlines()
    assert code == 1
    assert lines[0].startswith("[1/3] done llama original")
    assert lines[1].startswith("[2/3] done llama rc-a 0.25 seed 42, rows.jsonl 10 x 128")
    assert lines[2] == "[3/3] failed llama random 0.25 seed 42, rows.jsonl 10 x 128: ValueError: a number that is none"
    assert lines[3].startswith("2 done, 0 skipped, 1 failed. Records: ")


def test_on_a_terminal_there_is_a_live_table(model, rows, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("FORCE_COLOR", "1")  # what makes rich believe in a terminal
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    from dicer.cli.experiments import Board

    asked = make_experiment(_values(model, rows, methods=["weight-l2", "random"], ratios=[0.25]))
    with Board() as board:
        run_experiment(asked, tmp_path, evaluate=Measure(), watch=board.watch)
    out, _ = capfd.readouterr()
    assert "3 runs: 3 done" in out
    assert "llama weight-l2 0.25 seed 42" in out


def test_where_all_is_done_there_is_no_empty_table(model, rows, tmp_path, monkeypatch, command):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("dicer.evaluate.quality.evaluate", Measure())
    toml = tmp_path / "grid.toml"
    toml.write_text(
        f'models = ["{model}"]\nmethods = ["random"]\ncalib = ["{rows}"]\n[evaluation]\nperplexity = "builtin"\n'
    )
    for says in ("2 runs: 2 done", "0 done, 2 skipped, 0 failed. Records: "):
        code, out, _ = command("run", toml, "-o", tmp_path / "results")
        assert code == 0
        assert says in out
    assert len(out.splitlines()) == 2


def test_the_live_table_moves_while_the_harness_is_silenced(tmp_path):
    """The harness takes hours and its output is caught; the table must not be."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
    with subprocess.Popen(
        [sys.executable, "-c", LIVE], stdout=theirs, stderr=theirs, env=environment, close_fds=True
    ) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # what Linux raises once the other end is closed
            while part := os.read(ours, 4096):
                shown += part
        os.close(ours)
    assert process.returncode == 0, shown
    assert b"tasks 7/9" in shown


LIVE = """
import time
import tomllib
from types import SimpleNamespace
from dicer.cli.experiments import Board
from dicer.study.run import Event
from dicer.evaluate.harness import _as_it_runs

run = SimpleNamespace(recipe=None, method="original", text="")
task = SimpleNamespace(name="a", run=run, source=SimpleNamespace(name="model"))
with Board() as board:
    board.watch(Event("evaluating", task))
    with _as_it_runs():
        board.watch(Event("stage", None, "tasks", 7, 9))
        time.sleep(1)  # four times as long as the table takes to be drawn anew
    board.watch(Event("done", task))
"""


def test_an_experiment_that_cannot_write_says_so(model, rows, tmp_path):
    (tmp_path / "file").write_text("")
    asked = make_experiment(_values(model, rows, methods=["weight-l2"], original=False))
    with pytest.raises(DicerError, match="results folder"):
        run_experiment(asked, tmp_path / "file", evaluate=Measure())


def test_the_commit_is_recorded_where_there_is_one(tmp_path, monkeypatch):
    from dicer.study.run_record import surroundings

    monkeypatch.chdir(tmp_path)
    assert surroundings()["git"] is None
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "init", "-q"], check=True)
    subprocess.run(["git", *identity, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    revision = surroundings()["git"]
    assert len(revision) == 40
    assert os.environ.get("HOSTNAME", "no-host") not in json.dumps(surroundings())


@pytest.mark.parametrize("name", ["calib", "distill_calib"])
def test_a_text_counts_by_its_content(tmp_path, name):
    """Two files of one name, or one that was changed, are not the same run."""
    found = []
    for content in ("one", "two"):
        (tmp_path / content).mkdir()
        (tmp_path / content / "text.txt").write_text(content)
        recipe = Recipe(repair="least-squares", distill=1, **{name: str(tmp_path / content / "text.txt")})
        run = Run("model", recipe, "text", Compute())
        found.append(identity(run, portable(recipe, recipe.resolve(), Compute()), Evaluation(), "f"))
    assert found[0] != found[1]
    assert str(tmp_path) not in json.dumps(found)


def test_runs_of_versions_that_knew_no_profile_are_still_known():
    """A field that is new must not make a run of every earlier record."""
    run = Run("model", Recipe(), "text", Compute())
    without = Recipe().model_dump(exclude={"entropy_profile"})
    same = [identity(run, recipe, Evaluation(), "f") for recipe in (without, {**without, "entropy_profile": None})]
    assert same[0] == same[1]
    assert identity(run, {**without, "entropy_profile": "a.json"}, Evaluation(), "f") != same[0]


@pytest.mark.parametrize(
    "more",
    [
        {"methods": [{"criterion": "own.py:score"}]},
        {"recipe": {"criterion": "folder/own.py:score"}},
        {"methods": [{"grouping": "own.py:group", "merge": "prune"}]},
        {"evaluation": {"tasks": ["a"], "include_path": "tasks"}},
    ],
)
def test_no_code(tmp_path, more):
    values = {"models": ["m"], "methods": ["rc-a"], "evaluation": {"perplexity": "builtin"}, **more}
    asked = make_experiment(values)
    with pytest.raises(ExperimentError, match=r"it names code, .*(\.py:\w+|tasks), and --no-code"):
        asked.refuse_code()
    make_experiment({"models": ["m"], "methods": ["rc-a"], "evaluation": {"perplexity": "builtin"}}).refuse_code()
