"""Grids on Ray: the same records as without, whoever dies; what is dealt to whom; what is refused in one line."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from dicer.ask.compute import Compute
from dicer.ask.recipe import Recipe
from dicer.cli.experiments import Board
from dicer.errors import ExperimentError
from dicer.holds import locked
from dicer.model.source import open_model
from dicer.study.bench import Bench, Event, Task
from dicer.study.cluster import Cluster, connected, deal
from dicer.study.grid import Run, make_experiment
from dicer.study.records import LOCK, read_records, values_of
from dicer.study.run import make_task, run_experiment
from dicer.study.worker import Part, versions_reader, work

OF_THE_MOMENT = ("seconds", "memory", "ended", "pass_shared_by")  # a pass serves the runs of one worker


@pytest.fixture(scope="module")
def cluster():
    """Two workers of one core each, on this machine, whatever it has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_OVERRIDE_RESOURCES", json.dumps({"CPU": 2}))
        patch.setenv("OMP_NUM_THREADS", "1")
        with connected("local", 1) as found:
            yield found


def measure(flag):
    """Stands in for the evaluation: what the model says to a few tokens. A worker's second model waits for the flag."""
    begun = []

    def evaluate(model, tokenizer, evaluation, *, progress):
        import time

        import torch

        begun.append(1)
        while len(begun) == 2 and not flag.exists():
            progress("waiting", 0, 1)
            time.sleep(0.05)
        with torch.no_grad():
            value = model(torch.arange(24)[None]).logits.double().square().sum().item()
        return {"perplexity": None, "tasks": {}, "groups": {}, "summary": {"average": value}, "versions": {}}

    return evaluate


def grid(model, rows, **more):
    values = {"models": [str(model)], "methods": ["rc-a", "act-l2", "random"], "ratios": [0.25, 0.5], "seeds": [1, 2]}
    values |= {"calib": [str(rows)], "original": False, "recipe": {"layers": "1-2"}}
    return make_experiment({**values, "evaluation": {"perplexity": "builtin"}, **more})


def results_of(folder):
    """Run id -> all that the record says of the result."""
    values = {record.id: values_of(record) for record in read_records(folder)}
    return {name: {k: v for k, v in one.items() if k not in OF_THE_MOMENT} for name, one in values.items()}


def test_grid_one_worker_killed(cluster, model, rows, tmp_path):
    asked, flag, seen, begun = grid(model, rows), tmp_path / "flag", [], Counter()

    def watch(event):
        seen.append(event)
        begun[event.where] += event.kind == "evaluating"
        if begun[event.where] == 2 and not flag.exists():
            os.kill(int(event.where.split()[-1]), signal.SIGKILL)
            flag.touch()

    counts = run_experiment(asked, tmp_path / "ray", evaluate=measure(flag), watch=watch, place=cluster)
    assert counts == {"done": 12, "skipped": 0, "failed": 0}
    kinds = Counter(event.kind for event in seen)
    assert (kinds["evaluating"], kinds["done"]) == (13, 12)  # what the dead worker had finished is not done again
    assert 1 <= kinds["lost"] <= 5
    assert len({event.where for event in seen if event.kind == "done"}) >= 2
    alone = run_experiment(asked, tmp_path / "here", evaluate=measure(flag))
    assert alone == counts
    assert results_of(tmp_path / "ray") == results_of(tmp_path / "here")
    again = run_experiment(asked, tmp_path / "ray", evaluate=measure(flag), place=cluster)
    assert again == {"done": 0, "skipped": 12, "failed": 0}


KILLER = """
import os
import dicer
@dicer.criterion("kill", needs=(), source="none")
def kill(w, s):
    if os.getpid() != {pid}:
        os.kill(os.getpid(), 9)
    return w.up.square().sum(1)
"""


def test_run_that_kills_its_worker(cluster, model, rows, tmp_path):
    """It is given up, and what shared its pass is not."""
    criterion = tmp_path / "killer.py"
    criterion.write_text(KILLER.format(pid=os.getpid()))
    methods = [{"method": "weight-l2", "criterion": f"{criterion}:kill"}, "weight-l2"]
    asked = grid(model, rows, methods=methods, ratios=[0.25], seeds=[1])
    (tmp_path / "flag").touch()
    counts = run_experiment(asked, tmp_path / "r", evaluate=measure(tmp_path / "flag"), place=Cluster(ray, cpus=2))
    assert counts == {"done": 1, "skipped": 0, "failed": 1}
    (failed,) = (record for record in read_records(tmp_path / "r") if record.status == "failed")
    assert failed.error.startswith("its worker died 3 times; the last, on ")


def test_two_drivers_one_folder(cluster, model, rows, tmp_path):
    other = locked(tmp_path / LOCK, tmp_path)
    with pytest.raises(ExperimentError, match="another run of dicer writes"):
        run_experiment(grid(model, rows), tmp_path, evaluate=measure(tmp_path), place=cluster)
    other.release()


def test_other_version_on_a_machine(cluster, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9")
    with pytest.raises(ExperimentError, match=r"of the Ray cluster has dicer 0\.1\.0 .*, and this machine has 9\.9 "):
        cluster.check_versions()


@pytest.fixture
def task(model, rows, tmp_path):
    asked = grid(model, rows)
    return make_task(asked.runs[0], open_model(model), asked.evaluation, tmp_path, {})


def test_worker_of_another_version(task):
    part = Part([task.run], [task.name], None, None, None, str(Path.cwd()), versions_reader()() | {"dicer": "9.9"})
    with pytest.raises(ExperimentError, match=r"it has dicer 0\.1\.0 .*, and this machine has 9\.9; install"):
        list(work(part))


def test_worker_with_another_model(cluster, model, rows, task):
    bench = Bench(grid(model, rows).evaluation, measure(Path()), pytest.fail, keep=pytest.fail)
    with pytest.raises(
        ExperimentError, match=r"on .* process \d+: .*llama, or a file that its runs read, differs from"
    ):
        cluster.work([[replace(task, name="0" * 16)]], bench)


NO_DEVICE = [
    (1, "cuda:1", "Ray says which GPU a worker gets"),
    (1, "cuda", "no machine of the Ray cluster has a GPU"),
    (1000, "cpu", "no machine of the Ray cluster has 1000 CPU cores for a worker"),
]


@pytest.mark.parametrize(("cpus", "device", "says"), NO_DEVICE)
def test_machines_without_what_is_asked(cluster, cpus, device, says):
    with pytest.raises(ExperimentError, match=says):
        Cluster(ray, cpus).check(device)


MACHINES = [
    ([{"CPU": 8}, {"CPU": 8}], None, "auto", (8, 0, 2)),
    ([{"CPU": 8}, {"CPU": 3}], 2, "auto", (2, 0, 5)),
    ([{"CPU": 2}, {"CPU": 64, "GPU": 8}], None, "auto", (8, 1, 8)),
    ([{"CPU": 2}, {"CPU": 64, "GPU": 8}], None, "cpu", (64, 0, 1)),
    ([{"CPU": 4, "GPU": 4}, {"CPU": 64, "GPU": 2}], 16, "cuda", (16, 1, 2)),
]


@pytest.mark.parametrize(("machines", "cpus", "device", "share"), MACHINES)
def test_share_of_a_worker(machines, cpus, device, share):
    nodes = [{"Alive": True, "Resources": resources} for resources in machines]
    nodes.append({"Alive": False, "Resources": {"CPU": 1000}})
    assert Cluster(SimpleNamespace(nodes=lambda: nodes), cpus).check(device) == share


def stand_in(model, size, number, text):
    source = SimpleNamespace(tensors=SimpleNamespace(infos=lambda: {"w": SimpleNamespace(numel=size)}))
    recipe = None if text is None else Recipe(calib=text)
    return Task(Run(model, recipe, "", Compute()), f"{model}-{number}", source, {}, Path())


texts = st.lists(st.sampled_from([None, "a.txt", "b.txt"]), min_size=1, max_size=12)


@given(models=st.lists(st.tuples(st.integers(1, 100), texts), min_size=1, max_size=4), workers=st.integers(1, 6))
def test_deal(models, workers):
    groups = [[stand_in(f"m{m}", size, n, t) for n, t in enumerate(own)] for m, (size, own) in enumerate(models)]
    parts = deal(groups, workers)
    assert sorted(t.name for p in parts for t in p) == sorted(t.name for group in groups for t in group)
    assert all(len({t.run.model for t in part}) == 1 for part in parts)
    assert len(parts) <= len(groups) + workers - 1
    weight = {f"m{m}": size for m, (size, _) in enumerate(models)}
    total = sum(size * len(own) for size, own in models)
    weights = [weight[part[0].run.model] * len(part) for part in parts]
    assert weights == sorted(weights, reverse=True)
    assert max(weights) <= total / workers + max(weight.values())
    for part in parts:  # what reads the same text is together
        order = [t.run.recipe and t.run.recipe.text for t in part]
        assert sum(a != b for a, b in itertools.pairwise(order)) == len(set(order)) - 1


def test_table_says_where(task, no_colours, capsys):
    other, board = replace(task, name="other"), Board()
    for event in (
        Event("waiting", replace(task, name="third")),
        Event("scoring", other, where="b process 2"),
        Event("stage", None, "layers", 1, 4, "b process 2"),
        Event("evaluating", task, where="a process 1"),
        Event("stage", None, "perplexity", 3, 8, "a process 1"),
    ):
        board.watch(event)
    console = Console(width=200)
    with console.capture() as shown:
        console.print(board.table())
    lines = shown.get().splitlines()
    assert any("evaluating" in line and "perplexity 3/8" in line and "a process 1" in line for line in lines)
    assert lines[-1].strip() == "b process 2: layers 1/4"
    board.watch(Event("lost", task, "it died", where="a process 1"))
    board.watch(Event("evaluating", task, where="b process 2"))
    board.watch(Event("done", task, where="b process 2"))
    lost, done = capsys.readouterr().out.splitlines()
    assert lost.startswith("[0/3] lost llama rc-a 0.25 seed 1")
    assert lost.endswith(" on a process 1: it died")
    assert "[1/3] done llama rc-a 0.25 seed 1" in done
    assert " on b process 2, about 0 s left" in done


def test_command_on_a_cluster(cluster, tmp_path):
    """What the command line passes on can travel, and its lines say where a run was."""
    (tmp_path / "grid.toml").write_text(
        'models = ["builtin:smollm2"]\nmethods = ["random"]\noriginal = false\nrecipe = { layers = "10" }\n'
        'evaluation = { perplexity = "builtin", windows = 1, window = 64 }\n'
    )
    words = [sys.executable, "-m", "dicer", "run", "grid.toml", "-o", "records", "--worker-cpus", "1"]
    words += ["--ray", ray.get_runtime_context().gcs_address]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=280)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^\[1/1\] done builtin:smollm2 random 0.25 .* on .* process \d+$", done.stdout, re.MULTILINE)
    (record,) = read_records(tmp_path / "records")
    assert record.metrics.perplexity.value > 1


@pytest.fixture
def grid_file(model, rows, tmp_path):
    path = tmp_path / "grid.toml"
    path.write_text(
        f'models = ["{model}"]\nmethods = ["random"]\nevaluation = {{ perplexity = "builtin" }}\n', encoding="utf-8"
    )
    return path


@pytest.fixture
def no_ray():
    """HOST:PORT where something answers that is no Ray, and HOST:PORT where nothing does."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("127.0.0.1", 0)) as other:

        def answer():
            with server.accept()[0] as line:
                line.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        nobody = other.getsockname()[1]
        other.close()
        yield [f"127.0.0.1:{server.getsockname()[1]}", f"127.0.0.1:{nobody}"]
        thread.join()


def test_no_ray_there(refused, grid_file, tmp_path, no_ray):
    words = ("run", grid_file, "-o", tmp_path / "out", "--ray")
    began = time.monotonic()
    refused(
        *words, no_ray[0], says=[f"Ray at {no_ray[0]} cannot be used: what answers there is no Ray. Name HOST:PORT"]
    )
    refused(*words, no_ray[1], says=[f"Ray at {no_ray[1]} cannot be used: ", "Connection refused"])
    refused(*words, "ray://127.0.0.1:10001", says=["this is no HOST:PORT"])
    refused(*words, "somewhere", says=["this is no HOST:PORT"])
    refused(*words, "", says=["this is no HOST:PORT"])
    assert time.monotonic() - began < 20


def test_ray_not_installed(refused, grid_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    words = ("run", grid_file, "-o", tmp_path / "out", "--ray", "local")
    refused(*words, says=["--ray needs Ray, which is not installed: pip install 'dicer[ray]'."])


def test_workers_without_ray(refused, grid_file, tmp_path):
    words = ("run", grid_file, "-o", tmp_path / "out", "--worker-cpus", "1")
    refused(*words, says=["--worker-cpus is for workers of --ray"])


def test_several_processes_and_ray(refused, grid_file, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = ("run", grid_file, "-o", tmp_path / "out", "--ray", "local")
    refused(*words, says=["leave accelerate launch out"])
