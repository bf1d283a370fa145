"""The commands: what they print, and what they leave on disk."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny import tiny_model, tiny_tokens

import dicer
from dicer.ask.recipe import PRESETS, Recipe

FAST = ("--method", "weight-l2")


def _bytes(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _row(out, name):
    """The cells of a printed table's row."""
    line = next(line for line in out.splitlines() if re.match(rf"\W*{re.escape(name)}\s", line))
    return [cell.strip() for cell in line.strip("│┃").split("│")]


def _counted(folder):
    """(parameters, those in MLP neurons, bytes), from the tensors that a checkpoint holds."""
    tensors = [
        pair for file in folder.glob("*.safetensors") if "plan" not in file.name for pair in load_file(file).items()
    ]
    return (
        sum(t.numel() for _, t in tensors),
        sum(t.numel() for name, t in tensors if ".mlp." in name),
        sum(t.nbytes for _, t in tensors),
    )


def _exec_loading_line(out):
    """Run the line that is printed for loading; the model that it makes."""
    line = next(line for line in out.splitlines() if line.startswith("Load it: ")).removeprefix("Load it: ")
    names = {}
    exec(line, names)
    return names["model"]


@pytest.mark.parametrize(
    ("flags", "widths"),
    [((), [30, 30, 30, 30]), (("--layers", "1-2", "--ratio", "0.5"), [40, 20, 20, 40])],
)
def test_prune(run, model, rows, tmp_path, flags, widths):
    out = tmp_path / "out"
    printed = run("prune", model, "-o", out, "--calib", rows, *flags)
    assert "Pruned llama with rc-a." in printed
    before, after = _counted(model), _counted(out)
    for i, name in enumerate(("parameters", "in MLP neurons", "bytes of weights")):
        left = f"{after[i] / before[i]:.1%}"
        assert _row(printed, name) == [name, f"{before[i]:,}", f"{after[i]:,}", left]
    assert before[1] - after[1] == before[0] - after[0] == 3 * 32 * sum(40 - width for width in widths)
    on_disk = sum(len(content) for content in _bytes(out).values())
    assert f"Checkpoint: {out} ({on_disk:,} bytes on disk)." in printed
    assert re.search(r"^Time: load \d+\.\d s, score \d+\.\d s, write \d+\.\d s\.$", printed, re.M)
    assert re.search(r"^Peak memory: host \d+\.\d\d GB", printed, re.M)
    assert "Note: 6 ready samples of 24 tokens are used as they are." in printed
    loaded = _exec_loading_line(printed)
    assert [layer.mlp.up_proj.out_features for layer in loaded.model.layers] == widths
    assert sum(p.numel() for p in loaded.parameters()) == after[0]
    assert torch.isfinite(loaded(tiny_tokens(1)).logits).all()
    assert ("trust_remote_code=True" in printed) == (len(set(widths)) > 1)


@pytest.mark.parametrize("name", ["with space", "it's", 'quo"te', "ünï", ":fire:", "[bold]", "back\\slash"])
def test_loading_line_of_odd_folder_names(run, model, tmp_path, name):
    printed = run("prune", model, "-o", tmp_path / name, *FAST)
    assert _exec_loading_line(printed).config.intermediate_size == 30


def test_same_bytes_from_flags_a_file_and_python(run, model, rows, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'method = "rc-a"\nratio = 0.9\nlayers = "0,2"\ncalib = "{rows}"\nseed = 7\n')
    run("prune", model, "-o", tmp_path / "file", "--recipe", recipe, "--ratio", "0.4")
    words = ("--method", "rc-a", "--layers", "0,2", "--ratio", "0.4", "--calib", rows, "--seed", 7)
    run("prune", model, "-o", tmp_path / "flags", *words)
    asked = Recipe(method="rc-a", layers="0,2", ratio=0.4, calib=str(rows), seed=7)
    dicer.prune(model, asked, output=tmp_path / "python")
    assert _bytes(tmp_path / "file") == _bytes(tmp_path / "flags") == _bytes(tmp_path / "python")
    assert dicer.load_plan(tmp_path / "file").recipe["ratio"] == 0.4


def test_plan_then_apply(run, model, rows, tmp_path):
    flags = ("--calib", rows, "--method", "sim-dominant", "--layers", "1-3")
    printed = run("plan", model, "-o", tmp_path / "plan", *flags)
    assert sorted(_bytes(tmp_path / "plan")) == ["dicer_plan.json", "dicer_plan.tensors"]
    assert (
        printed.splitlines()[-1]
        == f"Plan: {tmp_path / 'plan'}. Next: dicer apply {tmp_path / 'plan'} {model} -o FOLDER"
    )
    applied = run("apply", tmp_path / "plan", model, "-o", tmp_path / "applied")
    pruned = run("prune", model, "-o", tmp_path / "pruned", *flags)
    assert _bytes(tmp_path / "applied") == _bytes(tmp_path / "pruned")
    assert "Pruned llama with sim-dominant." in applied
    for name in ("parameters", "in MLP neurons", "bytes of weights"):
        assert _row(applied, name) == _row(pruned, name)
    again = run("apply", tmp_path / "pruned" / "dicer_plan.json", model, "-o", tmp_path / "again")
    assert "Load it: " in again
    assert _bytes(tmp_path / "again") == _bytes(tmp_path / "pruned")


def test_explained_layers(run, model, tmp_path):
    printed = run("plan", model, "-o", tmp_path / "plan", *FAST, "--layers", "0,3", "--explain")
    lines = [line for line in printed.splitlines() if line.startswith("layer")]
    assert [line.split(";")[0] for line in lines] == [f"layer   {i} mlp: 40 -> 30 (25.0% removed)" for i in (0, 3)]
    for line in lines:
        kept, dropped = map(float, re.findall(r"median (\S+?)(?:,|$)", line))
        assert kept > dropped


def test_overwritten_plans_and_checkpoints(run, model, tmp_path):
    for command in ("plan", "prune"):
        out = tmp_path / command
        run(command, model, "-o", out, *FAST)
        first = _bytes(out)
        run(command, model, "-o", out, *FAST, "--ratio", "0.5", "--overwrite")
        assert _bytes(out) != first
        run(command, model, "-o", out, *FAST, "--overwrite")
        assert _bytes(out) == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan", "prune"]


def test_diff(run, model, tmp_path):
    run("plan", model, "-o", tmp_path / "a", *FAST, "--layers", "0-2")
    run("plan", model, "-o", tmp_path / "b", "--method", "random", "--layers", "1-3")
    assert run("diff", tmp_path / "a", tmp_path / "a") == "The two plans keep the same.\n"
    lines = run("diff", tmp_path / "a", tmp_path / "b").splitlines()
    assert lines[0] == "layer 0 mlp: only in the first plan"
    assert lines[-1] == "layer 3 mlp: only in the second plan"
    a, b = (dicer.load_plan(tmp_path / name).mlp for name in "ab")
    for index, line in zip((1, 2), lines[1:-1], strict=True):
        both = len(set(a[index].keep.tolist()) & set(b[index].keep.tolist()))
        assert line == f"layer {index} mlp: {both} kept by both, {30 - both} and {30 - both} by one"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ((), ["4 layers (0 to 3): 40 -> 30 neurons"]),
        (("--layers", "1-2", "--ratio", "0.5"), ["2 layers (1 to 2): 40 -> 20 neurons"]),
        (("--ratio", "0.01"), ["40 -> 40", "Note: 4 layers keep all their neurons"]),
        (("--grouping", "none", "--merge", "mean"), ["Note: merge 'mean' has nothing to merge without groups"]),
    ],
)
def test_dry_run(run, model, rows, tmp_path, flags, says):
    words = (model, "-o", tmp_path / "out", "--calib", rows, *flags)
    dry = run("prune", *words, "--dry-run")
    assert not list(tmp_path.iterdir())
    assert f"Would prune llama into {tmp_path / 'out'}; nothing was computed or written." in dry
    assert all(part in dry for part in says)
    wet = run("prune", *words)
    for name in ("parameters", "bytes of weights", *(() if "40 -> 40" in says else ("in MLP neurons",))):
        assert _row(dry, name) == _row(wet, name)


# Heads, blocks and transfer entropy


def _parts(folder, *inside):
    """Parameters of a checkpoint whose names have one of these parts."""
    files = [file for file in folder.glob("*.safetensors") if "plan" not in file.name]
    tensors = [pair for file in files for pair in load_file(file).items()]
    return sum(t.numel() for name, t in tensors if any(part in name for part in inside))


WAYS = {
    "let-llm": (("--method", "let-llm", "--ratio", "0.3"), "let-llm", 0.3 * 27_904, 1536),
    "blocks": (("--axis", "block", "--ratio", "0.5"), "its own combination", 0.5 * 27_904, 1),
    "rc-a": (("--method", "rc-a", "--allocate", "transfer-entropy"), "rc-a", 0.25 * 15_360, 96),
    "heads": (("--axis", "attention", "--method", "weight-l2"), "weight-l2", 0.25 * 12_288, 768),
    "ranked": (("--axis", "all", "--method", "rc-a", "--allocate", "global"), "rc-a", 0.25 * 27_648, 1536),
}  # flags, what it is called, parameters that are to go of the tiny Llama's, and by how much they may be missed


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("way", WAYS)
def test_prune_by_other_ways(run, model, rows, tmp_path, way):
    flags, name, target, near = WAYS[way]
    words = (model, "-o", tmp_path / "out", "--calib", rows, *flags)
    dry = run("prune", *words, "--dry-run")
    assert not list(tmp_path.iterdir())
    assert f"Would prune llama into {tmp_path / 'out'}; nothing was computed or written." in dry
    told = f"About {target:,.0f} parameters would go; from where, only a run of the model can tell."
    assert (told in dry) == ("before" not in dry) == (way != "heads")
    printed = run("prune", *words)
    assert f"Pruned llama with {name}." in printed
    before, after = _parts(model, ""), _parts(tmp_path / "out", "")
    assert abs(before - after - target) <= near
    assert _row(printed, "parameters") == ["parameters", f"{before:,}", f"{after:,}", f"{after / before:.1%}"]
    for row, inside in (
        ("in attention heads", "self_attn"),
        ("in MLP neurons", ".mlp."),
        ("in decoder layers", "layers."),
    ):
        counts = [_parts(folder, inside) for folder in (model, tmp_path / "out")]
        if counts[0] != counts[1]:
            assert _row(printed, row)[1:3] == [f"{count:,}" for count in counts]
        else:
            assert row not in printed
    loaded = _exec_loading_line(printed)
    assert sum(p.numel() for p in loaded.parameters()) == after
    assert torch.isfinite(loaded(tiny_tokens(1)).logits).all()
    if way == "heads":
        assert _row(dry, "parameters") == _row(printed, "parameters")
        assert "2 layers (0, 2): 2 -> 1 key-value heads" in printed
    if way == "blocks":
        gone = dicer.load_plan(tmp_path / "out").blocks
        assert f"2 layers removed whole: {gone[0]}, {gone[1]}" in printed
        assert loaded.config.num_hidden_layers == 2


@pytest.mark.usefixtures("own_cache")
def test_explained_amounts(run, model, rows, tmp_path):
    flags = ("--calib", rows, "--method", "let-llm", "--ratio", "0.3", "--explain")
    printed = run("plan", model, "-o", tmp_path / "plan", *flags)
    plan = dicer.load_plan(tmp_path / "plan")
    entropy = plan.allocation["transfer_entropy"]
    lines = [line for line in printed.splitlines() if line.startswith("layer")]
    assert len(lines) == 12
    for index in range(4):
        block, *modules = lines[3 * index : 3 * index + 3]
        assert block == f"layer   {index} block: transfer entropy {entropy['blocks'][index]:.4g}"
        for axis, line in zip(("attention", "mlp"), modules, strict=True):
            layer = plan.axes[axis][index]
            gone = f"({1 - len(layer.keep) / layer.units:.1%} removed)"
            told = f"layer   {index} {axis}: {layer.units} -> {len(layer.keep)} {gone}"
            assert line.startswith(f"{told}, transfer entropy {entropy[axis][index]:.4g}; score: kept median ")
    assert printed.splitlines()[-1].startswith("Plan: ")


@pytest.mark.usefixtures("own_cache")
def test_explained_blocks(run, model, rows, tmp_path):
    flags = ("--calib", rows, "--axis", "block", "--explain")
    printed = run("plan", model, "-o", tmp_path / "plan", *flags)
    plan = dicer.load_plan(tmp_path / "plan")
    entropy = plan.allocation["transfer_entropy"]["blocks"]
    assert plan.blocks == (entropy.index(min(entropy)),)
    said = ["removed whole, " if index in plan.blocks else "" for index in range(4)]
    assert printed.splitlines()[2:6] == [  # behind what it would take, and took
        f"layer   {i} block: {said[i]}transfer entropy {entropy[i]:.4g}" for i in range(4)
    ]


@pytest.mark.usefixtures("own_cache")
def test_plans_of_blocks_and_biases(run, model, rows, tmp_path):
    for name, flags in (
        ("blocks", ("--axis", "block")),
        ("bare", ("--method", "let-llm", "--ratio", "0.3")),
        ("biased", ("--method", "let-llm", "--ratio", "0.3", "--compensate", "bias")),
    ):
        run("plan", model, "-o", tmp_path / name, "--calib", rows, *flags)
    run("apply", tmp_path / "biased", model, "-o", tmp_path / "applied")
    run("prune", model, "-o", tmp_path / "pruned", "--calib", rows, *flags)
    assert _bytes(tmp_path / "applied") == _bytes(tmp_path / "pruned")
    biased = run("diff", tmp_path / "bare", tmp_path / "biased").splitlines()
    assert biased
    assert all(line.endswith("the same kept, compensated differently") for line in biased)
    assert "removed whole in the second plan only" in run("diff", tmp_path / "bare", tmp_path / "blocks")


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("flags", [("--method", "let-llm"), ("--axis", "block")])
def test_poor_estimate_of_the_entropy(run, tmp_path, flags):
    dense = tiny_model("llama")
    with torch.no_grad():
        dense.model.norm.weight[3] = 0.0  # a channel that says nothing
    dense.save_pretrained(tmp_path / "model")
    (tmp_path / "few.jsonl").write_text(json.dumps({"input_ids": tiny_tokens(1).tolist()[0]}))
    for command in ("plan", "prune"):
        for _ in range(2):  # measured, and from the cache
            out = (tmp_path / "model", "-o", tmp_path / command, "--calib", tmp_path / "few.jsonl", "--overwrite")
            printed = run(command, *out, *flags)
            assert (
                "Note: 24 calibration tokens for 32 channels: the entropy estimate is poor; use at least 32." in printed
            )
            assert "Note: 1 of 32 channels of the final state are constant over all tokens." in printed
    for values in dicer.load_plan(tmp_path / "prune").allocation["transfer_entropy"].values():
        assert all(0 <= value < 1e3 for value in values)


def test_plan_of_the_first_format(run, model, tmp_path):
    run("plan", model, "-o", tmp_path / "plan", *FAST)
    run("apply", tmp_path / "plan", model, "-o", tmp_path / "new")
    record = json.loads((tmp_path / "plan" / "dicer_plan.json").read_text())
    assert (record.pop("format"), record.pop("blocks")) == (3, [])
    del record["allocation"]
    (tmp_path / "plan" / "dicer_plan.tensors").rename(tmp_path / "plan" / "dicer_plan.safetensors")
    (tmp_path / "plan" / "dicer_plan.json").write_text(json.dumps({**record, "format": 1}))
    run("apply", tmp_path / "plan", model, "-o", tmp_path / "old")
    new, old = (load_file(tmp_path / name / "model.safetensors") for name in ("new", "old"))
    assert new.keys() == old.keys()
    assert all(torch.equal(new[name], old[name]) for name in new)


def test_info(run, model, tmp_path):
    printed = run("info", model)
    total, neurons, nbytes = _counted(model)
    assert _row(printed, "family")[1] == "llama"
    assert _row(printed, "layers")[1] == "4 (0 to 3)"
    assert _row(printed, "neurons a layer")[1] == "40"
    assert _row(printed, "dtypes")[1] == "float32"
    assert _row(printed, "parameters")[1] == f"{total:,}"
    assert _row(printed, "bytes of weights")[1] == f"{nbytes:,}"
    assert _row(printed, "- MLP neurons")[1] == f"{neurons:,} ({neurons / total:.1%})"
    parts = [
        _row(printed, f"- {n}")[1] for n in ("MLP neurons", "attention", "embeddings and head", "norms and the rest")
    ]
    assert sum(int(part.split()[0].replace(",", "")) for part in parts) == total
    run("prune", model, "-o", tmp_path / "out", *FAST, "--ratio", "0.4")
    assert _row(printed, "40%")[1:3] == ["24", f"{_counted(tmp_path / 'out')[0]:,}"]


def test_info_of_widths_that_differ(run, model, tmp_path):
    run("prune", model, "-o", tmp_path / "out", *FAST, "--layers", "1")
    printed = run("info", tmp_path / "out")
    assert _row(printed, "neurons a layer")[1] == "30 to 40"
    assert _row(printed, "parameters")[1] == f"{_counted(tmp_path / 'out')[0]:,}"
    assert _row(printed, "50%")[1] == "15 to 20"


def test_methods(run):
    printed = run("methods")
    for name, preset in PRESETS.items():
        shown = [name, preset.criterion, preset.activation or "-", preset.grouping, preset.merge, preset.axis]
        assert _row(printed, name) == shown
        papers = printed[printed.index("paper") :]
        assert _row(papers, name) == [name, preset.paper, preset.seed_code_name or "-"]
    for part in (
        "transfer-entropy",
        "FILE.json",
        "none",
        "random",
        "similarity",
        "prune",
        "mean",
        "dominant",
        "gradient",
        "square_sum",
        "eq. 2",
    ):
        assert part in printed
    assert max(map(len, printed.splitlines())) <= 160


def test_methods_of_a_part_with_parameters(run, monkeypatch):
    link = "https://example.org/papers/" + "x" * 20
    parameters = {"linkage": SimpleNamespace(default="complete"), "power": SimpleNamespace(default=2.0)}
    part = SimpleNamespace(needs=("gram",), parameters=parameters, about="Takes [U] out.", source="eq. 7", link=link)
    monkeypatch.setattr("dicer.decide.merging.MERGES", {"mine": part})
    printed = run("methods")
    assert _row(printed, "mine") == ["mine", "gram", "linkage=complete", "Takes [U] out.", "eq. 7", link]
    assert "power=2.0" in printed


def test_perplexity(run, model, rows, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a text that is long enough for two windows of a tiny model, " * 8)
    printed = run("prune", model, "-o", tmp_path / "out", "--calib", rows, "--perplexity", text)
    assert "calibration text itself" not in printed
    same = ("--calib", text, "--perplexity", text, "--seq-len", "32")
    note = "Note: the perplexity is that of the calibration text itself; another would tell more."
    assert note in run("prune", model, "-o", tmp_path / "same", *same)
    before, after = map(float, re.search(r"^Perplexity: (\S+) before, (\S+) after\.$", printed, re.M).groups())
    card = (tmp_path / "out" / "README.md").read_text()
    in_card = re.search(r"on `text.txt`.*?: (\S+) before, (\S+) after", card).groups()
    assert [f"{float(value):.2f}" for value in in_card] == [f"{before:.2f}", f"{after:.2f}"]
    assert str(tmp_path) not in card
    tokens = dicer.measure.text.load_windows(str(text), lambda t: _tokenizer(model)(t)["input_ids"], 128, 8)
    for folder, shown in ((model, before), (tmp_path / "out", after)):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert dicer.perplexity(loaded, tokens) == pytest.approx(shown, abs=0.006)


def _tokenizer(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


CLOSED = "standard output is closed"
