"""A calibration: its stages, and the command line of each, for `vlm-calibration calibrate` and for Python (`train_sft(Plan(...))`).

A finished step is not repeated with the same settings; an interrupted one resumes. A DataError is about what cannot be used, an
ArgumentError about a preset or setting that does not exist, and a CommandError ends a step that was stopped.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

from vlm_calibration.files import read_json
from vlm_calibration.presets import DEMO, find_preset, preset_names, read_config
from vlm_calibration.records import DataError

if TYPE_CHECKING:
    from vlm_calibration.perturbation.levels import AnchoredLevels

Settings: TypeAlias = Mapping[str, Any]
"""Settings by their dotted names, e.g. {"data.workers": 0, "trainer.max_steps": 100}; values are those of JSON."""

STAGES: dict[str, tuple[str, ...]] = {
    "regions": ("predict",),
    "levels": ("levels", "fit"),
    "sft": ("fit",),
    "dpo": ("fit",),
    "evaluate": ("test",),
    "report": ("report",),
}
"""Stage of a calibration -> the subcommand that runs it; in order."""
TRAINED = ("sft", "dpo")
BASE = "model.init_args.base.name_or_path"


@dataclass(frozen=True)
class Plan:
    """What the stages share.

    Without a model and data it is the embedded demo. A DataError if a folder of data does not exist, or has no data to go with it; an
    ArgumentError if there is no such preset or file.

    Attributes:
        model: base model: a preset of model/ or a file; several, separated by spaces, override each other in order
        data: where queries come from: the same with data/
        preset: the same with experiment/ (default: anchored, or the demo's own settings); in stage 2 NAME_dpo follows NAME if there is one
        trainer: devices and strategy: the same with trainer/
        data_root: folder of the data
        runs: folder of the run directories regions, levels, sft, dpo and eval
        settings: further settings of every stage but `report`
        overwrite: replace earlier results instead of resuming
    """

    model: str | Sequence[str] = ""
    data: str | Sequence[str] = ""
    preset: str | Sequence[str] = ""
    trainer: str | Sequence[str] = ""
    data_root: Path | str | None = None
    runs: Path | str = "runs"
    settings: Settings = field(default_factory=dict)
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.data_root is not None and not self.data:
            raise DataError(f"data root {self.data_root} without data: name the kind of data, e.g. jsonl")
        if self.data_root is not None and not Path(self.data_root).is_dir():
            raise DataError(f"data root {self.data_root}: there is no such folder")
        self._overlays("dpo")

    @property
    def stages(self) -> list[str]:
        """The stages that the calibration consists of, in order: without data no regions, without a table of its own no levels."""
        levels: Any = None
        for name in self._overlays("sft"):
            content: Any = read_config(name)
            for key in ("data", "noise", "levels"):
                content = content.get(key) if isinstance(content, dict) else None
            levels = content or levels
        needed = {"regions": bool(self.data), "levels": "${runs}" in json.dumps(levels)}
        return [stage for stage in STAGES if needed.get(stage, True)]

    def folder(self, stage: str) -> Path:
        """The run directory of a stage; that of `report` is the evaluation's."""
        return Path(self.runs) / ("eval" if stage in ("evaluate", "report") else stage)

    def command(
        self, stage: str, *arguments: str, config: str | None = None, after: Collection[str] = ()
    ) -> list[str]:
        """What follows `vlm-calibration` on the command line of a stage, with further arguments, or another full configuration.

        It reads what earlier stages have written, and what those in `after`, which run before it, will have written.
        A DataError for data without a model, for which the demo's would be used unasked, or for another run directory.
        """
        if stage == "report":
            return ["report", str(self.folder(stage)), *arguments]
        further = [*_options(self.settings), *arguments]
        names = {argument.partition("=")[0] for argument in further}
        if "--trainer.default_root_dir" in names:
            raise DataError(
                f"--trainer.default_root_dir: the run directory of {stage} is {self.folder(stage)}"
            )
        if self.data and stage in ("levels", *TRAINED) and not (self.model or config or f"--{BASE}" in names):
            advice = f"name one, e.g. qwen2_5_vl_7b, or set {BASE}"
            raise DataError(
                f"{stage}: data {self.data!r} without a model, so the demo's would be used: {advice}"
            )
        own = f"eval/{'jsonl' if self.data else 'demo'}" if stage == "evaluate" else stage
        command = [*STAGES[stage]]
        for name in (config or own, *self._overlays(stage)):
            command += ["--config", name]
        command += ["--data-root", str(self.data_root or "data"), "--runs", str(self.runs)]
        if stage != "regions" and ("regions" in after or self.folder("regions").is_dir()):
            command += ["--data.regions", str(self.folder("regions"))]
        if stage == "evaluate":
            folders = {stage: self.folder(stage) / "adapter" for stage in TRAINED}
            adapters = {s: str(folder) for s, folder in folders.items() if s in after or folder.is_dir()}
            command += _options({"model.init_args.adapters": adapters})
            if not (adapters or self.model or self.data):
                command += _options({BASE: f"{DEMO}/model"})
        # The run directory comes last, since a configuration may name another.
        command += [*further, "--trainer.default_root_dir", str(self.folder(stage))]
        if self.overwrite:
            return [*command, "--overwrite"]
        return command if "--ckpt_path" in names else [*command, "--resume"]

    def _overlays(self, stage: str) -> list[str]:
        """The configurations that follow the stage's own, in order: presets and files."""
        preset = self.preset or ("anchored" if self.model or self.data else "")
        overlays = [*_presets("model", self.model), *_presets("data", self.data)]
        names = preset_names()
        for name in _presets("experiment", preset):
            overlays.append(name)
            of_stage_2 = f"{name.removesuffix('.yaml')}_dpo"
            if stage == "dpo" and of_stage_2 in names:
                overlays.append(of_stage_2)
            elif stage == "dpo" and Path(f"{of_stage_2}.yaml").is_file():
                overlays.append(f"{of_stage_2}.yaml")
        return [*overlays, *_presets("trainer", self.trainer)]


def extract_regions(plan: Plan, settings: Settings = MappingProxyType({})) -> Path:
    """Find the regions of the key objects of queries that have none; returns `runs/regions`, which the other steps use."""
    return _run(plan, "regions", settings)


def fit_levels(plan: Plan, settings: Settings = MappingProxyType({})) -> AnchoredLevels:
    """Measure the base model's accuracy by kind and strength of perturbation; returns the levels in `runs/levels.json`."""
    from vlm_calibration.perturbation.levels import AnchoredLevels

    _run(plan, "levels", settings)
    return AnchoredLevels(Path(plan.runs) / "levels.json")


def train_sft(plan: Plan, settings: Settings = MappingProxyType({})) -> Path:
    """Stage 1, supervised fine-tuning; returns the run directory, `runs/sft`, with the adapter in it."""
    return _run(plan, "sft", settings)


def train_dpo(plan: Plan, settings: Settings = MappingProxyType({})) -> Path:
    """Stage 2, preference optimisation, from the adapter of stage 1; returns the run directory, `runs/dpo`."""
    return _run(plan, "dpo", settings)


def evaluate(plan: Plan, settings: Settings = MappingProxyType({})) -> dict[str, dict[str, float | None]]:
    """Ask the base model and the adapters of both stages the test queries; returns system -> metrics, as `runs/eval` has them."""
    from vlm_calibration.reporting import runs

    folder = _run(plan, "evaluate", settings)
    systems = runs.systems_of(runs.read_config(folder / runs.CONFIG))
    return {system: read_json(folder / system / runs.METRICS) for system in systems}


def report(plan: Plan, *, images: bool = True, replicates: int = 1000, seed: int = 0) -> Path:
    """Write the report on the evaluation in `runs/eval`, with or without images, by that many bootstrap draws; returns the page."""
    from jsonargparse.typing import PositiveInt

    from vlm_calibration.commands import report as command

    folder = plan.folder("report")
    command.report([str(folder)], images=images, replicates=PositiveInt(replicates), seed=seed)
    return folder / command.PAGE


def _run(plan: Plan, stage: str, settings: Settings) -> Path:
    """Run a stage in this process; return its run directory."""
    from vlm_calibration.commands.trainer import run_lightning

    command = plan.command(stage, *_options(settings))
    arguments = sys.argv
    # Lightning starts the other processes of a DDP run with the arguments in sys.argv.
    sys.argv = [str(Path(__file__).with_name("cli") / "__main__.py")]
    try:
        # `levels fit` is LightningCLI's `test`.
        run_lightning(["test", *command[2:]] if stage == "levels" else command)
    finally:
        sys.argv = arguments
    return plan.folder(stage)


def _presets(folder: str, names: str | Sequence[str]) -> list[str]:
    """The presets of a folder, or files, that these names stand for; raises an ArgumentError if there is none."""
    if isinstance(names, str):
        try:
            names = [names] if Path(names).is_file() else shlex.split(names)
        except ValueError as error:
            raise DataError(f"{names!r}: cannot be split into names: {error}") from error
    found = []
    for name in names:
        if not Path(name).is_file():
            name = f"{folder}/{name}"
            find_preset(name)
        found.append(name)
    return found


def _options(settings: Settings) -> list[str]:
    """Settings as arguments of the command line."""
    return [
        f"--{name}={value if isinstance(value, str | Path) else json.dumps(value)}"
        for name, value in settings.items()
    ]
