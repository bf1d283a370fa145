"""The modules of a model in the order in which they run, and what goes into them: a walk without weights or values."""

from __future__ import annotations

import re
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dicer.model.structure.skeleton import Shape, Skeleton, quiet

_NORM = re.compile(r"norm|(^|_)ln(_|$)")


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

    for more in inputs_without_values():
        calls.clear()
        with ExitStack() as stack:
            for name, module in sample.model.named_modules():
                stack.callback(module.register_forward_pre_hook(note(name), with_kwargs=True).remove)
            stack.enter_context(quiet())
            stack.enter_context(torch.no_grad())
            try:
                sample.model(use_cache=False, **more)
            except Exception:  # what looks at values cannot be followed further
                continue
            return calls
    return calls


def returned(sample: Skeleton, path: str) -> int | None:
    """How many values a module returns, 0 where it is no tuple, seen from the first of its class that runs.

    Modules before it that look at values, as experts do, hand on what they are given. None where it cannot be seen.
    """
    kind, passed_by = type(sample.model.get_submodule(path)), set[type]()
    while True:
        seen, broken = _once(sample, kind, passed_by)
        if seen or broken in {None, kind, type(sample.model), *passed_by}:
            return seen[0] if seen else None
        passed_by.add(broken)


def _once(sample: Skeleton, kind: type, passed_by: set[type]) -> tuple[list[int], Any]:
    """What modules of a class return in one run, and the class of the innermost module that could not be run."""
    seen: list[int] = []
    running: list[nn.Module] = []

    def ended(module: nn.Module, _: Any, output: Any) -> None:
        running.pop()
        if type(module) is kind:
            seen.append(len(output) if isinstance(output, tuple | list) else 0)

    with ExitStack() as stack:
        for part in sample.model.modules():
            stack.callback(part.register_forward_pre_hook(lambda module, _: running.append(module)).remove)
            stack.callback(part.register_forward_hook(ended).remove)
            if type(part) in passed_by:
                part.forward = _handed_on
                stack.callback(part.__dict__.pop, "forward")
        stack.enter_context(quiet())
        stack.enter_context(torch.no_grad())
        deepest: list[nn.Module] = []
        for more in inputs_without_values():
            running.clear()
            try:
                sample.model(use_cache=False, **more)
            except Exception:  # what looks at values cannot be followed further
                deepest = max(deepest, [*running], key=len)
                continue
            return seen, None
    return seen, type(deepest[-1]) if deepest else None


def _handed_on(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden


def inputs_without_values() -> list[dict[str, Tensor]]:
    """Arguments of a call, on the meta device, in the order in which to try them."""
    ids = torch.zeros(1, 4, dtype=torch.long, device="meta")
    mask = torch.zeros(1, 1, 4, 4, device="meta")  # ready made: to make one, transformers looks at values
    more: list[dict[str, Tensor]] = [{"attention_mask": mask, "position_ids": ids}, {"attention_mask": mask}, {}]
    return [{"input_ids": ids, **arguments} for arguments in more]


def final_norm(sample: Skeleton, calls: list[Call], layers: str, count: int) -> str | None:
    """The norm behind the last layer, beside the list of layers; None where there is none."""
    last, owner = f"{layers}.{count - 1}", layers.rpartition(".")[0]
    ends = [i for i, call in enumerate(calls) if call.name == last or call.name.startswith(f"{last}.")]
    modules = dict(sample.model.named_modules())
    norms = [name for name in modules if name.rpartition(".")[0] == owner and _NORM.search(name.rpartition(".")[2])]
    behind = [call.name for call in calls[ends[-1] + 1 :] if call.name in norms] if ends else []
    traced = any(call.name == last for call in calls) and len(calls) > ends[-1] + 1 if ends else False
    if traced:
        return behind[0] if behind else None
    ran = {call.name for call in calls}  # before the layers, so these are other norms
    left = [name for name in norms if name not in ran]
    return left[-1] if left else None


def activation(sample: Skeleton, calls: list[Call], layer: str, units: int, inside: str) -> str | None:
    """The module without parameters whose inputs are the neurons, by its name inside the layer; None where none is."""
    modules = dict(sample.model.named_modules())
    for call in calls:
        inner = call.name.removeprefix(f"{layer}.")
        there = inner != call.name and inner.startswith(inside)
        if there and call.inputs and call.inputs[-1] == units and _is_function(modules[call.name]):
            return inner
    if any(call.name.startswith(f"{layer}.{inside}") for call in calls):
        return None
    # What could not be followed that far has to be told by its name.
    named = [n.removeprefix(f"{layer}.") for n, m in modules.items() if n.startswith(f"{layer}.") and _is_function(m)]
    found = [n for n in named if n.startswith(inside) and "act" in n.rpartition(".")[2] and "." not in n[len(inside) :]]
    return found[0] if found else None


def _is_function(module: nn.Module) -> bool:
    return not list(module.parameters()) and not list(module.children()) and not isinstance(module, nn.Dropout)
