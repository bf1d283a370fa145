"""Which process this is: accelerate is asked where a launcher started several, and nobody where there is one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from tiny import save_tiny, tiny_tokens

from dicer.measure.batches import BATCH_TOKENS, own_batches, share

CHILD = """
import json, sys
import torch
from dicer import processes
from dicer.measure.batches import own_batches
from dicer.measure.statistics import Need, Sums

alone = processes.world_size() == 1
found = {"modules": "accelerate" in sys.modules}
if not alone:
    processes.join(cpu=True)
rank = processes.rank()
rows = [own_batches(torch.arange(count * 2).reshape(count, 2), 2) for count in (5, 1)]
total = torch.tensor([1.0, rank])
processes.all_reduce(total)
needs = [Need("sum", "post"), Need("gram", "post"), Need("channel_sum", "mod")]
sums = Sums(needs, 2)
if rank == 0:  # the other saw no token
    sums.add("post", torch.ones(3, 8))
    sums.add("mod", torch.ones(3, 8))
    sums.count = 3
sums.all_reduce(4, torch.device("cpu"))
found |= {
    "rank": rank, "local": processes.local_rank(), "size": processes.world_size(), "several": processes.several(),
    "rows": [[batch.tolist() for batch in batches] for batches in rows],
    "total": total.tolist(), "sum": processes.sum_of(10 + rank), "first": processes.from_first(f"of {rank}"),
    "count": sums.count, "sums": [sums.get(need.kind, need.activation).tolist() for need in needs],
}
open(sys.argv[1], "w").write(json.dumps(found))
"""


REPAIR = """
import json, sys
import dicer
from dicer import processes

if processes.several():
    processes.join(cpu=True)
folder, out = sys.argv[2], sys.argv[1]
recipe = dicer.Recipe(
    criterion="obs", repair="least-squares", compensate="bias", target=sys.argv[3], axis="all", ratio=0.4,
    calib=f"{folder}/rows.jsonl",
)
plan = dicer.make_plan(f"{folder}/model", recipe)
open(out, "w").write(json.dumps({
    f"{axis} {index}": [layer.keep.tolist(), layer.repair and layer.repair.about["ridge"],
                        layer.repair and layer.repair.weight.tolist()]
    for axis, layers in plan.axes.items() for index, layer in layers.items()
}))
"""


STREAM = """
import json, sys
import dicer
from dicer import processes

if processes.several():
    processes.join(cpu=True)
folder, out = sys.argv[2], sys.argv[1]
recipe = dicer.Recipe(method="sim-dominant", axis="mlp", compensate="bias", calib=f"{folder}/rows.jsonl")
plan = dicer.make_plan(f"{folder}/model", recipe, dicer.Compute(stream=sys.argv[3] == "streamed"))
open(out, "w").write(json.dumps({i: layer.keep.tolist() for i, layer in plan.mlp.items()}))
"""


def launch(folder, size, child=CHILD, *words):
    """Start so many processes as a launcher would; what each found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children = []
    for rank in range(size):
        own = {"WORLD_SIZE": str(size), "RANK": str(rank), "LOCAL_RANK": str(rank)} if size > 1 else {}
        command = [sys.executable, "-c", child, str(folder / f"{rank}.json"), *words]
        children.append(subprocess.Popen(command, env=environment | own, stderr=subprocess.PIPE, text=True))
    ended = [(child.communicate(timeout=120)[1], child.returncode) for child in children]
    assert [code for _, code in ended] == [0] * size, ended
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]


def test_alone(tmp_path):
    (found,) = launch(tmp_path, 1)
    assert not found["modules"], "one process imports no accelerate"
    assert [found[name] for name in ("rank", "local", "size", "several")] == [0, None, 1, False]
    assert found["rows"] == [[[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9]]], [[[0, 1]]]]
    assert [found[name] for name in ("total", "sum", "first", "count")] == [[1, 0], 10, "of 0", 3]


def test_two(tmp_path):
    found = launch(tmp_path, 2)
    for rank, own in enumerate(found):
        assert [own[name] for name in ("rank", "local", "size", "several")] == [rank, rank, 2, True]
        assert [own[name] for name in ("total", "sum", "first", "count")] == [[2, 1], 21, "of 0", 3]
        assert own["sums"] == [[6.0] * 4, [[6.0] * 4] * 4, [3.0] * 8]
    assert [own["rows"] for own in found] == [
        [[[[0, 1], [2, 3]], [[4, 5]]], [[[0, 1]]]],
        [[[[6, 7], [8, 9]]], []],  # of one sample, the second process sees nothing
    ]


@pytest.mark.parametrize("target", ["own", "dense"])
def test_repair_of_two(target, tmp_path):
    """The same units and ridges; what is solved differs in the last digits, as sums are added in another order."""
    save_tiny(tmp_path / "model")
    rows = tiny_tokens(24, 24).tolist()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    (alone,) = launch(tmp_path, 1, REPAIR, str(tmp_path), target)
    first, second = launch(tmp_path, 2, REPAIR, str(tmp_path), target)
    assert first == second
    for name, (keep, ridge, weight) in alone.items():
        assert first[name][:2] == [keep, ridge]
        if weight is not None:
            torch.testing.assert_close(torch.tensor(first[name][2]), torch.tensor(weight), rtol=1e-3, atol=1e-3)


def test_streamed_by_two(tmp_path):
    """In memory or layer by layer, one process or two: the same units."""
    save_tiny(tmp_path / "model", shards=True)
    rows = tiny_tokens(24, 24).tolist()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    ways = [(size, how) for size in (1, 2) for how in ("resident", "streamed")]
    found = [one for size, how in ways for one in launch(tmp_path, size, STREAM, str(tmp_path), how)]
    assert len(found) == 6
    assert all(one == found[0] for one in found)


@pytest.mark.parametrize(
    ("length", "size", "rows"),
    [(24, None, [6]), (BATCH_TOKENS // 2, None, [2, 2, 2]), (5000, None, [1] * 6), (9, 4, [4, 2])],
)
def test_rows_of_a_batch(length, size, rows):
    samples = tiny_tokens(6, length)
    batches = own_batches(samples, size)
    assert [len(batch) for batch in batches] == rows
    assert torch.equal(torch.cat(list(batches)), samples)


@pytest.mark.parametrize("size", [2, 3])
def test_shares(monkeypatch, size):
    monkeypatch.setattr("dicer.measure.batches.world_size", lambda: size)
    for count in range(6):
        shares = []
        for rank in range(size):
            monkeypatch.setattr("dicer.measure.batches.rank", lambda rank=rank: rank)
            shares.append(share(tiny_tokens(count)))
        assert torch.equal(torch.cat(shares), tiny_tokens(count))
