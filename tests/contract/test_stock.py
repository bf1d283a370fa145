"""``--stock``: what is written is the family's own class, with no code, and the cut is the one that was decided."""

from __future__ import annotations

import pytest
from by_hand import assert_near, config_in, logits_of, masked
from tiny import FAMILIES, save_tiny, tiny_tokens
from without_dicer import load_elsewhere

import dicer
from dicer.errors import RecipeError
from dicer.model.source import open_model
from dicer.write.checkpoint import write_checkpoint
from dicer.write.surgery import plan_cut

WITHOUT_HEADS = ("gpt2", "opt")  # whose heads fill the hidden size
CUTS = {family: {"axis": "mlp" if family in WITHOUT_HEADS else "all", "ratio": 0.5} for family in FAMILIES}
MORE = {
    "llama, bias": ("llama", {"axis": "all", "ratio": 0.5, "compensate": "bias"}),
    "opt, bias": ("opt", {"axis": "mlp", "ratio": 0.3, "compensate": "bias"}),
    "qwen2, multiple": ("qwen2", {"axis": "mlp", "ratio": 0.3, "width_multiple": 8}),
    "gemma2, blocks": ("gemma2", {"axis": "block", "ratio": 0.5}),
    "phi3, of the model": ("phi3", {"axis": "all", "ratio": 0.3, "ratio_of": "decoder"}),
}
CASES = {family: (family, asked) for family, asked in CUTS.items()} | MORE


@pytest.fixture(scope="module")
def written(tmp_path_factory, calib, own_cache):
    """Every case's plan, and what a process without dicer and without the flag makes of its folder."""
    root, plans = tmp_path_factory.mktemp("stock"), {}
    for case, (family, asked) in CASES.items():
        recipe = (
            dicer.Recipe(criterion="act-l2", calib=calib, stock=True, **asked)
            if asked["axis"] != "block"
            else (dicer.Recipe(calib=calib, stock=True, **asked))
        )
        plans[case] = dicer.prune(save_tiny(root / "dense" / case, family), recipe, output=root / case).plan
    tokens = {"ids": tiny_tokens(2, 24, seed=5).tolist(), "prompt": tiny_tokens(2, 8, seed=6).tolist()}
    report, logits = load_elsewhere(root, {"refused": [], "load": {str(root / case): None for case in CASES}, **tokens})
    return root, plans, report, logits


@pytest.mark.parametrize("case", CASES)
def test_stock_class_equals_masked(case, written):
    root, plans, report, logits = written
    folder, family = str(root / case), CASES[case][0]
    assert "auto_map" not in config_in(root / case)
    assert list((root / case).glob("*.py")) == []
    stem = open_model(root / "dense" / case).family
    assert report[folder]["classes"] == [stem.causal_lm, f"{stem.stem}Config"]
    assert report[folder]["not clean"] == {}
    dense = dicer.load(root / "dense" / case)
    assert_near(logits[folder], logits_of(masked(dense, family, plans[case])))
    for layers in plans[case].axes.values():
        assert len({len(layer.keep) for layer in layers.values()}) == 1
        assert len(next(iter(layers.values())).keep) < next(iter(layers.values())).units


def test_neurons_as_without_it(tmp_path, calib):
    model = save_tiny(tmp_path / "model")
    plans = [dicer.make_plan(model, dicer.Recipe(calib=calib, stock=stock)) for stock in (False, True)]
    assert plans[0].diff(plans[1]) == []
    assert [plan.recipe.get("stock") for plan in plans] == [None, True]


@pytest.mark.parametrize(
    ("family", "asked", "says"),
    [
        ("llama", {"layers": "1-2"}, ("--layers 1-2", "dicer export OUT --to stock")),
        ("llama", {"allocate": "global"}, ("--allocate global", "dicer export OUT --to stock")),
        ("llama", {"allocate": "transfer-entropy"}, ("--allocate transfer-entropy",)),
        ("llama", {"allocate": "mine.json"}, ("--allocate mine.json",)),
        ("opt", {"axis": "attention"}, ("no number of key-value heads but 4", "--axis mlp")),
        ("gpt2", {"axis": "all"}, ("no number of key-value heads but 4", "--axis mlp")),
        ("mistral", {"axis": "attention", "ratio": 0.2}, ("nearest to none", "--ratio 0.5")),
        ("qwen2", {"compensate": "bias"}, ("Qwen2ForCausalLM", "--compensate bias")),
    ],
)
def test_refused(family, asked, says, tmp_path, refused):
    words = [f"--{name.replace('_', '-')}={value}" for name, value in asked.items()]
    model = save_tiny(tmp_path / "model", family)
    refused("prune", model, "-o", tmp_path / "out", "--method", "weight-l2", "--stock", *words, says=says)


def test_three_of_four_heads(tmp_path):
    """32 is no multiple of 3, so a stock Llama has 4, 2 or 1 heads, and a quarter less is none of them."""
    model = save_tiny(tmp_path / "model", kv_heads=4)

    def heads(ratio):
        recipe = dicer.Recipe(method="weight-l2", axis="attention", ratio=ratio, stock=True)
        found = dicer.look(model, recipe)
        return {len(layer.keep) for layer in found.task.outline().axes["attention"].values()}, found.task.notes

    with pytest.raises(RecipeError, match=r"can keep 2, 1. Ask for --ratio 0.5"):
        heads(0.25)
    assert heads(0.5) == ({2}, [])
    kept, notes = heads(0.4)
    assert kept == {2}
    assert "every layer keeps 2 of 4 key-value heads" in notes[0]
    assert heads(0.7)[0] == {1}


def test_layers_that_differ_already(tmp_path):
    source = open_model(save_tiny(tmp_path / "model"))
    plan = dicer.make_plan(tmp_path / "model", dicer.Recipe(method="weight-l2", layers="1-2"))
    write_checkpoint(dicer.Result(plan, *(cut := plan_cut(source, plan)).sizes()), cut, tmp_path / "odd", print)
    for axis in ("mlp", "block"):
        asked = {"axis": axis, "ratio": 0.5, "stock": True} | ({"method": "weight-l2"} if axis == "mlp" else {})
        with pytest.raises(RecipeError, match="is no stock LlamaForCausalLM now"):
            dicer.look(tmp_path / "odd", dicer.Recipe(**asked))


def test_longrope_heads(tmp_path):
    """Phi-3's config wants rotary factors for hidden size / heads, so fewer heads are none of its own."""
    half = [1.0] * 4
    rope = {"type": "longrope", "short_factor": half, "long_factor": half}
    model = save_tiny(tmp_path / "model", "phi3", rope_scaling=rope, original_max_position_embeddings=64)
    with pytest.raises(RecipeError, match="can have no number of key-value heads but 2 here"):
        dicer.look(model, dicer.Recipe(method="weight-l2", axis="attention", ratio=0.5, stock=True))
    assert dicer.look(model, dicer.Recipe(method="weight-l2", stock=True)).targets.startswith(
        "Loads in transformers (no flag)"
    )
