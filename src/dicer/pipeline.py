"""The whole path, as Python: make_plan, apply_plan, prune, load."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from dicer.ask.compute import Compute
from dicer.ask.recipe import Recipe
from dicer.decide.cost import as_foreseen, foresee, open_store
from dicer.decide.decide import score
from dicer.decide.kept import Kept
from dicer.decide.plan import PrunePlan, load_plan
from dicer.decide.task import Asked, with_text
from dicer.errors import ModelError
from dicer.evaluate.dense import held_dense
from dicer.evaluate.fidelity import fidelity
from dicer.evaluate.quality import perplexity
from dicer.evaluate.reference import Reference, reference_of
from dicer.files import nearest_folder
from dicer.holds import check_output, claimed
from dicer.machine import peak_memory
from dicer.measure.stores.resident import ResidentStore
from dicer.measure.text import load_windows
from dicer.model.find import no_bars
from dicer.model.source import ModelSource, open_model, tokenize_with
from dicer.preflight import Look, check_place, fidelity_evaluation, look
from dicer.progress import Progress, silent
from dicer.write.checkpoint import Result as Result
from dicer.write.checkpoint import build_model as build_model
from dicer.write.checkpoint import write_checkpoint
from dicer.write.proof import check_proofs
from dicer.write.prove import proofs_for, prove, proven
from dicer.write.sink import check_space
from dicer.write.surgery import plan_cut

Tell = Callable[[str], None]
Opened = tuple[Asked, ResidentStore]
_LONG = 5.0  # seconds; what takes less need not be foreseen
PERPLEXITY_WINDOWS = 8
PERPLEXITY_LENGTH = 1024


def make_plan(
    model: str | os.PathLike[str],
    recipe: Recipe | None = None,
    compute: Compute | None = None,
    *,
    progress: Progress = silent,
    tell: Tell = silent,
    resume: Path | None = None,
) -> PrunePlan:
    """Decide which units of a model stay, and write nothing.

    Args:
        model: a hub id, a folder, a ``.gguf`` file, or ``builtin:smollm2``.
        recipe: what to do; the default is rc-a at 25% in all layers.
        compute: how it is computed.
        progress: called with (stage, done, total).
        tell: told what the run will take, before it begins, and what it took.
        resume: a folder for what each layer gave: the same call goes on from there if it was stopped.

    Raises:
        DicerError: anything that the user can mend.
    """
    found = look(model, recipe, compute)
    task, store = _opened(found, with_text(found.task, found.tokenizer), tell)
    kept = Kept(resume, task) if resume is not None else None
    plan = proven(task.source, _scored(task, store, progress, tell, kept), found.proofs)
    task.source.check_unchanged()
    return plan


def _opened(found: Look, task: Asked, tell: Tell, *, output: Path | None = None, whole: bool = False) -> Opened:
    """A task as its memory allows it, and the layers of its model: all in memory, or one at a time."""
    if task.source.live is not None:
        return task, ResidentStore(task.source.live, task.source.family)
    cost = foresee(task, found.device, whole=whole)
    tell(f"To do: {cost.line}{'' if output is None else f', {found.after.nbytes / 1e9:,.2f} GB to write'}.")
    folder = Path(tempfile.gettempdir()) if output is None else nearest_folder(output)
    return as_foreseen(task, cost), open_store(task, cost, found.device, folder)


def _scored(task: Asked, store: ResidentStore, progress: Progress, tell: Tell, kept: Kept | None = None) -> PrunePlan:
    """The plan, while it is told how long the layers will take, and what they took."""
    start = begun = time.perf_counter()

    def heard(stage: str, done: int, total: int) -> None:
        nonlocal begun
        progress(stage, done, total)
        if done == 0:
            begun = time.perf_counter()
        elif done == 1 and (rest := (time.perf_counter() - begun) * (total - 1)) > _LONG:
            tell(f"The first of {total} ({stage}) took {time.perf_counter() - begun:.1f} s: about {rest:.0f} s more.")

    plan = score([task], store, heard, kept=kept)[0]
    tell(
        f"Scored in {time.perf_counter() - start:.1f} s; {peak_memory()['host'] / 1e9:.2f} GB of memory at the peak, "
        f"{store.nbytes_read / 1e9:.2f} GB read."
    )
    return plan


def apply_plan(
    plan: PrunePlan | str | os.PathLike[str],
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    family: str | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Result:
    """Write the checkpoint that a plan describes, shard by shard, without loading the model.

    Args:
        plan: a plan, or where it lies.
        model: the model that the plan was made for.
        output: the folder to write; it appears whole or not at all.
        family: the TOML file that says the model's structure, where the plan was made with one.
        overwrite: replace an existing checkpoint, once the new one is whole.
        progress: called with (stage, done, total).

    Raises:
        DicerError: anything that the user can mend.
    """
    out = Path(output)
    check_output(out, overwrite=overwrite, inputs=[None if isinstance(plan, PrunePlan) else plan, model, family])
    with claimed(out):
        return _applied(plan, model, out, family, overwrite=overwrite, progress=progress)


def _applied(
    plan: PrunePlan | str | os.PathLike[str],
    model: str | os.PathLike[str],
    out: Path,
    family: str | None,
    *,
    overwrite: bool,
    progress: Progress,
) -> Result:
    loaded = plan if isinstance(plan, PrunePlan) else load_plan(Path(plan))
    source = open_model(model, family)
    loaded.check_model(str(source.config.model_type), source.fingerprint)
    check_proofs(source, proofs := prove(source, [axis for axis, layers in loaded.axes.items() if layers]))
    proofs_for(source, loaded, proofs)
    cut = plan_cut(source, loaded)
    source.generation_config()
    if "auto_map" in cut.config:
        source.unnamed_tokenizer_class()
    result = Result(loaded, *cut.sizes(), notes=list(source.notes))
    check_space(out, result.after.nbytes)
    with _timed(result.seconds, "write"):
        write_checkpoint(result, cut, out, progress, overwrite=overwrite)
    return result


def prune(
    model: Any,
    recipe: Recipe | None = None,
    compute: Compute | None = None,
    *,
    tokenizer: Any | None = None,
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    perplexity_text: str | None = None,
    fidelity_text: str | None = None,
    inputs: Iterable[str | os.PathLike[str] | None] = (),
    progress: Progress = silent,
    tell: Tell = silent,
    resume: bool = False,
) -> Result:
    """Prune a model: score, decide, cut.

    Args:
        model: a transformers model in memory, or a hub id, a folder, a ``.gguf`` file, ``builtin:smollm2``.
        recipe: what to do; the default is rc-a at 25% in all layers.
        compute: how it is computed; of a model in memory device and dtype are what they are.
        tokenizer: for a model in memory whose method looks at text.
        output: the folder to write. Without it the pruned model comes back in ``result.model``.
        overwrite: replace an existing checkpoint, once the new one is whole.
        perplexity_text: ``builtin`` or a text file: measure perplexity before and after, and put it into the card.
        fidelity_text: one text or two with a comma between (``builtin,builtin:code``): measure on them what the pruned
            model has lost of the dense one (:mod:`dicer.evaluate.fidelity`), and put it into the card.
        inputs: what else the run was made from (a recipe file), which must not lie in ``output``.
        progress: called with (stage, done, total).
        tell: told what the run will take, before it begins, and what it took.
        resume: keep what each layer gave in ``<output>.resume``: the same call goes on from there if it was stopped.

    Returns:
        Result with ``path`` or ``model``, the plan, sizes and times. A model given in memory is left as it was.

    Raises:
        DicerError: anything that the user can mend; then nothing was written.
    """
    texts: dict[str, Any] = {"perplexity_text": perplexity_text, "fidelity_text": fidelity_text}
    if output is not None:
        check_place(model, recipe or Recipe(), output, overwrite=overwrite, inputs=inputs, **texts)
    with claimed(None if output is None else Path(output)):  # from now on, whatever takes hours
        found = look(model, recipe, compute, output=output, overwrite=overwrite, inputs=inputs, **texts)
        how: dict[str, Any] = {"overwrite": overwrite, "progress": progress, "tell": tell, "resume": resume}
        return _pruned(found, tokenizer, output, **how, **texts)


def _pruned(
    found: Look,
    tokenizer: Any | None,
    output: str | os.PathLike[str] | None,
    *,
    overwrite: bool,
    perplexity_text: str | None,
    fidelity_text: str | None,
    progress: Progress,
    tell: Tell,
    resume: bool,
) -> Result:
    """Score, decide and cut what was looked at."""
    seconds: dict[str, float] = {}
    tokenizer, own = tokenizer or found.tokenizer, tokenizer
    with _timed(seconds, "load"):
        task = with_text(found.task, tokenizer)
        source = task.source
        windows = perplexity_windows(perplexity_text, source, tokenizer) if perplexity_text else None
        whole = windows is not None or fidelity_text is not None
        task, store = _opened(found, task, tell, output=None if output is None else Path(output), whole=whole)
    kept = Kept(resume_folder(output), task) if resume and output is not None else None
    reference = None
    if fidelity_text:  # before the scoring: a text that is too short costs no run
        with _timed(seconds, "fidelity"):
            reference = _reference(fidelity_text, store.model, source, tokenizer, found.before.nbytes, progress)
    with _timed(seconds, "score"):
        plan = proven(source, _scored(task, store, progress, tell, kept), found.proofs)
    cut = plan_cut(source, plan)
    result = Result(plan, *cut.sizes(), seconds=seconds, notes=[*task.notes, *plan.notes])
    if windows is not None:
        _note_same_text(result, task, perplexity_text)
        with _timed(seconds, "perplexity"):
            result.perplexities["before"] = _perplexity(store.model, windows, "perplexity before", progress)
    where = (store.model.dtype, found.device if source.live is None else source.live.device)
    del store
    if output is None or windows is not None or reference is not None:
        with _timed(seconds, "cut"):
            result.model = build_model(cut, *where)
    if windows is not None:
        with _timed(seconds, "perplexity"):
            result.perplexities["after"] = _perplexity(result.model, windows, "perplexity after", progress)
    if reference is not None:
        with _timed(seconds, "fidelity"):
            result.fidelity = fidelity(
                result.model, reference.tokenizer, reference, name="the pruned model", progress=progress
            )
            result.fidelity["bytes"] = result.after.nbytes
    if output is not None:
        result.model = None
        options: dict[str, Any] = {"overwrite": overwrite, "tokenizer": own, "perplexity_text": perplexity_text}
        with _timed(seconds, "write"):
            write_checkpoint(result, cut, Path(output), progress, **options)
    if kept is not None:
        kept.remove()
    return result


def resume_folder(output: str | os.PathLike[str]) -> Path:
    """Where a run that writes there keeps what it goes on from."""
    target = Path(os.path.realpath(output))
    return target.with_name(target.name + ".resume")


def _reference(
    text: str, dense: Any, source: ModelSource, tokenizer: Any | None, nbytes: int, progress: Progress
) -> Reference:
    """The dense model's answers; the model is not held by them."""
    held = held_dense(dense, tokenizer or source.tokenizer(), source.name, source.fingerprint, nbytes, source.folder)
    return reference_of(fidelity_evaluation(text), held, progress=progress)


def _note_same_text(result: Result, task: Asked, perplexity_text: str | None) -> None:
    same = task.calibration is not None and perplexity_text in {text.source for text in task.recipe.texts}
    if same and perplexity_text != "builtin":  # which keeps blocks apart
        result.notes.append("the perplexity is that of the calibration text itself; another would tell more")


def perplexity_windows(text: str, source: ModelSource, tokenizer: Any | None) -> Tensor:
    """What perplexity before and after is measured on, int64 [W, T]: the first windows of a text.

    Raises:
        DicerError: the text cannot be read or is too short, or the model has no tokenizer.
    """
    tokenize = tokenize_with(tokenizer or source.tokenizer())
    if tokenize is None:
        raise ModelError(f"{source.name} has no tokenizer, so perplexity on text cannot be measured.")
    length = min(
        PERPLEXITY_LENGTH, int(getattr(source.text_config, "max_position_embeddings", None) or PERPLEXITY_LENGTH)
    )
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
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        with no_bars():
            return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False, **options).eval()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be loaded: {' '.join(str(error).split())[:300]}") from error


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
