"""Runs folders through vLLM: ``python by_vllm.py JOB RESULT``, with the Python of an environment that has vLLM.

The job says ``folders``, ``rows`` (token ids) and ``new`` (tokens to make of each row, greedily); the result has for
each folder the class that vLLM took, tokens and their log-probabilities, or the ``error`` that it ended with.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

ALONE = {  # no processes beside this one, no more memory and threads than a check needs, no word to anybody
    **{"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"},
    **{"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
}


def _served(folder: str, rows: list[list[int]], new: int) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    longest = new + max(map(len, rows))
    engine = LLM(
        folder,
        trust_remote_code=True,  # the caller has seen whose code that is
        enforce_eager=True,
        dtype="float32",
        max_model_len=longest,
        max_num_seqs=8,
        skip_tokenizer_init=True,
        disable_log_stats=True,
    )
    try:
        # What the folder's generation config says beside (a repetition penalty ...) is not what is compared.
        greedy = SamplingParams(temperature=0, max_tokens=new, logprobs=1, ignore_eos=True, detokenize=False)
        made = engine.generate([{"prompt_token_ids": row} for row in rows], greedy, use_tqdm=False)
        outputs = [one.outputs[0] for one in made]
        return {
            "class": engine.apply_model(lambda model: type(model).__name__)[0],
            "tokens": [list(one.token_ids) for one in outputs],
            "logprobs": [
                [said[token].logprob for said, token in zip(one.logprobs, one.token_ids, strict=True)]
                for one in outputs
            ],
        }
    finally:
        del engine
        gc.collect()
        cleanup_dist_env_and_memory()


def _main(job_file: str, result_file: str) -> None:
    job, results = json.loads(Path(job_file).read_text()), []
    for folder in job["folders"]:
        try:
            found = _served(folder, job["rows"], job["new"])
        except Exception as error:  # whatever the engine raises is what is reported
            found = {"error": f"{type(error).__name__}: {error}"}
        results.append(found)
        Path(result_file).write_text(json.dumps(results))


if __name__ == "__main__":
    os.environ.update({name: os.environ.get(name, value) for name, value in ALONE.items()})
    _main(*sys.argv[1:])
