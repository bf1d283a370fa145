"""What tokens do in experts, against loops written from the formulas; and who goes first in a planted model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families.sizes import EXPERTS
from families.tiny import tiny_input, tiny_model
from torch import Tensor

from dicer.ask.recipe import Recipe
from dicer.decide.decide import score
from dicer.decide.plan import PrunePlan
from dicer.decide.task import prepare, with_text
from dicer.errors import ModelError, RecipeError
from dicer.measure.statistics import Need
from dicer.measure.stores.resident import ResidentStore
from dicer.measure.text import Calibration
from dicer.measure.walk import Visit, walk
from dicer.model.source import from_memory


def visits(model: Any, needs: list[Need], **more: Any) -> dict[str, Visit]:
    """Every sub-layer of experts by its key, after two batches."""
    family = from_memory(model).family
    axes = [name for name, axis in family.axes.items() if axis.routed]
    batches = [*tiny_input(4).split(2)]
    seen = walk(ResidentStore(model, family), range(4), batches, axes=axes, needs=needs, **more)
    return {visit.place.key: visit for visit in seen}


def plan(model: Any, samples: int = 4, **asked: Any) -> PrunePlan:
    source = from_memory(model)
    known = Calibration(tiny_input(samples), {"source": "a test"})
    task = with_text(prepare(source, Recipe(**asked)), read=lambda _: known)
    return score([task], ResidentStore(model, source.family))[0]


class Naive:
    """Mixtral's experts of one layer, token by token."""

    def __init__(self, model: Any, layer: int) -> None:
        found: list[Tensor] = []
        block = model.model.layers[layer].mlp
        handle = block.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].reshape(-1, 48)))
        with torch.no_grad():
            model(input_ids=tiny_input(4), use_cache=False)
        handle.remove()
        self.rows, self.block = torch.cat(found), block
        self.chosen = []
        for row in self.rows:
            odds = torch.softmax(block.gate.weight @ row, 0).tolist()
            best = sorted(range(EXPERTS), key=lambda e: -odds[e])[:2]
            self.chosen.append({e: odds[e] / sum(odds[b] for b in best) for e in best})

    def neurons(self, expert: int, row: Tensor) -> Tensor:
        gate, up = (self.block.experts.gate_up_proj[expert] @ row).chunk(2)
        return gate * torch.sigmoid(gate) * up

    def output(self, expert: int, row: Tensor) -> Tensor:
        return self.block.experts.down_proj[expert] @ self.neurons(expert, row)

    def tokens(self, expert: int) -> list[tuple[Tensor, float]]:
        return [(row, own[expert]) for row, own in zip(self.rows, self.chosen, strict=True) if expert in own]


@pytest.fixture(scope="module")
def mixtral() -> Any:
    return tiny_model("mixtral")


@torch.no_grad()
def test_reap(mixtral: Any) -> None:
    scores = plan(mixtral, axis="experts", criterion="reap").axes["experts"][1].scores

    naive = Naive(mixtral, 1)
    for expert in range(EXPERTS):
        norms = [weight * float(naive.output(expert, row).norm()) for row, weight in naive.tokens(expert)]
        expected = sum(norms) / len(norms) if norms else 0.0
        assert float(scores[expert]) == pytest.approx(expected, rel=1e-4)


def test_frequency(mixtral: Any) -> None:
    scores = plan(mixtral, axis="experts", criterion="frequency").axes["experts"][1].scores

    naive = Naive(mixtral, 1)
    assert scores.tolist() == pytest.approx([len(naive.tokens(e)) / 64 for e in range(EXPERTS)])


@torch.no_grad()
def test_sums(mixtral: Any) -> None:
    axes = ["experts", *(f"mlp.expert{e}" for e in range(EXPERTS))]
    found = visits(mixtral, [Need(kind, "mod", axis) for axis in axes for kind in ("square_sum", "sum", "gram")])

    naive = Naive(mixtral, 1)
    outputs = [torch.cat([naive.output(e, row) for row in naive.rows]) for e in range(EXPERTS)]
    whole = found["experts.1"]
    torch.testing.assert_close(
        whole.sums.get("gram", "mod"), torch.stack(outputs) @ torch.stack(outputs).T, rtol=1e-4, atol=1e-3
    )
    for expert in range(EXPERTS):
        acts = torch.stack([naive.neurons(expert, row) for row, _ in naive.tokens(expert)])
        own = found[f"mlp.expert{expert}.1"].sums
        assert own.count == len(acts)
        torch.testing.assert_close(own.get("square_sum", "mod").float(), acts.square().sum(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(own.get("gram", "mod"), acts.T @ acts, rtol=1e-4, atol=1e-5)
        assert float(whole.sums.get("square_sum", "mod")[expert]) == pytest.approx(float(acts.square().sum()), rel=1e-4)
        assert float(whole.sums.get("sum", "mod")[expert]) == pytest.approx(float(acts.sum()), rel=1e-3)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "llama4_text", "nemotron_h"])
def test_weights(model_type: str) -> None:
    model = tiny_model(model_type)
    source = from_memory(model)
    found = visits(model, [], gradient=True)
    layer = next(i for i, count in enumerate(source.family.counts["experts"]) if count)

    whole = found[f"experts.{layer}"].weights
    for expert in range(EXPERTS):
        own = found[f"mlp.expert{expert}.{layer}"]
        of_one = torch.cat([part.flatten() for part in (own.weights.gate, own.weights.up) if part is not None])
        assert torch.equal(of_one.sort().values, whole.up[expert].sort().values)
        assert torch.equal(own.weights.down.flatten().sort().values, whole.down[:, expert].sort().values)
        assert own.gradient is not None
        assert own.gradient.down.shape == own.weights.down.shape
        written = {piece.roles: piece for piece in source.family.axes[f"mlp.expert{expert}"].slices}
        piece = written["down",]
        tensor = source.tensors.read(source.family.tensor_name(layer, piece.name))
        tensor = tensor if piece.expert is None else tensor[piece.expert]
        down = tensor if piece.dim - (piece.expert is not None) == 1 else tensor.T
        assert torch.equal(down, own.weights.down)


def planted() -> Any:
    """Experts 2 and 5 are never chosen, and 1 and 6 are copies."""
    model = tiny_model("deepseek_v3")
    with torch.no_grad():
        for layer in (layer for layer in model.model.layers if hasattr(layer.mlp, "experts")):
            gate, experts = layer.mlp.gate, layer.mlp.experts
            gate.e_score_correction_bias.zero_()[[2, 5]] = -100.0
            for tensor in (gate.weight, gate.e_score_correction_bias, experts.gate_up_proj, experts.down_proj):
                tensor[6] = tensor[1]
    return model


@pytest.mark.parametrize("criterion", ["reap", "frequency"])
def test_planted_never_chosen(criterion: str) -> None:
    made = plan(planted(), samples=32, axis="experts", criterion=criterion, ratio=0.25)

    assert all(own.keep.tolist() == [0, 1, 3, 4, 6, 7] for own in made.axes["experts"].values())


def test_planted_copies() -> None:
    made = plan(planted(), axis="experts", criterion="reap", grouping="similarity", ratio=0.125)

    for own in made.axes["experts"].values():
        assert len({1, 6} & {*own.keep.tolist()}) == 1
        assert len(own.keep) == EXPERTS - 1


@pytest.mark.parametrize("asked", [{}, {"criterion": "act-l2"}, {"method": "weight-l2"}, {"method": "taylor"}])
def test_every_method(asked: dict[str, Any]) -> None:
    model = tiny_model("deepseek_v3", n_group=2, topk_group=1)

    made = plan(model, axis="experts", ratio=0.5, **asked)

    for own in made.axes["experts"].values():
        assert (own.keep < EXPERTS // 2).sum() == (own.keep >= EXPERTS // 2).sum() == EXPERTS // 4


@pytest.mark.parametrize("allocate", ["uniform", "global"])
def test_neurons_inside(allocate: str) -> None:
    made = plan(tiny_model("deepseek_v3"), axis="mlp", ratio=0.3, allocate=allocate)

    widths = {len(own.keep) for name, layers in made.axes.items() if name != "mlp" for own in layers.values()}
    assert widths == {16}  # of 24, in fours
    assert {*made.axes} == {"mlp", "mlp.shared", *(f"mlp.expert{e}" for e in range(EXPERTS))}


def test_global_experts() -> None:
    made = plan(tiny_model("mixtral"), axis="experts", criterion="reap", ratio=0.4, allocate="global")

    assert {len(own.keep) for own in made.axes["experts"].values()} == {5}


def test_few_tokens() -> None:
    few = plan(tiny_model("mixtral"), axis="experts", criterion="reap")
    many = plan(tiny_model("mixtral"), axis="experts", criterion="weight-l2")

    assert any("experts saw fewer than 64 tokens" in note for note in few.notes)
    assert many.notes == []


def test_below_top_k() -> None:
    with pytest.raises(RecipeError, match=r"leaves 1 of 8 experts in layer 0.*2 have to stay: ask for at most 0.75"):
        prepare(from_memory(tiny_model("mixtral")), Recipe(axis="experts", ratio=0.9))


def test_below_groups() -> None:
    model = tiny_model("deepseek_v3", n_group=2, topk_group=1)
    with pytest.raises(RecipeError, match=r"4 have to stay \(in 2 groups"):
        prepare(from_memory(model), Recipe(axis="experts", ratio=0.7))


@pytest.mark.parametrize(
    ("model_type", "asked", "why"),
    [
        ("mixtral", {"axis": "mlp", "criterion": "reap"}, "is for experts"),
        ("mixtral", {"axis": "experts", "merge": "mean"}, "stay or go"),
        ("mixtral", {"axis": "experts", "compensate": "bias"}, "bias of an output projection, and experts' have none"),
        ("mixtral", {"axis": "experts", "allocate": "transfer-entropy"}, "uniform or global"),
        ("llama", {"axis": "experts"}, "the model has no experts"),
        ("longcat_flash", {"axis": "experts"}, "share the router"),
    ],
)
def test_refused(model_type: str, asked: dict[str, Any], why: str) -> None:
    with pytest.raises(RecipeError, match=why) as error:
        prepare(from_memory(tiny_model(model_type)), Recipe(**asked))
    assert "\n" not in str(error.value)


def test_no_similarity_of_llama4() -> None:
    with pytest.raises(RecipeError, match="cannot be grouped by similarity"):
        plan(tiny_model("llama4_text"), axis="experts", grouping="similarity")


def test_other_arithmetic() -> None:
    model = tiny_model("mixtral")
    experts = model.model.layers[0].mlp.experts
    forward = experts.forward
    experts.forward = lambda *args, **kwargs: 2 * forward(*args, **kwargs)

    with pytest.raises(ModelError, match="computes otherwise"):
        plan(model, axis="experts", criterion="reap")
