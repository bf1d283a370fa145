"""How fast models generate: several of them in turns, so that what else the machine does hits all alike."""

from __future__ import annotations

import importlib.metadata
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dicer.errors import RecipeError
from dicer.machine import peak_memory
from dicer.measure.stores.resident import evaluating
from dicer.progress import Progress, silent


@dataclass(frozen=True)
class Spread:
    """A quantity over all rounds."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class BatchSpeed:
    """One model at one batch size.

    Attributes:
        batch_size: prompts at once.
        first_token_s: seconds until the first new token is known.
        prefill_tokens_per_s: prompt tokens over that time, all prompts together.
        decode_tokens_per_s: the later tokens over their time, all prompts together; None where only one was asked for.
        generate_s: seconds for the whole: prompt and all new tokens.
        generated_tokens_per_s: all new tokens over the whole time.
        speedup: the first model's whole time over this model's, round by round.
        peak_bytes: CUDA only: the weights of this model plus the most that generating held on top; what other models
            hold is not in it. None elsewhere: a process's memory cannot be told apart by model.
    """

    batch_size: int
    first_token_s: Spread
    prefill_tokens_per_s: Spread
    decode_tokens_per_s: Spread | None
    generate_s: Spread
    generated_tokens_per_s: Spread
    speedup: Spread
    peak_bytes: int | None


@dataclass(frozen=True)
class ModelSpeed:
    """One model: its size (parameters and their bytes, shared ones once), and its speed at every batch size."""

    name: str
    parameters: int
    nbytes: int
    parameters_ratio: float
    dtype: str
    batches: tuple[BatchSpeed, ...]


@dataclass(frozen=True)
class Bench:
    """A whole run.

    Attributes:
        device: what it ran on.
        threads: of torch, on the CPU.
        prompt_length: tokens in each prompt.
        tokens: new tokens for each prompt.
        rounds: timed ones, after one that is not.
        process_peak_bytes: the most that this process held up to the end, all models together.
        models: in the order given; ratios are to the first.
        versions: of torch and transformers.
    """

    device: str
    threads: int
    prompt_length: int
    tokens: int
    rounds: int
    process_peak_bytes: dict[str, int]
    models: tuple[ModelSpeed, ...]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Run:
    first: float  # seconds
    whole: float  # seconds
    extra: int | None  # bytes


def bench(
    models: Sequence[tuple[str, Any]],
    *,
    tokens: int = 128,
    batch_sizes: Sequence[int] = (1, 8),
    prompt_length: int = 128,
    rounds: int = 5,
    seed: int = 0,
    progress: Progress = silent,
) -> Bench:
    """Generate greedily from random prompts, models in turns (the speed test of docs/evaluation.md is batch size 1).

    Every run makes exactly ``tokens`` tokens a prompt: nothing ends a text early.

    Args:
        models: (name, causal language model in memory); all on one device.
        tokens: new tokens for each prompt.
        batch_sizes: prompts at once.
        prompt_length: tokens in each prompt.
        rounds: timed runs of each model at each batch size.
        seed: of the prompts; they are the same for all models.
        progress: called with (stage, done, total).

    Raises:
        RecipeError: a number below 1, no model, models on several devices, or more tokens than a model has positions.
    """
    _check(models, tokens, batch_sizes, prompt_length, rounds)
    runs: dict[tuple[int, int], list[_Run]] = {(m, b): [] for m in range(len(models)) for b in batch_sizes}
    done, total = 0, len(runs) * (rounds + 1)
    for size in batch_sizes:
        prompts = _prompts(models, size, prompt_length, seed)
        for turn in range(rounds + 1):
            for i in range(len(models)):
                chosen = (i + turn) % len(models)  # nobody is always behind the same one
                run = _generate(models[chosen][1], prompts, tokens)
                if turn:  # the first one loads kernels and fills caches
                    runs[chosen, size].append(run)
                done += 1
                progress("bench", done, total)
    speeds = [_model_speed(models, i, runs, batch_sizes, prompt_length, tokens) for i in range(len(models))]
    return Bench(
        device=str(models[0][1].device),
        threads=torch.get_num_threads(),
        prompt_length=prompt_length,
        tokens=tokens,
        rounds=rounds,
        process_peak_bytes=peak_memory(),
        models=tuple(speeds),
        versions={name: importlib.metadata.version(name) for name in ("torch", "transformers")},
    )


def _check(
    models: Sequence[tuple[str, Any]], tokens: int, batch_sizes: Sequence[int], prompt_length: int, rounds: int
) -> None:
    if not models or not batch_sizes:
        raise RecipeError("the bench needs at least one model and one batch size.")
    for name, value in (("tokens", tokens), ("prompt_length", prompt_length), ("rounds", rounds)):
        if value < 1:
            raise RecipeError(f"{name} must be at least 1; got {value}.")
    if min(batch_sizes) < 1 or len(set(batch_sizes)) < len(batch_sizes):
        raise RecipeError(f"batch sizes are numbers from 1 on, each once; got {', '.join(map(str, batch_sizes))}.")
    if len({str(model.device) for _, model in models}) > 1:
        raise RecipeError("the models are on different devices; load them all onto one.")
    for name, model in models:
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if positions is not None and prompt_length + tokens > positions:
            raise RecipeError(
                f"{name} has {positions} positions, too few for {prompt_length} tokens of prompt and {tokens} new ones."
            )


def _prompts(models: Sequence[tuple[str, Any]], size: int, length: int, seed: int) -> Tensor:
    """Random ids that all the models know, int64 [B, P]."""
    vocabulary = min(int(model.get_input_embeddings().num_embeddings) for _, model in models)
    ids = torch.randint(vocabulary, (size, length), generator=torch.Generator().manual_seed(seed))
    return ids.to(models[0][1].device)


class _Clock:
    """A streamer: generate hands it the prompt, then each token once the host knows it, so the device is waited for."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: Tensor) -> None:
        """Take the time."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""


@torch.no_grad()
def _generate(model: Any, prompts: Tensor, tokens: int) -> _Run:
    """One run: exactly ``tokens`` new tokens for each prompt [B, P]."""
    cuda = prompts.device.type == "cuda"
    clock, held = _Clock(), 0
    if cuda:
        torch.cuda.synchronize(prompts.device)
        torch.cuda.reset_peak_memory_stats(prompts.device)
        held = torch.cuda.memory_allocated(prompts.device)
    with evaluating(model), plain_generation(model):
        start = time.perf_counter()
        made = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            streamer=clock,
        )
    assert made.shape[1] == prompts.shape[1] + tokens
    extra = torch.cuda.max_memory_allocated(prompts.device) - held if cuda else None
    return _Run(clock.times[1] - start, clock.times[-1] - start, extra)


@contextmanager
def plain_generation(model: Any, ends: Sequence[int] = ()) -> Iterator[None]:
    """Greedy and with these end tokens alone, whatever the checkpoint's own generation config says."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=list(ends) or None)
    try:
        yield
    finally:
        model.generation_config = own


def _model_speed(
    models: Sequence[tuple[str, Any]],
    index: int,
    runs: dict[tuple[int, int], list[_Run]],
    batch_sizes: Sequence[int],
    prompt_length: int,
    tokens: int,
) -> ModelSpeed:
    name, model = models[index]
    count, nbytes = _size(model)
    batches = [
        _batch_speed(size, runs[index, size], runs[0, size], prompt_length, tokens, nbytes) for size in batch_sizes
    ]
    dtype = str(model.dtype).removeprefix("torch.")
    return ModelSpeed(name, count, nbytes, count / _size(models[0][1])[0], dtype, tuple(batches))


def _size(model: Any) -> tuple[int, int]:
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters)


def _batch_speed(
    size: int, runs: Sequence[_Run], first: Sequence[_Run], prompt_length: int, tokens: int, nbytes: int
) -> BatchSpeed:
    later = size * (tokens - 1)
    return BatchSpeed(
        batch_size=size,
        first_token_s=_spread([run.first for run in runs]),
        prefill_tokens_per_s=_spread([size * prompt_length / run.first for run in runs]),
        decode_tokens_per_s=_spread([later / (run.whole - run.first) for run in runs]) if later else None,
        generate_s=_spread([run.whole for run in runs]),
        generated_tokens_per_s=_spread([size * tokens / run.whole for run in runs]),
        speedup=_spread([a.whole / b.whole for a, b in zip(first, runs, strict=True)]),
        peak_bytes=None if runs[0].extra is None else nbytes + max(run.extra or 0 for run in runs),
    )


def _spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))
