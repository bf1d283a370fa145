"""The model card of a pruned checkpoint: what was done, what it measured, how to load it."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from dicer.ask.axes import kind_of
from dicer.decide.plan import PrunePlan
from dicer.model.sizes import Sizes
from dicer.words import code, markdown, one_line


def loading_line(folder: str, *, needs_code: bool) -> str:
    """The one line of Python that loads a checkpoint where dicer is not installed."""
    return f"model = transformers.AutoModelForCausalLM.from_pretrained({_arguments(folder, needs_code)})"


def tokenizer_line(folder: str, *, needs_code: bool) -> str:
    """Its tokenizer; without the flag transformers would stop and ask, though the tokenizer itself needs no code."""
    return f"tokenizer = transformers.AutoTokenizer.from_pretrained({_arguments(folder, needs_code)})"


def _arguments(folder: str, needs_code: bool) -> str:
    return json.dumps(folder, ensure_ascii=False) + (", trust_remote_code=True" if needs_code else "")


def size_rows(before: Sizes, after: Sizes) -> list[tuple[str, int, int]]:
    """(what, before, after), counted from the tensors; parts that nothing was taken from are left out."""
    rows = [
        ("parameters", before.parameters, after.parameters),
        ("in decoder layers", before.decoder, after.decoder),
        ("in attention heads", before.attention, after.attention),
        ("in MLP neurons", before.mlp, after.mlp),
        ("bytes of weights", before.nbytes, after.nbytes),
    ]
    return [row for row in rows if row[1] != row[2] or row[0] in ("parameters", "bytes of weights")]


def _what(plan: PrunePlan) -> str:
    kinds = dict.fromkeys(
        kind_of(axis).units for axis, layers in plan.axes.items() if any(len(p.keep) < p.units for p in layers.values())
    )
    return " and ".join([*kinds, *(["whole layers"] if plan.blocks else [])]) or "nothing"


def _widths(plan: PrunePlan) -> list[str]:
    rows = {index: {f"| {index} | whole layer | | removed |": None} for index in plan.blocks}
    for axis, layers in plan.axes.items():
        for index, layer in layers.items():
            units = kind_of(axis).units + (" of each expert" if ".expert" in axis else "")
            rows.setdefault(index, {})[f"| {index} | {units} | {layer.units} | {len(layer.keep)} |"] = None
    return [row for _, found in sorted(rows.items()) for row in found]


def _score(score: Mapping[str, Any], digits: int = 3) -> str:
    """A number and its standard error, where one is known."""
    known = "" if score["stderr"] is None else f" ± {score['stderr']:.{digits}f}"
    return f"{score['value']:.{digits}f}{known}"


def model_card(
    plan: PrunePlan,
    *,
    before: Sizes,
    after: Sizes,
    needs_code: bool,
    targets: str,
    perplexities: Mapping[str, float],
    perplexity_text: str | None,
    fidelity: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """Markdown with front matter; no time and no path, so that the same run gives the same bytes."""
    import jinja2
    from huggingface_hub import ModelCardData

    name = one_line(plan.model["name"])
    front_matter = ModelCardData(
        base_model=name if "/" in name else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["dicer", "pruning"],
    )
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"text": markdown, "code": code, "score": _score}
    template = importlib.resources.files("dicer.write").joinpath("card.md.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        front_matter=front_matter.to_yaml(),
        name=name,
        what=_what(plan),
        sizes=size_rows(before, after),
        perplexities=perplexities,
        perplexity_text=perplexity_text,
        fidelity=fidelity,
        loading=loading_line("this folder", needs_code=needs_code),
        tokenizer=tokenizer_line("this folder", needs_code=needs_code),
        needs_code=needs_code,
        targets=targets,
        recipe=plan.recipe,
        calibration=plan.calibration,
        widths=_widths(plan),
    )
