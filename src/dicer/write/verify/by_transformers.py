"""Runs folders through transformers alone: ``python by_transformers.py JOB RESULT``, in a process without dicer.

The job says ``folders``, ``rows`` (token ids), ``new`` (tokens to make of each row, greedily) and ``code`` (whether the
folders' own code may run). The result has for each folder its class, the tokens with the cache, what would come after
each of them without it, their log-probabilities, and by how much each was ahead of the next best; or the ``error`` that
it ended with. The logits of the rows lie in files ``RESULT.0``, ``RESULT.1`` ...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def _run(folder: str, job: dict[str, Any], logits_file: str) -> dict[str, Any]:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=job["code"], local_files_only=True
    ).eval()
    model.generation_config = GenerationConfig()  # what is compared is the model, not what it is set to
    found: dict[str, Any] = {"class": type(model).__name__, "tokens": [], "uncached": [], "logprobs": [], "ahead": []}
    logits = {}
    for number, row in enumerate(job["rows"]):
        ids, start = torch.tensor([row]), len(row)
        with torch.no_grad():
            logits[str(number)] = model(input_ids=ids, use_cache=False).logits[0].contiguous()
            made = model.generate(
                ids, max_new_tokens=job["new"], min_new_tokens=job["new"], do_sample=False, use_cache=True
            )
            said = model(input_ids=made, use_cache=False).logits[0, start - 1 : -1].log_softmax(-1)
        best = said.topk(2).values
        found["tokens"].append(made[0, start:].tolist())
        found["uncached"].append(said.argmax(-1).tolist())
        found["logprobs"].append(said.gather(1, made[0, start:, None])[:, 0].tolist())
        found["ahead"].append((best[:, 0] - best[:, 1]).tolist())
    save_file(logits, logits_file)
    return found


def _main(job_file: str, result_file: str) -> None:
    job, results = json.loads(Path(job_file).read_text()), []
    for number, folder in enumerate(job["folders"]):
        try:
            found = _run(folder, job, f"{result_file}.{number}")
        except Exception as error:  # whatever transformers raises is what is reported
            found = {"error": f"{type(error).__name__}: {error}"}
        results.append(found)
        Path(result_file).write_text(json.dumps(results))


if __name__ == "__main__":
    _main(*sys.argv[1:])
