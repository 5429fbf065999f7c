"""`fit`, `validate`, `test` and `predict`: LightningCLI's subcommands, which `levels` and `estimate-memory` use as well."""

from __future__ import annotations

import os
import pkgutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from datetime import timedelta
from functools import partial
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from vlm_calibration.arguments import with_full_help
from vlm_calibration.callbacks.checkpoint import FOLDER, LAST, Stopped, reading
from vlm_calibration.callbacks.results_table import ResultsTable
from vlm_calibration.callbacks.run_directory import SaveRunConfig, find_prior
from vlm_calibration.commands.settings_check import FLAGS, NO_TABLE, RESUMABLE
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.errors import CommandError, class_at, explained_errors, one_line
from vlm_calibration.models.base import describe
from vlm_calibration.perturbation.levels import AnchoredLevels
from vlm_calibration.presets import DEMO, add_variables, resolve_configs
from vlm_calibration.quiet import quiet_lightning
from vlm_calibration.records import DataError
from vlm_calibration.stages.dpo import DPOModule
from vlm_calibration.stages.level_fit import LevelFitModule
from vlm_calibration.stages.regions import RegionExtractor
from vlm_calibration.stages.sft import SFTModule

CHOICES = ("stages", "losses", "perturbation", "estimators", "regions", "callbacks", "data.sources", "demo")
"""Packages whose classes a configuration may name."""
BASE_TO_DATA = {"name_or_path": "processor", "revision": "revision", "trust_remote_code": "trust_remote_code"}
"""Setting of a base model -> the setting of the data module that it gives."""
announce = rank_zero_only(partial(print, flush=True))


def _of_base(name: str, module: L.LightningModule) -> Any:
    return getattr(getattr(module, "base", None), name, False if name == "trust_remote_code" else None)


class CalibrationCLI(LightningCLI):
    """LightningCLI for any LightningModule and the one data module."""

    is_done = False
    """Whether `--resume` found that the run directory holds this run, finished, so that nothing ran."""
    _written = ""

    def __init__(self) -> None:
        # Without its path (`--model.help SFTModule`) a class must be imported.
        for name in CHOICES:
            package = import_module(f"vlm_calibration.{name}")
            for found in pkgutil.iter_modules(package.__path__):
                import_module(f"{package.__name__}.{found.name}")
        super().__init__(
            model_class=L.LightningModule,
            datamodule_class=PerturbedQueryDataModule,
            subclass_mode_model=True,
            save_config_callback=SaveRunConfig,
            trainer_defaults={"use_distributed_sampler": False, "enable_model_summary": False},
            # argparse would take `--data.batch` for `--data.batch_size`.
            parser_kwargs={"prog": "vlm-calibration", "exit_on_error": False, "allow_abbrev": False},
            seed_everything_default=0,
            auto_configure_optimizers=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # From the instantiated module: an evaluation may take its base model from the adapters.
        for name, target in BASE_TO_DATA.items():
            compute = partial(_of_base, name)
            parser.link_arguments("model", f"data.{target}", compute_fn=compute, apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        subcommand, *_ = words = sys.argv[1:]

        def prepare(contents: list[dict[str, Any]]) -> list[dict[str, Any]]:
            self._written = f"{words} {contents}"
            return contents if subcommand == "fit" else shared_overlays(contents)

        with explained_errors(self._subcommand_parsers.get(subcommand, parser)):
            self.config = parser.parse_args(resolve_configs(words, prepare))

    def _parse_ckpt_path(self) -> None:
        # LightningCLI is the first to read the checkpoint, for settings in it.
        with reading(self.config[self.config.subcommand].get("ckpt_path")):
            super()._parse_ckpt_path()

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        trainer, checkpoint = config.trainer, config.get("ckpt_path")
        if checkpoint == "last":
            # Without a checkpoint Lightning would only warn and start from the beginning.
            checkpoint = config.ckpt_path = str(Path(trainer.default_root_dir or ".") / FOLDER / LAST)
        # Lightning itself resolves keywords and addresses.
        is_file = checkpoint and checkpoint not in ("best", "hpc") and ":" not in checkpoint
        if is_file and not Path(checkpoint).exists():
            raise DataError(f"no checkpoint at {checkpoint}")
        for logger in trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]:
            settings = getattr(logger, "init_args", None)
            if settings is not None and "save_dir" in settings and settings.save_dir is None:
                settings.save_dir = trainer.default_root_dir

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        add_variables(parser, endpoint=subcommand == "test")
        if subcommand in ("validate", "test"):
            # Lightning's table lists every metric of every group; `ResultsTable` prints the main ones.
            parser.set_defaults({"verbose": False})
        flags = (FLAGS if subcommand in RESUMABLE else {}) | (NO_TABLE if subcommand == "test" else {})
        for flag, text in flags.items():
            parser.add_argument(flag, action="store_true", help=text)
        return parser

    def before_fit(self) -> None:
        """Let the module check its data before anything is written."""
        if check := getattr(self.model, "check_data", None):
            check(self.datamodule)

    before_validate = before_test = before_fit

    def instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        accelerator = config.trainer.accelerator
        has_gpu = torch.cuda.is_available() or (accelerator != "cuda" and torch.backends.mps.is_available())
        if accelerator in ("gpu", "cuda") and not has_gpu:
            here = f"{accelerator}, but this PyTorch ({torch.__version__}) finds no GPU here"
            cpu = "--trainer.accelerator cpu (--config trainer/cpu_ddp for several processes on a CPU)"
            raise DataError(f"trainer.accelerator: {here}: use a machine with one, or {cpu}")
        for other in ("overwrite", "ckpt_path"):
            if config.get("resume") and config.get(other):
                raise DataError(f"--resume finds out itself where to start: leave out --{other}, or --resume")
        try:
            super().instantiate_classes()
        except (ValueError, OSError) as error:
            # jsonargparse wraps the error of a constructor in its own.
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, DataError):
                cause = cause.__cause__ or cause.__context__
            raise cause or DataError(f"configuration: {one_line(error)}") from error
        self._check_base()
        if isinstance(self.model, SFTModule | DPOModule):
            announce(self.model.title(self.datamodule))
        if (base := getattr(self.model, "base", None)) is not None:
            announce(f"base model: {describe(base)}")
        if self.subcommand in RESUMABLE:
            self._open_run_directory()

    def _check_base(self) -> None:
        """Refuse the demo's base model, if a preset alone names it (`${demo}`), with other data than the demo's."""
        model = f"{DEMO}/model"
        base = (self.config[self.subcommand].model.get("init_args") or {}).get("base")
        if base is None or base.name_or_path != model or model in self._written:
            return
        for name, split in self.datamodule.settings.items():
            if not isinstance(split.source, DemoSource):
                default = "the base model is the demo's by default, which knows its scenes alone"
                yours = "--config model/qwen2_5_vl_7b or --model.init_args.base.name_or_path MODEL"
                advice = f"give your model, e.g. {yours}"
                raise DataError(f"data.{name} is not the demo's, and {default}: {advice}")

    def _open_run_directory(self) -> None:
        """Decide whether there is something to do, where to start, and whether earlier results are replaced."""
        config, folder = self.config[self.subcommand], Path(self.trainer.default_root_dir)
        prior = find_prior(self)
        self.is_done = prior.state == "finished"
        if self.is_done:
            announce(f"{folder}: finished with these settings: nothing to do")
        if self.subcommand == "fit" and prior.state == "interrupted":
            checkpoints = sorted((folder / FOLDER).glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
            last = folder / FOLDER / LAST
            checkpoint = str(last if last.exists() else checkpoints[-1])
            config.ckpt_path = self.config_init.fit.ckpt_path = checkpoint
            announce(f"{folder}: interrupted: resuming from {checkpoint}")
        for writer in (self.model, *self.trainer.callbacks):  # type: ignore[attr-defined]
            if hasattr(writer, "start_over"):
                writer.start_over = config.overwrite
            elif isinstance(writer, SaveRunConfig):
                writer.record = prior.record

    def _run_subcommand(self, subcommand: str) -> None:
        if not self.is_done:
            super()._run_subcommand(subcommand)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SaveRunConfig):
                callback.hold(trainer)
        if self.config[self.subcommand].get("no_table"):
            trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, ResultsTable)]  # type: ignore[attr-defined]
        return trainer


def shared_overlays(contents: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave settings that a stage cannot have out of overlays, the contents behind that with the class of a model.

    A model's overlay sets LoRA, which only training has; `experiment/anchored` names the level table, which is not measured yet when
    regions are extracted and levels are fitted. A setting that no stage has stays, for the parser to refuse.
    """
    stage: type | None = None
    fitted = deepcopy([*contents])
    for content in fitted:
        if class_path := _within(content, "model").get("class_path"):
            stage = class_at(class_path)
        elif stage is not None:
            own, *training = (set(signature(c).parameters) for c in (stage, SFTModule, DPOModule))
            arguments = _within(content, "model", "init_args")
            for name in set().union(*training) - own:
                arguments.pop(name, None)
            noise = _within(content, "data", "noise")
            levels = _within(noise, "levels").get("class_path") or noise.get("levels")
            if stage in (LevelFitModule, RegionExtractor) and str(levels).endswith(AnchoredLevels.__name__):
                del noise["levels"]
    return fitted


def _within(content: dict[str, Any], *keys: str) -> dict[str, Any]:
    """The mapping below some keys; an empty one if there is none."""
    for key in keys:
        inner = content.get(key)
        content = inner if isinstance(inner, dict) else {}
    return content


@contextmanager
def lightning_errors() -> Iterator[None]:
    """Turn Lightning's ways of ending a run into a `CommandError` or `DataError`; of several processes only the first to fail reports."""
    resumes = "; the same command with --resume resumes it" if sys.argv[1] in RESUMABLE else ""
    try:
        yield
    except Stopped as stop:
        is_first = getattr(rank_zero_only, "rank", 0) == 0
        raise CommandError(stop.message if is_first else "", stop.code) from stop
    except SystemExit as stop:
        # Lightning exits like this after a KeyboardInterrupt.
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise CommandError(f"interrupted{resumes}", 130) from stop
        if isinstance(stop, SIGTERMException):
            raise CommandError(f"terminated{resumes}", 143) from stop
        raise
    except (DataError, MisconfigurationException, RuntimeError) as error:
        # Communication with a process that has ended fails.
        if not _first_to_fail():
            raise CommandError("", 1) from error
        if isinstance(error, MisconfigurationException):
            raise CommandError(one_line(error), 2) from error
        # A signal to the process group may end a data worker first.
        if isinstance(error, DataError) or not str(error).startswith("DataLoader worker (pid"):
            raise
        if "Terminated" in str(error):
            raise CommandError(f"terminated{resumes}", 143) from error
        raise CommandError(one_line(error), 1) from error


def _first_to_fail() -> bool:
    """Whether this process is the first of a run to report an error; errors of the others are the same or follow from it."""
    distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if not distributed or "MASTER_PORT" not in os.environ:
        return True
    try:
        port = int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(os.environ["MASTER_ADDR"], port, is_master=False, timeout=timedelta(seconds=5))
        # torchrun keeps the store when it restarts the processes.
        return store.add(f"vlm_calibration/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1
    except dist.DistError:
        return False  # the first process, which hosts the store, has ended


def lightning_command(args: Sequence[str]) -> CalibrationCLI:
    """Run a subcommand of LightningCLI, whose name `args` begin with."""
    import wandb

    # Lightning starts the other processes of a DDP run with the arguments in sys.argv.
    sys.argv[1:] = with_full_help(args)
    quiet_lightning()
    run = wandb.run
    with lightning_errors():
        command = CalibrationCLI()
        if run is None:
            # At the end of the process W&B would print more below the result.
            wandb.finish()
        return command


class ParsedCLI(CalibrationCLI):
    """Parses the configuration; instantiates, seeds and runs nothing."""

    is_done = True

    def _set_seed(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass


def parse(subcommand: str, args: Sequence[str]) -> ParsedCLI:
    """Parse the configuration of "fit", "test" or "predict" with these settings; nothing is instantiated."""
    sys.argv[1:] = [subcommand, *args]
    with lightning_errors():
        return ParsedCLI()
