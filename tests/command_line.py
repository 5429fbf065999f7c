"""Run the command line in processes of its own, as a user does: most of them forks of `cli_server.py`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ERROR = "vlm-calibration: error: "
LIMIT = 240
"""Timeout of a run in seconds, far more than any run needs."""
SHARDED = {
    "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
    "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1, "save_distributed_checkpoint": False},
}
"""The strategy of `configs/trainer/fsdp2.yaml` for two processes."""
ANSWERING = [
    *(
        "--model.init_args.base.name_or_path",
        str(Path(__file__).parents[1] / "src/vlm_calibration/demo/model"),
    ),
    *("--model.init_args.adapter", "null", "--model.init_args.parts", "null"),
    *("--model.init_args.reference", "base", "--model.init_args.max_new_tokens", "8"),
]
"""Settings of stage 2 from the demo's model, which answers some queries correctly."""


def restore_sigint() -> None:
    """For `preexec_fn`: restore the default action of SIGINT, which is ignored if a script started the tests in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def inherited_environment() -> dict[str, str]:
    """The environment for a child process. Without `WANDB_SERVICE`, the name of the W&B service of the tests' own process."""
    return {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}


@dataclass(frozen=True)
class Ended:
    """A finished run: its exit status, stdout and stderr."""

    status: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The error lines, without their prefix."""
        return [line.removeprefix(ERROR) for line in self.err.splitlines() if line.startswith(ERROR)]

    def checked(self, status: int = 0) -> Ended:
        """This run, which must have ended with this status."""
        assert self.status == status, self.err
        return self

    def error(self) -> str:
        """The only error line of a run that failed without a traceback."""
        assert self.status not in (0, None), self.err
        assert "Traceback" not in self.err + self.out, self.err
        assert len(self.errors) == 1, self.err
        return self.errors[0]


Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
"""Types of the fixtures `capsys` and `monkeypatch`."""
Run = Callable[..., Ended]
"""Runs the command line with these arguments, as the fixtures `run`, `run_two` and `call` do."""
Arguments = Callable[..., list[str]]
"""Returns arguments of the command line, as the fixtures `fit` and `start` do."""


class Server:
    """Client of `cli_server.py`."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, str(root / "tests" / "cli_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**inherited_environment(), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"},
            preexec_fn=restore_sigint,
        )
        self.started = 0

    def _ask(self, request: dict[str, Any]) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(
        self,
        arguments: list[str],
        cwd: Path,
        env: Mapping[str, str] | None = None,
        largest: int | None = None,
    ) -> int:
        """Start a run, with `env` added to its environment; return its process id.

        Args:
            largest: limit of the size of each file that the run writes, in bytes.
        """
        self.started += 1
        files = {name: str(self.folder / f"{self.started}.{name}") for name in ("out", "err")}
        return self._ask(
            {"args": arguments, "cwd": str(cwd), "env": dict(env or {}), "largest": largest, **files}
        )

    def wait(self, pid: int) -> Ended:
        """Wait for the run that was started last."""
        timer = threading.Timer(LIMIT, os.killpg, (pid, signal.SIGKILL))
        timer.start()
        try:
            status = self._ask({"wait": pid})
        finally:
            timer.cancel()
        return Ended(
            status, *((self.folder / f"{self.started}.{name}").read_text() for name in ("out", "err"))
        )

    def close(self) -> None:
        # Closing its input is not enough: data workers of earlier runs may hold the other end open.
        self.process.terminate()
        self.process.wait(timeout=LIMIT)
        assert self.process.stdin is not None
        self.process.stdin.close()


def instance(name: str, /, **settings: Any) -> dict[str, Any]:
    """The configuration of an object: its class below the package, and its settings."""
    return {"class_path": f"vlm_calibration.{name}", "init_args": settings}


def callback(name: str, **settings: Any) -> dict[str, Any]:
    """The configuration of a callback of the package or of `disasters`."""
    named = instance(f"callbacks.{name}", **settings)
    return {**named, "class_path": name} if name.startswith("disasters") else named


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_evaluation(
    path: Path,
    runs: str,
    scenes: int,
    callbacks: Sequence[str | dict[str, Any]] = ("predictions.PredictionWriter",),
    **model: Any,
) -> list[str]:
    """Write the settings of an evaluation on scenes of the demo; returns the arguments that run it.

    `runs` is its run directory, `callbacks` are names or configurations, `model` are arguments of `EvaluationModule`.
    """
    source = instance("demo.source.DemoSource", split="test", scenes=scenes)
    trainer = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    trainer |= {"callbacks": [callback(c) if isinstance(c, str) else c for c in callbacks]}
    config = {
        "seed_everything": 0,
        "trainer": {**trainer, "default_root_dir": runs},
        "model": instance("stages.evaluation.EvaluationModule", **model),
        "data": {"test": {"clean": {"source": source}}, "eval_batch_size": 4, "workers": 0},
    }
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return ["test", "--config", str(path)]


def run_python(*arguments: str, cwd: Path, **environment: str) -> Ended:
    """Run Python in a new process, the leader of a process group, with these variables added to its environment."""
    place: dict[str, Any] = {"cwd": cwd, "env": {**inherited_environment(), **environment}}
    place |= {"stdin": subprocess.DEVNULL, "timeout": LIMIT, "start_new_session": True}
    ran = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, **place)
    return Ended(ran.returncode, ran.stdout, ran.stderr)


def run_plainly(command: list[str], root: Path, cwd: Path) -> Ended:
    """Run the command line in a cold process."""
    path = os.pathsep.join([str(root / "tests"), os.environ.get("PYTHONPATH", "")])
    return run_python("-m", "vlm_calibration.cli", *command, cwd=cwd, OMP_NUM_THREADS="1", PYTHONPATH=path)
