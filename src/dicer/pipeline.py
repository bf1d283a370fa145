"""The whole path, as Python: make_plan, apply_plan, prune, load."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from dicer.ask.recipe import Recipe
from dicer.decide.decide import score
from dicer.decide.plan import PrunePlan, load_plan
from dicer.decide.task import Job, prepare
from dicer.errors import ModelError, RecipeError
from dicer.evaluate.quality import perplexity
from dicer.machine import pick_device
from dicer.measure.stores.resident import Progress, silent
from dicer.measure.text import load_windows
from dicer.model.source import ModelSource, from_memory, open_model, tokenize_with
from dicer.write.checkpoint import Result as Result
from dicer.write.checkpoint import build_model as build_model
from dicer.write.checkpoint import write_checkpoint
from dicer.write.sink import check_output, check_space
from dicer.write.surgery import plan_cut

PERPLEXITY_WINDOWS = 8
PERPLEXITY_LENGTH = 1024


def make_plan(model: str | os.PathLike[str], recipe: Recipe | None = None, *, progress: Progress = silent) -> PrunePlan:
    """Decide which units of a model stay, and write nothing.

    Args:
        model: a hub id, a folder, a ``.gguf`` file, or ``builtin:smollm2``.
        recipe: what to do; the default is rc-a at 25% in all layers.
        progress: called with (stage, done, total).

    Raises:
        DicerError: anything that the user can mend.
    """
    job = prepare(open_model(model), recipe or Recipe())
    return score([job], _load_for_scoring(job), progress)[0]


def _load_for_scoring(job: Job) -> Any:
    return job.source.load_model(job.recipe.dtype, pick_device(job.recipe.device))


def apply_plan(
    plan: PrunePlan | str | os.PathLike[str],
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Result:
    """Write the checkpoint that a plan describes, shard by shard, without loading the model.

    Args:
        plan: a plan, or where it lies.
        model: the model that the plan was made for.
        output: the folder to write; it appears whole or not at all.
        overwrite: replace an existing checkpoint, once the new one is whole.
        progress: called with (stage, done, total).

    Raises:
        DicerError: anything that the user can mend.
    """
    out = Path(output)
    read = [Path(p) for p in (plan, model) if not isinstance(p, PrunePlan)]
    check_output(out, overwrite=overwrite, inputs=read)
    loaded = plan if isinstance(plan, PrunePlan) else load_plan(Path(plan))
    source = open_model(model)
    loaded.check_model(str(source.config.model_type), source.fingerprint)
    result = Result(loaded, *plan_cut(source, loaded).sizes())
    check_space(out, result.after.nbytes)
    with _timed(result, "write"):
        write_checkpoint(result, source, out, progress, overwrite=overwrite)
    return result


def prune(
    model: Any,
    recipe: Recipe | None = None,
    *,
    tokenizer: Any | None = None,
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    perplexity_text: str | None = None,
    progress: Progress = silent,
) -> Result:
    """Prune a model: score, decide, cut.

    Args:
        model: a transformers model in memory, or a hub id, a folder, a ``.gguf`` file, ``builtin:smollm2``.
        recipe: what to do; the default is rc-a at 25% in all layers.
        tokenizer: for a model in memory whose method looks at text.
        output: the folder to write. Without it the pruned model comes back in ``result.model``.
        overwrite: replace an existing checkpoint, once the new one is whole.
        perplexity_text: ``builtin`` or a text file: measure perplexity before and after, and put it into the card.
        progress: called with (stage, done, total).

    Returns:
        Result with ``path`` or ``model``, the plan, sizes and times. A model given in memory is left as it was.

    Raises:
        DicerError: anything that the user can mend; then nothing was written.
    """
    recipe = recipe or Recipe()
    out = Path(output) if output is not None else None
    in_memory = not isinstance(model, str | os.PathLike)
    if out is not None:
        read = [recipe.calib, recipe.allocate, recipe.entropy_profile, perplexity_text, None if in_memory else model]
        check_output(out, overwrite=overwrite, inputs=read)
    source = from_memory(model) if in_memory else open_model(model)
    if in_memory:
        recipe = recipe.model_copy(update=_as_it_is(model, recipe))
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    job = prepare(source, recipe, tokenizer)
    if out is not None:
        check_space(out, job.sizes()[1].nbytes)
    windows = perplexity_windows(perplexity_text, source, tokenizer) if perplexity_text else None
    dense = model if in_memory else _load_for_scoring(job)
    seconds["load"] = time.perf_counter() - start
    start = time.perf_counter()
    plan = score([job], dense, progress)[0]
    seconds["score"] = time.perf_counter() - start
    cut = plan_cut(source, plan)
    result = Result(plan, *cut.sizes(), seconds=seconds, notes=[*job.notes, *plan.notes])
    if windows is not None:
        with _timed(result, "perplexity"):
            if job.calibration is not None and perplexity_text == recipe.calib != "builtin":  # which keeps blocks apart
                result.notes.append("the perplexity is that of the calibration text itself; another would tell more")
            result.perplexities["before"] = _perplexity(dense, windows, "perplexity before", progress)
    where = (dense.dtype, dense.device)
    del dense
    if out is None or windows is not None:
        with _timed(result, "cut"):
            result.model = build_model(source, plan, *where)
    if windows is not None:
        with _timed(result, "perplexity"):
            result.perplexities["after"] = _perplexity(result.model, windows, "perplexity after", progress)
    if out is not None:
        result.model = None
        with _timed(result, "write"):
            write_checkpoint(
                result, source, out, progress, overwrite=overwrite, tokenizer=tokenizer, perplexity_text=perplexity_text
            )
    return result


def _as_it_is(model: Any, recipe: Recipe) -> dict[str, str]:
    """Device and dtype of a model in memory, which no recipe changes.

    Raises:
        RecipeError: the recipe asks for others.
    """
    found = {"device": str(model.device), "dtype": str(model.dtype).removeprefix("torch.")}
    for name, value in found.items():
        asked = getattr(recipe, name)
        if asked not in ("auto", value):
            raise RecipeError(
                f"the recipe asks for {name} {asked}, and the model in memory has {value}; move it first."
            )
    return found


def perplexity_windows(text: str, source: ModelSource, tokenizer: Any | None) -> Tensor:
    """What perplexity before and after is measured on, int64 [W, T]: the first windows of a text.

    Raises:
        DicerError: the text cannot be read or is too short, or the model has no tokenizer.
    """
    tokenize = tokenize_with(tokenizer or source.tokenizer())
    if tokenize is None:
        raise ModelError(f"{source.name} has no tokenizer, so perplexity on text cannot be measured.")
    length = min(PERPLEXITY_LENGTH, int(source.config.max_position_embeddings))
    return load_windows(text, tokenize, length, PERPLEXITY_WINDOWS)


def _perplexity(model: Any, windows: Tensor, stage: str, progress: Progress) -> float:
    return perplexity(model, windows, progress=lambda done, total: progress(stage, done, total))


def load(path: str | os.PathLike[str], **options: Any) -> Any:
    """Load a pruned checkpoint, or any other, in eval mode, without running code from its folder.

    Args:
        path: a folder or hub id.
        **options: for ``AutoModelForCausalLM.from_pretrained`` (``dtype``, ``device_map`` ...).

    Raises:
        ModelError: it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False, **options).eval()
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be loaded: {' '.join(str(error).split())[:300]}") from error


@contextmanager
def _timed(result: Result, stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    result.seconds[stage] = result.seconds.get(stage, 0.0) + time.perf_counter() - start
