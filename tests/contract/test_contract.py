"""What must hold for every family: cut == masked, walk == plain hooks, reload without dicer, the same bytes again."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import weakref
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, LAYERS, NEURONS, POSITIONS, save_tiny, tiny_model, tiny_tokenizer, tiny_tokens
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForSequenceClassification

import dicer
from dicer.decide.plan import LayerPlan, PrunePlan
from dicer.errors import ModelError, PlanError
from dicer.measure.statistics import Need, Sums
from dicer.measure.stores.resident import ResidentStore
from dicer.measure.walk import walk
from dicer.model.families import family_of
from dicer.write.export import modeling_pruned

# Where each family keeps things, written down once more so that a slip in the library's own table shows:
# decoder layers, modules whose outputs are the pre- and the post-activation, output projection.
_LLAMA = ("model.layers", "mlp.gate_proj", "mlp.act_fn", "mlp.down_proj")
PLACES = dict.fromkeys(FAMILIES, _LLAMA) | {
    "phi3": ("model.layers", "mlp.gate_up_proj", "mlp.activation_fn", "mlp.down_proj"),
    "gpt2": ("transformer.h", "mlp.c_fc", "mlp.act", "mlp.c_proj"),
    "opt": ("model.decoder.layers", "fc1", "activation_fn", "fc2"),
}
BF16 = {"dtype": torch.bfloat16}
CASES = {family: (family, {}) for family in FAMILIES}  # untied embeddings, two key-value heads for four heads
CASES |= {f"{family}-tied-mha": (family, {"tied": True, "kv_heads": 4}) for family in FAMILIES}
CASES |= {
    "llama-biases": ("llama", {"mlp_bias": True, "attention_bias": True}),
    "gemma-biases": ("gemma", {"attention_bias": True}),
    "opt-no-biases": ("opt", {"enable_bias": False}),
    "opt-post-norm": ("opt", {"do_layer_norm_before": False}),
}
RELOAD_CASES = (
    *FAMILIES,
    *("llama-tied-mha", "gemma2-tied-mha", "phi3-tied-mha", "gpt2-tied-mha", "opt-tied-mha"),
    *("llama-biases", "opt-no-biases", "opt-post-norm", "qwen2-bf16", "gpt2-bf16"),
)
RELOAD_UNIFORM = ("llama", "llama-biases", "gemma2-tied-mha", "phi3", "gpt2-tied-mha", "opt")
MODELING = Path(modeling_pruned.__file__).read_bytes()

FEWER = (*FAMILIES, "llama-tied-mha", "gpt2-tied-mha", "llama-biases", "opt-no-biases")
every_case = pytest.mark.parametrize("case", CASES)
every_family = pytest.mark.parametrize("family", FAMILIES)


def case_options(case):
    if case.endswith("-bf16"):
        return case.removesuffix("-bf16"), BF16
    return CASES[case]


def case_model(case):
    family, options = case_options(case)
    return family, tiny_model(family, **options)


def decoder_layers(model, family):
    return attrgetter(PLACES[family][0])(model)


@torch.no_grad()
def logits_of(model):
    return model(input_ids=tiny_tokens(2, 24, seed=5)).logits


def generated_by(model):
    prompt = tiny_tokens(1, 8, seed=6)
    tokens = model.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=True)
    return tokens[0, 8:].tolist()


def hide_units(model, family, plan):
    """A copy of the dense model in which the removed units no longer reach the output."""
    masked = copy.deepcopy(model)
    for index, layer_plan in plan.mlp.items():
        removed = torch.ones(layer_plan.units, dtype=torch.bool)
        removed[layer_plan.keep] = False
        output = decoder_layers(masked, family)[index].get_submodule(PLACES[family][3])
        by_unit = output.weight.data if family == "gpt2" else output.weight.data.T  # Conv1D is [N, d]
        by_unit[removed] = 0.0
    return masked


def folder_bytes(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def tensors_in(folder):
    return {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_tensors(first, second):
    assert first.keys() == second.keys()
    assert [n for n in first if first[n].dtype != second[n].dtype or not torch.equal(first[n], second[n])] == []


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def tokens_file(tmp_path_factory):
    """Calibration that is tokens already: six samples of 24."""
    path = tmp_path_factory.mktemp("calibration") / "tokens.jsonl"
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in tiny_tokens().tolist()))
    return path


@pytest.fixture(scope="module")
def recipe(tokens_file):
    def make(**values):
        return dicer.Recipe(**{"method": "rc-a", "batch_size": 4, "calib": str(tokens_file), **values})

    return make


# 1. cut == masked


@pytest.mark.parametrize("layers", ["all", "1-2"])
@every_case
def test_a_cut_model_says_what_the_dense_model_says_without_the_removed_units(case, layers, recipe):
    family, model = case_model(case)
    result = dicer.prune(model, recipe(layers=layers))
    assert {i: len(p.keep) for i, p in result.plan.mlp.items()} == dict.fromkeys(
        range(LAYERS) if layers == "all" else (1, 2), 30
    )
    cut = logits_of(result.model)
    torch.testing.assert_close(cut, logits_of(hide_units(model, family, result.plan)), rtol=0, atol=1e-5)
    assert (cut - logits_of(model)).abs().max() > 1e-4, "the removed units must have mattered"


@pytest.mark.parametrize("case", FEWER)
def test_the_config_and_every_tensor_of_a_cut_model_have_the_new_width(case, recipe):
    family, model = case_model(case)
    pruned = dicer.prune(model, recipe(layers="1-2")).model
    dense_shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    outputs = [layer.get_submodule(PLACES[family][3]).weight for layer in decoder_layers(pruned, family)]
    assert [len(w if family == "gpt2" else w.T) for w in outputs] == [40, 30, 30, 40]
    assert family_of(pruned.config.model_type).widths(pruned.config) == [40, 30, 30, 40]
    changed = {name for name, t in pruned.state_dict().items() if tuple(t.shape) != dense_shapes[name]}
    in_layers = {name for name in dense_shapes if ".1." in name or ".2." in name}
    assert changed == {name for name in in_layers if is_neuron_tensor(name, family)}


def is_neuron_tensor(name, family):
    if family == "opt":
        return "fc1" in name or name.endswith("fc2.weight")
    if family == "gpt2":
        return "c_fc" in name or name.endswith("mlp.c_proj.weight")
    return ".mlp." in name and not name.endswith("down_proj.bias")


# 2. walk == plain hooks on the stock forward


NEEDS = {Need(kind, activation) for kind in ("square_sum", "sum", "gram") for activation in ("pre", "post", "mod")}


def plain_activations(model, family, batches):
    """What hooks see in the ordinary forward of the whole model: (layer, activation) -> [B, T, U] of every batch."""
    _, pre_at, post_at, output_at = PLACES[family]
    seen, handles = {}, []

    def note(layer, activation, values):
        seen.setdefault((layer, activation), []).append(values)

    def hooks(index, layer):
        pre, post, output = map(layer.get_submodule, (pre_at, post_at, output_at))
        yield pre.register_forward_hook(lambda _, __, out: note(index, "pre", out[..., :NEURONS]))  # Phi-3: gate, up
        yield post.register_forward_hook(lambda _, __, out: note(index, "post", out))
        yield output.register_forward_pre_hook(lambda _, inputs: note(index, "mod", inputs[0]))

    for index, layer in enumerate(decoder_layers(model, family)):
        handles += hooks(index, layer)
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def sums_of(seen, layer):
    sums = Sums(NEEDS)
    for activation in ("pre", "post", "mod"):
        for values in seen[layer, activation]:
            sums.add(activation, values)
    return sums


def assert_sums_within_rounding(sums, seen, layer):
    for activation in ("pre", "post", "mod"):
        flat = torch.cat([v.flatten(0, -2) for v in seen[layer, activation]]).double()  # [T, U]
        exact = {"square_sum": (flat * flat).sum(0), "sum": flat.sum(0), "gram": flat.T @ flat}
        for kind, value in exact.items():
            torch.testing.assert_close(sums.get(kind, activation).double(), value, rtol=1e-5, atol=1e-5 * flat.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@every_family
def test_the_walk_sums_what_plain_hooks_sum_bit_for_bit(family, dtype):
    model = tiny_model(family, dtype=dtype)
    batches = tiny_tokens().split(4)  # 4 and 2 samples
    seen = plain_activations(model, family, batches)
    visits = list(walk(ResidentStore(model, family_of(family)), range(LAYERS), batches, needs=NEEDS))
    assert [(visit.index, visit.axes["mlp"].sums.count) for visit in visits] == [(i, 6 * 24) for i in range(LAYERS)]
    for index, visit in enumerate(visits):
        plain = sums_of(seen, index)
        assert [
            need for need in NEEDS if not torch.equal(visit.axes["mlp"].sums.get(*need[:2]), plain.get(*need[:2]))
        ] == []
        assert_sums_within_rounding(visit.axes["mlp"].sums, seen, index)


@every_family
def test_the_walk_stops_after_the_last_chosen_layer_and_visits_no_other(family):
    model, ran = tiny_model(family), []
    seen = plain_activations(model, family, [tiny_tokens()])
    for index, layer in enumerate(decoder_layers(model, family)):
        layer.get_submodule(PLACES[family][3]).register_forward_hook(lambda *_, index=index: ran.append(index))
    visits = list(walk(ResidentStore(model, family_of(family)), [2], [tiny_tokens()], needs=NEEDS))
    assert [visit.index for visit in visits] == [2]
    assert ran == [0, 1, 2]
    sums = visits[0].axes["mlp"].sums
    assert [n for n in NEEDS if not torch.equal(sums.get(*n[:2]), sums_of(seen, 2).get(*n[:2]))] == []


# 3. reload, in a process that has no dicer

WITHOUT_DICER = """
import json, sys
from pathlib import Path

for name in ("dicer", "typer", "rich", "scipy", "wrapt", "pydantic"):
    sys.modules[name] = None
blocked = []
for name in ("dicer", "dicer.write.export.modeling_pruned", "typer", "rich", "scipy", "wrapt", "pydantic"):
    try:
        __import__(name)
    except ImportError:
        blocked.append(name)

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()
job = json.loads(Path(sys.argv[1]).read_text())
ids, prompt = torch.tensor(job["ids"]), torch.tensor(job["prompt"])
logits, report = {}, {"blocked": blocked}


def refusals(folder):
    for load in (AutoConfig.from_pretrained, AutoModel.from_pretrained, AutoModelForCausalLM.from_pretrained):
        for flags in ({}, {"trust_remote_code": False}):
            try:
                yield type(load(folder, **flags)).__name__
            except ValueError:
                yield "refused"


def examine(name, folder, flags):
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True, **flags)
    with torch.no_grad():
        logits[name] = model(input_ids=ids).logits
    new = model.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=True)
    report[name] = {
        "class": type(model).__name__,
        "config": type(model.config).__name__,
        "generated": new[0, prompt.shape[1]:].tolist(),
        "not clean": {key: sorted(map(str, value)) for key, value in info.items() if value},
    }
    return model


for name in job["refused"]:
    report["refused " + name] = list(refusals(name))
for name, again in job["load"].items():
    flags = {"trust_remote_code": True} if Path(name, "modeling_pruned.py").exists() else {}
    model = examine(name, name, flags)
    if again:
        model.save_pretrained(again)
        examine(again, again, flags)
report["loaded"] = [name for name, module in sys.modules.items() if name.startswith("dicer") and module is not None]
save_file(logits, sys.argv[2])
Path(sys.argv[3]).write_text(json.dumps(report))
"""


class Written:
    """Folders of pruned models, the same models made in memory, and what became of the folders without dicer."""

    def __init__(self, root):
        self.root, self.models, self.report, self.logits = root, {}, {}, {}

    def folder(self, name):
        return self.root / name

    def outcome(self, name):
        return self.report[str(self.folder(name))], self.logits[str(self.folder(name))]


def run_without_dicer(root, job):
    """One process for all folders, as the imports cost seconds."""
    files = [root / name for name in ("job.json", "logits.safetensors", "report.json")]
    files[0].write_text(json.dumps(job))
    process = subprocess.run(
        [sys.executable, "-c", WITHOUT_DICER, *map(str, files)],
        env={**os.environ, "HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(files[2].read_text()), load_file(files[1])


@pytest.fixture(scope="module")
def written(tmp_path_factory, recipe):
    out = Written(tmp_path_factory.mktemp("written"))
    load = {}
    for case in RELOAD_CASES:
        family, options = case_options(case)
        dense = save_tiny(out.folder(f"{case}-dense"), family, **options)
        for kind in ("mixed", "uniform") if case in RELOAD_UNIFORM else ("mixed",):
            name = f"{case}-{kind}"
            asked = recipe(layers="all" if kind == "uniform" else "1-2")
            dicer.prune(dense, asked, output=out.folder(name))
            out.models[name] = dicer.prune(dense, asked).model
            load[str(out.folder(name))] = str(out.folder(f"{name}-again"))
        AutoModelForCausalLM.from_pretrained(out.folder(f"{case}-mixed")).save_pretrained(
            out.folder(f"{case}-mixed-by-dicer")
        )
        load[str(out.folder(f"{case}-mixed-by-dicer"))] = None
    without_map = shutil.copytree(out.folder("llama-mixed"), out.folder("llama-mixed-no-map"))
    config = config_of(without_map)
    del config["auto_map"]
    (without_map / "config.json").write_text(json.dumps(config))
    refused = [str(out.folder(f"{case}-mixed")) for case in RELOAD_CASES] + [str(without_map)]
    tokens = {"ids": tiny_tokens(2, 24, seed=5).tolist(), "prompt": tiny_tokens(1, 8, seed=6).tolist()}
    out.report, out.logits = run_without_dicer(out.root, {"refused": refused, "load": load, **tokens})
    return out


NAMES = [f"{case}-mixed" for case in RELOAD_CASES] + [f"{case}-uniform" for case in RELOAD_UNIFORM]


def assert_loaded_whole(written, name, expected):
    """The folder gave, in the other process, the class, logits and tokens of the model in memory."""
    outcome, logits = written.outcome(name)
    assert outcome["not clean"] == {}, "no tensor missing, left over, or of another shape"
    assert outcome["class"] == type(expected).__name__
    assert outcome["config"] == type(expected.config).__name__
    tolerance = 1e-6 if expected.dtype == torch.float32 else 1e-2  # another process may multiply in another order
    assert logits.dtype == expected.dtype
    torch.testing.assert_close(logits, logits_of(expected), rtol=0, atol=tolerance)
    assert outcome["generated"] == generated_by(expected)


def test_the_other_process_really_had_no_dicer(written):
    assert len(written.report["blocked"]) == 7
    assert written.report["loaded"] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_loads_in_a_process_without_dicer(written, name):
    assert_loaded_whole(written, name, written.models[name])


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_saved_again_without_dicer_loads_again(written, name):
    assert_loaded_whole(written, f"{name}-again", written.models[name])
    assert_same_tensors(tensors_in(written.folder(f"{name}-again")), tensors_in(written.folder(name)))


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_holds_the_weights_of_the_model_in_memory_and_no_other(written, name):
    on_disk, in_memory = tensors_in(written.folder(name)), written.models[name].state_dict()
    tied = in_memory.keys() - on_disk.keys()
    assert tied <= {"lm_head.weight"}
    assert_same_tensors(on_disk, {n: t for n, t in in_memory.items() if n not in tied})


@pytest.mark.parametrize("case", RELOAD_UNIFORM)
def test_one_width_for_all_layers_gives_a_stock_folder_without_code(written, case):
    family, _ = case_options(case)
    folder = written.folder(f"{case}-uniform")
    assert not list(folder.rglob("*.py"))
    config = config_of(folder)
    assert config["model_type"] == family
    assert not {"auto_map", "per_layer_config", "allow_global_per_layer_attribute_access"} & config.keys()
    assert type(written.models[f"{case}-uniform"]).__module__.startswith("transformers.models.")


@pytest.mark.parametrize("case", RELOAD_CASES)
def test_different_widths_without_the_flag_are_refused_where_there_is_no_dicer(written, case):
    assert written.report[f"refused {written.folder(f'{case}-mixed')}"] == ["refused"] * 6


def test_different_widths_are_refused_also_when_the_auto_map_is_lost(written):
    assert written.report[f"refused {written.folder('llama-mixed-no-map')}"] == ["refused"] * 6


@pytest.mark.parametrize("case", RELOAD_CASES)
def test_with_dicer_imported_no_flag_is_needed_and_the_code_is_saved_along(written, case):
    model = AutoModelForCausalLM.from_pretrained(written.folder(f"{case}-mixed"))
    assert type(model).__module__ == "dicer.write.export.modeling_pruned"
    assert torch.equal(logits_of(model), logits_of(dicer.load(written.folder(f"{case}-mixed"))))
    saved = written.folder(f"{case}-mixed-by-dicer")
    assert (saved / "modeling_pruned.py").read_bytes() == MODELING
    assert config_of(saved)["auto_map"] == config_of(written.folder(f"{case}-mixed"))["auto_map"]
    assert_loaded_whole(written, saved.name, model)


def test_the_model_in_memory_saves_its_code_along_too(tmp_path, recipe):
    pruned = dicer.prune(tiny_model("llama"), recipe(layers="1-2")).model
    pruned.save_pretrained(tmp_path)
    assert (tmp_path / "modeling_pruned.py").read_bytes() == MODELING
    assert set(config_of(tmp_path)["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path)), logits_of(pruned))


# 4. the same bytes again


@pytest.mark.parametrize("method", ["rc-a", "taylor", "sim-mean", "sim-dominant", "random"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_a_plan_saved_loaded_and_applied_again_gives_the_same_bytes(family, method, tmp_path, recipe):
    dense = save_tiny(tmp_path / "dense", family)
    asked = recipe(method=method, layers="1-2")
    first = dicer.prune(dense, asked, output=tmp_path / "first")
    dicer.prune(dense, asked, output=tmp_path / "second")
    dicer.make_plan(dense, asked).save(tmp_path / "plan")
    dicer.apply_plan(tmp_path / "plan", dense, tmp_path / "applied")
    dicer.apply_plan(dicer.load_plan(tmp_path / "first"), dense, tmp_path / "from-checkpoint")
    expected = folder_bytes(tmp_path / "first")
    assert {"config.json", "model.safetensors", "dicer_plan.json", "dicer_plan.safetensors"} < expected.keys()
    for again in ("second", "applied", "from-checkpoint"):
        assert folder_bytes(tmp_path / again) == expected
    assert first.plan.files() == dicer.load_plan(tmp_path / "plan").files()


def test_no_file_of_the_output_names_a_folder_of_this_machine(tmp_path, recipe):
    own = tmp_path / "mine.py"
    own.write_text("import dicer\n\n@dicer.criterion('mine', source='me')\ndef mine(w, s):\n    return w.up.sum(1)\n")
    dense = save_tiny(tmp_path / "dense", shards=True)
    text = tmp_path / "text.txt"
    text.write_text("All happy families are alike. " * 40)
    asked = recipe(
        method=None, criterion=f"{own}:mine", grouping="similarity", calib=str(text), seq_len=16, layers="1-2"
    )
    dicer.prune(dense, asked, output=tmp_path / "out", perplexity_text=str(text))
    files = folder_bytes(tmp_path / "out")
    assert "mine.py:mine (sha256" in files["dicer_plan.json"].decode()
    loaded, tokenizer = (auto.from_pretrained(dense) for auto in (AutoModelForCausalLM, AutoTokenizer))
    dicer.prune(loaded, asked, tokenizer=tokenizer, output=tmp_path / "from-memory")
    dicer.prune(loaded, asked, tokenizer=tokenizer).model.save_pretrained(tmp_path / "saved")
    files |= {
        f"{out}/{name}": c for out in ("from-memory", "saved") for name, c in folder_bytes(tmp_path / out).items()
    }
    assert {"from-memory/tokenizer_config.json", "saved/config.json"} < files.keys()
    assert [name for name, content in files.items() if str(tmp_path).encode() in content] == []


def test_a_plan_is_refused_for_other_weights_and_for_another_family(tmp_path, recipe):
    plan = dicer.make_plan(save_tiny(tmp_path / "llama"), recipe())
    with pytest.raises(PlanError, match="made for other weights"):
        dicer.apply_plan(plan, save_tiny(tmp_path / "other", seed=1), tmp_path / "out")
    with pytest.raises(PlanError, match=r"made for a 'llama' model .* this is a 'mistral'"):
        dicer.apply_plan(plan, save_tiny(tmp_path / "mistral", "mistral"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# 5. a model in memory


@pytest.mark.parametrize("case", FEWER)
def test_pruning_in_memory_equals_pruning_the_folder(case, tmp_path, recipe):
    family, model = case_model(case)
    dense = save_tiny(tmp_path / "dense", family, **case_options(case)[1])
    in_memory, from_folder = dicer.prune(model, recipe(layers="1-2")), dicer.prune(dense, recipe(layers="1-2"))
    assert in_memory.plan.model["fingerprint"] == from_folder.plan.model["fingerprint"]
    assert in_memory.plan.files()["dicer_plan.safetensors"] == from_folder.plan.files()["dicer_plan.safetensors"]
    assert (in_memory.before, in_memory.after) == (from_folder.before, from_folder.after)
    assert_same_tensors(in_memory.model.state_dict(), from_folder.model.state_dict())
    dicer.prune(model, recipe(layers="1-2"), tokenizer=tiny_tokenizer(), output=tmp_path / "out")
    dicer.apply_plan(in_memory.plan, dense, tmp_path / "applied")
    assert_same_tensors(tensors_in(tmp_path / "out"), tensors_in(tmp_path / "applied"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits_of(loaded), logits_of(from_folder.model))


def footprint(model):
    """Everything about a model that pruning could leave changed."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

    def held(tensor):
        return None if tensor is None else (tensor.data_ptr(), tensor.detach().numpy().tobytes())

    return {
        "state": {name: held(t) for name, t in model.state_dict().items()},
        "gradients": {name: held(p.grad) for name, p in model.named_parameters()},
        "flags": {name: p.requires_grad for name, p in model.named_parameters()},
        "gradient hooks": [n for n, p in model.named_parameters() if p._post_accumulate_grad_hooks],
        "hooks": {name: [len(getattr(m, h)) for h in hooks] for name, m in model.named_modules()},
        "forwards": {name: m.__dict__.get("forward") for name, m in model.named_modules()},
        "training": {name: m.training for name, m in model.named_modules()},
        "config": model.config.to_dict(),
    }


def parts_that_differ(before, after):
    return [part for part in before if before[part] != after[part]]


@pytest.mark.parametrize("method", ["rc-a", "sim-dominant", "taylor"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt"])
def test_the_model_in_memory_is_left_as_it_was(family, method, recipe):
    model = tiny_model(family).train()
    layers = decoder_layers(model, family)
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 > 0)
    model(input_ids=tiny_tokens(2, 8)).logits.sum().backward()
    layers[1].forward = layers[1].forward  # a forward of the layer's own, as accelerate gives it
    layers[3].eval()
    layers[2].register_forward_hook(lambda *_: None)
    before = footprint(model)
    dicer.prune(model, recipe(method=method, layers="1-2", gradient_checkpointing=True))
    assert parts_that_differ(before, footprint(model)) == []


def test_a_model_is_left_as_it_was_also_when_scoring_fails(recipe):
    model = tiny_model("llama")
    layers = decoder_layers(model, "llama")
    before = footprint(model)

    def broken(*_):
        raise RuntimeError("the device is lost")

    handle = layers[2].mlp.down_proj.register_forward_hook(broken)
    for method in ("rc-a", "taylor"):
        with pytest.raises(RuntimeError, match="the device is lost"):
            dicer.prune(model, recipe(method=method, gradient_checkpointing=True))
    handle.remove()
    assert parts_that_differ(before, footprint(model)) == []


def test_gradients_that_the_model_already_holds_do_not_enter_the_scores(recipe):
    clean, used = tiny_model("llama"), tiny_model("llama")
    used(input_ids=tiny_tokens(2, 8)).logits.sum().backward()
    scores = [dicer.prune(model, recipe(method="taylor")).plan.mlp[1].scores for model in (clean, used)]
    assert torch.equal(*scores)


def test_dropout_is_off_while_a_model_in_training_mode_is_scored_and_measured(recipe):
    model = tiny_model("gpt2", resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)
    quiet = [dicer.prune(model, recipe(method=m)).plan.files() for m in ("rc-a", "taylor")]
    value = dicer.perplexity(model, tiny_tokens())
    model.train()
    assert [dicer.prune(model, recipe(method=m)).plan.files() for m in ("rc-a", "taylor")] == quiet
    assert dicer.perplexity(model, tiny_tokens()) == value
    assert model.training


# 6. what is already pruned


@every_family
def test_a_checkpoint_whose_widths_differ_can_be_pruned_again(family, tmp_path, recipe):
    dense = save_tiny(tmp_path / "dense", family)
    dicer.prune(dense, recipe(layers="1-2"), output=tmp_path / "once")
    twice = dicer.prune(tmp_path / "once", recipe(ratio=0.5), output=tmp_path / "twice")
    assert {i: (p.units, len(p.keep)) for i, p in twice.plan.mlp.items()} == {
        0: (40, 20), 1: (30, 15), 2: (30, 15), 3: (40, 20)
    }  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "twice")
    assert family_of(family).widths(model.config) == [20, 15, 15, 20]
    in_memory = dicer.prune(AutoModelForCausalLM.from_pretrained(tmp_path / "once"), recipe(ratio=0.5))
    assert torch.equal(logits_of(in_memory.model), logits_of(model))
    assert in_memory.after == twice.after


@every_family
def test_pruning_the_other_layers_too_ends_in_a_stock_checkpoint(family, tmp_path, recipe):
    dense = save_tiny(tmp_path / "dense", family)
    dicer.prune(dense, recipe(layers="1-2"), output=tmp_path / "once")
    dicer.prune(tmp_path / "once", recipe(layers="0,3"), output=tmp_path / "twice")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "twice")
    assert type(model).__module__.startswith("transformers.models.")
    assert not (tmp_path / "twice" / "modeling_pruned.py").exists()
    assert family_of(family).widths(model.config) == [30] * LAYERS


# 7. how the weights lie on disk


def test_old_gpt2_names_without_their_prefix_give_the_same_model(tmp_path, recipe):
    new = save_tiny(tmp_path / "new", "gpt2", tied=True)
    old = shutil.copytree(new, tmp_path / "old")
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(new / "model.safetensors").items()}
    assert "h.0.mlp.c_fc.weight" in tensors
    save_file(tensors, old / "model.safetensors", metadata={"format": "pt"})
    for folder in (new, old):
        dicer.prune(folder, recipe(layers="1-2"), output=folder.with_name(f"{folder.name}-pruned"))
    pruned = {f"transformer.{name}": t for name, t in tensors_in(tmp_path / "old-pruned").items()}
    assert_same_tensors(pruned, tensors_in(tmp_path / "new-pruned"))
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("old-pruned", "new-pruned")]
    assert torch.equal(*map(logits_of, models))
    in_memory = dicer.prune(old, recipe(layers="1-2")).model
    assert torch.equal(logits_of(in_memory), logits_of(models[0]))


def test_old_buffers_and_tied_copies_are_neither_counted_nor_written(tmp_path, recipe):
    """Causal masks in old GPT-2 files, and a head that is tied."""
    clean = save_tiny(tmp_path / "clean", "gpt2", tied=True)
    old = shutil.copytree(clean, tmp_path / "old")
    tensors = load_file(clean / "model.safetensors")
    tensors |= {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, POSITIONS, POSITIONS) for i in range(LAYERS)}
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    save_file(tensors, old / "model.safetensors", metadata={"format": "pt"})
    how = recipe(axis="all", ratio_of="decoder", ratio=0.4, criterion="weight-l2", width_multiple=1)
    results = [dicer.prune(folder, how, output=folder.with_suffix(".out")) for folder in (clean, old)]
    assert results[0].before == results[1].before
    assert results[0].after == results[1].after
    assert_same_tensors(tensors_in(tmp_path / "clean.out"), tensors_in(tmp_path / "old.out"))
    note = "5 tensors that are no part of the model are left out"
    assert [any(note in line for line in result.notes) for result in results] == [False, True]


@every_family
def test_shards_and_a_single_file_give_the_same_result(family, tmp_path, recipe):
    shards = save_tiny(tmp_path / "shards", family, shards=True)
    single = save_tiny(tmp_path / "single", family)
    assert len(list(shards.glob("model-*.safetensors"))) > 3
    assert (single / "model.safetensors").is_file()
    results = [dicer.prune(f, recipe(layers="1-2"), output=tmp_path / f"{f.name}-out") for f in (shards, single)]
    assert results[0].plan.model["fingerprint"] == results[1].plan.model["fingerprint"]
    assert_same_tensors(tensors_in(tmp_path / "shards-out"), tensors_in(tmp_path / "single-out"))
    assert results[0].plan.files()["dicer_plan.safetensors"] == results[1].plan.files()["dicer_plan.safetensors"]


def test_a_tensor_that_no_config_calls_for_is_copied_and_a_missing_one_is_an_error(tmp_path, recipe):
    dense = save_tiny(tmp_path / "dense")
    tensors = load_file(dense / "model.safetensors")
    save_file({**tensors, "extra.buffer": torch.arange(3)}, dense / "model.safetensors", metadata={"format": "pt"})
    dicer.apply_plan(dicer.make_plan(dense, recipe(method="weight-l2")), dense, tmp_path / "out")
    assert torch.equal(tensors_in(tmp_path / "out")["extra.buffer"], torch.arange(3))
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"'model.layers.2.mlp.up_proj.weight' is missing"):
        dicer.prune(dense, recipe())


def test_a_tokenizer_named_by_the_model_type_alone_still_loads_from_a_pruned_folder(tmp_path):
    """Old GPT-2 folders have vocab.json and merges.txt, and nothing says which class reads them but the model type."""
    folder = tmp_path / "model"
    tiny_model("gpt2").save_pretrained(folder)
    alphabet = {character: i for i, character in enumerate(sorted(ByteLevel.alphabet()), start=4)}
    (folder / "vocab.json").write_text(json.dumps({"<|endoftext|>": 0, **alphabet}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    before = AutoTokenizer.from_pretrained(folder)
    dicer.prune(folder, dicer.Recipe(layers="1-2", seq_len=24, samples=2), output=tmp_path / "out")
    after = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert type(after) is type(before)
    assert after("Two words.")["input_ids"] == before("Two words.")["input_ids"] != []


def test_layers_come_back_in_order_also_beyond_nine(tmp_path):
    layers = {i: LayerPlan(3, torch.tensor([0, 2]), torch.rand(3)) for i in range(8, 13)}
    PrunePlan({"name": "x", "model_type": "llama", "fingerprint": "f"}, {"method": None}, {}, {}, {"mlp": layers}).save(
        tmp_path
    )
    assert list(dicer.load_plan(tmp_path).mlp) == [8, 9, 10, 11, 12]


def test_the_pruned_model_shares_no_memory_with_the_dense_one_and_generates_as_it_did():
    dense = tiny_model("llama", tied=True)
    dense.generation_config.max_new_tokens = 77
    pruned = dicer.prune(dense, dicer.Recipe(method="weight-l2", layers="1-2")).model
    assert not {p.data_ptr() for p in dense.parameters()} & {p.data_ptr() for p in pruned.parameters()}
    assert pruned.generation_config.max_new_tokens == 77


def test_the_generation_config_of_a_folder_reaches_the_model_in_memory(tmp_path):
    folder = save_tiny(tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6], "repetition_penalty": 1.3}))
    pruned = dicer.prune(folder, dicer.Recipe(method="weight-l2")).model
    assert (pruned.generation_config.eos_token_id, pruned.generation_config.repetition_penalty) == ([5, 6], 1.3)


@pytest.mark.parametrize("wrong", ["nothing", "module", "headless", "classifier"])
def test_what_is_no_language_model_is_refused(wrong):
    dense = tiny_model("llama")
    given = {"nothing": None, "module": torch.nn.Linear(2, 2), "headless": dense.model}
    given["classifier"] = LlamaForSequenceClassification(dense.config)
    with pytest.raises(ModelError, match=r"is no transformers model|cannot be pruned"):
        dicer.prune(given[wrong])


def test_a_recipe_cannot_move_a_model_in_memory():
    with pytest.raises(dicer.DicerError, match="asks for dtype bfloat16, and the model in memory has float32"):
        dicer.prune(tiny_model("llama"), dicer.Recipe(method="weight-l2", dtype="bfloat16"))


def test_taylor_in_half_precision_finds_nearly_what_float32_finds():
    model, tokens = tiny_model("llama"), tiny_tokens(8, 64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    kept = {}
    for dtype in (torch.float32, torch.float16):
        store = ResidentStore(copy.deepcopy(model).to(dtype), family_of("llama"))
        found = store.gradients(tokens.split(2), [1], ["mlp"], checkpointing=False, progress=lambda *_: None)[1]["mlp"]
        kept[dtype] = (found.up * model.model.layers[1].mlp.up_proj.weight.detach()).abs().sum(1)
    torch.testing.assert_close(kept[torch.float16], kept[torch.float32], rtol=0.02, atol=1e-5)


def test_one_layers_sums_are_gone_before_the_next_layer_has_any():
    alive: list[weakref.ref] = []
    most = []
    visits = walk(
        ResidentStore(tiny_model("llama"), family_of("llama")),
        range(LAYERS),
        tiny_tokens().split(3),
        needs={Need("gram", "mod")},
        progress=lambda *_: most.append(sum(ref() is not None for ref in alive)),
    )
    for visit in visits:
        alive.append(weakref.ref(visit.axes["mlp"].sums))
        del visit
    assert most == [0] * LAYERS


def test_plans_that_keep_the_same_but_merge_differently_differ(tmp_path):
    folder = save_tiny(tmp_path / "model")
    plans = [dicer.make_plan(folder, dicer.Recipe(method=m, seq_len=24, samples=2)) for m in ("sim-a", "sim-mean")]
    assert len(plans[0].diff(plans[1])) == LAYERS
    assert plans[1].diff(plans[1]) == []


def test_loading_what_is_not_there_is_one_clear_line():
    with pytest.raises(ModelError, match="cannot be loaded"):
        dicer.load("/nonexistent/model")
