"""A model that is read layer by layer gives the plans and profiles of one in memory, bit for bit."""

from __future__ import annotations

import itertools

import pytest
import torch
from families.tiny import tiny_input
from families.tiny import tiny_model as tiny_of_type
from tiny import FAMILIES, LAYERS, save_tiny, tiny_tokens

from dicer.ask.compute import Compute
from dicer.ask.recipe import Recipe
from dicer.decide.cost import foresee
from dicer.decide.decide import score
from dicer.decide.task import prepare, with_text
from dicer.errors import ModelError, RecipeError
from dicer.measure.entropy.cache import entropy_profile
from dicer.measure.stores.resident import ResidentStore
from dicer.measure.stores.streamed import StreamedStore
from dicer.measure.text import Calibration
from dicer.model.piecewise import OUTSIDE, Piecewise
from dicer.model.source import from_memory, open_model

pytestmark = pytest.mark.filterwarnings("ignore:.*torch_dtype")


def stores_of(source, dtype="auto"):
    return ResidentStore(source.load_model(dtype), source.family), StreamedStore(source, dtype)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """family, dtype -> a tiny model in several shards."""
    folder, made = tmp_path_factory.mktemp("models"), {}

    def source(family, dtype=torch.float32):
        if (family, dtype) not in made:
            path = folder / f"{family} {dtype}"
            made[family, dtype] = open_model(save_tiny(path, family, shards=True, dtype=dtype))
        return made[family, dtype]

    return source


@pytest.fixture(autouse=True)
def no_cache(monkeypatch, tmp_path):
    """A cache of transfer entropies for each plan, or the second would be read off the first."""
    numbers = iter(range(99))
    return lambda: monkeypatch.setenv("DICER_CACHE", str(tmp_path / str(next(numbers))))


RECIPES = {
    "rc-a of two layers": {"method": "rc-a", "layers": "1-2"},
    "all axes with bias": {"criterion": "act-l2", "activation": "mod", "axis": "all", "compensate": "bias"},
    "similarity": {"method": "sim-dominant"},
    "similarity, global": {"method": "sim-a", "allocate": "global"},  # whose Gram matrices are another walk
    "entropy": {"method": "let-llm"},
    "cosine": {"method": "rc-a", "allocate": "cosine"},
    "repair": {"criterion": "act-l2", "repair": "least-squares", "ridge": 0.01},
    "propagate": {"criterion": "act-l2", "propagate": "pruned"},
    "weights": {"method": "weight-l2"},
}


TARGET_DENSE = {"method": "best", "target": "dense", "ridge": 0.01}  # not where a norm follows the output projection


@pytest.mark.parametrize(
    ("asked", "family"),
    [*itertools.product(RECIPES, FAMILIES), *(("dense target", family) for family in ("llama", "gpt2", "opt"))],
)
def test_same_plan(sources, no_cache, asked, family, calib):
    source = sources(family)
    task, plans = with_text(prepare(source, Recipe(**RECIPES.get(asked, TARGET_DENSE), calib=calib))), []
    for store in stores_of(source):
        no_cache()
        plans.append(score([task], store)[0])
    assert plans[0].files() == plans[1].files()


@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_plan_bfloat16(sources, family, dtype, calib):
    source = sources(family, torch.bfloat16)
    task = with_text(prepare(source, Recipe(method="act-l2", axis="all", calib=calib), Compute(dtype=dtype)))
    plans = [score([task], store)[0] for store in stores_of(source, dtype)]
    assert plans[0].files() == plans[1].files()


# Maps that lie side by side in memory and one by one on disk, transposed ones, buffers that one module makes in others.
EXPERTS = ["qwen3_moe", "gpt_oss", "llama4_text", "deepseek_v3", "jamba"]


@pytest.mark.parametrize("axis", ["mlp", "experts"])
@pytest.mark.parametrize("model_type", EXPERTS)
def test_same_plan_experts(model_type, axis, tmp_path):
    tiny_of_type(model_type).save_pretrained(tmp_path / "model")
    source, plans = open_model(tmp_path / "model"), []
    known = Calibration(tiny_input(4), {"source": "a test"})
    criterion = {"axis": axis, "criterion": "act-l2" if axis == "mlp" else "reap"}
    for store in stores_of(source):
        plans.append(score([with_text(prepare(source, Recipe(**criterion)), read=lambda _: known)], store)[0])
    assert plans[0].files() == plans[1].files()


@pytest.mark.parametrize("model_type", ["falcon_h1", "gptj", "gpt_neo", "bloom", "gemma3", "zamba2", "olmo2"])
def test_same_states(model_type, tmp_path):
    """Buffers that are in no file: masks, positions, scales."""
    tiny_of_type(model_type).save_pretrained(tmp_path / "model")
    source, found = open_model(tmp_path / "model"), []
    for store in stores_of(source):
        recording = store.record([tiny_input()])
        with torch.no_grad():
            for index in range(store.depth):
                with store.layer(index) as layer:
                    args, kwargs = recording.arguments_of(recording.hidden[0])[index]
                    output = layer(recording.hidden[0], *args, **kwargs)
                    recording.hidden[0] = output[0] if isinstance(output, tuple) else output
            found.append(store.final_norm()(recording.hidden[0]))
    assert torch.equal(*found)


@pytest.mark.parametrize("search", ["independent", "greedy"])
def test_same_profile(sources, search, monkeypatch, tmp_path):
    source, profiles = sources("qwen2"), []
    for number, store in enumerate(stores_of(source)):
        monkeypatch.setenv("DICER_CACHE", str(tmp_path / str(number)))
        profiles.append(entropy_profile(source, store, tiny_tokens(), search=search, batch_size=4))
    assert profiles[0] == profiles[1]
    caches = [[file.name for file in (tmp_path / str(i) / "entropy").iterdir()] for i in (0, 1)]
    assert caches[0] == caches[1], "either goes on where the other was killed"


def there(store):
    return [i for i, layer in enumerate(store._layers) if not any(p.is_meta for p in layer.parameters())]


def test_one_layer_at_a_time(sources, calib, monkeypatch):
    """Two at most: the one in use and the next; none behind the last that is chosen, and none afterwards."""
    source, reads = sources("llama"), []
    store = StreamedStore(source)
    read = store._parts.read
    monkeypatch.setattr(store._parts, "read", lambda part: reads.append(part) or read(part))
    put, alive = store._parts.put, []
    monkeypatch.setattr(store._parts, "put", lambda tensors: (put(tensors), alive.append(there(store))))
    score([with_text(prepare(source, Recipe(method="rc-a", layers="1-2", calib=calib)))], store)
    assert reads == [OUTSIDE, 0, 1, 2]
    assert alive == [[], [0], [0], [1], [2]]  # the first also to record what layers are called with
    assert there(store) == []


def test_weights_read_only_where_chosen(sources, monkeypatch):
    source, reads = sources("llama"), []
    store = StreamedStore(source)
    read = store._parts.read
    monkeypatch.setattr(store._parts, "read", lambda part: reads.append(part) or read(part))
    score([prepare(source, Recipe(method="weight-l2", layers="1,3"))], store)
    assert reads == [1, 3]


def test_head_not_read(sources):
    parts = Piecewise(sources("llama"))
    names = [name for part in (OUTSIDE, *range(LAYERS)) for name in parts.names(part)]
    assert sorted([*names, "lm_head.weight"]) == sorted(sources("llama").tensors.infos())


def test_gradient_refused(sources, calib):
    task = with_text(prepare(sources("llama"), Recipe(method="taylor", calib=calib)))
    with pytest.raises(RecipeError, match="layer by layer"):
        score([task], StreamedStore(sources("llama")))


def test_in_memory_refused(sources):
    with pytest.raises(ModelError, match="in memory"):
        StreamedStore(from_memory(sources("llama").load_model()))


def test_shard_gone_meanwhile(tmp_path, calib):
    source = open_model(save_tiny(tmp_path / "model", shards=True))
    store, last = StreamedStore(source), sorted((tmp_path / "model").glob("*.safetensors"))[-2]
    last.unlink()
    with pytest.raises(ModelError, match=f"{last.name} is missing"):
        score([with_text(prepare(source, Recipe(calib=calib)))], store)


@pytest.mark.parametrize("asked", ["rc-a", "cosine", "repair"])
def test_what_is_read(sources, no_cache, asked, calib):
    """The bytes that were foreseen: what is outside the layers once for each walk."""
    no_cache()
    source = sources("llama")
    task = with_text(prepare(source, Recipe(**{**RECIPES, "rc-a": {}}[asked], calib=calib), Compute(stream=True)))
    store = StreamedStore(source)
    score([task], store)
    assert store.nbytes_read == foresee(task, "cpu").read


def test_embeddings_are_gone_before_the_first_layer_runs(sources):
    """Of a large vocabulary they are more than a layer; a second walk has them again."""
    store = StreamedStore(sources("gpt2"))
    first = store.record([torch.tensor([[5, 6, 7]])])
    model = store.model.transformer
    assert model.wte.weight.is_meta
    assert model.wpe.weight.is_meta
    assert not model.ln_f.weight.is_meta
    assert torch.equal(first.hidden[0], store.record([torch.tensor([[5, 6, 7]])]).hidden[0])
