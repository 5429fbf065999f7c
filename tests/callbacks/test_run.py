"""The run directory, and W&B credentials."""

from __future__ import annotations

import builtins
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only

from vlm_calibration.callbacks.checkpoint import AtomicCheckpointIO, RunCheckpoint
from vlm_calibration.callbacks.logger import RunLogger, staged, wandb_logger
from vlm_calibration.reporting.dashboard import logged_in

from ..command_line import LIMIT, inherited_environment
from ..graphql_server import GraphQLServer
from ..trainers import fake_trainer
from ..wandb_log import read_run

LOGIN = "machine api.wandb.ai\n  login user\n  password 0123456789\n"


@pytest.fixture(autouse=True)
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home without credentials, and no interactive terminal."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_DATA_DIR", "NETRC", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))

    def asked(*_: Any) -> str:
        raise AssertionError("prompted")

    monkeypatch.setattr(builtins, "input", asked)
    monkeypatch.setattr("getpass.getpass", asked)
    return home


def test_who_is_logged_in(nobody: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not logged_in()
    for key in ("0123456789", ""):
        monkeypatch.setenv("WANDB_API_KEY", key)
        assert logged_in() == bool(key)
    path = nobody / ".netrc"
    path.write_text(LOGIN)
    path.chmod(0o600)
    assert logged_in()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org/")
    assert not logged_in(), "another server needs a login of its own"
    path.write_text(LOGIN.replace("api.wandb.ai", "wandb.example.org"))
    assert logged_in()
    for name in ("nowhere", "."):
        monkeypatch.setenv("NETRC", str(tmp_path / name))
        assert not logged_in(), "a folder is no netrc file"
    monkeypatch.setenv("NETRC", str(path))
    assert logged_in()


@pytest.mark.parametrize(
    ("mode", "key", "offline"),
    [
        (None, None, True),
        (None, "0123456789", False),
        ("offline", "0123456789", True),
        ("online", None, False),
        ("disabled", None, False),
        ("dryrun", "0123456789", True),
    ],
)
def test_offline_unless_logged_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str | None, key: str | None, offline: bool
) -> None:
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    logger = RunLogger(save_dir=str(tmp_path / "run"), project="p", group="g", tags=["t"])
    assert logger._offline is offline
    assert [logger._wandb_init[name] for name in ("project", "group", "tags")] == ["p", "g", ["t"]]
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger.log_metrics({"train/loss": 1.5}, step=0)
    assert not (tmp_path / "run").exists(), "only the first process begins"


PROGRAM = """
from vlm_calibration.callbacks.logger import RunLogger
logger = RunLogger(save_dir="run", settings={"init_timeout": 1.0})
logger.log_metrics({"train/loss": 1.5}, step=0)
print("offline:", logger.experiment.offline)
"""


def test_a_run_that_the_server_refuses_goes_on_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Any] = []

    def init(**settings: Any) -> Any:
        begun.append(settings.get("mode"))
        if begun != [begun[0], "offline"]:
            raise wandb.errors.CommError("permission denied")
        return SimpleNamespace(url=None)

    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(wandb, "init", init)
    logger = RunLogger(save_dir=str(tmp_path / "run"))
    with pytest.warns(UserWarning, match="permission denied.*this run is logged offline"):
        assert logger.experiment.url is None
    assert len(begun) == 2


@pytest.mark.nightly
def test_a_run_goes_on_offline_where_nobody_listens(tmp_path: Path) -> None:
    server = GraphQLServer()
    server.close()
    place: dict[str, Any] = {"cwd": tmp_path, "stdin": subprocess.DEVNULL, "timeout": LIMIT}
    place["env"] = {**inherited_environment(), **server.environment, "HOME": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False, **place
    )
    assert ran.returncode == 0, ran.stderr
    assert "offline: True" in ran.stdout
    assert "this run is logged offline, and `wandb sync` uploads it" in ran.stderr
    assert [row["train/loss"] for row in read_run(tmp_path / "run").history] == [1.5]


def test_what_is_to_be_uploaded_stays_in_the_run_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = RunLogger(save_dir=str(tmp_path / "run"))
    with staged(logger):
        assert os.environ["WANDB_DATA_DIR"] == str(tmp_path / "run" / "wandb")
    assert "WANDB_DATA_DIR" not in os.environ
    monkeypatch.setenv("WANDB_DATA_DIR", "elsewhere")
    with staged(logger):
        assert os.environ["WANDB_DATA_DIR"] == "elsewhere", "where it is set, it decides"
    assert os.environ["WANDB_DATA_DIR"] == "elsewhere"


def test_names_and_waits_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def named(**given: Any) -> tuple[str, str, float, float]:
        init = RunLogger(save_dir=str(tmp_path / "my-run"), **given)._wandb_init
        return init["name"], init["project"], init["settings"].init_timeout, init["settings"].finish_timeout

    for variable in ("WANDB_NAME", "WANDB_PROJECT"):
        monkeypatch.delenv(variable, raising=False)
    assert named() == ("my-run", "vlm-calibration", 30.0, 900.0)
    monkeypatch.setenv("WANDB_NAME", "theirs")
    monkeypatch.setenv("WANDB_PROJECT", "their-project")
    assert named(settings={"init_timeout": 5.0}) == ("theirs", "their-project", 5.0, 900.0)
    assert named(name="ours", project="our-project")[:2] == ("ours", "our-project")


def test_checkpoints_go_to_the_run_directory(tmp_path: Path) -> None:
    callback = RunCheckpoint(filename="x")
    strategy = SimpleNamespace(broadcast=lambda value, *_: value, checkpoint_io=TorchCheckpointIO())
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".last.ckpt.123.tmp").touch()
    trainer: Any = SimpleNamespace(
        default_root_dir=str(tmp_path), strategy=strategy, is_global_zero=True, loggers=[], ckpt_path=None
    )
    callback.setup(trainer, None, "fit")  # type: ignore[arg-type]
    assert callback.dirpath == str(tmp_path / "checkpoints")
    assert callback.last == tmp_path / "checkpoints" / "last.ckpt"
    assert type(strategy.checkpoint_io) is AtomicCheckpointIO
    assert not list((tmp_path / "checkpoints").iterdir()), "what a killed run has left is cleared away"


def test_only_the_first_process_has_a_run_to_log_to(tmp_path: Path) -> None:
    logger, other = RunLogger(save_dir=str(tmp_path)), CSVLogger(str(tmp_path))
    for loggers, first, expected in (
        ([other, logger], True, logger),
        ([logger], False, None),
        ([other], True, None),
    ):
        assert wandb_logger(fake_trainer(tmp_path, loggers=loggers, is_global_zero=first)) is expected
