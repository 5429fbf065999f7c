"""The jobs in configs/slurm on a SLURM cluster: interrupted, chained, failing, requeued."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from ..regions.conftest import scene_files as scene_files
from ..regions.conftest import tiny as tiny
from .cluster import wait_for
from .conftest import Jobs, arguments, logs

pytestmark = pytest.mark.usefixtures("late")

FILES = ("adapter/adapter_model.safetensors", "metrics.json", "predictions.jsonl")
LOGGER = {"class_path": "vlm_calibration.callbacks.logger.RunLogger"}
PAUSE = {"class_path": "pausing.PauseAt", "init_args": {"epoch": 1, "batch": 4}}

Start = Callable[..., list[str]]


def test_interrupted_jobs_end_like_one_that_is_not(jobs: Jobs, start: Start, tmp_path: Path) -> None:
    """Three runs of two processes: requeued at the time limit on two nodes, killed and resubmitted on one, and without SLURM."""
    settings = ["sft", *arguments([*start("run", workers=1, logger=LOGGER), "--data.batch_size", "1"])]
    pausing = [*settings, "--sft.trainer.callbacks+", json.dumps(PAUSE)]
    folders = {name: ["--runs", str(tmp_path / name)] for name in ("whole", "limited", "killed")}
    runs = {name: tmp_path / name / "sft" for name in folders}

    (limited,) = jobs.submit(*pausing, *folders["limited"], NODES="2", TIME="10", LEAD="90")
    (killed,) = jobs.submit(*pausing, *folders["killed"], TASKS="2")
    jobs.paused(limited, runs["limited"])
    # A limit one to two minutes from now, within the signal's lead of 90 seconds; it is raised again after the requeue.
    started = datetime.fromisoformat(jobs.cluster.job(limited)["StartTime"]).timestamp()
    limit = ("scontrol", "update", f"JobId={limited}")
    jobs.cluster(*limit, f"TimeLimit={int((time.time() - started) // 60) + 2}")
    wait_for(lambda: jobs.cluster.job(limited)["Restarts"] != "0", "requeue at the time limit")
    jobs.cluster(*limit, "TimeLimit=10")
    jobs.paused(killed, runs["killed"])
    jobs.cluster("scancel", "--signal=KILL", killed)
    assert jobs.cluster.ended(killed)["JobState"] in ("CANCELLED", "FAILED")
    assert not (runs["killed"] / "adapter").exists()
    (resumed,) = jobs.submit(*pausing, *folders["killed"], TASKS="2")
    whole = jobs.run("bash", "configs/slurm/job.sbatch", *settings, *folders["whole"], TASKS="2")
    assert whole.returncode == 0, whole.stderr

    assert jobs.done(resumed, runs["killed"])["NumNodes"] == "1"
    job = jobs.done(limited, runs["limited"])
    assert (job["NumNodes"], job["Restarts"]) == ("2", "1")
    for name in ("limited", "killed"):
        for file in FILES:
            assert (runs[name] / file).read_bytes() == (runs["whole"] / file).read_bytes(), f"{name}: {file}"
    tasks = {path.name for path in (runs["limited"] / "logs").glob("*-task*.log")}
    assert tasks == {f"{limited}-restart{n}-task{task}.log" for n in (0, 1) for task in (0, 1)}
    log = (runs["limited"] / f"logs/{limited}.log").read_text()
    for text in ("received USR1", "SIGUSR1", "requeued", "SFT is done", "wandb sync"):
        assert text in log
    logged = {name: run.glob("wandb/offline-run-*") for name, run in runs.items()}
    ids = {name: [path.name.rsplit("-", 1)[1] for path in paths] for name, paths in logged.items()}
    assert [len(segments) for segments in ids.values()] == [1, 2, 2]
    assert {len(set(segments)) for segments in ids.values()} == {1}, "one W&B run, however often interrupted"
    assert len({segments[0] for segments in ids.values()}) == 3


def test_all_stages_one_after_the_other(
    jobs: Jobs, root: Path, scene_files: Callable[..., Path], tiny: Callable[[str], str], tmp_path: Path
) -> None:
    """`make slurm-all` on data without regions: their extraction in two jobs, then all stages. Submitted again, nothing is repeated.

    SFT receives a signal before training starts.
    """
    counts = _split(scene_files(12), tmp_path / "data")
    base = {"name_or_path": str(root / "src/vlm_calibration/demo/model"), "dtype": "float32"}
    lora = {"r": 4, "alpha": 8, "parts": ["language"]}
    data = {"batch_size": 2, "eval_batch_size": 8, "workers": 0, "max_length": 400}
    model = {"model": {"init_args": {"base": base, "lora": lora, "max_new_tokens": 12}}, "data": data}
    extraction = [
        *("--regions.model.init_args.detector.init_args.name_or_path", tiny("grounding_dino")),
        *("--regions.model.init_args.segmenter.init_args.name_or_path", tiny("sam")),
        *("--regions.model.init_args.detector.init_args.threshold", "0"),
        *("--regions.model.init_args.gates", json.dumps({"min_score": 0.02, "min_area": 0, "max_area": 1})),
        *("--regions.data.eval_batch_size", "4"),
    ]
    settings = {
        "MODEL": _overlay(tmp_path / "model.yaml", model),
        "DATA": "jsonl",
        "DATA_ROOT": str(tmp_path / "data"),
        "TRAINER": _overlay(tmp_path / "trainer.yaml", TRAINER),
        "ARGS": shlex.join(extraction),
        "RUN": str(tmp_path / "runs"),
    }
    runs = tmp_path / "runs"
    make = ("make", "slurm-all", f"PYTHON={sys.executable}", *(f"{k}={v}" for k, v in settings.items()))
    ran = jobs.run(*make, "PARTS=2", "TIME=10")
    first, levels, sft, dpo, evaluation, report = jobs.numbers(ran)
    assert jobs.cluster.job(levels)["Dependency"].startswith(f"afterok:{first}")

    log = runs / f"sft/logs/{sft}.log"
    wait_for(
        lambda: (log.exists() and "SFT in" in log.read_text()) or jobs.cluster.has_ended(sft),
        "the start of SFT",
    )
    jobs.cluster("scancel", "--batch", "--signal=USR1", sft)
    jobs.done(levels, runs / "levels")
    assert jobs.done(sft, runs / "sft")["Restarts"] == "1"
    jobs.done(dpo, runs / "dpo")
    jobs.done(evaluation, runs / "eval")
    jobs.done(report, runs / "eval")
    rows = sum(pq.read_metadata(path).num_rows for path in (runs / "regions").glob("*.parquet"))
    # The test queries are asked on clean images, and need no regions.
    assert rows == sum(counts.values()) - counts["test"]
    assert [len(_answered(runs / stage)) for stage in ("sft", "dpo")] == [counts["validation"]] * 2
    for system in ("base", "sft", "dpo"):
        assert len(_answered(runs / "eval" / system)) == counts["test"]
    assert (runs / "eval/report.html").exists()
    chain = (levels, sft, dpo, evaluation, report)
    ends = [jobs.cluster.job(number)["EndTime"] for number in (f"{first}_0", f"{first}_1", *chain[:-1])]
    starts = [jobs.cluster.job(number)["StartTime"] for number in (levels, *chain)]
    assert all(end <= start for end, start in zip(ends, starts, strict=True))

    results = ("levels.json", "sft/adapter/*", "sft/predictions.jsonl")
    times = {path: path.stat().st_mtime_ns for pattern in results for path in runs.glob(pattern)}
    assert len(times) > 3
    ran = jobs.run(*make, "STAGES=levels sft", "TIME=10")
    jobs.done(jobs.numbers(ran)[-1], runs / "sft")
    assert times == {path: path.stat().st_mtime_ns for path in times}


def _split(queries: Path, folder: Path) -> dict[str, int]:
    """Write the queries of a file, with their images, as the files of a data root; return the number of queries in each."""
    shutil.copytree(queries.parent, folder, ignore=shutil.ignore_patterns("*.jsonl"))
    rows = [json.loads(line) for line in queries.read_text().splitlines()]
    images = list(dict.fromkeys(row["image"] for row in rows))
    shares = {
        "train": images[:4],
        "validation": images[4:5],
        "calibration": images[5:11],
        "test": images[11:],
    }
    counts = {}
    for name, share in shares.items():
        chosen = [json.dumps(row) for row in rows if row["image"] in share]
        (folder / f"{name}.jsonl").write_text("\n".join(chosen))
        counts[name] = len(chosen)
    return counts


TRAINER = {"trainer": {"accelerator": "cpu", "max_steps": 2, "val_check_interval": 2}}


def _overlay(path: Path, settings: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def _answered(folder: Path) -> list[str]:
    return [json.loads(line)["id"] for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_a_failing_stage_stops_the_chain(jobs: Jobs, start: Start, tmp_path: Path) -> None:
    settings = arguments([*start("sft"), "--data.train.init_args.split", "nowhere"])
    sft, dpo, evaluation = jobs.submit("sft", "dpo", "evaluate", *settings)
    assert jobs.cluster.ended(sft)["JobState"] == "FAILED"
    assert jobs.cluster.ended(dpo)["JobState"] == "CANCELLED"
    assert jobs.cluster.ended(evaluation)["JobState"] == "CANCELLED"
    log = (tmp_path / f"sft/logs/{sft}.log").read_text()
    assert "vlm-calibration: error: " in log
    assert "nowhere" in log.split("vlm-calibration: error: ")[1]
    assert "SFT ended with status" in log
    assert not (tmp_path / "dpo/adapter").exists()
    assert logs(tmp_path / "dpo") == ""


# --- Options, and when a job is requeued; with a stand-in for Python that only waits ---


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
