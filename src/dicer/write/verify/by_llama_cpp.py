"""Runs GGUF files through llama.cpp: ``python by_llama_cpp.py JOB RESULT``, with a Python that has xllamacpp.

The job says ``folders`` (files, here), ``rows`` (token ids) and ``new`` (tokens to make of each row, greedily); the
result has for each file the tokens and their log-probabilities, or the ``error`` that it ended with.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def _served(file: str, rows: list[list[int]], new: int) -> dict[str, Any]:
    import xllamacpp

    asked = xllamacpp.CommonParams()
    asked.model.path = file
    asked.n_ctx = new + max(map(len, rows)) + 8
    asked.n_parallel, asked.warmup, asked.cache_ram_mib = 1, False, 0
    server = xllamacpp.Server(asked)
    found: dict[str, Any] = {"class": "llama.cpp", "tokens": [], "logprobs": []}
    for row in rows:
        request = {"prompt": row, "n_predict": new, "temperature": 0.0, "samplers": ["temperature"], "n_probs": 1}
        said = server.handle_completions({**request, "cache_prompt": False, "ignore_eos": True, "return_tokens": True})
        said = json.loads(said) if isinstance(said, str) else said
        if "choices" not in said:
            raise RuntimeError(str(said)[:300])
        content = said["choices"][0]["logprobs"]["content"]
        found["tokens"].append([one["id"] for one in content])
        found["logprobs"].append([one["logprob"] for one in content])
    return found


def _main(job_file: str, result_file: str) -> None:
    job, results = json.loads(Path(job_file).read_text()), []
    for file in job["folders"]:
        try:
            found = _served(file, job["rows"], job["new"])
        except Exception as error:  # whatever llama.cpp raises is what is reported
            found = {"error": f"{type(error).__name__}: {error}"}
        results.append(found)
        Path(result_file).write_text(json.dumps(results))


if __name__ == "__main__":
    _main(*sys.argv[1:])
