"""Ready rows with masks and of any length: the same sums as each row alone in the stock model, without padding."""

from __future__ import annotations

import json
import re

import pytest
import torch
from texts import jsonl
from tiny import PLACES, VOCABULARY, family_of, save_tiny, tiny_model

import dicer
from dicer.ask.text import Text
from dicer.errors import CalibrationError
from dicer.measure.batches import own_batches
from dicer.measure.entropy.transfer import measure
from dicer.measure.statistics import Need
from dicer.measure.stores.resident import ResidentStore
from dicer.measure.text import load_calibration
from dicer.measure.walk import walk
from dicer.model.source import open_model

FAMILIES = ("llama", "gemma2", "gpt2", "opt", "mistral", "qwen2", "gemma3_text", "phi3")
LENGTHS = (24, 3, 17, 24, 9, 17, 24)  # sliding windows are 8 long
NEEDS = [
    *(
        Need(kind, "mod", axis)
        for kind in ("square_sum", "sum", "channel_sum", "gram")
        for axis in ("mlp", "attention")
    ),
    Need("square_sum", "post", "mlp"),
    Need("sum", "pre", "mlp"),
]


def ids(length, seed):
    return torch.randint(4, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


ROWS = [ids(length, number) for number, length in enumerate(LENGTHS)]


def padded(rows, side, width=26, counted=None):
    """Rows as data collators write them."""
    found = []
    for number, row in enumerate(rows):
        gap, ones = [0] * (width - len(row)), [1] * len(row)
        made = {"input_ids": gap + row, "attention_mask": gap + ones} if side == "left" else {}
        made = made or {"input_ids": row + gap, "attention_mask": ones + gap}
        if counted is not None:
            labels = [token if kept else -100 for token, kept in zip(row, counted[number], strict=True)]
            hole = [-100] * len(gap)
            made["labels"] = hole + labels if side == "left" else labels + hole
        found.append(made)
    return found


def shown(tmp_path, rows):
    return load_calibration(Text(calib=str(jsonl(tmp_path / "rows.jsonl", rows))), None)


COUNTED = [[(i * 7 + number) % 3 > 0 for i in range(length)] for number, length in enumerate(LENGTHS)]


def plainly(model, family, counted):
    """What goes into the output projections of layer 2, row by row through the stock forward."""
    layers, *outputs = PLACES[family]
    found = {"attention": [], "mlp": []}
    layer = model.get_submodule(f"{layers}.2")
    hooks = [
        layer.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, kept=kept: kept.append(inputs[0].reshape(-1, inputs[0].shape[-1]).double())
        )
        for name, kept in zip(outputs, found.values(), strict=True)
    ]
    states = []
    with torch.no_grad():
        for row in ROWS:
            states.append(model(input_ids=torch.tensor([row]), output_hidden_states=True).hidden_states[-1][0].double())
    for hook in hooks:
        hook.remove()
    keep = torch.tensor([kept for row in counted for kept in row])
    return {name: torch.cat(values)[keep] for name, values in found.items()}, torch.cat(states)[keep]


@pytest.mark.parametrize("side", ["ragged", "right", "left", "labels"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sums_of_each_row_alone(tmp_path, family, side):
    model = tiny_model(family)
    counted = COUNTED if side == "labels" else [[True] * length for length in LENGTHS]
    rows = [{"input_ids": row} for row in ROWS]
    if side != "ragged":
        rows = padded(ROWS, "left" if side == "left" else "right", counted=COUNTED if side == "labels" else None)
    calibration = shown(tmp_path, rows)
    batches = own_batches(calibration.tokens, 2, mask=calibration.mask)
    assert sorted(map(tuple, (batch.shape for batch in batches))) == [(1, 3), (1, 9), (1, 24), (2, 17), (2, 24)]
    store = ResidentStore(model, family_of(model))
    plain, final = plainly(model, family, counted)
    for visit in walk(store, [2], batches, axes=("mlp", "attention"), needs=NEEDS):
        values = plain[visit.place.axis]
        assert visit.sums.count == len(values) == sum(map(sum, counted))
        units = values.reshape(len(values), visit.weights.units, -1)
        expected = {
            "square_sum": units.square().sum((0, 2)),
            "sum": units.sum((0, 2)),
            "channel_sum": values.sum(0),
            "gram": torch.einsum("tuc,tvc->uv", units, units),
        }
        for kind, value in expected.items():
            torch.testing.assert_close(visit.sums.get(kind, "mod").double(), value, rtol=1e-4, atol=1e-3)
    profile = measure(store, batches, lists=["blocks"])
    assert profile.tokens == len(final)
    entropy = float(final.std(0, correction=0).log().sum())
    assert profile.entropy == pytest.approx(entropy, abs=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt"])
def test_gradients_of_each_row_alone(tmp_path, family, checkpointing):
    model = tiny_model(family)
    calibration = shown(tmp_path, padded(ROWS, "right", counted=COUNTED))
    batches = own_batches(calibration.tokens, mask=calibration.mask)
    store = ResidentStore(model, family_of(model))
    found = store.gradients(batches, [1], ["mlp"], checkpointing=checkpointing, progress=lambda *_: None)
    losses = torch.zeros(())
    for row, kept in zip(ROWS, COUNTED, strict=True):
        tokens = torch.tensor([row])
        labels = tokens.masked_fill(~torch.tensor([kept]), -100)
        losses = losses + torch.nn.functional.cross_entropy(
            model(input_ids=tokens).logits[0, :-1], labels[0, 1:], reduction="sum"
        )
    (losses / sum(sum(kept[1:]) for kept in COUNTED)).backward()
    layers, _, output = PLACES[family]
    expected = model.get_parameter(f"{layers}.1.{output}.weight").grad
    down = found[1]["mlp"].down
    torch.testing.assert_close(down, expected.T if family == "gpt2" else expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["rc-a", "taylor", "let-llm", "sim-mean"])
def test_plans_whatever_the_padding(tmp_path, method, own_cache):
    model, plans = save_tiny(tmp_path / "model"), []
    for name, rows in (
        ("ragged", [{"input_ids": row} for row in ROWS]),
        ("left", padded(ROWS, "left")),
        ("right", padded(ROWS, "right", width=40)),
        (
            "noise",
            [row | {"input_ids": [5 if i == 0 else i for i in row["input_ids"]]} for row in padded(ROWS, "left")],
        ),
        ("beyond", [row | {"input_ids": [i or 999 for i in row["input_ids"]]} for row in padded(ROWS, "right")]),
    ):
        recipe = dicer.Recipe(method=method, calib=str(jsonl(tmp_path / f"{name}.jsonl", rows)))
        plans.append(dicer.make_plan(model, recipe))
    assert [plans[0].diff(plan) for plan in plans[1:]] == [[]] * 4
    full = dicer.make_plan(
        model,
        dicer.Recipe(method=method, calib=str(jsonl(tmp_path / "all.jsonl", padded(ROWS, "right", counted=COUNTED)))),
    )
    assert full.calibration["mask_sha256"] != plans[0].calibration["mask_sha256"]


def test_ones_alone_are_no_mask(tmp_path):
    """What tokenizers write of rows of one length: nothing changes, to the last bit."""
    plain = shown(tmp_path, [{"input_ids": ids(9, n)} for n in range(4)])
    masked = shown(
        tmp_path, [{"input_ids": ids(9, n), "attention_mask": [1] * 9, "labels": ids(9, n)} for n in range(4)]
    )
    assert (plain.provenance, plain.notes, plain.mask) == (masked.provenance, masked.notes, None)


def test_notes(tmp_path):
    rows = padded(ROWS, "right", counted=COUNTED)
    for row in rows:
        row |= {"offset_mapping": [[0, 1]], "id": "a"}
    context = sum(LENGTHS) - sum(map(sum, COUNTED))
    assert shown(tmp_path, rows).notes == (
        "7 ready samples of 3 to 24 tokens are used as they are",
        f"{context} of their tokens are seen by others and count in no sum, as labels or a loss mask say",
        "of ready samples the fields offset_mapping are not read",
    )


FIVE = [5, 6, 7, 8, 9]


@pytest.mark.parametrize("name", ["loss_mask", "assistant_masks", "completion_mask"])
def test_masks_of_the_loss(tmp_path, name):
    found = shown(tmp_path, [{"input_ids": FIVE, name: [0, 0, 1, 1, 0], "labels": [-100, -100, -100, 8, 9]}])
    assert found.mask.tolist() == [[1, 1, 1, 2, 1]]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"attention_mask": [1, 1]}, "attention_mask must be a list of 0 and 1, as long as input_ids (5)"),
        ({"attention_mask": [1, 1, 2, 1, 1]}, "attention_mask must be a list of 0 and 1"),
        ({"attention_mask": [[1] * 5] * 5}, "attention_mask must be a list of 0 and 1"),
        ({"attention_mask": [1, 0, 1, 1, 1]}, "attention_mask has a hole"),
        ({"attention_mask": [0] * 5}, "every token is masked"),
        ({"attention_mask": [0, 0, 1, 0, 0]}, "rows of one token are too short"),
        ({"labels": [-100] * 5}, "every token is masked"),
        ({"labels": [6, 7, 8, 9, 5]}, "labels must be input_ids, or -100"),
        ({"labels": 1}, "labels must be a list as long as input_ids (5)"),
        ({"labels": [5, 6]}, "labels must be a list as long as input_ids (5)"),
        ({"loss_mask": [0] * 5}, "every token is masked"),
        ({"position_ids": [0, 1, 0, 1, 2]}, "position_ids are not 0, 1, 2"),
        ({"token_type_ids": [0, 0, 1, 1, 1]}, "token_type_ids tell kinds of tokens apart"),
        ({"seq_lengths": [2, 3]}, "seq_lengths says that the row is several texts in one"),
        ({"segment_ids": [0, 0, 1, 1, 1]}, "segment_ids says that the row is several texts in one"),
    ],
)
def test_what_cannot_be_honoured(tmp_path, more, says):
    with pytest.raises(CalibrationError, match=f"row 2: .*{re.escape(says)}") as caught:
        shown(tmp_path, [{"input_ids": FIVE}, {"input_ids": FIVE, **more}])
    assert "\n" not in str(caught.value)


def test_fields_that_say_nothing_new(tmp_path):
    more = {"attention_mask": [0, 1, 1, 1, 1], "position_ids": [1, 0, 1, 2, 3], "token_type_ids": [0] * 5}
    assert shown(tmp_path, [{"input_ids": FIVE, **more, "seq_lengths": [5]}]).tokens.tolist() == [FIVE[1:]]


def test_longest_row_and_learned_positions(tmp_path):
    model = save_tiny(tmp_path / "model", "gpt2")
    rows = jsonl(tmp_path / "rows.jsonl", padded([ids(100, 0)], "left", width=200))
    assert dicer.make_plan(model, dicer.Recipe(calib=str(rows))).calibration["seq_len"] == 100
    assert json.loads(rows.read_text())["input_ids"][0] == 0
    assert open_model(model).config.max_position_embeddings == 128


@pytest.mark.parametrize("side", ["left", "right"])
def test_first_tokens_skipped(tmp_path, side):
    """The same as rows whose labels leave them out, whatever else they leave out; documents and mixtures too."""
    path = jsonl(tmp_path / "rows.jsonl", padded(ROWS, side, counted=COUNTED))
    asked = load_calibration(Text(calib=str(path), skip_first=1), None)
    counted = [[kept and i > 0 for i, kept in enumerate(row)] for row in COUNTED]
    by_hand = shown(tmp_path, padded(ROWS, side, counted=counted))
    assert asked.same_tokens(by_hand)
    assert asked.provenance == {**by_hand.provenance, "skip_first": 1}
    assert asked.notes[-1] == "the first token of each sample: seen by the others, counted in no sum"
    several = load_calibration(Text(calib=f"{path},{path}", samples=2, skip_first=1), None)
    assert torch.equal(several.mask, torch.cat([asked.mask, asked.mask]))


def test_first_tokens_of_texts_skipped(tmp_path):
    model = save_tiny(tmp_path / "model", "llama")
    rows = jsonl(tmp_path / "rows.jsonl", [{"input_ids": row[:9]} for row in ROWS if len(row) > 9])
    plans = [
        dicer.prune(model, dicer.Recipe(method="act-l2", calib=str(rows), **more)).plan
        for more in ({}, {"skip_first": 1})
    ]
    assert [plan.recipe.get("skip_first") for plan in plans] == [None, 1]
    with torch.no_grad():
        tokens = torch.tensor([row[:9] for row in ROWS if len(row) > 9])
        seen, loaded = [], tiny_model("llama")
        loaded.model.layers[0].mlp.act_fn.register_forward_hook(lambda *given: seen.append(given[-1].double()))
        loaded(input_ids=tokens)
    expected = seen[0][:, 1:].flatten(0, 1).square().sum(0).sqrt()
    torch.testing.assert_close(plans[1].mlp[0].scores.double(), expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(plans[0].mlp[0].scores, plans[1].mlp[0].scores)


@pytest.mark.parametrize("count", [3, 30])
def test_nothing_left_but_skipped(tmp_path, count):
    path = jsonl(tmp_path / "rows.jsonl", [{"input_ids": row} for row in ROWS])
    with pytest.raises(CalibrationError, match=f"--skip-first {count} leaves nothing to measure of samples"):
        load_calibration(Text(calib=str(path), skip_first=count), None)
