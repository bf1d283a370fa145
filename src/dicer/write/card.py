"""The model card of a pruned checkpoint: what was done, what it measured, how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping

from dicer.ask.axes import AXES
from dicer.decide.plan import PrunePlan
from dicer.model.sizes import Sizes


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
    kinds = [
        AXES[axis].units for axis, layers in plan.axes.items() if any(len(p.keep) < p.units for p in layers.values())
    ]
    return " and ".join([*kinds, *(["whole layers"] if plan.blocks else [])]) or "nothing"


def _widths(plan: PrunePlan) -> list[str]:
    rows = {index: [f"| {index} | whole layer | | removed |"] for index in plan.blocks}
    for axis, layers in plan.axes.items():
        for index, layer in layers.items():
            rows.setdefault(index, []).append(f"| {index} | {AXES[axis].units} | {layer.units} | {len(layer.keep)} |")
    return [row for _, found in sorted(rows.items()) for row in found]


def model_card(
    plan: PrunePlan,
    *,
    before: Sizes,
    after: Sizes,
    needs_code: bool,
    perplexities: Mapping[str, float],
    perplexity_text: str | None,
) -> str:
    """Markdown with front matter; no time and no path, so that the same run gives the same bytes."""
    recipe, name = plan.recipe, plan.model["name"]
    base = f"base_model: {name}\n" if "/" in name else ""
    method = recipe["method"] or "a combination of its own"
    rows = size_rows(before, after)
    sizes = "\n".join(f"| {what} | {a:,} | {b:,} | {b / a:.1%} |" for what, a, b in rows)
    widths = "\n".join(_widths(plan))
    settings = "\n".join(f"- {key}: `{value}`" for key, value in sorted(recipe.items()) if value is not None)
    if perplexities:
        quality = (
            f"Token perplexity on `{perplexity_text}`, first windows side by side: "
            f"{perplexities['before']:.3f} before, {perplexities['after']:.3f} after pruning."
        )
    else:
        quality = "Not measured when this checkpoint was written."
    code = (
        "Layers differ in width, so the folder carries a small model file (`modeling_pruned.py`, transformers 5.14 or "
        "newer); with `import dicer` no flag is needed."
        if needs_code
        else "All layers have one width: a stock checkpoint, no code."
    )
    return f"""---
{base}library_name: transformers
pipeline_tag: text-generation
tags:
- dicer
- pruning
---

# {name.rsplit("/", 1)[-1]}, pruned with dicer

Structured pruning of `{name}` by the method `{method}`: {_what(plan)}; they are gone from the weight matrices.
`dicer_plan.json` and `dicer_plan.safetensors` say what stayed, with every score, and make it again: `dicer apply`.

| | before | after | left |
| --- | --- | --- | --- |
{sizes}

## Quality

{quality}

## Loading

```python
import transformers
{loading_line("this folder", needs_code=needs_code)}
{tokenizer_line("this folder", needs_code=needs_code)}
```

{code}

## Recipe

{settings}

Calibration: {", ".join(f"{k} {v}" for k, v in sorted(plan.calibration.items())) or "none needed"}.

## Widths

| layer | of | before | after |
| --- | --- | --- | --- |
{widths}
"""
