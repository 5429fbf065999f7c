"""Two and three real processes with uneven shares, one of them empty, give the values of one process bit for bit."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vlm_calibration.metrics import CalibrationMetrics, ConfidenceTable, TaskMetrics, summarize

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("distributed_worker.py")
SIZES = (1_000, 50_000)


@pytest.fixture(scope="module")
def worker():
    """The worker as a module."""
    spec = importlib.util.spec_from_file_location("distributed_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder with the results of all processes of both worlds."""
    folder = tmp_path_factory.mktemp("distributed")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, WORKER, folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, folder):
    """The results of every process of a world: a list of dicts by number of answers."""
    return [
        torch.load(folder / f"{request.param}-{rank}.pt", weights_only=True) for rank in range(request.param)
    ]


@pytest.fixture(scope="module")
def alone(worker):
    """The results of one process with one update."""
    results = {}
    for n in SIZES:
        metrics, tasks = (cls(categories=["a", "b", "c"]) for cls in (CalibrationMetrics, TaskMetrics))
        worker.count(metrics, tasks, n, slice(0, n), batch=n)
        results[n] = {"calibration": metrics.compute(), "task": tasks.compute()}
    return results


def identical(ours, theirs):
    """The same names in the same order, and the same 64 bits of every value."""
    assert list(ours) == list(theirs)
    for name in ours:
        assert ours[name].view(torch.int64).item() == theirs[name].view(torch.int64).item(), name


@pytest.mark.parametrize("n", SIZES)
def test_every_process_has_the_value_of_one(ranks, alone, n):
    for rank in ranks:
        identical(rank[n]["calibration"], alone[n]["calibration"])
        identical(rank[n]["task"], alone[n]["task"])
        identical(rank[n]["again"], alone[n]["calibration"])


@pytest.mark.parametrize("n", SIZES)
def test_computing_leaves_each_process_its_own_counts(ranks, worker, n):
    world = len(ranks)
    shares = [worker.share(rank, world, n) for rank in range(world)]
    assert [rank[n]["own"] for rank in ranks] == [part.stop - part.start for part in shares]
    assert sum(rank[n]["own"] for rank in ranks) == n
    assert len({part.stop - part.start for part in shares}) == world
    if world == 3:
        assert ranks[0][n]["own"] == 0


def test_counting_goes_on_after_a_compute(ranks, worker):
    n = SIZES[0]
    confidence, correct = worker.answers(n)[:2]
    more = sum(rank[n]["own"] > 0 for rank in ranks)
    extra = ConfidenceTable.from_predictions([0.5] * more, [True] * more)
    expected = summarize(ConfidenceTable.from_predictions(confidence, correct) + extra)
    for rank in ranks:
        for name, value in expected.items():
            assert rank[n]["after one more each"][name].item() == value


def test_traffic_is_one_table_whatever_the_number_of_answers(ranks):
    """One all-reduce of (1 + 3 categories) x 102 levels x 2 counts of 8 bytes, for 15 metrics and any N."""
    for rank in ranks:
        for n in SIZES:
            assert rank[n]["sent"] == [("all_reduce", 4 * 102 * 2 * 8)]
