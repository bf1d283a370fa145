"""What was lost of the dense model: every number against a loop written from its formula, and what is refused."""

from __future__ import annotations

import itertools
import json
import math
import shutil

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, save_tiny, tiny_model, tiny_tokenizer, tiny_tokens
from tokenizers import Tokenizer

from dicer.ask.compute import Compute
from dicer.ask.evaluation import Evaluation
from dicer.errors import CalibrationError, DicerError, EvaluationError, ModelError, RecipeError
from dicer.evaluate import answers as asking
from dicer.evaluate.answers import answers, compare
from dicer.evaluate.dense import held_dense, open_dense, weight_bytes
from dicer.evaluate.fidelity import fidelity
from dicer.evaluate.greedy import judge, looping, prompts_of, write_on
from dicer.evaluate.quality import evaluate, perplexity
from dicer.evaluate.reference import refer, reference_of
from dicer.evaluate.shares import share_of
from dicer.evaluate.texts import text_windows
from dicer.measure.text import load_windows

TEXT = "A text that is long enough for a few windows of the tiny model, and says little. " * 12


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """A cache that no other test and no user has."""
    monkeypatch.setenv("DICER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "answers"


@pytest.fixture(scope="module")
def dense():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def other():
    """The dense model with a little noise in every weight."""
    model, generator = tiny_model("llama"), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def _held(model, name="dense", fingerprint="f"):
    return held_dense(model, tiny_tokenizer(), name, fingerprint)


@torch.no_grad()
def _distributions(model, windows):
    """Probabilities [W][T-1] of what comes next, each from a pass of its own over what stands before."""
    return [
        [
            torch.softmax(model(input_ids=torch.tensor([row[:place]])).logits[0, -1].double(), 0)
            for place in range(1, len(row))
        ]
        for row in windows.tolist()
    ]


def _kl(p, q):
    return sum(float(a) * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


def _bucketed(p, top):
    return [float(p[i]) for i in top] + [sum(float(p[i]) for i in range(len(p)) if i not in top)]


def test_divergence_against_full_one(dense, other, monkeypatch):
    monkeypatch.setattr(asking, "TOP", 16)  # of 264: enough is left over for the rest to matter
    windows = tiny_tokens(2, 9)
    found = compare(other, windows, answers(dense, windows, name="dense"), name="other")
    for row, (ps, qs) in enumerate(zip(*(_distributions(m, windows) for m in (dense, other)), strict=True)):
        for place, (p, q) in enumerate(zip(ps, qs, strict=True)):
            top = set(p.argsort(descending=True)[:16].tolist())
            value = float(found.divergence[row, place])
            assert value == pytest.approx(_kl(_bucketed(p, top), _bucketed(q, top)), rel=1e-3, abs=1e-6)
            assert 0 <= value <= _kl(p.tolist(), q.tolist()) + 1e-6  # a lower bound
            assert bool(found.same[row, place]) == (int(p.argmax()) == int(q.argmax()))
            assert float(found.losses[row, place]) == pytest.approx(-math.log(q[windows[row, place + 1]]), rel=1e-4)


def test_divergence_loses_little_where_the_rest_is_small(dense, other):
    """As in language models: 64 tokens hold nearly everything, and so does the truncated divergence."""
    sharp = []
    for model in (dense, other):
        copied = tiny_model("llama")
        copied.load_state_dict(model.state_dict())
        with torch.no_grad():
            copied.lm_head.weight *= 40
        sharp.append(copied)
    windows = tiny_tokens(2, 9)
    found = compare(sharp[1], windows, answers(sharp[0], windows, name="dense"), name="other").divergence
    pairs = zip(*(itertools.chain(*_distributions(model, windows)) for model in sharp), strict=True)
    full = [_kl(p.tolist(), q.tolist()) for p, q in pairs]
    assert 0.97 * np.mean(full) < float(found.mean()) <= np.mean(full) + 1e-6


def test_small_vocabulary_has_no_rest(dense, other, monkeypatch):
    monkeypatch.setattr(asking, "TOP", VOCABULARY + 1)
    windows = tiny_tokens(1, 6)
    kept = answers(dense, windows, name="dense")
    assert bool((kept.rest == -torch.inf).all())
    full = [_kl(p, q) for p, q in zip(*(_distributions(m, windows)[0] for m in (dense, other)), strict=True)]
    found = compare(other, windows, kept, name="other").divergence
    assert found[0].tolist() == pytest.approx(full, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_against_itself(text, dtype):
    model = tiny_model("llama", dtype=dtype)
    reference = reference_of(Evaluation(text=str(text), window=32), _held(model))
    found = fidelity(model, tiny_tokenizer(), reference)
    one = found["texts"][0]
    assert one["kl"] == {"mean": 0.0, "stderr": 0.0, "median": 0.0, "p99": 0.0, "worst_fifth": None}
    assert one["same_token"] == {"value": 1.0, "stderr": 0.0}
    assert (one["perplexity"]["ratio"], one["perplexity"]["ratio_stderr"]) == (1.0, 0.0)
    greedy = found["greedy"]
    assert (greedy["whole"]["value"], greedy["cut_off"]["value"]) == (1.0, 0.0)
    assert greedy["loops"] == greedy["dense_loops"]
    assert found["leakage"] is None


def test_numbers_of_two_texts(dense, other, text, tmp_path):
    second = tmp_path / "second.txt"
    second.write_text("".join(chr(33 + i * i % 90) for i in range(600)))
    asked = Evaluation(text=f"{text}, {second}", window=32, windows=4)
    found = fidelity(other, tiny_tokenizer(), reference_of(asked, _held(dense)), name="other")
    ratios = []
    for path, one in zip((text, second), found["texts"], strict=True):
        windows = load_windows(str(path), lambda t: tiny_tokenizer()(t)["input_ids"], 32, 4)
        held = compare(other, windows, answers(dense, windows, name="dense"), name="other").divergence
        values = np.sort(held.flatten().numpy())
        kl = one["kl"]
        assert kl["mean"] == pytest.approx(values.mean())
        assert kl["median"] == pytest.approx(np.quantile(values, 0.5))
        assert kl["p99"] == pytest.approx(np.quantile(values, 0.99))
        assert kl["worst_fifth"] == pytest.approx(values[-25:].sum() / values.sum())  # 124 tokens: 24.8
        means = [row.mean() for row in held.numpy()]
        assert kl["stderr"] == pytest.approx(np.std(means, ddof=1) / 2)
        a, b = perplexity(dense, windows), perplexity(other, windows)
        assert (one["perplexity"]["dense"], one["perplexity"]["value"]) == pytest.approx((a, b), rel=1e-5)
        assert one["bytes"] == one["tokens"] == 4 * 31  # a token is a byte
        assert one["bits_per_byte"]["value"] == pytest.approx(math.log2(b), rel=1e-5)
        ratios.append(b / a)
    assert found["leakage"]["value"] == pytest.approx(ratios[1] - ratios[0], rel=1e-3)
    errors = [one["perplexity"]["ratio_stderr"] for one in found["texts"]]
    assert found["leakage"]["stderr"] == pytest.approx(math.hypot(*errors))


def test_one_window_has_no_error(dense, other, text):
    asked = Evaluation(text=str(text), window=64, windows=1)
    one = fidelity(other, tiny_tokenizer(), reference_of(asked, _held(dense)))["texts"][0]
    assert one["kl"]["stderr"] is one["same_token"]["stderr"] is one["perplexity"]["ratio_stderr"] is None


@torch.no_grad()
def test_greedy_text(dense):
    prompts = tiny_tokens(10, 7)
    made = write_on(dense, prompts, [5], tokens=12)
    for prompt, row in zip(prompts.tolist(), made.tolist(), strict=True):
        ids = list(prompt)
        while len(ids) < 7 + 12 and ids[-1] != 5:
            ids.append(int(dense(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert row == ids[7:] + [-1] * (12 - len(ids) + 7)
    ends = {row[row.index(-1) - 1] for row in made.tolist() if -1 in row}
    assert ends <= {5}


def test_end_of_text(dense):
    """An end token that the model does write: its most likely first one."""
    prompts = tiny_tokens(3, 7)
    first = int(write_on(dense, prompts, [], tokens=1)[0, 0])
    made = write_on(dense, prompts, [first], tokens=5)
    assert made[0].tolist() == [first, -1, -1, -1, -1]


def test_length_of_agreement():
    end = 9
    dense = torch.tensor([[1, 2, 3, 4], [1, 2, end, -1], [1, end, -1, -1], [1, 2, 3, 4], [1, 2, end, -1]])
    own = torch.tensor([[1, 2, 3, 4], [1, 2, end, -1], [1, 2, 3, 4], [7, 2, 3, 4], [1, 2, 3, end]])
    found = judge(dense, own, [end])
    assert found.agreed.tolist() == [4, 3, 1, 0, 2]
    assert found.whole.tolist() == [True, True, False, False, False]
    assert found.cut_off.tolist() == [False, False, True, False, False]


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        ([*range(48), *[7] * 16], True),
        ([*range(49), *[7] * 15], False),  # too short to be one
        ([*range(40), *[1, 2, 3] * 8], True),
        ([*range(42), *[1, 2, 3] * 7, 1], True),  # it stops within a turn
        ([*[7] * 60, 1, 2, 3, 4], False),  # and comes out of it
        ([*range(16), *[*range(16)] * 3], True),
        ([*range(100, 132), *[*range(16)] * 2], False),  # twice is no loop
        ([*[7] * 30, 9, *[-1] * 33], False),  # it has ended
        ([*range(64)], False),
        ([], False),
    ],
)
def test_loops(text, loops):
    assert looping(text) is loops


def test_prompts_of_texts():
    windows = [torch.arange(400).view(2, 200), 1000 + torch.arange(50).view(1, 50)]
    found = prompts_of(windows, 4096)
    assert found.shape == (1 + 8, 50)  # as long as the shortest window
    assert found[0].tolist() == list(range(50))
    assert found[-1].tolist() == list(range(1000, 1050))
    many = prompts_of([torch.arange(64 * 100).view(4, -1)] * 2, 4096)
    assert many.shape == (32, 64)
    assert many[:16, 0].tolist() == [int(i) * 64 for i in np.linspace(0, 99, 16)]
    assert prompts_of(windows, 70).shape[1] == 6  # prompt and answer fit into the positions


def test_share_and_its_error():
    assert share_of([True, False, False, False]) == {"value": 0.25, "stderr": math.sqrt(0.25 * 0.75 / 4)}
    assert share_of([False] * 8) == {"value": 0.0, "stderr": math.sqrt(0.1 * 0.9 / 10)}


def test_builtin_code():
    windows = text_windows("builtin:code", lambda t: tiny_tokenizer()(t)["input_ids"], 1024, None)
    assert windows.shape == (8, 1024)
    text = tiny_tokenizer().decode(windows.flatten().tolist())
    assert "# Author: Steven J. Bethard" in text  # argparse
    assert "def bisect_right" in text
    with pytest.raises(CalibrationError, match="shorter than one window of 10000000 tokens"):
        text_windows("builtin:code", lambda t: tiny_tokenizer()(t)["input_ids"], 10_000_000, 1)


def _gone():
    raise AssertionError("the dense model is not needed again")


def test_dense_model_is_asked_once(dense, other, text, cache):
    asked = Evaluation(text=str(text), window=32)
    first = fidelity(other, tiny_tokenizer(), reference_of(asked, _held(dense)))
    files = {path: path.read_bytes() for path in cache.iterdir()}
    assert len(files) == 2  # the text, the greedy text
    held = _held(dense)
    held.load = _gone
    assert fidelity(other, tiny_tokenizer(), reference_of(asked, held)) == first
    assert {path: path.read_bytes() for path in cache.iterdir()} == files
    held.fingerprint = "g"
    with pytest.raises(AssertionError, match="not needed again"):
        reference_of(asked, held)


def test_answers_that_cannot_be_kept(dense, text, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("DICER_CACHE", str(tmp_path / "file"))
    reference = reference_of(Evaluation(text=str(text), window=32), _held(dense))
    assert fidelity(dense, tiny_tokenizer(), reference)["texts"][0]["kl"]["mean"] == 0


def _flip(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))


DAMAGES = {
    "are damaged (their checksum is another)": _flip,
    "are damaged (": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "are damaged": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("says", DAMAGES)
def test_damaged_answers(dense, text, cache, says):
    asked = Evaluation(text=str(text), window=32)
    reference_of(asked, _held(dense))
    for path in cache.iterdir():
        DAMAGES[says](path)
    _refused(lambda: reference_of(asked, _held(dense)), EvaluationError, says, "Delete that file")


def test_answers_of_another_model(dense, text, cache):
    asked = Evaluation(text=str(text), window=32)
    reference_of(asked, _held(dense))
    first = set(cache.iterdir())
    reference_of(asked, _held(dense, fingerprint="g"))
    for path, new in zip(sorted(first), sorted(set(cache.iterdir()) - first), strict=True):
        shutil.copy(path, new)
    says = "are those of another model or text"
    _refused(lambda: reference_of(asked, _held(dense, fingerprint="g")), EvaluationError, says)


def _refused(call, kind, *says):
    with pytest.raises(DicerError) as caught:
        call()
    line = str(caught.value)
    assert type(caught.value) is kind
    assert "\n" not in line
    for part in says:
        assert part in line


def test_other_vocabulary(dense, text):
    reference = reference_of(Evaluation(text=str(text), window=32), _held(dense))
    larger = tiny_model("llama", vocab_size=VOCABULARY + 8)
    says = "tells 272 tokens apart and the dense model 264"
    _refused(lambda: fidelity(larger, tiny_tokenizer(), reference, name="larger"), EvaluationError, "larger", says)


def test_other_tokenizer(dense, text):
    reference = reference_of(Evaluation(text=str(text), window=32), _held(dense))
    swapped = tiny_tokenizer()
    values = (
        swapped.backend_tokenizer.to_str().replace('"A":', '"X1":').replace('"B":', '"A":').replace('"X1":', '"B":')
    )
    swapped._tokenizer = Tokenizer.from_str(values)
    for tokenizer, says in ((swapped, "have different tokenizers"), (None, "has no tokenizer")):
        _refused(lambda own=tokenizer: fidelity(dense, own, reference, name="own"), EvaluationError, "own", says)
    with pytest.raises(ModelError, match="dense has no tokenizer"):
        held_dense(dense, None, "dense", "f")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite(dense, text, value):
    broken = tiny_model("llama")
    with torch.no_grad():
        broken.lm_head.weight[7] = value
    asked = Evaluation(text=str(text), window=32)
    reference = reference_of(asked, _held(dense))
    says = ("not finite", "window 1 of", "--dtype float32")
    _refused(lambda: fidelity(broken, tiny_tokenizer(), reference, name="broken"), EvaluationError, "broken", *says)
    _refused(lambda: reference_of(asked, _held(broken, "broken", "b")), EvaluationError, "broken", *says)


@pytest.mark.parametrize(
    ("values", "kind", "says"),
    [
        ({"text": "short.txt", "window": 32}, CalibrationError, "shorter than one window of 32 tokens"),
        ({"text": "none.txt"}, CalibrationError, "none.txt cannot be read"),
        ({"text": "builtin:cod"}, CalibrationError, "Did you mean 'builtin:code'?"),
        ({"text": "builtin", "window": 129}, RecipeError, "longer than the model's 128 positions; use --window 128"),
    ],
)
def test_bad_texts(dense, values, kind, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("short")
    _refused(lambda: reference_of(Evaluation(**values), _held(dense)), kind, says)


def test_of_files(tmp_path, dense, text):
    folder = save_tiny(tmp_path / "llama")
    asked = Evaluation(against=str(folder), text=str(text), window=32)
    found = open_dense(folder, "float32")
    assert (found.name, found.positions, found.nbytes) == ("llama", 128, (folder / "model.safetensors").stat().st_size)
    result = evaluate(tiny_model("llama"), tiny_tokenizer(), asked)["fidelity"]
    assert result["against"] == {"name": "llama", "fingerprint": found.fingerprint, "bytes": found.nbytes}
    assert result["texts"][0]["kl"]["mean"] == 0
    again = refer(asked, Compute(dtype="float32", device="cpu"))
    assert again.greedy.shape == (result["greedy"]["prompts"], 64)
    (tmp_path / "x.gguf").write_bytes(b"12345")
    assert weight_bytes(tmp_path / "x.gguf") == 5


def test_weights_changed_in_the_middle(tmp_path):
    """A fingerprint sees first and last rows alone; kept answers of another model would be wrong in silence."""
    folder, model = save_tiny(tmp_path / "llama"), tiny_model("llama")
    first = open_dense(folder), _held(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[5] += 1
    model.save_pretrained(folder)
    second = open_dense(folder), _held(model)
    assert first[0].fingerprint == second[0].fingerprint
    assert all(a.weights != b.weights for a, b in zip(first, second, strict=True))


def test_fewer_positions(dense, text):
    reference = reference_of(Evaluation(text=str(text), window=32), _held(dense))
    short = tiny_model("llama", max_position_embeddings=80)
    says = ("short sees 80 tokens", "has 96 in a row; use --window 16")
    _refused(lambda: fidelity(short, tiny_tokenizer(), reference, name="short"), EvaluationError, *says)


def test_dense_model_of_a_family_that_is_not_known(tmp_path, text):
    folder = save_tiny(tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt_neox_x"}))
    first = open_dense(folder).fingerprint
    _flip(folder / "model.safetensors")
    assert open_dense(folder).fingerprint != first
