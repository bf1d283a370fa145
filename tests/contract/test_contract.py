"""What makes a family supported. Whoever adds one puts it into ``tiny.FAMILIES`` and runs this file."""

from __future__ import annotations

import json
import shutil
from itertools import zip_longest
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from by_hand import (
    CASES,
    CUTS,
    FOLDERS,
    NEEDS,
    SHAPES,
    assert_exact_within_rounding,
    assert_near,
    assert_same_sums,
    assert_same_tensors,
    bytes_in,
    config_in,
    cut_by,
    dense_model,
    generated_by,
    is_stock,
    logits_of,
    masked,
    plain_activations,
    plan_for,
    plan_of,
    tensors_in,
    units_of,
    untied,
)
from tiny import FAMILIES, LAYERS, NEURONS, PLACES, family_of, save_tiny, tiny_model, tiny_tokens
from transformers import AutoModelForCausalLM
from without_dicer import HIDDEN, load_elsewhere

import dicer
from dicer.decide.plan import LayerPlan
from dicer.measure.stores.resident import ResidentStore
from dicer.measure.walk import walk
from dicer.model.source import from_memory, open_model
from dicer.write.export import modeling_pruned

every_family = pytest.mark.parametrize("family", FAMILIES)
every_case = pytest.mark.parametrize("case", [case for case in CASES if not case.endswith("-bf16")])
every_cut = pytest.mark.parametrize(("case", "shape"), CUTS)
every_folder = pytest.mark.parametrize(("case", "shape"), FOLDERS)
METHODS = ("rc-a", "taylor", "sim-mean", "sim-dominant", "random")


class TestFamilyContract:
    """Ten families, cut along every axis: each promise is one method."""

    @every_cut
    def test_cut_equals_masked(self, case, shape):
        dense = dense_model(case)
        plan = plan_of(from_memory(dense), case, shape)
        cut = logits_of(cut_by(plan, from_memory(dense)))
        assert_near(cut, logits_of(masked(dense, case, plan)))
        assert (cut - logits_of(dense)).abs().max() > 1e-4, "what goes must have mattered"

    @every_family
    def test_sizes_are_counted_and_what_stays_is_untouched(self, family, tmp_path):
        dense = save_tiny(tmp_path / "dense", family)
        result = dicer.apply_plan(plan_of(open_model(dense), family, "mixed with biases"), dense, tmp_path / "out")
        before, after = tensors_in(dense), tensors_in(tmp_path / "out")
        layers = f"{PLACES[family][0]}."
        for sizes, tensors in ((result.before, before), (result.after, after)):
            assert sizes.parameters == sum(tensor.numel() for tensor in tensors.values())
            assert sizes.nbytes == sum(tensor.nbytes for tensor in tensors.values())
            assert sizes.decoder == sum(tensor.numel() for name, tensor in tensors.items() if name.startswith(layers))
        cut = {f"{layers}{index}.{part}" for axis, index in MIXED_CUT for part in PARTS[axis]}
        stays = {name: tensor for name, tensor in before.items() if not name.startswith(tuple(cut))}
        assert_same_tensors(stays, {name: tensor for name, tensor in after.items() if not name.startswith(tuple(cut))})

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    @every_family
    def test_statistics_equal_plain_hooks(self, family, dtype):
        model, batches = tiny_model(family, dtype=dtype), tiny_tokens().split(4)  # 4 and 2 samples
        seen = plain_activations(model, family, batches)
        visits = walk(ResidentStore(model, family_of(model)), range(LAYERS), batches, needs=NEEDS)
        for index, visit in enumerate(visits):
            assert (visit.place, visit.sums.count) == ((index, "mlp"), 6 * 24)
            assert_same_sums(visit.sums, seen, index)
            assert_exact_within_rounding(visit.sums, seen, index)

    @every_family
    def test_walk_stops_after_the_last_chosen_layer(self, family):
        model, ran = tiny_model(family), []
        seen = plain_activations(model, family, [tiny_tokens()])
        for index, layer in enumerate(attrgetter(PLACES[family][0])(model)):
            layer.get_submodule(PLACES[family][2]).register_forward_hook(lambda *_, index=index: ran.append(index))
        visits = list(walk(ResidentStore(model, family_of(model)), [2], [tiny_tokens()], needs=NEEDS))
        assert [visit.place for visit in visits] == [(2, "mlp")]
        assert ran == [0, 1, 2]
        assert_same_sums(visits[0].sums, seen, 2)

    @every_case
    def test_cached_generation_equals_uncached(self, case):
        for shape in ("heads differ", "first attention gone", "sub-layers gone with biases"):
            cut = cut_in_memory(case, shape)
            assert generated_by(cut, cache=True, new=12) == generated_by(cut, cache=False, new=12), shape

    @every_family
    def test_cache_shrinks_with_the_groups(self, family):
        cut = cut_in_memory(family, "first attention gone")
        cache, groups = cut(input_ids=tiny_tokens(2, 12), use_cache=True).past_key_values, units_of(family, "attention")
        assert [layer.keys.shape[1] for layer in cache.layers] == [1, groups, groups // 2, groups]
        assert cache.layers[0].keys.shape[-1] == 1, "an attention that is gone holds one number a token"
        assert cache.get_seq_length() == 12

    # Folders, in a process that has no dicer

    def test_other_process_has_no_dicer(self, elsewhere):
        assert elsewhere.report["blocked"] == [*HIDDEN, "dicer.write.export.modeling_pruned"]
        assert elsewhere.report["loaded"] == []

    @every_folder
    def test_reload_without_dicer(self, case, shape, elsewhere):
        folder, model = elsewhere.folder(case, shape), elsewhere.models[case, shape]
        elsewhere.assert_loads(folder, model)
        assert_same_tensors(tensors_in(folder), untied(model.state_dict(), tensors_in(folder)))

    @pytest.mark.parametrize("case", dict(FOLDERS))
    def test_code_only_where_no_stock_config_will_do(self, case, elsewhere):
        for shape in (shape for other, shape in FOLDERS if other == case):
            folder, stock = elsewhere.folder(case, shape), is_stock(case, shape)
            assert type(elsewhere.models[case, shape]).__module__.startswith("transformers.models.") is stock, shape
            assert [path.name for path in folder.rglob("*.py")] == ([] if stock else ["modeling_pruned.py"]), shape
            own = {"auto_map", "pruned"}
            assert own & config_in(folder).keys() == (set() if stock else own), shape
            assert (config_in(folder)["model_type"] == CASES[case][0]) is stock, shape

    @every_family
    def test_saved_again_without_dicer(self, family, elsewhere):
        for shape in AGAIN:
            folder = elsewhere.folder(family, shape)
            again = folder.with_name(f"{folder.name} again")
            elsewhere.assert_loads(again, elsewhere.models[family, shape])
            assert elsewhere.report[str(again)]["generated"] == generated_by(elsewhere.models[family, shape])
            assert_same_tensors(tensors_in(again), tensors_in(folder))

    @every_family
    def test_reload_with_dicer_needs_no_flag_and_saves_the_code_along(self, family, elsewhere):
        model = AutoModelForCausalLM.from_pretrained(elsewhere.folder(family, MIXED))
        assert type(model).__module__ == "dicer.write.export.modeling_pruned"
        assert torch.equal(logits_of(model), logits_of(dicer.load(elsewhere.folder(family, MIXED))))
        saved = elsewhere.root / f"{family} by dicer"
        assert (saved / "modeling_pruned.py").read_bytes() == Path(modeling_pruned.__file__).read_bytes()
        maps = [
            json.loads((f / "config.json").read_text())["auto_map"] for f in (saved, elsewhere.folder(family, MIXED))
        ]
        assert maps[0] == maps[1]
        elsewhere.assert_loads(saved, model)

    @pytest.mark.parametrize("family", [*FAMILIES, "auto_map lost"])
    def test_refused_without_the_flag(self, family, elsewhere):
        assert elsewhere.report[f"refused {elsewhere.folder(family, MIXED)}"] == ["refused"] * 6

    @pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma2"])  # which has no sdpa
    def test_attention_implementations(self, family, elsewhere):
        model = dicer.load(elsewhere.folder(family, "heads differ"), attn_implementation="eager")
        expected = logits_of(model)
        model.set_attn_implementation("sdpa")
        assert_near(logits_of(model), expected)
        model.set_attn_implementation("eager")
        with torch.no_grad():
            assert len(model(input_ids=tiny_tokens(2), output_attentions=True).attentions) == LAYERS

    # The same again

    @every_family
    def test_pruning_again_and_applying_the_plan_give_the_same_bytes(self, family, tmp_path, calib):
        dense, method = save_tiny(tmp_path / "dense", family), METHODS[FAMILIES.index(family) % len(METHODS)]
        asked = dicer.Recipe(method=method, layers="1-2", calib=calib)
        first = dicer.prune(dense, asked, output=tmp_path / "first")
        dicer.prune(dense, asked, output=tmp_path / "second")
        dicer.make_plan(dense, asked).save(tmp_path / "plan")
        dicer.apply_plan(tmp_path / "plan", dense, tmp_path / "applied")
        dicer.apply_plan(dicer.load_plan(tmp_path / "first"), dense, tmp_path / "from checkpoint")
        assert first.plan.files() == dicer.load_plan(tmp_path / "plan").files()
        expected = bytes_in(tmp_path / "first")
        assert {"config.json", "model.safetensors", "dicer_plan.json", "dicer_plan.tensors"} < expected.keys()
        for again in ("second", "applied", "from checkpoint"):
            assert bytes_in(tmp_path / again) == expected, again

    @pytest.mark.parametrize(("family", "shape"), list(zip_longest(FAMILIES, SHAPES, fillvalue="llama")))
    def test_every_plan_is_read_as_it_was_saved(self, family, shape, tmp_path):
        dense = save_tiny(tmp_path / "dense", family)
        plan = plan_of(open_model(dense), family, shape)
        plan.save(tmp_path / "plan")
        assert plan.diff(dicer.load_plan(tmp_path / "plan")) == []
        for given, out in ((plan, "first"), (tmp_path / "plan", "second")):
            dicer.apply_plan(given, dense, tmp_path / out)
        assert bytes_in(tmp_path / "first") == bytes_in(tmp_path / "second")

    @every_family
    def test_memory_and_folder_give_the_same(self, family, tmp_path, calib):
        dense, asked = save_tiny(tmp_path / "dense", family), dicer.Recipe(layers="1-2", calib=calib)
        memory, folder = dicer.prune(tiny_model(family), asked), dicer.prune(dense, asked)
        assert memory.plan.model["fingerprint"] == folder.plan.model["fingerprint"]
        assert memory.plan.files()["dicer_plan.tensors"] == folder.plan.files()["dicer_plan.tensors"]
        assert (memory.before, memory.after) == (folder.before, folder.after)
        assert_same_tensors(memory.model.state_dict(), folder.model.state_dict())
        dicer.prune(tiny_model(family), asked, output=tmp_path / "out")
        dicer.apply_plan(memory.plan, dense, tmp_path / "applied")
        assert_same_tensors(tensors_in(tmp_path / "out"), tensors_in(tmp_path / "applied"))

    # What was pruned before

    @every_family
    def test_pruned_again_equals_masked(self, family, elsewhere):
        once = dicer.load(elsewhere.folder(family, "sub-layers gone with biases"))
        keep = torch.arange(NEURONS // 2)
        plan = plan_for(from_memory(once), {"mlp": {1: LayerPlan(NEURONS, keep, torch.zeros(NEURONS))}}, (3,))
        twice = cut_by(plan, from_memory(once))
        assert_near(logits_of(twice), logits_of(masked(once, family, plan)))
        groups = units_of(family, "attention")
        assert family_of(twice).units("attention") == [groups, 0, groups]
        assert family_of(twice).units("mlp") == [0, NEURONS // 2, NEURONS // 2]

    @every_family
    def test_pruned_twice_has_the_units_that_were_asked_for(self, family, tmp_path, calib, elsewhere):
        once, asked = elsewhere.folder(family, MIXED), dicer.Recipe(ratio=0.5, calib=calib)
        twice = dicer.prune(once, asked, output=tmp_path / "twice")
        assert [(p.units, len(p.keep)) for p in twice.plan.mlp.values()] == [(40, 20), (30, 15), (30, 15), (40, 20)]
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "twice")
        assert family_of(model).units("mlp") == [20, 15, 15, 20]
        memory = dicer.prune(AutoModelForCausalLM.from_pretrained(once), asked)
        assert torch.equal(logits_of(memory.model), logits_of(model))
        assert memory.after == twice.after

    @every_family
    def test_the_other_layers_pruned_too_make_it_stock(self, family, tmp_path, calib, elsewhere):
        asked = dicer.Recipe(layers="0,3", calib=calib)
        dicer.prune(elsewhere.folder(family, MIXED), asked, output=tmp_path / "twice")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "twice")
        assert type(model).__module__.startswith("transformers.models.")
        assert not (tmp_path / "twice" / "modeling_pruned.py").exists()
        assert family_of(model).units("mlp") == [30] * LAYERS


MIXED = "neurons differ"
MIXED_CUT = [(axis, index) for axis, layers in SHAPES["mixed with biases"][0].items() for index in layers]
PARTS = {"attention": ("self_attn.", "attn."), "mlp": ("mlp.", "fc1.", "fc2.")}
AGAIN = (MIXED, "neurons alike", "sub-layers gone with biases")


class Elsewhere:
    """Pruned folders, the same models made in memory, and what a process without dicer made of the folders."""

    def __init__(self, root):
        self.root, self.models, self.report, self.logits = root, {}, {}, {}

    def folder(self, case, shape):
        return self.root / f"{case} {shape}"

    def assert_loads(self, folder, expected):
        """The other process had the class, the config class, the logits and the tokens of the model in memory."""
        said, logits = self.report[str(folder)], self.logits[str(folder)]
        assert said["not clean"] == {}, "no tensor missing, left over, or of another shape"
        assert said["classes"] == [type(expected).__name__, type(expected.config).__name__]
        assert logits.dtype == expected.dtype
        # another process may multiply in another order
        assert_near(logits, logits_of(expected), atol=1e-6 if expected.dtype == torch.float32 else 1e-2)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    made = Elsewhere(tmp_path_factory.mktemp("elsewhere"))
    load = {}
    for case in dict(FOLDERS):
        dense = save_tiny(made.root / case, CASES[case][0], **CASES[case][1])
        source = open_model(dense)
        for shape in (shape for other, shape in FOLDERS if other == case):
            plan, out = plan_of(source, case, shape), made.folder(case, shape)
            dicer.apply_plan(plan, dense, out)
            made.models[case, shape] = cut_by(plan, source)
            load[str(out)] = f"{out} again" if case in FAMILIES and shape in AGAIN else None
    for family in FAMILIES:
        saved = made.root / f"{family} by dicer"
        AutoModelForCausalLM.from_pretrained(made.folder(family, MIXED)).save_pretrained(saved)
        load[str(saved)] = None
    lost = shutil.copytree(made.folder("llama", MIXED), made.folder("auto_map lost", MIXED))
    config = config_in(lost)
    del config["auto_map"]
    (lost / "config.json").write_text(json.dumps(config))
    refused = [str(made.folder(family, MIXED)) for family in (*FAMILIES, "auto_map lost")]
    tokens = {"ids": tiny_tokens(2, 24, seed=5).tolist(), "prompt": tiny_tokens(2, 8, seed=6).tolist()}
    made.report, made.logits = load_elsewhere(made.root, {"refused": refused, "load": load, **tokens})
    return made


def cut_in_memory(case, shape):
    source = from_memory(dense_model(case))
    return cut_by(plan_of(source, case, shape), source)
