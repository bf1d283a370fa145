"""Text to tokens: every source of METHODS section 4."""

from __future__ import annotations

import gzip
import hashlib
import json
import sys

import numpy as np
import pytest
import torch
from tiny import save_tiny, tiny_tokenizer

from dicer.ask.recipe import Recipe
from dicer.errors import CalibrationError
from dicer.measure import text as calibration_module
from dicer.measure.documents import HUB_TEXTS
from dicer.measure.text import load_calibration, load_windows
from dicer.model.source import tokenize_with
from dicer.pipeline import make_plan

DOCUMENTS = [f"Document {i}. " + "".join(chr(97 + (i * 7 + j * j) % 26) for j in range(200 + i)) for i in range(12)]
TWO_WINDOWS = 200  # tokens


@pytest.fixture(scope="module")
def tokenize():
    return tokenize_with(tiny_tokenizer())


def _contains(ids, window):
    return any(ids[i : i + len(window)] == window for i in range(len(ids) - len(window) + 1))


def _jsonl(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.fixture(params=[".txt", ".jsonl", ".jsonl.gz"])
def local(request, tmp_path):
    """(file, its documents), in each of the formats."""
    path = tmp_path / f"text{request.param}"
    if request.param == ".txt":
        path.write_text("\n".join(DOCUMENTS))
        return path, ["\n".join(DOCUMENTS)]
    return _jsonl(path, [{"text": document} for document in DOCUMENTS]), DOCUMENTS


def _recipe(calib, **more):
    return Recipe(calib=str(calib), **{"samples": 6, "seq_len": 20, "calib_seed": 3, **more})


def test_samples_are_windows_of_the_documents(local, tokenize):
    path, documents = local
    calibration = load_calibration(_recipe(path), tokenize)
    assert calibration.tokens.shape == (6, 20)
    assert calibration.tokens.dtype == torch.int64
    ids = [tokenize(document) for document in documents]
    for window in calibration.tokens.tolist():
        assert any(_contains(document, window) for document in ids)
    assert calibration.notes == ()


def test_every_long_document_is_used_before_one_is_used_again(tmp_path, tokenize):
    path = _jsonl(tmp_path / "text.jsonl", [{"text": document} for document in DOCUMENTS])
    rows = load_calibration(_recipe(path, samples=12, seq_len=190), tokenize).tokens.tolist()
    ids = [tokenize(document) for document in DOCUMENTS]
    used = [{i for i, document in enumerate(ids) if _contains(document, row)} for row in rows]
    assert sorted(used, key=min) == [{i} for i in range(12)]


def test_short_documents_are_passed_over_where_a_long_one_is(tmp_path, tokenize):
    path = _jsonl(tmp_path / "text.jsonl", [{"text": "short"}, {"text": ""}, {"text": "x" * 100}, {"text": "y"}])
    calibration = load_calibration(_recipe(path, samples=2), tokenize)
    assert set(calibration.tokens.flatten().tolist()) == set(tokenize("x"))
    assert calibration.notes == ()


def test_the_seed_decides_the_samples(local, tokenize):
    path, _ = local
    first, again, other = (load_calibration(_recipe(path, calib_seed=seed), tokenize) for seed in (3, 3, 4))
    assert torch.equal(first.tokens, again.tokens)
    assert first.provenance == again.provenance
    assert not torch.equal(first.tokens, other.tokens)
    assert first.provenance["tokens_sha256"] != other.provenance["tokens_sha256"]


def test_the_seed_of_the_method_leaves_the_samples_alone(local, tokenize):
    path, _ = local
    for calib in (path, "builtin"):
        first, other = (load_calibration(_recipe(calib, seed=seed), tokenize) for seed in (0, 1))
        assert torch.equal(first.tokens, other.tokens)
        assert first.provenance == other.provenance


@pytest.mark.parametrize("method", ["act-l2", "taylor"])
def test_a_method_without_draws_gives_one_plan_for_all_seeds(tmp_path, method):
    (tmp_path / "text.txt").write_text("\n".join(DOCUMENTS))
    model = save_tiny(tmp_path / "llama")
    plans = [
        make_plan(model, _recipe(tmp_path / "text.txt", method=method, seed=seed, calib_seed=calib_seed))
        for seed, calib_seed in ((42, 42), (0, 42), (1, 42), (7, 42), (42, 0))
    ]
    assert [plans[0].diff(plan) for plan in plans[1:4]] == [[], [], []]
    assert all(plan.calibration == plans[0].calibration for plan in plans[1:4])
    assert plans[4].calibration["tokens_sha256"] != plans[0].calibration["tokens_sha256"]


def test_provenance_says_source_and_hash_and_no_path(local, tokenize):
    path, _ = local
    calibration = load_calibration(_recipe(path), tokenize)
    digest = hashlib.sha256(np.ascontiguousarray(calibration.tokens.numpy()).tobytes()).hexdigest()
    assert calibration.provenance == {
        "source": path.name,
        "kind": "random windows",
        "seed": 3,
        "joined": False,
        "samples": 6,
        "seq_len": 20,
        "tokens_sha256": digest,
    }
    assert str(path.parent) not in json.dumps(calibration.provenance)


def test_plain_and_zipped_rows_give_the_same_tokens(tmp_path, tokenize):
    rows = [{"text": document} for document in DOCUMENTS]
    plain = load_calibration(_recipe(_jsonl(tmp_path / "a.jsonl", rows)), tokenize)
    zipped = load_calibration(_recipe(_jsonl(tmp_path / "a.jsonl.gz", rows)), tokenize)
    assert torch.equal(plain.tokens, zipped.tokens)


def test_another_text_field_and_blank_lines(tmp_path, tokenize):
    path = tmp_path / "text.jsonl"
    path.write_text('\n{"body": "' + "x" * 50 + '"}\n\n')
    assert load_calibration(_recipe(path, calib_field="body"), tokenize).tokens.shape == (6, 20)
    with pytest.raises(CalibrationError, match=r"no text in the field 'text' \(has: body\)"):
        load_calibration(_recipe(path), tokenize)


def test_short_documents_are_joined_and_the_run_says_so(tmp_path, tokenize):
    texts = ["one two", "three", "four five six"]
    path = _jsonl(tmp_path / "text.jsonl", [{"text": text} for text in texts])
    calibration = load_calibration(_recipe(path, samples=1), tokenize)
    assert _contains(tokenize("\n\n".join(texts)), calibration.tokens[0].tolist())
    assert calibration.notes == ("no document of 'text.jsonl' has 20 tokens, so its 3 documents were joined",)
    assert calibration.provenance["joined"] is True


def test_short_documents_joined_give_what_too_few_long_ones_do_not(tmp_path, tokenize):
    short = [f"short {i}." for i in range(20)]
    texts = [*short[:10], "x" * 45, *short[10:], "y" * 25]
    path = _jsonl(tmp_path / "text.jsonl", [{"text": text} for text in texts])
    calibration = load_calibration(_recipe(path, samples=7), tokenize)
    rows = calibration.tokens.tolist()
    assert [set(row) for row in sorted(rows[:2])] == [set(tokenize("x")), set(tokenize("y"))]
    joined = tokenize("\n\n".join(short))
    assert all(_contains(joined, row) for row in rows[2:])
    assert calibration.notes == (
        "only 2 documents of 'text.jsonl' have 20 tokens, so 5 of 7 samples come from the shorter ones joined",
    )
    assert calibration.provenance["joined"] is True
    room = len(joined) // 20 + 2 + 1  # of the joined ones, of x and of y
    assert len(load_calibration(_recipe(path, samples=room), tokenize).notes) == 1
    notes = load_calibration(_recipe(path, samples=room + 1), tokenize).notes
    assert notes[1:] == (f"'text.jsonl' is shorter than {room + 1} x 20 tokens, so samples overlap",)


@pytest.mark.parametrize(("samples", "overlap"), [(1, False), (10, False), (11, True), (40, True)])
def test_a_text_too_short_for_its_samples_says_that_they_overlap(tmp_path, tokenize, samples, overlap):
    path = tmp_path / "text.txt"
    path.write_text("z" * 200)
    calibration = load_calibration(_recipe(path, samples=samples), tokenize)
    assert calibration.tokens.shape == (samples, 20)
    assert calibration.notes == ((f"'text.txt' is shorter than {samples} x 20 tokens, so samples overlap",) * overlap)


def test_a_text_of_exactly_one_sample_is_enough(tmp_path, tokenize):
    path = tmp_path / "text.txt"
    path.write_text("abcdefghijklmnopqrst")
    assert load_calibration(_recipe(path, samples=1), tokenize).tokens.tolist() == [tokenize("abcdefghijklmnopqrst")]
    path.write_text("abcdefghijklmnopqrs")
    with pytest.raises(CalibrationError, match="gives 19 tokens, too short for one sample of 20"):
        load_calibration(_recipe(path, samples=1), tokenize)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_ready_tokens_are_used_as_they_are_and_in_order(tmp_path, suffix):
    rows = [[9, 8, 7, 6], [5, 5, 5, 5], [0, 1, 2, 3]]
    path = _jsonl(tmp_path / f"ready{suffix}", [{"input_ids": row, "text": "not read"} for row in rows])
    calibration = load_calibration(Recipe(calib=str(path)), None)  # no tokenizer is needed
    assert calibration.tokens.tolist() == rows
    assert calibration.tokens.dtype == torch.int64
    assert calibration.notes == ("3 ready samples of 4 tokens are used as they are",)
    assert calibration.provenance["kind"] == "input_ids"
    assert (calibration.provenance["samples"], calibration.provenance["seq_len"]) == (3, 4)


@pytest.mark.parametrize(
    ("asked", "note"),
    [
        ({"samples": 2}, "samples of the recipe do not apply to ready input_ids"),
        ({"samples": 2, "seq_len": 3}, "samples, seq_len of the recipe do not apply to ready input_ids"),
    ],
)
def test_what_does_not_apply_to_ready_tokens_is_said(tmp_path, asked, note):
    path = _jsonl(tmp_path / "ready.jsonl", [{"input_ids": [4, 5, 6, 7]}] * 3)
    calibration = load_calibration(Recipe(calib=str(path), **asked), None)
    assert calibration.tokens.shape == (3, 4)
    assert calibration.notes[1:] == (note,)


def test_text_without_a_tokenizer_is_refused(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("x" * 100)
    for calib in (path, "builtin"):
        with pytest.raises(CalibrationError, match="no tokenizer"):
            load_calibration(_recipe(calib), None)


# Builtin


BLOCK = 2048  # tokens


@pytest.fixture(scope="module")
def builtin(tokenize):
    """How many tokens the builtin text has."""
    import pydoc_data.topics

    topics = pydoc_data.topics.topics
    return len(tokenize("\n\n".join(topics[name] for name in sorted(topics))))


@pytest.fixture
def count_up(builtin):
    """A tokenizer whose ids are their own positions."""
    return lambda _: list(range(builtin))


@pytest.mark.parametrize(
    ("shown_length", "measured_length"), [(128, 1024), (TWO_WINDOWS, 777), (1023, 128), (2048, 2048), (5001, 3000)]
)
def test_builtin_calibration_and_perplexity_never_see_the_same_text(count_up, builtin, shown_length, measured_length):
    shown = load_calibration(_recipe("builtin", samples=5000, seq_len=shown_length), count_up).tokens
    measured = load_windows("builtin", count_up, measured_length, None)
    assert set((shown // BLOCK % 2).unique().tolist()) == {0}
    assert set((measured // BLOCK % 2).unique().tolist()) == {1}
    for rows, length in ((shown, shown_length), (measured, measured_length)):
        if length <= BLOCK:
            assert torch.equal(rows, rows[:, :1] + torch.arange(length))  # each window is one stretch of text
        whole = (
            builtin // (2 * BLOCK) * BLOCK // length if length > BLOCK else builtin // (2 * BLOCK) * (BLOCK // length)
        )
        assert whole <= len(rows.unique(dim=0)) <= whole + BLOCK // length + 1  # and nearly all of the text is used


def test_builtin_is_seeded(tokenize):
    rows = [load_calibration(_recipe("builtin", calib_seed=seed), tokenize).tokens.tolist() for seed in (3, 3, 4)]
    assert rows[0] == rows[1] != rows[2]


def test_builtin_samples_are_not_used_twice_before_all_were_used(count_up, builtin):
    even = sum(min(BLOCK, builtin - i) // TWO_WINDOWS for i in range(0, builtin, 2 * BLOCK))
    assert load_calibration(_recipe("builtin", samples=even, seq_len=TWO_WINDOWS), count_up).notes == ()
    calibration = load_calibration(_recipe("builtin", samples=even + 5, seq_len=TWO_WINDOWS), count_up)
    assert len({tuple(row) for row in calibration.tokens[:even].tolist()}) == even
    assert calibration.notes == (f"the builtin text has {even} samples of {TWO_WINDOWS} tokens; some are used again",)


def test_builtin_has_an_end(tokenize):
    with pytest.raises(CalibrationError, match="builtin text is shorter than one sample of 100000000 tokens"):
        load_calibration(_recipe("builtin", seq_len=100_000_000), tokenize)
    with pytest.raises(CalibrationError, match="shorter than one window"):
        load_windows("builtin", tokenize, 100_000_000, 1)


# Windows for perplexity


def test_windows_of_a_file_lie_side_by_side(local, tokenize):
    path, documents = local
    ids = tokenize("\n\n".join(documents))
    read = load_windows(str(path), tokenize, 50, 7)
    assert read.tolist() == [ids[i * 50 : (i + 1) * 50] for i in range(7)]
    assert len(load_windows(str(path), tokenize, 50, 10**6)) == len(ids) // 50


# Hub data sets


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder that the datasets library takes for OWNER/NAME."""
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    _jsonl(folder / "train.jsonl", [{"text": document, "id": i} for i, document in enumerate(DOCUMENTS)])
    _jsonl(folder / "test.jsonl", [{"text": "T" * 100, "id": 0}])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "home" / "datasets"))
    return "owner/name"


def test_a_data_set_gives_windows_of_its_documents(hub, tokenize):
    calibration = load_calibration(_recipe(hub), tokenize)
    ids = [tokenize(document) for document in DOCUMENTS]
    assert calibration.tokens.shape == (6, 20)
    assert all(any(_contains(document, row) for document in ids) for row in calibration.tokens.tolist())
    assert calibration.provenance["source"] == "owner/name"
    assert torch.equal(calibration.tokens, load_calibration(_recipe(hub), tokenize).tokens)
    assert not torch.equal(calibration.tokens, load_calibration(_recipe(hub, calib_seed=4), tokenize).tokens)


def test_a_data_set_says_nothing_on_stderr(hub, tokenize, capfd):
    load_calibration(_recipe(hub), tokenize)
    assert capfd.readouterr() == ("", "")


def test_a_named_split_is_read(hub, tokenize):
    tokens = load_calibration(_recipe(hub, calib_split="test"), tokenize).tokens
    assert set(tokens.flatten().tolist()) == set(tokenize("T"))


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"calib_field": "body"}, r"no text field 'body' \(has: text, id\); name it with --calib-field"),
        ({"calib_field": "id"}, "no text field 'id'"),
        ({"calib_split": "dev"}, "'owner/name' cannot be had: .*dev.*Check name, split and connection"),
        ({"calib_config": "no-such-config"}, "'owner/name' cannot be had: .*no-such-config"),
    ],
)
def test_what_a_data_set_does_not_have_is_one_line(hub, tokenize, asked, says):
    with pytest.raises(CalibrationError, match=says) as caught:
        load_calibration(_recipe(hub, **asked), tokenize)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "arguments"),
    [
        ({"calib": "c4"}, ("allenai/c4", "en", "train", None)),
        ({"calib": "wikitext2"}, ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", None)),
        ({"calib": "bookcorpus"}, ("bookcorpus/bookcorpus", None, "train", "refs/convert/parquet")),
        ({"calib": "an/other"}, ("an/other", None, "train", None)),
        (
            {"calib": "an/other", "calib_config": "fr", "calib_split": "validation", "calib_field": "body"},
            ("an/other", "fr", "validation", None),
        ),
    ],
)
def test_names_become_the_right_data_sets_and_stream(monkeypatch, tokenize, asked, arguments):
    import datasets

    called = []

    def load_dataset(path, config, *, split, revision, streaming):
        called.append((path, config, split, revision))
        assert streaming is True
        return ({asked.get("calib_field", "text"): text} for text in ("   ", "w" * 60, "v" * 60))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    calibration = load_calibration(_recipe(**asked), tokenize)
    assert called == [arguments]
    assert set(calibration.tokens.flatten().tolist()) == set(tokenize("vw"))  # the blank document is passed over


def test_short_rows_of_a_stream_stay_in_their_order_and_only_the_first_are_read(monkeypatch, tokenize):
    import datasets

    read = []

    def sentences():
        for i in range(10_000_000):
            read.append(i)
            yield {"text": f"sentence {i:05d}."}

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: sentences())
    monkeypatch.setattr(calibration_module, "_HUB_DOCUMENTS", 300)
    calibration = load_calibration(_recipe("bookcorpus", seq_len=100), tokenize)
    text = tokenize("\n\n".join(f"sentence {i:05d}." for i in range(300)))
    assert len(read) == 300
    assert all(_contains(text, row) for row in calibration.tokens.tolist())


def test_a_local_file_is_read_whole(tmp_path, monkeypatch, tokenize):
    monkeypatch.setattr(calibration_module, "_HUB_DOCUMENTS", 3)
    path = _jsonl(tmp_path / "text.jsonl", [{"text": document} for document in DOCUMENTS])
    calibration = load_calibration(_recipe(path, samples=12, seq_len=190), tokenize)
    assert len({tuple(row) for row in calibration.tokens.tolist()}) == 12
    assert calibration.notes == ()


def test_the_known_names_are_those_of_the_paper():
    assert set(HUB_TEXTS) == {"bookcorpus", "c4", "wikitext2"}


def test_without_the_datasets_library_the_line_says_what_to_install(monkeypatch, tokenize):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match=r"needs the datasets library: pip install 'dicer\[data\]'"):
        load_calibration(_recipe("c4"), tokenize)


def test_a_connection_that_fails_is_one_line(monkeypatch, tokenize):
    import datasets

    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach the hub.\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(CalibrationError, match=r"'c4' cannot be had: Couldn't reach the hub\. Check name") as caught:
        load_calibration(_recipe("c4"), tokenize)
    assert "\n" not in str(caught.value)
