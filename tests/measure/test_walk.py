"""The walk: sums of heads' outputs as plain hooks see them, both axes at once, and gradients."""

from __future__ import annotations

import pytest
import torch
from heads import CASES, HEADS, SIZE, by_unit, heads_outputs, make
from tiny import LAYERS, NEURONS, family_of, tiny_model, tiny_tokens

from dicer.measure import statistics
from dicer.measure.statistics import Need, Sums
from dicer.measure.stores.resident import ResidentStore
from dicer.measure.walk import walk
from dicer.model.units import SubLayer

KINDS = ("square_sum", "sum", "gram", "channel_sum", "channel_square_sum", "channel_gram")


def store_of(model):
    return ResidentStore(model, family_of(model))


@pytest.mark.parametrize(("family", "groups"), CASES)
def test_heads_of_plain_hooks(family, groups):
    model, batches = make(family, groups), tiny_tokens().split(4)
    needs = {Need(kind, "mod", "attention") for kind in KINDS}
    visits = walk(store_of(model), range(LAYERS), batches, axes=("attention",), needs=needs)
    for index, (visit, values) in enumerate(zip(visits, heads_outputs(model, family, batches), strict=True)):
        assert visit.place == SubLayer(index, "attention")
        units = by_unit(values, groups)
        naive = {
            "square_sum": [sum(float((unit[:, c] ** 2).sum()) for c in range(unit.shape[1])) for unit in units],
            "sum": [sum(float(unit[:, c].sum()) for c in range(unit.shape[1])) for unit in units],
            "gram": [[float((a * b).sum()) for b in units] for a in units],
            "channel_sum": [float(values[:, c].sum()) for c in range(HEADS * SIZE)],
            "channel_square_sum": [float((values[:, c] ** 2).sum()) for c in range(HEADS * SIZE)],
            "channel_gram": [[float((a * b).sum()) for b in values.T] for a in values.T],
        }
        assert visit.sums.count == len(values) == 6 * 24
        for kind, expected in naive.items():
            wanted = torch.tensor(expected, dtype=torch.float64)
            found = visit.sums.get(kind, "mod").double()
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(values.norm()))


@pytest.mark.parametrize(("most", "dtype", "digits"), [(12_000, torch.float64, 1e-12), (500, torch.float32, 1e-5)])
def test_gram_matrix_in_blocks(most, dtype, digits, monkeypatch):
    """Of 600 inputs, in three blocks, over batches and a mask; read once before the last of them."""
    monkeypatch.setattr(statistics, "GRAM_FLOAT64", most)
    values = torch.randn(3, 4, 50, 600, generator=torch.Generator().manual_seed(0))
    counted = torch.rand(3, 4, 50, generator=torch.Generator().manual_seed(1)) < 0.7
    sums = Sums({Need("channel_gram", "mod")})
    for batch, mask in zip(values, counted, strict=True):
        sums.begin(mask)
        sums.add("mod", batch)
        found = sums.get("channel_gram", "mod")
    flat = values[counted].double()
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), flat.T @ flat, rtol=0, atol=digits * float((flat**2).sum(0).max()))


def test_both_axes_at_once():
    model, batches = make("llama", 2), tiny_tokens().split(4)
    needs = {Need("square_sum", "mod", axis) for axis in ("attention", "mlp")}
    both = walk(store_of(model), [2], batches, axes=("mlp", "attention"), needs=needs)
    found = {visit.place: visit.sums.get("square_sum", "mod") for visit in both}
    assert list(found) == [SubLayer(2, "attention"), SubLayer(2, "mlp")]  # as the model runs
    for place, units in zip(found, (2, NEURONS), strict=True):
        needs = {Need("square_sum", "mod", place.axis)}
        (alone,) = walk(store_of(model), [2], batches, axes=(place.axis,), needs=needs)
        assert torch.equal(alone.sums.get("square_sum", "mod"), found[place])
        assert len(found[place]) == units


def test_gradients_of_bfloat16_in_float32():
    model = tiny_model("llama", dtype=torch.bfloat16)
    batches, predicted = tiny_tokens().split(1), tiny_tokens()[:, 1:].numel()
    expected = torch.zeros(NEURONS, 32)
    for batch in batches:
        model.zero_grad()
        logits = model(input_ids=batch).logits[0, :-1].float()
        torch.nn.functional.cross_entropy(logits, batch[0, 1:], reduction="sum").backward()
        expected += model.model.layers[1].mlp.gate_proj.weight.grad.float() / predicted
    model.zero_grad()
    (visit,) = walk(store_of(model), [1], batches, gradient=True)
    gradient = visit.gradient
    assert {part.dtype for part in (gradient.gate, gradient.up, gradient.down)} == {torch.float32}
    torch.testing.assert_close(gradient.gate, expected, rtol=1e-6, atol=0)
    assert not torch.equal(expected, expected.bfloat16().float()), "more than bf16 can hold"


def test_memory_of_checkpointing():
    sizes = []
    for checkpointing in (False, True):
        stored = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=stored: (to.append(t.numel()), t)[1], lambda t: t):
            options = {"gradient": True, "checkpointing": checkpointing}
            list(walk(store_of(tiny_model("llama")), [1], [tiny_tokens()], **options))
        sizes.append(sum(stored))
    assert sizes[1] < sizes[0]
