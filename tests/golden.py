"""SHA-256 of the plan and the weights of every preset on every tiny family, so that a change that moves a bit is seen.

``python tests/golden.py`` checks the table beside this file, with ``--write`` it writes it anew (``make golden``). Both
run in a process of their own, whose arithmetic does not depend on what the processor offers.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

TABLE = Path(__file__).with_suffix(".json")
# One thread, and the plainest kernels of torch, MKL and OpenBLAS: others sum in another order on another processor.
_PLAIN = {
    **{"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "1"},
    **{"OPENBLAS_CORETYPE": "Prescott", "ONEDNN_MAX_CPU_ISA": "SSE41"},
}
_MORE = {  # what no preset has
    "rc-a, 3 groups": {"method": "rc-a", "groups": 3},
    "act-l2, all, bias": {"criterion": "act-l2", "activation": "mod", "axis": "all", "compensate": "bias"},
    "sim-dominant, bias, multiple of 8": {"method": "sim-dominant", "compensate": "bias", "width_multiple": 8},
    "taylor, global": {"method": "taylor", "allocate": "global"},
    "best, uniform": {"method": "best", "allocate": "uniform"},
    "blocks": {"axis": "block"},
}


def compute() -> dict[str, dict[str, dict[str, str]]]:
    """Family -> recipe -> SHA-256 of ``plan`` and ``weights``, as :func:`dicer.prune` writes them to a folder."""
    from tiny import FAMILIES, save_tiny, tiny_tokens

    import dicer
    from dicer.ask.methods import PRESETS

    recipes = {name: {"method": name} for name in PRESETS} | _MORE
    found: dict[str, dict[str, dict[str, str]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["DICER_CACHE"] = scratch
        rows = Path(scratch) / "rows.jsonl"
        rows.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in tiny_tokens().tolist()))
        for family in FAMILIES:
            model = save_tiny(Path(scratch) / family, family)
            for name, values in recipes.items():
                out = Path(scratch) / "out"
                dicer.prune(model, dicer.Recipe(calib=str(rows), **values), output=out, overwrite=True)
                found.setdefault(family, {})[name] = {
                    "plan": _of_plan(out),
                    "weights": hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest(),
                }
    return found


def _of_plan(folder: Path) -> str:
    """What was decided: all tensors, widths, blocks and ratios; versions and the recipe's spelling may change."""
    import dicer

    plan = dicer.load_plan(folder)
    digest = hashlib.sha256()
    for axis, layers in sorted(plan.axes.items()):
        for index, layer in sorted(layers.items()):
            parts = {"keep": layer.keep, "scores": layer.scores, "means": layer.means}
            merged = layer.merge_matrices()
            for place, matrix in enumerate(merged or ()):
                parts[f"merge {place}"] = matrix.to_dense()
            for name, tensor in parts.items():
                if tensor is not None:
                    digest.update(f"{axis} {index} {name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
                    digest.update(tensor.contiguous().numpy().tobytes())
    told = {"blocks": plan.blocks, "allocation": plan.allocation, "calibration": plan.calibration}
    digest.update(json.dumps(told, sort_keys=True).encode())
    return digest.hexdigest()


def run() -> dict[str, dict[str, dict[str, str]]]:
    """:func:`compute` in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--compute"]
    done = subprocess.run(command, env={**os.environ, **_PLAIN}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    table: dict[str, dict[str, dict[str, str]]] = json.loads(done.stdout)
    return table


def differences(found: dict[str, dict[str, dict[str, str]]]) -> list[str]:
    """``family, recipe: plan`` or ``weights``, wherever the table says otherwise."""
    table = json.loads(TABLE.read_text())
    return [
        f"{family}, {recipe}: {part}"
        for family in sorted({*found, *table})
        for recipe in sorted({*found.get(family, {}), *table.get(family, {})})
        for part in ("plan", "weights")
        if found.get(family, {}).get(recipe, {}).get(part) != table.get(family, {}).get(recipe, {}).get(part)
    ]


if __name__ == "__main__":
    if "--compute" in sys.argv:
        print(json.dumps(compute()))  # noqa: T201
    elif "--write" in sys.argv:
        TABLE.write_text(json.dumps(run(), indent=1) + "\n")
    else:
        sys.exit("\n".join(differences(run())) or 0)
