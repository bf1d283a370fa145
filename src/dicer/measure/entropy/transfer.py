"""Transfer entropy: how much the entropy of a model's output hangs on each block, attention and MLP.

The estimate is that of Lin et al., "MLP Can Be a Good Transformer Learner" (CVPR 2024): channels of the final hidden
state are taken as Gaussian, so that ``H(F) = sum_j log std_j(F)`` up to a constant, and
``TE(m) = |H(F) - H(F | m bypassed)|``. What bypassing means for a language model is our reading: the residual branch
adds nothing (docs/what-to-prune.md).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, MutableSequence, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dicer.errors import CalibrationError, RecipeError
from dicer.measure.batches import counted_of
from dicer.measure.entropy.moments import Moments
from dicer.measure.entropy.profile import LISTS, Entry, check_choices, poor, sub_layers
from dicer.measure.entropy.profile import Profile as Profile
from dicer.measure.statistics import widest
from dicer.measure.stores.resident import replaced_forwards
from dicer.measure.stores.store import LayerStore, Recording
from dicer.model.units import Axis, SubLayer
from dicer.processes import from_first, sum_of
from dicer.progress import Progress, silent

_STAGE = "transfer entropy (layer forwards)"

Remember = Callable[[str, float], None]  # key of a module, H without it


def layer_forwards(
    layers: int, lists: Sequence[str] = LISTS, search: str = "independent", picks: Sequence[int] | None = None
) -> int:
    """What a profile costs, in forwards of one layer over all batches; ``layers`` of them are a forward pass.

    With ``L`` layers, independent: ``L`` for the model itself, which is also the prefix of all others,
    ``L(L - 1) / 2`` for blocks and ``L(L + 1) / 2`` for each kind of sub-layer. Greedy: ``L(L + 1)(L + 2) / 6 - L``
    for blocks. For sub-layers, each round with the remaining ones R costs ``sum (L - layer) + max layer`` over R, and
    so it hangs on the order in which they are picked; without ``picks`` it is the most that it can be.

    Args:
        layers: L.
        lists: of blocks, attention, mlp.
        search: independent or greedy.
        picks: layers of the sub-layers in the order in which they were picked.
    """
    blocks, kinds = "blocks" in lists, len({*lists} - {"blocks"})
    if search == "independent":
        return layers + blocks * layers * (layers - 1) // 2 + kinds * layers * (layers + 1) // 2
    cost = 1 + (layers * (layers + 1) * (layers + 2) // 6 - layers if blocks else 0)  # 1: the model's own last layer
    order = sorted([*range(layers)] * kinds, reverse=True) if picks is None else list(picks)
    for number in range(len(order)):
        rest = order[number:]
        cost += sum(layers - layer for layer in rest) + max(rest)
    return cost


@torch.no_grad()
def measure(
    store: LayerStore,
    batches: Sequence[Tensor],
    *,
    lists: Sequence[str] = LISTS,
    search: str = "independent",
    at: str = "norm",
    known: Mapping[str, float] | None = None,
    remember: Remember | None = None,
    progress: Progress = silent,
) -> Profile:
    """Measure the transfer entropy of the modules in the chosen lists.

    The model runs layer by layer, what lies before a bypassed module once for all modules behind it, and no logits are
    computed. Two copies of all batches' hidden states lie on the device (greedy: three), and what is bypassed is not
    computed. In several processes, each gives its own batches and gets the same profile.

    Args:
        store: where the layers come from.
        batches: calibration tokens, int64 [B, T] each.
        lists: of blocks, attention, mlp.
        search: ``independent`` bypasses each module alone; ``greedy`` picks one by one the module with the smallest TE
            while the earlier picks stay bypassed, blocks apart from sub-layers (ties: the one that runs first).
        at: the final state is that behind the final norm (``norm``) or in front of it (``hidden``).
        known: what ``remember`` was told in an earlier run with the same batches and choices; not run again.
        remember: called with (key, H) as soon as a module was measured.
        progress: called with (stage, done, total) in layer forwards; of a greedy search the total is the most.

    Raises:
        RecipeError: unknown names, or a final state with NaN or infinite values.
        CalibrationError: there are no tokens.
    """
    check_choices(lists, search, at)
    if not sum_of(sum(batch.numel() for batch in batches)):
        raise CalibrationError("there are no calibration tokens to measure the entropy with; give at least one sample.")
    total = layer_forwards(store.depth, lists, search)
    recording = store.record(batches)
    empty = _nothing_seen(store, recording)
    run = _Run(
        store, recording, counted_of(batches), at, known or {}, remember or silent, progress, total, empty, empty
    )
    progress(_STAGE, 0, total)
    found = _independent(run, lists) if search == "independent" else _greedy(run, lists)
    progress(_STAGE, run.done, run.done)
    model = run.model
    measured: dict[str, Any] = {
        name: tuple(found[place] for place in sub_layers([name], store.depth)) for name in lists
    }
    measured |= {"search": search, "at": at}
    return Profile(
        entropy=model.entropy,
        tokens=model.count,
        channels=len(model.mean),
        notes=poor(model.count, len(model.mean), model.constant),
        **measured,
    )


@dataclass
class _Run:
    """What all steps of one measurement share.

    Attributes:
        counted: for each batch, which of its tokens count; None for all.
        empty: moments of no tokens.
        model: moments of the whole model's final state; empty before the first round ends.
        done: layer forwards up to now, with those that ``known`` saved.
    """

    store: LayerStore
    recording: Recording
    counted: Sequence[Tensor | None]
    at: str
    known: Mapping[str, float]
    remember: Remember
    progress: Progress
    total: int
    empty: Moments
    model: Moments
    done: int = 0

    def step(self, forwards: int = 1) -> None:
        self.done += forwards
        self.progress(_STAGE, self.done, self.total)

    def transfer(self, entropy: float) -> float:
        return abs(self.model.entropy - entropy)


def _nothing_seen(store: LayerStore, recording: Recording) -> Moments:
    """Moments of no tokens; process 0 always has some, and knows the shape for one that has none."""
    channels = from_first(recording.hidden[0].shape[-1] if recording.hidden else 0)
    with store.layer(0) as layer:
        device = next(layer.parameters()).device
    zeros = torch.zeros(channels, dtype=widest(device), device=device)
    return Moments(0, zeros, zeros)


def _independent(run: _Run, lists: Sequence[str]) -> dict[SubLayer, Entry]:
    entropies = dict(_round(run, run.recording.hidden, [], sub_layers(lists, run.store.depth)))
    return {place: Entry(place.layer, run.transfer(value), value) for place, value in entropies.items()}


def _greedy(run: _Run, lists: Sequence[str]) -> dict[SubLayer, Entry]:
    """Blocks are one pool, attention and MLPs together another: a block holds them both."""
    found: dict[SubLayer, Entry] = {}
    for pool in (["blocks"] if "blocks" in lists else [], [name for name in lists if name != "blocks"]):
        rest, picked = sub_layers(pool, run.store.depth), list[SubLayer]()
        while rest:
            values = dict(_round(run, copy(run.recording.hidden), picked, rest))
            best = min(rest, key=lambda place: run.transfer(values[place]))  # of equal ones the first
            found[best] = Entry(best.layer, run.transfer(values[best]), values[best], len(picked))
            picked.append(best)
            rest.remove(best)
    return found


def _round(
    run: _Run, hidden: MutableSequence[Tensor], picked: list[SubLayer], candidates: list[SubLayer]
) -> Iterator[tuple[SubLayer, float]]:
    """H without each candidate and without all that were picked; the first round measures the model itself, too.

    Args:
        run: store, recording and so on.
        hidden: what goes into layer 0, [B, T, C] each; moved on in reached.
        picked: what is bypassed in any case.
        candidates: in the order in which they run.
    """
    reached = 0  # the layer that hidden goes into next
    for place in candidates:
        key = f"{place.key}@{_digest(picked)}" if picked else place.key
        value = run.known.get(key)
        if value is None:
            _move(run, hidden, range(reached, place.layer), picked)
            reached = place.layer
            value = _final(run, hidden, place.layer, [*picked, place]).entropy
            run.remember(key, value)
        else:
            run.step(_cost(range(place.layer, run.store.depth), [*picked, place]))
        yield place, value
    if run.model.count:
        run.step(_cost(range(reached, candidates[-1].layer), picked))  # what known values saved
    else:
        run.model = _final(run, hidden, reached, picked)


def _digest(picked: Collection[SubLayer]) -> str:
    """Which modules are bypassed already, whatever the order: a resumed search may pick others than the first did."""
    return hashlib.sha256(" ".join(sorted(place.key for place in picked)).encode()).hexdigest()[:16]


def _final(run: _Run, hidden: MutableSequence[Tensor], start: int, bypassed: Sequence[SubLayer]) -> Moments:
    """The final state's moments over all processes, from what goes into layer ``start``."""
    moving = copy(hidden)
    _move(run, moving, range(start, run.store.depth), bypassed)
    norm = run.store.final_norm() if run.at == "norm" else nn.Identity()
    moments = run.empty
    for values, counted in zip(moving, run.counted, strict=True):
        final = norm(values)
        moments = moments.add(final if counted is None else final[counted.to(final.device)])
    moments = moments.of_all_processes()
    if not moments.spread.isfinite().all():
        raise RecipeError(
            f"with {bypassed[-1].key if bypassed else 'nothing'} bypassed, {_breaking(run, hidden, start, bypassed)} "
            "gives NaN or infinite values, so there is no entropy; compute in float32 (--dtype float32), or look for "
            "broken weights."
        )
    return moments


def _breaking(run: _Run, hidden: MutableSequence[Tensor], start: int, bypassed: Sequence[SubLayer]) -> str:
    """Where values stop to be finite; run once more, since looking at each layer would slow down those that are."""
    moving = copy(hidden)
    for index in range(start, run.store.depth):
        _move(run, moving, range(index, index + 1), bypassed)
        if not all(values.isfinite().all() for values in moving):
            return f"layer {index}"
    return "the final norm" if run.at == "norm" else "the model"


def _cost(layers: range, bypassed: Collection[SubLayer]) -> int:
    """Layer forwards: a bypassed block is not run, of a layer with bypassed sub-layers the rest is."""
    return sum(SubLayer(layer, "block") not in bypassed for layer in layers)


def _move(run: _Run, hidden: MutableSequence[Tensor], layers: range, bypassed: Collection[SubLayer]) -> None:
    """Every batch through some layers without what is bypassed, in place; layer-major, as layers may come from disk."""
    for index in layers:
        if SubLayer(index, "block") in bypassed:
            continue
        axes = [axis for name, axis in run.store.axes(index).items() if SubLayer(index, name) in bypassed]
        with run.store.layer(index, then=index + 1 if index + 1 in layers else None) as layer, ExitStack() as stack:
            for axis in axes:
                stack.enter_context(bypass(layer, axis))
            for number, values in enumerate(hidden):
                args, kwargs = run.recording.arguments_of(values)[index]
                hidden[number] = layer(values, *args, **kwargs)
        run.step()


@contextmanager
def bypass(layer: nn.Module, axis: Axis) -> Iterator[None]:
    """Let a sub-layer add nothing to the residual stream, without computing it; a norm behind it still runs.

    Args:
        layer: a decoder layer.
        axis: attention or mlp, of its family.
    """
    modules = [layer.get_submodule(name) for name in axis.modules]
    with replaced_forwards(modules[:-1], lambda _: _input), replaced_forwards(modules[-1:], lambda _: _nothing(axis)):
        yield


def _input(*args: Any, **kwargs: Any) -> Tensor:
    values: Tensor = args[0] if args else kwargs["hidden_states"]  # attention is called by name
    return values


def _nothing(axis: Axis) -> Callable[..., Any]:
    """A forward that gives zeros [B, T, C], the width of the residual stream, and None for whatever comes with them."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        zeros = torch.zeros_like(_input(*args, **kwargs))
        return zeros if axis.returns == 1 else (zeros, *[None] * (axis.returns - 1))

    return forward
