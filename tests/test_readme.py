"""README is true where it can be tried in a second."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny import NEURONS, save_tiny

import dicer
from dicer.ask.methods import PRESETS
from dicer.write.export.llama_cpp.arch import ARCHS
from dicer.write.targets import IN_VLLM

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_criterion_of_the_readme(tmp_path):
    (block,) = (block for block in BLOCKS if "@dicer.criterion" in block)
    assert len(block.strip().splitlines()) <= 10
    (tmp_path / "mine.py").write_text(block)
    model = save_tiny(tmp_path / "model")
    recipe = dicer.Recipe(
        criterion=f"{tmp_path}/mine.py:act_times_down", activation="mod", grouping="random", seq_len=24, samples=2
    )
    plan = dicer.make_plan(model, recipe)
    assert all(len(layer.keep) == NEURONS * 3 // 4 for layer in plan.mlp.values())
    assert plan.recipe["criterion"].startswith("mine.py:act_times_down")


@pytest.mark.parametrize("name", PRESETS)
def test_row_of_every_preset(name):
    assert re.search(rf"^\| `{name}`", README, flags=re.MULTILINE)


def test_families_of_the_readme():
    (listed,) = re.findall(r"- GGUF files are written of ([\w, ]+);", README)
    assert set(listed.split(", ")) == ARCHS.keys()
    assert set(IN_VLLM) == ARCHS.keys() - {"gpt2"} | {"opt"}
