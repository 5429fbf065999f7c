"""The jobs in configs/slurm without SLURM: under bash, most with a stand-in for Python that prints its arguments."""

from __future__ import annotations

import itertools
import json
import re
import shlex
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
from .conftest import variables


def _environment(root: Path, folder: Path, **variables: str) -> dict[str, str]:
    interpreter = str(root / "tests/slurm/interpreter")
    return {
        **clean_environment(),
        "PYTHON": interpreter,
        "RUNS_DIR": str(folder),
        "GPUS": "0",
        "WAITS": "0",
        **variables,
    }


def _bash(root: Path, folder: Path, script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    environment = _environment(root, folder, **variables)
    # The working directory does not matter: the job finds the repository.
    return subprocess.run(
        ["bash", str(root / "configs/slurm" / script)],
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
    ran = _bash(
        *(root, tmp_path, "sft.sbatch"),
        TASKS="2",
        SFT_CONFIG="configs/sft.yaml configs/trainer/cpu_ddp.yaml",
        ARGS="--trainer.max_steps 3",
        SFT_ARGS="--data.train.init_args '{scenes: 4}'",
    )
    assert ran.returncode == 0, ran.stderr
    arguments = _arguments(ran.stdout)
    assert arguments[:4] == ["-u", "-m", "vlm_calibration.cli", "fit"]
    assert _values(arguments, "config") == ["configs/sft.yaml", "configs/trainer/cpu_ddp.yaml"]
    assert _values(arguments, "trainer.max_steps") == ["3"]
    assert "--data.train.init_args {scenes: 4}" in ran.stdout
    assert _values(arguments, "trainer.default_root_dir") == [f"{tmp_path}/sft"]
    assert _values(arguments, "trainer.devices") == ["2"]
    assert _values(arguments, "trainer.accelerator") == ["cpu"]
    assert "--ckpt_path" not in arguments


def test_a_run_with_a_checkpoint_goes_on(root: Path, tmp_path: Path) -> None:
    (tmp_path / "dpo/checkpoints").mkdir(parents=True)
    (tmp_path / "dpo/checkpoints/last.ckpt").touch()
    arguments = _arguments(_bash(root, tmp_path, "dpo.sbatch").stdout)
    assert _values(arguments, "ckpt_path") == ["last"]
    assert _values(arguments, "model.init_args.adapter") == [f"{tmp_path}/sft/adapter"]


def test_the_wandb_run_belongs_to_the_checkpoint(root: Path, tmp_path: Path) -> None:
    def number() -> str:
        assert _bash(root, tmp_path, "sft.sbatch").returncode == 0
        return (tmp_path / "sft/logs/wandb-run-id").read_text()

    first = number()
    assert len(first) == 8
    assert number() != first, "there is no checkpoint"
    (tmp_path / "sft/checkpoints").mkdir()
    (tmp_path / "sft/checkpoints/last.ckpt").touch()
    second = (tmp_path / "sft/logs/wandb-run-id").read_text()
    assert number() == second


def test_evaluation_takes_the_adapters_that_are_there(root: Path, tmp_path: Path) -> None:
    (tmp_path / "sft/adapter").mkdir(parents=True)
    out = _bash(root, tmp_path, "evaluate.sbatch").stdout
    assert f'--model.init_args.adapters {{"sft": "{tmp_path}/sft/adapter"}} ' in out
    (tmp_path / "dpo/adapter").mkdir(parents=True)
    out = _bash(root, tmp_path, "evaluate.sbatch").stdout
    assert (
        f'{{"sft": "{tmp_path}/sft/adapter", "dpo": "{tmp_path}/dpo/adapter"}} --trainer.default_root_dir'
        in out
    )


@pytest.fixture(scope="module")
def queries(scene_files: Callable[..., Path]) -> Path:
    """24 queries about seven scenes as JSON lines; beside them `files.parquet`, and `embedded.parquet` with the images inside."""
    plain = {"answer": "Yes", "answer_type": "yes_no"}
    damaged = {"id": "damaged", "image": "damaged.png", "question": "Is there a dog?", **plain}
    path = scene_files(7, [damaged])
    (path.parent / "damaged.png").write_bytes(b"no picture")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    columns = ("id", "image", "question", "answer", "answer_type", "category")
    rows = [{name: row.get(name) for name in columns} for row in rows]
    pq.write_table(pa.Table.from_pylist(rows), path.with_name("files.parquet"))
    for row in rows:
        row["image"] = {"bytes": (path.parent / row["image"]).read_bytes(), "path": None}
    pq.write_table(pa.Table.from_pylist(rows), path.with_name("embedded.parquet"), row_group_size=5)
    return path


@pytest.fixture(scope="module")
def extraction(tiny: Callable[[str], str]) -> dict[str, str]:
    """Variables of a job that extracts with tiny models, in shards of four queries."""
    settings = {
        "model.init_args.detector.init_args": {"name_or_path": tiny("grounding_dino"), "threshold": 0.0},
        "model.init_args.segmenter.init_args.name_or_path": tiny("sam"),
        "model.init_args.gates": {"min_score": 0.02, "min_area": 0.0, "max_area": 1.0},
        "data.eval_batch_size": 3,
        "data.shard_size": 4,
        "data.workers": 0,
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", json.dumps(value).strip('"'))]
    return {"PYTHON": sys.executable, "REGIONS_ARGS": shlex.join(words)}


def _extracted(folder: Path) -> dict[str, Any]:
    """The results of an extraction: rows, summary, and pixels of the contact sheet."""
    with Image.open(folder / "contact_sheet.png") as sheet:
        pixels = sheet.convert("RGB").tobytes()
    rows = pq.read_table(folder / "queries.parquet").to_pylist()
    return {"rows": rows, "summary": json.loads((folder / "summary.json").read_text()), "sheet": pixels}


@pytest.mark.slow
def test_parts_of_a_parquet_file_end_as_one_part_of_a_jsonl_file(
    root: Path, tmp_path: Path, queries: Path, extraction: dict[str, str]
) -> None:
    ran = _bash(root, tmp_path / "one", "regions.sbatch", QUERIES=str(queries), **extraction)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    one = _extracted(tmp_path / "one/regions")
    ids = [json.loads(line)["id"] for line in queries.read_text().splitlines()]
    assert [row["id"] for row in one["rows"]] == [i for i in ids if i != "damaged"]
    assert sum(bool(row["regions"]) for row in one["rows"]) == 14
    assert one["summary"]["queries"] == len(ids)

    two = {"QUERIES": str(queries.with_name("files.parquet")), "PARTS": "2", **extraction}
    # Another part is at work at the same time: the line that it is writing stays.
    shards = tmp_path / "two/regions/shards"
    shards.mkdir(parents=True)
    for part in (0, 1):
        (shards / f"{part}.0.jsonl").write_text('{"shard": ')
    ran = _bash(root, tmp_path / "two", "regions.sbatch", PART="1", **two)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "part 1 of 2 is done; 3 of 6 shards are other parts'" in ran.stdout
    lines = (shards / "1.0.jsonl").read_text().splitlines()
    assert [json.loads(line)["shard"] for line in lines] == [1, 3, 5]
    assert (shards / "0.0.jsonl").read_text() == '{"shard": '
    assert not list((tmp_path / "two/regions").glob("*.p*"))
    ran = _bash(root, tmp_path / "two", "regions.sbatch", PART="0", **two)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    # The note about the unreadable image contains its path.
    merged = _extracted(tmp_path / "two/regions")
    notes = [extracted["summary"].pop("unreadable") for extracted in (one, merged)]
    assert all("damaged.png" in note for (note,) in notes)
    assert merged == one


@pytest.mark.slow
def test_training_after_an_extraction_uses_the_extracted_regions(
    root: Path,
    tmp_path: Path,
    queries: Path,
    extraction: dict[str, str],
    start: Callable[..., list[str]],
) -> None:
    """Images embedded in the Parquet file are read from it."""
    file = queries.with_name("embedded.parquet")
    ran = _bash(root, tmp_path, "regions.sbatch", QUERIES=str(file), **extraction)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    training = variables(start("sft", max_steps=2, val_check_interval=2), "sft")
    ran = _bash(
        *(root, tmp_path, "sft.sbatch"),
        **{**training, "PYTHON": sys.executable, "QUERIES": str(file), "TRAIN_ON": "regions"},
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert (tmp_path / "sft/adapter/adapter_model.safetensors").exists()
    rows = pq.read_table(tmp_path / "regions/queries.parquet").to_pylist()
    answered = [json.loads(line) for line in (tmp_path / "sft/predictions.jsonl").read_text().splitlines()]
    begin, end = round(0.8 * len(rows)), round(0.9 * len(rows))
    assert [a["id"] for a in answered] == [row["id"] for row in rows[begin:end]]


def test_each_stage_after_an_extraction_uses_its_share(root: Path, tmp_path: Path) -> None:
    shares: dict[str, list[float]] = {}
    settings = {"TRAIN_ON": "regions", "QUERIES": 'a "b"/q.jsonl', "DATA_ROOT": "my images"}
    for stage in ("sft", "dpo", "evaluate"):
        ran = _bash(root, tmp_path, f"{stage}.sbatch", **settings)
        assert ran.returncode == 0, ran.stderr
        [line] = [line for line in ran.stdout.splitlines() if line.startswith("arguments: ")]
        for name, text in re.findall(r"--data\.(\w+) (\{.*?\})(?= --)", line):
            value = json.loads(text)
            source = (value["own"]["source"] if name == "test" else value)["init_args"]
            assert source["path"] == f"{tmp_path}/regions/queries.parquet"
            assert source["images"]["class_path"].endswith("JsonlSource")
            assert source["images"]["init_args"] == {"path": 'a "b"/q.jsonl', "root": "my images"}
            shares.setdefault(name, []).extend((source["begin"], source["end"]))
    assert shares == {"train": [0, 0.8] * 2, "validation": [0.8, 0.9] * 2, "test": [0.9, 1]}


@pytest.mark.parametrize(
    ("stages", "variables", "culprit"),
    [
        ("regions sft", {}, "QUERIES="),
        ("regions", {"QUERIES": "nowhere.jsonl"}, "QUERIES=nowhere.jsonl"),
        ("regions sft", {"QUERIES": "README.md"}, "SFT_CONFIG="),
        ("regions sft dpo", {"QUERIES": "README.md", "SFT_CONFIG": "mine.yaml"}, "DPO_CONFIG="),
    ],
)
def test_chains_that_would_work_on_two_data_sets_are_refused(
    root: Path, tmp_path: Path, stages: str, variables: dict[str, str], culprit: str
) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f"#!/bin/sh\necho 1 >> {tmp_path}/submitted; echo 1")
    sbatch.chmod(0o755)
    environment = {**_environment(root, tmp_path), **variables}
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    command = ["bash", str(root / "configs/slurm/submit.sh"), *stages.split()]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 1
    assert ran.stderr.startswith(f"submit.sh: {culprit}"), ran.stderr
    assert not (tmp_path / "submitted").exists()


@pytest.mark.parametrize(
    ("script", "variables", "culprit"),
    [
        ("sft.sbatch", {"PYTHON": "nowhere/python"}, "nowhere/python"),
        (
            "sft.sbatch",
            {"ARGS": "--trainer.max_steps '3"},
            "--trainer.max_steps '3",
        ),
        ("sft.sbatch", {"SFT_ARGS": "--trainer.default_root_dir x"}, "RUNS_DIR="),
        (
            "regions.sbatch",
            {"QUERIES": "q.csv"},
            "QUERIES=q.csv",
        ),
        ("sft.sbatch", {"TRAIN_ON": "regions"}, "QUERIES="),
        ("regions.sbatch", {"PARTS": "2", "PART": "2"}, "part 2 of PARTS=2"),
    ],
)
def test_invalid_variables_are_named(
    root: Path, tmp_path: Path, script: str, variables: dict[str, str], culprit: str
) -> None:
    ran = _bash(root, tmp_path, script, **variables)
    assert ran.returncode == 1
    assert culprit in ran.stderr


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 143), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)]
)
def test_a_signal_is_passed_on(root: Path, tmp_path: Path, number: signal.Signals, status: int) -> None:
    """The first process receives it and stops the others at the same step. Ctrl-C is sent as SIGTERM, which saves a checkpoint."""
    job = subprocess.Popen(
        ["bash", str(root / "configs/slurm/sft.sbatch")],
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
