"""What stays of one sub-layer: the units, what others become of them, and what its output projection becomes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dicer.errors import PlanError
from dicer.model.units import Slice

MERGE = ("row", "weight_in", "weight_out")
REPAIR = ("repaired", "repaired_bias")
LEARNED = "learned."


@dataclass(frozen=True)
class Merge:
    """The sparse maps M_in and M_out [K, N] of one layer; every unit belongs to at most one survivor.

    Attributes:
        row: int64 [N], the survivor (its place in ``keep``) that a unit goes into, -1 for none.
        weight_in: float32 [N], its entry of M_in (gate and up rows).
        weight_out: float32 [N], its entry of M_out (down columns).
    """

    row: Tensor
    weight_in: Tensor
    weight_out: Tensor

    def fits(self, units: int, keep: int) -> bool:
        """Whether these are maps of so many units to so many survivors."""
        weights = (self.weight_in, self.weight_out)
        if self.row.dtype != torch.int64 or any(tensor.shape != (units,) for tensor in (self.row, *weights)):
            return False
        if any(weight.dtype != torch.float32 or not weight.isfinite().all() for weight in weights):
            return False
        return int(self.row.min()) >= -1 and int(self.row.max()) < keep

    def matrices(self, keep: int) -> tuple[Tensor, Tensor]:
        """(M_in, M_out), each a sparse float32 [K, N]."""
        unit = torch.nonzero(self.row >= 0).flatten()  # [M]
        place = torch.stack([self.row[unit], unit])  # [2, M]
        first, second = (
            torch.sparse_coo_tensor(place, weight[unit], (keep, len(self.row)), check_invariants=True)
            for weight in (self.weight_in, self.weight_out)
        )
        return first, second


@dataclass(frozen=True)
class Repair:
    """An output projection that was solved anew, so that the sub-layer's output stays what it was.

    Attributes:
        weight: float32 [d, K * C], its columns for the units that stay, C for each.
        bias: float32 [d], what is added to its own bias; None where nothing is compensated.
        about: how it came about: ``ridge``, ``tokens``, ``error`` before and after; in the plan's JSON file.
        learned: what the sub-layer's other tensors have become more than they are cut, by their names inside the layer
            as on disk: float32, in the file's order. Empty where nothing has learned.
    """

    weight: Tensor
    bias: Tensor | None
    about: dict[str, Any]
    learned: Mapping[str, Tensor] = field(default_factory=dict)

    def touches(self, piece: Slice) -> bool:
        """Whether a tensor of the sub-layer becomes another than it is cut."""
        return piece.is_output or piece.name in self.learned

    def fits(self, keep: int) -> bool:
        """Whether these are finite numbers for so many units that stay."""
        fit = self.weight.ndim == 2 and keep > 0 and self.weight.shape[1] > 0 and self.weight.shape[1] % keep == 0
        bias = self.bias if self.bias is not None or not fit else self.weight[:, 0]
        tensors = (self.weight, bias)
        numbers = all(
            t is not None and t.dtype == torch.float32 and bool(t.isfinite().all())
            for t in (*tensors, *self.learned.values())
        )
        return fit and numbers and bias is not None and bias.shape == self.weight.shape[:1]

    def digest(self) -> str:
        """SHA-256 of the numbers."""
        digest = hashlib.sha256()
        for tensor in (self.weight, self.bias):
            if tensor is not None:
                digest.update(tensor.contiguous().numpy().tobytes())
        for name, tensor in sorted(self.learned.items()):
            digest.update(f"{name} {tuple(tensor.shape)}\n".encode() + tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class LayerPlan:
    """What stays of one layer along one axis.

    Attributes:
        units: N, before.
        keep: int64 [K], sorted; empty where the whole sub-layer goes.
        scores: float32 [N], what the criterion said; kept for whoever wants to know which units mattered.
        merge: how the units that go live on in others; None where nothing is merged.
        means: float32 [N * C], the dense model's mean inputs of the output projection, C for each unit; a bias makes up
            for what the cut takes of them. None where nothing is compensated.
        repair: the output projection as it was solved anew, and what has learned since; None where what is kept stays
            what it is.
    """

    units: int
    keep: Tensor
    scores: Tensor
    merge: Merge | None = None
    means: Tensor | None = None
    repair: Repair | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Everything by its name in the file."""
        merged = {} if self.merge is None else vars(self.merge)
        found = {"keep": self.keep, "scores": self.scores, **merged, "means": self.means}
        if self.repair is not None:
            found |= {"repaired": self.repair.weight, "repaired_bias": self.repair.bias}
            found |= {f"{LEARNED}{name}": tensor for name, tensor in self.repair.learned.items()}
        return {name: tensor.contiguous() for name, tensor in found.items() if tensor is not None}

    def widths(self) -> dict[str, Any]:
        """What the plan's JSON file says of it."""
        said: dict[str, Any] = {"units": self.units, "keep": len(self.keep)}
        return (
            said if self.repair is None else {**said, "repair": {**self.repair.about, "sha256": self.repair.digest()}}
        )

    def explain(self) -> str:
        """How much stays and goes."""
        return f"{self.units} -> {len(self.keep)} ({1 - len(self.keep) / self.units:.1%} removed)"

    def explain_scores(self) -> str:
        """How scores of kept and dropped units compare."""
        kept = torch.zeros(self.units, dtype=torch.bool)
        kept[self.keep] = True
        sides = (("kept", self.scores[kept]), ("dropped", self.scores[~kept]))
        return "score: " + ", ".join(f"{name} median {scores.median():.4g}" for name, scores in sides if len(scores))

    def merge_matrices(self) -> tuple[Tensor, Tensor] | None:
        """(M_in, M_out), each a sparse float32 [K, N]; None where nothing is merged."""
        return None if self.merge is None else self.merge.matrices(len(self.keep))

    def rows(self, channels: int) -> Tensor:
        """Which inputs of the output projection stay, int64 [K * C]."""
        return (self.keep[:, None] * channels + torch.arange(channels)).reshape(-1)

    def output(self, by_channel: Tensor) -> Tensor:
        """What the output projection keeps, float32 [K * C, d]: solved anew, merged, or as it was.

        Args:
            by_channel: [N * C, d], the whole one.
        """
        if self.repair is not None:
            return self.repair.weight.T
        if (matrices := self.merge_matrices()) is not None:
            merged: Tensor = torch.sparse.mm(matrices[1], by_channel.float().cpu())
            return merged
        return by_channel[self.rows(len(by_channel) // self.units).to(by_channel.device)].float()

    def lost(self, by_channel: Tensor) -> Tensor:
        """What the output loses on average, float32 [d]: ``W (a - M_out^T M_in a)`` (FLAP, An et al. 2024).

        Without a merge this is ``W[:, removed] @ a[removed]``. Where units merge, the survivor's activation is taken to
        be ``M_in a``: exact for ``dominant``, linearised for ``mean``. A repair has solved it along.

        Args:
            by_channel: [N * C, d], the whole output projection.
        """
        if self.repair is not None and self.repair.bias is not None:
            return self.repair.bias
        if self.means is None:
            raise PlanError("the plan has no mean activations, so there is nothing to compensate with.")
        lost = self.means.clone()  # [N*C]
        matrices = self.merge_matrices()
        if matrices is None:
            lost[self.rows(len(lost) // self.units)] = 0.0
        else:
            survivors = torch.sparse.mm(matrices[0], lost[:, None])  # [K,1]
            lost -= torch.sparse.mm(matrices[1].T, survivors)[:, 0]
        return lost.float() @ by_channel.float().cpu()
