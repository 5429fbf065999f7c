"""The processes of the distributed tests: `python distributed_worker.py FOLDER`.

Each process counts its uneven share of the answers, computes over all processes, and saves the values and the bytes that it sent.
"""

import multiprocessing
import sys
import warnings
from functools import lru_cache

import numpy as np
import torch
import torch.distributed as dist

from vlm_calibration.metrics import CalibrationMetrics, TaskMetrics

SHARES = {1: [1.0], 2: [0.73, 0.27], 3: [0.0, 0.61, 0.39]}


@lru_cache
def answers(n):
    """All answers of all processes: confidence, correct, category, predicted, gold."""
    rng = np.random.default_rng(7)
    confidence = rng.integers(0, 101, n) / 100
    correct = rng.random(n) < 0.1 + 0.7 * confidence
    confidence[rng.random(n) < 0.05] = np.nan
    category = rng.choice(["a", "b", "c"], n).tolist()
    gold = rng.choice(["yes", "no"], n).tolist()
    predicted = [g if y else "no" for g, y in zip(gold, correct, strict=True)]
    return torch.tensor(confidence), torch.tensor(correct), category, predicted, gold


def share(rank, world, n):
    """The rank's slice; the first of three processes gets nothing."""
    ends = np.rint(np.cumsum([0, *SHARES[world]]) * n).astype(int)
    return slice(ends[rank], ends[rank + 1])


def count(metrics, tasks, n, part, batch):
    """Update with the answers of `part` in batches, never with an empty one."""
    confidence, correct, category, predicted, gold = (column[part] for column in answers(n))
    for start in range(0, len(category), batch):
        at = slice(start, start + batch)
        metrics.update(confidence[at], correct[at], category[at])
        tasks.update(predicted[at], gold[at], correct[at], category[at])


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


def run(rank, world, n):
    """Count, compute and return all values, with the traffic of the first computation."""
    metrics, tasks = (cls(categories=["a", "b", "c"]) for cls in (CalibrationMetrics, TaskMetrics))
    count(metrics, tasks, n, share(rank, world, n), batch=97)
    sent = record_traffic()
    result = {"calibration": metrics.compute()}
    result["sent"] = list(sent)
    result["task"] = tasks.compute()
    result["again"] = metrics.compute()
    result["own"] = sum(int(member.counts[0].sum()) for member in metrics.values())
    if share(rank, world, n).stop > share(rank, world, n).start:
        metrics.update(torch.tensor([0.5]), torch.tensor([True]), ["a"])
    result["after one more each"] = metrics.compute()
    return result


def process(rank, world, folder):
    """Join the process group, run a small and a large case, save both."""
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world)
    torch.save({n: run(rank, world, n) for n in (1_000, 50_000)}, f"{folder}/{world}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def main(folder):
    """Start worlds of two and of three processes; they are forked, so that imports are not repeated."""
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    for world in (2, 3):
        processes = [context.Process(target=process, args=(rank, world, folder)) for rank in range(world)]
        for started in processes:
            started.start()
        for started in processes:
            started.join(120)
        if any(finished.exitcode != 0 for finished in processes):
            sys.exit(f"exit codes of {world} processes: {[finished.exitcode for finished in processes]}")


if __name__ == "__main__":
    main(sys.argv[1])
