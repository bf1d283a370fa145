"""Run an experiment: what is done is skipped, every run leaves one record, and one that fails stops no other."""

from __future__ import annotations

import gc
import itertools
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

from dicer.ask.compute import Compute
from dicer.ask.evaluation import FIDELITY_TEXTS, Evaluation
from dicer.ask.portable import portable, portable_evaluation
from dicer.ask.spelling import Wanted
from dicer.decide.cost import check_streams
from dicer.decide.task import Asked, prepare
from dicer.decide.together import Scored, score_all
from dicer.errors import DicerError, ExperimentError
from dicer.machine import peak_memory, pick_device, reset_peak_memory
from dicer.measure.documents import check_source, check_text
from dicer.measure.stores.resident import ResidentStore
from dicer.measure.stores.streamed import StreamedStore
from dicer.model.source import ModelSource, open_model
from dicer.pipeline import build_model
from dicer.preflight import proven_axes
from dicer.processes import from_first, rank, world_size
from dicer.study.bench import Bench, Evaluate, Event, Place, Refer, Task
from dicer.study.grid import ORIGINAL, Experiment, Run, identity
from dicer.study.record import make_record
from dicer.study.records import held_early, locked, read_records, record_path, run_id
from dicer.study.run_record import plan_entries, surroundings
from dicer.write.proof import Proof, check_proofs
from dicer.write.prove import proofs_for, prove
from dicer.write.surgery import plan_cut


class Here:
    """This process."""

    def check(self, device: str) -> object:
        """By torch's word."""
        return pick_device(device)

    def work(self, groups: Sequence[list[Task]], bench: Bench) -> None:
        """One model after the other."""
        for group in groups:
            run_model(group, bench)


@held_early
def run_experiment(
    experiment: Experiment,
    results: Path,
    *,
    evaluate: Evaluate,
    check: Callable[[Evaluation], object] = lambda _: None,
    watch: Callable[[Event], None] = lambda _: None,
    refer: Refer | None = None,
    place: Place | None = None,
) -> dict[str, int]:
    """Do every run of an experiment that the results folder has no record of.

    Args:
        experiment: from :func:`dicer.study.grid.read_experiment`.
        results: where records lie; one experiment at a time may write there.
        evaluate: what measures a model.
        check: called before any model is loaded, where there is something to do; raises what no run could get over.
        watch: told of everything that happens.
        refer: what has the answers of the dense model that all are compared with; needed where one is named.
        place: where the runs are done; here, where none is given.

    Returns:
        How many runs were ``done``, ``skipped`` and ``failed``.

    Raises:
        DicerError: a model cannot be opened, another run holds the folder, it holds records of another format, a run
            is known to fail before its model is loaded, or what ``check`` raises.
    """
    bench, place = Bench(experiment.evaluation, evaluate, watch, refer), place or Here()
    sources = {opened: open_model(*opened) for opened in dict.fromkeys(run.opened for run in experiment.runs)}
    dense = dense_fingerprint(experiment.evaluation)
    made = [make_task(run, sources[run.opened], experiment.evaluation, results, dense) for run in experiment.runs]
    tasks = {task.name: task for task in made}.values()  # two ways to write the same are one run
    with ExitStack() as stack:
        finished = _on_first(lambda: _finished(stack, results))
        for task in tasks:
            if task.name in finished:
                bench.tell("skipped", task)
        groups: dict[object, list[Task]] = {}
        for task in tasks:
            if task.name not in finished:
                groups.setdefault((*task.run.opened, task.run.compute.dtype, task.run.compute.device), []).append(task)
        if groups:
            _check_evaluation(experiment.evaluation)
            for group in groups.values():
                place.check(group[0].run.compute.device)
                _check_runs(group)
            check(experiment.evaluation)
        for task in itertools.chain.from_iterable(groups.values()):
            bench.tell("waiting", task)
        place.work(list(groups.values()), bench)
    return bench.counts


def _finished(stack: ExitStack, results: Path) -> set[str]:
    stack.enter_context(locked(results))
    return {record.id for record in read_records(results) if record.status == "done"}


def _on_first(work: Callable[[], set[str]]) -> set[str]:
    """Work that only process 0 may do; what it gives, or the error that it meets, is everyone's."""
    found: tuple[set[str], str] = (set(), "")
    if rank() == 0:
        try:
            found = (work(), "")
        except DicerError as error:
            if world_size() == 1:
                raise
            found = (set(), str(error))
    names, error_text = from_first(found)
    if error_text:
        raise ExperimentError(error_text)
    return names


def dense_fingerprint(evaluation: Evaluation) -> dict[str, str]:
    """What tells the dense model from others, as a part of runs' names; nothing where each has its own."""
    named = evaluation.against not in (None, ORIGINAL)
    return {"dense": open_model(str(evaluation.against)).fingerprint} if named else {}


def make_task(run: Run, source: ModelSource, evaluation: Evaluation, results: Path, dense: dict[str, str]) -> Task:
    """A run with its name, which hangs on the model, the recipe, the evaluation and the content of their texts.

    Args:
        run: what was asked for.
        source: the model.
        evaluation: what is measured.
        results: where records lie.
        dense: from :func:`dense_fingerprint`.

    Raises:
        ExperimentError: a text cannot be read.
    """
    try:
        recipe = portable(run.recipe, run.recipe.resolve(), run.compute) if run.recipe else {"dtype": run.compute.dtype}
        name = run_id({**identity(run, recipe, evaluation, source.fingerprint), **dense})
    except OSError as error:  # a criterion of one's own, or a text, is part of a run's name
        raise ExperimentError(f"{error.filename} cannot be read: {error.strerror}.") from None
    return Task(run, name, source, recipe, record_path(results, source.name, run.method, name))


def _check_evaluation(evaluation: Evaluation) -> None:
    """See to it that the texts and questions are there, before any model is loaded."""
    if (text := evaluation.perplexity_text()) is not None:
        with _as_experiment_error():
            check_source(text, ("builtin", "wikitext2"), "perplexity text")
    for text in evaluation.text:
        with _as_experiment_error():
            check_source(text, FIDELITY_TEXTS, "text")
    if evaluation.questions is not None and not Path(evaluation.questions).is_file():
        raise ExperimentError(f"questions: there is no file {evaluation.questions}.")


def _check_runs(tasks: list[Task]) -> None:
    """Hold the runs of one model against it and the files that they read; the hub is not asked."""
    proofs = _proofs(tasks[0].source)
    for task in tasks:
        if (recipe := task.run.recipe) is not None:
            if task.run.compute.memory:
                raise ExperimentError("memory is for dicer prune and dicer plan: an experiment's runs share a model.")
            with _as_experiment_error(f"{task.source.name} {task.run.method}: "):
                asked = prepare(task.source, recipe, task.run.compute)
                check_streams(asked, whole=False)
                check_proofs(task.source, proofs(asked))
                if asked.runs_model:
                    for text in recipe.texts:
                        check_text(text)


def _proofs(source: ModelSource) -> Callable[[Asked], list[Proof]]:
    """What proves the axes of any run of a model, each set of them once."""
    found = cache(partial(prove, source))
    return lambda task: found(tuple(proven_axes(task)))


@contextmanager
def _as_experiment_error(where: str = "") -> Iterator[None]:
    try:
        yield
    except DicerError as error:
        raise ExperimentError(f"{where}{error}") from None


def run_model(tasks: list[Task], bench: Bench) -> None:
    """All runs of one model: it is loaded once, measured if asked, scored for all, and gone before the first cut."""
    source, compute = tasks[0].source, tasks[0].run.compute
    start = time.perf_counter()
    try:
        tokenizer = source.tokenizer()
        reference = _reference(bench, compute) if bench.evaluation.against != ORIGINAL else None
        store = _store(tasks, bench)
        model = store.model
        if bench.evaluation.against == ORIGINAL:
            reference = _reference(bench, compute, (model, tokenizer, source))
    except Exception as error:
        for task in tasks:
            fail(task, bench, error)
        return
    load, dtype, device = {"load": time.perf_counter() - start}, model.dtype, pick_device(compute.device)
    for task in tasks:
        if task.run.recipe is None:
            _measure(task, bench, partial(_given, model), tokenizer, load, _own_bytes(task), reference)
    scored = _score(tasks, store, tokenizer, bench)
    del model, store
    for task, found in scored:
        gc.collect()  # a model that is gone but not collected would double the peak
        cut = plan_cut(source, found.plan)
        build = partial(build_model, cut, dtype, device)
        facts = plan_entries(found, cut)
        if found.task.method.from_file:  # the file said it; reports go by what it comes to
            told = facts["allocation"]
            facts["recipe"] = {**task.recipe, "ratio": round(told["target"] / told["whole"], 4)}
        _measure(task, bench, build, tokenizer, {**load, "score": found.seconds}, facts, reference)


def _store(tasks: list[Task], bench: Bench) -> ResidentStore:
    """The layers of a model: one at a time, where that is asked for and nothing runs the whole of it as it is."""
    source, compute = tasks[0].source, tasks[0].run.compute
    device = pick_device(compute.device)
    if compute.stream and bench.evaluation.against != ORIGINAL and all(task.run.recipe for task in tasks):
        return StreamedStore(source, compute.dtype, device)
    return ResidentStore(source.load_model(compute.dtype, device), source.family)


def _score(tasks: list[Task], store: ResidentStore, tokenizer: Any, bench: Bench) -> list[tuple[Task, Scored]]:
    """A plan for each run that prunes; errors end here, as their tracebacks would keep the model alive."""
    asked = [(task, task.run.recipe) for task in tasks if task.run.recipe is not None]
    for task, _ in asked:
        bench.tell("scoring", task)
    source, wanted = tasks[0].source, [Wanted(recipe, task.run.compute) for task, recipe in asked]
    found: Sequence[Scored | Exception]
    try:
        found = score_all(source, store, wanted, tokenizer, bench.progress)
    except Exception as error:
        found = [error] * len(asked)
    scored: list[tuple[Task, Scored]] = []
    proofs = _proofs(source)
    for (task, _), one in zip(asked, found, strict=True):
        try:
            if isinstance(one, Exception):
                raise one
            proofs_for(source, one.plan, proofs(one.task))
            scored.append((task, one))
        except Exception as error:
            fail(task, bench, error)
    return scored


def _reference(bench: Bench, compute: Compute, held: Any = None) -> Any:
    """The dense model's answers, in the one process that compares."""
    if bench.evaluation.against is None or bench.refer is None or rank() > 0:
        return None
    return bench.refer(bench.evaluation, compute, held, progress=bench.progress)


def _own_bytes(task: Task) -> dict[str, Any]:
    """Bytes of the weights of a model as it is: of a .gguf file itself, whatever it is converted to."""
    file = Path(task.run.model)
    infos = task.source.tensors.infos().values()
    count = file.stat().st_size if file.suffix == ".gguf" else sum(info.nbytes for info in infos)
    return {"bytes": {"before": count, "after": count}}


def _given(model: Any) -> Any:
    return model


def _measure(
    task: Task,
    bench: Bench,
    build: Callable[[], Any],
    tokenizer: Any,
    seconds: dict[str, float],
    facts: dict[str, Any],
    reference: Any = None,
) -> None:
    """Build, evaluate, write the record, and forget the model."""
    bench.tell("evaluating", task)
    try:
        reset_peak_memory()
        start = time.perf_counter()
        model = build()
        built = time.perf_counter()
        more = {} if reference is None else {"reference": reference, "name": task.source.name}
        metrics = bench.evaluate(model, tokenizer, bench.evaluation, progress=bench.progress, **more)
        seconds = {**seconds, "build": built - start, "evaluate": time.perf_counter() - built}
    except Exception as error:
        fail(task, bench, error)
        return
    memory = {**facts.pop("memory", {}), "evaluate": peak_memory()}
    device = f"{model.device} {str(model.dtype).removeprefix('torch.')}"
    count = sum(info.numel for info in task.source.tensors.infos().values())
    sizes = {"parameters": {"before": count, "after": count}}
    found = {**sizes, **facts, "metrics": metrics, "seconds": seconds, "memory": memory, "computed_on": device}
    _write(task, bench, {"status": "done", "error": None, **found})
    bench.tell("done", task)


def fail(task: Task, bench: Bench, error: Exception) -> None:
    """Record why a run came to nothing."""
    reason = str(error) if isinstance(error, DicerError) else f"{type(error).__name__}: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    where = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
    _write(task, bench, {"status": "failed", "error": reason.strip(), "traceback": where})
    bench.tell("failed", task, (reason.splitlines() or [""])[0])
    if world_size() > 1:  # the other processes wait for this one; the launcher ends them
        raise error


def _write(task: Task, bench: Bench, found: dict[str, Any]) -> None:
    if rank() != 0:
        return
    source = task.source
    model = {"name": source.name, "model_type": source.family.model_type, "fingerprint": source.fingerprint}
    values = {
        "id": task.name,
        "method": task.run.method,
        "text": task.run.text,
        "model": model,
        "recipe": task.recipe,
        "evaluation": portable_evaluation(bench.evaluation),
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        **surroundings(),
        **found,
    }
    bench.keep(task, make_record(values))
