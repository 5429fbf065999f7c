"""Logs the lineage of a run to W&B: the digests of its data, the adapters that it starts from, and the adapter that it makes."""

import json
import math
import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.trainer.states import TrainerFn

from vlm_calibration.callbacks.adapter import AdapterWriter
from vlm_calibration.callbacks.logger import staged, wandb_logger
from vlm_calibration.models.base import ADAPTER
from vlm_calibration.progress import stage_name
from vlm_calibration.reporting.runs import read_record

LATEST, BEST = "latest", "best"


class Artifacts(L.Callback):
    """Logs the lineage from data through the stages to an evaluation to W&B. Place it after `AdapterWriter`.

    Configuration: `stage` (a tag as well), the `base` model, and `versions` and `inputs` of `run.json`.
    Input artifacts: the digests of training, validation and test data, and the adapters that the run starts from or evaluates.
    Output artifact: the adapter as `RUN-adapter`, RUN being the run directory, after every validation and when training ends.
    Its alias `latest` is the last version, `best` the one with the lowest Brier score in validation.
    """

    def __init__(self) -> None:
        self.best: float | None = None
        self._digest: str | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "digest": self._digest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self._digest = state_dict["best"], state_dict["digest"]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._log_inputs(trainer, module, ("train", "validation", "teacher"))

    def on_test_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._log_inputs(trainer, module, ("test",))

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        writers = [c for c in trainer.callbacks if isinstance(c, AdapterWriter)]  # type: ignore[attr-defined]
        logging = any(isinstance(logger, WandbLogger) for logger in trainer.loggers)
        if not (logging and writers) or trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        score = float(module.results[""]["brier"])
        improved = not math.isnan(score) and (self.best is None or score < self.best)
        # In all processes, which save the same state.
        self.best = score if improved else self.best
        if trainer.is_global_zero:
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name) / ADAPTER
                writers[0].write(trainer, module, folder)
                facts = {"brier": None if math.isnan(score) else score}
                self._log(trainer, folder, [LATEST, *([BEST] if improved else [])], facts)

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Log the final adapter, unless the last validation logged the same one."""
        folder = Path(trainer.default_root_dir) / ADAPTER
        if not trainer.interrupted and folder.is_dir():
            self._log(trainer, folder, [LATEST, *([BEST] if self.best is None else [])], {})

    def _log(self, trainer: L.Trainer, folder: Path, aliases: list[str], facts: dict[str, Any]) -> None:
        if (logger := wandb_logger(trainer)) is None:
            return
        with staged(logger):
            metadata = {"step": trainer.global_step, **facts}
            artifact = folder_artifact(folder, run_name(Path(trainer.default_root_dir)), metadata)
            if artifact.digest != self._digest:
                logger.experiment.log_artifact(artifact, aliases=aliases)
                self._digest = artifact.digest

    def _log_inputs(self, trainer: L.Trainer, module: Any, roles: Sequence[str]) -> None:
        logger = wandb_logger(trainer)
        if logger is None:
            return
        record, stage = read_record(Path(trainer.default_root_dir)), stage_name(type(module).__name__)
        inputs, versions = (record.inputs, record.versions) if record else ({}, {})
        # The settings of an evaluation need not name its base model, since its adapters do.
        base = asdict(module.base) if getattr(module, "base", None) else None
        logger.log_hyperparams({"stage": stage, "base": base, "versions": versions, "inputs": inputs})
        run = logger.experiment
        run.tags = tuple(dict.fromkeys([*(run.tags or ()), stage]))
        adapter = getattr(module, "adapter", None)
        with staged(logger):
            for role in roles:
                if digests := {k: v for k, v in inputs.items() if re.match(rf"data\.{role}(\.|$)", k)}:
                    use(run, data_artifact(role, digests), [LATEST])
            for folder in [adapter] if adapter is not None else getattr(module, "adapters", {}).values():
                use(run, adapter_artifact(folder))


def use(run: Any, artifact: Any, aliases: Sequence[str] = ()) -> None:
    """Declare an artifact, which the server identifies by its content, an input of the run without waiting for the server."""
    # `Run.use_artifact` does not work offline, waits for the server online, and makes every used artifact the latest
    # version. A disabled run has no interface.
    if run._interface is not None:
        artifact.finalize()
        run._interface.publish_artifact(run, artifact, aliases, is_user_created=True, use_after_commit=True)


def run_name(folder: Path) -> str:
    """The name of the adapter artifact of a run directory."""
    return re.sub(r"[^\w.-]", "-", f"{folder.resolve().name}-{ADAPTER}")[-128:]


def adapter_artifact(location: str) -> Any:
    """The artifact of an adapter in a folder or on the Hugging Face Hub."""
    folder = Path(location)
    if folder.is_dir():
        return folder_artifact(folder, run_name(folder.parent if folder.name == ADAPTER else folder), {})
    import wandb  # here: see `callbacks.figures`

    artifact = wandb.Artifact(run_name(folder), type=ADAPTER)
    artifact.add_reference(f"https://huggingface.co/{location}", checksum=False)
    return artifact


def folder_artifact(folder: Path, name: str, metadata: dict[str, Any]) -> Any:
    import wandb  # here: see `callbacks.figures`

    artifact = wandb.Artifact(name, type=ADAPTER, metadata=metadata)
    # One by one, since `add_dir` prints to the terminal.
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        artifact.add_file(str(path), name=path.relative_to(folder).as_posix(), skip_cache=True)
    return artifact


def data_artifact(role: str, digests: dict[str, str]) -> Any:
    """The artifact of a training, validation or test set; another data set is another version."""
    import wandb  # here: see `callbacks.figures`

    artifact = wandb.Artifact(f"{role}-data", type="dataset", metadata=digests)
    with artifact.new_file("data.json") as file:
        json.dump(digests, file)
    return artifact
