"""Transfer entropy against stock forwards with hooks, and what it costs."""

from __future__ import annotations

from operator import attrgetter

import numpy as np
import pytest
import torch
from tiny import FAMILIES, LAYERS, family_of, tiny_model, tiny_tokens

from dicer.errors import CalibrationError, RecipeError
from dicer.measure.entropy.profile import LISTS
from dicer.measure.entropy.transfer import layer_forwards, measure
from dicer.measure.stores.resident import ResidentStore

ATTENTION = {"gpt2": "attn"}
MLP = {"opt": "fc2"}
KINDS = {"blocks": "block", "attention": "attention", "mlp": "mlp"}
both_searches = pytest.mark.parametrize("search", ["independent", "greedy"])


def _store(model):
    return ResidentStore(model, family_of(model))


def _layers(model):
    return attrgetter(family_of(model).layers)(model)


def _hook(model, kind, index):
    """Zero a residual branch by a hook on the stock model, which computes it all the same."""
    family, layer = model.config.model_type, _layers(model)[index]
    if kind == "block":
        return layer.register_forward_hook(lambda _, inputs, output: inputs[0])
    if kind == "attention":
        module = getattr(layer, ATTENTION.get(family, "self_attn"))
        return module.register_forward_hook(lambda _, inputs, output: (torch.zeros_like(output[0]), *output[1:]))
    return getattr(layer, MLP.get(family, "mlp")).register_forward_hook(lambda *a: torch.zeros_like(a[2]))


def naive_entropy(model, tokens, at, bypassed=()):
    """H(F) by the formula, from one stock forward of all tokens together."""
    before = []
    hooks = [_hook(model, *part) for part in bypassed]  # first, so that the next one sees what they leave
    hooks.append(_layers(model)[-1].register_forward_hook(lambda *a: before.append(a[2])))
    with torch.no_grad():
        after = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    for hook in hooks:
        hook.remove()
    values = (after if at == "norm" else before[0]).double().numpy().reshape(tokens.numel(), -1)
    return np.log(np.sqrt(np.mean((values - values.mean(0)) ** 2, 0))).sum()


def _values(profile):
    """(list, layer) -> te."""
    return {(name, entry.layer): entry.te for name, entries in profile.lists.items() for entry in entries}


def _naive(model, tokens, at):
    whole = naive_entropy(model, tokens, at)
    return whole, {
        (name, layer): abs(whole - naive_entropy(model, tokens, at, [(KINDS[name], layer)]))
        for name in LISTS
        for layer in range(len(_layers(model)))
    }


def plant(model, index):
    """Let a llama's layer add nothing, though it is computed."""
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            for parameter in _layers(model)[index].get_submodule(name).parameters():
                parameter.zero_()
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_forwards_with_hooks(family):
    model, tokens = tiny_model(family), tiny_tokens(7)
    sizes = {"norm": (7, 4, 3), "hidden": (3,)} if family in ("llama", "opt") else {"norm": (3,)}
    for at, each in sizes.items():
        whole, expected = _naive(model, tokens, at)
        for size in each:  # a whole batch, and last ones of three rows and of one
            profile = measure(_store(model), tokens.split(size), at=at)
            assert profile.entropy == pytest.approx(whole, rel=1e-5)
            # A difference of two entropies has the rounding of both: float32 in the model, whatever is summed after it.
            assert _values(profile) == pytest.approx(expected, rel=1e-4, abs=1e-6 * abs(whole))
            assert (profile.tokens, profile.channels) == (tokens.numel(), model.config.hidden_size)
            for entries in profile.lists.values():
                assert all(entry.te == abs(profile.entropy - entry.entropy) for entry in entries)


def test_float64():
    model, tokens = tiny_model("llama", dtype=torch.float64), tiny_tokens(7)
    whole, expected = _naive(model, tokens, "norm")
    profile = measure(_store(model), tokens.split(3))
    assert profile.entropy == pytest.approx(whole, rel=1e-7)
    assert _values(profile) == pytest.approx(expected, rel=1e-5)


def test_no_final_norm():
    model, tokens = tiny_model("opt", do_layer_norm_before=False), tiny_tokens(4)
    norm, hidden = (measure(_store(model), tokens.split(3), at=at) for at in ("norm", "hidden"))
    assert _values(norm) == _values(hidden)
    assert _values(norm) == pytest.approx(_naive(model, tokens, "norm")[1], rel=1e-4, abs=1e-4)


@both_searches
def test_block_that_adds_nothing(search):
    model = plant(tiny_model("llama"), 2)
    profile = measure(_store(model), tiny_tokens().split(4), search=search)
    assert [entries[2].te for entries in profile.lists.values()] == [0.0, 0.0, 0.0]
    assert all(te > 0 for (_, layer), te in _values(profile).items() if layer != 2)
    if search == "greedy":
        assert [profile.blocks[2].pick, profile.attention[2].pick, profile.mlp[2].pick] == [0, 0, 1]


def test_ties():
    profile = measure(_store(plant(plant(tiny_model("llama"), 3), 1)), tiny_tokens().split(4), search="greedy")
    assert [profile.blocks[i].pick for i in (1, 3)] == [0, 1]
    assert [entries[i].pick for i in (1, 3) for entries in (profile.attention, profile.mlp)] == [0, 1, 2, 3]


def _naive_greedy(model, tokens, rest):
    """part -> (pick, te)."""
    whole, picked, found = naive_entropy(model, tokens, "norm"), [], {}
    while rest:
        te = {part: abs(whole - naive_entropy(model, tokens, "norm", [*picked, part])) for part in rest}
        best = min(rest, key=lambda part: (te[part], part[1], part[0]))
        found[best] = (len(picked), te[best])
        picked.append(best)
        rest = [part for part in rest if part != best]
    return found


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_greedy_loop(family):
    model, tokens = tiny_model(family), tiny_tokens(5)
    profile = measure(_store(model), tokens.split(2), search="greedy")
    blocks = _naive_greedy(model, tokens, [("block", i) for i in range(LAYERS)])
    inside = _naive_greedy(model, tokens, [(kind, i) for i in range(LAYERS) for kind in ("attention", "mlp")])
    for entries, kind, expected in (
        (profile.blocks, "block", blocks),
        (profile.attention, "attention", inside),
        (profile.mlp, "mlp", inside),
    ):
        for entry in entries:
            pick, te = expected[kind, entry.layer]
            assert entry.pick == pick
            assert entry.te == pytest.approx(te, rel=1e-4, abs=1e-4)
    only = measure(_store(model), tokens.split(2), search="greedy", lists=["mlp"])
    alone = _naive_greedy(model, tokens, [("mlp", i) for i in range(LAYERS)])
    assert [entry.pick for entry in only.mlp] == [alone["mlp", i][0] for i in range(LAYERS)]


class _Counting(ResidentStore):
    """Counts calls of layers; those that only record what a layer is called with do not count."""

    def __init__(self, model):
        super().__init__(model, family_of(model))
        self.calls = 0
        for layer in self._layers:
            layer.register_forward_hook(self._called)

    def _called(self, *_):
        self.calls += 1

    def record(self, batches):
        recording = super().record(batches)
        self.calls = 0
        return recording


@pytest.mark.parametrize("lists", [LISTS, ("blocks",), ("attention",), ("mlp", "blocks")])
@both_searches
@pytest.mark.parametrize("layers", [1, 5])
def test_count_of_layer_forwards(lists, search, layers):
    store, told = _Counting(tiny_model("llama", num_hidden_layers=layers)), []
    profile = measure(store, tiny_tokens().split(4), lists=lists, search=search, progress=lambda *a: told.append(a))
    picks = None
    if search == "greedy":
        picks = [e.layer for e in sorted(profile.attention + profile.mlp, key=lambda entry: entry.pick)]
    exact, most = layer_forwards(layers, lists, search, picks), layer_forwards(layers, lists, search)
    assert store.calls == exact * 2  # two batches
    assert exact <= most
    assert told[0] == ("transfer entropy (layer forwards)", 0, most)
    assert told[-1] == ("transfer entropy (layer forwards)", exact, exact)
    dones = [done for _, done, _ in told]
    assert dones == sorted(dones)


def test_most_layer_forwards():
    late = [3, 3, 2, 2, 1, 1, 0, 0]
    most = layer_forwards(4, ["attention", "mlp"], "greedy")
    assert layer_forwards(4, ["attention", "mlp"], "greedy", late) == most
    generator = np.random.default_rng(0)
    assert all(
        layer_forwards(4, ["attention", "mlp"], "greedy", generator.permutation(late)) <= most for _ in range(200)
    )


def test_closed_form():
    assert layer_forwards(30) == 30 + 30 * 29 // 2 + 2 * 30 * 31 // 2
    assert layer_forwards(30, ["blocks"], "greedy") == 1 + sum(n * (n - 1) // 2 + n - 1 for n in range(1, 31))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_bypassed_modules(family):
    model, calls = tiny_model(family), []
    names = {"gpt2": ("attn.c_proj", "mlp.c_proj"), "opt": ("self_attn.out_proj", "fc1")}
    for name in names.get(family, ("self_attn.o_proj", "mlp.down_proj")):
        module = _layers(model)[-1].get_submodule(name)
        module.forward = lambda values, name=name, own=module.forward: (calls.append(name), own(values))[1]
    before = model.base_model(input_ids=tiny_tokens()).last_hidden_state
    calls.clear()
    measure(_store(model), [tiny_tokens()], lists=["attention", "mlp"])
    # Once for the model itself and once for every sub-layer but this one.
    assert [calls.count(name) for name in sorted(set(calls))] == [1 + 2 * LAYERS - 1] * 2
    assert torch.equal(model.base_model(input_ids=tiny_tokens()).last_hidden_state, before)
    assert sum("forward" in module.__dict__ for module in model.modules()) == 2  # those of this test


def test_training_mode():
    model = tiny_model("gpt2", resid_pdrop=0.5, attn_pdrop=0.5)
    quiet = measure(_store(model), [tiny_tokens()])
    assert measure(_store(model.train()), [tiny_tokens()]) == quiet
    assert all(module.training for module in model.modules())


def test_constant_channels():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight[:3] = 0
    profile = measure(_store(model), tiny_tokens().split(4))
    assert np.isfinite([profile.entropy, *_values(profile).values()]).all()
    assert profile.notes == ("3 of 32 channels of the final state are constant over all tokens",)


def test_few_tokens():
    profile = measure(_store(tiny_model("llama")), [tiny_tokens(1, 31)])
    (note,) = profile.notes
    assert note == "31 calibration tokens for 32 channels: the entropy estimate is poor; use at least 32"
    assert measure(_store(tiny_model("llama")), [tiny_tokens(1, 32)]).notes == ()


def test_values_not_finite():
    model = tiny_model("llama")
    with torch.no_grad():
        _layers(model)[2].mlp.down_proj.weight[0] = float("inf")
    with pytest.raises(RecipeError, match=r"with attention.0 bypassed, layer 2 .* NaN or .*--dtype float32") as caught:
        measure(_store(model), [tiny_tokens()])
    assert "\n" not in str(caught.value)
    known = {f"mlp.{i}": 1.0 for i in (0, 1, 3)}  # without the second one all is well
    with pytest.raises(RecipeError, match=r"with nothing bypassed, layer 2 "):
        measure(_store(model), [tiny_tokens()], known=known, lists=["mlp"])


@pytest.mark.parametrize(
    ("choices", "says"),
    [
        ({"search": "gredy"}, "Did you mean 'greedy'?"),
        ({"at": "nrm"}, "Did you mean 'norm'?"),
        ({"lists": ["mlps"]}, "unknown list 'mlps'. Did you mean 'mlp'?"),
        ({"lists": []}, "nothing to measure"),
    ],
)
def test_unknown_choices(choices, says):
    with pytest.raises(RecipeError, match=r".") as caught:
        measure(_store(tiny_model("llama")), [tiny_tokens()], **choices)
    assert says in str(caught.value)


def test_no_tokens():
    with pytest.raises(CalibrationError, match="no calibration tokens"):
        measure(_store(tiny_model("llama")), [])


@both_searches
def test_chosen_lists(search):
    store, batches = _store(tiny_model("llama")), tiny_tokens().split(4)
    whole = measure(store, batches, search=search)
    assert measure(store, batches, search=search) == whole  # the same bits
    some = measure(store, batches, search=search, lists=["mlp", "attention", "mlp"])
    assert (some.blocks, some.attention, some.mlp) == ((), whole.attention, whole.mlp)
    assert list(some.to_json()) == ["entropy", "search", "at", "tokens", "channels", "attention", "mlp", "notes"]


@both_searches
@pytest.mark.parametrize("after", [1, 11])
def test_known_values(search, after):
    model, batches = tiny_model("llama"), tiny_tokens().split(4)
    known, whole, later, told = {}, {}, {}, []

    def remember(key, value):
        known[key] = value
        if len(known) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(_store(model), batches, search=search, remember=remember)
    store = _Counting(model)
    expected = measure(store, batches, search=search, remember=whole.__setitem__)
    calls = store.calls
    choices = {"search": search, "known": known, "remember": later.__setitem__}
    assert measure(store, batches, **choices, progress=lambda *a: told.append(a)) == expected
    assert {**known, **later} == whole
    assert not known.keys() & later.keys()
    assert store.calls < calls
    assert told[-1][1] == calls // 2  # what was saved counts as done
