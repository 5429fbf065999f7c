"""Three real processes with uneven shares, one of them empty, give the values of one process bit for bit."""

import os
import subprocess
import sys

import pytest
import torch

from vlm_calibration.metrics import ConfidenceTable
from vlm_calibration.metrics.functional import REPORTED, table_values

from . import distributed_worker as worker

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The results of every process."""
    folder = tmp_path_factory.mktemp("distributed")
    command = [sys.executable, worker.__file__, folder]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(3)]


def test_every_process_has_the_value_of_one_after_one_all_reduce(ranks):
    """For 15 metrics, (1 + 3 categories) x 102 levels x 2 counts of 8 bytes."""
    metrics, tasks = worker.counted(0, worker.SIZE, batch=worker.SIZE)
    alone = {"calibration": metrics.compute(), "again": metrics.compute(), "task": tasks.compute()}
    for rank in ranks:
        for name, expected in alone.items():
            assert list(rank[name]) == list(expected)
            bits = [[value.view(torch.int64).item() for value in v.values()] for v in (rank[name], expected)]
            assert bits[0] == bits[1], name
        assert rank["sent"] == [("all_reduce", 4 * 102 * 2 * 8)]


def test_computing_leaves_each_process_its_own_counts(ranks):
    assert [rank["own"] for rank in ranks] == [0, 3_050, 1_950]
    confidence, correct = worker.answers()[:2]
    confidence = torch.cat([confidence, torch.full((2,), 0.5, dtype=torch.float64)])
    correct = torch.cat([correct, torch.ones(2, dtype=torch.bool)])
    expected = table_values(ConfidenceTable.from_predictions(confidence, correct), REPORTED)
    for rank in ranks:
        for name, value in expected.items():
            assert rank["after one more each"][name].item() == value
