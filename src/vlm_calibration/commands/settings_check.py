"""What is wrong with the settings of a stage, as far as it can be told without torch, whose import takes ten seconds."""

from __future__ import annotations

import ast
from argparse import ArgumentError
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vlm_calibration.errors import did_you_mean
from vlm_calibration.presets import VARIABLES, resolve_configs
from vlm_calibration.settings import flat

RESUMABLE = ("fit", "test", "predict")
"""Subcommands with results, which have `FLAGS`."""
FLAGS = {
    "--overwrite": "start again, and replace the run that the run directory holds",
    "--resume": "resume the run if it was interrupted, do nothing if it is finished, else start it",
}
NO_TABLE = {"--no_table": "do not print the results, which `report` prints"}
"""A flag of `test`."""
OPTIONS = (
    "config",
    "help",
    "help-all",
    "print_config",
    "seed_everything",
    "trainer",
    "model",
    "data",
    "verbose",
)
"""Options of all subcommands, beside those of Lightning."""
TRAINER = "lightning.pytorch.trainer.trainer.Trainer"
DATA = "vlm_calibration.data.module.PerturbedQueryDataModule"
TRAINED = ("vlm_calibration.stages.sft.SFTModule", "vlm_calibration.stages.dpo.DPOModule")
STRUCTURE = {"", "class_path", "init_args", "dict_kwargs", "help"}
"""Keys of a section that are no parameters."""


def check_settings(args: Sequence[str]) -> None:
    """Refuse a preset or file that does not exist, and a misspelt setting, among the arguments of a subcommand of LightningCLI.

    Names directly below `trainer`, `data` and `model` are compared with the parameters in the source of their classes; the parser
    checks the others, and all values.

    Raises:
        ArgumentError: see `resolve_configs`; or a setting is unknown.
    """

    def check(contents: list[dict[str, Any]]) -> list[dict[str, Any]]:
        typed = [word.partition("=")[0] for word in args if word.startswith("--")]
        written = [name for content in contents for name, _ in flat(content)]
        stages = [content["model"].get("class_path") for content in contents if _has_model(content)]
        is_replaced = not {"--model", "--model.class_path"}.isdisjoint(typed)
        known = _known_names("" if is_replaced else next(filter(None, reversed(stages)), ""))
        for name in (*typed, *written):
            _check_name(name, known)
        return contents

    resolve_configs(args, check)


def _has_model(content: dict[str, Any]) -> bool:
    return isinstance(content.get("model"), dict)


def _known_names(stage: str) -> dict[str, set[str]]:
    """Section -> the names below it; "" -> options without a section. A section of which they cannot be told is not there."""
    methods = [
        parameters_in_source(TRAINER, name) or set() for name in ("fit", "validate", "test", "predict")
    ]
    own = parameters_in_source(stage)
    known = {
        "": set(OPTIONS).union(*methods, (name[2:] for name in (*FLAGS, *NO_TABLE, *VARIABLES))),
        "trainer": parameters_in_source(TRAINER),
        "data": parameters_in_source(DATA),
        # Overlays may have settings of a training that another stage ignores.
        "model": own and own.union(*(parameters_in_source(path) or () for path in TRAINED)),
    }
    return {section: names for section, names in known.items() if names}


def _check_name(name: str, known: dict[str, set[str]]) -> None:
    """Refuse a setting if its first name below its section is not known."""
    option = name.removeprefix("--")
    dashes = name[: len(name) - len(option)]
    section, _, key = option.partition(".")
    key = key.removeprefix("init_args.")
    first = key.partition(".")[0].rstrip("+")
    if dashes and section not in (*known, "model"):
        section, first = "", section
    if section not in known or first in known[section] | STRUCTURE:
        return
    if section == "model":
        raise ArgumentError(
            None, f"unknown setting model.init_args.{key}{did_you_mean(first, known['model'])}"
        )
    below = [f"{dashes}{group}.{each}" for group in ("trainer", "data") for each in known.get(group, ())]
    names = [*(f"{dashes}{each}" for each in known[""]), *below]
    raise ArgumentError(None, f"unknown setting {name}{did_you_mean(name, names)}")


def parameters_in_source(class_path: str, method: str = "__init__") -> set[str] | None:
    """The names of a method's parameters, read from the source of its class, which is not imported; None if it is not there."""
    module, _, name = class_path.rpartition(".")
    package, *inner = module.split(".")
    spec = find_spec(package) if package else None
    path = Path(spec.origin or "").parent.joinpath(*inner).with_suffix(".py") if spec else Path()
    for node in ast.parse(path.read_text(encoding="utf-8")).body if path.is_file() else ():
        functions = node.body if isinstance(node, ast.ClassDef) and node.name == name else []
        for function in functions:
            if isinstance(function, ast.FunctionDef) and function.name == method and not function.args.kwarg:
                return {argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)}
    return None
