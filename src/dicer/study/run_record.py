"""What a record says of a plan, and of where it was made."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from typing import Any

import torch

from dicer.decide.plan import PrunePlan
from dicer.decide.together import Scored
from dicer.processes import world_size
from dicer.study.record import pack
from dicer.write.surgery import Cut


def plan_entries(scored: Scored, cut: Cut) -> dict[str, Any]:
    """What a record says of a plan."""
    before, after = cut.sizes()
    digest = hashlib.sha256(b"".join(content for _, content in sorted(scored.plan.files().items())))
    return {
        "parameters": {"before": before.parameters, "after": after.parameters},
        "mlp_parameters": {"before": before.mlp, "after": after.mlp},
        "attention_parameters": {"before": before.attention, "after": after.attention},
        "decoder_parameters": {"before": before.decoder, "after": after.decoder},
        "allocation": scored.plan.allocation,
        "kept": _kept(scored.plan),
        "bytes": {"before": before.nbytes, "after": after.nbytes},
        "calibration": scored.plan.calibration,
        "notes": scored.task.notes,
        "plan_sha256": digest.hexdigest(),
        "layers": _layers(scored.plan, scored.norms or {}),
        "pass_shared_by": scored.sharing,
        "memory": {"score": scored.memory},
    }


def _kept(plan: PrunePlan) -> dict[str, Any]:
    axes = {axis: {str(i): (p.units, len(p.keep)) for i, p in layers.items()} for axis, layers in plan.axes.items()}
    return {**axes, "blocks": list(plan.blocks)}


def _layers(plan: PrunePlan, norms: dict[int, torch.Tensor]) -> dict[str, Any]:
    """Layer -> units, the bit mask of those that stay, and mean score and mean L2 norm of both sides."""
    layers: dict[str, Any] = {}
    for index, layer in sorted(plan.mlp.items()):
        kept = torch.zeros(layer.units, dtype=torch.bool)
        kept[layer.keep] = True
        entry: dict[str, Any] = {"units": layer.units, "keep": pack(layer.keep, layer.units)}
        for name, values in (("score", layer.scores), ("norm", norms.get(index))):
            if values is not None and not kept.all():
                entry[name] = {"kept": float(values[kept].mean()), "dropped": float(values[~kept].mean())}
        layers[str(index)] = entry
    return layers


def surroundings() -> dict[str, Any]:
    """What a record says of the machine, the libraries and the code; nothing that names the machine."""
    packages = ("dicer", "torch", "transformers", "numpy", "accelerate", "lm_eval")
    versions = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    machine = {"system": platform.system(), "architecture": platform.machine(), "cores": os.cpu_count()}
    threads = torch.get_num_threads()
    return {
        "versions": versions,
        "environment": {**machine, "accelerators": cards, "threads": threads, "processes": world_size()},
        "git": _git_revision(),
    }


def _git_revision() -> str | None:
    """The commit of the current folder's repository, with ``-dirty`` where files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
