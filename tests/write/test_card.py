"""The model card: what it says, and that no name makes it say more."""

from __future__ import annotations

import re

import pytest
import torch
from huggingface_hub import ModelCard

from dicer.decide.plan import LayerPlan, PrunePlan
from dicer.model.sizes import Sizes
from dicer.write.card import model_card

BEFORE = Sizes(4000, 3000, {"attention": 1000, "mlp": 2000}, 16000)
AFTER = Sizes(3000, 2000, {"attention": 1000, "mlp": 1000}, 12000)
CODE = {"needs_code": False, "targets": "Loads in all.", "perplexities": {}, "perplexity_text": None}


def _plan(name="org/model", **recipe):
    layer = LayerPlan(4, torch.tensor([0, 2]), torch.arange(4.0))
    told = {"method": "own", "ratio": 0.25, "allocate": None, **recipe}
    return PrunePlan({"name": name}, told, {"source": "builtin", "samples": 10}, {}, {"mlp": {1: layer}}, (3,))


def _card(plan, **more):
    return model_card(plan, before=BEFORE, after=AFTER, **CODE | more)


CARD = """---
base_model: org/model
library_name: transformers
pipeline_tag: text-generation
tags:
- dicer
- pruning
---

# model, pruned with dicer

Structured pruning of `org/model` by the method `own`: neurons and whole layers; they are gone from the weight matrices.
`dicer_plan.json` and `dicer_plan.tensors` say what stayed, with every score, and make it again: `dicer apply`.

| | before | after | left |
| --- | --- | --- | --- |
| parameters | 4,000 | 3,000 | 75.0% |
| in decoder layers | 3,000 | 2,000 | 66.7% |
| in MLP neurons | 2,000 | 1,000 | 50.0% |
| bytes of weights | 16,000 | 12,000 | 75.0% |

## Quality

Not measured when this checkpoint was written.

## Loading

```python
import transformers
model = transformers.AutoModelForCausalLM.from_pretrained("this folder")
tokenizer = transformers.AutoTokenizer.from_pretrained("this folder")
```

All layers have one width: a stock checkpoint, no code.
Loads in all.

## Recipe

- method: `own`
- ratio: `0.25`

Calibration: samples 10, source builtin.

## Widths

| layer | of | before | after |
| --- | --- | --- | --- |
| 1 | neurons | 4 | 2 |
| 3 | whole layer | | removed |
"""


def test_whole_card():
    assert _card(_plan()) == CARD


def test_model_file():
    card = _card(_plan(), needs_code=True)
    assert card.count("trust_remote_code=True") == 2
    assert "`modeling_pruned.py`, transformers 5.14 or newer" in card


def test_quality():
    card = _card(_plan(), perplexities={"before": 12.34567, "after": 20.0}, perplexity_text="a`b.txt")
    assert "perplexity on `` a`b.txt ``, first windows side by side: 12.346 before, 20.000 after pruning." in card


def test_nothing_read():
    plan = _plan(method=None)
    bare = PrunePlan(plan.model, plan.recipe, {}, {}, plan.axes)
    assert "Calibration: none needed." in _card(bare)
    assert "by the method `a combination of its own`: neurons;" in _card(bare)


@pytest.mark.parametrize("name", ["model", "builtin:smollm2", "x.gguf"])
def test_no_base_model_without_an_owner(name):
    assert ModelCard(_card(_plan(name))).data.base_model is None


HOSTILE = [
    "a/b\nlicense: mit",
    "a/b\r---\r\n# c",
    "a/: [x, {y}] # &z *y !t",
    "a/'q\" \\ '",
    "a/\u2028license: mit\x85license: mit\x07",
    "a/<img src=x>[c](http://d)![e](f)|`g`",
    "a/``b`",
    "\ud800/b",
]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_name(hostile):
    """It stays one value of the front matter, one heading and one piece of code."""
    card = _card(_plan(hostile, criterion=hostile))
    data = ModelCard(card).data.to_dict()
    assert data.keys() == {"base_model", "library_name", "pipeline_tag", "tags"}
    assert data["base_model"] == " ".join(re.sub(r"[\s\x07\ud800]", " ", hostile).split())
    assert len(card.splitlines()) == len(CARD.splitlines()) + 1  # the criterion
    plain = re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)|\\.", "", card.split("---\n", 2)[2])
    assert not re.search(r"[<\[*`]", plain.replace("```python", "").replace("```", ""))
    card.encode()


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_provenance(hostile):
    plan = _plan()
    told = PrunePlan(plan.model, {**plan.recipe, hostile: 1}, {hostile: hostile}, {}, plan.axes, plan.blocks)
    assert len(_card(told).splitlines()) == len(CARD.splitlines()) + 1
