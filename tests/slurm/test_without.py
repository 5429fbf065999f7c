"""The jobs in configs/slurm without SLURM: under bash, most with a stand-in for Python that prints its arguments."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ..command_line import LIMIT, restore_sigint
from .cluster import clean_environment, wait_for


def _environment(root: Path, folder: Path, **variables: str) -> dict[str, str]:
    interpreter = str(root / "tests/slurm/interpreter")
    return {
        **clean_environment(),
        "PYTHON": interpreter,
        "REAL_PYTHON": sys.executable,
        "CALLED": str(folder),
        "GPUS": "0",
        "WAITS": "0",
        **variables,
    }


def _bash(root: Path, folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a stage's job with run directories in a folder."""
    folder.mkdir(exist_ok=True)
    environment = _environment(root, folder, **variables)
    return subprocess.run(
        ["bash", str(root / "configs/slurm/job.sbatch"), *arguments, "--runs", str(folder)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )


def _arguments(out: str) -> list[str]:
    (line,) = [line for line in out.splitlines() if line.startswith("arguments: ")]
    return line.split()[1:]


def _values(arguments: list[str], key: str) -> list[str]:
    return [value for name, value in itertools.pairwise(arguments) if name == f"--{key}"]


def test_settings_reach_the_command(root: Path, tmp_path: Path) -> None:
    ran = _bash(root, tmp_path, "sft", "--trainer", "cpu_ddp", "--trainer.max_steps", "3", TASKS="2")
    assert ran.returncode == 0, ran.stderr
    arguments = _arguments(ran.stdout)
    assert arguments[:5] == ["-u", "-m", "vlm_calibration.cli", "calibrate", "sft"]
    assert _values(arguments, "trainer") == ["cpu_ddp"]
    assert _values(arguments, "trainer.max_steps") == ["3"]
    assert _values(arguments, "runs") == [f"{tmp_path}"]
    assert _values(arguments, "trainer.devices") == ["2"]
    assert _values(arguments, "trainer.accelerator") == ["cpu"]
    ran = _bash(root, tmp_path, "regions", PARTS="2", PART="1")
    assert [_values(_arguments(ran.stdout), f"data.{name}") for name in ("parts", "part")] == [["2"], ["1"]]


@pytest.mark.parametrize("stage", ["regions", "levels", "sft", "dpo", "evaluate", "report"])
def test_every_stage_has_a_job(root: Path, tmp_path: Path, stage: str) -> None:
    ran = _bash(root, tmp_path, stage)
    assert ran.returncode == 0, ran.stderr
    assert f"{stage.upper()} is done" in ran.stdout
    run = "eval" if stage in ("evaluate", "report") else stage
    assert (tmp_path / run / "logs").is_dir()
    # A report has no trainer.
    assert _values(_arguments(ran.stdout), "trainer.accelerator") == ([] if stage == "report" else ["cpu"])


def test_the_wandb_run_belongs_to_the_checkpoint(root: Path, tmp_path: Path) -> None:
    def number() -> str:
        assert _bash(root, tmp_path, "sft").returncode == 0
        return (tmp_path / "sft/logs/wandb-run-id").read_text()

    first = number()
    assert len(first) == 8
    assert number() != first, "there is no checkpoint"
    (tmp_path / "sft/checkpoints").mkdir()
    (tmp_path / "sft/checkpoints/last.ckpt").touch()
    second = (tmp_path / "sft/logs/wandb-run-id").read_text()
    assert number() == second


def _submit(root: Path, folder: Path, *arguments: str, **variables: str) -> tuple[Any, list[list[str]]]:
    """Run submit.sh with a stand-in for sbatch; return what it printed, and the arguments of each submission."""
    sbatch = folder / "sbatch"
    sbatch.write_text(f'#!/bin/sh\necho "$*" >> {folder}/submitted; wc -l < {folder}/submitted')
    sbatch.chmod(0o755)
    environment = {**_environment(root, folder), **variables}
    environment["PATH"] = f"{folder}:{environment['PATH']}"
    command = ["bash", str(root / "configs/slurm/submit.sh"), *arguments, "--runs", str(folder)]
    ran = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    log = folder / "submitted"
    return ran, [line.split() for line in log.read_text().splitlines()] if log.exists() else []


def test_a_chain_of_all_stages(root: Path, tmp_path: Path) -> None:
    own = ["--model", "qwen2_5_vl_7b", "--data", "jsonl"]
    ran, jobs = _submit(root, tmp_path, *own, PARTS="3", GPUS="2", GPU_TYPE="a100", NODES="2")
    assert ran.returncode == 0, ran.stderr
    stages = ["regions", "levels", "sft", "dpo", "evaluate", "report"]
    script = str(root / "configs/slurm/job.sbatch")
    scripts = [job[job.index(script) :] for job in jobs]
    assert scripts == [[script, stage, *own, "--runs", str(tmp_path)] for stage in stages]
    after = [word.split("=")[1] for job in jobs for word in job if word.startswith("--dependency=")]
    assert after == [f"afterok:{number}" for number in range(1, 6)]
    assert "--array=0-2" in jobs[0]
    for job in jobs[:-1]:
        assert {"--gres=gpu:a100:2", "--nodes=2", "--ntasks-per-node=2"} <= set(job)
    assert {"--gres=none", "--nodes=1", "--ntasks-per-node=1"} <= set(jobs[-1])
    runs = [*stages[:4], "eval", "eval"]
    assert [line.split(", ")[1].rpartition("/")[0] for line in ran.stdout.splitlines()] == [
        f"{tmp_path}/{run}/logs" for run in runs
    ]


def test_without_variables_the_chain_is_the_demo_s(root: Path, tmp_path: Path) -> None:
    ran, jobs = _submit(root, tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert [job[-3] for job in jobs] == ["sft", "dpo", "evaluate", "report"]


@pytest.mark.parametrize(
    ("arguments", "variables", "culprit"),
    [
        ("sft stf", {}, "no stage 'stf'"),
        ("sft", {"GPUS": "2", "TASKS": "3"}, "TASKS=3 with GPUS=2"),
    ],
)
def test_nothing_of_an_invalid_chain_is_submitted(
    root: Path, tmp_path: Path, arguments: str, variables: dict[str, str], culprit: str
) -> None:
    ran, jobs = _submit(root, tmp_path, *arguments.split(), **variables)
    assert ran.returncode == 1
    assert culprit in ran.stderr
    assert jobs == []


def test_what_is_invalid_is_named(root: Path, tmp_path: Path) -> None:
    for ran, culprit in (
        (_bash(root, tmp_path, "sft", PYTHON="nowhere/python"), "nowhere/python"),
        (_bash(root, tmp_path, "sft", "--model", "nowhere"), "model/nowhere"),
    ):
        assert ran.returncode == 1
        assert culprit in ran.stderr


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 143), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)]
)
def test_a_signal_is_passed_on(root: Path, tmp_path: Path, number: signal.Signals, status: int) -> None:
    """The first process receives it and stops the others at the same step. Ctrl-C is sent as SIGTERM, which saves a checkpoint."""
    job = subprocess.Popen(
        ["bash", str(root / "configs/slurm/job.sbatch"), "sft", "--runs", str(tmp_path)],
        env=_environment(root, tmp_path, WAITS="1"),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=restore_sigint,
    )
    wait_for(lambda: bool(list(tmp_path.glob("called-*"))), "the interpreter")
    job.send_signal(number)
    out, _ = job.communicate(timeout=30)
    assert job.returncode == status, out
    assert f"status {status}" in out
