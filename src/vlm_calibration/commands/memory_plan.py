"""The stages of a call of `estimate-memory`: which configurations are stages, and the settings that each of them gets."""

from __future__ import annotations

import inspect
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlm_calibration.commands.lightning_cli import parsed
from vlm_calibration.errors import class_at
from vlm_calibration.models.adapters import LoraSettings
from vlm_calibration.models.base import BaseModel
from vlm_calibration.presets import CONFIGS, preset_names, read_config
from vlm_calibration.stages.memory import Plan, stage_of

STAGES = ("levels", "sft", "dpo", "eval/jsonl")
"""The stages of a plan that names none."""
SUBCOMMANDS = {"SFTModule": "fit", "DPOModule": "fit", "RegionExtractor": "predict"}
"""Class of a module -> the subcommand that runs it; "test" for any other."""
_MODULE_SETTING = "--model.init_args."


class _Config(NamedTuple):
    """A configuration among the arguments: its name, its position, and the module that it names."""

    name: str
    position: int
    module: str | None


def parse_stages(settings: Sequence[str]) -> dict[str, Any]:
    """Parse the configuration of every stage that the settings name; without one, of all `STAGES`.

    A stage is a configuration that names a module. All other settings are overlays, which every stage gets in the order given; one of
    a module (`--model.init_args.KEY`) is left out of stages whose module lacks it, unless all lack it.

    Args:
        settings: `--config NAME`, `--KEY VALUE`.

    Returns:
        Name of a stage -> its settings. The name is that of its preset, or of its file without folder and ending.

    Raises:
        ArgumentError: a setting is unknown or wrong.
    """
    configs = _configs(settings)
    stages = [c for c in configs if c.module is not None]
    calls: dict[str, tuple[str, list[str]]] = {}
    for stage in stages:
        others = {c.position for c in stages if c is not stage}
        label = _label(stage)
        calls[stage.name if label in calls else label] = (str(stage.module), _without(settings, others))
    for name in () if stages else STAGES:
        module = read_config(name)["model"]["class_path"]
        calls[name] = (module, ["--config", name, *settings, *_second_overlays(name, configs)])
    modules = [module for module, _ in calls.values()]
    return {
        name: parsed(
            SUBCOMMANDS.get(module.rpartition(".")[-1], "test"), _of_module(arguments, module, modules)
        )
        for name, (module, arguments) in calls.items()
    }


def plan_of(stages: Mapping[str, Any], tokens: int | None = None) -> Plan:
    """What the stages of a call know of each other: the base model, and the adapters that training will write.

    Args:
        stages: as `parse_stages` returns them.
        tokens: as in `Plan`.
    """
    training = [config for config in stages.values() if stage_of(config) in ("sft", "dpo")]
    based = [c.model.init_args.base for c in stages.values() if c.model.init_args.get("base") is not None]
    return Plan(
        tokens=tokens,
        base=BaseModel(**based[0].as_dict()) if based else None,
        lora=LoraSettings(**training[0].model.init_args.lora.as_dict()) if training else LoraSettings(),
        adapters=len(training),
    )


def _configs(settings: Sequence[str]) -> list[_Config]:
    """The configurations among the settings, in order."""
    configs = []
    for position, setting in enumerate(settings):
        option, equals, name = setting.partition("=")
        if option not in ("--config", "-c"):
            continue
        if not equals:
            if position + 1 == len(settings):
                raise ArgumentError(None, f"{option}: expected a preset or a file after it")
            name = settings[position + 1]
        module = (read_config(name).get("model") or {}).get("class_path")
        configs.append(_Config(name, position, module))
    return configs


def _label(config: _Config) -> str:
    """A short name of a stage."""
    if config.name.lstrip().startswith("{"):
        return str(config.module).rpartition(".")[-1]
    path = Path(config.name)
    preset = path.resolve().with_suffix("")
    if path.is_file() and preset.is_relative_to(CONFIGS.resolve()):
        return str(preset.relative_to(CONFIGS.resolve()))
    return path.stem if path.is_file() else config.name.removesuffix(".yaml")


def _without(settings: Sequence[str], positions: set[int]) -> list[str]:
    """The settings without the configurations at these positions."""
    left: list[str] = []
    skip = False
    for position, setting in enumerate(settings):
        if position in positions:
            skip = "=" not in setting
        elif skip:
            skip = False
        else:
            left.append(setting)
    return left


def _second_overlays(stage: str, configs: Sequence[_Config]) -> list[str]:
    """The overlays that a preset has for stage 2 alone, such as `experiment/anchored_dpo`."""
    names = [f"{_label(c)}_dpo" for c in configs] if stage == "dpo" else []
    return [part for name in names if name in preset_names() for part in ("--config", name)]


def _of_module(settings: Sequence[str], module: str, modules: Sequence[str]) -> list[str]:
    """The settings without those of a module that only other stages have."""
    own = _parameters(module)
    others = {name for each in modules for name in _parameters(each)} - own
    left: list[str] = []
    skip = False
    for setting in settings:
        if skip and not setting.startswith("--"):
            continue
        key = setting.partition("=")[0].removeprefix(_MODULE_SETTING).partition(".")[0]
        skip = setting.startswith(_MODULE_SETTING) and key in others
        if not skip:
            left.append(setting)
    return left


def _parameters(module: str) -> set[str]:
    kind = class_at(module)
    return set() if kind is None else set(inspect.signature(kind).parameters)
