"""What a walk asks of the place where a model's decoder layers come from: the seam between a pass and the memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableSequence, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from dicer.model.units import Axis, UnitWeights
from dicer.progress import Progress

Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # what a decoder layer is called with, besides the hidden states


@dataclass
class Recording:
    """The first layer's input and every layer's own arguments.

    Attributes:
        hidden: one tensor [B, T, d] for each batch.
        arguments: (rows, tokens in a row) of a batch -> arguments of each layer. They depend on positions and masks,
            not on the tokens, so batches of one size share them; layers do not (sliding and full attention take turns).
    """

    hidden: MutableSequence[Tensor] = field(default_factory=list)
    arguments: dict[tuple[int, int], list[Arguments]] = field(default_factory=dict)

    def arguments_of(self, hidden: Tensor) -> list[Arguments]:
        """What each layer is called with besides these hidden states [B, T, d]."""
        return self.arguments[hidden.shape[0], hidden.shape[1]]


class LayerStore(Protocol):
    """Where a model's decoder layers come from."""

    @property
    def computes(self) -> Mapping[str, Any]:
        """What decides the numbers besides weights and tokens: config, attention implementation and dtype."""
        ...

    @property
    def depth(self) -> int:
        """How many decoder layers there are."""
        ...

    def axes(self, index: int) -> dict[str, Axis]:
        """The axes that a layer has units of, by name."""
        ...

    def layer(self, index: int, then: int | None = None) -> AbstractContextManager[nn.Module]:
        """One decoder layer, ready to run inside the ``with`` block.

        Args:
            index: which.
            then: which will be asked for next, where all of it will be; it may be read meanwhile.
        """
        ...

    def final_norm(self) -> nn.Module:
        """The norm behind the last layer; an identity where the model has none."""
        ...

    def whole(self) -> nn.Module:
        """The whole model, to be run from end to end."""
        ...

    def record(self, batches: Sequence[Tensor]) -> Recording:
        """Run everything before the first layer."""
        ...

    def gradients(
        self,
        batches: Sequence[Tensor],
        layers: Collection[int],
        axes: Collection[str],
        *,
        checkpointing: bool,
        progress: Progress,
    ) -> dict[int, dict[str, UnitWeights]]:
        """dL/dW of the chosen layers' weights along the chosen axes."""
        ...
