"""`fit`, `validate`, `test`, `predict` and `levels fit`, which `lightning_cli` runs: their help pages without torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from vlm_calibration.arguments import ALL_SETTINGS, Forwarded, Subcommands
from vlm_calibration.commands.settings_check import FLAGS, check_settings
from vlm_calibration.presets import CONFIG, ENDPOINT_OPTIONS, VARIABLE_OPTIONS, presets_by_folder

BASE = {"--model.init_args.base.name_or_path MODEL": "base model: its name on the Hub, or a folder"}
TRAINED = BASE | {"--model.init_args.adapter DIR": "stage dpo: the adapter to start from"}
ANSWERED = {"--data.eval_batch_size N": "queries answered together"}
DEVICES = {"--trainer.devices N": "GPUs or processes"}
ROOT = "run directory (default: in the folder of --runs, as the preset names it)"
RUN = DEVICES | {"--trainer.default_root_dir DIR": ROOT} | FLAGS


def _settings(module: str, stages: Sequence[str], options: dict[str, str]) -> Forwarded:
    """The common settings of a command, by the class of a module and the configurations that it runs."""
    overlays = {CONFIG: "a stage, then overlays: presets (see below) or files of your own (may be repeated)"}
    first = ALL_SETTINGS | overlays | VARIABLE_OPTIONS
    last = {"--print_config": "print the configuration that results, and exit"}
    further = f"All settings: --help-all; those of a model: --model.help {module}."
    return Forwarded(first | options | last, lambda: f"{presets_by_folder(*stages)}\n\n{further}")


OF_TRAINING = {
    "--model.init_args.optimizer.lr X": "learning rate",
    "--data.batch_size N": "queries of a training step on each device",
    "--trainer.max_steps N": "steps of the optimizer; -1: as many as --trainer.max_epochs takes",
    "--trainer.max_epochs N": "passes over the training data",
    **RUN,
    "--ckpt_path FILE": 'checkpoint to resume from, or "last"',
}
VALIDATED = {"--ckpt_path FILE": "checkpoint of the model to validate"}
ADAPTERS = {"--model.init_args.adapters '{NAME:DIR,...}'": "adapters to compare with the base model, by name"}
PARTS = {
    "--data.eval_batch_size N": "images of a batch",
    "--data.parts N": "number of jobs that share the queries",
    "--data.part N": "which of these jobs this one is, from 0",
}
OF_LEVELS = {
    "--model.init_args.out FILE": "where to write the level table",
    "--model.init_args.likelihoods FILE": "where to write how likely the model holds its answers to the training queries; null: "
    "not at all",
}
FIT = _settings("SFTModule", ("sft", "dpo"), TRAINED | OF_TRAINING)
VALIDATE = _settings("SFTModule", ("sft", "dpo"), TRAINED | ANSWERED | DEVICES | VALIDATED)
TEST = _settings(
    "EvaluationModule", ("eval/*", "system/*"), ENDPOINT_OPTIONS | BASE | ADAPTERS | ANSWERED | RUN
)
PREDICT = _settings("RegionExtractor", ("regions",), PARTS | RUN)
FIT_LEVELS = _settings("LevelFitModule", ("levels",), BASE | OF_LEVELS | ANSWERED | RUN)


def fit(*settings: Annotated[str, FIT]) -> None:
    """Train: stage 1 (supervised fine-tuning) or stage 2 (preference optimisation). Writes checkpoints, adapter and metrics."""
    run_lightning(["fit", *settings])


def validate(*settings: Annotated[str, VALIDATE]) -> None:
    """Answer and score the validation queries with the model of a training stage."""
    run_lightning(["validate", *settings])


def test(*settings: Annotated[str, TEST]) -> None:
    """Evaluate a base model, adapters and models behind an address side by side. Writes metrics and predictions of each; continues where it was interrupted."""
    run_lightning(["test", *settings])


def predict(*settings: Annotated[str, PREDICT]) -> None:
    """Find the key objects of queries that have no regions, and write them to files that every other stage reads."""
    run_lightning(["predict", *settings])


def fit_levels(*settings: Annotated[str, FIT_LEVELS]) -> None:
    """Measure how often a base model is right by kind and strength of perturbation, and write the level table.

    The queries are held-out ones; AnchoredLevels reads the table. `--config levels` measures the demo's model,
    without a GPU or data of your own.
    """
    command = run_lightning(["test", *settings])
    for path in () if command.is_done else (command.model.out, command.model.likelihoods):
        if path is not None:
            print(f"wrote {path}")


LEVELS = Subcommands("Measure what anchored levels teach.", {"fit": fit_levels})


def run_lightning(args: Sequence[str]) -> Any:
    """Run the subcommand of LightningCLI that `args` begin with; returns its `CalibrationCLI`."""
    check_settings(args)
    from vlm_calibration.commands.lightning_cli import lightning_command

    return lightning_command(args)
