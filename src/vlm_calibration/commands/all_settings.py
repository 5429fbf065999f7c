"""All settings of LightningCLI's subcommands: parsers of them, for `--help-all` and for completion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jsonargparse import ArgumentParser

from vlm_calibration.commands.lightning_cli import CalibrationCLI
from vlm_calibration.stages.dpo import DPOModule
from vlm_calibration.stages.evaluation import EvaluationModule
from vlm_calibration.stages.level_fit import LevelFitModule
from vlm_calibration.stages.regions import RegionExtractor
from vlm_calibration.stages.sft import SFTModule

STAGES: dict[str, tuple[type, ...]] = {
    "fit": (SFTModule, DPOModule),
    "validate": (SFTModule, DPOModule),
    "test": (EvaluationModule, LevelFitModule),
    "predict": (RegionExtractor,),
}
"""Subcommand of LightningCLI -> the modules that it runs."""


def trainer_parsers() -> Mapping[str, ArgumentParser]:
    """The parsers of LightningCLI's subcommands: trainer, data, and the command's own options."""

    class ParsersBuilt(Exception):
        pass

    class ParserBuilder(CalibrationCLI):
        def parse_arguments(self, *_: Any) -> None:
            raise ParsersBuilt(self._subcommand_parsers)

    try:
        ParserBuilder()
    except ParsersBuilt as end:
        parsers: Mapping[str, ArgumentParser] = end.args[0]
    return parsers


def stage_parsers(subcommand: str) -> list[ArgumentParser]:
    """A parser of the settings of each module that a configuration of this subcommand may name."""
    parsers = []
    for stage in STAGES[subcommand]:
        parser = ArgumentParser(
            usage=f"settings of {stage.__module__}.{stage.__name__}", add_help=False, exit_on_error=False
        )
        parser.add_class_arguments(stage, "model.init_args")
        parsers.append(parser)
    return parsers


def settings_page(subcommand: str) -> str:
    """The help of a subcommand with the settings of all its modules."""
    parsers = [trainer_parsers()[subcommand], *stage_parsers(subcommand)]
    return "\n".join(parser.format_help() for parser in parsers)
