"""The jobs in configs/slurm without SLURM: under bash, most with a stand-in for Python that prints its arguments."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ..command_line import LIMIT, restore_sigint
from ..regions.conftest import scene_files as scene_files
from ..regions.conftest import tiny as tiny
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
    # The working directory does not matter: the job finds the repository.
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


@pytest.fixture(scope="module")
def queries(scene_files: Callable[..., Path]) -> Path:
    """22 queries about seven scenes as JSON lines, one about an image that cannot be read; beside them `files.parquet`."""
    plain = {"answer": "Yes", "answer_type": "yes_no"}
    damaged = {"id": "damaged", "image": "damaged.png", "question": "Is there a dog?", **plain}
    path = scene_files(7, [damaged])
    (path.parent / "damaged.png").write_bytes(b"no picture")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    columns = ("id", "image", "question", "answer", "answer_type", "category")
    rows = [{name: row.get(name) for name in columns} for row in rows]
    pq.write_table(pa.Table.from_pylist(rows), path.with_name("files.parquet"))
    return path


@pytest.fixture(scope="module")
def extraction(tiny: Callable[[str], str]) -> Callable[[str, Path], list[str]]:
    """Function that returns the arguments of a job that extracts from a file, with tiny models and in shards of four queries."""

    def arguments(source: str, path: Path) -> list[str]:
        settings = {
            "data.predict": f"vlm_calibration.data.sources.{source}",
            "data.predict.init_args.path": str(path),
            "model.init_args.detector.init_args": {"name_or_path": tiny("grounding_dino"), "threshold": 0.0},
            "model.init_args.segmenter.init_args.name_or_path": tiny("sam"),
            "model.init_args.gates": {"min_score": 0.02, "min_area": 0.0, "max_area": 1.0},
            "data.eval_batch_size": 4,
            "data.workers": 0,
        }
        words = [w for name, value in settings.items() for w in (f"--{name}", json.dumps(value).strip('"'))]
        return ["regions", *words]

    return arguments


def _extracted(folder: Path) -> dict[str, Any]:
    """The results of an extraction: rows, summary without the name of the queries' file, and pixels of the contact sheet."""
    with Image.open(folder / "contact_sheet.png") as sheet:
        pixels = sheet.convert("RGB").tobytes()
    rows = pq.read_table(folder / "queries.parquet").to_pylist()
    summary = (folder / "summary.json").read_text().replace("files.parquet", "queries.jsonl")
    return {"rows": rows, "summary": json.loads(summary), "sheet": pixels}


@pytest.mark.nightly
@pytest.mark.slow
def test_parts_of_a_parquet_file_end_as_one_part_of_a_jsonl_file(
    root: Path, tmp_path: Path, queries: Path, extraction: Callable[[str, Path], list[str]]
) -> None:
    lines = extraction("jsonl.JsonlSource", queries)
    python = {"PYTHON": sys.executable}
    ran = _bash(root, tmp_path / "one", *lines, **python)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    one = _extracted(tmp_path / "one/regions")
    ids = [json.loads(line)["id"] for line in queries.read_text().splitlines()]
    assert [row["id"] for row in one["rows"]] == [i for i in ids if i != "damaged"]
    assert sum(bool(row["regions"]) for row in one["rows"]) == 14
    assert one["summary"]["queries"] == len(ids)

    two = extraction("parquet.ParquetSource", queries.with_name("files.parquet"))
    # Another part is at work at the same time: the line that it is writing stays.
    shards = tmp_path / "two/regions/shards"
    shards.mkdir(parents=True)
    for part in (0, 1):
        (shards / f"{part}.0.jsonl").write_text('{"shard": ')
    ran = _bash(root, tmp_path / "two", *two, PARTS="2", PART="1", **python)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "part 1 of 2 is done; 3 of 6 shards are other parts'" in ran.stdout
    rows = (shards / "1.0.jsonl").read_text().splitlines()
    assert [json.loads(line)["shard"] for line in rows] == [1, 3, 5]
    assert (shards / "0.0.jsonl").read_text() == '{"shard": '
    assert not list((tmp_path / "two/regions").glob("*.p*"))
    ran = _bash(root, tmp_path / "two", *two, PARTS="2", PART="0", **python)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    merged = _extracted(tmp_path / "two/regions")
    assert len(one["summary"]["unreadable"]) == 1
    assert "damaged.png" in one["summary"]["unreadable"][0]
    assert merged == one


def _submit(root: Path, folder: Path, *arguments: str, **variables: str) -> tuple[Any, list[list[str]]]:
    """Run submit.sh with a stand-in for sbatch; return what it printed, and the arguments of each submission."""
    sbatch = folder / "sbatch"
    sbatch.write_text(f'#!/bin/sh\necho "$*" >> {folder}/submitted; wc -l < {folder}/submitted')
    sbatch.chmod(0o755)
    environment = {**_environment(root, folder), **variables}
    environment["PATH"] = f"{folder}:{environment['PATH']}"
    command = ["bash", str(root / "configs/slurm/submit.sh"), *arguments, "--runs", str(folder)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    log = folder / "submitted"
    return ran, [line.split() for line in log.read_text().splitlines()] if log.exists() else []


def test_a_chain_of_all_stages(root: Path, tmp_path: Path) -> None:
    own = ["--model", "qwen2_5_vl_7b", "--data", "jsonl"]
    ran, jobs = _submit(root, tmp_path, *own, PARTS="3", GPUS="2", GPU_TYPE="a100", NODES="2")
    assert ran.returncode == 0, ran.stderr
    stages = ["regions", "levels", "sft", "dpo", "evaluate", "report"]
    scripts = [job[job.index("configs/slurm/job.sbatch") :] for job in jobs]
    assert scripts == [["configs/slurm/job.sbatch", stage, *own, "--runs", str(tmp_path)] for stage in stages]
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
        ("regions sft --data jsonl", {}, "without a model"),
        ("sft dpo --config mine.yaml", {}, "--config"),
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


@pytest.mark.parametrize(
    ("arguments", "variables", "culprit"),
    [([], {"PYTHON": "nowhere/python"}, "nowhere/python"), (["--model", "nowhere"], {}, "model/nowhere")],
)
def test_what_is_invalid_is_named(
    root: Path, tmp_path: Path, arguments: list[str], variables: dict[str, str], culprit: str
) -> None:
    ran = _bash(root, tmp_path, "sft", *arguments, **variables)
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
