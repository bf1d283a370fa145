"""Records: written and read as they were, refused where they are damaged, and packed into one file and back."""

from __future__ import annotations

import copy
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from recorded import UNITS, record, save, values

from dicer.errors import ExperimentError, OutputError
from dicer.study import records as module
from dicer.study.record import Failed, Original, Pruned, make_record, pack, unpack
from dicer.study.records import copy_records, read_record, read_records, values_of, write_record

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def _changed(said, where, value):
    """What a record says with another value at a dotted place; without it for ``...``."""
    changed = copy.deepcopy(said)
    *way, last = where.split(".")
    inner = changed
    for name in way:
        inner = inner[name]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return changed


ALWAYS = ("id", "status", "method", "text", "model", "recipe", "evaluation", "environment", "versions", "git")
DAMAGES = [
    *((name, ..., f"('{name}' is missing)") for name in (*ALWAYS, "metrics", "seconds", "memory", "layers")),
    *((name, 5, f"({name}: ") for name in (*ALWAYS, "metrics", "seconds", "memory", "layers")),
    ("model", None, "(model: "),
    ("method", "$\\frac$", "(method: "),
    ("status", "odd", "(status: "),
    ("recipe.ratio", ..., "('recipe.ratio' is missing)"),
    ("recipe.ratio", "0.25", "(recipe.ratio: "),
    ("recipe.ratio", 1.5, "(recipe.ratio: "),
    ("recipe.calib", {}, "(recipe.calib: "),
    ("evaluation.tasks", 1, "(evaluation.tasks: "),
    ("metrics.summary.average", "high", "(metrics.summary.average: "),
    ("metrics.tasks", {"a": {}}, "('metrics.tasks.a.metrics' is missing)"),
    (
        "metrics.tasks",
        {"a": {"metrics": {"acc": {"value": 1, "stderr": "N/A"}}}},
        "(metrics.tasks.a.metrics.acc.stderr: ",
    ),
    ("metrics.perplexity", {"value": 1.0, "text": "a"}, "('metrics.perplexity.window' is missing)"),
    ("seconds.score", "long", "(seconds.score: "),
    ("memory.score", {"host": 10**400}, "(memory.score.host."),
    ("layers.5.keep", "?", "(layers.5: "),
    ("layers.5.keep", "AAAA", "(layers.5: Value error, keep must have one bit for each unit"),
    ("layers.five", {"units": 1, "keep": "AA=="}, "(layers.five."),
    ("kept", {"mlp": {"5": [0, 0]}}, "(kept: Value error, more is kept than there is"),
    ("kept", {"mlp": {"5": [4, 5]}}, "(kept: Value error, more is kept than there is"),
    ("kept", {"mlp": {"5": [4]}}, "('kept.mlp.5.1' is missing)"),
    ("allocation", {"transfer_entropy": {"mlp": 1}}, "(allocation.transfer_entropy.mlp: "),
]


@pytest.mark.parametrize(("where", "value", "says"), DAMAGES, ids=lambda part: str(part)[:30])
def test_damaged_record(tmp_path, where, value, says):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(_changed(values("rc-a", 0.25), where, value)))
    with pytest.raises(ExperimentError) as caught:
        read_record(path)
    line = str(caught.value)
    assert f"the record {path} is no whole record of a run {says}" in line
    assert line.endswith("; move it out of the results folder.")
    assert "\n" not in line


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 5_000 + "1" + "}" * 5_000, '"\\ud800"', "\0", ""])
def test_no_json_object(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ExperimentError, match=r"a\.json is no record of a run; move it out"):
        read_record(tmp_path / "a.json")


def test_record_of_another_format(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"format": 0}))
    with pytest.raises(ExperimentError, match="has format 0, and this version of dicer reads 1; move it out"):
        read_record(tmp_path / "a.json")


def test_kinds_of_records():
    failed = record("rc-a", 0.75, status="failed", error="no luck")
    assert [type(one) for one in (failed, record("original"), record("rc-a", 0.25))] == [Failed, Original, Pruned]
    with pytest.raises(ValidationError, match=r"pruned\.recipe\.ratio"):
        make_record(_changed(values("rc-a", 0.25), "recipe.ratio", ...))


def test_what_no_reader_knows_is_kept(tmp_path):
    said = values("rc-a", 0.25, later={"a": [1, None]})
    said["recipe"]["entropy_profile"] = said["layers"]["5"]["later"] = said["metrics"]["later"] = 10**30
    write_record(tmp_path / "a.json", make_record(said))
    assert json.loads((tmp_path / "a.json").read_text()) == said
    assert values_of(read_record(tmp_path / "a.json")) == said


def test_numbers_that_are_none():
    said = values("rc-a", 0.25, perplexity="inf", average="nan", allocation={"transfer_entropy": {"mlp": ["-inf"]}})
    found = make_record(said)
    assert found.metrics.summary["word_perplexity"] == float("inf")
    assert found.allocation.transfer_entropy == {"mlp": [-float("inf")]}
    assert values_of(found) == said


def test_masks():
    keep = np.array([0, 3, 64])
    mask = unpack(pack(keep, 65), 65)
    assert np.flatnonzero(mask).tolist() == [0, 3, 64]
    assert np.array_equal(
        record("rc-a", 0.25).layers["5"].mask, unpack(values("rc-a", 0.25)["layers"]["5"]["keep"], UNITS)
    )


FOUND = [record("original"), record("rc-a", 0.25), record("rc-a", 0.75, status="failed", error="x\ny")]


def _files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.json")}


def test_pack_and_back(tmp_path):
    results = save(FOUND, tmp_path / "results")
    for name in ("a", "b"):  # at another time, and from another order of writing, the same bytes
        assert copy_records(results, tmp_path / f"{name}.jsonl.gz") == 3
        results = save(FOUND[::-1], tmp_path / name)
    packed = tmp_path / "a.jsonl.gz"
    assert packed.read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
    assert packed.read_bytes()[4:8] == bytes(4)  # no time
    assert copy_records(packed, tmp_path / "back") == 3
    assert _files(tmp_path / "back") == _files(tmp_path / "results")
    by_id = [sorted(read_records(place), key=lambda one: one.id) for place in (packed, results)]
    assert by_id[0] == by_id[1]


def test_unpack_beside_other_records(tmp_path):
    copy_records(save(FOUND, tmp_path / "results"), tmp_path / "a.jsonl.gz")
    mine = record("rc-a", 0.25, perplexity=1.0)
    assert copy_records(tmp_path / "a.jsonl.gz", save([mine], tmp_path / "mine")) == 2
    assert next(one for one in read_records(tmp_path / "mine") if one.id == mine.id) == mine  # what is there stays


def test_pack_over_a_file(tmp_path):
    (tmp_path / "a.jsonl.gz").write_text("mine")
    with pytest.raises(OutputError, match=r"a\.jsonl\.gz exists; choose another name"):
        copy_records(save(FOUND, tmp_path / "results"), tmp_path / "a.jsonl.gz")
    assert (tmp_path / "a.jsonl.gz").read_text() == "mine"
    with pytest.raises(ExperimentError, match="nothing holds no record"):
        copy_records(tmp_path / "nothing", tmp_path / "b.jsonl.gz")
    assert not (tmp_path / "b.jsonl.gz").exists()


GOOD = json.dumps(values("original")).encode()
WHOLE = gzip.compress(GOOD + b"\n" + GOOD + b"\n")
BROKEN = [
    (WHOLE[:-40], r"ends after \d records in the middle; copy it again"),
    (WHOLE[:10] + b"\xff" * 40 + WHOLE[50:], "cannot be read: Error -3 while decompressing"),
    (WHOLE[:-8] + bytes(8), "cannot be read: CRC check failed"),
    (b"PK", "cannot be read: Not a gzipped file"),
    (gzip.compress(GOOD + b"\n{]\n"), r"line 2 of .* is no record of a run; pack the records again"),
    (gzip.compress(GOOD.replace(b'"id"', b'"di"')), r"line 1 of .* is no whole record of a run \('id' is missing\)"),
    (gzip.compress(GOOD.replace(b'"format": 1', b'"format": 2')), "line 1 of .* has format 2, and this version"),
    (gzip.compress(b" " * 3_000_000), r"unpacks to more than records need: [\d,]+ bytes at line 1"),
    (gzip.compress((GOOD + b"\n") * 3_000), r"unpacks to more than records need: [\d,]+ bytes at line \d+"),
    (None, "there is no file"),
]


@pytest.mark.parametrize(("content", "says"), BROKEN, ids=lambda value: value[:30] if isinstance(value, str) else "")
def test_packed_file_that_is_none(tmp_path, monkeypatch, content, says):
    """Truncated, damaged, of something else, or a bomb: one line, and no more is unpacked than the limit."""
    monkeypatch.setattr(module, "_LONGEST_LINE", 1_000_000)
    monkeypatch.setattr(module, "_LARGEST", 2_000_000)
    path = tmp_path / "a.jsonl.gz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ExperimentError, match=says) as caught:
        read_records(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [("model.name", ".."), ("id", "../../../x"), ("method", ".."), ("id", "a\0b")])
def test_unpack_leads_nowhere_else(tmp_path, change):
    said = _changed(values("rc-a", 0.25), *change)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps(said).encode()))
    with pytest.raises(ExperimentError, match="has no fit name for a file"):
        copy_records(tmp_path / "a.jsonl.gz", tmp_path / "in" / "results")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl.gz"]


def test_committed_records(tmp_path):
    """All of 0.1's are read, and come out of their files as they went in."""
    for path in RESULTS.glob("*/records.jsonl.gz"):
        lines = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
        assert [values_of(one) for one in read_records(path)] == lines
        copy_records(path, tmp_path / path.parent.name / "results")
        copy_records(tmp_path / path.parent.name / "results", tmp_path / path.parent.name / path.name)
        again = gzip.decompress((tmp_path / path.parent.name / path.name).read_bytes())
        assert again == gzip.decompress(path.read_bytes())
    assert {path.name: len(list(path.rglob("*.json"))) for path in tmp_path.iterdir()} == {
        "paper-tables": 25,
        "what-to-prune": 105,
    }
