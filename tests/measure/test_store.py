"""The seam that streaming needs: a store that makes its layers one at a time gives the same plans and profiles."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from tiny import LAYERS, save_tiny, tiny_tokens
from transformers import AutoModelForCausalLM

from dicer.ask.recipe import Recipe
from dicer.decide.decide import score
from dicer.decide.task import prepare, with_text
from dicer.measure.entropy.cache import entropy_profile
from dicer.measure.stores.resident import ResidentStore
from dicer.model.source import open_model


class LayerByLayer:
    """A Llama or Qwen2 whose layers are made from a folder's tensors when they are asked for, and gone afterwards."""

    def __init__(self, source):
        self.source, self.depth, self.made, self.alive = source, LAYERS, [], 0
        self.model = AutoModelForCausalLM.from_config(source.config).eval()
        self.kind = type(self.model.model.layers[0])
        self.model.model.layers = torch.nn.ModuleList(torch.nn.Identity() for _ in range(LAYERS))
        self.model.load_state_dict({n: source.tensors.read(n) for n in source.tensors.infos() if ".layers." not in n})
        self.rest = ResidentStore(self.model, source.family)
        self.computes, self.axes = self.rest.computes, self.rest.axes
        self.final_norm, self.record = self.rest.final_norm, self.rest.record

    @contextmanager
    def layer(self, index):
        prefix, names = f"model.layers.{index}.", self.source.tensors.infos()
        layer = self.kind(self.model.config, index).eval()
        layer.load_state_dict({n[len(prefix) :]: self.source.tensors.read(n) for n in names if n.startswith(prefix)})
        self.made.append(index)
        self.alive += 1
        assert self.alive == 1, "one layer at a time"
        yield layer
        self.alive -= 1
        for parameter in layer.parameters():
            parameter.data.fill_(torch.nan)  # whatever still looks at it shall be seen
        layer.to("meta")

    def gradients(self, *words, **options):
        return ResidentStore(self.source.load_model(), self.source.family).gradients(*words, **options)


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def source(request, tmp_path_factory):
    return open_model(save_tiny(tmp_path_factory.mktemp("model") / request.param, request.param))


@pytest.fixture(scope="module")
def stores(source):
    return ResidentStore(source.load_model(), source.family), LayerByLayer(source)


RECIPES = [
    {"method": "rc-a", "layers": "1-2"},
    {"method": "sim-dominant", "compensate": "bias"},
    {"method": "taylor", "axis": "all"},
    {"method": "sim-a", "allocate": "global"},  # whose Gram matrices are another walk
    {"method": "let-llm"},
    {"method": "weight-l2"},
]


@pytest.mark.parametrize("asked", RECIPES, ids=[" ".join(asked.values()) for asked in RECIPES])
def test_same_plan(source, stores, asked, calib, monkeypatch, tmp_path):
    task = with_text(prepare(source, Recipe(**asked, calib=calib)))
    plans = []
    for number, store in enumerate(stores):
        monkeypatch.setenv("DICER_CACHE", str(tmp_path / str(number)))
        plans.append(score([task], store)[0])
    assert plans[0].files() == plans[1].files()
    if asked["method"] == "rc-a":
        assert stores[1].made[-3:] == [0, 1, 2]  # and none behind the last that is chosen
    assert stores[1].alive == 0


@pytest.mark.parametrize("search", ["independent", "greedy"])
def test_same_profile(source, stores, search, monkeypatch, tmp_path):
    profiles = []
    for number, store in enumerate(stores):
        monkeypatch.setenv("DICER_CACHE", str(tmp_path / str(number)))
        profiles.append(entropy_profile(source, store, tiny_tokens(), search=search, batch_size=4))
    assert profiles[0] == profiles[1]
    caches = [[file.name for file in (tmp_path / str(i) / "entropy").iterdir()] for i in (0, 1)]
    assert caches[0] == caches[1], "either goes on where the other was killed"
