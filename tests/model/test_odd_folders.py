"""Folders and objects that are not what their config says: scored as they are written, or named for what they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import LAYERS, save_tiny, tiny_model, tiny_tokens
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import dicer
from dicer.errors import ModelError
from dicer.model.source import from_memory, load_any, open_model
from dicer.model.tensors import INDEX, WEIGHTS

HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"
WEIGHT_ONLY = dicer.Recipe(method="weight-l2", layers="1-2", ratio=0.1)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    base = tmp_path_factory.mktemp("odd")
    return {
        "llama": save_tiny(base / "llama"),
        "tied": save_tiny(base / "tied", tied=True),
        "gpt2": save_tiny(base / "gpt2", "gpt2", tied=True),
        "opt": save_tiny(base / "opt", "opt", tied=True),
        "gemma2": save_tiny(base / "gemma2", "gemma2", tied=True),
        "shards": save_tiny(base / "shards", shards=True),
    }


@pytest.fixture
def copy(kept, tmp_path):
    return lambda name="llama": Path(shutil.copytree(kept[name], tmp_path / "model"))


def edit(folder, change):
    tensors = load_file(folder / WEIGHTS)
    save_file(change(dict(tensors)) or tensors, folder / WEIGHTS, metadata={"format": "pt"})


def config(folder, **values):
    said = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps({k: v for k, v in said.items() if v is not None}))


def renamed(rule):
    return lambda tensors: {rule(name): tensor for name, tensor in tensors.items()}


def without(*parts):
    return lambda tensors: {n: t for n, t in tensors.items() if not any(part in n for part in parts)}


def more(**added):
    return lambda tensors: tensors | {n.replace("__", "."): t for n, t in added.items()}


def adapter(folder, weights=True):
    """What peft writes of rank 2 on one projection."""
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "base_model_name_or_path": "x"}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    if weights:
        save_file(
            {f"{prefix}A.weight": torch.ones(2, 32), f"{prefix}B.weight": torch.ones(32, 2)},
            folder / "adapter_model.safetensors",
        )


def own_code(name="OwnForCausalLM", **more):
    return lambda f: config(f, auto_map={"AutoModelForCausalLM": f"modeling_own.{name}"} | more)


def on_weights(change):
    return lambda folder: edit(folder, change)


def second_set(folder, *, seed=1, shards=True):
    """Shards of another model beside the single file."""
    tiny_model("llama", seed=seed).save_pretrained(folder / "other", max_shard_size="20KB")
    for file in (folder / "other").iterdir():
        if file.name.startswith("model") and (shards or file.name == INDEX):
            shutil.move(file, folder / file.name)
    shutil.rmtree(folder / "other")


def only(*names):
    def keep(folder):
        for file in folder.iterdir():
            if file.name not in names:
                file.unlink()

    return keep


def both(*steps):
    return lambda folder: [step(folder) for step in steps]


PACKED = torch.zeros(4, 8, dtype=torch.int32)
ATTENTION_2 = "model.layers.2.self_attn"

REFUSED = {
    # an adapter
    "adapter beside": (adapter, ["adapter beside its weights", "merge"]),
    "adapter config beside": (lambda f: adapter(f, weights=False), ["adapter beside its weights"]),
    "adapter beside shards": (both(second_set, adapter), ["adapter beside its weights"]),
    "adapter alone": (both(only(), adapter), ["holds an adapter alone", "merge"]),
    "adapter with a tokenizer": (both(only("tokenizer.json"), adapter), ["holds an adapter alone"]),
    "lora in the weights": (
        on_weights(more(model__layers__0__self_attn__q_proj__lora_A__weight=torch.ones(2, 32))),
        ["never merged"],
    ),
    "lora around the weights": (
        on_weights(renamed(lambda n: n.replace("q_proj.", "q_proj.base_layer."))),
        ["base_layer", "never merged"],
    ),
    # two sets of weights
    "two sets": (second_set, ["two different sets of weights", "transformers loads the first", "Move one"]),
    "two sets, one smaller": (
        both(second_set, on_weights(without("lm_head"))),
        ["two different sets of weights"],
    ),
    "weights of a key": (lambda f: config(f, transformers_weights="other.safetensors"), ["transformers_weights"]),
    "shards without index": (lambda f: (f / WEIGHTS).rename(f / "model-00001-of-00001.safetensors"), ["no model.safe"]),
    "consolidated": (lambda f: (f / WEIGHTS).rename(f / "consolidated.safetensors"), ["original release"]),
    "a variant": (lambda f: (f / WEIGHTS).rename(f / "model.fp16.safetensors"), ["renamed model.safetensors"]),
    "gguf in a folder": (lambda f: (f / WEIGHTS).rename(f / "m.gguf"), ["give the .gguf file itself"]),
    # prefixes
    "compiled": (on_weights(renamed(lambda n: f"_orig_mod.{n}")), ["torch.compile", "'_orig_mod.'"]),
    "layers compiled": (
        on_weights(renamed(lambda n: n.replace("layers.1.", "layers.1._orig_mod."))),
        ["torch.compile", "'_orig_mod.'"],
    ),
    "ddp": (on_weights(renamed(lambda n: f"module.{n}")), ["DDP", "'module.'"]),
    "ddp of compiled": (on_weights(renamed(lambda n: f"module._orig_mod.{n}")), ["'module._orig_mod.'"]),
    "peft": (on_weights(renamed(lambda n: f"base_model.model.{n}")), ["peft", "'base_model.model.'"]),
    "vision-language": (on_weights(renamed(lambda n: f"language_model.{n}")), ["vision-language", "'language_model.'"]),
    "vision-language, inner": (
        on_weights(renamed(lambda n: n.replace("model.", "model.language_model.", 1))),
        ["vision-language", "language_model"],
    ),
    "unknown prefix": (on_weights(renamed(lambda n: f"student.net.{n}")), ["'student.net.'", "take"]),
    # quantized without a word in the config
    "gptq": (
        on_weights(
            lambda t: (
                without(f"{ATTENTION_2}.q_proj.weight")(t)
                | {f"{ATTENTION_2}.q_proj.{k}": PACKED.clone() for k in ("qweight", "qzeros", "g_idx", "scales")}
            )
        ),
        ["quantized weights", "GPTQ"],
    ),
    "awq": (
        on_weights(lambda t: {n.replace("proj.weight", "proj.qweight"): x for n, x in t.items()}),
        ["quantized weights"],
    ),
    "bitsandbytes": (
        on_weights(lambda t: t | {f"{ATTENTION_2}.q_proj.weight.absmax": torch.ones(8)}),
        ["quantized weights", "bitsandbytes"],
    ),
    "compressed tensors": (
        on_weights(renamed(lambda n: n.replace("up_proj.weight", "up_proj.weight_packed"))),
        ["quantized weights"],
    ),
    "fp8 scales": (
        on_weights(lambda t: t | {f"{ATTENTION_2}.q_proj.weight_scale_inv": torch.ones(1)}),
        ["quantized weights"],
    ),
    "hqq": (on_weights(renamed(lambda n: n.replace("up_proj.weight", "up_proj.W_q"))), ["quantized weights"]),
    "quanto": (
        on_weights(renamed(lambda n: n.replace("up_proj.weight", "up_proj.weight._data"))),
        ["quantized weights"],
    ),
    # other heads
    "classifier": (lambda f: config(f, architectures=["LlamaForSequenceClassification"]), ["LlamaForSequenceCl"]),
    "token classifier": (lambda f: config(f, architectures=["LlamaForTokenClassification"]), ["no language model"]),
    "score in place of the head": (
        on_weights(lambda t: without(HEAD)(t) | {"score.weight": torch.ones(1, 32)}),
        ["'score.weight'", "reward model"],
    ),
    "score beside the head": (on_weights(more(score__weight=torch.ones(1, 32))), ["'score.weight'", "reward model"]),
    "value head": (on_weights(more(v_head__summary__weight=torch.ones(1, 32))), ["'v_head.summary.weight'"]),
    "no head": (on_weights(without(HEAD)), ["language-model head", "AutoModelForCausalLM"]),
    # dropped elsewhere
    "llm-drop": (
        both(lambda f: config(f, drop_attn_list=[2], drop_mlp_list=[]), on_weights(without(ATTENTION_2))),
        ["LLM-Drop", "attention of layers [2]", "--allocate"],
    ),
    "llm-drop, mlp": (lambda f: config(f, drop_mlp_list=[0, 3]), ["LLM-Drop", "MLP of layers [0, 3]"]),
    "dropped attention": (on_weights(without(ATTENTION_2)), ["attention of layer 2", "--allocate"]),
    "dropped mlp": (on_weights(without("layers.0.mlp", "layers.1.mlp")), ["mlp of layer 0, mlp of layer 1"]),
    "dropped layer": (on_weights(without("layers.1.")), ["all of layer 1"]),
    "last layers gone": (on_weights(without("layers.2.", "layers.3.")), ["last 2 of 4 layers", "must say 2"]),
    # code of its own
    "own code": (own_code(), ["modelling code of its own (modeling_own.OwnForCausalLM", "take auto_map out"]),
    "own config, stock model": (
        lambda f: config(f, auto_map={"AutoConfig": "c.OwnConfig", "AutoModelForCausalLM": "m.LlamaForCausalLM"}),
        ["modelling code of its own (c.OwnConfig"],
    ),
    "another family's class": (own_code("MistralForCausalLM"), ["modelling code of its own"]),
    "another task, own class": (
        own_code("LlamaForCausalLM", AutoModelForSequenceClassification="m.OwnClassifier"),
        ["modelling code of its own (m.OwnClassifier"],
    ),
    "named without a class for each": (lambda f: config(f, auto_map="m.LlamaForCausalLM"), ["modelling code"]),
    "stock name, other tensors": (
        both(own_code("LlamaForCausalLM"), on_weights(more(extra__weight=torch.ones(3)))),
        ["does not read 'extra.weight'", "it is another model"],
    ),
    "stock name, other tensors in a layer": (
        both(own_code("LlamaForCausalLM"), on_weights(lambda t: t | {f"{ATTENTION_2}.scale": torch.ones(1)})),
        ["has no such tensor"],
    ),
    "own config": (lambda f: config(f, auto_map={"AutoConfig": "configuration_own.OwnConfig"}), ["configuration_own"]),
    "own code of a repository": (
        lambda f: config(f, auto_map={"AutoModelForCausalLM": "owner/name--modeling_own.Own"}),
        ["owner/name--modeling_own.Own"],
    ),
    "code called as ours": (
        lambda f: config(f, auto_map={"AutoModelForCausalLM": "modeling_pruned.PrunedLlamaForCausalLM"}),
        ["modelling code of its own"],
    ),
    # other layouts
    "original release": (
        on_weights(lambda t: {f"layers.{i}.attention.wq.weight": torch.ones(2, 2) for i in range(LAYERS)}),
        ["no name is one of a LlamaForCausalLM", "original release"],
    ),
    "fused": (
        on_weights(lambda t: without("2.self_attn.q_proj")(t) | {f"{ATTENTION_2}.W_pack.weight": torch.ones(96, 32)}),
        ["W_pack.weight' in its place"],
    ),
    "bias that no config calls for": (
        on_weights(lambda t: t | {f"{ATTENTION_2}.q_proj.bias": torch.ones(32)}),
        ["has no such tensor"],
    ),
    "norm that no config calls for": (
        on_weights(lambda t: t | {f"{ATTENTION_2}.q_norm.weight": torch.ones(8)}),
        ["has no such tensor"],
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_by_what_it_is(copy, kind):
    change, says = REFUSED[kind]
    folder = copy()
    change(folder)
    with pytest.raises(ModelError) as caught:
        open_model(folder)
    line = str(caught.value)
    assert "\n" not in line
    assert all(word in line for word in says), line
    assert "fetch the model again" not in line.lower() or kind in ("no head", "last layers gone")


def test_fetched_again_where_nothing_else_explains_it(copy):
    folder = copy()
    edit(folder, without("layers.1.mlp.up_proj"))
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight' is missing .* Fetch the model again\."):
        open_model(folder)


# Code of a model's own, by the names that transformers has itself

STOCK = {"AutoConfig": "configuration_x.{}Config", "AutoModelForCausalLM": "modeling_x.{}ForCausalLM"}
NAMED = {
    "config and model": ("Llama", STOCK),
    "phi3": ("Phi3", STOCK),
    "of a repository": ("Llama", {"AutoModelForCausalLM": "owner/name--modeling_llama.LlamaForCausalLM"}),
    "gpt2": ("GPT2", {"AutoModelForCausalLM": "modeling_x.GPT2LMHeadModel", "AutoModel": "modeling_x.GPT2Model"}),
    "tokenizer and other tasks": (
        "Llama",
        STOCK
        | {
            "AutoTokenizer": ["x.OwnTokenizer", None],
            "AutoModelForSequenceClassification": "m.{}ForTokenClassification",
        },
    ),
}


@pytest.mark.parametrize("kind", NAMED)
def test_code_by_stock_names(tmp_path, kind):
    """As transformers without the flag, so dicer: its own class, and a note; what is written is the same as without."""
    stem, named = NAMED[kind]
    plain = save_tiny(tmp_path / "plain", stem.lower())
    folder = shutil.copytree(plain, tmp_path / "named")
    auto_map = {auto: name.format(stem) if isinstance(name, str) else name for auto, name in named.items()}
    config(folder, auto_map=auto_map, attention_scale=0.0, unknown_switch=False, rope_theta=1e4)
    (folder / "modeling_x.py").write_text("raise RuntimeError")
    results = [dicer.prune(f, WEIGHT_ONLY, output=f.with_suffix(".out")) for f in (plain, folder)]
    (note,) = (note for note in results[1].notes if "code of the model's own" in note)
    assert "is not taken along; transformers knows nothing of attention_scale in config.json" in note
    assert not any("own" in note for note in results[0].notes)
    out = [f.with_suffix(".out") for f in (plain, folder)]
    assert (out[0] / WEIGHTS).read_bytes() == (out[1] / WEIGHTS).read_bytes()
    assert [f.name for f in out[1].glob("*.py")] == ["modeling_pruned.py"]
    said = [json.loads((f / "config.json").read_text()) for f in out]
    assert said[0]["auto_map"] == said[1]["auto_map"]


def test_code_by_stock_names_in_memory(copy, tmp_path, monkeypatch):
    """There it has run already, and a name says nothing of what it does."""
    folder = copy()
    config(folder, auto_map={"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"})
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    named = type("LlamaForCausalLM", (type(model),), {"__module__": "transformers_modules.x.modeling_llama"})
    model.__class__ = named
    with pytest.raises(ModelError, match="modelling code of its own"):
        from_memory(model)


# Tied tensors, and copies


def logits(path):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(path).eval()(tiny_tokens(2)).logits


def cosine(first, second):
    return torch.nn.functional.cosine_similarity(first.flatten(), second.flatten(), 0).item()


def test_doubled_prefix(copy, kept):
    """transformers takes one away, and so does dicer."""
    folder = copy()
    edit(folder, renamed(lambda n: f"model.{n}"))
    assert open_model(folder).fingerprint == open_model(kept["llama"]).fingerprint
    assert torch.equal(logits(folder), logits(kept["llama"]))


NAMES = {
    "tied": (EMBED, HEAD),
    "gemma2": (EMBED, HEAD),
    "gpt2": ("transformer.wte.weight", HEAD),
    "opt": ("model.decoder.embed_tokens.weight", HEAD),
}


def store(tensors, names, how):
    embed, head = names
    values = tensors.pop(embed)
    stored = {
        "embeddings": {embed: values},
        "head": {head: values},
        "both": {embed: values, head: values.clone()},
        "own": {embed: values, head: values.flip(0).contiguous()},
    }[how]
    return tensors | stored


@pytest.mark.parametrize("how", ["embeddings", "head", "both", "own"])
@pytest.mark.parametrize("name", NAMES)
def test_tied_tensors_under_either_name(copy, tmp_path, name, how):
    folder = copy(name)
    edit(folder, lambda tensors: store(tensors, NAMES[name], how))
    result = dicer.prune(folder, WEIGHT_ONLY, output=tmp_path / "out")
    assert any("tie_word_embeddings" in note for note in result.notes) == (how == "own")
    written = load_file(tmp_path / "out" / WEIGHTS)
    assert (HEAD in written, NAMES[name][0] in written) == (how == "own", True)
    before, after = logits(folder), logits(tmp_path / "out")
    assert cosine(before, after) > 0.8
    if how == "own":
        assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    memory = dicer.prune(AutoModelForCausalLM.from_pretrained(folder), WEIGHT_ONLY)
    with torch.no_grad():
        assert torch.equal(memory.model(tiny_tokens(2)).logits, after)
    assert memory.plan.model["fingerprint"] == result.plan.model["fingerprint"]


@pytest.mark.parametrize(
    "change",
    [
        lambda f: second_set(f, seed=0),
        lambda f: second_set(f, shards=False),
        lambda f: (f / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(load_file(f / WEIGHTS), WEIGHTS)})),
        lambda f: shutil.copy(f / WEIGHTS, f / "consolidated.safetensors"),
        lambda f: (f / "pytorch_model.bin").write_bytes(b"pickle"),
    ],
    ids=["the same set twice", "index left behind", "index of one file", "consolidated beside", "pickle beside"],
)
def test_one_set_of_weights(copy, kept, change):
    folder = copy()
    change(folder)
    assert open_model(folder).fingerprint == open_model(kept["llama"]).fingerprint


def test_tensors_outside_the_layers(copy, tmp_path):
    folder = copy()
    edit(folder, more(extra__weight=torch.ones(3)))
    result = dicer.prune(folder, WEIGHT_ONLY, output=tmp_path / "out")
    assert "1 tensors that transformers does not load are copied as they are (extra.weight ...)" in result.notes


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (lambda f: config(f, architectures=["OwnForCausalLM"]), "config.json calls the model a OwnForCausalLM; it is"),
        (lambda f: (f / "modeling_own.py").write_text(OWN), "modeling_own.py lies in the folder, and config.json does"),
        (lambda f: config(f, architectures=["LlamaForCausalLM"]), None),
        (lambda f: config(f, architectures=None), None),
    ],
)
def test_hints_at_other_code(copy, change, note):
    folder = copy()
    change(folder)
    notes = open_model(folder).notes
    assert [line.startswith(note) for line in notes] == [True] if note else notes == ()


# What transformers loads against what is written


@pytest.mark.parametrize("what", ["content", "permuted", "rounded", "one value", "shape", "more"])
def test_what_nobody_has_thought_of(copy, monkeypatch, what):
    """Whatever comes between the files and the model: here it is done to the loaded one."""
    source, load = open_model(copy()), LlamaForCausalLM.from_pretrained

    def other(*args, **named):
        model = load(*args, **named)
        weight = model.model.layers[1].mlp.up_proj.weight.data
        if what == "more":
            model.model.layers[1].register_parameter("more", nn.Parameter(torch.ones(2)))
        if what == "shape":
            model.model.layers[1].mlp.up_proj.weight = nn.Parameter(weight[:-1].clone())
        changed = {
            "content": weight * 2,
            "permuted": weight.flip(0),
            "rounded": weight.bfloat16().float(),
            "one value": weight.index_fill(0, torch.tensor([7]), 0.5),
        }.get(what)
        if changed is not None:
            model.model.layers[1].mlp.up_proj.weight.data = changed
        return model

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", other)
    with pytest.raises(ModelError, match=r"model: transformers loads .* save it anew, and give that folder\."):
        source.load_model()


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16", "float64"])
def test_the_same_in_any_dtype(copy, dtype):
    folder = copy()
    edit(folder, lambda t: t | {HEAD: t[HEAD].index_fill(0, torch.tensor([3]), float("nan"))})
    assert open_model(folder).load_model(dtype).dtype == (torch.float32 if dtype == "auto" else getattr(torch, dtype))


def test_adapter_beside_a_measured_model(copy):
    folder = copy()
    adapter(folder)
    with pytest.raises(ModelError, match="adapter beside its weights"):
        load_any(folder)


# Models in memory


class Holder(nn.Module):
    """As DistributedDataParallel and DeepSpeed hold a model."""

    def __init__(self, model):
        super().__init__()
        self.module = model


class Peft(Holder):
    """As peft holds one."""

    config = SimpleNamespace(model_type="llama")

    def merge_and_unload(self):
        return self.module


def offloaded(kept, tmp_path, device="disk"):
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places |= {f"model.layers.{i}": device if i == 2 else "cpu" for i in range(LAYERS)}
    return AutoModelForCausalLM.from_pretrained(kept["llama"], device_map=places, offload_folder=tmp_path / "disk")


def with_base_layers(model):
    for layer in model.model.layers:
        layer.mlp.up_proj.base_layer = layer.mlp.up_proj
        layer.mlp.up_proj = nn.Sequential()
        layer.mlp.up_proj.base_layer = nn.Linear(32, 40, bias=False)
    return model


def compiled_layer(model):
    model.model.layers[1] = torch.compile(model.model.layers[1])
    return model


def dynamic(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


def eight_bit(model):
    weight = model.model.layers[0].mlp.up_proj
    weight.weight = nn.Parameter(torch.zeros(40, 32, dtype=torch.int8), requires_grad=False)
    return model


def eight_bit_floats(model):
    weight = model.model.layers[0].mlp.up_proj
    weight.weight = nn.Parameter(weight.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    return model


def sharded(model):
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.zeros(0))
    return model


def cut_by_hand(model):
    for name in ("up_proj", "gate_proj"):
        getattr(model.model.layers[1].mlp, name).weight = nn.Parameter(torch.zeros(8, 32))
    return model


def tracked(model):
    class Packed(nn.Parameter):
        pass

    weight = model.model.layers[0].mlp.up_proj
    weight.weight = Packed(weight.weight.data)
    return model


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (torch.compile, "inside torch.compile"),
        (compiled_layer, "torch.compile"),
        (Holder, "inside a Holder; give its .module"),
        (nn.DataParallel, "inside a DataParallel; give its .module"),
        (Peft, r"merge_and_unload\(\)"),
        (with_base_layers, "never merged"),
        (lambda model: model.to("meta"), "not in memory"),
        (dynamic, "quantiz"),
        (eight_bit, "holds .* as int8"),
        (tracked, "holds .* as Packed"),
        (eight_bit_floats, "holds .* as float8_e4m3fn"),
        (sharded, "holds .* as Parameter: quantized or shared out"),
        (cut_by_hand, "config calls for 40 in dimension 0 of .*layers.1.*, and the tensor has 8"),
        (lambda model: SimpleNamespace(model=model), "inside a SimpleNamespace; give its .model"),
        (lambda model: model.model, "no class of transformers with a language-model head"),
        (lambda model: None, "no transformers model"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor:UserWarning")
def test_models_in_memory(make, says):
    with pytest.raises(ModelError, match=says) as caught:
        from_memory(make(tiny_model("llama")))
    assert "\n" not in str(caught.value)


def test_offloaded_model(kept, tmp_path):
    with pytest.raises(ModelError, match=r"has 'model\.layers\.2\..*' not in memory \(offloaded"):
        dicer.prune(offloaded(kept, tmp_path), WEIGHT_ONLY)


OWN = """from transformers import LlamaForCausalLM

class OwnForCausalLM(LlamaForCausalLM):
    pass
"""


def test_own_code_in_memory(copy, monkeypatch, tmp_path):
    folder = copy()
    (folder / "modeling_own.py").write_text(OWN)
    own_code()(folder)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with pytest.raises(ModelError, match=r"has modelling code of its own \(.*modeling_own\.OwnForCausalLM"):
        from_memory(model)
    named: dict = {}
    exec(OWN, named)
    result = dicer.prune(named["OwnForCausalLM"](tiny_model("llama").config), WEIGHT_ONLY)
    note = "the model is a OwnForCausalLM; what is made of it is a LlamaForCausalLM, without its own code"
    assert note in result.notes


def test_untied_by_hand():
    model = tiny_model("llama", tied=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.flip(0).clone())
    result = dicer.prune(model, WEIGHT_ONLY)
    assert torch.equal(result.model.lm_head.weight, model.lm_head.weight)
    assert model.config.tie_word_embeddings
