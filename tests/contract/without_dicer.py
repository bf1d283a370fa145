"""Loads folders in a process that has transformers and no dicer: ``python without_dicer.py JOB LOGITS REPORT``.

One process for all folders, as its imports cost seconds. The job says ``ids`` and ``prompt``, which folders to ``load``
(and where each is to be saved and loaded again, or null) and which must be ``refused`` without the flag.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HIDDEN = ("dicer", "typer", "rich", "scipy", "wrapt", "pydantic", "accelerate")


def load_elsewhere(root: Path, job: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run this file in a process of its own; what it reports, and the logits of each folder."""
    from safetensors.torch import load_file

    files = [root / name for name in ("job.json", "logits.safetensors", "report.json")]
    files[0].write_text(json.dumps(job))
    environment = {**os.environ, "HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, *map(str, files)]
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(files[2].read_text()), load_file(files[1])


def _hide() -> list[str]:
    """Let nothing import what a user of the checkpoint need not have; the names that are really out of reach."""
    sys.modules.update(dict.fromkeys(HIDDEN))
    blocked = []
    for name in (*HIDDEN, "dicer.write.export.modeling_pruned"):
        try:
            __import__(name)
        except ImportError:
            blocked.append(name)
    return blocked


def _main(job_file: str, logits_file: str, report_file: str) -> None:
    report: dict[str, Any] = {"blocked": _hide()}
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    job, logits = json.loads(Path(job_file).read_text()), {}
    ids, prompt = torch.tensor(job["ids"]), torch.tensor(job["prompt"])

    def refusal(auto: Any, folder: str, flags: dict[str, bool]) -> str:
        try:
            return type(auto.from_pretrained(folder, **flags)).__name__
        except ValueError:
            return "refused"

    def examine(folder: str, flags: dict[str, bool], *, generate: bool = False) -> Any:
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True, **flags)
        with torch.no_grad():
            logits[folder] = model(input_ids=ids, use_cache=False).logits
        report[folder] = {
            "classes": [type(model).__name__, type(model.config).__name__],
            "not clean": {key: sorted(map(str, value)) for key, value in info.items() if value},
        }
        if generate:
            new = model.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=True)
            report[folder]["generated"] = new[:, prompt.shape[1] :].tolist()
        return model

    for folder in job["refused"]:
        autos, asked = (AutoConfig, AutoModel, AutoModelForCausalLM), ({}, {"trust_remote_code": False})
        report[f"refused {folder}"] = [refusal(auto, folder, flags) for auto in autos for flags in asked]
    for folder, again in job["load"].items():
        flags = {"trust_remote_code": True} if Path(folder, "modeling_pruned.py").exists() else {}
        model = examine(folder, flags)
        if again:
            model.save_pretrained(again)
            examine(again, flags, generate=True)
    report["loaded"] = [name for name, module in sys.modules.items() if name.startswith("dicer") and module is not None]
    save_file(logits, logits_file)
    Path(report_file).write_text(json.dumps(report))


if __name__ == "__main__":
    _main(*sys.argv[1:])
