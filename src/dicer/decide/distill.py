"""Output projections that learn, all of them together, from what the dense model answers to the calibration text.

A repair mends each sub-layer by itself, towards its own output. Here the kept columns of all layers follow the gradient
of KL(dense || pruned), the loss that a pruned model is judged by (Hinton et al. 2015; as the last step of pruning:
Minitron, Muralidharan et al. 2024). What learns are the numbers that a repair writes anyhow, so nothing else changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dicer.decide.layer_plan import LayerPlan
from dicer.decide.repair import masked
from dicer.errors import RecipeError
from dicer.measure.batches import counted_of
from dicer.measure.runner import swapping
from dicer.measure.stores.resident import evaluating, frozen, replaced_forwards
from dicer.measure.stores.store import LayerStore
from dicer.model.units import SubLayer
from dicer.progress import Progress, silent

RATE = 2e-4  # of AdamW at its highest; from there along a cosine to zero
STEP_TOKENS = 1024  # for each step
_BETAS = (0.9, 0.99)
_WARM = 0.05  # of all steps, in which the rate rises
_LARGEST = 1.0  # norm of a step's gradient


@dataclass(frozen=True)
class _Output:
    """A cut output projection: the inputs that stay, and columns that learn.

    Attributes:
        module: it, in the dense model.
        rows: int64 [K * C], its inputs that stay.
        weight: float32 [K * C, d].
        others: name inside the layer -> what else the cut has made of it: merged rows, a bias.
    """

    module: nn.Module
    rows: Tensor
    weight: Tensor
    others: dict[str, Tensor]

    def __call__(self, inputs: Tensor) -> Tensor:
        output = inputs.index_select(-1, self.rows) @ self.weight.to(inputs.dtype)
        bias = getattr(self.module, "bias", None)
        return output if bias is None else output + bias


def distilled(
    store: LayerStore,
    layers: Mapping[SubLayer, LayerPlan],
    batches: Sequence[Tensor],
    passes: int,
    *,
    rate: float = RATE,
    seed: int = 0,
    at_once: int | None = None,
    progress: Progress = silent,
) -> dict[SubLayer, LayerPlan]:
    """Plans whose repaired columns have learned from the dense model.

    Args:
        store: the dense model, whole; left as it is.
        layers: what stays of its sub-layers; what has no repair stays as it is.
        batches: int64 [B, T] each; a step for each.
        passes: how often all of them are seen, each time in another order.
        rate: of AdamW.
        seed: of that order.
        at_once: samples that go through the model together, where a step has more; this changes the last bits alone.
        progress: called with (stage, done, total).

    Returns:
        The same plans with other numbers in their repairs.

    Raises:
        RecipeError: a loss that is not finite.
    """
    learning = {place: layer for place, layer in layers.items() if layer.repair is not None}
    if not learning or not batches:
        return dict(layers)
    model = store.whole()
    outputs = {place: _output(store, place, layer) for place, layer in learning.items()}
    weights = [output.weight.requires_grad_(True) for output in outputs.values()]
    optimizer = torch.optim.AdamW(weights, lr=rate, betas=_BETAS, weight_decay=0.0)
    steps = passes * len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share(step, steps))
    with evaluating(model), frozen(model):
        progress("distill", 0, steps)
        for done, number in enumerate(_order(len(batches), passes, seed), start=1):
            loss = _divergence(store, outputs, batches[number], counted_of(batches)[number], at_once)
            if not math.isfinite(loss):
                raise RecipeError(
                    "the pruned model's answers are not finite while its output projections learn: try --dtype float32."
                )
            nn.utils.clip_grad_norm_(weights, _LARGEST)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            progress("distill", done, steps)
    return {**layers, **{place: _learned(learning[place], outputs[place]) for place in learning}}


def _output(store: LayerStore, place: SubLayer, layer: LayerPlan) -> _Output:
    with store.layer(place.layer) as module:
        axis = store.axes(place.layer)[place.axis]
        others = masked(axis, {name: parameter.detach() for name, parameter in module.named_parameters()}, layer)
        output = module.get_submodule(axis.output)
    del others[axis.output_slice.memory or axis.output_slice.name]
    device = next(output.parameters()).device
    assert layer.repair is not None
    weight = layer.repair.weight.T.to(device, copy=True).contiguous()
    return _Output(output, layer.rows(axis.channels).to(device), weight, others)


def _share(step: int, steps: int) -> float:
    """Of the highest rate, at one of so many steps."""
    return min(1.0, (step + 1) / max(1.0, _WARM * steps)) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def _order(count: int, passes: int, seed: int) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(passes):
        yield from torch.randperm(count, generator=generator).tolist()


def _divergence(
    store: LayerStore,
    outputs: Mapping[SubLayer, _Output],
    batch: Tensor,
    counted: Tensor | None,
    at_once: int | None,
) -> float:
    """Mean KL(dense || pruned) over the tokens of a batch that count; its gradient is added to the columns'."""
    model, total = store.whole(), 0.0
    counts = torch.ones_like(batch, dtype=torch.bool) if counted is None else counted
    size = at_once or len(batch)
    for part, own in zip(batch.split(size), counts.split(size), strict=True):
        tokens = part.to(next(model.parameters()).device)
        with torch.no_grad():
            dense = _log_probs(model, tokens)
        with torch.enable_grad(), _as_cut(store, outputs):  # the way back, too, reads what the cut has made
            apart = (dense.exp() * (dense - _log_probs(model, tokens))).sum(-1)  # [B, T]
            loss = apart[own.to(apart.device)].sum() / max(int(counts.sum()), 1)
            loss.backward()
        total += float(loss.detach())
    return total


def _log_probs(model: nn.Module, tokens: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits  # [B, T, V]
    return logits.float().log_softmax(-1)


@contextmanager
def _as_cut(store: LayerStore, outputs: Mapping[SubLayer, _Output]) -> Iterator[None]:
    """The dense model as the pruned one for a while; its output projections are those that learn."""
    with ExitStack() as stack:
        for place, output in outputs.items():
            module = stack.enter_context(store.layer(place.layer))
            stack.enter_context(swapping(module))(output.others)
        modules: dict[nn.Module, Callable[..., Tensor]] = {output.module: output for output in outputs.values()}
        stack.enter_context(replaced_forwards(list(modules), lambda module: modules[module]))
        yield


def _learned(layer: LayerPlan, output: _Output) -> LayerPlan:
    assert layer.repair is not None
    weight = output.weight.detach().T.float().contiguous().cpu()
    return replace(layer, repair=replace(layer.repair, weight=weight))
