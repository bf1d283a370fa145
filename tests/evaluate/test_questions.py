"""The same questions as a choice and as an open answer: against a loop by hand, and files that hold none."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from dicer.errors import CalibrationError, EvaluationError
from dicer.evaluate.questions import Asked, ask, judge_questions, normalised, read_questions

ROWS = [
    {
        "question": f"What is {i}?",
        "choices": {"text": [f"a{i}", "two words", "b"], "label": ["A", "B", "C"]},
        "answerKey": k,
    }
    for i, k in enumerate("ABCABBC")
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@torch.no_grad()
def test_answers_against_a_loop_by_hand(file):
    model, tokenizer = tiny_model("llama", max_position_embeddings=256), tiny_tokenizer()
    read = read_questions(file, tokenizer)
    found = ask(model, read, [2])
    before = "".join(
        f"Question: {row['question']}\nAnswer: {row['choices']['text']['ABC'.index(row['answerKey'])]}\n\n"
        for row in ROWS[:3]
    )
    for place, row in enumerate(ROWS[3:]):
        prompt = tokenizer(f"{before}Question: {row['question']}\nAnswer:")["input_ids"]
        assert read.prompts[place] == prompt
        scores = []
        for choice in row["choices"]["text"]:
            ids, total = list(prompt), 0.0
            for token in tokenizer(f" {choice}")["input_ids"]:
                logs = model(input_ids=torch.tensor([ids])).logits[0, -1].double().log_softmax(0)
                total += float(logs[token])
                ids.append(token)
            scores.append(total)
        assert int(found["choice"][place]) == scores.index(max(scores))
        ids = list(prompt)
        while len(ids) < len(prompt) + 24:
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == 2:
                ids.pop()
                break
        own = ids[len(prompt) :]
        assert found["open"][place].tolist() == own + [-1] * (24 - len(own))


def test_shares_and_floors(file):
    tokenizer = tiny_tokenizer()
    read = read_questions(file, tokenizer)
    assert read.right == [0, 1, 1, 2]
    said = [" a3\nmore", " Two  words!", " 2", " b"]
    ids = [tokenizer(text)["input_ids"] for text in said]
    own = {"choice": torch.tensor([0, 1, 1, 0]), "open": _padded(ids)}
    dense = {"choice": torch.tensor([0, 1, 1, 2]), "open": _padded([[], [], [], []])}
    told = judge_questions(own, Asked(read, dense))
    assert (told["file"], told["n"], told["chance"]) == ("questions.jsonl", 4, pytest.approx(1 / 3))
    assert (told["choice"]["value"], told["choice"]["dense"], told["choice"]["floor"]) == (0.75, 1.0, 0.5)
    assert (told["open"]["value"], told["open"]["dense"], told["open"]["floor"]) == (0.75, 0.0, 0.5)
    assert told["choice"]["stderr"] == pytest.approx((0.75 * 0.25 / 4) ** 0.5)


def _padded(rows):
    return torch.tensor([[*row, *[-1] * (24 - len(row))] for row in rows])


def test_how_many(file):
    assert len(read_questions(file, tiny_tokenizer(), 2).prompts) == 2
    assert read_questions(file, tiny_tokenizer(), 2).digest != read_questions(file, tiny_tokenizer()).digest


def test_other_forms(tmp_path):
    path = tmp_path / "mmlu.jsonl"
    rows = [{"question": "Q", "choices": ["a", "b"], "answer": 1}, {**ROWS[0], "question_stem": "S"}]
    del rows[1]["question"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 2))
    assert read_questions(path, tiny_tokenizer()).right == [0]


def test_normalised():
    assert normalised("  The  Cat's, hat. ") == normalised("cats hat")
    assert normalised("an apple") == "apple"
    assert normalised("theory") == "theory"


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (ROWS[:3], "holds 3 questions; there must be 3 examples"),
        ([], "holds 0 questions"),
        ([{**ROWS[0], "answerKey": "D"}] * 4, "row 1: no question with choices and the right one"),
        ([{**ROWS[0], "choices": {"text": ["a"], "label": ["A"]}}] * 4, "row 1: no question"),
        ([{"text": "a"}] * 4, "row 1: no question"),
        ([{"question": "Q", "choices": ["a", "b"], "answer": True}] * 4, "row 1: no question"),
        ([{"question": "Q", "choices": ["a", " "], "answer": 0}] * 4, "row 1: no question"),
    ],
)
def test_file_without_questions(tmp_path, rows, says):
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(EvaluationError, match=r"q\.jsonl") as caught:
        read_questions(path, tiny_tokenizer())
    assert says in str(caught.value)


def test_file_that_is_not_there(tmp_path):
    with pytest.raises(EvaluationError, match=r"there is no file .*none.jsonl"):
        read_questions(tmp_path / "none.jsonl", tiny_tokenizer())
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(CalibrationError, match=r"bad.jsonl, line 1"):
        read_questions(tmp_path / "bad.jsonl", tiny_tokenizer())
