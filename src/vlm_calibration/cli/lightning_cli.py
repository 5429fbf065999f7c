"""LightningCLI's subcommands, and what other commands read or run of the same configuration.

What only Lightning knows (that a run was stopped, misconfigured or interrupted) leaves here as a `CommandError`.
"""

from __future__ import annotations

import os
import pkgutil
import sys
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from vlm_calibration.arguments import explained
from vlm_calibration.callbacks.checkpoint import FOLDER, LAST, Stopped, reading
from vlm_calibration.callbacks.run_directory import SaveRunConfig, check_run_directory
from vlm_calibration.cli.errors import CommandError, one_line
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.records import DataError

CHOICES = ("stages", "losses", "perturbation", "estimators", "regions", "callbacks", "data.sources", "demo")
"""Packages with classes that a configuration may name."""
DATA_DEFAULTS = {"name_or_path": None, "revision": None, "trust_remote_code": False}
"""Settings of a base model -> what the data module takes where there is none."""


class CalibrationCLI(LightningCLI):
    """LightningCLI over our modules and the one data module."""

    def __init__(self) -> None:
        _import_choices()
        super().__init__(
            model_class=L.LightningModule,
            datamodule_class=PerturbedQueryDataModule,
            subclass_mode_model=True,
            save_config_callback=SaveRunConfig,
            trainer_defaults={"use_distributed_sampler": False},
            # argparse would take `--data.batch` for `--data.batch_size`.
            parser_kwargs={"prog": "vlm-calibration", "exit_on_error": False, "allow_abbrev": False},
            seed_everything_default=0,
            auto_configure_optimizers=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # The module knows its base model, which an evaluation may have from the adapters.
        for source, target in (
            ("name_or_path", "processor"),
            ("revision", "revision"),
            ("trust_remote_code", "trust_remote_code"),
        ):
            parser.link_arguments(
                "model", f"data.{target}", compute_fn=partial(_of_base, source), apply_on="instantiate"
            )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            own = self._subcommand_parsers.get(sys.argv[1], parser)
            raise ArgumentError(None, explained(str(error), own)) from error

    def _parse_ckpt_path(self) -> None:
        # LightningCLI looks for settings in a checkpoint, before anything else does.
        with reading(self.config[self.config.subcommand].get("ckpt_path")):
            super()._parse_ckpt_path()

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

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "fit":
            parser.add_argument(
                "--overwrite",
                action="store_true",
                help="Replace the run that trainer.default_root_dir holds, once the new one has been checked and begins.",
            )
        return parser

    def before_fit(self) -> None:
        """What a module refuses of its data it refuses before anything is written."""
        check = getattr(self.model, "check_data", None)
        if check is not None:
            check(self.datamodule)

    before_validate = before_test = before_fit

    def instantiate_classes(self) -> None:
        _check_accelerator(self.config[self.subcommand].trainer.accelerator)
        if self.subcommand == "fit":
            fit = self.config.fit
            adapter = fit.model.init_args.get("adapter") if "init_args" in fit.model else None
            folder = Path(fit.trainer.default_root_dir or ".")
            check_run_directory(folder, fit.ckpt_path, fit.overwrite, adapter)
        try:
            super().instantiate_classes()
        except (ValueError, OSError) as error:
            raise _data_error(error) from error

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SaveRunConfig):
                callback.hold(trainer)
        return trainer


def _data_error(error: BaseException) -> DataError:
    """The error of ours within one of jsonargparse, which wraps what constructors raise; or else all that there is."""
    within: BaseException | None = error
    while within is not None and not isinstance(within, DataError):
        within = within.__cause__ or within.__context__
    return within or DataError(f"configuration: {one_line(error)}")


def _import_choices() -> None:
    """Import what a configuration may name: a class without its path (`--model.help SFTModule`) is one that is imported."""
    for package in CHOICES:
        found = import_module(f"vlm_calibration.{package}")
        for module in pkgutil.iter_modules(found.__path__):
            import_module(f"{found.__name__}.{module.name}")


def _of_base(name: str, module: L.LightningModule) -> Any:
    """A setting of the module's base model; the data module's own default for a module without one."""
    base = getattr(module, "base", None)
    return getattr(base, name) if base is not None else DATA_DEFAULTS[name]


def _check_accelerator(accelerator: Any) -> None:
    """Check that there is a GPU where the configuration asks for one.

    Raises:
        DataError: there is none.
    """
    usable = torch.cuda.is_available() or (accelerator != "cuda" and torch.backends.mps.is_available())
    if accelerator in ("gpu", "cuda") and not usable:
        raise DataError(
            f"trainer.accelerator: {accelerator}, but this PyTorch ({torch.__version__}) finds no GPU here: use a machine "
            "with one, or --trainer.accelerator cpu (configs/trainer/cpu_ddp.yaml for several processes on a CPU)"
        )


def _may_be_found(checkpoint: str) -> bool:
    """Whether there is such a file, or the word or address stands for one that Lightning looks for."""
    return checkpoint in ("best", "hpc") or ":" in checkpoint or Path(checkpoint).exists()


@contextmanager
def _ended_in_good_order() -> Iterator[None]:
    """Lightning's ways of ending a run, as the one that `main` reports.

    Of several processes the first to fail reports its error; those that fail with it end without a word.
    """
    try:
        yield
    except DataError as error:
        if not _first_to_fail():
            raise CommandError("", 1) from error
        raise
    except MisconfigurationException as error:
        raise CommandError(one_line(error) if _first_to_fail() else "", 2) from error
    except Stopped as stop:
        first = getattr(rank_zero_only, "rank", 0) == 0
        raise CommandError(stop.message if first else "", stop.code) from stop
    except SystemExit as stop:
        # Lightning ends an interrupted run in this way.
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise CommandError("interrupted", 130) from stop
        if isinstance(stop, SIGTERMException):
            raise CommandError("terminated", 143) from stop
        raise
    except RuntimeError as error:
        # Where another process ends, what this one wanted of it fails.
        if not _first_to_fail():
            raise CommandError("", 1) from error
        # A signal to all processes may reach a data worker first.
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        terminated = "Terminated" in str(error)
        raise CommandError(*("terminated", 143) if terminated else (one_line(error), 1)) from error


def _first_to_fail() -> bool:
    """Whether this process of a run is the first that has an error to report; the others' follow from it, or are the same."""
    together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if not together or "MASTER_PORT" not in os.environ:
        return True
    try:
        port = int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(os.environ["MASTER_ADDR"], port, is_master=False, timeout=timedelta(seconds=5))
        # torchrun keeps the store when it starts processes again.
        return store.add(f"vlm_calibration/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1
    except dist.DistError:
        return False  # the first process, which keeps the store, has ended


def lightning_command(args: Sequence[str]) -> CalibrationCLI:
    """One of LightningCLI's own subcommands, with its settings."""
    # Lightning starts the other processes of a DDP run with the same arguments, which it reads here.
    sys.argv[1:] = args
    with _ended_in_good_order():
        return CalibrationCLI()


class ParsedCLI(CalibrationCLI):
    """Reads the configuration; nothing is built from it and nothing runs."""

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def parsed_fit(args: Sequence[str]) -> Any:
    """The configuration of `fit` with these settings; nothing is built from it."""
    sys.argv[1:] = ["fit", *args]
    with _ended_in_good_order():
        return ParsedCLI().config.fit
