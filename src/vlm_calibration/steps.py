"""The steps of a calibration from Python: what `vlm-calibration` does on the command line, with the same configuration.

    plan = Plan(model="qwen2_5_vl_7b", data="jsonl", data_root="my_data", runs="runs/mine")
    fit_levels(plan)
    train_sft(plan)
    train_dpo(plan)
    metrics = evaluate(plan)
    report(plan)

Each step runs in this process. A step that has finished with the same settings is not repeated; one that was interrupted resumes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

from jsonargparse.typing import PositiveInt

from vlm_calibration.files import read_json
from vlm_calibration.presets import preset_names
from vlm_calibration.records import DataError

if TYPE_CHECKING:
    from vlm_calibration.perturbation.levels import AnchoredLevels

Settings: TypeAlias = Mapping[str, Any]
"""Settings by their dotted names, e.g. {"data.workers": 0, "trainer.max_steps": 100}; values are those of JSON."""

BASE = "model.init_args.base.name_or_path"
"""The setting of the base model."""


@dataclass(frozen=True)
class Plan:
    """A model, data and settings that the steps share. Without a model and data: the embedded demo.

    Attributes:
        model: base model: the name of a preset in `model/`, or a configuration file; several in order, later ones overriding.
        data: where queries come from: the same in `data/`.
        preset: the same in `experiment/`; None: "anchored", or the demo's own settings. Stage 2 adds NAME_dpo if there is one.
        trainer: devices and strategy: the same in `trainer/`.
        data_root: folder of the data, which the data preset writes `${data_root}`.
        runs: folder of the run directories levels, sft, dpo and eval.
        settings: further settings of every step.
        overwrite: replace results in `runs` instead of resuming.
    """

    model: str | Sequence[str] = ()
    data: str | Sequence[str] = ()
    preset: str | None = None
    trainer: str | Sequence[str] = ()
    data_root: str | Path = "data"
    runs: str | Path = "runs"
    settings: Settings = field(default_factory=dict)
    overwrite: bool = False

    def arguments(self, stage: str, settings: Settings) -> list[str]:
        """The arguments of the command line for one step.

        Args:
            stage: the preset that is the step's whole configuration, e.g. "sft".
            settings: those of this step alone.

        Raises:
            DataError: data without a model, on which the demo's would be used unasked.
        """
        settings = {**self.settings, **settings}
        if self.data and not self.model and stage in ("levels", "sft", "dpo") and BASE not in settings:
            raise DataError(
                f"Plan: data {self.data!r} without a model, so the demo's would be used: give one, e.g. model='qwen2_5_vl_7b', or the "
                f"setting {BASE}"
            )
        configs = [stage, *_presets("model", self.model), *_presets("data", self.data)]
        preset = self.preset or ("anchored" if self.model or self.data else ())
        configs += _presets("experiment", preset)
        if stage == "dpo" and preset and f"experiment/{preset}_dpo" in preset_names():
            configs.append(f"experiment/{preset}_dpo")
        configs += _presets("trainer", self.trainer)
        arguments = [part for config in configs for part in ("--config", config)]
        arguments += ["--data-root", str(self.data_root), "--runs", str(self.runs)]
        regions = Path(self.runs) / "regions"
        if regions.is_dir() and stage != "regions":
            arguments += ["--data.regions", str(regions)]
        arguments += [f"--{name}={_spelled(value)}" for name, value in settings.items()]
        return [*arguments, "--overwrite" if self.overwrite else "--resume"]


def extract_regions(plan: Plan, settings: Settings = MappingProxyType({})) -> Path:
    """Find the regions of the key objects of queries that have none; the other steps use them.

    Args:
        plan: model and data.
        settings: of this step alone, as in `Plan.settings`.

    Returns:
        `runs/regions`, with a Parquet file for each source that needed regions.

    Raises:
        DataError: a setting, a file or a model cannot be used. The other steps raise the same errors.
        ArgumentError: there is no such preset or setting.
        CommandError: the step was stopped.
    """
    return _run(["predict"], plan, "regions", settings)


def fit_levels(plan: Plan, settings: Settings = MappingProxyType({})) -> AnchoredLevels:
    """Measure the base model's accuracy by kind and strength of perturbation, which anchored levels teach.

    Args:
        plan: model and data.
        settings: of this step alone, as in `Plan.settings`.

    Returns:
        The levels in `runs/levels.json`.
    """
    from vlm_calibration.perturbation.levels import AnchoredLevels

    _run(["test"], plan, "levels", settings)
    return AnchoredLevels(Path(plan.runs) / "levels.json")


def train_sft(plan: Plan, settings: Settings = MappingProxyType({})) -> Path:
    """Stage 1, supervised fine-tuning.

    Args:
        plan: model and data.
        settings: of this step alone, as in `Plan.settings`.

    Returns:
        The run directory, `runs/sft`, with the adapter in it.
    """
    return _run(["fit"], plan, "sft", settings)


def train_dpo(plan: Plan, settings: Settings = MappingProxyType({})) -> Path:
    """Stage 2, preference optimisation, from the adapter of stage 1.

    Args:
        plan: model and data.
        settings: of this step alone, as in `Plan.settings`.

    Returns:
        The run directory, `runs/dpo`, with the adapter in it.
    """
    return _run(["fit"], plan, "dpo", settings)


def evaluate(plan: Plan, settings: Settings = MappingProxyType({})) -> dict[str, dict[str, float | None]]:
    """Ask the base model and the adapters of both stages the test queries; writes `runs/eval`.

    Args:
        plan: model and data.
        settings: of this step alone, as in `Plan.settings`.

    Returns:
        System ("base", "sft", "dpo") -> its metrics by name, as in its `metrics.json`.
    """
    trained = [name for name in ("sft", "dpo") if (Path(plan.runs) / name / "adapter").is_dir()]
    adapters = {name: str(Path(plan.runs) / name / "adapter") for name in trained}
    settings = {"model.init_args.adapters": adapters, **settings}
    folder = _run(["test"], plan, "eval/jsonl" if plan.data else "eval/demo", settings)
    return {path.parent.name: read_json(path) for path in sorted(folder.glob("*/metrics.json"))}


def report(plan: Plan, *, images: bool = True, replicates: int = 1000, seed: int = 0) -> Path:
    """Write the report on the evaluation in `runs/eval`.

    Args:
        plan: names the runs.
        images: show images.
        replicates: number of bootstrap draws.
        seed: seed of the draws.

    Returns:
        The page.

    Raises:
        DataError: there are no predictions, or a file cannot be used.
    """
    from vlm_calibration.commands.report import PAGE
    from vlm_calibration.commands.report import report as write_report

    folder = Path(plan.runs) / "eval"
    write_report([str(folder)], images=images, replicates=PositiveInt(replicates), seed=seed)
    return folder / PAGE


def _run(command: list[str], plan: Plan, stage: str, settings: Settings) -> Path:
    """Run a subcommand of LightningCLI; return its run directory."""
    from vlm_calibration.commands.lightning_cli import lightning_command

    with _as_one_command():
        cli = lightning_command([*command, *plan.arguments(stage, settings)])
    return Path(cli.trainer.default_root_dir)


@contextmanager
def _as_one_command() -> Iterator[None]:
    """Run a step as if it were the only one of this process: with a W&B run of its own, unless the caller has begun one.

    Lightning starts the other processes of a DDP run with the arguments in `sys.argv`, so these are the step's for as long as it runs.
    """
    import wandb

    arguments, run = sys.argv, wandb.run
    sys.argv = [str(Path(__file__).with_name("cli") / "__main__.py")]
    try:
        yield
    finally:
        sys.argv = arguments
        if run is None:
            wandb.finish()


def _presets(folder: str, names: str | Sequence[str]) -> list[str]:
    """The presets of a folder, or files, that these names stand for."""
    names = [names] if isinstance(names, str) else names
    return [name if Path(name).is_file() else f"{folder}/{name}" for name in names]


def _spelled(value: Any) -> str:
    return str(value) if isinstance(value, str | Path) else json.dumps(value)
