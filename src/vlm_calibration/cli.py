"""The one command, `vlm-calibration`: LightningCLI's subcommands, and those that need no trainer of the user's.

Errors that a user can act on end in one line that names the culprit; all others keep their traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from vlm_calibration.callbacks.checkpoint import FOLDER, LAST, Stopped
from vlm_calibration.callbacks.files import replacing
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.records import DataError
from vlm_calibration.reporting.export import export_command
from vlm_calibration.reporting.memory import print_memory, split_tokens


class SaveRunConfig(SaveConfigCallback):
    """Writes the full configuration to `config.yaml` of the run directory."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{**settings, "save_to_log_dir": False})

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        with replacing(Path(trainer.default_root_dir) / self.config_filename) as temporary:
            self.parser.save(
                self.config, temporary, skip_none=False, overwrite=True, multifile=self.multifile
            )


class CalibrationCLI(LightningCLI):
    """LightningCLI over our modules and the one data module."""

    def __init__(self) -> None:
        super().__init__(
            model_class=L.LightningModule,
            datamodule_class=PerturbedQueryDataModule,
            subclass_mode_model=True,
            save_config_callback=SaveRunConfig,
            trainer_defaults={"use_distributed_sampler": False},
            # argparse would take `--data.batch` for `--data.batch_size`.
            parser_kwargs={"exit_on_error": False, "allow_abbrev": False},
            seed_everything_default=0,
            auto_configure_optimizers=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for source, target in (
            ("name_or_path", "processor"),
            ("revision", "revision"),
            ("trust_remote_code", "trust_remote_code"),
        ):
            parser.link_arguments(f"model.init_args.base.{source}", f"data.{target}")

    def before_instantiate_classes(self) -> None:
        trainer = self.config[self.subcommand].trainer
        checkpoint = self.config[self.subcommand].get("ckpt_path")
        if checkpoint == "last":
            # Lightning would start anew, with a warning, where there is none.
            checkpoint = str(Path(trainer.default_root_dir or ".") / FOLDER / LAST)
            self.config[self.subcommand].ckpt_path = checkpoint
        if checkpoint and not _may_be_found(checkpoint):
            raise DataError(f"no checkpoint at {checkpoint}")
        loggers = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
        for logger in loggers:
            settings = getattr(logger, "init_args", None)
            if settings is not None and "save_dir" in settings and settings.save_dir is None:
                settings.save_dir = trainer.default_root_dir

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (ValueError, OSError) as error:
            raise DataError(f"configuration: {error}") from error


def _may_be_found(checkpoint: str) -> bool:
    """Whether there is such a file, or the word or address stands for one that Lightning looks for."""
    return checkpoint in ("best", "hpc") or ":" in checkpoint or Path(checkpoint).exists()


def lightning_command(args: Sequence[str]) -> CalibrationCLI:
    """One of LightningCLI's own subcommands, with its settings."""
    # Lightning starts the other processes of a DDP run with the same arguments, which it reads here.
    sys.argv[1:] = args
    return CalibrationCLI()


def levels_command(args: Sequence[str]) -> None:
    """`levels fit`: measure the base model at every noise step and write a level table."""
    if args[:1] != ["fit"]:
        raise DataError(
            "usage: vlm-calibration levels fit --config configs/levels.yaml [--model.init_args.out FILE]"
        )
    levels = lightning_command(["test", *args[1:]]).model
    print(f"wrote {levels.out}")


class ParsedCLI(CalibrationCLI):
    """Reads the configuration; nothing is built from it and nothing runs."""

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def estimate_command(args: Sequence[str]) -> None:
    """`estimate`: the memory that `fit` takes with the same settings."""
    tokens, settings = split_tokens(args)
    sys.argv[1:] = ["fit", *settings]
    print_memory(ParsedCLI().config.fit, tokens)


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], Any], str]] = {
    "fit": (lightning_command, "train: SFT or preference optimisation"),
    "validate": (lightning_command, "answer and score the validation queries"),
    "test": (lightning_command, "evaluate the base model and adapters side by side"),
    "predict": (lightning_command, "run a module's prediction over the data"),
    "levels": (levels_command, "`levels fit`: measure what anchored levels teach"),
    "export": (export_command, "an adapter with its card, or merged into its base"),
    "estimate": (estimate_command, "the memory that `fit` takes with the same settings [--tokens N]"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    head = "usage: vlm-calibration COMMAND [--config FILE ...] [--KEY VALUE ...]"
    foot = "`vlm-calibration COMMAND --help` lists the settings of a command."
    return "\n".join([head, "", *lines, "", foot])


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0, 1 for an error in the data, 2 for one in the call, 130 or 143 if stopped."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return 0 if args else 2
    if args[0] not in COMMANDS:
        return _fail(f"unknown command {args[0]!r}: expected one of {', '.join(COMMANDS)}", 2)
    command, _ = COMMANDS[args[0]]
    own = command is not lightning_command
    try:
        command(args[1:] if own else args)
    except ArgumentError as error:
        return _fail(one_line(error), 2)
    except MisconfigurationException as error:
        return _fail(one_line(error), 2)
    except DataError as error:
        if os.environ.get("VLM_CALIBRATION_TRACEBACK"):
            raise
        return _fail(one_line(error), 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except Stopped as stop:
        return _fail(stop.message, stop.code) if getattr(rank_zero_only, "rank", 0) == 0 else stop.code
    except SystemExit as stop:
        # Lightning ends an interrupted run in this way.
        if isinstance(stop.__context__, KeyboardInterrupt):
            return _fail("interrupted", 130)
        if isinstance(stop, SIGTERMException):
            return _fail("terminated", 143)
        raise
    except RuntimeError as error:
        # A signal to all processes may reach a data worker first.
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        return _fail("terminated", 143) if "Terminated" in str(error) else _fail(one_line(error), 1)
    return 0


def one_line(error: BaseException) -> str:
    """The message without the traceback that a data worker's error carries with it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if lines[0].startswith("Caught ") and "Traceback" in str(error):
        return lines[-1].split(": ", 1)[-1]
    return " ".join(lines)


def _fail(message: str, status: int) -> int:
    print(f"vlm-calibration: error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
