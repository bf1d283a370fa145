"""Where text comes from: files, data sets of the hub, and what is said where they cannot be had."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from texts import DOCUMENTS, contains, jsonl, read, tokenize

from dicer.ask.text import Text
from dicer.errors import CalibrationError
from dicer.measure import documents
from dicer.measure.documents import check_source, check_text


def test_text_field_and_blank_lines(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text('\n{"body": "' + "x" * 50 + '"}\n\n')
    assert read(path, calib_field="body").tokens.shape == (6, 20)
    with pytest.raises(CalibrationError, match=r"no text in the field 'text' \(has: body\)"):
        read(path)


def test_whole_local_file(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "_HUB_DOCUMENTS", 3)
    calibration = read(jsonl(tmp_path / "text.jsonl", DOCUMENTS), samples=12, seq_len=190)
    assert len({tuple(row) for row in calibration.tokens.tolist()}) == 12


def test_look_at_a_source(tmp_path, monkeypatch):
    """Nothing is read: a file may be broken; a pipe is refused, as it could be read once only, or never end."""
    (tmp_path / "broken.jsonl.gz").write_bytes(b"no zip")
    os.mkfifo(tmp_path / "pipe.txt")
    monkeypatch.setitem(sys.modules, "datasets", None)
    for source in (tmp_path / "broken.jsonl.gz", "builtin", "c4", "owner/name"):
        check_text(Text(calib=str(source)))
    for source, says in (
        (tmp_path / "pipe.txt", "pipe.txt cannot be read: it is a pipe, and only plain files are read."),
        (tmp_path / "none.txt", "none.txt cannot be read: No such file"),
        ("bookcorpsu", "unknown calibration text 'bookcorpsu'. Did you mean 'bookcorpus'?"),
        ("a/b/c", "unknown calibration text 'a/b/c'"),
    ):
        with pytest.raises(CalibrationError) as caught:
            check_text(Text(calib=str(source)))
        assert says in str(caught.value)
    with pytest.raises(CalibrationError, match=r"unknown perplexity text 'c4'\. Available: FILE.*, builtin"):
        check_source("c4", ("builtin",), "perplexity text")


# Data sets of the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder that the datasets library is given for OWNER/NAME."""
    load = pytest.importorskip("datasets").load_dataset
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    jsonl(folder / "train.jsonl", [{"text": document, "id": i} for i, document in enumerate(DOCUMENTS)])
    jsonl(folder / "test.jsonl", [{"text": "T" * 100, "id": 0}])
    monkeypatch.setattr("datasets.load_dataset", lambda _, *rest, **named: load(str(folder), *rest, **named))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "home" / "datasets"))
    return "owner/name"


def test_windows_of_a_data_set(hub, capfd):
    first, again, other = (read(hub, calib_seed=seed) for seed in (3, 3, 4))
    assert capfd.readouterr() == ("", "")
    ids = [tokenize(document) for document in DOCUMENTS]
    assert first.tokens.shape == (6, 20)
    assert all(any(contains(document, row) for document in ids) for row in first.tokens.tolist())
    assert first.provenance["source"] == "owner/name"
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.tokens, other.tokens)
    assert set(read(hub, calib_split="test").tokens.flatten().tolist()) == set(tokenize("T"))


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"calib_field": "body"}, r"no text field 'body' \(has: text, id\); name it with --calib-field"),
        ({"calib_field": "id"}, "no text field 'id'"),
        ({"calib_split": "dev"}, "'owner/name' cannot be had: .*dev.*Check name, split and connection"),
        ({"calib_config": "no-such-config"}, "'owner/name' cannot be had: .*no-such-config"),
    ],
)
def test_what_a_data_set_lacks(hub, asked, says):
    with pytest.raises(CalibrationError, match=says) as caught:
        read(hub, **asked)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("calib", "more", "arguments"),
    [
        ("c4", {}, ("allenai/c4", "en", "train", None)),
        ("c4", {"calib_split": "validation"}, ("allenai/c4", "en", "validation", None)),
        ("c4", {"calib_config": "fr", "calib_field": "url"}, ("allenai/c4", "fr", "train", None)),
        ("wikitext2", {}, ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", None)),
        ("bookcorpus", {}, ("bookcorpus/bookcorpus", None, "train", "refs/convert/parquet")),
        (
            "an/other",
            {"calib_config": "fr", "calib_split": "validation", "calib_field": "body"},
            ("an/other", "fr", "validation", None),
        ),
    ],
)
def test_names_of_data_sets(monkeypatch, calib, more, arguments):
    called = []

    def load_dataset(path, config, *, split, revision, streaming):
        called.append((path, config, split, revision))
        assert streaming is True
        return ({more.get("calib_field", "text"): text} for text in ("   ", "w" * 60, "v" * 60))

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    tokens = read(calib, **more).tokens
    assert called == [arguments]
    assert set(tokens.flatten().tolist()) == set(tokenize("vw"))  # the blank document is passed over


def test_first_rows_of_a_stream_in_order(monkeypatch):
    seen = []

    def sentences():
        for i in range(10_000_000):
            seen.append(i)
            yield {"text": f"sentence {i:05d}."}

    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: sentences())
    monkeypatch.setattr(documents, "_HUB_DOCUMENTS", 300)
    calibration = read("bookcorpus", seq_len=100)
    text = tokenize("\n\n".join(f"sentence {i:05d}." for i in range(300)))
    assert len(seen) == 300
    assert all(contains(text, row) for row in calibration.tokens.tolist())


def test_no_datasets_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match=r"needs the datasets library: pip install 'dicer\[data\]'"):
        read("c4")


def test_failing_connection(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach the hub.\nsecond line")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(CalibrationError, match=r"'c4' cannot be had: Couldn't reach the hub\. Check name") as caught:
        read("c4")
    assert "\n" not in str(caught.value)
