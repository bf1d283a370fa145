"""Profiles that are kept: what the cache tells apart, what it saves, and that it never stands in the way."""

from __future__ import annotations

import pytest
import torch
from tiny import LAYERS, family_of, tiny_model, tiny_tokens

from dicer.measure.entropy import cache as entropy_cache
from dicer.measure.entropy.cache import entropy_profile
from dicer.measure.entropy.transfer import measure
from dicer.measure.stores.resident import ResidentStore
from dicer.model.source import from_memory


def _store(model):
    return ResidentStore(model, family_of(model))


def _measured(model, **choices):
    return measure(_store(model), [tiny_tokens()], **choices)


def _profile(model, tokens=None, **choices):
    return entropy_profile(from_memory(model), _store(model), tiny_tokens() if tokens is None else tokens, **choices)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("DICER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "entropy"


def test_profile_again(cache, monkeypatch):
    model = tiny_model("llama")
    first = _profile(model)
    assert len(list(cache.iterdir())) == 1
    assert first == _measured(model)
    monkeypatch.setattr(entropy_cache, "measure", lambda *a, **k: pytest.fail("measured again"))
    assert _profile(model) == first
    assert _profile(model, batch_size=2) == first
    assert _profile(tiny_model("llama")) == first


def test_batch_sizes(monkeypatch, tmp_path):
    found = []
    for size in (None, 4, 1):
        monkeypatch.setenv("DICER_CACHE", str(tmp_path / str(size)))
        profile = _profile(tiny_model("llama"), batch_size=size)
        found.append([entry.entropy for entries in profile.lists.values() for entry in entries])
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    assert found[2] == pytest.approx(found[0], rel=1e-6)


@pytest.mark.parametrize(
    ("config", "choices"),
    [
        ({}, {"search": "greedy"}),
        ({}, {"at": "hidden"}),
        ({}, {"tokens": tiny_tokens(seed=1)}),
        ({}, {"tokens": tiny_tokens().reshape(12, 12)}),
        ({"seed": 1}, {}),
    ],
)
def test_choices_apart(cache, config, choices):
    _profile(tiny_model("llama"), lists=["blocks"])
    _profile(tiny_model("llama", **config), lists=["blocks"], **choices)
    assert len(list(cache.iterdir())) == 2


def test_dtypes_of_computing_apart(cache):
    """The files, and so the fingerprint, are the same."""
    source = from_memory(tiny_model("llama"))
    for dtype in (torch.float32, torch.bfloat16):
        entropy_profile(source, _store(tiny_model("llama", dtype=dtype)), tiny_tokens(), lists=["blocks"])
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize(
    ("family", "config"), [("llama", {"rms_norm_eps": 1e-2}), ("llama", {"hidden_act": "relu"}), ("mistral", {})]
)
def test_configs_of_the_same_weights_apart(cache, family, config):
    first, other = _profile(tiny_model("llama")), _profile(tiny_model(family, **config))
    assert len(list(cache.iterdir())) == 2
    assert other == _measured(tiny_model(family, **config))
    assert other.entropy != first.entropy


def test_another_process_meanwhile(cache, monkeypatch):
    model, real = tiny_model("llama"), measure

    def meanwhile(*words, **choices):
        monkeypatch.setattr(entropy_cache, "measure", real)
        _profile(model, lists=["mlp"])
        return real(*words, **choices)

    monkeypatch.setattr(entropy_cache, "measure", meanwhile)
    _profile(model, lists=["attention"])
    monkeypatch.setattr(entropy_cache, "measure", lambda *a, **k: pytest.fail("measured again"))
    for lists in (["mlp"], ["attention"]):
        _profile(model, lists=lists)


def test_resumed_search_with_other_picks(cache):
    model, seen = tiny_model("llama"), {}
    first = _measured(model, search="greedy", lists=["mlp"], remember=seen.__setitem__)
    order = [entry.layer for entry in sorted(first.mlp, key=lambda entry: entry.pick)]
    swapped = {f"mlp.{order[0]}": seen[f"mlp.{order[1]}"], f"mlp.{order[1]}": seen[f"mlp.{order[0]}"]}
    known = seen | swapped  # as noise would have it
    again = _measured(model, search="greedy", lists=["mlp"], known=known)
    picks = {entry.pick: entry for entry in again.mlp}
    assert [picks[0].layer, picks[1].layer] == [order[1], order[0]]
    naive = tiny_model("llama")
    with torch.no_grad():
        naive.model.layers[order[1]].mlp.down_proj.weight.zero_()
    other = {entry.layer: entry.entropy for entry in _measured(naive, lists=["mlp"]).mlp}
    assert picks[1].entropy == pytest.approx(other[order[0]], rel=1e-6)


def test_other_lists(cache, monkeypatch):
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
def test_killed_run(cache, monkeypatch, search):
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
        "{}",
        '{"measured": {"mlp.0": NaN}, "profiles": {}}',
        '{"measured": {}, "profiles": {"mlp": {"te": 1}}}',
    ],
)
def test_unreadable_cache(cache, content):
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


def test_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DICER_CACHE", str(tmp_path / "file"))
    model = tiny_model("llama")
    assert _profile(model) == _measured(model)
    monkeypatch.setenv("DICER_CACHE", str(tmp_path / "cache"))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    assert _profile(model) == _measured(model)
    assert list((tmp_path / "cache" / "entropy").iterdir()) == []
