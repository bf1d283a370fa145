"""Pipes, sockets, devices and links where files are expected: one line, and nothing waits or leaves its folder."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from test_reading import SPECIAL, special
from tiny import save_tiny

import dicer

KINDS = [kind for kind in SPECIAL if kind not in ("folder", "terminal")]
SECONDS = 30  # nothing of this takes one
pytestmark = pytest.mark.usefixtures("in_time")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    base = tmp_path_factory.mktemp("models")
    return {"one": save_tiny(base / "one"), "shards": save_tiny(base / "shards", shards=True)}


def broken(tmp_path, models, name, kind):
    """A model folder in which one file is another thing."""
    folder = shutil.copytree(models["shards" if name.endswith("index.json") else "one"], tmp_path / "model")
    (folder / name).unlink(missing_ok=True)
    special(folder / name, kind)
    return folder


READ = [
    *("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "tokenizer.model"),
    *("vocab.txt", "merges.txt", "adapter_config.json", "preprocessor_config.json", "tekken.json"),
]


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("kind", KINDS)
def test_file_of_a_model(refused, tmp_path, models, name, kind):
    folder = broken(tmp_path, models, name, kind)
    says = "is a link out of the folder" if kind == "device" else "and only plain files are read"
    refused("prune", folder, "-o", tmp_path / "out", "--method", "weight-l2", says=[folder / name, says])
    refused("info", folder, says=[says])


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"])
def test_link_out_of_a_model(refused, tmp_path, models, name):
    folder = shutil.copytree(models["one"], tmp_path / "model")
    shutil.move(folder / name, tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    refused("info", folder, says=[folder / name, "is a link out of the folder", "Put the file itself there"])
    (folder / name).unlink()
    shutil.move(tmp_path / name, folder / "kept")
    (folder / name).symlink_to("kept")
    dicer.make_plan(folder, dicer.Recipe(method="weight-l2"))


@pytest.mark.parametrize("key", ["vocab", "merges", "vocab_file", "merges_file", "fast_tokenizer_files"])
@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_path_in_a_tokenizer(refused, tmp_path, models, key, kind):
    """Which transformers would open, wherever it is, and wait."""
    folder = shutil.copytree(models["one"], tmp_path / "model")
    place = tmp_path / "tokenizer.4.0.0.json"
    os.mkfifo(place) if kind == "pipe" else place.write_text("{}")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config[key] = [f"../{place.name}"] if key.endswith("files") else str(place)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    refused("info", folder, says=[f"its {key} is '", place.name, "files elsewhere are not read"])


def test_config_that_points_at_another(refused, tmp_path, models):
    folder = shutil.copytree(models["one"], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.4.0.0.json").write_text(json.dumps({**config, "num_hidden_layers": 10**6}))
    (folder / "config.json").write_text(json.dumps({**config, "configuration_files": ["config.4.0.0.json"]}))
    refused("info", folder, says=["points at other configs (configuration_files)"])


def test_blobs_that_are_a_link(refused, tmp_path, models):
    """The layout of the hub's cache leads no further than to its blobs."""
    (tmp_path / "secret").mkdir()
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1"
    shutil.copytree(models["one"], snapshot)
    shutil.move(snapshot / "config.json", tmp_path / "secret" / "config.json")
    (tmp_path / "models--a--b" / "blobs").symlink_to(tmp_path / "secret")
    (snapshot / "config.json").symlink_to("../../blobs/config.json")
    refused("info", snapshot, says=["is a link out of the folder"])


@pytest.mark.parametrize("kind", [*KINDS, "folder"])
@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ("--recipe", "a.toml"),
        ("--calib", "a.txt"),
        ("--calib", "a.jsonl"),
        ("--calib", "a.jsonl.gz"),
        ("--calib", "a.json"),
        ("--calib", "a.csv"),
        ("--calib", "a.parquet"),
        ("--perplexity", "a.txt"),
        ("--fidelity", "a.txt"),
        ("--allocate", "a.json"),
        ("--entropy-profile", "a.json"),
        ("--family", "a.toml"),
        ("--criterion", "a.py"),
    ],
)
def test_file_of_a_flag(refused, tmp_path, models, flag, name, kind):
    place = special(tmp_path / name, kind)
    value = f"{place}:score" if name.endswith(".py") else place
    more = ["--allocate", "transfer-entropy"] if flag == "--entropy-profile" else []
    says = [place.name] if kind == "folder" or name.endswith(".py") else [place.name, "and only plain files are read"]
    refused("prune", models["one"], "-o", tmp_path / "out", flag, value, *more, says=says)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["dicer_plan.json", "dicer_plan.tensors"])
def test_file_of_a_plan(refused, tmp_path, models, name, kind):
    dicer.make_plan(models["one"], dicer.Recipe(method="weight-l2")).save(tmp_path / "plan")
    (tmp_path / "plan" / name).unlink()
    special(tmp_path / "plan" / name, kind)
    says = ["and only plain files are read"]
    refused("apply", tmp_path / "plan", models["one"], "-o", tmp_path / "out", says=says)
    refused("diff", tmp_path / "plan", tmp_path / "plan", says=says)


@pytest.mark.parametrize("kind", KINDS)
def test_experiments_and_records(refused, tmp_path, kind):
    refused("run", special(tmp_path / "a.toml", kind), "-o", tmp_path / "r", says=["and only plain files are read"])
    (tmp_path / "results" / "model" / "rc-a" / "logs").mkdir(parents=True)
    special(tmp_path / "results" / "model" / "rc-a" / "logs" / "a.json", kind)
    refused("report", tmp_path / "results", "-o", tmp_path / "out", says=["and only plain files are read"])
    refused("report", special(tmp_path / "a.jsonl.gz", kind), "-o", tmp_path / "out", says=["only plain files"])


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_file(refused, tmp_path, kind):
    refused("info", special(tmp_path / "a.gguf", kind), says=["a.gguf", "and only plain files are read"])


def test_folder_of_texts_with_others_in_it(refused, tmp_path, models):
    """Of a folder only the plain files are texts."""
    (tmp_path / "texts").mkdir()
    os.mkfifo(tmp_path / "texts" / "a.txt")
    refused("prune", models["one"], "-o", tmp_path / "out", "--calib", tmp_path / "texts", says=["without a file"])


def test_endless_texts(refused, tmp_path, models, monkeypatch):
    from dicer.measure import rows

    monkeypatch.setattr(rows, "_LONGEST_LINE", 2**20)
    for name, says in (("a.txt", "NUL characters"), ("a.jsonl", "a line has more than"), ("a.csv", "a line has more")):
        with (tmp_path / name).open("wb") as file:
            file.truncate(2**40)
        refused("prune", models["one"], "-o", tmp_path / "out", "--calib", tmp_path / name, says=[name, says])


@pytest.mark.parametrize("kind", KINDS)
def test_file_of_a_saved_data_set(refused, tmp_path, models, kind):
    pytest.importorskip("datasets").Dataset.from_list([{"text": "a" * 100}]).save_to_disk(tmp_path / "saved")
    (data,) = (tmp_path / "saved").glob("*.arrow")
    data.unlink()
    special(data, kind)
    says = ["and only plain files are read"]
    refused("prune", models["one"], "-o", tmp_path / "out", "--calib", tmp_path / "saved", says=says)


def test_model_whose_name_could_be_of_the_hub(run, tmp_path, models, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models["one"], tmp_path / "owner" / "name")
    note = "Note: owner/name is the folder of that name here, and not the model of the hub"
    assert note in run("prune", "owner/name", "-o", "out", "--method", "weight-l2")
    assert note not in run("prune", "./owner/name", "-o", "other", "--method", "weight-l2")
