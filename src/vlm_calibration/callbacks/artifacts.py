"""Logs the provenance of a run to W&B: code, data and adapters, as configuration and as artifacts."""

from __future__ import annotations

import json
import math
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import lightning as L
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.trainer.states import TrainerFn

from vlm_calibration.callbacks.adapter import AdapterWriter, constructed
from vlm_calibration.callbacks.logger import staged, wandb_logger
from vlm_calibration.data.dataset import PerturbedQueries
from vlm_calibration.models.base import ADAPTER
from vlm_calibration.records import Query
from vlm_calibration.settings import digest
from vlm_calibration.stages.dpo import DPOModule
from vlm_calibration.stages.evaluation import EvaluationModule
from vlm_calibration.stages.sft import SFTModule

STAGES = {SFTModule: "sft", DPOModule: "dpo", EvaluationModule: "evaluation"}
LATEST, BEST = "latest", "best"


class Artifacts(L.Callback):
    """Logs the lineage from data through the stages to an evaluation to W&B.

    Configuration: `stage` (a tag as well), the `code`'s version and git commit, the `base` model, and `inputs`: sources and
    digests of the data.
    Input artifacts: one each for the training, validation and test data (digest and count, not the data), and the
    adapters that the run starts from or evaluates.
    Output artifact: the adapter as `RUN-adapter`, RUN being the run directory, after every validation and when training ends.
    Its alias `latest` is the last version, `best` the one with the best validation of the run.

    Place it after `AdapterWriter`, which writes the adapter's folder.

    Args:
        monitor: validation metric that selects the best adapter.
        lower_is_better: whether lower values of it are better.
    """

    def __init__(self, monitor: str = "brier", lower_is_better: bool = True) -> None:
        self.monitor = monitor
        self.lower_is_better = lower_is_better
        self.best: float | None = None
        self._digest: str | None = None

    def state_dict(self) -> dict[str, Any]:
        """The best score and the digest of the last logged adapter, for a resumed run."""
        return {"best": self.best, "digest": self._digest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self._digest = state_dict["best"], state_dict["digest"]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        loaders = {"train": trainer.train_dataloader, "validation": trainer.val_dataloaders}
        self._record(trainer, module, {role: loader.dataset for role, loader in loaders.items() if loader})

    def on_test_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._record(trainer, module, {"test": trainer.datamodule.test_set})  # type: ignore[attr-defined]

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Log the adapter that was validated."""
        writers = [c for c in trainer.callbacks if isinstance(c, AdapterWriter)]  # type: ignore[attr-defined]
        logging = any(isinstance(logger, WandbLogger) for logger in trainer.loggers)
        if not (logging and writers) or trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        score = float(cast(Any, module).results[""][self.monitor])
        improved = self._improves(score)
        self.best = score if improved else self.best
        logger = wandb_logger(trainer)
        if logger is not None:
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name) / ADAPTER
                writers[0].write(trainer, module, folder)
                aliases = [LATEST, *([BEST] if improved else [])]
                self._log(trainer, logger, folder, aliases, {self.monitor: _number(score)})

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Log the final adapter, unless the last validation logged the same one."""
        folder = Path(trainer.default_root_dir) / ADAPTER
        logger = wandb_logger(trainer)
        if logger is not None and not trainer.interrupted and folder.is_dir():
            self._log(trainer, logger, folder, [LATEST, *([BEST] if self.best is None else [])], {})

    def _improves(self, score: float) -> bool:
        if math.isnan(score):
            return False
        return self.best is None or (score < self.best if self.lower_is_better else score > self.best)

    def _log(
        self, trainer: L.Trainer, logger: WandbLogger, folder: Path, aliases: list[str], facts: dict[str, Any]
    ) -> None:
        with staged(logger):
            metadata = {"step": trainer.global_step, **facts}
            artifact = folder_artifact(folder, run_name(Path(trainer.default_root_dir)), metadata)
            if artifact.digest != self._digest:
                logger.experiment.log_artifact(artifact, aliases=aliases)
                self._digest = artifact.digest

    def _record(
        self, trainer: L.Trainer, module: L.LightningModule, datasets: Mapping[str, PerturbedQueries]
    ) -> None:
        logger = wandb_logger(trainer)
        if logger is None:
            return
        data = {role: data_facts(dataset) for role, dataset in datasets.items()}
        stage = STAGES.get(type(module), type(module).__name__)
        # The settings of an evaluation need not name its base model, since its adapters do.
        base = asdict(cast(Any, module.base)) if getattr(module, "base", None) is not None else None
        logger.log_hyperparams({"stage": stage, "code": code_state(), "base": base, "inputs": data})
        run = logger.experiment
        run.tags = tuple(dict.fromkeys([*(run.tags or ()), stage]))
        with staged(logger):
            for role, facts in data.items():
                use(run, data_artifact(role, facts), [LATEST])
            for folder in adapters_of(module):
                use(run, adapter_artifact(folder))


def use(run: Any, artifact: Any, aliases: Sequence[str] = ()) -> None:
    """Declare an artifact an input of the run without waiting for the server, which need not have it yet.

    The server identifies artifacts by their content, so the run that made an adapter and the run that uses it are linked,
    even if both were offline.
    """
    # `Run.use_artifact` does not work offline, waits for the server online, and makes every used artifact the latest
    # version. A disabled run has no interface.
    if run._interface is not None:
        artifact.finalize()
        run._interface.publish_artifact(run, artifact, aliases, is_user_created=True, use_after_commit=True)


def adapters_of(module: L.LightningModule) -> list[str]:
    """Locations of the adapters that a stage starts from."""
    if isinstance(module, EvaluationModule):
        return list(module.adapters.values())
    return [module.adapter] if isinstance(module, DPOModule) and module.adapter is not None else []


def run_name(folder: Path) -> str:
    """The name of the adapter artifact of a run directory."""
    return re.sub(r"[^\w.-]", "-", f"{folder.resolve().name}-{ADAPTER}")[-128:]


def adapter_artifact(location: str) -> Any:
    """The artifact of an adapter in a folder or on the Hugging Face Hub."""
    folder = Path(location)
    if folder.is_dir():
        return folder_artifact(folder, run_name(folder.parent if folder.name == ADAPTER else folder))
    artifact = new_artifact(run_name(folder), ADAPTER)
    artifact.add_reference(f"https://huggingface.co/{location}", checksum=False)
    return artifact


def new_artifact(name: str, kind: str, metadata: Mapping[str, Any] | None = None) -> Any:
    """An empty `wandb.Artifact`."""
    import wandb

    return wandb.Artifact(name, type=kind, metadata=dict(metadata or {}))


def folder_artifact(folder: Path, name: str, metadata: Mapping[str, Any] | None = None) -> Any:
    """The artifact of the files in an adapter's folder."""
    artifact = new_artifact(name, ADAPTER, metadata)
    # One by one, since `add_dir` prints to the terminal.
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        artifact.add_file(str(path), name=path.relative_to(folder).as_posix(), skip_cache=True)
    return artifact


def data_facts(dataset: PerturbedQueries) -> dict[str, Any]:
    """The sources of a data set's queries, their number, and their digest."""
    return {
        "sources": [
            f"{constructed(split.source)}, noise: {split.noise}" for split in dataset.splits.values()
        ],
        "queries": len(dataset),
        "data_digest": data_digest(dataset.queries),
    }


def data_digest(queries: Sequence[Query], most: int = 50_000) -> str:
    """The digest of the records in their order; images count by name, not by content.

    Args:
        most: of more queries than these, which take seconds to read, the number and evenly spaced ones.
    """
    step = math.ceil(len(queries) / most) or 1
    return digest([str(len(queries)), *(repr(queries[index]) for index in range(0, len(queries), step))])


def data_artifact(role: str, facts: Mapping[str, Any]) -> Any:
    """The artifact of a training, validation or test set; another data set is another version."""
    artifact = new_artifact(f"{role}-data", "dataset", facts)
    with artifact.new_file("data.json") as file:
        json.dump({name: facts[name] for name in ("queries", "data_digest")}, file)
    return artifact


def code_state() -> dict[str, Any]:
    """Version of the package and, in a git checkout, the commit and whether files differ from it."""
    folder = Path(__file__).parents[1]
    state: dict[str, Any] = {"version": version("vlm-calibration")}
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is not None:
        state["commit"] = (_git(folder, "rev-parse", "HEAD") or "").strip() or None
        state["modified"] = bool(_git(folder, "status", "--porcelain", "--untracked-files=no", "."))
    return state


def _git(folder: Path, *arguments: str) -> str | None:
    """The output of a git command; None if it fails or git is not installed."""
    try:
        completed = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return completed.stdout if completed.returncode == 0 else None


def _number(value: float) -> float | None:
    """The value, or None for NaN, which JSON lacks."""
    return None if math.isnan(value) else value
