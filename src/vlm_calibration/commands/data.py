"""`vlm-calibration data inspect`: print what the sources of a configuration hold, and the images that splits share."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated

from jsonargparse.typing import PositiveInt

from vlm_calibration.arguments import ALL_SETTINGS, Forwarded, Subcommands, with_full_help
from vlm_calibration.commands.data_convert import CONVERT
from vlm_calibration.commands.data_fetch import fetch
from vlm_calibration.commands.data_split import split
from vlm_calibration.errors import CommandError, explained_errors
from vlm_calibration.presets import CONFIG, VARIABLE_OPTIONS, add_variables, resolve_configs
from vlm_calibration.records import DataError

if TYPE_CHECKING:
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
    """Print one table: counts, balance, image sizes, how much of an image regions cover, bad records of each source, and shared images.

    Images that train, validation, levels or calibration, and test share are counted and named: stored in one place, with the same
    content, or nearly the same. For this every image is read, about a millisecond each.

    Args:
        samples: images of each source to open for the counts
        leaks: look for images that splits share
        strict: end with status 1 if splits share images, or a record or image cannot be used
    """
    resolve_configs(settings)  # A preset that does not exist is refused before the imports.
    from rich.console import Console
    from rich.table import Table

    from vlm_calibration.data.near_duplicates import find_leaks
    from vlm_calibration.data.sources.jsonl import MissingFileError
    from vlm_calibration.files import MAX_NAMED
    from vlm_calibration.reporting.inspection import inspect_source

    sources = read_sources(settings)
    console, table = Console(), Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")

    def add_rows(name: str, rows: Iterable[tuple[str, str]]) -> None:
        table.add_row(name, "", style="bold")
        for heading, text in rows:
            table.add_row(heading, text.replace("[", "\\["))
        table.add_section()

    missing: dict[str, MissingFileError] = {}
    problems = 0
    messages: list[str] = []
    unreadable: dict[str, str] = {}
    for name, source in sources.items():
        try:
            rows, bad, unloadable = inspect_source(source, samples)
        except MissingFileError as error:
            missing[name] = error
            continue
        problems += len(bad)
        messages += bad[:MAX_NAMED]
        unreadable = {**unloadable, **unreadable}
        add_rows(name, rows)
    if leaks:
        report = find_leaks({name: source for name, source in sources.items() if name not in missing})
        for kind, first, second, count, examples in report.leaks:
            shared = f"{count} of {report.images[second]}: {', '.join(examples)}"
            add_rows(f"{first}, {second}", [(f"shared images, {kind}", shared)])
            problems += count
        if report.images and not report.leaks:
            add_rows(", ".join(report.images), [("shared images", "none")])
        for image, reason in report.unreadable.items():
            unreadable.setdefault(image, f"not compared: {image}: {reason}")
    problems += len(unreadable)
    console.print(table)
    messages += list(unreadable.values())[:MAX_NAMED]
    if len(unreadable) > MAX_NAMED:
        messages.append(f"and {len(unreadable) - MAX_NAMED} more images that cannot be read")
    for message in (*messages, *(f"{name}: {error}" for name, error in missing.items())):
        console.print(message, soft_wrap=True, markup=False, highlight=False)
    if missing:
        paths = ", ".join(str(absent.path) for absent in missing.values())
        raise DataError(f"{len(missing)} of the files of {len(sources)} sources do not exist: {paths}")
    if strict and problems:
        raise CommandError(f"--strict: {problems} of the problems above", 1)


SUBCOMMANDS = Subcommands(
    "Convert published data to queries, split them, examine them before training, and fetch benchmarks.",
    {"inspect": inspect, "convert": CONVERT, "split": split, "fetch": fetch},
)


def read_sources(settings: Sequence[str]) -> dict[str, QuerySource]:
    """The sources by the names of their settings, e.g. "data.train"; the errors are those of `inspect`."""
    if not settings:
        raise ArgumentError(None, "data inspect: nothing to inspect: give --config FILE")
    from jsonargparse import ArgumentParser

    from vlm_calibration.data.module import PerturbedQueryDataModule, setting_of

    parser = ArgumentParser(prog="vlm-calibration data inspect", exit_on_error=False)
    parser.add_argument("-c", "--config", action="config")
    add_variables(parser)
    parser.add_class_arguments(PerturbedQueryDataModule, "data")
    with explained_errors(parser):
        only_data = resolve_configs(settings, lambda files: [{"data": f.get("data") or {}} for f in files])
        parsed = parser.parse_args(with_full_help(only_data))
    try:
        data: PerturbedQueryDataModule = parser.instantiate_classes(parsed).data
    except (ValueError, OSError) as error:
        raise DataError(f"configuration: {error}") from error
    sources = {
        f"data.{setting_of(name, part)}": split.source
        for name in data.splits
        for part, split in data.read_splits(name).items()
    }
    if data.predict is not None:
        sources["data.predict"] = data.predict
    if not sources:
        raise DataError("nothing to inspect: no source is set below `data`")
    return sources
