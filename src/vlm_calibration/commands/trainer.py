"""`fit`, `validate`, `test` and `predict`: the common settings of LightningCLI's subcommands, for a help page without torch.

`lightning_cli` parses and runs them. Each raises an ArgumentError for a setting that is unknown or wrong, and a DataError for a
setting, a file or a model that cannot be used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from vlm_calibration.arguments import ALL_SETTINGS, Forwarded
from vlm_calibration.presets import CONFIG, ENDPOINT_OPTIONS, VARIABLE_OPTIONS, presets_by_folder

BASE = {"--model.init_args.base.name_or_path MODEL": "base model: its name on the Hub, or a folder"}
RUN = {
    "--trainer.devices N": "GPUs or processes",
    "--trainer.default_root_dir DIR": "run directory (default: in the folder of --runs, as the preset names it)",
    "--overwrite": "start again, and replace the run that the run directory holds",
    "--resume": "resume the run if it was interrupted, do nothing if it is finished, else start it",
}
MORE = {"--print_config": "print the configuration that results, and exit"}


FURTHER = "All settings: --help-all; those of a model: --model.help {}."
"""End of a help page, with the class of a module."""


def _settings(module: str, *stages: str, common: Mapping[str, str]) -> Forwarded:
    """The common settings of a subcommand.

    Args:
        module: class of a module that it runs.
        stages: names or patterns of the full configurations that it runs.
        common: options between those of data and configuration and `--print_config`.
    """
    config = {CONFIG: "a stage, then overlays: presets (see below) or files of your own (may be repeated)"}
    return Forwarded(
        {**ALL_SETTINGS, **config, **VARIABLE_OPTIONS, **common, **MORE},
        lambda: f"{presets_by_folder(*stages)}\n\n{FURTHER.format(module)}",
    )


FIT = _settings(
    "SFTModule",
    "sft",
    "dpo",
    common={
        **BASE,
        "--model.init_args.adapter DIR": "stage dpo: the adapter to start from",
        "--model.init_args.optimizer.lr X": "learning rate",
        "--data.batch_size N": "queries of a training step on each device",
        "--trainer.max_steps N": "steps of the optimizer; -1: as many as --trainer.max_epochs takes",
        "--trainer.max_epochs N": "passes over the training data",
        **RUN,
        "--ckpt_path FILE": 'checkpoint to resume from, or "last"',
    },
)
VALIDATE = _settings(
    "SFTModule",
    "sft",
    "dpo",
    common={
        **BASE,
        "--model.init_args.adapter DIR": "stage dpo: the adapter to start from",
        "--data.eval_batch_size N": "queries answered together",
        "--trainer.devices N": RUN["--trainer.devices N"],
        "--ckpt_path FILE": "checkpoint of the model to validate",
    },
)
TEST = _settings(
    "EvaluationModule",
    "eval/*",
    "system/*",
    common={
        **ENDPOINT_OPTIONS,
        **BASE,
        "--model.init_args.adapters '{NAME:DIR,...}'": "adapters to compare with the base model, by name",
        "--data.eval_batch_size N": "queries answered together",
        **RUN,
    },
)
PREDICT = _settings(
    "RegionExtractor",
    "regions",
    common={
        "--data.eval_batch_size N": "images of a batch",
        "--data.parts N": "number of jobs that share the queries",
        "--data.part N": "which of these jobs this one is, from 0",
        **RUN,
    },
)


def fit(*settings: Annotated[str, FIT]) -> None:
    """Train: stage 1 (supervised fine-tuning) or stage 2 (preference optimisation). Writes checkpoints, adapter and metrics."""
    _run("fit", settings)


def validate(*settings: Annotated[str, VALIDATE]) -> None:
    """Answer and score the validation queries with the model of a training stage."""
    _run("validate", settings)


def test(*settings: Annotated[str, TEST]) -> None:
    """Evaluate a base model, adapters and models behind an address side by side. Writes metrics and predictions of each; continues where it was interrupted."""
    _run("test", settings)


def predict(*settings: Annotated[str, PREDICT]) -> None:
    """Find the key objects of queries that have no regions, and write them to files that every other stage reads."""
    _run("predict", settings)


def _run(subcommand: str, settings: tuple[str, ...]) -> None:
    from vlm_calibration.commands.lightning_cli import lightning_command

    lightning_command([subcommand, *settings])
