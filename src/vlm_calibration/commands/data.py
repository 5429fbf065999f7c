"""`vlm-calibration data inspect`: print what the sources of a configuration hold, and the images that splits share."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from jsonargparse.typing import PositiveInt

from vlm_calibration.arguments import ALL_SETTINGS, Forwarded, Subcommands, with_full_help
from vlm_calibration.commands.data_convert import CONVERT
from vlm_calibration.commands.data_fetch import fetch
from vlm_calibration.commands.data_split import split
from vlm_calibration.errors import CommandError, explained_errors
from vlm_calibration.presets import CONFIG, VARIABLE_OPTIONS, add_variables, resolve_configs
from vlm_calibration.records import DataError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from vlm_calibration.data.module import PerturbedQueryDataModule
    from vlm_calibration.data.sources.base import QuerySource


SETTINGS = Forwarded(
    {
        **ALL_SETTINGS,
        CONFIG: "a preset or file, of which only the section `data` is read (may be repeated)",
        **VARIABLE_OPTIONS,
    },
    lambda: "Settings of `data` may follow, e.g. --data.train.init_args.path FILE; --help-all\nlists them.",
)


def inspect(
    *settings: Annotated[str, SETTINGS],
    samples: PositiveInt = PositiveInt(200),
    leaks: bool = True,
    strict: bool = False,
) -> None:
    """Print counts, balance, image sizes, how much of an image regions cover, and bad records of each source, and shared images.

    Images that train, validation, levels or calibration, and test share are counted and named: stored in one place, with the same
    content, or nearly the same. For this every image is read, about a millisecond each.

    Args:
        samples: images of each source to open for the counts
        leaks: look for images that splits share
        strict: end with status 1 if splits share images, or a record or image cannot be used

    Raises:
        ArgumentError: a setting is unknown or wrong, or there is none.
        DataError: a configuration file or a source cannot be used.
        CommandError: a file does not exist, or `strict` found something.
    """
    from rich.console import Console

    from vlm_calibration.commands.data_leaks import print_leaks
    from vlm_calibration.data.sources.data_root import MissingFileError
    from vlm_calibration.reporting.inspection import inspect_source, print_inspection

    sources = dict(_sources(read_data(settings)))
    if not sources:
        raise DataError(
            "nothing to inspect: none of data.train, validation, levels, test, calibration and predict is set"
        )
    console = Console()
    missing: dict[str, MissingFileError] = {}
    problems = 0
    named: set[str] = set()
    for name, source in sources.items():
        try:
            inspection = inspect_source(source, samples)
        except MissingFileError as error:
            missing[name] = error
            continue
        problems += len(inspection.bad) + len(inspection.unloadable.keys() - named)
        print_inspection(name, inspection, console, named)
    if leaks:
        problems += print_leaks(
            {name: s for name, s in sources.items() if name not in missing}, console, named
        )
    if missing:
        for name, absent in missing.items():
            console.print(f"{name}: {absent}", soft_wrap=True, markup=False, highlight=False)
        paths = ", ".join(str(absent.path) for absent in missing.values())
        raise DataError(f"{len(missing)} of the files of {len(sources)} sources do not exist: {paths}")
    if strict and problems:
        raise CommandError(f"--strict: {problems} of the problems above", 1)


SUBCOMMANDS = Subcommands(
    "Convert published data to queries, split them, examine them before training, and fetch benchmarks.",
    {"inspect": inspect, "convert": CONVERT, "split": split, "fetch": fetch},
)


def read_data(settings: Sequence[str]) -> PerturbedQueryDataModule:
    """Build the data module of configuration files, of which only the section `data` is read, and of further settings.

    Raises:
        ArgumentError: an unknown key, a value of the wrong type, or no settings.
        DataError: a source cannot be built.
    """
    if not settings:
        raise ArgumentError(None, "data inspect: nothing to inspect: give --config FILE")
    parser = _data_parser()
    with explained_errors(parser):
        parsed = parser.parse_args(with_full_help(resolve_configs(settings, _only_data)))
    try:
        data: PerturbedQueryDataModule = parser.instantiate_classes(parsed).data
    except (ValueError, OSError) as error:
        raise DataError(f"configuration: {error}") from error
    return data


def _data_parser() -> ArgumentParser:
    """A parser of the section `data` of configurations."""
    from jsonargparse import ArgumentParser

    from vlm_calibration.data.module import PerturbedQueryDataModule

    parser = ArgumentParser(prog="vlm-calibration data inspect", exit_on_error=False)
    parser.add_argument("-c", "--config", action="config")
    add_variables(parser)
    parser.add_class_arguments(PerturbedQueryDataModule, "data")
    return parser


def _only_data(content: dict[str, Any]) -> dict[str, Any]:
    return {"data": content.get("data") or {}}


def _sources(data: PerturbedQueryDataModule) -> Iterator[tuple[str, QuerySource]]:
    """The sources of a data module by the names of their settings, with the regions of `data.regions` if it is set."""
    from vlm_calibration.data.regions import split_with_regions

    for name, eval_split in data.settings.items():
        if data.regions is not None:
            eval_split = split_with_regions(Path(data.regions), name, eval_split)
        yield f"data.{name}", eval_split.source
    if data.predict is not None:
        yield "data.predict", data.predict
