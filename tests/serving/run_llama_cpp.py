"""What llama.cpp makes of a GGUF file; run where xllamacpp is, which need not be where dicer is.

    python run_llama_cpp.py MODEL.gguf < QUESTIONS.json > ANSWERS.json

Questions: ``{"prompts": [[id, ...], ...], "count": 24, "texts": ["..."], "messages": [[...]]}``. Answers: for each
prompt greedy ids and their log-probabilities, for each text its ids, for each list of messages the prompt.
"""

import json
import os
import sys
import time
import urllib.request

import xllamacpp


def started(model):
    """A server on the loopback, one thread, all in float32 but the cache's own rounding."""
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx, params.n_parallel, params.warmup, params.cache_ram_mib = 1024, 1, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.verbosity = int(os.environ.get("VERBOSITY", "0"))
    for name in ("fit_params",):
        if hasattr(params, name):
            setattr(params, name, False)
    return xllamacpp.Server(params)


def asked(server, path, body):
    request = urllib.request.Request(
        server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.load(answer)


def completed(server, ids, count):
    """Greedy ids, and their log-probabilities, or None where it does not tell all."""
    body = {"prompt": ids, "n_predict": count, "temperature": 0.0, "samplers": ["temperature"], "n_probs": 1}
    found = asked(server, "/completion", {**body, "cache_prompt": False, "return_tokens": True})
    told = [token["logprob"] for token in found.get("completion_probabilities", ())]
    whole = len(told) == len(found["tokens"])  # it tells none of tokens whose text is no whole character
    return {"ids": found["tokens"], "logprobs": told if whole else None}


def tokenized(server, text):
    return asked(server, "/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]


def main():
    questions = json.load(sys.stdin)
    answers = os.dup(1)
    os.dup2(2, 1)  # what llama.cpp prints is no answer
    began = time.perf_counter()
    server = started(sys.argv[1])
    loaded = time.perf_counter()
    found = {"completions": [completed(server, ids, questions["count"]) for ids in questions["prompts"]]}
    done = time.perf_counter()
    found["texts"] = [tokenized(server, text) for text in questions.get("texts", ())]
    found["chats"] = [
        asked(server, "/apply-template", {"messages": m})["prompt"] for m in questions.get("messages", ())
    ]
    found["seconds"] = {"load": loaded - began, "generate": done - loaded}
    with os.fdopen(answers, "w") as file:
        json.dump(found, file)
    os._exit(0)  # the server's threads have no end of their own


main()
