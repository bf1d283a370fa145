"""GGUF files read back by gguf-py: their keys and their tensors as float32."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from safetensors.torch import load_file
from tiny import tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

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


def know_tiny_tokenizer(patch: pytest.MonkeyPatch) -> None:
    """Let the tiny tokenizer be one of those that are known: it cuts text as GPT-2 does."""
    text, names = tokenizer.known_pre_tokenizers()
    digest = hashlib.sha256(str(tiny_tokenizer().encode(text)).encode()).hexdigest()
    assert digest not in names
    patch.setattr(tokenizer, "known_pre_tokenizers", lambda: (text, {**names, digest: "gpt-2"}))


def save_shaped(folder: Path, stock: Path, layers: dict[int, dict[str, Any]], **more: Any) -> Path:
    """A checkpoint of dicer's with given layers, random; ``layers`` is its ``per_layer_config``."""
    config = AutoConfig.from_pretrained(stock).to_dict()
    kind = config.pop("model_type")
    config |= {"per_layer_config": {f"{i:03d}": own for i, own in layers.items()}, **more}
    config["allow_global_per_layer_attribute_access"] = True
    torch.manual_seed(1)
    shaped = AutoConfig.for_model(f"pruned_{kind}", **{k: v for k, v in config.items() if k != "architectures"})
    model = AutoModelForCausalLM.from_config(shaped).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Everything that a one-file checkpoint holds."""
    return load_file(folder / "model.safetensors")
