"""Read offline W&B runs: the records of a `.wandb` file, in LevelDB's log format. Also runs short stages that log such files."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from wandb.proto.wandb_internal_pb2 import Record

from .command_line import Ended, Server, instance, read_lines

BLOCK = 32768
HEADER = 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path: Path) -> Iterator[Any]:
    """Yield the protocol buffers of a `.wandb` file."""
    data = path.read_bytes()
    assert data[:4] == b":W&B", path
    at, parts = HEADER, b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:  # padding: too short for a header
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        if kind == 0:
            break
        parts += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


@dataclass
class OfflineRun:
    """An offline run: its directory, and W&B's folder in it.

    Attributes:
        history: logged rows, in order; images and tables are the mappings that describe them.
        artifacts: the logged and used artifacts, in order.
        ended: what the command printed.
    """

    directory: Path
    folder: Path
    name: str = ""
    project: str = ""
    tags: list[str] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    artifacts: list[Any] = field(default_factory=list)
    ended: Ended = field(default_factory=lambda: Ended(0, "", ""))

    def predictions(self, system: str = "") -> list[dict[str, Any]]:
        """The lines of `predictions.jsonl`."""
        return read_lines(self.directory / system / "predictions.jsonl")

    @property
    def keys(self) -> set[str]:
        """Names of all logged values."""
        return {key for row in self.history for key in row if not key.startswith("_")}

    def values(self, key: str) -> list[Any]:
        """The values logged under this name, in order."""
        return [row[key] for row in self.history if key in row]

    def file(self, key: str) -> Path:
        """The file of the last image or table logged under this name."""
        return self.folder / "files" / self.values(key)[-1]["path"]

    def table(self, key: str) -> list[dict[str, Any]]:
        """The rows of the last table logged under this name."""
        table = json.loads(self.file(key).read_text(encoding="utf-8"))
        return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]

    def logged(self, kind: str) -> list[Any]:
        """The artifacts of this type that the run logged."""
        return [a for a in self.artifacts if a.type == kind and not a.use_after_commit]

    def used(self, kind: str) -> dict[str, Any]:
        """The artifacts of this type that the run used, by name."""
        return {a.name: a for a in self.artifacts if a.type == kind and a.use_after_commit}


def read_run(run_directory: Path) -> OfflineRun:
    """Read the only offline run of a run directory."""
    [path] = (run_directory / "wandb").glob("offline-run-*/*.wandb")
    run = OfflineRun(run_directory, path.parent)
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.name, run.project = record.run.display_name, record.run.project
            run.tags = list(record.run.tags)
            _configure(run.config, record.run.config.update)
        elif kind == "config":
            _configure(run.config, record.config.update)
        elif kind == "history":
            run.history.append(_row(record.history.item))
        elif kind == "artifact":
            run.artifacts.append(record.artifact)
    return run


def _row(items: Any) -> dict[str, Any]:
    """One logged row. Images and tables arrive as separate items, one for each entry of the mapping that describes them."""
    media = {path for i in items if (path := "/".join(i.nested_key)).endswith("/_type")}
    owners = {path.removesuffix("/_type") for path in media}
    row: dict[str, Any] = {}
    for item in items:
        path, value = "/".join(item.nested_key) or item.key, json.loads(item.value_json)
        owner, _, part = path.rpartition("/")
        if owner in owners:
            row.setdefault(owner, {})[part] = value
        else:
            row[path] = value
    return row


def _configure(config: dict[str, Any], items: Any) -> None:
    for item in items:
        *path, last = list(item.nested_key) or [item.key]
        section = config
        for name in path:
            section = section.setdefault(name, {})
        section[last] = json.loads(item.value_json)


SMALL = {"trainer": {"accelerator": "cpu", "log_every_n_steps": 1}, "data": {"workers": 0, "batch_size": 4}}
"""Settings that make a stage short."""


def short(command: str, config: Path, overlay: Path, run_directory: Path, **settings: Any) -> list[str]:
    """Arguments of a short run of configuration `config`; `settings` are sections that override `SMALL`."""
    merged = {name: {**SMALL.get(name, {}), **settings.get(name, {})} for name in {*SMALL, *settings}}
    merged["trainer"]["default_root_dir"] = str(run_directory)
    overlay.write_text(yaml.safe_dump(merged, sort_keys=False), encoding="utf-8")
    return [command, "--config", str(config), "--config", str(overlay)]


def demo(split: str, scenes: int, **settings: Any) -> dict[str, Any]:
    """The configuration of a demo source."""
    return instance("demo.source.DemoSource", split=split, scenes=scenes, **settings)


def run_stages(root: Path, server: Server, folder: Path) -> dict[str, OfflineRun]:
    """Run two epochs of SFT, one of DPO, and an evaluation of both adapters on the demo: stage -> its run."""
    adapters = {name: str(folder / name / "adapter") for name in ("sft", "dpo")}
    test = demo("test", 2)
    further = yaml.safe_load((root / "configs/eval/demo_estimators.yaml").read_text(encoding="utf-8"))
    estimating = {**further["model"]["init_args"], "adapters": adapters}
    splits = {"clean": {"source": test}, "perturbed": {"source": test, "noise": "drawn"}}
    validation = demo("calibration", 8, first=10_000)
    later: dict[str, Any] = {
        "train": demo("train", 4, first=50),
        "teacher": demo("calibration", 8, first=10_100),
    }
    later["noise"] = {"clean_fraction": 0.35}  # that of stage 1, so that both validate on the same images
    stages: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
        "sft": ("fit", "sft.yaml", {}, {"train": demo("train", 4), "validation": validation}),
        "dpo": ("fit", "dpo.yaml", {"adapter": adapters["sft"]}, {**later, "validation": validation}),
        "eval": ("test", "eval/demo.yaml", estimating, {"test": splits, "calibration": None}),
    }
    runs = {}
    for name, (command, config, model, data) in stages.items():
        settings: dict[str, Any] = {"model": {"init_args": model}} if model else {}
        settings |= {"trainer": {"max_epochs": 2}} if name == "sft" else {}
        config_path, overlay = root / "configs" / config, folder / f"{name}.yaml"
        arguments = short(command, config_path, overlay, folder / name, data=data, **settings)
        ended = server.wait(server.start(arguments, root)).checked()
        runs[name] = replace(read_run(folder / name), ended=ended)
    return runs
