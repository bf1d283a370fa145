"""What this machine has: the device to compute on, and the memory that was used."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import torch

from dicer.errors import RecipeError
from dicer.processes import local_rank


def pick_device(asked: str) -> str:
    """``auto`` -> the first accelerator that is there, else the CPU.

    Raises:
        RecipeError: the device does not exist here.
    """
    if asked == "auto":
        if torch.cuda.is_available():  # of several processes (accelerate launch) each has its own
            own = local_rank()
            return "cuda" if own is None else f"cuda:{own}"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=asked).tolist()  # 'meta' makes tensors, but they hold nothing
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = str(error).splitlines()[0].split(". ")[0].rstrip(".")
        raise RecipeError(f"device '{asked}' cannot be used here: {reason}. Use --device cpu or auto.") from None
    return asked


def reset_peak_memory() -> None:
    """Let :func:`peak_memory` count from here, where the system can do that (Linux can; elsewhere nothing changes)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)


def peak_memory() -> dict[str, int]:
    """Most bytes that this process has held: ``host``, and each CUDA device that was used."""
    peaks = {"host": _host_peak()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            peaks[f"cuda:{index}"] = torch.cuda.max_memory_allocated(index)
    return peaks


def _host_peak() -> int:
    with contextlib.suppress(OSError, StopIteration):  # what getrusage says begins with the peak of who started this
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def held_memory() -> int:
    """Bytes that this process holds now; 0 where the system does not say."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    return 0


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had there; None where the system does not say."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return None
