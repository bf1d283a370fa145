"""What a walk has given up to now, and on disk what it goes on from when it was killed."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dicer.ask.portable import portable
from dicer.decide.choose import Scores
from dicer.decide.layer_plan import MERGE, REPAIR, LayerPlan, Merge, Repair
from dicer.decide.task import Asked
from dicer.errors import RecipeError
from dicer.files import as_output_error, folder_beside, remove_whole, write_whole
from dicer.measure.statistics import Sums
from dicer.model.units import SubLayer
from dicer.processes import several
from dicer.reading import check_plain, read_json

_KEY, _STATES, _LESSON = "run.json", "hidden.safetensors", "lesson.safetensors"


@dataclass
class Seen:
    """What one walk gave one task: plans, or where it is not decided yet the scores; tokens that experts saw."""

    plans: dict[SubLayer, LayerPlan] = field(default_factory=dict)
    tokens: dict[SubLayer, list[int]] = field(default_factory=dict)
    scores: dict[SubLayer, Scores] = field(default_factory=dict)


class Kept:
    """A folder with what each layer gave, and the hidden states behind the last one that is finished.

    A layer's results are written before the states behind it, and each file appears whole: so whatever moment a run is
    killed at, the folder holds all layers up to that of the states.

    Args:
        folder: made where there is none.
        task: whose run it is.

    Raises:
        RecipeError: it is the folder of another run, or the run is of a kind that cannot go on.
        OutputError: it cannot be written.
    """

    def __init__(self, folder: Path, task: Asked) -> None:
        if several():
            raise RecipeError("--resume keeps what one process gave, and there are several: leave it out.")
        if task.needs_gradient:
            raise RecipeError(
                "--resume goes on behind the last finished layer, which cannot be done where gradients come of one "
                "pass through all layers: leave it out."
            )
        self._folder, self._walks = folder, 0
        own = _identity(task)
        with as_output_error(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / _KEY).exists():
                write_whole(folder / _KEY, json.dumps(own, indent=2, sort_keys=True))
        _check_own(folder, own)

    def walk(self, seen: Seen) -> KeptWalk:
        """The next walk of the run: a run may have two. What is on disk of it goes into ``seen``."""
        self._walks += 1
        return KeptWalk(self._folder / f"walk-{self._walks}", seen)

    def lesson(self) -> KeptLesson:
        """The distillation behind the walks."""
        return KeptLesson(self._folder / "distill")

    def remove(self) -> None:
        """Take the folder away, as the run has come to its end."""
        remove_whole(self._folder)


class _Files:
    """Tensors in files of a folder, each whole or not there, with the number of what they are."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with as_output_error(folder):
            folder.mkdir(exist_ok=True)

    def _write(self, name: str, tensors: Mapping[str, Tensor], number: int) -> None:
        with as_output_error(self._folder), folder_beside(self._folder / name) as scratch:
            plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
            save_file(plain, scratch / name, metadata={"layer": str(number), "sha256": _digest(plain)})
            (scratch / name).replace(self._folder / name)

    def _number(self, name: str) -> int:
        """Of a file; -1 where it is not there."""
        if not (self._folder / name).exists():
            return -1
        with self._opened(name) as file:
            number = int(file.metadata()["layer"])
            if number < 0:
                raise ValueError(f"layer {number}")
            return number

    def _read(self, name: str) -> dict[str, Tensor]:
        with self._opened(name) as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
            if file.metadata()["sha256"] != _digest(tensors):
                raise ValueError(f"{name} is damaged")
            return tensors

    @contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        try:
            check_plain(self._folder / name)
            with safe_open(self._folder / name, framework="pt") as file:
                yield file
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise self._broken(error) from None

    def _broken(self, error: Exception) -> RecipeError:
        return RecipeError(f"{self._folder.parent} cannot be gone on from ({error}): remove it, and begin anew.")


class KeptWalk(_Files):
    """One walk of a run that may be killed (:class:`dicer.measure.walk.Along`)."""

    def __init__(self, folder: Path, seen: Seen) -> None:
        super().__init__(folder)
        self._seen = seen
        self.start = self._number(_STATES) + 1
        for index in range(self.start):
            _restore(seen, index, self._read(f"layer-{index:05d}.safetensors"))

    def states(self) -> Sequence[Tensor]:
        """The hidden states that go into the first layer that is not finished."""
        held = self._read(_STATES)
        return [held[f"{number:06d}"] for number in range(len(held))]

    def finished(self, index: int, hidden: Sequence[Tensor]) -> None:
        """Keep what a layer gave, and the states behind it."""
        self._write(f"layer-{index:05d}.safetensors", _of_layer(self._seen, index), index)
        self._write(_STATES, {f"{number:06d}": states for number, states in enumerate(hidden)}, index)


class KeptLesson(_Files):
    """The distillation of a run that may be killed (:class:`dicer.decide.distill.Along`)."""

    def state(self, shapes: Mapping[str, torch.Size]) -> tuple[int, dict[str, Tensor]]:
        """Steps that are done, and what was learned in them, tensors of these names and shapes; nothing in none."""
        done = self._number(_LESSON)
        if done < 0:
            return 0, {}
        held = self._read(_LESSON)
        if {name: (tensor.shape, tensor.dtype) for name, tensor in held.items()} != {
            name: (shape, torch.float32) for name, shape in shapes.items()
        }:
            raise self._broken(ValueError(f"{_LESSON} is of another model"))
        return done, held

    def keep(self, done: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep what was learned in so many steps."""
        self._write(_LESSON, tensors, done)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of names, dtypes, shapes and content."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return found.hexdigest()


def _identity(task: Asked) -> dict[str, Any]:
    """What must be the same for a run to go on: told apart by what a user calls it."""
    texts = [text for text in (task.calibration, task.lesson) if text is not None]
    tokens = b"".join(text.tokens.numpy().tobytes() for text in texts)
    mask = b"".join(text.mask.numpy().tobytes() for text in texts if text.mask is not None)
    versions = {name: importlib.metadata.version(name) for name in ("dicer", "torch", "transformers")}
    said = {
        "model": task.source.fingerprint,
        "text": hashlib.sha256(tokens + mask).hexdigest(),
        "recipe": {**portable(task.recipe, task.method, task.compute), "threads": torch.get_num_threads()},
        "version": versions,
    }
    plain: dict[str, Any] = json.loads(json.dumps(said, default=str))
    return plain


def _check_own(folder: Path, own: Mapping[str, Any]) -> None:
    try:
        held = read_json(folder / _KEY)
        if not isinstance(held["recipe"], dict):
            raise ValueError("its recipe is none")
        differs = [name for name in own if held[name] != own[name]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{folder} is no folder of a run that was stopped ({error}): move it away.") from None
    if differs:
        keys = own["recipe"].keys() | held["recipe"].keys() if differs == ["recipe"] else set()
        other = sorted(key for key in keys if own["recipe"].get(key) != held["recipe"].get(key))
        raise RecipeError(
            f"{folder} is of a run with another {' and '.join(differs)}{f' ({other[0]})' if other else ''}, so this "
            "one cannot go on from it: give the same command, or remove that folder."
        )


def _of_layer(seen: Seen, index: int) -> dict[str, Tensor]:
    """What a layer gave, by names that say what it is."""
    found: dict[str, Tensor] = {}
    for place, layer in seen.plans.items():
        if place.layer == index:
            found |= {f"{place.axis}/plan/{name}": tensor.clone() for name, tensor in layer.tensors().items()}
            if layer.repair is not None:
                found[f"{place.axis}/about"] = torch.tensor(list(json.dumps(layer.repair.about).encode()))
    for place, counts in seen.tokens.items():
        if place.layer == index:
            found[f"{place.axis}/tokens"] = torch.tensor(counts)
    for place, scored in seen.scores.items():
        if place.layer == index:
            found[f"{place.axis}/values"] = scored.values.clone()
            found |= {f"{place.axis}/sums/{name}": total for name, total in scored.sums.as_tensors().items()}
    return found


def _restore(seen: Seen, index: int, tensors: Mapping[str, Tensor]) -> None:
    """Take in what :func:`_of_layer` gave."""
    for axis in dict.fromkeys(name.partition("/")[0] for name in tensors):
        place, own = SubLayer(index, axis), _below(tensors, f"{axis}/")
        if plan := _below(own, "plan/"):
            merge = Merge(*(plan[name] for name in MERGE)) if MERGE[0] in plan else None
            repair = None
            if REPAIR[0] in plan:
                about = json.loads(bytes(own["about"].tolist()))
                repair = Repair(plan[REPAIR[0]], plan.get(REPAIR[1]), about)
            units, means = len(plan["scores"]), plan.get("means")
            seen.plans[place] = LayerPlan(units, plan["keep"], plan["scores"], merge, means, repair)
        if "tokens" in own:
            seen.tokens[place] = own["tokens"].tolist()
        if "values" in own:
            seen.scores[place] = Scores(own["values"], Sums.from_tensors(_below(own, "sums/")))


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
