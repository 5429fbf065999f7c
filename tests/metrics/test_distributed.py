"""Three real processes with uneven shares, one of them empty, give the values of one process bit for bit.

The processes are started by `python test_distributed.py FOLDER`, in which each saves its values and the bytes that it sent.
"""

import os
import subprocess
import sys
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

from vlm_calibration.metrics import CalibrationMetrics, ConfidenceTable, TaskMetrics
from vlm_calibration.metrics.functional import REPORTED, table_values

SIZE = 5_000
ENDS = (0, 0, 3_050, SIZE)
"""Where the shares of three processes end; the first has none."""


def answers():
    """All answers of all processes: confidence, correct, categories, predicted, gold."""
    rng = np.random.default_rng(7)
    confidence = rng.integers(0, 101, SIZE) / 100
    correct = rng.random(SIZE) < 0.1 + 0.7 * confidence
    confidence[rng.random(SIZE) < 0.05] = np.nan
    categories = [[name] for name in rng.choice(["a", "b", "c"], SIZE).tolist()]
    gold = rng.choice(["yes", "no"], SIZE).tolist()
    predicted = [g if y else "no" for g, y in zip(gold, correct, strict=True)]
    return torch.tensor(confidence), torch.tensor(correct), categories, predicted, gold


def counted(start, end, batch):
    """Metrics updated with some answers in batches, never with an empty one."""
    metrics, tasks = (cls(categories=["a", "b", "c"]) for cls in (CalibrationMetrics, TaskMetrics))
    confidence, correct, categories, predicted, gold = answers()
    for first in range(start, end, batch):
        at = slice(first, min(first + batch, end))
        metrics.update(confidence[at], correct[at], categories[at])
        tasks.update(predicted[at], gold[at], correct[at], categories[at])
    return metrics, tasks


def process(rank, folder):
    """Join the process group, count, compute, count one more answer, compute again, and save all values."""
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    metrics, tasks = counted(ENDS[rank], ENDS[rank + 1], batch=97)
    sent = []

    def recording(name, original, tensor, *others, **settings):
        sent.append((name, getattr(tensor, "nbytes", None)))
        return original(tensor, *others, **settings)

    for name in ("all_reduce", "all_gather", "all_gather_object", "gather", "broadcast"):
        setattr(dist, name, partial(recording, name, getattr(dist, name)))
    result = {"calibration": metrics.compute(), "sent": list(sent)}
    result |= {"task": tasks.compute(), "again": metrics.compute()}
    result["own"] = sum(int(member.counts[0].sum()) for member in metrics.values())
    if rank:
        metrics.update(torch.tensor([0.5]), torch.tensor([True]), [["a"]])
    result["after one more each"] = metrics.compute()
    torch.save(result, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_every_process_has_the_value_of_one_after_one_all_reduce(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(3)]
    metrics, tasks = counted(0, SIZE, batch=SIZE)
    alone = {"calibration": metrics.compute(), "again": metrics.compute(), "task": tasks.compute()}
    confidence, correct = answers()[:2]
    confidence = torch.cat([confidence, torch.full((2,), 0.5, dtype=torch.float64)])
    correct = torch.cat([correct, torch.ones(2, dtype=torch.bool)])
    more = table_values(ConfidenceTable.from_predictions(confidence, correct), REPORTED)
    for rank in ranks:
        for name, expected in alone.items():
            assert list(rank[name]) == list(expected)
            bits = [[value.view(torch.int64).item() for value in v.values()] for v in (rank[name], expected)]
            assert bits[0] == bits[1], name
        # For 15 metrics, (1 + 3 categories) x 102 levels x 2 counts of 8 bytes.
        assert rank["sent"] == [("all_reduce", 4 * 102 * 2 * 8)]
        for name, value in more.items():
            assert rank["after one more each"][name].item() == value
    assert [rank["own"] for rank in ranks] == [0, 3_050, 1_950], "computing leaves each its own counts"


if __name__ == "__main__":
    torch.set_num_threads(1)
    # Forked, so that imports are not repeated.
    start_processes(process, args=(sys.argv[1],), nprocs=3, start_method="fork")
