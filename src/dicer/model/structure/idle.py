"""Norms that nothing comes of where sub-layers are gone: as parameters without a gradient they would stop training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from dicer.model.families import Family
from dicer.model.structure.find import memory_names
from dicer.model.structure.skeleton import Skeleton, build, quiet, stock_config
from dicer.model.structure.trace import inputs_without_values

Gone = Mapping[int, Mapping[str, bool]]  # layer -> axis that is gone -> whether a bias is left of it


def idle_tensors(family: Family, config: Any, names: list[str], gone: Gone) -> list[str]:
    """Those of some tensors that are of a norm before a sub-layer that is gone, or behind it and given only zeros.

    Args:
        family: of the model.
        config: its transformers config.
        names: tensors on disk.
        gone: what is not there.
    """
    skeleton = build(stock_config(config), family.stock_class)
    memory, idle = memory_names(skeleton.model), {*_idle(skeleton, family, gone)}
    return [name for name in names if memory(name).rpartition(".")[0] in idle]


def is_shell(family: Family, config: Any, names: list[str], layer: int) -> bool:
    """Whether a layer hands on what it is given once all its units are gone: what is left of it are idle norms.

    Args:
        family: of the model.
        config: its transformers config.
        names: all tensors on disk.
        layer: its number.
    """
    pieces = {piece.name for axis in family.axes.values() for piece in axis.slices}
    inside = {name: place[1] for name in names if (place := family.locate(name)) and place[0] == layer}
    left = [name for name, inner in inside.items()
            if inner not in pieces and not any(axis.owns(inner) for axis in family.axes.values())]  # fmt: skip
    gone = {layer: {name: False for name in family.axes if family.counts[name][layer]}}
    return left == idle_tensors(family, config, left, gone)


def _idle(skeleton: Skeleton, family: Family, gone: Gone) -> Iterator[str]:
    """Paths of the norms that nothing comes of, seen on the way back through a model without weights."""
    model, fed = skeleton.model, dict[str, bool]()
    model.requires_grad_(True)
    layers = {index: model.get_submodule(f"{family.layers}.{index}") for index in gone}
    norms = {
        f"{family.layers}.{index}.{name}": part
        for index, layer in layers.items()
        for name, part in layer.named_children()
        if _is_norm(part)
    }
    for more in inputs_without_values():
        with ExitStack() as stack, quiet():
            for name, part in norms.items():
                stack.callback(part.register_forward_pre_hook(_note(fed, name)).remove)
            for index, axes in gone.items():
                for axis, biased in axes.items():
                    last = layers[index].get_submodule(family.axes[axis].modules[-1])
                    stack.callback(last.register_forward_hook(_nothing(biased)).remove)
            try:
                model(use_cache=False, **more).logits.sum().backward()
            except Exception:  # what looks at values cannot be followed: then all norms stay
                continue
        for name, part in norms.items():
            constant = not fed.get(name, True) and getattr(part, "bias", None) is None
            if constant or all(parameter.grad is None for parameter in part.parameters()):
                yield name
        return


def _note(fed: dict[str, bool], name: str) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        fed[name] = bool(args) and isinstance(args[0], Tensor) and args[0].requires_grad

    return hook


def _nothing(biased: bool) -> Callable[..., Any]:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        first, *more = output if isinstance(output, tuple) else (output,)
        zeros = torch.zeros_like(first, requires_grad=biased)
        return (zeros, *[None] * len(more)) if isinstance(output, tuple) else zeros

    return hook


def _is_norm(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not list(module.children()) and all(parameter.dim() == 1 for parameter in parameters)
