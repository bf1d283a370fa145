"""A run that was stopped goes on, and gives what it would have given; one of another recipe, model or text does not."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import LAYERS, save_tiny, tiny_tokens

import dicer
from dicer.ask.compute import Compute
from dicer.ask.recipe import Recipe
from dicer.decide import distill
from dicer.decide.kept import _digest, _Files
from dicer.errors import RecipeError
from dicer.measure.stores.streamed import StreamedStore

RECIPES = {
    "rc-a": {"method": "rc-a", "compensate": "bias"},
    "similarity, merged": {"method": "sim-mean", "layers": "1-3"},
    "global": {"method": "act-l2", "allocate": "global", "axis": "all"},
    "global, two walks": {"method": "sim-a", "allocate": "global"},
    "weights": {"method": "weight-l2"},
    "repair": {"method": "best", "axis": "all", "target": "dense", "ridge": 0.1, "layers": "1-3"},
    "repair, two walks": {"method": "rc-a", "allocate": "global", "repair": "least-squares", "compensate": "bias"},
    "pruned inputs": {"method": "sim-dominant", "propagate": "pruned", "layers": "0-1"},
}
STREAM = Compute(stream=True)


class Killed(BaseException):
    """What no code catches."""


def _bytes(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _killing(monkeypatch, moment):
    """Be killed in front of one of the writings; how many there were."""
    write, done = _Files._write, []

    def killed(self, name, tensors, index):
        if len(done) == moment:
            raise Killed
        write(self, name, tensors, index)
        done.append(name)

    monkeypatch.setattr(_Files, "_write", killed)
    return done


@pytest.mark.parametrize("asked", RECIPES)
def test_killed_anywhere(model, calib, tmp_path, monkeypatch, asked):
    recipe = Recipe(**RECIPES[asked], calib=calib)
    dicer.prune(model, recipe, STREAM, output=tmp_path / "whole")
    moments = 2 * LAYERS * (2 if "two" in asked else 1)
    for moment in range(moments):
        out = tmp_path / f"out {moment}"
        with monkeypatch.context() as patch:
            done = _killing(patch, moment)
            try:
                dicer.prune(model, recipe, STREAM, output=out, resume=True)
            except Killed:
                assert not out.exists()
            else:
                assert len(done) <= moment  # fewer layers were chosen
                continue
        dicer.prune(model, recipe, STREAM, output=out, resume=True)
        assert _bytes(out) == _bytes(tmp_path / "whole"), moment
        assert not (tmp_path / f"out {moment}.resume").exists()


def test_killed_while_it_learns(model, calib, tmp_path, monkeypatch):
    recipe = Recipe(method="best", axis="all", ridge=0.1, layers="1-2", calib=calib, distill=7)
    monkeypatch.setattr(distill, "_KEEP", 2)
    dicer.prune(model, recipe, output=tmp_path / "whole")
    for moment in range(6, 9):  # behind three layers, twice each: in front of what is kept in steps 2, 4 and 6
        steps = []
        with monkeypatch.context() as patch:
            _killing(patch, moment)
            with pytest.raises(Killed):
                dicer.prune(model, recipe, output=tmp_path / "out", resume=True)
        kept = 2 * (moment - 6)
        dicer.prune(model, recipe, output=tmp_path / "out", resume=True, progress=lambda *said, s=steps: s.append(said))
        assert _bytes(tmp_path / "out") == _bytes(tmp_path / "whole"), moment
        learned = [done for stage, done, _ in steps if stage == "distill"]
        assert learned == list(range(kept, 8))
        for path in (tmp_path / "out").iterdir():
            path.unlink()
        (tmp_path / "out").rmdir()


def test_damaged_lesson(model, calib, tmp_path, monkeypatch):
    recipe = Recipe(method="best", ridge=0.1, layers="1-2", calib=calib, distill=5)
    monkeypatch.setattr(distill, "_KEEP", 2)
    with monkeypatch.context() as patch:
        _killing(patch, 7)
        with pytest.raises(Killed):
            dicer.prune(model, recipe, output=tmp_path / "out", resume=True)
    lesson = tmp_path / "out.resume" / "distill" / "lesson.safetensors"
    whole = lesson.read_bytes()
    for hurt in (_flipped, _said(layer="-5"), _said(layer="x"), _other_tensors):
        lesson.write_bytes(whole)
        hurt(lesson)
        with pytest.raises(RecipeError, match="cannot be gone on from"):
            dicer.prune(model, recipe, output=tmp_path / "out", resume=True)
    assert not (tmp_path / "out").exists()


def test_only_what_is_left(model, calib, tmp_path, monkeypatch):
    """Layers that are finished are not run again, and of those behind the last one chosen nothing is read."""
    recipe, reads = Recipe(method="rc-a", calib=calib), []
    with monkeypatch.context() as patch:
        _killing(patch, 4)
        with pytest.raises(Killed):
            dicer.prune(model, recipe, STREAM, output=tmp_path / "out", resume=True)
    layer = StreamedStore.layer
    monkeypatch.setattr(StreamedStore, "layer", lambda self, i, **more: (reads.append(i), layer(self, i, **more))[1])
    dicer.prune(model, recipe, STREAM, output=tmp_path / "out", resume=True)
    assert reads == [2, 3]


OTHER = {
    "recipe": ({"recipe": {"ratio": 0.5}}, r"another recipe \(ratio\)"),
    "text": ({"rows": 1}, "another text"),
    "model": ({"model": 1}, "another model"),
    "dtype": ({"compute": {"dtype": "bfloat16"}}, r"another recipe \(dtype\)"),
}


@pytest.mark.parametrize("other", OTHER)
def test_other_run_refused(tmp_path, monkeypatch, other):
    change, said = OTHER[other]
    models = [save_tiny(tmp_path / f"model {seed}", seed=seed) for seed in range(2)]
    for seed in range(2):
        rows = tiny_tokens(seed=seed).tolist()
        (tmp_path / f"rows {seed}.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))

    def prune(recipe=None, compute=None, rows=0, model=0):
        asked = Recipe(method="rc-a", calib=str(tmp_path / f"rows {rows}.jsonl"), **(recipe or {}))
        how = Compute(stream=True, **(compute or {}))
        return dicer.prune(models[model], asked, how, output=tmp_path / "out", resume=True)

    with monkeypatch.context() as patch:
        _killing(patch, 3)
        with pytest.raises(Killed):
            prune()
    before = sorted(path.name for path in (tmp_path / "out.resume").rglob("*"))
    if other == "text":  # of the same name
        said = "another text"
        (tmp_path / "rows 0.jsonl").write_bytes((tmp_path / "rows 1.jsonl").read_bytes())
        change = {}
    with pytest.raises(RecipeError, match=said):
        prune(**change)
    assert sorted(path.name for path in (tmp_path / "out.resume").rglob("*")) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("asked", [{"method": "taylor"}, {"method": "taylor", "repair": "least-squares"}], ids=str)
def test_what_cannot_go_on(model, calib, tmp_path, asked):
    with pytest.raises(RecipeError, match="--resume goes on behind"):
        dicer.prune(model, Recipe(**asked, calib=calib), output=tmp_path / "out", resume=True)
    assert [*tmp_path.iterdir()] == []


def _flipped(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def _said(**metadata):
    """The same tensors, and another word about them."""

    def hurt(path):
        with safe_open(path, framework="pt") as file:
            tensors, known = {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata()  # noqa: SIM118
        said = {name: value for name, value in {**known, **metadata}.items() if value is not None}
        save_file(tensors, path, metadata=said or None)

    return hurt


def _other_tensors(path):
    """A whole file, of another model."""
    with safe_open(path, framework="pt") as file:
        tensors, number = {name: file.get_tensor(name)[:1].clone() for name in file.keys()}, file.metadata()["layer"]  # noqa: SIM118
    save_file(tensors, path, metadata={"layer": number, "sha256": _digest(tensors)})


def _no_recipe(path):
    path.write_text(json.dumps({**json.loads(path.read_text()), "recipe": [1]}))


HURTS = {
    "no recipe": _no_recipe,
    "no content": lambda path: path.write_bytes(b"{"),
    "a bit": _flipped,
    "no layer": _said(layer=None),
    "nothing said": _said(layer=None, sha256=None),
    "layer below 0": _said(layer="-5"),
    "layer of another": _said(layer="1000000000"),
    "no number": _said(layer="five"),
}


@pytest.mark.parametrize(
    ("name", "hurt"),
    [
        *(("run.json", hurt) for hurt in ("no content", "no recipe")),
        *(("walk-1/hidden.safetensors", hurt) for hurt in list(HURTS)[1:]),
        *(("walk-1/layer-00000.safetensors", hurt) for hurt in ("no content", "a bit", "nothing said")),
    ],
)
def test_broken_folder(model, calib, tmp_path, monkeypatch, name, hurt):
    recipe = Recipe(method="rc-a", calib=calib)
    with monkeypatch.context() as patch:
        _killing(patch, 5)
        with pytest.raises(Killed):
            dicer.prune(model, recipe, STREAM, output=tmp_path / "out", resume=True)
    HURTS[hurt](tmp_path / "out.resume" / name)
    with pytest.raises(RecipeError, match=r"move it away|remove it"):
        dicer.prune(model, recipe, STREAM, output=tmp_path / "out", resume=True)


def test_killed_process(model, rows, tmp_path, run):
    """By the system, wherever it is; then the same command."""
    words = ("prune", model, "--method", "rc-a", "--calib", rows, "--stream", "--resume", "-o")
    run(*words, tmp_path / "whole")
    command = [sys.executable, "-m", "dicer", *map(str, words), str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not [*tmp_path.glob("out.resume/walk-1/hidden.safetensors")] and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if not (tmp_path / "out").exists():
        run(*words, tmp_path / "out")
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} <= {"whole", "out"}
