"""Runs GGUF files through llama.cpp: ``python by_llama_cpp.py JOB RESULT``, with a Python that has xllamacpp.

The job says ``folders`` (files, here), ``rows`` (token ids) and ``new`` (tokens to make of each row, greedily); the
result has for each file the tokens and their log-probabilities, or the ``error`` that it ended with. Llama.cpp stops at
an end of text; of a row whose tokens are not all whole characters it tells no log-probability, and has None.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from importlib.metadata import version
from pathlib import Path
from typing import Any


def _started(file: str, context: int) -> Any:
    """A server on the loopback, all in float32: by default its cache would be of half floats."""
    import xllamacpp

    asked = xllamacpp.CommonParams()
    asked.model.path, asked.n_ctx = file, context
    asked.n_parallel, asked.warmup, asked.cache_ram_mib = 1, False, 0
    asked.cache_type_k = asked.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    asked.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if hasattr(asked, "fit_params"):
        asked.fit_params = False
    return xllamacpp.Server(asked)


def _served(file: str, rows: list[list[int]], new: int) -> dict[str, Any]:
    server = _started(file, new + max(map(len, rows)) + 8)
    found: dict[str, Any] = {"class": f"xllamacpp {version('xllamacpp')}", "tokens": [], "logprobs": []}
    for row in rows:
        said = _completed(server.listening_address, row, new)
        if said["stop_type"] not in ("eos", "limit") or not said["tokens"]:
            raise RuntimeError(f"llama.cpp stopped after {len(said['tokens'])} tokens ({said['stop_type']})")
        told = [token["logprob"] for token in said.get("completion_probabilities", ())]
        found["tokens"].append(said["tokens"])
        found["logprobs"].append(told if len(told) == len(said["tokens"]) else None)
    return found


def _completed(address: str, row: list[int], new: int) -> dict[str, Any]:
    """Its own endpoint, which tells every token; the one in OpenAI's manner leaves out those of half a character."""
    body = {"prompt": row, "n_predict": new, "temperature": 0.0, "samplers": ["temperature"], "n_probs": 1}
    body |= {"cache_prompt": False, "return_tokens": True}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/completion", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as answer:
        said: dict[str, Any] = json.load(answer)
    return said


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
