"""What a run will take, foreseen: memory, reading, passes - and whether the model lies in memory for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from dicer.ask.axes import kind_name
from dicer.ask.compute import Compute
from dicer.decide.distill import STEP_TOKENS
from dicer.decide.task import Asked
from dicer.errors import RecipeError
from dicer.machine import free_memory, held_memory
from dicer.measure.batches import BATCH_TOKENS
from dicer.measure.entropy.transfer import layer_forwards
from dicer.measure.propagate import HALFWAY
from dicer.measure.statistics import gram_dtype
from dicer.measure.stores.resident import ResidentStore
from dicer.measure.stores.streamed import NO_GRADIENTS, StreamedStore
from dicer.model.source import ModelSource
from dicer.processes import several

_IN_MEMORY = 0.5  # of what is free hidden states may take; what is more lies in a file
_READ_AROUND = 512 * 1024  # bytes of a block that the system maps for a row in it; 70 kB to 520 kB were seen
_MADE = 3  # tensors at once: what is written, the next that is made, and what that is made from
_SHARDS = 2  # that are written at once
_PIECES = 2**25  # bytes of what is written and of what is made next
_LEARNED = 5  # float32 of each weight that learns: as it was, as it is, its gradient, two moments
_AT_FULL_SIZE = 2  # of its whole tensor in the model's dtype: as the cut makes it, and its gradient
_KEPT_STATES, _KEPT_INPUTS = 4, 4  # of a layer's hidden states and inner ones, that a gradient's way back reads
_ANSWERS = 4  # rows of the vocabulary for each token: two models', their gradient, and what is made of it on the way
_SOLVED = 3  # of a Gram matrix, with what is solved or grouped by it
_COPIES = 3  # of the hidden states, where transfer entropy or a dense target keeps more than one set


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's weights in the dtype to compute in.

    Attributes:
        layers: of each decoder layer.
        outside: of what else is needed to run them: embeddings and the like.
        head: of the rest.
        copied: they are copied, and not views of mapped files.
    """

    layers: tuple[int, ...]
    outside: int
    head: int
    copied: bool

    @property
    def whole(self) -> int:
        """Of all of them."""
        return sum(self.layers) + self.outside + self.head


def weigh(source: ModelSource, compute: Compute, device: str = "cpu") -> Weights:
    """What the parts of a model take; from the headers."""
    size = None if compute.dtype == "auto" else getattr(torch, compute.dtype).itemsize
    layers: dict[int, int] = {}
    outside, head, copied = 0, 0, device != "cpu"
    for name, info in source.tensors.infos().items():
        nbytes = info.nbytes if size is None else info.numel * size
        copied |= nbytes != info.nbytes
        if place := source.family.locate(name):
            layers[place[0]] = layers.get(place[0], 0) + nbytes
        elif "head" in name or name.startswith("embed_out"):
            head += nbytes
        else:
            outside += nbytes
    return Weights(tuple(n for _, n in sorted(layers.items())), outside, head, copied)


@dataclass(frozen=True)
class Cost:
    """What a run will take.

    Attributes:
        streamed: the model is read layer by layer.
        memory: bytes at the peak of the process, with the pages of mapped files that it uses at once.
        read: bytes of weights, in all passes.
        passes: how often tokens go through the model.
        hidden: bytes of the hidden states.
        on_disk: whether these lie in a file.
        samples: in a forward pass, where the memory decides that; else None.
        why: what decided that the model is read layer by layer.
    """

    streamed: bool
    memory: int
    read: int
    passes: float
    hidden: int
    on_disk: bool = False
    samples: int | None = None
    why: str = ""

    @property
    def line(self) -> str:
        """For people, without a full stop."""
        how = f"read layer by layer from disk{self.why}" if self.streamed else "the whole model in memory"
        passes = f" in {self.passes:,.3g} passes" if self.passes > 1 else ""
        where = f", hidden states of {_gigabytes(self.hidden)} in a file" if self.on_disk else ""
        size = f", {self.samples} samples at once" if self.samples else ""
        return f"{how}: about {_gigabytes(self.memory)} of memory, {_gigabytes(self.read)} to read{passes}{where}{size}"


def check_streams(task: Asked, *, whole: bool) -> None:
    """Refuse, before anything is read, what cannot be done layer by layer.

    Raises:
        RecipeError: streaming is asked for and cannot be.
    """
    if task.source.live is not None and (task.compute.stream or task.compute.memory):
        raise RecipeError("the model is in memory already, so stream and memory decide nothing: leave them out.")
    if task.compute.stream and (whole or task.needs_whole):
        raise RecipeError(NO_GRADIENTS if task.needs_whole else _NOT_WHOLE)
    if task.recipe.distill and several():
        raise RecipeError("--distill learns in one process, and there are several: leave it out, or the launcher.")


def foresee(task: Asked, device: str, *, whole: bool = False) -> Cost:
    """What a run will take, and how it is best done with the memory that there is.

    Args:
        task: with its text, where it looks at one.
        device: to compute on.
        whole: the model is also run from end to end, so it has to be in memory.

    Raises:
        RecipeError: what the run needs at least is more than ``--memory``.
    """
    weights, limit = weigh(task.source, task.compute, device), task.compute.memory_bytes
    ways = [_resident(task, weights)]
    if not (whole or task.needs_whole or task.source.live is not None):
        free = free_memory(torch.device(device))
        layer_by_layer = _streamed(task, weights, free)
        if task.compute.stream or not task.runs_model:
            ways = layer_by_layer
        elif limit is not None:
            ways += layer_by_layer
        elif free is not None and weights.whole > free:
            why = f", as the model's {_gigabytes(weights.whole)} do not fit in {_gigabytes(free)}"
            ways = [replace(layer_by_layer[0], why=why)]
    if limit is None:  # without it batches stay as large as they are: the last bits hang on them
        return ways[0]
    return next((way for way in ways if way.memory <= limit), None) or _refuse(ways, limit)


def _refuse(ways: Sequence[Cost], limit: int) -> NoReturn:
    how = "one layer at a time" if any(way.streamed for way in ways) else "with the whole model in memory"
    raise RecipeError(
        f"--memory {_gigabytes(limit)} is less than this run needs: {how} it takes about "
        f"{_gigabytes(min(way.memory for way in ways))}."
    )


def _resident(task: Asked, weights: Weights) -> Cost:
    used = weights.whole  # all of it, as it is held against the files
    if task.needs_gradient:
        infos = task.source.tensors.infos()
        used = weights.whole + 4 * sum(infos[n].numel for n in infos if task.source.family.locate(n))
    at_work = _at_work(task, None) + _hidden(task)
    if task.recipe.distill:
        at_work = max(at_work, _learning(task, len(weights.layers)))
    memory = held_memory() + used + at_work
    return Cost(False, memory, weights.whole, _passes(task, len(weights.layers)), _hidden(task))


def _learning(task: Asked, layers: int) -> int:
    """Bytes of the weights that learn, with their gradients and moments, and of what a step keeps for its way back."""
    family, width, weights = task.source.family, _width(task), _learners(task)
    inputs = sum(max(family.units(name)) * axis.channels for name, axis in family.axes.items())
    lesson = task.lesson or task.calibration
    length = 0 if lesson is None else lesson.tokens.shape[1]
    samples = max(1, STEP_TOKENS // max(length, 1))
    tokens = min(samples, task.compute.batch_size or samples) * length
    behind = layers - min(task.layers)  # layers that a gradient goes back through
    kept = behind * (_KEPT_STATES * width + _KEPT_INPUTS * inputs) * _itemsize(task)
    answers = _ANSWERS * _itemsize(task) * int(task.source.text_config.vocab_size)
    return (_LEARNED * 4 + _AT_FULL_SIZE * _itemsize(task)) * weights + tokens * (kept + answers)


def _learners(task: Asked, *, outputs: bool = False) -> int:
    """How many weights the sub-layers have that are cut, or their output projections."""
    family, infos = task.source.family, task.source.tensors.infos()
    pieces = {
        (place.layer, piece.name)
        for place in task.places
        for piece in family.axes[place.axis].slices
        if piece.is_output or not outputs
    }
    return sum(info.numel for name, info in infos.items() if family.locate(name) in pieces)


def planned_bytes(task: Asked) -> int:
    """At most what a plan holds of tensors that were solved anew or have learned, in float32."""
    if task.method.repair == "none":
        return 0
    return 4 * _learners(task, outputs=not task.recipe.distill)


def _streamed(task: Asked, weights: Weights, free: int | None) -> list[Cost]:
    """What reading layer by layer takes: with the usual batches; a sample at a time; that, and states in files."""
    last = max(task.layers, default=len(weights.layers) - 1)
    layer, passes = max(weights.layers), _passes(task, len(weights.layers))
    if not task.runs_model:
        chosen = sum(weights.layers[index] for index in task.layers)
        return [Cost(True, held_memory() + max(layer + _at_work(task, None), _writing(task)), chosen, 0, 0)]
    read = int(passes * sum(weights.layers[: last + 1])) + _walks(task) * weights.outside
    hidden = _hidden(task)
    embedding = _outside(task, weights) + (layer if weights.copied else 0)  # gone before the first layer runs

    def peak(samples: int | None) -> int:
        return held_memory() + max(embedding, 2 * layer + _at_work(task, samples))

    usual = Cost(True, peak(None) + hidden, read, passes, hidden)
    if free is not None and hidden > _IN_MEMORY * free:
        usual = replace(usual, memory=usual.memory - hidden + hidden // 10, on_disk=True)
    low = replace(usual, memory=peak(1) + hidden, samples=1, on_disk=False)
    least = replace(low, memory=peak(1) + hidden // 10, on_disk=True)
    return [usual, low, least]


def _outside(task: Asked, weights: Weights) -> int:
    """Bytes of the embeddings that are held: where they are mapped, what the system maps around the tokens' rows."""
    if weights.copied or task.calibration is None:
        return weights.outside
    blocks = (task.calibration.tokens * _width(task) * _itemsize(task) // _READ_AROUND).unique()
    return min(weights.outside, len(blocks) * _READ_AROUND)


def _tokens(task: Asked) -> int:
    return 0 if task.calibration is None else task.calibration.tokens.numel()


def _hidden(task: Asked) -> int:
    """Bytes of the hidden states of all samples, in as many sets as the method keeps."""
    sets = _COPIES if task.recipe.target == "dense" or task.method.allocate == "transfer-entropy" else 1
    return _tokens(task) * _width(task) * _itemsize(task) * sets


def _width(task: Asked) -> int:
    text = task.source.text_config
    return int(getattr(text, "hidden_size", None) or getattr(text, "n_embd", None) or 0)


def _itemsize(task: Asked) -> int:
    if task.compute.dtype != "auto":
        return int(getattr(torch, task.compute.dtype).itemsize)
    return max(info.dtype.itemsize for info in task.source.tensors.infos().values() if info.dtype.is_floating_point)


def _at_work(task: Asked, samples: int | None) -> int:
    """Bytes of what one layer makes of one batch, and of its sums."""
    axes = task.source.family.axes
    units = {name: max(task.source.family.units(name)) for name in axes}
    inputs = {name: units[name] * axis.channels for name, axis in axes.items()}
    sums = 0
    for need in task.walked_needs if task.method.walks_alone else task.needs:
        size = gram_dtype(inputs[need.axis], torch.device("cpu")).itemsize
        side = inputs[need.axis] if need.kind == "channel_gram" else units[need.axis]
        sums = max(sums, _SOLVED * side**2 * (size if "channel" in need.kind else 4) if "gram" in need.kind else 0)
    if task.calibration is None:
        return sums
    length = task.calibration.tokens.shape[1]
    rows = samples or task.compute.batch_size or max(1, BATCH_TOKENS // length)
    tokens = min(rows * length, _tokens(task))
    kept = _tokens(task) * max((n for name, n in inputs.items() if kind_name(name) == "mlp"), default=0)
    goes_on = task.method.walks_alone and "mlp" in task.method.axes and kept <= HALFWAY
    halfway = (kept + _tokens(task) * _width(task)) * _itemsize(task) if goes_on else 0
    return sums + halfway + tokens * max(inputs.values(), default=1) * (4 * _itemsize(task) + 8)


def _writing(task: Asked) -> int:
    """Bytes of what is in memory while shards are written: tensors that rows are taken from, or those that are made."""
    family, infos = task.source.family, task.source.tensors.infos()
    made = task.method.merge != "prune" or any(axis.routed for axis in family.axes.values())
    largest = max((info.nbytes for name, info in infos.items() if family.locate(name)), default=0)
    return _SHARDS * (largest * (_MADE if made else 1) + _PIECES)


def _passes(task: Asked, layers: int) -> float:
    """How often all layers are run."""
    if not task.runs_model:
        return 0
    passes = float(_walks(task))
    if _measures_entropy(task):
        lists = ["blocks"] if task.method.axis == "block" else ["attention", "mlp"]
        passes += layer_forwards(layers, lists, task.recipe.entropy_search) / layers - 1
    return passes


def _walks(task: Asked) -> int:
    """How often the tokens are embedded."""
    scored = bool(task.needs) or task.method.walks_alone
    return scored + _measures_entropy(task) + (task.method.allocate == "cosine")


def _measures_entropy(task: Asked) -> bool:
    return task.method.allocate == "transfer-entropy" and task.recipe.entropy_profile is None


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"


_NOT_WHOLE = (
    "--stream reads layers one at a time, and --perplexity and --fidelity run the whole model: leave them out, and "
    "measure afterwards with dicer eval."
)


def open_store(task: Asked, cost: Cost, device: str, folder: Path | None = None) -> ResidentStore:
    """The layers of a task's model, as its cost says.

    Args:
        task: of a model in a folder.
        cost: from :func:`foresee`.
        device: to compute on.
        folder: where hidden states are written, if they are.
    """
    source, dtype = task.source, task.compute.dtype
    if cost.streamed:
        return StreamedStore(source, dtype, device, folder if cost.on_disk else None)
    return ResidentStore(source.load_model(dtype, device), source.family)


def as_foreseen(task: Any, cost: Cost) -> Any:
    """A task with as many samples in a forward pass as its cost says."""
    if cost.samples is None:
        return task
    return replace(task, compute=task.compute.model_copy(update={"batch_size": cost.samples}))
