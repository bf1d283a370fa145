"""What each recipe loses at the same size, beside the criteria of its peers: perplexity and KL to the dense model.

    python benchmarks/quality.py --model DIR --device cuda --json quality.json
    python benchmarks/quality.py --only dense,obs,flap --layers 5-28 --ratios 0.25 --sizes 10x128 --draws 1

Calibration is windows of wikitext2's train text, as token ids; the loss is measured on 8 windows of 1,024 tokens of its
test text, raw, and on as many of another domain (a book), all under $DICER_DATA. ``kl`` is the mean over tokens of
KL(dense || pruned) over the whole vocabulary. Every recipe stands by itself. `FIXED` recipes have one size of
calibration; of those that depend on nothing but the weights one draw is run.

Needs dicer's source on PYTHONPATH, torch, transformers, safetensors, numpy and pydantic; without scipy everything but
clustering runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

try:
    import scipy  # noqa: F401
except ImportError:  # stand-ins for what the recipes below read of it
    _stats: Any = types.ModuleType("scipy.stats")
    _stats.zscore = lambda values: (values - values.mean()) / values.std()
    _stats.rankdata = lambda values: np.argsort(np.argsort(values, kind="stable"), kind="stable") + 1.0
    _modules: dict[str, Any] = {"scipy.stats": _stats}
    _names = {"scipy.cluster.hierarchy": "linkage", "scipy.sparse": "coo_array"}
    for _name, _attribute in {**_names, "scipy.sparse.csgraph": "connected_components"}.items():
        _modules[_name] = types.ModuleType(_name)
        setattr(_modules[_name], _attribute, None)
    sys.modules.update({"scipy": types.ModuleType("scipy"), "scipy.cluster": types.ModuleType("scipy.cluster")})
    sys.modules.update(_modules)

import dicer
from dicer.decide.decide import score
from dicer.decide.plan import PrunePlan
from dicer.decide.task import prepare, with_text
from dicer.measure.batches import own_batches
from dicer.measure.stores.resident import ResidentStore
from dicer.measure.turning import turning
from dicer.model.sizes import layer_parameters
from dicer.model.source import from_memory, open_model
from dicer.write.checkpoint import build_model
from dicer.write.surgery import plan_cut

SOLVED = {"repair": "least-squares"}
MOD = {"activation": "mod"}
RECIPES: dict[str, dict[str, Any]] = {
    # criteria of others, as they use them
    "weight-l2": {"criterion": "weight-l2"},
    "taylor": {"criterion": "taylor"},
    "optipfair-data": {"criterion": "cfsp"},
    "act-weight": {"criterion": "act-weight"},
    "flap": {"criterion": "fluctuation", "allocate": "global", "compensate": "bias"},
    "modegpt": {"criterion": "leverage", **SOLVED, "propagate": "dense", "ridge": 1e-4},
    "blocks": {},
    # the paper's
    "act-l2": {"criterion": "act-l2", **MOD},
    "rc-a": {"method": "rc-a"},
    "rc-a rolls": {"method": "rc-a", "rolls": 64},
    # one step after the other
    "output-l2": {"criterion": "output-l2"},
    "output-l2 propagated": {"criterion": "output-l2", "propagate": "pruned"},
    "output-l2 solved": {"criterion": "output-l2", **SOLVED},
    "rc-a solved": {"method": "rc-a", **SOLVED},
    "rc-a rolls solved": {"method": "rc-a", "rolls": 64, **SOLVED},
    "taylor solved": {"criterion": "taylor", **SOLVED},
    "leverage solved": {"criterion": "leverage", **SOLVED},
    "obs": {"criterion": "obs"},
    "obs propagated": {"criterion": "obs", "propagate": "pruned"},
    "obs solved": {"criterion": "obs", **SOLVED},
    "obs solved dense inputs": {"criterion": "obs", **SOLVED, "propagate": "dense"},
    "obs solved 1e-4": {"criterion": "obs", **SOLVED, "ridge": 1e-4},
    "obs solved 1e-3": {"criterion": "obs", **SOLVED, "ridge": 1e-3},
    "obs solved 1e-2": {"criterion": "obs", **SOLVED, "ridge": 1e-2},
    "obs solved 1e-1": {"criterion": "obs", **SOLVED, "ridge": 1e-1},
    "obs solved bias": {"criterion": "obs", **SOLVED, "compensate": "bias"},
    "obs solved target dense": {"criterion": "obs", **SOLVED, "target": "dense"},
    "obs solved cosine": {"criterion": "obs", **SOLVED, "allocate": "cosine"},
    "obs solved global": {"criterion": "obs", **SOLVED, "allocate": "global"},
    "obs solved cosine bias": {"criterion": "obs", **SOLVED, "allocate": "cosine", "compensate": "bias"},
    "best": {"method": "best"},
}
NO_TEXT = ("weight-l2",)


class Bench:
    """The dense model, the texts that the loss is measured on, and what the dense model says of them."""

    def __init__(self, options: argparse.Namespace) -> None:
        where = Path(options.model)
        source = open_model(where if where.is_dir() else options.model)
        self.model = source.load_model("float32", options.device)
        self.tokenizer = source.tokenizer()
        self.source = from_memory(self.model)
        self.store = ResidentStore(self.model, self.source.family)
        self.device, self.windows = options.device, options.windows
        data, name = Path(options.data), options.other
        self.train = self._ids((data / "wikitext2" / "train_head.txt").read_text(encoding="utf-8"))
        texts = {"wikitext2": data / "wikitext2" / "test.txt"} | ({Path(name).stem: data / name} if name else {})
        self.texts = {name: self._text(path) for name, path in texts.items()}
        self.dense = {name: [_log_probs(self.model, w) for w in ids] for name, ids in self.texts.items()}

    def _ids(self, text: str) -> Tensor:
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor(ids)

    def _text(self, path: Path) -> Tensor:
        """[W, 1, 1024]: the text's rows joined by a blank line, as the papers do."""
        ids = self._ids("\n\n".join(path.read_text(encoding="utf-8")[: self.windows * 12_000].split("\n")))
        return ids[: self.windows * 1024].reshape(self.windows, 1, 1024).to(self.device)

    def rows(self, samples: int, length: int, draw: int, folder: Path) -> Path:
        """Ready calibration rows: windows side by side, in another order for every draw."""
        windows = self.train[: len(self.train) // length * length].reshape(-1, length)
        chosen = np.random.default_rng(draw).permutation(len(windows))[:samples]
        path = folder / f"{samples}x{length}-{draw}.jsonl"
        path.write_text("".join(json.dumps({"input_ids": windows[i].tolist()}) + "\n" for i in chosen))
        return path

    def loss(self, model: Any) -> dict[str, float]:
        """Perplexity and mean KL(dense || pruned) on each text."""
        found = {}
        for name, windows in self.texts.items():
            surprise = divergence = 0.0
            for window, dense in zip(windows, self.dense[name], strict=True):
                mine = _log_probs(model, window)  # [T, V]
                surprise -= float(mine[:-1].gather(1, window[0, 1:, None]).double().mean())
                divergence += float((dense.exp() * (dense - mine)).sum(1).double().mean())
            found[f"{name} ppl"] = float(np.exp(surprise / len(windows)))
            found[f"{name} kl"] = divergence / len(windows)
        return found

    def run(self, name: str, rows: Path, layers: str, ratio: float, seed: int) -> dict[str, Any]:
        """One recipe: its loss, and the seconds that deciding took."""
        start = time.perf_counter()
        recipe = dicer.Recipe(**{"calib": str(rows), "layers": layers, "ratio": ratio, "seed": seed, **RECIPES[name]})
        task = with_text(prepare(self.source, recipe, dicer.Compute(dtype="float32", device=self.device)))
        plan = self._blocks(task) if name == "blocks" else score([task], self.store)[0]
        seconds = time.perf_counter() - start
        pruned = build_model(plan_cut(self.source, plan), torch.float32, self.device)
        solved = [layer.repair.about for axis in plan.axes.values() for layer in axis.values() if layer.repair]
        about = {"ridges": [one["ridge"] for one in solved], "forms": sorted({one["form"] for one in solved})}
        size = sum(parameter.numel() for parameter in pruned.parameters())
        return {**self.loss(pruned), "seconds": seconds, "parameters": size, **(about if solved else {})}

    def _blocks(self, task: Any) -> PrunePlan:
        """Whole layers, those that turn the hidden state least, to the nearest number of the same parameters."""
        turned = turning(self.store, max(task.layers), own_batches(task.calibration.tokens))
        sizes = layer_parameters(self.source.family, self.source.tensors.infos())
        count = round(task.budget.target / sizes[task.layers[0]])
        gone = sorted(sorted(task.layers, key=lambda layer: turned[layer])[: max(count, 1)])
        return replace(task.outline(), axes={}, blocks=tuple(gone))


@torch.no_grad()
def _log_probs(model: Any, window: Tensor) -> Tensor:
    """[T, V], of a window [1, T]."""
    return model(window, use_cache=False).logits[0].float().log_softmax(-1)


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: a row a recipe, mean and spread over the draws."""
    keys = [key for key in found[0] if key.endswith((" ppl", " kl"))]
    lines = ["| recipe | " + " | ".join(keys) + " | s |", "| --- |" + " --- |" * (len(keys) + 1)]
    for name in dict.fromkeys(one["recipe"] for one in found):
        own = [one for one in found if one["recipe"] == name]
        cells = [_cell([one[key] for one in own], 3 if key.endswith("kl") else 2) for key in keys]
        lines.append(
            f"| {name} | " + " | ".join([*cells, f"{statistics.median(o['seconds'] for o in own):.1f}"]) + " |"
        )
    return "\n".join(lines)


def _cell(values: list[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:smollm2", help="a folder, or what dicer opens")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", default=os.environ.get("DICER_DATA", "../shared/data"))
    parser.add_argument("--other", default="books/carroll-alice.txt", help="the text of another domain; empty for none")
    parser.add_argument("--layers", default="5-28,all", help="with commas between; ranges by themselves")
    parser.add_argument("--ratios", default="0.25,0.5")
    parser.add_argument("--sizes", default="10x128,32x512,128x512")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--only", default="", help="recipes, with commas between")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    names = [name.strip() for name in options.only.split(",") if name.strip()] or list(RECIPES)
    bench, found, folder = Bench(options), [], Path(options.json or "quality.json").parent
    print(f"{options.model} on {options.device}; dense: {bench.loss(bench.model)}", flush=True)
    for layers in options.layers.split(","):
        for ratio in map(float, options.ratios.split(",")):
            for size in options.sizes.split(","):
                samples, length = map(int, size.split("x"))
                setting = {"layers": layers, "ratio": ratio, "size": size}
                own: list[dict[str, Any]] = []
                for name in names:
                    for draw in range(1 if name in NO_TEXT else options.draws):
                        rows = bench.rows(samples, length, draw, folder)
                        try:
                            got = bench.run(name, rows, layers, ratio, 42 + draw)
                        except dicer.DicerError as error:
                            print(f"{name}: {error}", flush=True)
                            continue
                        own.append({"recipe": name, **setting, "draw": draw, **got})
                        rows.unlink()
                        print(json.dumps(own[-1]), file=sys.stderr, flush=True)
                found += own
                print(f"\nlayers {layers}, {ratio:.0%}, {size}\n\n{table(own)}", flush=True)
                if options.json:
                    options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
