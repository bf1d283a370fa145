"""Loads folders in one process that has transformers and no dicer: ``python load_elsewhere.py JOB.json OUT``.

The job lists (folder, auto class); a folder with ``modeling_pruned.py`` is loaded with ``trust_remote_code=True``,
every other one plainly. OUT.safetensors gets the logits by the folder's place in the list, OUT.json what failed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HIDDEN = ("dicer", "wrapt", "pydantic", "typer", "rich", "scipy")


def logits_elsewhere(jobs: Sequence[tuple[Path, str]], ids: Any) -> list[Any]:
    """Of each folder its logits [B, T, V], or the line that loading it ended with."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as name:
        job, out = Path(name, "job.json"), Path(name, "out")
        job.write_text(json.dumps({"ids": ids.tolist(), "folders": [(str(f), auto) for f, auto in jobs]}))
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        environment |= {"HF_MODULES_CACHE": str(Path(name, "modules")), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, __file__, str(job), str(out)]
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        report, found = json.loads(out.with_suffix(".json").read_text()), load_file(out.with_suffix(".safetensors"))
    if report["loaded"]:
        raise RuntimeError(f"the other process had dicer: {report['loaded']}")
    return [found[str(i)] if str(i) in found else report["failed"][str(i)] for i in range(len(jobs))]


def _main(job: Path, out: Path) -> None:
    sys.modules.update(dict.fromkeys(HIDDEN))  # None: whoever imports one of them is told that it is not there
    import torch
    import transformers
    from safetensors.torch import save_file

    transformers.logging.disable_progress_bar()
    asked = json.loads(job.read_text())
    ids, logits, failed = torch.tensor(asked["ids"]), {}, {}
    for i, (folder, auto) in enumerate(asked["folders"]):
        flags = {"trust_remote_code": True} if Path(folder, "modeling_pruned.py").exists() else {}
        try:
            model, info = getattr(transformers, auto).from_pretrained(
                folder, dtype="float32", output_loading_info=True, **flags
            )
            if bad := {key: sorted(map(str, value)) for key, value in info.items() if value}:
                raise ValueError(f"not clean: {bad}")
            with torch.no_grad():
                logits[str(i)] = model.eval()(input_ids=ids, use_cache=False).logits.float().contiguous()
        except Exception as error:  # one that fails is a finding, and the others go on
            failed[str(i)] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    save_file(logits, out.with_suffix(".safetensors"))
    loaded = [name for name, module in sys.modules.items() if name.startswith("dicer") and module is not None]
    out.with_suffix(".json").write_text(json.dumps({"failed": failed, "loaded": loaded}))


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))
