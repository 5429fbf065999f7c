"""`--resume`: does a run directory hold the run that is asked for, and is it finished?

A run is the same if the settings that can change its result are (`deciding_settings`, with defaults filled in), and the content
behind them (`run_record`). Decided before a model is loaded, by every process from the same files: the first process writes
none before all have joined.
"""

from __future__ import annotations

import os
from argparse import ArgumentError
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.cli import LightningCLI

from vlm_calibration.callbacks.run_record import (
    SOURCES,
    RunRecord,
    command_of,
    new_record,
    outputs_of,
    progress_of,
    read_record,
    results_outside,
)
from vlm_calibration.endpoint.settings import DECIDING
from vlm_calibration.files import MAX_NAMED
from vlm_calibration.records import DataError

RUN_CONFIG = "config.yaml"
ANOTHER_FOLDER = "another folder (--runs, or --trainer.default_root_dir) leaves it as it is"

TRAINER = {
    "fit": (
        *("max_epochs", "min_epochs", "max_steps", "min_steps", "max_time", "accumulate_grad_batches"),
        *("gradient_clip_val", "gradient_clip_algorithm", "limit_train_batches", "limit_val_batches"),
        *("overfit_batches", "val_check_interval", "check_val_every_n_epoch", "num_sanity_val_steps"),
        *("sync_batchnorm", "callbacks", "plugins"),
    ),
    "test": ("limit_test_batches", "overfit_batches", "plugins"),
    "levels fit": ("limit_test_batches", "overfit_batches", "plugins"),
    "predict": ("limit_predict_batches", "plugins"),
}
"""Command -> settings of `trainer` that can change its result, beside the precision and the number of processes."""
LOADING = frozenset({"batch_size", "eval_batch_size", "shard_size", "parts", "part", "workers", "regions"})
"""Settings of `data` that change no result, or whose effect is compared otherwise: batch size, and content of regions."""
TRAINING = frozenset({"augment", "candidates", "max_length", "on_too_long"})
ANSWERING = frozenset({"noise", "prompt", "grading"})
IGNORED_DATA = {
    "fit": LOADING,
    "test": LOADING | TRAINING,
    "levels fit": LOADING | TRAINING,
    "predict": LOADING | TRAINING | ANSWERING,
}
"""Command -> settings of `data`, other than sources, that do not count."""
IGNORED_MODEL = frozenset({"gradient_checkpointing", "out", "likelihoods"})
"""Settings of the model that do not count: how it computes, and where its results go, which are compared by content."""
PASSIVE = frozenset(
    {
        *("DeviceStatsMonitor", "LearningRateMonitor", "ModelCheckpoint", "ModelSummary", "OnExceptionCheckpoint"),
        *("ProgressBar", "RichModelSummary", "RichProgressBar", "ThroughputMonitor", "TQDMProgressBar"),
    }
)  # fmt: skip
"""Lightning's callbacks that only observe a run."""
PASSIVE_PACKAGES = ("vlm_calibration.callbacks.", "lightning.pytorch.plugins.environments.")
TYPED = ("limit_", "overfit_batches", "val_check_interval")
"""Settings of which 1 is a number of batches, and 1.0 is all of them."""


class Prior(NamedTuple):
    """What a run directory holds.

    Attributes:
        state: "none" if there is nothing to resume, "interrupted", or "finished".
        begun: whether a run of the same command began here.
    """

    state: Literal["none", "interrupted", "finished"]
    begun: bool = False


def find_prior(cli: LightningCLI) -> Prior:
    """Find out whether the run directory holds the run of this command line, whose classes are instantiated.

    Raises:
        DataError: it holds another run: one of another command, or of other settings or inputs.
    """
    trainer, module, subcommand = cli.trainer, cli.model, str(cli.subcommand)
    folder, command = Path(trainer.default_root_dir), command_of(subcommand, module)
    record = read_record(folder)
    if record is None or not (folder / RUN_CONFIG).is_file():
        return Prior("none")
    if record.command != command:
        raise DataError(f"{folder} holds a run of `{record.command}`: {ANOTHER_FOLDER}")
    outputs, has_progress = outputs_of(trainer, module, cli.datamodule), bool(progress_of(trainer, module))
    if not has_progress and not any(path.exists() for path in outputs):
        return Prior("none", begun=True)
    is_finished = (
        record.finished
        and all(path.exists() for path in outputs)
        and record.results == results_outside(folder, outputs)
    )
    parser = cli._parser(subcommand)
    before = saved_settings(folder / RUN_CONFIG, parser)
    now = resolved_settings(parser, cli.config[subcommand])
    present = new_record(command, trainer, deciding_settings(command, now), cli.datamodule)
    differing = differences(Run(record, before), Run(present, now), is_finished=is_finished)
    if differing:
        named = "; ".join(differing[:MAX_NAMED])
        more = f"; and {len(differing) - MAX_NAMED} more" if len(differing) > MAX_NAMED else ""
        state = "finished" if is_finished else "interrupted"
        raise DataError(
            f"{folder} holds a run that was {state} with other settings or inputs: {named}{more}: --overwrite starts again in "
            f"this folder, {ANOTHER_FOLDER}"
        )
    if is_finished:
        return Prior("finished", begun=True)
    return Prior("interrupted" if has_progress else "none", begun=True)


def resolved_settings(parser: ArgumentParser, config: Namespace) -> dict[str, Any]:
    """A configuration as plain values, with the defaults of all classes filled in."""
    settings: dict[str, Any] = yaml.safe_load(parser.dump(config, skip_none=False))
    return settings


def saved_settings(path: Path, parser: ArgumentParser) -> dict[str, Any]:
    """The settings in the configuration of an earlier run, with today's defaults for settings that it lacks."""
    text = path.read_text(encoding="utf-8")
    try:
        return resolved_settings(parser, parser.parse_string(text))
    except (ArgumentError, ValueError, TypeError):
        # It has settings that this version does not know; these differ.
        content = yaml.safe_load(text)
        return content if isinstance(content, dict) else {}


class Run(NamedTuple):
    """A run to compare: its record, and its settings as `resolved_settings` gives them."""

    record: RunRecord
    settings: Mapping[str, Any]


def differences(before: Run, now: Run, *, is_finished: bool) -> list[str]:
    """One line for each setting and each input by which the result of a run can differ; empty if it is the same run.

    Args:
        before: the run in the directory.
        now: the run that is asked for.
        is_finished: whether `before` has ended. A run that has not may go on with another number of processes; the position
            within an epoch that a checkpoint holds decides about that.
    """
    command, known = now.record.command, now.record.inputs
    old, new = (dict(_flat(deciding_settings(command, run.settings))) for run in (before, now))
    lines = _batches(before, now, is_finished) if command == "fit" else []
    if before.record.precision != now.record.precision:
        lines.append(_change("trainer.precision", before.record.precision, now.record.precision))
    replaced: list[str] = []
    for name in {**old, **new, **known}:
        was, found = old.get(name), new.get(name)
        contents = before.record.inputs.get(name), known.get(name)
        if None not in contents and name.split(".")[1] not in SOURCES:
            is_same = contents[0] == contents[1]
        else:
            is_same = _is_same(name, was, found) and (None in contents or contents[0] == contents[1])
        if is_same or any(name.startswith(f"{prefix}.") for prefix in replaced):
            continue
        if name.endswith(".class_path"):
            # The arguments of another class are not worth comparing.
            replaced.append(f"{name.removesuffix('class_path')}init_args")
        lines.append(
            f"the content of {name} has changed" + (f" ({found})" if found else "")
            if _is_same(name, was, found)
            else _change(name, was, found)
        )
    return lines


def _change(name: str, was: Any, found: Any) -> str:
    return f"{name} was {was!r} and is {found!r}"


def _batches(before: Run, now: Run, is_finished: bool) -> list[str]:
    """The number of queries of a training batch over all processes, if that differs."""
    sizes = [run.settings.get("data", {}).get("batch_size") for run in (before, now)]
    processes = [run.record.processes or 1 for run in (before, now)]
    if sizes == [None, None] or sizes[0] * processes[0] == sizes[1] * processes[1]:
        return []
    if sizes[0] == sizes[1] and not is_finished:
        return []
    was, found = (f"{size} x {count}" for size, count in zip(sizes, processes, strict=True))
    return [f"data.batch_size x processes was {was} and is {found}"]


def _is_same(name: str, was: Any, found: Any) -> bool:
    if isinstance(was, str) and isinstance(found, str):
        return was == found or os.path.realpath(was) == os.path.realpath(found)
    is_typed = isinstance(was, bool) or isinstance(found, bool) or any(text in name for text in TYPED)
    return bool(was == found) and (not is_typed or type(was) is type(found))


def deciding_settings(command: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that can change the result of a command.

    The precision and the number of processes are in the record, since "auto" and null stand for values that Lightning finds.

    Args:
        settings: as `resolved_settings` gives them.
    """
    trainer, data, model = (settings.get(name) or {} for name in ("trainer", "data", "model"))
    used, ignored = _used_sources(command, data, model), IGNORED_DATA[command]
    arguments = {k: v for k, v in (model.get("init_args") or {}).items() if k not in IGNORED_MODEL}
    if arguments.get("endpoints"):
        # How requests are sent changes no answer, and a server may have moved.
        arguments["endpoints"] = {
            name: {key: endpoint.get(key) for key in DECIDING}
            for name, endpoint in arguments["endpoints"].items()
        }
    return {
        "seed_everything": settings.get("seed_everything"),
        "ckpt_path": settings.get("ckpt_path"),
        "trainer": {name: _active(trainer.get(name)) for name in TRAINER[command]},
        "model": {**model, "init_args": arguments},
        "data": {
            name: value
            for name, value in data.items()
            if (name in used if name in SOURCES else name not in ignored)
        },
    }


def _used_sources(command: str, data: Mapping[str, Any], model: Mapping[str, Any]) -> Collection[str]:
    """The sources in `data` that a command reads."""
    if command == "fit":
        return ("train", "validation")
    if command == "test":
        return ("test", "calibration")
    if command == "levels fit":
        writes_likelihoods = (model.get("init_args") or {}).get("likelihoods") is not None
        return ("levels", "train") if writes_likelihoods else ("levels",)
    return ("predict",) if data.get("predict") else SOURCES


def _active(value: Any) -> Any:
    """A setting of the trainer without the callbacks and plugins that only observe a run, or only start its processes."""
    if isinstance(value, Mapping) and "class_path" in value:
        value = [value]
    if not isinstance(value, list):
        return value
    return [item for item in value if not _is_passive(item)] or None


def _is_passive(item: Any) -> bool:
    path = str(item.get("class_path")) if isinstance(item, Mapping) else str(item)
    package, _, name = path.rpartition(".")
    return f"{package}.".startswith(PASSIVE_PACKAGES) or (
        package.startswith("lightning.pytorch.callbacks") and name in PASSIVE
    )


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Each value with its dotted name; a list of plain values is one value."""
    if isinstance(value, Mapping) and value:
        items = [(str(key), part) for key, part in value.items()]
    elif isinstance(value, list) and any(isinstance(part, Mapping | list) for part in value):
        items = [(str(number), part) for number, part in enumerate(value)]
    else:
        yield name, value
        return
    for key, part in items:
        yield from _flat(part, f"{name}.{key}" if name else key)
