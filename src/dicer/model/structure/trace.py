"""The modules of a model in the order in which they run, and what goes into them: a walk without weights or values."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dicer.model.structure.skeleton import Shape, Skeleton, quiet


class Call(NamedTuple):
    """One module that ran.

    Attributes:
        name: its path.
        inputs: shape of the first tensor that went in.
    """

    name: str
    inputs: Shape


def trace(sample: Skeleton) -> list[Call]:
    """Every call of a module while four tokens go through a model on the meta device.

    As far as it goes: a class that looks at values stops there, as none are computed.
    """
    calls: list[Call] = []

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            calls.append(Call(name, tuple(tensors[0].shape) if tensors else ()))

        return hook

    ids = torch.zeros(1, 4, dtype=torch.long, device="meta")
    mask = torch.zeros(1, 1, 4, 4, device="meta")  # ready made: to make one, transformers looks at values
    attempts = ({"attention_mask": mask, "position_ids": ids}, {"attention_mask": mask}, {})
    for more in attempts:
        calls.clear()
        with ExitStack() as stack:
            for name, module in sample.model.named_modules():
                stack.callback(module.register_forward_pre_hook(note(name), with_kwargs=True).remove)
            stack.enter_context(quiet())
            stack.enter_context(torch.no_grad())
            try:
                sample.model(input_ids=ids, use_cache=False, **more)
            except Exception:  # what looks at values cannot be followed further
                continue
            return calls
    return calls


def final_norm(sample: Skeleton, calls: list[Call], layers: str, count: int) -> str | None:
    """The first module with parameters of its own that runs after the last layer and is not the head."""
    last = f"{layers}.{count - 1}"
    ends = [i for i, call in enumerate(calls) if call.name == last or call.name.startswith(f"{last}.")]
    modules = dict(sample.model.named_modules())
    head = sample.model.get_output_embeddings()
    for call in calls[ends[-1] + 1 :] if ends else ():
        module = modules[call.name]
        if module is head:
            return None
        if any(True for _ in module.parameters(recurse=False)):
            return call.name
    owner = layers.rpartition(".")[0]
    named = [n for n, m in modules.items() if n.rpartition(".")[0] == owner and list(m.parameters(recurse=False))]
    norms = [n for n in named if not isinstance(modules[n], nn.Embedding | nn.Linear) and "embed" not in n]
    return norms[-1] if norms and not ends else None


def activation(sample: Skeleton, calls: list[Call], layer: str, units: int, inside: str) -> str | None:
    """The module without parameters whose inputs are the neurons, by its name inside the layer; None where none is."""
    modules = dict(sample.model.named_modules())
    for call in calls:
        inner = call.name.removeprefix(f"{layer}.")
        if inner == call.name or not inner.startswith(inside) or not call.inputs or call.inputs[-1] != units:
            continue
        module = modules[call.name]
        if not list(module.parameters()) and not list(module.children()) and not isinstance(module, nn.Dropout):
            return inner
    return None
