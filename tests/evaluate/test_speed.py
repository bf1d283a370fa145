"""The speed test: what it runs and counts; never how fast."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import POSITIONS, VOCABULARY, tiny_model
from transformers import GenerationConfig

import dicer
from dicer.ask.recipe import Recipe
from dicer.errors import RecipeError
from dicer.evaluate import speed

SHORT = {"tokens": 6, "prompt_length": 5, "rounds": 3, "batch_sizes": (1, 3)}


@pytest.fixture(scope="module")
def pair():
    dense = tiny_model("llama")
    return [("dense", dense), ("pruned", dicer.prune(dense, Recipe(method="weight-l2", layers="1")).model)]


def test_every_model_runs_every_round_in_turns(pair, monkeypatch):
    ran, steps = [], []
    original = speed._generate

    def noted(model, prompts, tokens):
        ran.append((next(name for name, m in pair if m is model), tuple(prompts.shape), tokens))
        return original(model, prompts, tokens)

    monkeypatch.setattr(speed, "_generate", noted)
    dicer.bench(pair, **SHORT, progress=lambda *step: steps.append(step))
    turns = [("dense", "pruned"), ("pruned", "dense")] * 2
    assert ran == [(name, (size, 5), 6) for size in (1, 3) for turn in turns for name in turn]
    assert steps[-1] == ("bench", 16, 16)


def test_the_record_adds_up(pair):
    made = dicer.bench(pair, **SHORT)
    dense, pruned = made.models
    assert (made.device, made.prompt_length, made.tokens, made.rounds) == ("cpu", 5, 6, 3)
    assert made.process_peak_bytes["host"] > 0
    assert made.versions["torch"] == torch.__version__
    for (name, model), found in zip(pair, made.models, strict=True):
        count = sum(p.numel() for p in model.parameters())
        assert (found.name, found.parameters, found.nbytes, found.dtype) == (name, count, 4 * count, "float32")
        assert [batch.batch_size for batch in found.batches] == [1, 3]
        for batch in found.batches:
            assert batch.peak_bytes is None  # no CUDA
            assert 0 < batch.first_token_s.median < batch.generate_s.median
            for spread in (batch.first_token_s, batch.decode_tokens_per_s, batch.generate_s, batch.speedup):
                assert 0 < spread.low <= spread.median <= spread.high
            assert batch.prefill_tokens_per_s.median == pytest.approx(batch.batch_size * 5 / batch.first_token_s.median)
            assert batch.generated_tokens_per_s.median == pytest.approx(batch.batch_size * 6 / batch.generate_s.median)
    assert pruned.parameters_ratio == pruned.parameters / dense.parameters < 1
    assert {batch.speedup.median for batch in dense.batches} == {1.0}
    assert json.loads(json.dumps(made.to_dict()))["models"][1]["batches"][0]["batch_size"] == 1


def test_the_numbers_come_from_the_clock(pair, monkeypatch):
    """Each reading is a second later: one for the prompt, then one for every token."""
    now = iter(range(10**6))
    monkeypatch.setattr(speed.time, "perf_counter", lambda: float(next(now)))
    batch = dicer.bench(pair, **SHORT).models[1].batches[1]
    assert batch.first_token_s.median == 2  # start, prompt handed over, first token
    assert batch.generate_s.median == 7
    assert batch.prefill_tokens_per_s.median == 3 * 5 / 2
    assert batch.decode_tokens_per_s.median == 3 * 5 / 5
    assert batch.speedup.median == 1


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_exactly_so_many_tokens_are_made_greedily_whatever_the_checkpoint_says(family):
    model = tiny_model(family)
    own = GenerationConfig(do_sample=True, temperature=0.5, eos_token_id=list(range(VOCABULARY)), max_new_tokens=2)
    model.generation_config = own
    model.train()
    lengths = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _m, ins, _o: lengths.append(ins[0].shape[-1]))
    dicer.bench([("a", model)], tokens=7, prompt_length=4, rounds=1, batch_sizes=(2,))
    hook.remove()
    assert lengths == [4, *[1] * 6] * 2
    assert model.generation_config is own
    assert model.training


def test_one_token_has_nothing_to_decode(pair):
    batch = dicer.bench(pair[:1], tokens=1, prompt_length=4, rounds=1, batch_sizes=(1,)).models[0].batches[0]
    assert batch.decode_tokens_per_s is None
    assert batch.first_token_s == batch.generate_s


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"tokens": 0}, "tokens must be at least 1; got 0"),
        ({"rounds": -1}, "rounds must be at least 1"),
        ({"prompt_length": 0}, "prompt_length must be"),
        ({"batch_sizes": ()}, "at least one model and one batch size"),
        ({"batch_sizes": (1, 0)}, "batch sizes are numbers from 1 on"),
        ({"batch_sizes": (2, 2)}, "each once"),
        ({"tokens": POSITIONS}, f"dense has {POSITIONS} positions, too few for 128 tokens of prompt and {POSITIONS}"),
    ],
)
def test_bad_numbers_are_one_clear_line(pair, flags, says):
    with pytest.raises(RecipeError, match=says):
        dicer.bench(pair, **flags)


def test_no_model_and_models_apart_are_refused(pair):
    with pytest.raises(RecipeError, match="at least one model"):
        dicer.bench([])
    with torch.device("meta"):
        apart = type(pair[0][1])(pair[0][1].config)
    with pytest.raises(RecipeError, match="different devices"):
        dicer.bench([*pair, ("apart", apart)], **SHORT)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_is_of_one_model(pair):
    models = [(name, model.to("cuda")) for name, model in pair]
    made = dicer.bench(models, **SHORT)
    for model in made.models:
        small, large = (batch.peak_bytes for batch in model.batches)
        assert model.nbytes < small < large
    for _, model in models:
        model.to("cpu")
