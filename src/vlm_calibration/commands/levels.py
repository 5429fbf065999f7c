"""`vlm-calibration levels fit`: measure a base model and write the level table of anchored levels."""

from __future__ import annotations

from typing import Annotated

from vlm_calibration.arguments import ALL_SETTINGS, Forwarded, Subcommands
from vlm_calibration.commands.trainer import FURTHER, RUN
from vlm_calibration.presets import CONFIG, VARIABLE_OPTIONS, presets_by_folder

SETTINGS = Forwarded(
    {
        **ALL_SETTINGS,
        CONFIG: '"levels", then overlays: presets (see below) or files of your own (may be repeated)',
        **VARIABLE_OPTIONS,
        "--model.init_args.base.name_or_path MODEL": "name or folder of the base model",
        "--model.init_args.out FILE": "where to write the level table",
        "--model.init_args.likelihoods FILE": "where to write how likely the model holds its answers to the training queries; null: "
        "not at all",
        "--data.eval_batch_size N": "queries answered together",
        **RUN,
    },
    lambda: f"{presets_by_folder('levels')}\n\n{FURTHER.format('LevelFitModule')}",
)


def fit(*settings: Annotated[str, SETTINGS]) -> None:
    """Measure how often a base model is right by kind and strength of perturbation, and write the level table.

    The queries are held-out ones; AnchoredLevels reads the table. `--config configs/levels.yaml` measures the demo's model,
    without a GPU or data of your own.

    Raises:
        ArgumentError: a setting is unknown or wrong.
        DataError: a setting, a file or a model cannot be used.
    """
    from vlm_calibration.commands.lightning_cli import lightning_command

    command = lightning_command(["test", *settings])
    if not command.is_done:
        for path in (command.model.out, command.model.likelihoods):
            if path is not None:
                print(f"wrote {path}")


SUBCOMMANDS = Subcommands("Measure what anchored levels teach.", {"fit": fit})
