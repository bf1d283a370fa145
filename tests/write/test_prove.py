"""The proof before a run: it holds for what is right, and refuses what is made wrong on purpose."""

from __future__ import annotations

import json

import pytest
import torch
from families.tiny import tiny_model
from tiny import save_tiny

import dicer
from dicer.errors import UnknownFamily
from dicer.model.source import from_memory
from dicer.write import surgery
from dicer.write.export.modeling_pruned import SkippedMLP
from dicer.write.prove import prove

RANDOM = {"criterion": "random", "ratio": 0.5}


@pytest.fixture
def dense(tmp_path):
    return save_tiny(tmp_path / "dense")


@pytest.fixture
def gone(tmp_path):
    """Layer 1 without its MLP."""
    (tmp_path / "gone.json").write_text(json.dumps({"mlp": {"1": 1}}))
    return dicer.Recipe(criterion="random", allocate=str(tmp_path / "gone.json"))


def test_in_the_plan(dense, gone):
    said = {proof["axis"]: proof for proof in dicer.make_plan(dense, gone).proof}
    assert said.keys() == {"mlp", "mlp whole"}
    assert all(0 <= proof["error"] < 1e-4 < proof["moved"] for proof in said.values())


@pytest.mark.parametrize("model_type", ["granite", "bert", "falcon_h1", "gemma2", "starcoder2", "glm4"])
def test_whole_sub_layers(model_type):
    source = from_memory(tiny_model(model_type))
    proofs = prove(source, [f"{axis} whole" for axis in source.family.axes])
    assert [str(proof) for proof in proofs if not proof.holds] == []


def test_sub_layer_that_adds_the_stream_itself():
    """Bloom's MLP is handed the residual stream and adds to it: what is left out must not take the stream along."""
    (proof,) = prove(from_memory(tiny_model("bloom")), ["mlp whole"])
    assert "differs from the one in which they are zero" in proof.why_not


def test_sub_layer_that_is_gone_and_adds_something(dense, gone, monkeypatch, tmp_path):
    monkeypatch.setattr(SkippedMLP, "forward", lambda _, hidden: hidden.flip(-1))
    with pytest.raises(UnknownFamily, match=r"found for mlp whole of a 'llama' does not hold: .* differs"):
        dicer.prune(dense, gone, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


FAULTS = {
    "one unit further": lambda piece, rows: rows.roll(1) if piece.is_output else rows,
    "another order": lambda piece, rows: rows if piece.is_output else rows.flip(0),
    "the first ones": lambda _, rows: torch.arange(len(rows)),
}


@pytest.mark.parametrize("axis", ["mlp", "attention"])
@pytest.mark.parametrize("fault", FAULTS)
def test_rows_taken_wrongly(dense, monkeypatch, tmp_path, fault, axis):
    cut = surgery.slice_tensor

    def wrong(tensor, piece, layer):
        rows = FAULTS[fault](piece, piece.rows(layer.keep, layer.units))
        return tensor.index_select(piece.dim, rows) if layer.merge_matrices() is None else cut(tensor, piece, layer)

    monkeypatch.setattr(surgery, "slice_tensor", wrong)
    with pytest.raises(UnknownFamily, match=f"found for {axis} of a 'llama' does not hold"):
        dicer.prune(dense, dicer.Recipe(**RANDOM, axis=axis), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
