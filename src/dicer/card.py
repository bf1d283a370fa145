"""The model card of a pruned checkpoint: what was done, what it measured, how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping

from dicer.plan import PrunePlan
from dicer.surgery import Sizes


def loading_line(folder: str, *, needs_code: bool) -> str:
    """The one line of Python that loads a checkpoint where dicer is not installed."""
    return f"model = transformers.AutoModelForCausalLM.from_pretrained({_arguments(folder, needs_code)})"


def tokenizer_line(folder: str, *, needs_code: bool) -> str:
    """Its tokenizer; without the flag transformers would stop and ask, though the tokenizer itself needs no code."""
    return f"tokenizer = transformers.AutoTokenizer.from_pretrained({_arguments(folder, needs_code)})"


def _arguments(folder: str, needs_code: bool) -> str:
    return json.dumps(folder, ensure_ascii=False) + (", trust_remote_code=True" if needs_code else "")


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
    rows = [
        ("parameters", before.parameters, after.parameters),
        ("parameters in MLP neurons", before.mlp, after.mlp),
        ("bytes of weights", before.nbytes, after.nbytes),
    ]
    sizes = "\n".join(f"| {what} | {a:,} | {b:,} | {b / a:.1%} |" for what, a, b in rows)
    widths = "\n".join(f"| {i} | {layer.units} | {len(layer.keep)} |" for i, layer in sorted(plan.mlp.items()))
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

Structured pruning of MLP neurons of `{name}` by the method `{method}`; the neurons are gone from the weight matrices.
`dicer_plan.json` and `dicer_plan.safetensors` say which neurons stayed, with every score, and make it again:
`dicer apply`.

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

| layer | neurons before | after |
| --- | --- | --- |
{widths}
"""
