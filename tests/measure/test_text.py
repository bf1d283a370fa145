"""Text to tokens: samples at seeded places, windows side by side, and what is known of them."""

from __future__ import annotations

import hashlib
import pydoc_data.topics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import DOCUMENTS, contains, jsonl, read, tokenize
from tiny import save_tiny

import dicer
from dicer.ask.text import Text
from dicer.errors import CalibrationError
from dicer.measure.text import load_calibration, load_windows


@pytest.fixture(params=[".txt", ".jsonl", ".jsonl.gz"])
def local(request, tmp_path):
    """(file, its documents), in each of the formats."""
    path = tmp_path / f"text{request.param}"
    if request.param == ".txt":
        path.write_text("\n".join(DOCUMENTS))
        return path, ["\n".join(DOCUMENTS)]
    return jsonl(path, DOCUMENTS), DOCUMENTS


def test_windows_of_documents(local):
    path, documents = local
    first, again, other = (read(path, calib_seed=seed) for seed in (3, 3, 4))
    ids = [tokenize(document) for document in documents]
    for calibration in (first, other):
        assert (calibration.tokens.shape, calibration.tokens.dtype, calibration.notes) == ((6, 20), torch.int64, ())
        assert all(any(contains(document, row) for document in ids) for row in calibration.tokens.tolist())
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.tokens, other.tokens)
    assert first.provenance == again.provenance
    assert first.provenance == {
        "source": path.name,  # and no path
        "kind": "random windows",
        "seed": 3,
        "joined": False,
        "samples": 6,
        "seq_len": 20,
        "tokens_sha256": hashlib.sha256(first.tokens.numpy().tobytes()).hexdigest(),
    }
    side_by_side = load_windows(str(path), tokenize, 50, 7)
    joined = tokenize("\n\n".join(documents))
    assert side_by_side.tolist() == [joined[i * 50 : (i + 1) * 50] for i in range(7)]
    assert len(load_windows(str(path), tokenize, 50, 10**6)) == len(joined) // 50


def test_zipped_rows(tmp_path):
    plain, zipped = (read(jsonl(tmp_path / f"a.jsonl{ending}", DOCUMENTS)) for ending in ("", ".gz"))
    assert torch.equal(plain.tokens, zipped.tokens)


def test_long_documents_once_each(tmp_path):
    rows = read(jsonl(tmp_path / "text.jsonl", DOCUMENTS), samples=12, seq_len=190).tokens.tolist()
    ids = [tokenize(document) for document in DOCUMENTS]
    used = [{i for i, document in enumerate(ids) if contains(document, row)} for row in rows]
    assert sorted(used, key=min) == [{i} for i in range(12)]


def test_short_documents_beside_a_long_one(tmp_path):
    calibration = read(jsonl(tmp_path / "text.jsonl", ["short", "", "x" * 100, "y"]), samples=2)
    assert set(calibration.tokens.flatten().tolist()) == set(tokenize("x"))
    assert calibration.notes == ()


def test_short_documents_alone(tmp_path):
    texts = ["one two", "three", "four five six"]
    calibration = read(jsonl(tmp_path / "text.jsonl", texts), samples=1)
    assert contains(tokenize("\n\n".join(texts)), calibration.tokens[0].tolist())
    assert calibration.notes == ("no document of 'text.jsonl' has 20 tokens, so its 3 documents were joined",)
    assert calibration.provenance["joined"] is True


def test_too_few_long_documents(tmp_path):
    short = [f"short {i}." for i in range(20)]
    path = jsonl(tmp_path / "text.jsonl", [*short[:10], "x" * 45, *short[10:], "y" * 25])
    calibration = read(path, samples=7)
    rows = calibration.tokens.tolist()
    assert [set(row) for row in sorted(rows[:2])] == [set(tokenize("x")), set(tokenize("y"))]
    joined = tokenize("\n\n".join(short))
    assert all(contains(joined, row) for row in rows[2:])
    assert calibration.notes == (
        "only 2 documents of 'text.jsonl' have 20 tokens, so 5 of 7 samples come from the shorter ones joined",
    )
    assert calibration.provenance["joined"] is True
    room = len(joined) // 20 + 2 + 1  # of the joined ones, of x and of y
    assert len(read(path, samples=room).notes) == 1
    overlap = f"'text.jsonl' is shorter than {room + 1} x 20 tokens, so samples overlap"
    assert read(path, samples=room + 1).notes[1:] == (overlap,)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 200), st.integers(2, 40), st.integers(1, 20))
def test_room_of_a_text(tmp_path_factory, letters, length, samples):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    text = "".join(chr(97 + i % 26) for i in range(letters))
    path.write_text(text)
    if letters < length:
        with pytest.raises(CalibrationError, match=f"gives {letters} tokens, too short for one sample of {length}"):
            read(path, samples=samples, seq_len=length)
        return
    calibration = read(path, samples=samples, seq_len=length)
    assert calibration.tokens.shape == (samples, length)
    assert all(contains(tokenize(text), row) for row in calibration.tokens.tolist())
    overlap = f"'text.txt' is shorter than {samples} x {length} tokens, so samples overlap"
    assert calibration.notes == ((overlap,) if letters // length < samples else ())


@pytest.mark.parametrize("method", ["act-l2", "weight-l2", "taylor", "random", "rc-a"])
def test_seeds_of_samples_and_of_methods(tmp_path, method):
    (tmp_path / "text.txt").write_text("\n".join(DOCUMENTS))
    model, text = save_tiny(tmp_path / "llama"), {"calib": str(tmp_path / "text.txt"), "samples": 6, "seq_len": 20}
    first, other, shown = (
        dicer.make_plan(model, dicer.Recipe(method=method, seed=seed, calib_seed=calib_seed, **text))
        for seed, calib_seed in ((42, 42), (7, 42), (42, 0))
    )
    assert bool(first.diff(other)) == (method in ("random", "rc-a"))
    assert first.calibration == other.calibration
    assert (first.calibration == shown.calibration) == (method in ("random", "weight-l2"))  # which look at no text


@pytest.mark.parametrize("asked", [{}, {"samples": 2}, {"samples": 2, "seq_len": 3}])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_ready_tokens(tmp_path, ending, asked):
    rows = [[9, 8, 7, 6], [5, 5, 5, 5], [0, 1, 2, 3]]
    path = jsonl(tmp_path / f"ready.jsonl{ending}", [{"input_ids": row, "text": "not read"} for row in rows])
    calibration = load_calibration(Text(calib=str(path), **asked), None)  # no tokenizer is needed
    assert (calibration.tokens.tolist(), calibration.tokens.dtype) == (rows, torch.int64)
    ignored = f"{', '.join(asked)} of the recipe do not apply to ready input_ids"
    assert calibration.notes == ("3 ready samples of 4 tokens are used as they are", *[ignored] * bool(asked))
    assert {"kind": "input_ids", "samples": 3, "seq_len": 4}.items() <= calibration.provenance.items()


def test_no_tokenizer(tmp_path):
    (tmp_path / "text.txt").write_text("x" * 100)
    for calib in (str(tmp_path / "text.txt"), "builtin"):
        with pytest.raises(CalibrationError, match="no tokenizer"):
            load_calibration(Text(calib=calib), None)


# Builtin

BLOCK, LENGTH = 2048, 200  # tokens


@pytest.fixture(scope="module")
def builtin():
    """How many tokens the builtin text has."""
    topics = pydoc_data.topics.topics
    return len(tokenize("\n\n".join(topics[name] for name in sorted(topics))))


@pytest.fixture
def shown(builtin):
    """Calibration on the builtin text, its tokens their own positions."""
    return lambda **asked: load_calibration(Text(**asked), lambda _: list(range(builtin)))


@pytest.mark.parametrize(
    ("shown_length", "measured_length"), [(128, 1024), (LENGTH, 777), (1023, 128), (2048, 2048), (5001, 3000)]
)
def test_builtin_calibration_and_perplexity_apart(shown, builtin, shown_length, measured_length):
    calibration = shown(samples=5000, seq_len=shown_length).tokens
    measured = load_windows("builtin", lambda _: list(range(builtin)), measured_length, None)
    assert set((calibration // BLOCK % 2).unique().tolist()) == {0}
    assert set((measured // BLOCK % 2).unique().tolist()) == {1}
    for rows, length in ((calibration, shown_length), (measured, measured_length)):
        blocks = builtin // (2 * BLOCK)
        whole = blocks * BLOCK // length if length > BLOCK else blocks * (BLOCK // length)
        if length <= BLOCK:
            assert torch.equal(rows, rows[:, :1] + torch.arange(length))  # each window is one stretch of text
        assert whole <= len(rows.unique(dim=0)) <= whole + BLOCK // length + 1  # and nearly all of the text is used


def test_builtin_samples_again(shown, builtin):
    even = sum(min(BLOCK, builtin - i) // LENGTH for i in range(0, builtin, 2 * BLOCK))
    assert shown(samples=even, seq_len=LENGTH).notes == ()
    calibration = shown(samples=even + 5, seq_len=LENGTH)
    assert len({tuple(row) for row in calibration.tokens[:even].tolist()}) == even
    assert calibration.notes == (f"the builtin text has {even} samples of {LENGTH} tokens; some are used again",)
    first, again, other = (shown(calib_seed=seed).tokens.tolist() for seed in (3, 3, 4))
    assert first == again != other


def test_builtin_end():
    with pytest.raises(CalibrationError, match="builtin text is shorter than one sample of 10000000 tokens"):
        read("builtin", seq_len=10_000_000)
    with pytest.raises(CalibrationError, match="shorter than one window"):
        load_windows("builtin", tokenize, 100_000_000, 1)
    with pytest.raises(CalibrationError, match=r"'c4' is neither 'builtin' nor a .txt, .jsonl or .jsonl.gz file"):
        load_windows("c4", tokenize, 10, 1)


def test_mixture_in_equal_shares(tmp_path):
    words, rows = tmp_path / "words.txt", tmp_path / "rows.jsonl"
    words.write_text("some words of a plain text " * 40)
    rows.write_text('{"input_ids": [7, 8, 9]}\n{"input_ids": [5, 6, 7, 8, 9, 10]}\n')
    text = Text(source=f"builtin,{words}, {rows}", samples=8, seq_len=16)
    found = load_calibration(text, tokenize)
    assert found.tokens.shape == (3 + 3 + 2, 16)
    assert [part["samples"] for part in found.provenance["parts"]] == [3, 3, 2]
    assert found.provenance["source"] == "builtin, words.txt, rows.jsonl"
    alone = load_calibration(Text(samples=3, seq_len=16), tokenize)
    assert torch.equal(found.tokens[:3], alone.tokens)
    assert (found.mask != 0).sum(1).tolist() == [16] * 6 + [3, 6]
    assert found.tokens[6, :3].tolist() == [7, 8, 9]
    plain = load_calibration(Text(source=f"builtin,{words}", samples=4, seq_len=16), tokenize)
    assert plain.mask is None
    with pytest.raises(CalibrationError, match="1 samples of 2 texts"):
        load_calibration(Text(source=f"builtin,{words}", samples=1), tokenize)
