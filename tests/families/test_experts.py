"""Experts of eight families: found, dropped and thinned; each against the same model with them switched off."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dicer
from dicer.decide.plan import LayerPlan, PrunePlan
from dicer.model.families import Family
from dicer.model.source import ModelSource, from_memory
from dicer.model.structure.family_file import as_toml
from dicer.model.structure.find import decoder_layers, find_family
from dicer.model.structure.skeleton import build, changed, on_disk
from dicer.model.structure.trace import returned
from dicer.model.tensors import MemorySource
from dicer.model.units import Axis
from dicer.write.experts import expert_cuts
from dicer.write.prove import prove
from dicer.write.surgery import slice_tensor
from dicer.write.targets import parallel_line
from families.sizes import EXPERTS, LAYERS
from families.tiny import tiny_input, tiny_model

TYPES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {},
    "mixtral": {},
    "deepseek_v3": {},
    "deepseek_v3 in groups": {"n_group": 2, "topk_group": 1},
    "gpt_oss": {},
    "granitemoe": {},
    "llama4_text": {},
    "ernie4_5_moe": {},
    "gemma4_text": {},
    "inkling2_text": {},  # gate and up take turns on disk, and not in memory
}


def moe(name: str) -> tuple[Any, ModelSource]:
    """A tiny model in memory, and what dicer knows of it."""
    model = tiny_model(name.partition(" ")[0], **TYPES[name])
    tensors = {key: tensor.clone() for key, tensor in on_disk(model).items()}
    family = find_family(model.config, type(model))
    raw = json.loads(json.dumps(model.config.to_dict(), default=str))
    return model, ModelSource(name, None, model.config, raw, family, MemorySource(tensors), model)


def found(source: ModelSource) -> Family:
    assert isinstance(source.family, Family)
    return source.family


def cut_model(source: ModelSource, plan: PrunePlan, values: Mapping[str, Any]) -> Any:
    """The stock class with what a plan leaves of the tensors."""
    family, tensors = source.family, {}
    cuts = expert_cuts(family.axes, plan)
    for name in source.tensors.infos():
        tensor, place = source.tensors.read(name), family.locate(name)
        own = cuts(*place) if place else None
        if own is None:
            tensors[name] = tensor
        elif own.name is not None:
            tensors[family.tensor_name(place[0], own.name)] = own.apply(tensor, slice_tensor)
            assert tensors[family.tensor_name(place[0], own.name)].shape == own.shape(tuple(tensor.shape))
    config = changed(source.config, values)
    return type(source.live).from_pretrained(None, config=config, state_dict=tensors, dtype=torch.float32).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tiny_input(), use_cache=False).logits


def same(first: Tensor, second: Tensor) -> None:
    """As far as float32 goes: by 1e-5, or of logits larger than one by 1e-5 of the largest."""
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5 * max(1.0, float(second.abs().max())))


def kept(units: int, keep: int, layer: int, parts: int = 1) -> Tensor:
    """Other units in each layer, the same number of every part."""
    generator = torch.Generator().manual_seed(layer)
    size = units // parts
    chosen = [torch.randperm(size, generator=generator)[: keep // parts] + part * size for part in range(parts)]
    return torch.cat(chosen).sort().values


def plan_of(family: Family, axes: list[Axis], keep: Callable[[int], int]) -> PrunePlan:
    plans: dict[str, dict[int, LayerPlan]] = {}
    for number, axis in enumerate(axes):
        for layer, units in enumerate(family.counts[axis.name]):
            if units:
                stays = kept(units, keep(units), layer + 31 * number, axis.parts)
                plans.setdefault(axis.name, {})[layer] = LayerPlan(units, stays, torch.zeros(units))
    return PrunePlan({}, {}, {}, {}, plans)


@contextmanager
def without_experts(model: Any, family: Family, plan: PrunePlan) -> Iterator[None]:
    """The router's logit of every expert that goes is minus infinity, and no correction brings it back."""
    gone, biases = {}, []
    for layer, own in plan.axes["experts"].items():
        lost = torch.tensor(sorted({*range(own.units)} - {*own.keep.tolist()}))
        module = model.get_submodule(f"{family.layers}.{layer}")
        state = dict(module.named_parameters()) | dict(module.named_buffers())
        for piece in family.axes["experts"].slices:
            tensor = state.get(piece.memory or piece.name)
            if piece.roles == ("router",) and tensor is not None and tensor.ndim == 2:
                gone[tensor.data_ptr()] = lost
            elif piece.roles == ("router_bias",) and "correction" in (piece.memory or piece.name):
                biases.append((tensor, tensor.detach().clone(), lost))
    linear = torch.nn.functional.linear

    def masked(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        output = linear(inputs, weight, bias)
        if weight.data_ptr() in gone:
            output = output.index_fill(-1, gone[weight.data_ptr()], -torch.inf)
        return output

    assert gone
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        for tensor, _, lost in biases:
            tensor[..., lost] = -1e9
        patch.setattr(torch.nn.functional, "linear", masked)
        yield
    with torch.no_grad():
        for tensor, before, _ in biases:
            tensor.copy_(before)


@pytest.mark.parametrize("name", TYPES)
def test_whole_experts(name: str) -> None:
    model, source = moe(name)
    family = found(source)
    axis = family.axes["experts"]
    plan = plan_of(family, [axis], lambda units: units - 2)

    small = cut_model(source, plan, dict.fromkeys(axis.width_keys, EXPERTS - 2))

    dense = logits(model)
    with without_experts(model, family, plan):
        expected = logits(model)
    same(logits(small), expected)
    assert (expected - dense).abs().max() > 1e-2


@pytest.mark.parametrize("name", TYPES)
def test_neurons_of_experts(name: str) -> None:
    model, source = moe(name)
    family = found(source)
    axes = [axis for axis in family.axes.values() if axis.name.startswith("mlp.expert")]
    assert len(axes) == EXPERTS
    plan = plan_of(family, axes, lambda units: units // 2 // 4 * 4)
    widths = {axis.width_keys[0]: next(filter(None, family.counts[axis.name])) // 2 // 4 * 4 for axis in axes}
    rest = {n: a for n, a in family.axes.items() if a.width_keys[0] in widths and a not in axes and n != "experts"}
    plan.axes.update(plan_of(family, list(rest.values()), lambda units: units // 2 // 4 * 4).axes)
    small = _with_dense_cut(source, plan, widths, rest)

    same(logits(small), logits(_zeroed(model, source, plan)))
    assert (logits(small) - logits(model)).abs().max() > 1e-2


def _with_dense_cut(source: ModelSource, plan: PrunePlan, widths: Mapping[str, int], rest: Mapping[str, Axis]) -> Any:
    """Dense MLPs whose width goes by the same key are cut as well; those of experts by what is tested."""
    tensors = {name: source.tensors.read(name) for name in source.tensors.infos()}
    for axis in rest.values():
        for layer, own in plan.axes.get(axis.name, {}).items():
            for piece in axis.slices:
                name = source.family.tensor_name(layer, piece.name)
                if name in tensors:
                    tensors[name] = slice_tensor(tensors[name], piece, own)
    thinner = ModelSource(
        source.name, None, source.config, source.raw_config, source.family, MemorySource(tensors), source.live
    )
    return cut_model(thinner, plan, widths)


def _zeroed(model: Any, source: ModelSource, plan: PrunePlan) -> Any:
    """The same model with the maps into and out of every neuron that goes at zero."""
    tensors = {name: source.tensors.read(name).clone() for name in source.tensors.infos()}
    for axis in source.family.axes.values():
        for layer, own in plan.axes.get(axis.name, {}).items():
            lost = torch.tensor(sorted({*range(own.units)} - {*own.keep.tolist()}))
            for piece in axis.slices:
                name = source.family.tensor_name(layer, piece.name)
                if name in tensors and piece.is_output:
                    part = tensors[name] if piece.expert is None else tensors[name][piece.expert]
                    part.index_fill_(piece.dim - (piece.expert is not None), lost, 0.0)
    return (
        type(model)
        .from_pretrained(None, config=copy.deepcopy(model.config), state_dict=tensors, dtype=torch.float32)
        .eval()
    )


def test_group_bounds() -> None:
    source = moe("deepseek_v3 in groups")[1]
    axis = source.family.axes["experts"]

    assert (axis.parts, axis.least) == (2, 4)


@pytest.mark.parametrize("model_type", ["longcat_flash", "zaya", "jetmoe", "deepseek_v4"])
def test_no_whole_experts(model_type: str) -> None:
    model = tiny_model(model_type)
    family = find_family(model.config, type(model))

    assert "experts" not in family.axes
    assert re.search("share the router|attention has experts|table of whole numbers", family.refused["experts"])


def test_experts_that_lie_otherwise(tmp_path: Path) -> None:
    """Their neurons are refused when the model is looked at, before anything is proven or measured."""
    tiny_model("jetmoe").save_pretrained(tmp_path / "model")
    says = "nothing left along --axis mlp: its experts .a JetMoe.*. do not lie side by side in gate_up_proj"

    with pytest.raises(dicer.DicerError, match=says):
        dicer.look(tmp_path / "model", dicer.Recipe(axis="mlp", criterion="weight-l2"))


@pytest.mark.parametrize("model_type", ["jamba", "aria_text", "qwen3_next", "granitemoehybrid", "solar_open"])
def test_returned_behind_experts(model_type: str) -> None:
    """What modules return is seen without weights also behind experts, which look at values."""
    model, given = tiny_model(model_type), {}
    layers = [
        f"{decoder_layers(build(model.config, type(model)), type(model), None).module}.{i}." for i in range(LAYERS)
    ]
    parts = {n: m for n, m in model.named_modules() if n.startswith(tuple(layers)) and n.count(".") <= 4}

    def note(name: str) -> Any:
        return lambda _, __, output: given.update({name: len(output) if isinstance(output, tuple) else 0})

    for name, part in parts.items():
        part.register_forward_hook(note(name))
    logits(model)
    skeleton = build(model.config, type(model))
    wrong = {n: (given[n], found) for n in given if (found := returned(skeleton, n)) not in (given[n], None)}

    assert not wrong
    assert all(returned(skeleton, n) is not None for n in given if n.endswith(("self_attn", "shared_experts")))


def test_parallel_line() -> None:
    """Each device has a part of every expert, so their number need not divide; all of a layer are said once."""
    family = moe("mixtral")[1].family
    assert parallel_line(family, 2) == "Widths divide by 2: every layer can be shared out to 2 devices."
    which = "key-value heads of layers 0, 1, 2, 3; neurons inside experts of layers 0, 1, 2, 3"
    said = f"Widths do not divide by 16: {which}. Prune with --width-multiple 16 or a multiple."
    assert parallel_line(family, 16) == said


def test_family_file(tmp_path: Path) -> None:
    """The printed row leaves experts out, as they are found; a file that says them is refused."""
    model, source = moe("qwen3_moe")
    family, file = source.family, tmp_path / "family.toml"
    row = as_toml(family.model_type, family.where, family.axes, family.factors, family.sets)
    file.write_text(row)
    recipe = dicer.Recipe(axis="experts", criterion="random", ratio=0.25, family=str(file))

    assert "experts are found" in row
    assert "expert" not in row.replace("experts are found", "")
    assert len(from_memory(model, str(file)).family.axes) == len(family.axes)
    result = dicer.prune(model, recipe)
    assert result.after.parameters < result.before.parameters

    file.write_text(row + '[axes.experts]\nslices = [{ name = "mlp.gate.weight", dim = 0, roles = ["router"] }]\n')
    with pytest.raises(dicer.DicerError, match=r"axes: experts are found, .* leave 'experts' out"):
        from_memory(model, str(file))


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3 in groups", "gpt_oss"])
@pytest.mark.parametrize("axis", ["experts", "mlp"])
def test_from_folder(name: str, axis: str, tmp_path: Path) -> None:
    model = moe(name)[0]
    model.save_pretrained(tmp_path / "dense")

    result = dicer.prune(
        tmp_path / "dense", dicer.Recipe(axis=axis, criterion="weight-l2", ratio=0.25), output=tmp_path / "small"
    )

    small, report = type(model).from_pretrained(tmp_path / "small", dtype=torch.float32, output_loading_info=True)
    assert not any(report.values())
    in_memory = dicer.prune(model, dicer.Recipe(axis=axis, criterion="weight-l2", ratio=0.25)).model
    torch.testing.assert_close(logits(small), logits(in_memory), rtol=0, atol=0)
    assert sum(p.numel() for p in small.parameters()) < result.before.parameters


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3 in groups", "inkling2_text"])
def test_proof(name: str) -> None:
    source = moe(name)[1]

    proofs = {proof.axis: proof for proof in prove(source, [a for a in source.family.axes if a != "attention"])}

    assert {"mlp.experts", "experts"} <= {*proofs} <= {"mlp", "mlp.shared", "mlp.experts", "experts"}
    assert [str(proof) for proof in proofs.values() if not proof.holds] == []
