"""The run directory, W&B credentials, and artifacts of a run's inputs and outputs: the best adapter, and equal data."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import wandb
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from vlm_calibration.callbacks.adapter import AdapterWriter
from vlm_calibration.callbacks.artifacts import (
    Artifacts,
    adapter_artifact,
    data_artifact,
    folder_artifact,
    run_name,
    use,
)
from vlm_calibration.callbacks.checkpoint import AtomicCheckpointIO, RunCheckpoint
from vlm_calibration.callbacks.logger import RunLogger, staged, wandb_logger
from vlm_calibration.reporting.dashboard import logged_in

from ..command_line import Patch, run_python
from ..graphql_server import GraphQLServer
from ..trainers import fake_trainer
from ..wandb_log import read_run

LOGIN = "machine api.wandb.ai\n  login user\n  password 0123456789\n"


@pytest.fixture(autouse=True)
def nobody(tmp_path: Path, monkeypatch: Patch) -> Path:
    """An empty home without credentials, and no interactive terminal."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_DATA_DIR", "NETRC", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for name in ("builtins.input", "getpass.getpass"):
        monkeypatch.setattr(name, lambda *_: pytest.fail("prompted"))
    return home


def test_who_is_logged_in(nobody: Path, tmp_path: Path, monkeypatch: Patch) -> None:
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
        ("dryrun", "0123456789", True),
    ],
)
def test_offline_unless_logged_in(
    tmp_path: Path, monkeypatch: Patch, mode: str | None, key: str | None, offline: bool
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


def test_a_run_that_the_server_refuses_goes_on_offline(tmp_path: Path, monkeypatch: Patch) -> None:
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
    ended = run_python("-c", PROGRAM, cwd=tmp_path, HOME=str(tmp_path), **server.environment).checked()
    assert "offline: True" in ended.out
    assert "this run is logged offline, and `wandb sync` uploads it" in ended.err
    assert [row["train/loss"] for row in read_run(tmp_path / "run").history] == [1.5]


def test_what_is_to_be_uploaded_stays_in_the_run_directory(tmp_path: Path, monkeypatch: Patch) -> None:
    logger = RunLogger(save_dir=str(tmp_path / "run"))
    with staged(logger):
        assert os.environ["WANDB_DATA_DIR"] == str(tmp_path / "run" / "wandb")
    assert "WANDB_DATA_DIR" not in os.environ
    monkeypatch.setenv("WANDB_DATA_DIR", "elsewhere")
    with staged(logger):
        assert os.environ["WANDB_DATA_DIR"] == "elsewhere", "where it is set, it decides"
    assert os.environ["WANDB_DATA_DIR"] == "elsewhere"


def test_names_and_waits_of_a_run(tmp_path: Path, monkeypatch: Patch) -> None:
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
    callback.setup(fake_trainer(tmp_path, strategy=strategy, ckpt_path=None), None, "fit")  # type: ignore[arg-type]
    assert callback.dirpath == str(tmp_path / "checkpoints")
    assert callback.last == tmp_path / "checkpoints" / "last.ckpt"
    assert type(strategy.checkpoint_io) is AtomicCheckpointIO
    assert not list((tmp_path / "checkpoints").iterdir()), "what a killed run has left is cleared away"


def test_only_the_first_process_has_a_run_to_log_to(tmp_path: Path) -> None:
    logger, other = RunLogger(save_dir=str(tmp_path)), CSVLogger(str(tmp_path))
    cases = (([other, logger], True, logger), ([logger], False, None), ([other], True, None))
    for loggers, first, expected in cases:
        assert wandb_logger(fake_trainer(tmp_path, loggers=loggers, is_global_zero=first)) is expected


# --- Artifacts ---


class Writer(AdapterWriter):
    """Writes the number of the validation in place of an adapter."""

    content = 0

    def write(self, trainer: L.Trainer, module: L.LightningModule, folder: Path, weights: Any = None) -> None:
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(str(self.content))


class Run:
    """Records the artifacts that are logged."""

    def __init__(self) -> None:
        self.logged: list[tuple[str, list[str], dict[str, Any]]] = []

    def log_artifact(self, artifact: Any, aliases: list[str]) -> None:
        self.logged.append((artifact.name, aliases, dict(artifact.metadata)))


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: Patch) -> Iterator[SimpleNamespace]:
    """A trainer in the middle of training in `runs/mine`, its writer, and the artifacts that its run has logged."""
    logger = RunLogger(save_dir=str(tmp_path / "runs" / "mine"))
    logger._experiment = Run()  # type: ignore[assignment]
    writer = Writer()
    fits = {"state": SimpleNamespace(fn=TrainerFn.FITTING), "global_step": 10}
    trainer = fake_trainer(tmp_path / "runs" / "mine", loggers=[logger], callbacks=[writer], **fits)
    yield SimpleNamespace(trainer=trainer, writer=writer, run=logger._experiment)
    logger._experiment = None


def _validate(callback: Artifacts, trained: Any, score: float) -> None:
    module: Any = SimpleNamespace(results={"": {"brier": score}})
    trained.writer.content += 1
    callback.on_validation_end(trained.trainer, module)


def _end(callback: Artifacts, trained: Any) -> None:
    """End training with an adapter as of the last validation."""
    folder = Path(trained.trainer.default_root_dir) / "adapter"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(str(trained.writer.content))
    callback.on_fit_end(trained.trainer, None)  # type: ignore[arg-type]


def test_best_is_the_best_validation_of_the_run_and_of_one_that_it_resumes(trained: Any) -> None:
    callback = Artifacts()
    for score in (0.3, float("nan"), 0.2, 0.25, 0.2):
        _validate(callback, trained, score)
    resumed = Artifacts()
    resumed.load_state_dict(callback.state_dict())
    _validate(resumed, trained, 0.3)
    best, latest = ["latest", "best"], ["latest"]
    assert [aliases for _, aliases, _ in trained.run.logged] == [best, latest, best, latest, latest, latest]
    assert [facts["brier"] for _, _, facts in trained.run.logged] == [0.3, None, 0.2, 0.25, 0.2, 0.3]
    assert {name for name, _, _ in trained.run.logged} == {"mine-adapter"}


def test_what_training_ends_with_is_logged_unless_it_was_just_validated(trained: Any) -> None:
    callback = Artifacts()
    _validate(callback, trained, 0.2)
    _end(callback, trained)
    assert len(trained.run.logged) == 1
    trained.writer.content += 1
    _end(callback, trained)
    assert trained.run.logged[-1] == ("mine-adapter", ["latest"], {"step": 10})
    trained.writer.content += 1
    _end(Artifacts(), trained)
    assert trained.run.logged[-1][1] == ["latest", "best"], "without a validation"


@pytest.mark.parametrize(
    "change",
    [
        {"sanity_checking": True},
        {"state": SimpleNamespace(fn=TrainerFn.VALIDATING)},
        {"callbacks": []},
        {"loggers": [CSVLogger("nowhere")]},
        {"is_global_zero": False},
    ],
)
def test_when_there_is_nothing_to_log(trained: Any, change: dict[str, Any]) -> None:
    vars(trained.trainer).update(change)
    callback = Artifacts()
    _validate(callback, trained, 0.2)
    assert (callback.best == 0.2) == ("is_global_zero" in change), "all processes save the same state"
    trained.trainer.interrupted = True
    _end(callback, trained)
    assert trained.run.logged == []


def test_an_adapter_has_the_name_of_its_run_wherever_it_is_met(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "my sft,1" / "adapter"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    made = folder_artifact(folder, run_name(tmp_path / "runs" / "my sft,1"), {})
    met = adapter_artifact(str(folder))
    assert met.name == made.name == "my-sft-1-adapter"
    assert met.digest == made.digest
    assert list(met.manifest.entries) == ["adapter_config.json"]
    (folder / "adapter_config.json").write_text("{} ")
    assert adapter_artifact(str(folder)).digest != made.digest
    assert len(run_name(Path("x" * 200))) <= 128
    assert adapter_artifact(str(folder.parent)).name == "my-sft-1-adapter", "an adapter in another folder"
    hub = adapter_artifact("someone/an-adapter")
    assert hub.name == "an-adapter-adapter"
    [entry] = hub.manifest.entries.values()
    assert entry.ref == "https://huggingface.co/someone/an-adapter"


def test_versions_of_a_data_artifact_are_data_sets() -> None:
    made = data_artifact("train", {"data.train": "1"})
    assert (made.name, made.type) == ("train-data", "dataset")
    assert made.digest == data_artifact("train", {"data.train": "1"}).digest
    assert made.digest != data_artifact("train", {"data.train": "2"}).digest
    [entry] = made.manifest.entries.values()
    assert json.loads(Path(entry.local_path).read_text()) == {"data.train": "1"}
    use(SimpleNamespace(_interface=None), made)  # in a run that is disabled
