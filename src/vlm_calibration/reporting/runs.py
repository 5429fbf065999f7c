"""The run directories below a folder: stage, state, key figures, and the command that goes on from there.

Only small files are read, and neither torch nor Lightning is imported, so that a list of many runs appears at once. A folder
that cannot be understood is listed with the reason.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import yaml

from vlm_calibration.files import is_held, read_json
from vlm_calibration.progress import stage_name
from vlm_calibration.records import DataError
from vlm_calibration.reporting.training_state import read_training_state

State = Literal["finished", "running", "interrupted", "empty", "damaged"]

CONFIG, METRICS, SUMMARY, QUERIES = "config.yaml", "metrics.json", "summary.json", "queries.parquet"
PAGE = "report.html"
LAST, WEIGHTS = "checkpoints/last.ckpt", "adapter/adapter_config.json"
ANSWERS, SHARDS, SHARD_SETTINGS = ".answered.*.jsonl", "shards/[0-9]*.jsonl", "shards/settings.*.jsonl"
RECORD = "run.json"
LOGS = "logs/*.log"
MARKS = (CONFIG, METRICS, LAST, WEIGHTS, ANSWERS, QUERIES, SHARDS, LOGS)
"""Files that make a folder a run directory."""
PARTS = frozenset({"adapter", "checkpoints", "logs", "shards", "wandb"})
"""Folders in a run directory that hold no run."""
HEADLINE = ("n", "accuracy", "ece", "brier", "auroc")
"""Metrics of the stated confidence that a list shows."""
MAX_COUNTED = 1 << 28
"""Bytes of answers or shards that are counted at most."""
FOLLOWED = {"regions": ("levels", "sft", "dpo"), "levels": ("sft", "dpo"), "sft": ("dpo",)}
"""Stage -> stages beside it that follow."""
COMMANDS = {"evaluation": "test", "levels": "levels fit", "regions": "predict"}
"""Stage -> its command; all others are trainings."""


@dataclass
class Run:
    """A run directory.

    Attributes:
        folder: its path.
        stage: "sft", "dpo", "levels", "evaluation" or "regions", the class of another module, or "" if it is not known.
        state: whether it is finished.
        detail: how far it came, or what is damaged.
        model: name or folder of the base model; empty if it is not known.
        when: time of the last change.
        figures: system, "" for the run itself -> figure -> value, None if it is undefined.
        adapters: of an evaluation: name -> path of each adapter.
        command: what to run next; empty for nothing, as after a finished run that another one goes on from.
    """

    folder: Path
    stage: str = ""
    state: State = "empty"
    detail: str = ""
    model: str = ""
    when: datetime = datetime.min
    figures: dict[str, dict[str, float | None]] = field(default_factory=dict)
    adapters: dict[str, str] = field(default_factory=dict)
    command: str = ""


def find_runs(folder: Path) -> list[Run]:
    """All run directories in and below a folder, in the order of their paths.

    Raises:
        DataError: there is no such folder.
    """
    if not folder.is_dir():
        raise DataError(f"no folder {folder}: give the folder that holds the run directories")
    runs = [read_run(path) for path in _run_directories(folder)]
    for run in runs:
        if run.state == "finished" and _has_follower(run, runs):
            run.command = ""
    return runs


def _has_follower(run: Run, runs: list[Run]) -> bool:
    """Whether what comes after a finished run has been done, or begun, which then has a command of its own."""
    if run.stage == "evaluation":
        page = run.folder / PAGE
        return page.is_file() and page.stat().st_mtime >= run.when.timestamp()
    begun = [other for other in runs if other.state in ("finished", "running", "interrupted")]
    if run.stage in FOLLOWED:
        beside = (other for other in begun if other.folder.parent == run.folder.parent)
        return any(other.stage in FOLLOWED[run.stage] for other in beside)
    adapter = (run.folder / Path(WEIGHTS).parent).resolve()
    evaluated = {Path(path).resolve() for other in begun for path in other.adapters.values()}
    return not evaluated.isdisjoint((run.folder.resolve(), adapter))


def _run_directories(folder: Path) -> Iterator[Path]:
    for name, folders, _ in os.walk(folder):
        path = Path(name)
        is_run = any(any(path.glob(mark)) for mark in MARKS)
        if is_run:
            yield path
        has_config = (path / CONFIG).exists()
        folders[:] = sorted(
            f
            for f in folders
            # The systems of an evaluation have folders with metrics and no configuration.
            if not f.startswith(".")
            and not (is_run and f in PARTS)
            and not (has_config and not (path / f / CONFIG).exists() and (path / f / METRICS).exists())
        )


def read_run(folder: Path) -> Run:
    """Read one run directory; what is wrong with it is in `state` and `detail`."""
    run = Run(folder, when=_last_change(folder))
    try:
        config = read_config(folder / CONFIG)
        if config is None:
            _without_config(run)
            return run
        run.stage = stage_name(str(_get(config, "model", "class_path") or ""))
        run.model = _model(config)
        _read_state(run, config)
        if run.state == "finished" and not _has_ended(folder):
            run.state, run.detail = "interrupted", ""
        if run.state != "running" and is_held(folder / CONFIG):
            run.state, run.detail = "running", run.detail if run.state == "interrupted" else ""
        run.command = _next_command(run, config)
    except (DataError, ValueError, OSError, TypeError, LookupError, AttributeError) as error:
        run.state, run.detail, run.command = (
            "damaged",
            " ".join(str(error).split()) or type(error).__name__,
            "",
        )
    return run


def _without_config(run: Run) -> None:
    if not any(any(run.folder.glob(mark)) for mark in MARKS if mark != LOGS):
        logs = sorted(run.folder.glob(LOGS), key=lambda path: path.stat().st_mtime)
        run.state, run.detail = "empty", f"nothing was saved; see {logs[-1]}"
        return
    run.state, run.detail = "damaged", f"no {CONFIG}, which says what was run"
    if (run.folder / METRICS).is_file():
        run.figures[""] = _headline(run.folder / METRICS)


def read_config(path: Path) -> dict[str, Any] | None:
    """The configuration of a run; None without one.

    Raises:
        DataError: the file is not the configuration of a run.
    """
    if not path.is_file():
        return None
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a configuration: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise DataError(f"{path}: not the configuration of a run: no section `model`")
    return config


def systems_of(config: Mapping[str, Any]) -> list[str]:
    """The systems that the configuration of an evaluation names, in the order of its tables; empty for another run."""
    if stage_name(str(_get(config, "model", "class_path") or "")) != "evaluation":
        return []
    settings = _get(config, "model", "init_args") or {}
    return [
        *(["base"] if settings.get("with_base", True) else []),
        *(settings.get("adapters") or {}),
        *(settings.get("endpoints") or {}),
        *(["oracle"] if settings.get("oracle_levels") else []),
    ]


# --- State and figures ----------------------------------------------------------------------------------------------


def _read_state(run: Run, config: Mapping[str, Any]) -> None:
    readers = {"evaluation": _read_evaluation, "levels": _read_levels, "regions": _read_regions}
    readers.get(run.stage, _read_training)(run, config)


def _has_ended(folder: Path) -> bool:
    """Whether the last run in a directory ended, by the record of its command; results may be those of an earlier run."""
    record = folder / RECORD
    return not record.is_file() or read_json(record).get("finished") is not False


def _read_training(run: Run, config: Mapping[str, Any]) -> None:
    if (run.folder / METRICS).is_file():
        run.figures[""] = _headline(run.folder / METRICS)
    if (run.folder / WEIGHTS).is_file():
        run.state = "finished"
    elif (run.folder / LAST).is_file():
        step, total = read_training_state(run.folder / LAST, config.get("trainer") or {})
        run.state = "interrupted"
        run.detail = f"at step {step}" + (f" of {total}" if total is not None else "")
    else:
        run.state, run.detail = "interrupted", "before its first checkpoint"


def _read_evaluation(run: Run, config: Mapping[str, Any]) -> None:
    systems, adapters = systems_of(config), _get(config, "model", "init_args", "adapters") or {}
    start = _start_folder(run, config)
    run.adapters = {name: str(start / path) for name, path in adapters.items()}
    missing = [s for s in systems if not (run.folder / s / METRICS).is_file()]
    if logs := sorted(run.folder.glob(ANSWERS)):
        answers = _count(logs, b'{"id": ')
        run.state = "interrupted"
        run.detail = "" if answers is None else f"after {answers // len(systems)} questions"
    elif missing:
        run.state, run.detail = "interrupted", "before its first answer"
    else:
        run.state = "finished"
    run.figures = {s: _headline(run.folder / s / METRICS) for s in systems if s not in missing}


def _start_folder(run: Run, config: Mapping[str, Any]) -> Path:
    """The folder that the run was started in, which its relative paths begin at; the present one if that is not known."""
    root = Path(_get(config, "trainer", "default_root_dir") or "").parts
    folder = run.folder.parts
    return Path(*folder[: -len(root)]) if root and folder[-len(root) :] == root else Path()


def _read_levels(run: Run, config: Mapping[str, Any]) -> None:
    table = _start_folder(run, config) / (_get(config, "model", "init_args", "out") or "")
    if not table.is_file():
        run.state, run.detail = "interrupted", f"before {table} was written"
        return
    run.state, run.detail = "finished", str(table)
    rows: dict[str, list[Mapping[str, Any]]] = {"accuracy clean": [], "accuracy at full strength": []}
    for counts in read_json(table)["answer_types"].values():
        if "kinds" not in counts:
            raise ValueError(
                f"{table}: a level table of an older version: measure it again with `vlm-calibration levels fit`"
            )
        for number, kind in enumerate(counts["kinds"].values()):
            # The untouched images are the same for all kinds.
            rows["accuracy clean"] += [kind[0], counts["never_perturbed"]] if number == 0 else []
            rows["accuracy at full strength"] += kind[-1:]
    for name, chosen in rows.items():
        correct, n = (sum(sum(row[key]) for row in chosen) for key in ("n_correct", "n"))
        run.figures.setdefault("", {})[name] = correct / n if n else None


def _read_regions(run: Run, config: Mapping[str, Any]) -> None:
    if (run.folder / SUMMARY).is_file():
        summary = read_json(run.folder / SUMMARY)
        outcomes, total = summary["outcomes"], summary["queries"]
        located = outcomes["found"] + outcomes["known"]
        run.state = "finished"
        run.figures[""] = {"n": total, "with regions": located / total if total else None}
        return
    shards, total = _count(sorted(run.folder.glob(SHARDS)), b"\n"), _shard_total(run.folder)
    of = f" of {total}" if total is not None else ""
    run.state, run.detail = "interrupted", "" if shards is None else f"after {shards}{of} shards"


def _shard_total(folder: Path) -> int | None:
    """The number of shards by the settings that begin an extraction, None if there are none."""
    for path in folder.glob(SHARD_SETTINGS):
        with path.open("rb") as file:
            data = json.loads(file.readline()).get("data") or {}
        if "queries" in data and "shard_size" in data:
            return -(-int(data["queries"]) // int(data["shard_size"]))
    return None


def _count(paths: list[Path], pattern: bytes) -> int | None:
    """How often a pattern occurs in files; None if they are too large."""
    if sum(path.stat().st_size for path in paths) > MAX_COUNTED:
        return None
    return sum(path.read_bytes().count(pattern) for path in paths)


def _headline(path: Path) -> dict[str, float | None]:
    metrics = read_json(path)
    if not isinstance(metrics, dict):
        raise DataError(f"{path}: not metrics: expected a JSON object")
    return {name: metrics[name] for name in HEADLINE if name in metrics}


def _model(config: Mapping[str, Any]) -> str:
    """The base model of a run; that of an evaluation may be named by its adapters alone."""
    settings = _get(config, "model", "init_args") or {}
    name = _get(settings, "base", "name_or_path")
    for adapter in [] if name else (settings.get("adapters") or {}).values():
        for path in (Path(adapter) / WEIGHTS, Path(adapter) / Path(WEIGHTS).name):
            if path.is_file():
                return str(read_json(path).get("base_model_name_or_path") or "")
    return str(name or "")


def _last_change(folder: Path) -> datetime:
    """Time of the last change of a file that tells the state."""
    paths = [path for mark in (*MARKS, SUMMARY, f"*/{METRICS}") for path in folder.glob(mark)]
    times = [path.stat().st_mtime for path in paths]
    return datetime.fromtimestamp(max(times)).astimezone()


def _get(tree: Any, *keys: str) -> Any:
    """The value below some keys, None if there is none."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


# --- How to go on ---------------------------------------------------------------------------------------------------


def commands_with(adapter: str | None) -> list[str]:
    """Commands that use a trained adapter; without one, the command that tells how to go on."""
    if adapter is None:
        return ["vlm-calibration runs"]
    name = shlex.quote(adapter)
    # In a checkout, make installs Gradio first.
    is_checkout = Path("src/vlm_calibration").is_dir()
    return [
        f'make app ARGS="--adapter {name}"' if is_checkout else f"vlm-calibration app --adapter {name}",
        f'vlm-calibration ask photo.jpg "Is there a dog in the image?" --adapter {name}',
        f"vlm-calibration export {name} --out my_adapter",
    ]


def _next_command(run: Run, config: Mapping[str, Any]) -> str:
    """The command that resumes an interrupted run, or the next stage after a finished one."""
    if run.state == "running":
        return ""
    folder = shlex.quote(str(run.folder))
    if run.state == "interrupted":
        # Each resumes from what it finds in its directory; a training is told the checkpoint.
        resume = " --ckpt_path last" if (run.folder / LAST).is_file() else ""
        return (
            f"vlm-calibration {COMMANDS.get(run.stage, 'fit')} --config {shlex.quote(f'{run.folder}/{CONFIG}')}"
            + resume
        )
    if run.stage == "evaluation":
        return f"vlm-calibration report {folder}"
    runs = "" if str(run.folder.parent) == "runs" else f" --runs {shlex.quote(str(run.folder.parent))}"
    more = "" if "demo.source" in json.dumps(config.get("data")) else " ..."
    if run.stage == "regions":
        return f"vlm-calibration levels fit --config levels{more}{runs}"
    if run.stage == "levels":
        return f"vlm-calibration fit --config sft{more}{runs}"
    if run.stage == "sft":
        adapter = "" if run.folder.name == "sft" else f" --model.init_args.adapter {folder}"
        return f"vlm-calibration fit --config dpo{more}{runs}{adapter}"
    before = _get(config, "model", "init_args", "adapter")
    adapters = {**({"sft": before} if before else {}), run.stage: str(run.folder)}
    preset = "eval/jsonl" if more else "eval/demo"
    return (
        f"vlm-calibration test --config {preset}{more}{runs} "
        f"--model.init_args.adapters {shlex.quote(json.dumps(adapters))}"
    )
