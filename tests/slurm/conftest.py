"""A SLURM cluster for all tests of a session, and jobs on it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .cluster import LIMIT, Cluster, missing, wait_for

Ran = subprocess.CompletedProcess[str]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if why := missing():
        pytest.skip(f"SLURM JOBS ARE NOT TESTED: {why}")
    cluster = Cluster()
    yield cluster
    cluster.stop()


def arguments(command: list[str], stage: str = "sft") -> list[str]:
    """The arguments of `calibrate` for these of a stage's own command line, after its own configuration."""
    assert command[1] == "--config"
    return [f"--{stage}.{word[2:]}" if word.startswith("--") else word for word in command[3:]]


class Jobs:
    """Submits small jobs on the CPU, as a user does, with run directories in `folder`."""

    def __init__(self, cluster: Cluster, root: Path, folder: Path) -> None:
        self.cluster = cluster
        self.root = root
        self.runs = ["--runs", str(folder)]
        self.environment = {
            **cluster.environment,
            "PYTHON": sys.executable,
            # Use this repository's source, even if another one is installed.
            "PYTHONPATH": f"{root}/tests/slurm:{root}/src",
            "CALLED": str(folder),
            "REAL_PYTHON": sys.executable,
            "GPUS": "0",
            "CPUS": "1",
            # The nodes' names do not resolve to addresses.
            "MASTER_ADDR": "127.0.0.1",
        }
        self.interpreter = str(root / "tests/slurm/interpreter")

    def run(self, *command: str, **variables: str) -> Ran:
        """Run a command in the root of the repository."""
        return subprocess.run(
            command,
            cwd=self.root,
            env={**self.environment, **variables},
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )

    def submit(self, *arguments: str, **variables: str) -> list[str]:
        """Submit stages, with run directories in `folder` unless told otherwise; return the numbers of their jobs."""
        runs = [] if "--runs" in arguments else self.runs
        return self.numbers(self.run("configs/slurm/submit.sh", *arguments, *runs, **variables))

    def numbers(self, ran: Ran) -> list[str]:
        """The job numbers in the output of a submission."""
        assert ran.returncode == 0, ran.stderr
        return [line.split(" job ")[1].split(",")[0] for line in ran.stdout.splitlines() if " job " in line]

    def paused(self, number: str, run: Path) -> None:
        """Wait until `pausing.PauseAt` pauses the job."""
        wait_for(
            lambda: (run / "paused").exists() or self.cluster.has_ended(number), f"job {number} training"
        )
        assert (run / "paused").exists(), logs(run)

    def calls(self, folder: Path, count: int = 1) -> None:
        """Wait until the stand-in for Python has been called so often."""
        wait_for(lambda: len([*folder.glob("called-*")]) == count, f"call {count}")

    def done(self, number: str, run: Path) -> dict[str, str]:
        """Wait for the end of a job that must succeed, and return its fields."""
        job = self.cluster.ended(number)
        assert job["JobState"] == "COMPLETED", f"{job}\n{logs(run)}"
        return job


def logs(run: Path) -> str:
    """The logs of all jobs of a run directory."""
    return "\n".join(f"=== {path.name}\n{path.read_text()}" for path in sorted(run.glob("logs/*.log")))


@pytest.fixture
def jobs(cluster: Cluster, root: Path, tmp_path: Path) -> Jobs:
    return Jobs(cluster, root, tmp_path)


@pytest.fixture(scope="session")
def late(cluster: Cluster, root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Jobs, str, Path]:
    """A job that ignores signals. It starts before the other tests, since a time limit is at least a minute."""
    folder = tmp_path_factory.mktemp("late")
    last = folder / "sft/checkpoints/last.ckpt"
    last.parent.mkdir(parents=True)
    jobs = Jobs(cluster, root, folder)
    ignoring = {"PYTHON": jobs.interpreter, "IGNORED": "USR1 TERM", "PROGRESS": str(last)}
    (number,) = jobs.submit("sft", TIME="1", LEAD="1", **ignoring)
    return jobs, number, folder / "sft"
