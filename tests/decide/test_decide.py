"""One walk for many tasks: the plan of each is the one that it would have had alone."""

from __future__ import annotations

import pytest
import torch
from tiny import LAYERS, tiny_model, tiny_tokens

from dicer.ask.compute import Compute
from dicer.ask.recipe import Recipe
from dicer.decide.decide import score
from dicer.decide.task import prepare, with_text
from dicer.errors import RecipeError
from dicer.measure.stores.resident import ResidentStore
from dicer.measure.text import Calibration
from dicer.model.source import from_memory


class Counted(ResidentStore):
    """Knows in which batches it recorded, and which layers were taken."""

    def record(self, batches):
        self.rows.append([len(batch) for batch in batches])
        return super().record(batches)

    def layer(self, index, then=None):
        self.taken.append(index)
        return super().layer(index, then)


@pytest.fixture(scope="module")
def source():
    return from_memory(tiny_model("llama"))


@pytest.fixture
def store(source):
    found = Counted(source.live, source.family)
    found.rows, found.taken = [], []
    return found


@pytest.fixture
def task(source):
    def make(size=None, tokens=None, **asked):
        known = Calibration(tiny_tokens() if tokens is None else tokens, {"source": "a test"})
        return with_text(prepare(source, Recipe(**asked), Compute(batch_size=size)), read=lambda _: known)

    return make


MANY = [
    {},
    {"method": "sim-mean", "layers": "0-1"},
    {"method": "taylor", "axis": "all"},
    {"method": "act-mean", "compensate": "bias"},
    {"method": "random", "seed": 3},
    {"method": "sim-dominant", "allocate": "global"},
    {"method": "let-llm"},
]


@pytest.mark.usefixtures("own_cache")
def test_many_as_each_alone(store, task):
    tasks = [task(size=4, **asked) for asked in MANY]
    together = score(tasks, store)
    for plan, one in zip(together, tasks, strict=True):
        assert plan.files() == score([one], store)[0].files()


def test_one_pass_over_the_tokens(store, task):
    score([task(), task(method="act-mean"), task(method="weight-l2", layers="3")], store)
    assert (len(store.rows), store.taken) == (1, list(range(LAYERS)))
    store.taken.clear()
    score([task(layers="1"), task(layers="0,2")], store)
    assert store.taken == [0, 1, 2]  # none behind the last that is chosen
    store.rows.clear()
    store.taken.clear()
    score([task(method="weight-l2", layers="3")], store)
    assert (store.rows, store.taken) == ([], [3])  # weights alone need no pass
    score([task(method="sim-a", allocate="global")], store)
    assert len(store.rows) == 2  # scores first, and Gram matrices again for how many stay


def test_smallest_of_the_batch_sizes(store, task):
    score([task(size=4), task(size=None), task(size=5, method="act-mean")], store)
    score([task()], store)
    assert store.rows == [[4, 2], [6]]


def test_different_tokens(store, task):
    with pytest.raises(RecipeError, match="must share their calibration tokens; score these apart"):
        score([task(), task(tokens=tiny_tokens(seed=1))], store)
    score([task(), task(method="weight-l2", tokens=tiny_tokens(seed=1))], store)  # which looks at none
    assert torch.equal(*(score([task(size=size)], store)[0].mlp[1].keep for size in (6, None)))
