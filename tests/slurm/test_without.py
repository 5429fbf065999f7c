"""The jobs in configs/slurm where there is no SLURM: under bash, around an interpreter that only says what it was given."""

from __future__ import annotations

import itertools
import signal
import subprocess
from pathlib import Path

import pytest

from .cluster import surroundings, wait_for


def _environment(root: Path, folder: Path, **variables: str) -> dict[str, str]:
    interpreter = str(root / "tests/slurm/interpreter")
    return {
        **surroundings(),
        "PYTHON": interpreter,
        "RUNS_DIR": str(folder),
        "GPUS": "0",
        "WAITS": "0",
        **variables,
    }


def _bash(root: Path, folder: Path, script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = _environment(root, folder, **variables)
    # From anywhere: the job finds its checkout.
    return subprocess.run(
        ["bash", str(root / "configs/slurm" / script)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
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
    assert number() != first, "nothing to go on from"
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


def test_parts_of_queries_are_all_of_them(root: Path, tmp_path: Path) -> None:
    queries = tmp_path / "queries.jsonl"
    queries.write_text("".join(f'{{"id": "{n}"}}\n' for n in range(100)))
    parts = []
    for part in range(3):
        ran = _bash(root, tmp_path, "regions.sbatch", QUERIES=str(queries), PARTS="3", PART=str(part))
        assert ran.returncode == 0, ran.stderr
        own = tmp_path / f"regions/part-{part:04d}/queries.jsonl"
        parts.append(own.read_text())
        arguments = _arguments(ran.stdout)
        assert _values(arguments, "data.predict.init_args.path") == [str(own)]
        assert _values(arguments, "data.predict.init_args.root") == [str(tmp_path)]
        assert (tmp_path / f"regions/queries/part-{part:04d}.parquet").is_symlink()
    assert "".join(parts) == queries.read_text()
    assert min(len(part) for part in parts) > 300
    shares = []
    for part in range(3):
        ran = _bash(root, tmp_path, "regions.sbatch", QUERIES="q.parquet", PARTS="3", PART=str(part))
        arguments = _arguments(ran.stdout)
        shares += [float(_values(arguments, f"data.predict.init_args.{end}")[0]) for end in ("begin", "end")]
    assert shares == [0.0, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 1.0]


@pytest.mark.parametrize(
    ("script", "variables", "message"),
    [
        ("sft.sbatch", {"PYTHON": "nowhere/python"}, "no interpreter nowhere/python"),
        (
            "sft.sbatch",
            {"ARGS": "--trainer.max_steps '3"},
            "cannot tell the words apart in: --trainer.max_steps '3",
        ),
        ("sft.sbatch", {"SFT_ARGS": "--trainer.default_root_dir x"}, "RUNS_DIR= chooses another folder"),
        ("regions.sbatch", {"PARTS": "2"}, "PARTS=2 needs QUERIES="),
        ("regions.sbatch", {"PARTS": "2", "PART": "2"}, "part 2 of PARTS=2: parts are counted from 0"),
    ],
)
def test_what_cannot_be(
    root: Path, tmp_path: Path, script: str, variables: dict[str, str], message: str
) -> None:
    ran = _bash(root, tmp_path, script, **variables)
    assert ran.returncode == 1
    assert message in ran.stderr


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 143), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)]
)
def test_a_signal_is_passed_on(root: Path, tmp_path: Path, number: signal.Signals, status: int) -> None:
    """To the first process; it stops the others at the same step. Ctrl-C counts as SIGTERM, which saves a checkpoint."""
    started = subprocess.Popen(
        ["bash", str(root / "configs/slurm/sft.sbatch")],
        env=_environment(root, tmp_path, WAITS="1"),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(lambda: bool(list(tmp_path.glob("called-*"))), "the interpreter")
    started.send_signal(number)
    out, _ = started.communicate(timeout=30)
    assert started.returncode == status, out
    assert "submitted again, it goes on from what it has saved" in out
