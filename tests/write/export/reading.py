"""GGUF files read back by gguf-py: their keys and their tensors as float32."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from safetensors.torch import load_file
from sentencepiece import SentencePieceTrainer
from tiny import save_tiny, tiny_tokenizer
from tokenizers import Tokenizer, models
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, LlamaTokenizer, PreTrainedTokenizerFast

from dicer.write.export.llama_cpp import tokenizer


class File:
    """Keys without the architecture's name in front, and tensors as torch has them."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.arch = reader.fields["general.architecture"].contents()
        self.keys: dict[str, Any] = {
            name.removeprefix(f"{self.arch}."): field.contents() for name, field in reader.fields.items()
        }
        self.types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        self.tensors = {
            tensor.name: torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))
            for tensor in reader.tensors
        }


MERGES = [("t", "h"), ("th", "e"), ("\u0120", "the"), ("\u0120", "a")]


def merging_tokenizer(merges: list[tuple[str, str]] = MERGES) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with a few merges, without which llama.cpp loads none."""
    plain = tiny_tokenizer()
    vocabulary = plain.get_vocab() | {a + b: len(plain) + i for i, (a, b) in enumerate(merges)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = plain.backend_tokenizer.pre_tokenizer, plain.backend_tokenizer.decoder
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def save_stock(folder: Path, family: str = "llama", **options: Any) -> Path:
    """A tiny stock checkpoint with that tokenizer."""
    save_tiny(folder, family, **options)
    merging_tokenizer().save_pretrained(folder)
    return folder


def know_tiny_tokenizer(patch: pytest.MonkeyPatch) -> None:
    """Let the tiny tokenizer be one of those that are known: it cuts text as GPT-2 does."""
    text, names = tokenizer.known_pre_tokenizers()
    digest = hashlib.sha256(str(merging_tokenizer().encode(text)).encode()).hexdigest()
    assert digest not in names
    patch.setattr(tokenizer, "known_pre_tokenizers", lambda: (text, {**names, digest: "gpt-2"}))


def save_shaped(folder: Path, stock: Path, layers: dict[int, dict[str, Any]], **more: Any) -> Path:
    """A checkpoint of dicer's with given layers, random; ``layers`` said as dicer 0.1 did, in ``per_layer_config``."""
    config = AutoConfig.from_pretrained(stock).to_dict()
    kind = config.pop("model_type")
    config |= {"per_layer_config": {f"{i:03d}": own for i, own in layers.items()}, **more}
    config["allow_global_per_layer_attribute_access"] = True
    torch.manual_seed(1)
    said = {key: value for key, value in config.items() if key != "architectures"} | {"model_type": f"pruned_{kind}"}
    shaped = CONFIG_MAPPING[f"pruned_{kind}"].from_dict(said)
    model = AutoModelForCausalLM.from_config(shaped).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    merging_tokenizer().save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Everything that a one-file checkpoint holds."""
    return load_file(folder / "model.safetensors")


TEXT = "the sun and the moon shine on the old stone house by the sea where the children sing all day long"


def save_sentence_piece(folder: Path, *, kind: str = "bpe", size: int = 300, file: bool = True) -> None:
    """A SentencePiece tokenizer with byte tokens, as Llama's; with its own file, or only with tokenizer.json."""
    folder.mkdir(exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    made = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 4),
        model_writer=made,
        vocab_size=size,
        model_type=kind,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(made.getvalue())
    if kind == "bpe":
        LlamaTokenizer.from_pretrained(folder, bos_token="<s>", add_bos_token=True).save_pretrained(folder)
        if not file:
            (folder / "tokenizer.model").unlink()
