"""What to measure: the flags, and what is refused."""

from __future__ import annotations

import pytest

from dicer.ask.evaluation import Evaluation
from dicer.errors import RecipeError

# One value a field that is not its default, as it is typed.
OTHER = {
    "tasks": "a, b",
    "protocol": "let-llm",
    "task_prefix": "mine_",
    "num_fewshot": 0,
    "limit": 3,
    "limits": "a=2,mine_piqa=5",
    "batch_size": 4,
    "include_path": "tasks",
    "perplexity": "text.txt",
    "window": 64,
    "also_window": 32,
    "windows": 2,
    "against": "builtin:smollm2",
    "text": "builtin, mine.txt",
    "questions": "arc.jsonl",
}


def test_table_of_this_file_names_every_field():
    defaults = Evaluation().model_dump()
    assert OTHER.keys() == defaults.keys()
    assert all(Evaluation(**OTHER).model_dump()[key] != value for key, value in defaults.items())


@pytest.mark.parametrize("named", [["protocol", "perplexity"], ["perplexity", "batch_size"], [*OTHER]])
def test_every_field_is_a_flag_of_eval(command, model, monkeypatch, named):
    caught = []

    def evaluate(loaded, tokenizer, asked, **_):
        caught.append(asked)
        return {}

    monkeypatch.setattr("dicer.evaluate.quality.evaluate", evaluate)
    monkeypatch.setattr("dicer.evaluate.reference.refer", lambda *_, **__: None)
    words = (word for name in named for word in ("--" + name.replace("_", "-"), OTHER[name]))
    assert command("eval", model, *words) == (0, "", "")
    asked = Evaluation(**{name: OTHER[name] for name in named})
    assert caught == [asked]
    assert caught[0].model_fields_set == asked.model_fields_set


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"protocol": "randomnes"}, "unknown protocol 'randomnes'. Did you mean 'randomness'?"),
        ({"protocol": "let-llm", "num_fewshot": 5}, "protocol 'let-llm' is zero-shot"),
        *(
            ({"tasks": "a", "limits": bad}, "limits name tasks and a number")
            for bad in ("a", "a=0", "a=many", {"a": 1.5})
        ),
        ({"tasks": "tiny", "limits": {"tyni": 1}}, "limits: unknown task 'tyni'. Did you mean 'tiny'?"),
        ({"batch_size": "many"}, "batch_size is 'auto' or a number from 1 to 16,777,216; got 'many'."),
        ({"batch_size": 0}, "batch_size is 'auto' or a number from 1 to 16,777,216; got 0."),
        ({"batch_size": True}, "batch_size is 'auto' or a number from 1 to 16,777,216; got True."),
        ({"window": 1}, "window: Input should be greater than or equal to 2, got 1."),
        ({"also_window": 1}, "also_window: "),
        ({"limit": 0}, "limit: "),
        ({"task": "a"}, "unknown evaluation key 'task'. Did you mean 'tasks'?"),
    ],
)
def test_refused(values, says):
    with pytest.raises(RecipeError) as caught:
        Evaluation(**values)
    assert str(caught.value).startswith(says)
    assert "\n" not in str(caught.value)


def test_tasks_of_a_protocol_come_first_and_once():
    asked = Evaluation(protocol="let-llm", task_prefix="my_", tasks="own,my_piqa", limit=3, limits={"own": 2})
    assert asked.task_names()[0] == "my_piqa"
    assert asked.task_names()[-1] == "own"
    assert len(asked.task_names()) == 6
    assert asked.by_limit() == {3: asked.task_names()[:-1], 2: ("own",)}


def test_nothing_to_measure():
    with pytest.raises(RecipeError, match="nothing to measure"):
        Evaluation(task_prefix="a").require_something()
    Evaluation(perplexity="builtin").require_something()


def test_record_of_a_comparison(tmp_path):
    """Only where one is asked: earlier records are as they were. Paths by their names."""
    assert not {"against", "text", "questions"} & Evaluation(perplexity="builtin").record().keys()
    folder = tmp_path / "model"
    folder.mkdir()
    told = Evaluation(against=str(folder), text=f"{tmp_path}/a.txt,builtin", questions=f"{tmp_path}/q.jsonl").record()
    assert (told["against"], told["text"], told["questions"]) == ("model", ["a.txt", "builtin"], "q.jsonl")
    assert Evaluation(against="owner/name").record()["against"] == "owner/name"
    assert Evaluation(against="owner/name").fidelity_texts() == ("builtin", "builtin:code")
