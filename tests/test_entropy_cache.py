"""Profiles that are kept: what the cache tells apart, what it saves, and that it never stands in the way."""

from __future__ import annotations

import pytest
import torch
from tiny import LAYERS, tiny_model, tiny_tokens

from dicer import entropy_cache
from dicer.entropy import measure
from dicer.entropy_cache import entropy_profile
from dicer.families import family_of
from dicer.sources import from_memory
from dicer.stores import ResidentStore


def _measured(model, **choices):
    return measure(ResidentStore(model, family_of(model.config.model_type)), [tiny_tokens()], **choices)


def _profile(model, tokens=None, **choices):
    return entropy_profile(from_memory(model), model, tiny_tokens() if tokens is None else tokens, **choices)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("DICER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "entropy"


def test_a_profile_in_the_cache_is_not_measured_again(cache, monkeypatch):
    model = tiny_model("llama")
    first = _profile(model)
    assert len(list(cache.iterdir())) == 1
    assert first == _measured(model)
    monkeypatch.setattr(entropy_cache, "measure", lambda *a, **k: pytest.fail("measured again"))
    assert _profile(model) == first
    assert _profile(model, batch_size=2) == first
    assert _profile(tiny_model("llama")) == first


def test_the_batch_size_changes_nothing_but_noise(monkeypatch, tmp_path):
    found = []
    for size in (None, 4, 1):
        monkeypatch.setenv("DICER_CACHE", str(tmp_path / str(size)))
        profile = _profile(tiny_model("llama"), batch_size=size)
        found.append([entry.entropy for entries in profile.lists.values() for entry in entries])
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    assert found[2] == pytest.approx(found[0], rel=1e-6)


@pytest.mark.parametrize(
    "other",
    [
        {"search": "greedy"},
        {"at": "hidden"},
        {"tokens": tiny_tokens(seed=1)},
        {"tokens": tiny_tokens().reshape(12, 12)},
        {"seed": 1},
        {"dtype": torch.bfloat16},
    ],
)
def test_the_cache_tells_apart_what_decides_the_numbers(cache, other):
    _profile(tiny_model("llama"), lists=["blocks"])
    options = {name: other[name] for name in ("seed", "dtype") if name in other}
    choices = {name: value for name, value in other.items() if name not in options}
    _profile(tiny_model("llama", **options), lists=["blocks"], **choices)
    assert len(list(cache.iterdir())) == 2


def test_other_lists_take_what_is_there(cache, monkeypatch):
    model, ran = tiny_model("llama"), []

    def noting(*words, remember, **choices):
        return measure(*words, remember=lambda key, value: (ran.append(key), remember(key, value)), **choices)

    whole = _profile(model)
    monkeypatch.setattr(entropy_cache, "measure", noting)
    some = _profile(model, lists=["mlp"])
    assert (some.mlp, some.entropy, ran) == (whole.mlp, whole.entropy, [])
    _profile(model, lists=["mlp"], search="greedy")
    ran.clear()
    _profile(model, lists=["mlp", "attention"], search="greedy")
    assert len(ran) == sum(range(1, 2 * LAYERS + 1))  # other competitors, other rounds


@pytest.mark.parametrize("search", ["independent", "greedy"])
def test_a_killed_run_goes_on(cache, monkeypatch, search):
    model, real, seen = tiny_model("llama"), entropy_cache._write, []

    def write(name, held):
        real(name, held)
        if len(held.measured) == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(entropy_cache, "_write", write)
    with pytest.raises(KeyboardInterrupt):
        _profile(model, search=search)
    monkeypatch.setattr(entropy_cache, "_write", lambda name, held: seen.append(len(held.measured)))
    assert _profile(model, search=search) == _measured(model, search=search)
    assert seen[0] == 8


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"measured": {"mlp.0": "x"}, "profiles": {}}',
        '{"measured": {"mlp.0": NaN}, "profiles": {}}',
        '{"measured": {}, "profiles": {"mlp": {"te": 1}}}',
    ],
)
def test_an_unreadable_cache_is_replaced(cache, content):
    model = tiny_model("llama")
    first = _profile(model)
    (file,) = cache.iterdir()
    whole = file.read_text()
    file.write_text(content)
    assert _profile(model) == first
    assert file.read_text() == whole
    file.write_bytes(b"\xff")
    assert _profile(model) == first
    assert [path.name for path in cache.iterdir()] == [file.name]


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DICER_CACHE", str(tmp_path / "file"))
    model = tiny_model("llama")
    assert _profile(model) == _measured(model)
    monkeypatch.setenv("DICER_CACHE", str(tmp_path / "cache"))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(entropy_cache.Path, "replace", full)
    assert _profile(model) == _measured(model)
    assert list((tmp_path / "cache" / "entropy").iterdir()) == []
