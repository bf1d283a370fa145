"""A tokenizer in llama.cpp's words: byte-level BPE from tokenizer.json, SentencePiece from tokenizer.model."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from gguf import TokenType
from gguf.vocab import SentencePieceVocab

from dicer.errors import ModelError
from dicer.model.source import ModelSource
from dicer.reading import TABLES, read_bytes, read_json, reason

_SPECIAL = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")
_NO_SCORE = -1000.0  # of what no merge makes
_PHI3_NAME = re.compile("phi-?3", re.IGNORECASE)
_PHI3_TOKENS = {"</s>", "<unk>", "<s>", "<|endoftext|>"}
_BPE = 2  # sentencepiece's model_type; unigram is 1


@dataclass
class Vocabulary:
    """What a file says of its tokens.

    Attributes:
        model: ``gpt2`` (byte-level BPE) or ``llama`` (SentencePiece BPE).
        pre: name of the pre-tokenizer.
        tokens: one for every row of the embedding; rows that no token has are ``[PAD123]``, unused.
        types: what each is.
        scores: SentencePiece's, else None.
        merges: BPE's, best first, else None.
        flags: what is put in front or behind, by the writer's method (``bos_token``, ``space_prefix`` ...).
        special: kind -> id, of those that there are.
        template: the chat template, or several with their names.
        strips: added tokens swallow the spaces behind them, as Phi-3's do.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    flags: dict[str, bool] = field(default_factory=dict)
    special: dict[str, int] = field(default_factory=dict)
    template: Any = None
    strips: bool = False

    def named(self, name: str) -> str:
        """A model's name for the file: llama.cpp lets added tokens swallow spaces if and only if it has Phi-3 in it.

        So one that is called so without being one would not even load, and one that is no longer called so would have
        other tokens (its src/llama-vocab.cpp).
        """
        if self.strips and set(self.tokens) >= _PHI3_TOKENS:
            return name if _PHI3_NAME.search(name) else f"{name} (Phi-3)"
        return _PHI3_NAME.sub("Phi_3", name)

    def write(self, writer: Any) -> None:
        """Hand it to a ``GGUFWriter``."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        for name, flag in self.flags.items():
            getattr(writer, f"add_add_{name}")(flag)
        for kind, number in self.special.items():
            getattr(writer, f"add_{kind}_token_id")(number)
        if self.template:
            writer.add_chat_template(self.template)


def read_vocabulary(source: ModelSource, size: int) -> Vocabulary:
    """A model's tokenizer.

    Args:
        source: the model.
        size: rows of its embedding, as many as the file must name tokens.

    Raises:
        ModelError: there is none, or of a kind that llama.cpp does not have, or its way of cutting text is unknown.
    """
    tokenizer, folder = source.tokenizer(), source.folder
    if tokenizer is None or folder is None:
        raise ModelError(f"{source.name} has no tokenizer, and a GGUF holds one. Put its files beside the weights.")
    model = _json(folder / "tokenizer.json").get("model", {})
    if model.get("type") == "BPE" and not model.get("byte_fallback"):
        found = _byte_level(source, tokenizer, model, size)
    elif (folder / "tokenizer.model").is_file():
        found = _sentence_piece(source, folder, size)
    elif model.get("type") == "BPE":
        found = _from_merges(model, size)
    else:
        raise ModelError(
            f"{source.name}: its tokenizer ({model.get('type') or type(tokenizer).__name__}) is neither byte-level BPE "
            "(tokenizer.json) nor SentencePiece BPE (tokenizer.model), which are what llama.cpp has for such a model."
        )
    _complete(found, tokenizer)
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = read_json(path, TABLES)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {reason(error)}.") from None
    return found


def _empty(model: str, pre: str, size: int) -> Vocabulary:
    return Vocabulary(model, pre, [f"[PAD{i}]" for i in range(size)], [int(TokenType.UNUSED)] * size)


@cache
def known_pre_tokenizers() -> tuple[str, dict[str, str]]:
    """llama.cpp's test text, and: sha256 of the ids that a tokenizer makes of it -> name of the pre-tokenizer."""
    text = importlib.resources.files(__package__).joinpath("pre_tokenizers.json").read_text(encoding="utf-8")
    table = json.loads(text)
    return table["text"], table["names"]


def _byte_level(source: ModelSource, tokenizer: Any, model: dict[str, Any], size: int) -> Vocabulary:
    if not model["merges"]:
        raise ModelError(f"{source.name}: its tokenizer merges nothing, and llama.cpp loads none without merges.")
    text, names = known_pre_tokenizers()
    digest = hashlib.sha256(str(tokenizer.encode(text)).encode()).hexdigest()
    if digest not in names:
        raise ModelError(
            f"{source.name}: its way of cutting text before BPE ({digest[:12]}) is none of the {len(names)} that "
            "llama.cpp has a name for, and a wrong one would give other tokens. Export a model whose tokenizer was not "
            "changed, or ask llama.cpp for its name."
        )
    found = _empty("gpt2", names[digest], size)
    for token, number in model["vocab"].items():
        _put(found, number, token, TokenType.NORMAL)
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
    found.merges = [" ".join(part.replace(" ", "\u0120") for part in pair) for pair in pairs]
    return found


def _put(found: Vocabulary, number: int, token: str, kind: TokenType) -> None:
    if 0 <= number < len(found.tokens):
        found.tokens[number], found.types[number] = token, int(kind)


def _sentence_piece(source: ModelSource, folder: Path, size: int) -> Vocabulary:
    """Pieces, scores and types as the model file has them."""
    from sentencepiece import sentencepiece_model_pb2 as schema

    found = _empty("llama", "default", size)
    found.scores = [_NO_SCORE] * size
    try:
        proto = schema.ModelProto.FromString(read_bytes(folder / "tokenizer.model", TABLES))  # type: ignore[attr-defined]
        pieces = list(SentencePieceVocab(folder).all_tokens())
    except Exception as error:  # protobuf, sentencepiece and gguf each have their own kinds
        raise ModelError(f"{source.name}: tokenizer.model cannot be read: {error}.") from None
    if proto.trainer_spec.model_type != _BPE:
        raise ModelError(f"{source.name}: tokenizer.model is no BPE, and llama.cpp's SentencePiece is one.")
    for number, (token, score, kind) in enumerate(pieces[:size]):
        _put(found, number, token.decode(), kind)
        found.scores[number] = score
    return found


def _from_merges(model: dict[str, Any], size: int) -> Vocabulary:
    """SentencePiece without its file: a piece's score says when it is merged, as its place among the merges does."""
    found = _empty("llama", "default", size)
    found.scores = [_NO_SCORE * size] * size
    for token, number in model["vocab"].items():
        is_byte = re.fullmatch(r"<0x[0-9A-F]{2}>", token)
        _put(found, number, token, TokenType.BYTE if is_byte else TokenType.NORMAL)
    for rank, pair in enumerate(model["merges"]):
        number = model["vocab"].get("".join(pair.split(" ") if isinstance(pair, str) else pair), size)
        if number < size and found.scores[number] <= _NO_SCORE * size:
            found.scores[number] = -float(rank)
    return found


def _complete(found: Vocabulary, tokenizer: Any) -> None:
    """Added tokens, special ids, what the tokenizer puts around a text, and the chat template."""
    found.strips = any(token.rstrip for token in tokenizer.added_tokens_decoder.values())
    for number, token in tokenizer.added_tokens_decoder.items():
        _put(found, number, token.content, TokenType.CONTROL if token.special else TokenType.USER_DEFINED)
    for kind in _SPECIAL:
        number = getattr(tokenizer, f"{kind}_token_id", None)
        if number is not None and number < len(found.tokens):
            found.special[kind] = int(number)
    around, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    found.flags["bos_token"] = around[:1] != bare[:1] and around[0] == found.special.get("bos")
    found.flags["eos_token"] = around[-1:] != bare[-1:] and around[-1] == found.special.get("eos")
    if found.model == "llama":
        if "unk" in found.special:
            found.types[found.special["unk"]] = int(TokenType.UNKNOWN)
        found.flags["space_prefix"] = tokenizer.convert_ids_to_tokens(bare)[0].startswith("\u2581")
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    found.template = template
