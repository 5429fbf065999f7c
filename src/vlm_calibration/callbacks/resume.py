"""What a run directory holds for a command that is to run in it: nothing, the same run, or another one.

Decided before a model is loaded, by every process from the same files: the first process writes none before all have joined.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import lightning as L
from lightning.pytorch.cli import LightningCLI

from vlm_calibration.callbacks.adapter import ADAPTER
from vlm_calibration.callbacks.checkpoint import FOLDER
from vlm_calibration.callbacks.regions import SUMMARY
from vlm_calibration.callbacks.run_record import RunRecord, command_of, differences, new_record, read_record
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.files import MAX_NAMED
from vlm_calibration.records import DataError
from vlm_calibration.settings import file_digest

ANOTHER_FOLDER = "another folder (--runs, or --trainer.default_root_dir) leaves it as it is"
UNRECORDED = (ADAPTER, FOLDER, SUMMARY, "metrics.json")
"""Results of a run; in a folder without a record nobody knows of which."""


@runtime_checkable
class ResultWriter(Protocol):
    """A callback or module that writes the results of a run."""

    def outputs(self, folder: Path, module: L.LightningModule, data: PerturbedQueryDataModule) -> list[Path]:
        """The files and folders that a finished run has in its directory `folder`."""

    def progress(self, folder: Path) -> list[Path]:
        """The existing files in `folder` from which an interrupted run resumes."""


class Prior(NamedTuple):
    """What a run directory holds.

    Attributes:
        state: "none" if there is nothing to resume, "interrupted", or "finished".
        record: of the run that is resumed or finished.
    """

    state: Literal["none", "interrupted", "finished"]
    record: RunRecord | None = None


def find_prior(cli: LightningCLI) -> Prior:
    """Find out what the run directory holds for this command line, whose classes are instantiated.

    `--overwrite` replaces a run of the same command. `--resume` resumes the same run if it was interrupted, and does nothing if it is
    finished. Without either, trainings and finished evaluations are refused. A training resumes from a checkpoint of its own directory
    (`--ckpt_path`) with whatever settings.

    Raises:
        DataError: it holds another run: one of another command, or of other settings or inputs; or one that nothing is asked to do with;
            or the new run would overwrite a file that it starts from.
    """
    trainer, module, subcommand = cli.trainer, cli.model, str(cli.subcommand)
    config, folder = cli.config[subcommand], Path(trainer.default_root_dir)
    command, checkpoint = command_of(subcommand, module), config.get("ckpt_path")
    resumes_own = is_own_checkpoint(folder, checkpoint)
    if resumes_own and config.overwrite:
        raise DataError(
            f"--overwrite would remove {checkpoint}, from which --ckpt_path resumes: give one of the two"
        )
    adapter = (config.model.get("init_args") or {}).get("adapter")
    if adapter is not None and Path(adapter).resolve() == (folder / ADAPTER).resolve():
        raise DataError(
            f"model.adapter: the run in {folder} would replace {adapter}, from which it starts: choose another "
            "trainer.default_root_dir"
        )
    record = read_record(folder)
    if record is None:
        if not (resumes_own or config.overwrite) and any((folder / name).exists() for name in UNRECORDED):
            raise DataError(f"{folder} holds results without the record of a run: {_remedies()}")
        return Prior("none")
    if record.command != command:
        raise DataError(f"{folder} holds a run of `{record.command}`: {ANOTHER_FOLDER}")
    # An extraction finds finished shards itself, and refuses those of other settings.
    if resumes_own or config.overwrite or (command == "predict" and not config.resume):
        return Prior("none")
    outputs = outputs_of(trainer, module, cli.datamodule)
    has_progress = any(writer.progress(folder) for writer in _writers(trainer, module))
    if not has_progress and not any(path.exists() for path in outputs):
        return Prior("none")
    is_finished = (
        record.finished
        and all(path.exists() for path in outputs)
        and record.results == results_outside(folder, outputs)
    )
    state: Literal["interrupted", "finished"] = "finished" if is_finished else "interrupted"
    if not config.resume and (command == "fit" or (is_finished and command == "test")):
        does = "does nothing if it is the one that is asked for" if is_finished else "resumes it"
        raise DataError(
            f"{folder} holds a run of `{command}` that is {state}: --resume {does}, {_remedies()}"
        )
    now = new_record(command, cli._parser(subcommand), config, trainer, cli.datamodule)
    if differing := differences(record, now):
        named = "; ".join(differing[:MAX_NAMED])
        more = f"; and {len(differing) - MAX_NAMED} more" if len(differing) > MAX_NAMED else ""
        raise DataError(
            f"{folder} holds a run that was {state} with other settings or inputs: {named}{more}: {_remedies()}"
        )
    return Prior(state, record) if is_finished or has_progress else Prior("none")


def _remedies() -> str:
    return f"--overwrite starts again in this folder, {ANOTHER_FOLDER}"


def is_own_checkpoint(folder: Path, checkpoint: str | None) -> bool:
    """Whether starting from this checkpoint resumes the run in this directory."""
    if checkpoint is None:
        return False
    return checkpoint in ("best", "hpc") or Path(checkpoint).resolve().is_relative_to(folder.resolve())


def outputs_of(trainer: L.Trainer, module: L.LightningModule, data: PerturbedQueryDataModule) -> list[Path]:
    """The files and folders that this run has when it is finished."""
    folder = Path(trainer.default_root_dir)
    return [p for writer in _writers(trainer, module) for p in writer.outputs(folder, module, data)]


def _writers(trainer: L.Trainer, module: L.LightningModule) -> list[ResultWriter]:
    return [w for w in (module, *trainer.callbacks) if isinstance(w, ResultWriter)]  # type: ignore[attr-defined]


def results_outside(folder: Path, outputs: list[Path]) -> dict[str, str]:
    """Path -> digest, of the results outside a run directory, which another run may replace."""
    outside = [path for path in outputs if not path.resolve().is_relative_to(folder.resolve())]
    return {str(path): file_digest(path) for path in outside if path.is_file()}
