"""Tokens, their kinds and scores, merges, special ids and templates in a GGUF file; tokenizers that have no name."""

from __future__ import annotations

import hashlib
import json

import pytest
from reading import MERGES, File, know_tiny_tokenizer, merging_tokenizer, save_sentence_piece, save_stock
from sentencepiece import SentencePieceProcessor
from tiny import VOCABULARY
from transformers import AddedToken, AutoTokenizer

from dicer.errors import ModelError
from dicer.model.source import open_model
from dicer.write.export.llama_cpp.file import export_gguf
from dicer.write.export.llama_cpp.tokenizer import known_pre_tokenizers

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def exported(folder, out):
    file = File(export_gguf(open_model(folder), out / "model.gguf", overwrite=True).path)
    return {
        name.removeprefix("tokenizer."): value for name, value in file.keys.items() if name.startswith("tokenizer.")
    }


@pytest.fixture
def _known(monkeypatch):
    know_tiny_tokenizer(monkeypatch)


@pytest.mark.usefixtures("_known")
def test_byte_level(tmp_path):
    said = exported(save_stock(tmp_path / "model"), tmp_path)
    assert (said["ggml.model"], said["ggml.pre"]) == ("gpt2", "gpt-2")
    assert said["ggml.tokens"] == merging_tokenizer().convert_ids_to_tokens(range(VOCABULARY))
    assert said["ggml.token_type"] == [CONTROL] * 4 + [NORMAL] * (VOCABULARY - 4)
    assert said["ggml.merges"] == [f"{a} {b}" for a, b in MERGES]
    ids = {"bos": 1, "eos": 2, "unknown": 3, "padding": 0}
    assert {kind: said[f"ggml.{kind}_token_id"] for kind in ids} == ids
    assert (said["ggml.add_bos_token"], said["ggml.add_eos_token"]) == (False, False)
    assert "chat_template" not in said


@pytest.mark.usefixtures("_known")
@pytest.mark.parametrize("form", ["pairs", "strings"])
def test_both_forms_of_merges(tmp_path, form):
    folder = save_stock(tmp_path / "model")
    held = json.loads((folder / "tokenizer.json").read_text())
    pairs = [list(pair) for pair in MERGES]
    held["model"]["merges"] = pairs if form == "pairs" else [" ".join(pair) for pair in pairs]
    (folder / "tokenizer.json").write_text(json.dumps(held))
    assert exported(folder, tmp_path)["ggml.merges"] == [f"{a} {b}" for a, b in MERGES]


@pytest.mark.usefixtures("_known")
@pytest.mark.parametrize(("special", "kind"), [(True, CONTROL), (False, USER)])
def test_added_tokens_and_rows_without_one(tmp_path, special, kind):
    folder = save_stock(tmp_path / "model", vocab_size=VOCABULARY + 5)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken("<|new|>", special=special, normalized=False)], special_tokens=special)
    tokenizer.save_pretrained(folder)
    said = exported(folder, tmp_path)
    assert said["ggml.tokens"][VOCABULARY:] == ["<|new|>", *(f"[PAD{VOCABULARY + i}]" for i in range(1, 5))]
    assert said["ggml.token_type"][VOCABULARY:] == [kind] + [UNUSED] * 4


@pytest.mark.usefixtures("_known")
@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, True), (True, True), (False, False)])
def test_what_is_put_around_a_text(tmp_path, monkeypatch, bos, eos):
    folder = save_stock(tmp_path / "model")
    held = json.loads((folder / "tokenizer.json").read_text())
    single = [*[{"SpecialToken": {"id": "<s>", "type_id": 0}}] * bos, {"Sequence": {"id": "A", "type_id": 0}}]
    single += [{"SpecialToken": {"id": "</s>", "type_id": 0}}] * eos
    specials = {token: {"id": token, "ids": [i], "tokens": [token]} for i, token in ((1, "<s>"), (2, "</s>"))}
    template = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": specials}
    held["post_processor"] = template
    (folder / "tokenizer.json").write_text(json.dumps(held))
    text, names = known_pre_tokenizers()
    around = AutoTokenizer.from_pretrained(folder).encode(text)
    names = {**names, hashlib.sha256(str(around).encode()).hexdigest(): "gpt-2"}
    monkeypatch.setattr("dicer.write.export.llama_cpp.tokenizer.known_pre_tokenizers", lambda: (text, names))
    said = exported(folder, tmp_path)
    assert (said["ggml.add_bos_token"], said["ggml.add_eos_token"]) == (bos, eos)


@pytest.mark.usefixtures("_known")
@pytest.mark.parametrize("template", ["{{ messages[0].content }} é", {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}])
def test_chat_template(tmp_path, template):
    folder = save_stock(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    said = exported(folder, tmp_path)
    if isinstance(template, str):
        assert said["chat_template"] == template
    else:
        assert (said["chat_template"], said["chat_template.tool_use"]) == ("{{ 1 }}", "{{ 2 }}")


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_sentence_piece(tmp_path, family):
    folder = save_stock(tmp_path / "model", family, tied=True, vocab_size=310)
    save_sentence_piece(folder)
    said = exported(folder, tmp_path)
    pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    count = pieces.vocab_size()
    assert (said["ggml.model"], said["ggml.pre"]) == ("llama", "default")
    assert said["ggml.tokens"][:count] == [pieces.id_to_piece(i) for i in range(count)]
    assert said["ggml.scores"][:count] == [pieces.get_score(i) for i in range(count)]
    bytes_ = [i for i in range(count) if pieces.is_byte(i)]
    assert len(bytes_) == 256
    kinds = {0: UNKNOWN, 1: CONTROL, 2: CONTROL} | dict.fromkeys(bytes_, BYTE)
    assert said["ggml.token_type"] == [kinds.get(i, NORMAL) for i in range(count)] + [UNUSED] * (310 - count)
    assert said["ggml.add_space_prefix"] is True
    assert "ggml.merges" not in said


def test_sentence_piece_without_its_file(tmp_path):
    """Pieces are merged in the order of their scores, so the order is what must be right."""
    folder = save_stock(tmp_path / "model", vocab_size=310)
    save_sentence_piece(folder)
    with_file = exported(folder, tmp_path)
    (folder / "tokenizer.model").unlink()
    said = exported(folder, tmp_path)
    assert said["ggml.tokens"] == with_file["ggml.tokens"]
    assert said["ggml.token_type"] == with_file["ggml.token_type"]
    merged = [i for i, kind in enumerate(said["ggml.token_type"]) if kind == NORMAL and len(said["ggml.tokens"][i]) > 1]
    assert len(merged) > 10
    orders = [sorted(merged, key=lambda i: (-scores["ggml.scores"][i], i)) for scores in (said, with_file)]
    assert orders[0] == orders[1]


# What has no name


@pytest.mark.parametrize("form", ["unknown cut", "no merges", "unigram", "no tokenizer", "unigram file", "broken file"])
def test_tokenizer_that_llama_cpp_does_not_have(tmp_path, monkeypatch, form):
    folder = save_stock(tmp_path / "model")
    held = json.loads((folder / "tokenizer.json").read_text())
    says = {
        "unknown cut": "is none of the .* that llama.cpp has a name for",
        "no merges": "merges nothing",
        "unigram": "neither byte-level BPE",
        "no tokenizer": "has no tokenizer",
        "unigram file": "is no BPE",
        "broken file": "tokenizer.model cannot be read",
    }[form]
    if form == "no merges":
        held["model"]["merges"] = []
        (folder / "tokenizer.json").write_text(json.dumps(held))
    if form == "unigram":
        held["model"] = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]]}
        (folder / "tokenizer.json").write_text(json.dumps(held))
    if form == "no tokenizer":
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).unlink()
    if form.endswith("file"):
        save_sentence_piece(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        monkeypatch.setattr("dicer.model.source.ModelSource.tokenizer", lambda _: tokenizer)
        if form == "unigram file":
            save_sentence_piece(tmp_path / "other", kind="unigram", size=280)
            (folder / "tokenizer.model").write_bytes((tmp_path / "other" / "tokenizer.model").read_bytes())
        else:
            (folder / "tokenizer.model").write_bytes(b"not a model")
        held = json.loads((folder / "tokenizer.json").read_text())
    with pytest.raises(ModelError, match=says):
        exported(folder, tmp_path)
    assert not (tmp_path / "model.gguf").exists()


# The name, from which llama.cpp takes how Phi-3's tokens treat spaces


@pytest.mark.usefixtures("_known")
@pytest.mark.parametrize(
    ("folder", "strips", "name"),
    [
        ("my-phi3", False, "my-Phi_3"),
        ("Phi-3-mini", True, "Phi-3-mini"),
        ("out", True, "out (Phi-3)"),
        ("out", False, "out"),
    ],
)
def test_name(tmp_path, folder, strips, name):
    folder = save_stock(tmp_path / folder, vocab_size=VOCABULARY + 2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = [AddedToken("<|endoftext|>", special=True), AddedToken("<|user|>", special=True, rstrip=strips)]
    tokenizer.add_tokens(tokens, special_tokens=True)
    tokenizer.save_pretrained(folder)
    assert File(export_gguf(open_model(folder), tmp_path / "a.gguf").path).keys["general.name"] == name


def test_table_of_names():
    text, names = known_pre_tokenizers()
    assert len(text) == 350
    assert {len(digest) for digest in names} == {64}
    assert {"llama-bpe", "gpt-2", "qwen2", "smollm", "tekken"} <= set(names.values())
