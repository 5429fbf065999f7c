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

RESUMABLE = ("fit", "test", "predict")  # subcommands with results, which have `FLAGS`
FLAGS = {
    "--overwrite": "start again, and replace the run that the run directory holds",
    "--resume": "resume the run if it was interrupted, do nothing if it is finished, else start it",
}
NO_TABLE = {"--no_table": "do not print the results, which `report` prints"}  # a flag of `test`
OPTIONS = ("config", "help", "help-all", "print_config", "seed_everything", "verbose")
"""Options of all subcommands, beside sections and those of Lightning."""
TRAINER = "lightning.pytorch.trainer.trainer.Trainer"
TRAINED = ("vlm_calibration.stages.sft.SFTModule", "vlm_calibration.stages.dpo.DPOModule")


def check_settings(args: Sequence[str]) -> None:
    """Refuse, by an ArgumentError, a preset or file that does not exist, and a misspelt setting, of a subcommand of LightningCLI.

    Names directly below `trainer`, `data` and `model` are compared with the parameters in the source of their classes. The parser
    checks the others, and all values.
    """

    def check(contents: list[dict[str, Any]]) -> list[dict[str, Any]]:
        typed = [word.partition("=")[0] for word in args if word.startswith("--")]
        models = [content["model"] for content in contents if isinstance(content.get("model"), dict)]
        stages = [str(model["class_path"]) for model in models if model.get("class_path")]
        is_replaced = not {"--model", "--model.class_path"}.isdisjoint(typed)
        own = set() if is_replaced or not stages else parameters_in_source(stages[-1])
        lightnings = parameters_in_source(TRAINER, "fit", "validate", "test", "predict")
        flags = (name[2:] for name in (*FLAGS, *NO_TABLE, *VARIABLES))
        known = {
            "": lightnings.union(OPTIONS, ("trainer", "model", "data"), flags),
            "trainer": parameters_in_source(TRAINER),
            "data": parameters_in_source("vlm_calibration.data.module.PerturbedQueryDataModule"),
            # Overlays may have settings of a training that another stage ignores.
            "model": own and own.union(*map(parameters_in_source, TRAINED)),
        }
        for name in (*typed, *(name for content in contents for name, _ in flat(content))):
            _check_name(name, {section: names for section, names in known.items() if names})
        return contents

    resolve_configs(args, check)


def _check_name(name: str, known: dict[str, set[str]]) -> None:
    """Refuse a setting, with dashes if typed, whose first name below its section is unknown; sections not in `known` pass."""
    option = name.removeprefix("--")
    dashes = name[: len(name) - len(option)]
    section, _, key = option.partition(".")
    key = key.removeprefix("init_args.")
    first = key.partition(".")[0].rstrip("+")
    if dashes and section not in (*known, "model"):
        section, first = "", section
    structure = {"", "class_path", "init_args", "dict_kwargs", "help"}
    if section not in known or first in known[section] | structure:
        return
    if section == "model":
        name, similar = f"model.init_args.{key}", did_you_mean(first, known["model"])
    else:
        groups = {group: names for group, names in known.items() if group != "model"}
        names = [f"{group}.{each}".lstrip(".") for group, names in groups.items() for each in names]
        similar = did_you_mean(name, [dashes + each for each in names])
    raise ArgumentError(None, f"unknown setting {name}{similar}")


def parameters_in_source(class_path: str, *methods: str) -> set[str]:
    """The parameters of methods, by default the constructor, in the source of a class; empty if it is not there or takes any."""
    module, _, name = class_path.rpartition(".")
    package, *inner = module.split(".")
    spec = find_spec(package) if package else None
    path = Path(spec.origin or "").parent.joinpath(*inner).with_suffix(".py") if spec else Path()
    tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
    classes = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    functions = [f for node in classes for f in node.body if isinstance(f, ast.FunctionDef)]
    taken = [f.args for f in functions if f.name in (methods or ("__init__",))]
    if any(arguments.kwarg for arguments in taken):
        return set()
    return {a.arg for arguments in taken for a in (*arguments.args, *arguments.kwonlyargs)} - {"self"}
