"""Artifacts of a run's inputs and outputs: the best adapter, and equal data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import TrainerFn

from vlm_calibration.callbacks.adapter import AdapterWriter
from vlm_calibration.callbacks.artifacts import (
    Artifacts,
    adapter_artifact,
    data_artifact,
    folder_artifact,
    run_name,
    use,
)
from vlm_calibration.callbacks.logger import RunLogger

from ..trainers import fake_trainer


@pytest.fixture(autouse=True)
def staging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage copies of uploads in the test's folder."""
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staging"))


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
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
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
