"""Presets, the configuration files that come with the package, and the variables in configuration files, such as `${data_root}`."""

from __future__ import annotations

import json
import re
import textwrap
from argparse import ArgumentError
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vlm_calibration.errors import did_you_mean

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

CONFIGS = Path(__file__).with_name("configs")
"""Folder of the presets: a link to `configs` of the repository; a built package contains the files."""
DEMO = Path(__file__).with_name("demo")
"""Folder of the embedded demo, `${demo}` in a file: absolute, since other working folders read a run's configuration."""
VARIABLE_OPTIONS = {
    "--data-root DIR": "folder of the data that the presets name, such as DIR/train.jsonl",
    "--runs DIR": "folder of the run directories that the presets name, such as DIR/sft",
}
"""The options that set variables, as `arguments.Forwarded` lists them."""
ENDPOINT_OPTIONS = {
    "--url URL": "address of an OpenAI-compatible API, such as http://127.0.0.1:8000/v1, for --config system/endpoint",
    "--served-model NAME": "name under which the API knows the model, for --config system/endpoint",
}
"""The further ones of `test`."""
DEFAULTS = {"--data-root": "data", "--runs": "runs"}
CONFIG = "--config NAME"
VARIABLES = tuple(option.split()[0] for option in {**VARIABLE_OPTIONS, **ENDPOINT_OPTIONS})


def add_variables(parser: ArgumentParser, *, endpoint: bool = False) -> None:
    """Add the options that set variables to a parser, with `endpoint` those of `test`."""
    for option, text in {**VARIABLE_OPTIONS, **(ENDPOINT_OPTIONS if endpoint else {})}.items():
        name, metavar = option.split()
        parser.add_argument(name, metavar=metavar, type=str | None, default=DEFAULTS.get(name), help=text)


def preset_names() -> list[str]:
    """The names of all presets, sorted."""
    return sorted(str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.glob("**/*.yaml"))


def presets_by_folder(*stages: str) -> str:
    """The presets of a command for its help: a line for its stages (such as "sft" or "eval/*"), and one for each folder of overlays."""
    names = preset_names()
    lines = [", ".join(name for pattern in stages for name in names if fnmatch(name, pattern))]
    for folder in ("model", "data", "experiment", "trainer", "logger"):
        lasts = [name.removeprefix(f"{folder}/") for name in names if name.startswith(f"{folder}/")]
        lines.append(f"{folder}/: {', '.join(lasts)}")
    fill = partial(textwrap.fill, width=79, subsequent_indent="    ", break_on_hyphens=False)
    folded = [fill(line, initial_indent="  ") for line in lines]
    return "\n".join(["presets (`vlm-calibration config list` describes them):", *folded])


def find_preset(name: str) -> Path:
    """The file of a preset; raises an ArgumentError if there is none of this name."""
    names = preset_names()
    if (plain := name.removesuffix(".yaml")) not in names:
        similar = f"{did_you_mean(name, names)}: `vlm-calibration config list` lists the presets"
        raise ArgumentError(None, f"{name!r} is neither a file nor a preset{similar}")
    return CONFIGS / f"{plain}.yaml"


def resolve_configs(
    args: Sequence[str],
    prepare: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] = lambda contents: contents,
) -> list[str]:
    """Replace the file in each `--config FILE` by its content, which `prepare` may change, with all variables replaced.

    Options set variables, and so do keys at the top level of a file, as of a run's `config.yaml`. An ArgumentError as by `read_config`,
    or if a variable of an endpoint is set and no file has it.
    """
    read = ("--config", "-c", *VARIABLES)
    resolved = [w for arg in args for w in (arg.split("=", 1) if arg.partition("=")[0] in read else [arg])]
    given = {option: value for option, value in pairwise(resolved) if option in VARIABLES}
    positions = [at for at, option in enumerate(resolved[:-1], start=1) if option in ("--config", "-c")]
    contents = [read_config(resolved[at]) for at in positions]
    values = {"demo": str(DEMO)}
    for option in VARIABLES:
        name = option.removeprefix("--").replace("-", "_")
        of_files = [content[name] for content in contents if isinstance(content.get(name), str)]
        if option in given and option not in DEFAULTS and f"${{{name}}}" not in str(contents):
            raise ArgumentError(None, f"{option} has no effect: give --config system/endpoint as well")
        value = given.get(option, of_files[-1] if of_files else DEFAULTS.get(option))
        values |= {} if value is None else {name: value}
    for at, content in zip(positions, prepare(contents), strict=True):
        # The parser takes the content of a file in its place. JSON quotes all texts, of which YAML would read some as numbers.
        resolved[at] = json.dumps(_replace(content, values), ensure_ascii=False)
    return resolved


def read_config(name: str) -> dict[str, Any]:
    """The settings in a preset, a file or a text such as "{data: {workers: 0}}"; an ArgumentError if it cannot be read."""
    from jsonargparse import get_loader

    if name.lstrip().startswith("{"):
        path, text = Path("--config"), name
    else:
        path = Path(name) if Path(name).is_file() else find_preset(name)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ArgumentError(None, f"{path}: cannot be read: {error}") from error
    try:
        content = get_loader("yaml")(text)
    except yaml.YAMLError as error:
        mark, problem = (getattr(error, name, None) for name in ("problem_mark", "problem"))
        where = f"{path}:{mark.line + 1}" if mark else path
        raise ArgumentError(None, f"{where}: not YAML: {' '.join(str(problem or error).split())}") from error
    if content is not None and not isinstance(content, dict):
        raise ArgumentError(None, f"{path}: expected settings (key: value), found {str(content)[:40]!r}")
    return content or {}


def _replace(content: Any, values: Mapping[str, str]) -> Any:
    """The content with the variables in all of its texts replaced; a name that is no variable stays."""
    if isinstance(content, dict):
        return {key: _replace(value, values) for key, value in content.items()}
    if isinstance(content, list):
        return [_replace(value, values) for value in content]
    if isinstance(content, str):
        return re.sub(r"\$\{(\w+)\}", lambda match: values.get(match[1], match[0]), content)
    return content
