"""A few-layer random model for every family, and a byte tokenizer, made in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from dicer.model.source import from_memory

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "gpt2", "opt")
# Decoder layers, attention's output projection, the MLP's: written down apart from the library's own table.
PLACES = dict.fromkeys(FAMILIES, ("model.layers", "self_attn.o_proj", "mlp.down_proj")) | {
    "gpt2": ("transformer.h", "attn.c_proj", "mlp.c_proj"),
    "opt": ("model.decoder.layers", "self_attn.out_proj", "fc2"),
}
LAYERS, HIDDEN, NEURONS, VOCABULARY, POSITIONS = 4, 32, 40, 264, 128


def tiny_config(family: str, *, tied: bool = False, kv_heads: int = 2, **more: Any) -> Any:
    """The family's config at a toy size; attention is GQA (4 heads, 2 groups) where the family has it."""
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "intermediate_size": NEURONS,
        "max_position_embeddings": POSITIONS,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": tied,
    }
    if family in ("qwen3", "gemma", "gemma2", "gemma3_text"):
        common["head_dim"] = 8
    if family in ("gemma2", "gemma3_text", "mistral"):
        common["sliding_window"] = 8  # shorter than the samples, so that full and sliding layers really differ
    if family == "gemma3_text":
        common["layer_types"] = ["sliding_attention", "full_attention"] * (LAYERS // 2)
    if family == "qwen2":
        common.update(use_sliding_window=True, sliding_window=8, max_window_layers=2)
    if family == "gpt2":
        for key in ("num_key_value_heads", "intermediate_size"):
            del common[key]
        common["n_inner"] = NEURONS
    if family == "opt":
        for key in ("num_key_value_heads", "intermediate_size"):
            del common[key]
        common.update(ffn_dim=NEURONS, word_embed_proj_dim=HIDDEN)
    return AutoConfig.for_model(family, **{**common, **more})


def tiny_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """A random model in eval mode, its weights large enough for activations and biases to matter."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.to(dtype)


def family_of(model: Any) -> Any:
    """What is found of a model in memory."""
    return from_memory(model).family


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, after the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{c: i for i, c in enumerate(alphabet, start=4)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def save_tiny(folder: Path, family: str = "llama", *, shards: bool = False, **options: Any) -> Path:
    """A tiny model's checkpoint folder, with its tokenizer; in several shards if asked."""
    model = tiny_model(family, **options)
    model.save_pretrained(folder, max_shard_size="20KB" if shards else "5GB")
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_tokens(samples: int = 6, length: int = 24, seed: int = 0) -> torch.Tensor:
    """Random token ids, int64 [samples, length]."""
    return torch.randint(4, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(seed))
