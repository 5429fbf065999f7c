"""The processes of the distributed tests: `python distributed_worker.py FOLDER`.

Each process counts its uneven share of the answers, computes over all processes, and saves the values and the bytes that it sent.
"""

import sys
import warnings

import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

from vlm_calibration.metrics import CalibrationMetrics, TaskMetrics

SIZE = 5_000
ENDS = (0, 0, 3_050, SIZE)
"""Where the shares of three processes end; the first has none."""


def answers():
    """All answers of all processes: confidence, correct, category, predicted, gold."""
    rng = np.random.default_rng(7)
    confidence = rng.integers(0, 101, SIZE) / 100
    correct = rng.random(SIZE) < 0.1 + 0.7 * confidence
    confidence[rng.random(SIZE) < 0.05] = np.nan
    category = [[name] for name in rng.choice(["a", "b", "c"], SIZE).tolist()]
    gold = rng.choice(["yes", "no"], SIZE).tolist()
    predicted = [g if y else "no" for g, y in zip(gold, correct, strict=True)]
    return torch.tensor(confidence), torch.tensor(correct), category, predicted, gold


def counted(start, end, batch):
    """Metrics updated with some answers in batches, never with an empty one."""
    metrics, tasks = (cls(categories=["a", "b", "c"]) for cls in (CalibrationMetrics, TaskMetrics))
    confidence, correct, category, predicted, gold = answers()
    for first in range(start, end, batch):
        at = slice(first, min(first + batch, end))
        metrics.update(confidence[at], correct[at], category[at])
        tasks.update(predicted[at], gold[at], correct[at], category[at])
    return metrics, tasks


def record_traffic():
    """Wrap the collectives; returns a list to which each call by this process appends (name, bytes)."""
    sent = []
    for name in ("all_reduce", "all_gather", "all_gather_object", "gather", "broadcast"):
        original = getattr(dist, name)

        def wrapped(*args, _name=name, _original=original, **kwargs):
            tensor = args[1] if _name == "all_gather" else args[0]
            sent.append((_name, tensor.numel() * tensor.element_size() if torch.is_tensor(tensor) else -1))
            return _original(*args, **kwargs)

        setattr(dist, name, wrapped)
    return sent


def process(rank, folder):
    """Join the process group, count, compute, count one more answer, compute again, and save all values."""
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    metrics, tasks = counted(ENDS[rank], ENDS[rank + 1], batch=97)
    sent = record_traffic()
    result = {"calibration": metrics.compute()}
    result["sent"] = list(sent)
    result |= {"task": tasks.compute(), "again": metrics.compute()}
    result["own"] = sum(int(member.counts[0].sum()) for member in metrics.values())
    if rank:
        metrics.update(torch.tensor([0.5]), torch.tensor([True]), [["a"]])
    result["after one more each"] = metrics.compute()
    torch.save(result, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def main(folder):
    """Start three processes; they are forked, so that imports are not repeated."""
    torch.set_num_threads(1)
    start_processes(process, args=(folder,), nprocs=3, start_method="fork")


if __name__ == "__main__":
    main(sys.argv[1])
