"""lm-evaluation-harness on a model in memory: tasks by name, results as plain numbers."""

from __future__ import annotations

import io
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dicer.errors import EvaluationError, unknown
from dicer.processes import join, several

_KINDS = ("loglikelihood", "loglikelihood_rolling", "generate_until")
_SEED = 1234  # the default of its command line
_NO_METRICS = ("name", "alias", "sample_len", "sample_count")


def load_tasks(names: Sequence[str], include_path: str | None) -> dict[str, Any]:
    """The harness's tasks and groups by these names, with their documents, each once.

    Args:
        names: tasks, groups or tags.
        include_path: a folder with more task files; its names win over the stock ones.

    Returns:
        The harness's own form: ``tasks``, ``groups`` (name -> object) and ``group_map``.

    Raises:
        EvaluationError: the harness is not installed, there is no such name or folder, a task names files that are not
            there or a data set that cannot be had, or two of the names share a task.
    """
    if include_path is not None and not _is_folder(include_path):
        raise EvaluationError(f"there is no folder {include_path} to take task files from (--include-path).")
    with _as_it_runs():
        manager = _manager(names, include_path)
        for name in names:
            if name not in manager.task_index:
                raise EvaluationError(unknown("task", name, manager.task_index))
        items = [item for name in dict.fromkeys(names) for item in _load(manager, name)]
        try:
            loaded: dict[str, Any] = manager.load(items)
        except ValueError as error:
            raise EvaluationError(f"the tasks overlap: {error}.") from None
    return loaded


def _is_folder(path: str) -> bool:
    try:
        return Path(path).is_dir()
    except OSError as error:
        raise EvaluationError(f"task files cannot be read from {path}: {error.strerror} (--include-path).") from None


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: dict[str, Any],
    *,
    num_fewshot: int | None,
    limit: int | None,
    batch_size: int | str,
    progress: Callable[[int, int], None],
) -> dict[str, Any] | None:
    """Run tasks the way the harness's own command line does, without a chat template.

    In several processes (``accelerate launch``) the requests are shared among them.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer; the harness gives it a pad token where it has none.
        tasks: from :func:`load_tasks`.
        num_fewshot: examples in the prompt; None leaves it to each task.
        limit: documents a task; None for all.
        batch_size: requests in a forward pass; ``auto`` finds the largest that fits on a GPU, and is 1 on a CPU, where
            running out of memory ends the process.
        progress: called with (answers given, answers asked for by this process).

    Returns:
        ``tasks`` and ``groups``, each name -> version, n (documents), num_fewshot and metrics: name -> value and stderr
        (None where there is none), and floor: the accuracy of always choosing the commonest label (None where the
        answer is no label); None in every process but the first.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    if batch_size == "auto" and model.device.type == "cpu":
        batch_size = 1
    _set_shots(tasks["tasks"].values(), num_fewshot)
    with _as_it_runs():
        harness_model = HFLM(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch_size)
        _share(harness_model)
        _Counter(harness_model, progress)
        # Not simple_evaluate: it asks git and pip about the user's machine, and git's complaints reach the terminal.
        found = lm_eval.evaluate(harness_model, tasks, limit=limit, log_samples=False)
        labels = {name: _labels(task, limit) for name, task in tasks["tasks"].items()} if found else {}
    return None if found is None else _plain(found, labels)


class _Counter:
    """Stands in for the harness's cache of answers: told of each, it says how many there are."""

    def __init__(self, harness_model: Any, progress: Callable[[int, int], None]) -> None:
        self._progress, self._done, self._total = progress, 0, 0
        for kind in _KINDS:
            setattr(harness_model, kind, self._counted(getattr(harness_model, kind)))
        harness_model.set_cache_hook(self)

    def add_partial(self, *_: object) -> None:
        """Take note of one answer."""
        self._done += 1
        self._progress(self._done, self._total)

    def _counted(self, ask: Callable[..., Any]) -> Callable[..., Any]:
        def counted(requests: Sequence[Any], *rest: Any, **named: Any) -> Any:
            self._total += len(requests)
            return ask(requests, *rest, **named)

        return counted


def _share(harness_model: Any) -> None:
    """Give each process its part of the requests: the harness does so only for models that it loads itself."""
    if not several():
        return
    from accelerate import Accelerator

    cpu = harness_model.device.type == "cpu"
    join(cpu=cpu)
    accelerator = Accelerator(cpu=cpu)
    harness_model.accelerator = accelerator
    harness_model._rank, harness_model._world_size = accelerator.process_index, accelerator.num_processes


def _set_shots(tasks: Iterable[Any], num_fewshot: int | None) -> None:
    """As the command line does: a task that fixes 0 examples keeps 0, and one that says nothing gets 0."""
    for task in tasks:
        own = task.get_config("num_fewshot")
        if own != 0 and num_fewshot is not None:
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_SEED)


@contextmanager
def _as_it_runs() -> Iterator[None]:
    """The harness's own seeds, without a trace in the caller's generators; its prints and bars are caught.

    What a program logs in its own way still arrives there.
    """
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        random.seed(0)
        np.random.seed(_SEED)
        torch.manual_seed(_SEED)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _manager(names: Iterable[str], include_path: str | None) -> Any:
    """The index of task files; without the 14,000 stock ones (seconds) where the user's own tasks are all it takes."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise EvaluationError("tasks need lm-evaluation-harness: pip install 'dicer[eval]'.") from None
    if include_path is not None:
        own = TaskManager(include_path=include_path, include_defaults=False)
        if set(names) <= set(own.all_subtasks):
            return own
    return TaskManager(include_path=include_path)


def _load(manager: Any, name: str) -> list[Any]:
    """A task, a group, or the tasks that have a tag."""
    try:
        found = manager.load([name])
    except Exception as error:  # data sets raise a dozen kinds: offline, no such set, no such file ...
        reason = " ".join((str(error) or type(error).__name__).split())[:200].rstrip(".")
        raise EvaluationError(
            f"task '{name}' cannot be loaded: {reason}. Offline, give task files that read local data with "
            "--include-path (docs/evaluation.md shows how)."
        ) from None
    return [found["groups"][name]] if name in found["groups"] else list(found["tasks"].values())


def _labels(task: Any, limit: int | None) -> list[int]:
    """The right place in the list of choices, of every document that was asked; none where answers are no choices."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return []
    found = []
    for _, doc in task.doc_iterator(limit=limit):
        right = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        choices = task.doc_to_choice(doc)
        found.append(choices.index(right) if isinstance(right, str) and right in choices else right)
    return found if all(type(label) is int for label in found) else []


def _floor(name: str, labels: Mapping[str, list[int]], members: Mapping[str, Sequence[str]]) -> float | None:
    """The share of the commonest label in a task, or in all tasks of a group."""
    waiting, pooled = [name], Counter[int]()
    while waiting:
        inner = waiting.pop()
        waiting += members.get(inner, ())
        pooled.update(labels.get(inner, ()))
    return max(pooled.values()) / pooled.total() if pooled else None


def _plain(found: Mapping[str, Any], labels: Mapping[str, list[int]]) -> dict[str, Any]:
    groups = found.get("groups", {})
    tasks = {name: values for name, values in found["results"].items() if name in found["n-samples"]}
    inner = found.get("group_subtasks", {})
    return {
        kind: {
            name: {**_record(name, values, found), "floor": _floor(name, labels, inner)}
            for name, values in members.items()
        }
        for kind, members in (("tasks", tasks), ("groups", groups))
    }


def _record(name: str, values: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    metrics = {}
    for key, value in values.items():
        metric, _, how = key.partition(",")
        if key in _NO_METRICS or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = values.get(f"{metric}_stderr,{how}")
        metrics[metric if how in ("", "none") else key] = {
            "value": float(value),
            "stderr": float(stderr) if isinstance(stderr, int | float) else None,
        }
    version, shots = found["versions"].get(name), found["n-shot"].get(name)
    return {"version": version, "n": int(values["sample_len"]), "num_fewshot": shots, "metrics": metrics}
