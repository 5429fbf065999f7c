"""Options of submitted jobs, and when a job is requeued; with a stand-in for Python that only waits."""

from __future__ import annotations

from pathlib import Path

import pytest

from .cluster import wait_for
from .conftest import Jobs, logs

pytestmark = pytest.mark.usefixtures("late")


def test_options(jobs: Jobs) -> None:
    counts = {"NODES": "2", "GPUS": "2", "CPUS": "2", "MEM": "100M", "TIME": "01:30:00"}
    sft, dpo = jobs.submit("sft", "dpo", **counts, PARTITION="tests", OPTIONS="--hold --comment=night")
    job = jobs.cluster.job(sft)
    expected = {"NumNodes": "2-2", "NumTasks": "4", "CPUs/Task": "2", "TimeLimit": "01:30:00"}
    expected |= {"Partition": "tests", "Requeue": "1", "TresPerNode": "gres/gpu:2", "Comment": "night"}
    assert {key: job[key] for key in expected} == expected
    assert jobs.cluster.job(dpo)["Dependency"].startswith(f"afterok:{sft}")
    jobs.cluster("scancel", sft, dpo)


def test_what_slurm_refuses_is_named(jobs: Jobs, tmp_path: Path) -> None:
    ran = jobs.run("configs/slurm/submit.sh", "sft", "--runs", str(tmp_path), PARTITION="nowhere")
    assert ran.returncode != 0
    assert "invalid partition" in ran.stderr


@pytest.mark.slow
def test_a_process_for_each_gpu(jobs: Jobs, tmp_path: Path) -> None:
    """Each process sees all GPUs of its node, as Lightning expects."""
    (number,) = jobs.submit("sft", PYTHON=jobs.interpreter, NODES="2", GPUS="2", WAITS="0")
    jobs.done(number, tmp_path / "sft")
    for task in range(4):
        log = (tmp_path / f"sft/logs/{number}-restart0-task{task}.log").read_text()
        assert "gpus: 2" in log
        assert "SLURMEnvironment, init_args: {auto_requeue: false}}" in log
        assert "--trainer.num_nodes 2 --trainer.devices 2" in log
        assert "--trainer.accelerator gpu" in log


def test_only_this_job_of_an_array_is_requeued(jobs: Jobs, tmp_path: Path) -> None:
    (number,) = jobs.submit("regions", PYTHON=jobs.interpreter, PARTS="2")
    jobs.calls(tmp_path, 2)
    # The last job of an array has the array's number.
    jobs.cluster("scancel", "--batch", "--signal=USR1", f"{number}_1")
    jobs.done(f"{number}_1", tmp_path / "regions/part-0001")
    first = jobs.cluster.job(f"{number}_0")
    assert (first["JobState"], first["Restarts"]) == ("RUNNING", "0")
    assert jobs.cluster.job(f"{number}_1")["Restarts"] == "1"
    jobs.cluster("scancel", number)


def test_a_job_that_gets_nowhere_is_not_requeued_for_ever(jobs: Jobs, tmp_path: Path) -> None:
    (number,) = jobs.submit("sft", PYTHON=jobs.interpreter, WAITS="9")
    for count in range(3):
        jobs.calls(tmp_path, count + 1)
        jobs.cluster("scancel", "--batch", "--signal=USR1", number)
    assert jobs.cluster.ended(number)["JobState"] == "FAILED"
    assert "three times in a row" in logs(tmp_path / "sft")


def test_a_cancelled_job_does_not_come_back(jobs: Jobs, tmp_path: Path) -> None:
    """This also holds for a job that is cancelled while it stops at its time limit."""
    (number,) = jobs.submit("sft", PYTHON=jobs.interpreter, IGNORED="USR1")
    jobs.calls(tmp_path)
    jobs.cluster("scancel", "--batch", "--signal=USR1", number)
    wait_for(lambda: "ignored USR1" in logs(tmp_path / "sft"), "the signal")
    jobs.cluster("scancel", number)
    job = jobs.cluster.ended(number)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0")
    assert "ended with status 143 after SIGTERM" in logs(tmp_path / "sft")


def test_an_evaluation_goes_on_as_long_as_it_answers(jobs: Jobs, tmp_path: Path) -> None:
    progress = tmp_path / "eval/.answered.0.jsonl"
    (number,) = jobs.submit("evaluate", PYTHON=jobs.interpreter, WAITS="4", PROGRESS=str(progress))
    for count in range(4):
        jobs.calls(tmp_path, count + 1)
        wait_for(progress.exists, "an answer")
        jobs.cluster("scancel", "--batch", "--signal=USR1", number)
    assert jobs.done(number, tmp_path / "eval")["Restarts"] == "4"


def test_a_job_that_does_not_stop_in_time_comes_back(late: tuple[Jobs, str, Path]) -> None:
    jobs, number, run = late
    assert jobs.done(number, run)["Restarts"] == "1"
    log = logs(run)
    assert "received TERM" in log
    assert "requeued" in log
