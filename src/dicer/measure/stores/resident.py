"""A whole model in memory, as a store of its layers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, MutableSequence, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dicer.measure.batches import counted_of
from dicer.measure.experts import Experts
from dicer.measure.stores.store import Arguments, Recording
from dicer.model.families import Family
from dicer.model.units import Axis, UnitWeights, unit_weights
from dicer.processes import all_reduce, sum_of, world_size
from dicer.progress import Progress


class ResidentStore:
    """A whole model in memory.

    Args:
        model: a transformers model of a known family; left as it is, whatever is done with it meanwhile.
        family: its structure.
    """

    def __init__(self, model: nn.Module, family: Family) -> None:
        self._family = family
        self._model: Any = model
        self._layers: Sequence[nn.Module] = attrgetter(family.layers)(model)
        self._axes = family.axes
        self._returned = family.returned
        self._units = {name: family.units(name) for name in self._axes}

    @property
    def model(self) -> Any:
        """The model; of one that is streamed only what is outside the layers is there."""
        return self._model

    def whole(self) -> nn.Module:
        """The model."""
        found: nn.Module = self._model
        return found

    @property
    def nbytes_read(self) -> int:
        """Bytes of weights that were read from disk for it."""
        return sum(parameter.nbytes for parameter in self._model.parameters())

    @property
    def computes(self) -> dict[str, Any]:
        """Config, attention implementation and dtype."""
        config = self._model.config
        return {
            "config": config.to_dict(),
            "attention": str(config._attn_implementation),
            "dtype": str(self._model.dtype),
        }

    def axes(self, index: int) -> dict[str, Axis]:
        """The axes that a layer has units of."""
        return {name: axis for name, axis in self._axes.items() if self._units[name][index]}

    def layer(self, index: int, then: int | None = None) -> AbstractContextManager[nn.Module]:  # noqa: ARG002
        """One decoder layer; the next is there already."""
        return evaluating(self._layers[index])

    @property
    def depth(self) -> int:
        """How many decoder layers there are."""
        return len(self._layers)

    def final_norm(self) -> nn.Module:
        """The norm behind the last layer; an identity where the model has none (OPT-350m)."""
        owner, _, name = self._family.final_norm.rpartition(".")
        norm: nn.Module | None = getattr(self._model.get_submodule(owner), name, None) if name else None
        return nn.Identity() if norm is None else norm

    @torch.no_grad()
    def record(self, batches: Sequence[Tensor]) -> Recording:
        """Embed every batch and note what each layer is called with; no layer runs, no logits are computed.

        Args:
            batches: int64 [B, T] each.
        """
        recording, device = Recording(self._no_states()), next(self._model.get_input_embeddings().parameters()).device
        for batch in batches:
            calls: list[Arguments] = []

            def recorder(layer: nn.Module, _calls: list[Arguments] = calls) -> Callable[..., Any]:
                forward = layer.forward

                def record(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
                    if not _calls:
                        recording.hidden.append(hidden)
                    _calls.append((args, kwargs))
                    return self._as_returned(forward, hidden, args, kwargs)

                return record

            with evaluating(self._model), replaced_forwards(self._layers, recorder):
                self._model.base_model(input_ids=batch.to(device), use_cache=False)
            recording.arguments.setdefault((batch.shape[0], batch.shape[1]), calls)
        return recording

    def _no_states(self) -> MutableSequence[Tensor]:
        """Where hidden states will lie."""
        return []

    def _as_returned(self, forward: Callable[..., Any], hidden: Tensor, args: Any, kwargs: Any) -> Any:
        """Hidden states in the form in which a layer hands them on: some return a tuple; one is run to see it."""
        if self._returned is None:
            returned = forward(hidden, *args, **kwargs)
            self._returned = len(returned) if isinstance(returned, tuple) else 0
        return (hidden, *[None] * (self._returned - 1)) if self._returned else hidden

    def gradients(
        self,
        batches: Sequence[Tensor],
        layers: Collection[int],
        axes: Collection[str],
        *,
        checkpointing: bool,
        progress: Progress,
    ) -> dict[int, dict[str, UnitWeights]]:
        """dL/dW of the chosen weights, L the mean next-token cross-entropy of all tokens that count.

        Args:
            batches: int64 [B, T] each.
            layers: which decoder layers.
            axes: which of their sub-layers.
            checkpointing: keep only the layers' inputs and run each layer again on the way back.
            progress: called after each batch.

        Returns:
            layer -> axis -> float32 gradients in the form of the weights, summed over the batches before anything else,
            so that the batch size does not matter.
        """
        chosen = {index: {n: axis for n, axis in self.axes(index).items() if n in axes} for index in sorted(layers)}
        # Experts share their tensors, so one of their axes stands for all.
        owners = {(i, axis.routed or name): axis for i, found in chosen.items() for name, axis in found.items()}
        held: dict[tuple[int, str], dict[str, Tensor]] = {place: {} for place in owners}
        counted = counted_of(batches)
        pairs = list(zip(batches, counted, strict=True))
        predicted = sum_of(sum(b[:, 1:].numel() if c is None else int(c[:, 1:].sum()) for b, c in pairs))
        with ExitStack() as stack:
            stack.enter_context(evaluating(self._model))
            stack.enter_context(frozen(self._model))
            for place, sums in held.items():
                for name, weight in axis_weights(owners[place], self._layers[place[0]]).items():
                    weight.requires_grad_(True)
                    handle = weight.register_post_accumulate_grad_hook(_accumulate(sums, name, predicted))
                    stack.callback(handle.remove)
            if checkpointing:
                stack.enter_context(replaced_forwards(self._layers, _checkpointed))
            stack.enter_context(torch.enable_grad())
            progress("gradients", 0, len(batches))
            for done, (tokens, counts) in enumerate(pairs, start=1):
                batch = tokens.to(self._model.device)
                targets = (
                    batch[:, 1:] if counts is None else batch[:, 1:].masked_fill(~counts[:, 1:].to(batch.device), -100)
                )
                logits = self._model(input_ids=batch, use_cache=False).logits[:, :-1]  # [B, T-1, V]
                loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
                loss.backward()  # of the sum: divided by the tokens here, fp16 gradients would vanish
                progress("gradients", done, len(batches))
        for place, sums in held.items():
            _sum_over_processes(sums, axis_weights(owners[place], self._layers[place[0]]))
        return {
            index: {
                name: weights_of(axis, self._layers[index], held[index, axis.routed or name])
                for name, axis in found.items()
            }
            for index, found in chosen.items()
        }


@contextmanager
def replaced_forwards(modules: Sequence[nn.Module], make: Callable[[nn.Module], Callable[..., Any]]) -> Iterator[None]:
    """Replace each module's forward for a while; one of the module's own (accelerate's, say) is put back afterwards."""
    replaced = [(module.__dict__, module.__dict__.get("forward"), make(module)) for module in modules]
    try:
        for attributes, _, forward in replaced:
            attributes["forward"] = forward
        yield
    finally:
        for attributes, own, _ in replaced:
            del attributes["forward"]
            if own is not None:
                attributes["forward"] = own


def _checkpointed(layer: nn.Module) -> Callable[..., Any]:
    # transformers' own switch works only in training mode, which would also turn dropout on.
    forward = layer.forward
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[nn.Module]:
    """Turn dropout off for a while, and give every submodule its own mode back."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield module.eval()
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Freeze all parameters and set their gradients aside, and give both back afterwards."""
    own = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _, _ in own:
            parameter.requires_grad_(False)
            parameter.grad = None
        yield
    finally:
        for parameter, flag, gradient in own:
            parameter.requires_grad_(flag)
            parameter.grad = gradient


def axis_weights(axis: Axis, layer: nn.Module) -> dict[str, nn.Parameter]:
    """The weight matrices of one sub-layer, by their names inside the layer."""
    if axis.routed:
        return Experts(layer.get_submodule(axis.routed), axis.routed).tensors()
    return {piece.name: layer.get_parameter(piece.memory or piece.name) for piece in axis.required}


def weights_of(axis: Axis, layer: nn.Module, tensors: Mapping[str, Tensor]) -> UnitWeights:
    """Tensors as :func:`axis_weights` has them, by their role."""
    if axis.routed:
        return Experts(layer.get_submodule(axis.routed), axis.routed).weights(axis, tensors)
    return unit_weights(axis, tensors)


def _sum_over_processes(held: dict[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Make gradients of this process's samples those of all samples; one without samples takes part with zeros."""
    if world_size() > 1:
        for name, weight in weights.items():
            all_reduce(held.setdefault(name, torch.zeros_like(weight, dtype=torch.float32)))


def _accumulate(held: dict[str, Tensor], name: str, predicted: int) -> Callable[[Tensor], None]:
    """Move a batch's gradient of the summed loss into a float32 sum of gradients of the mean loss."""

    def hook(weight: Tensor) -> None:
        if weight.grad is None:
            return
        gradient = weight.grad.float() / max(predicted, 1)
        held[name] = held[name].add_(gradient) if name in held else gradient
        weight.grad = None

    return hook
