"""Writes extracted regions: a log line for each finished shard, and in the end a Parquet file for each source, with a summary.

An interrupted run resumes with the missing shards and any number of processes. Several runs may share the shards (`data.parts`); the
last one to end writes the files.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pycocotools import mask as coco
from rich.console import Console

from vlm_calibration.callbacks.predictions import broadcast_from_first
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.data.regions import RawBatch
from vlm_calibration.data.sources.parquet import NOTES, OPTIONAL, REGION, REQUIRED
from vlm_calibration.files import AppendLog, JsonLine, replacing, write_json
from vlm_calibration.progress import track
from vlm_calibration.records import DataError
from vlm_calibration.regions.extraction import OUTCOMES, Extracted
from vlm_calibration.reporting.tables import text_table
from vlm_calibration.stages.regions import RegionExtractor

SHARDS, SUMMARY = "shards", "summary.json"
"""Folder of the logs of shards, `PART.RANK.jsonl`, and the file of the summary."""
REJECTED = pa.struct([*REGION, pa.field("reason", pa.string())])
NOTE_TYPES = (pa.string(), pa.list_(REJECTED), pa.string())
SCHEMA = pa.schema([*REQUIRED.items(), *OPTIONAL.items(), *zip(NOTES, NOTE_TYPES, strict=True)])
"""The columns of a query, and notes about its extraction."""


class RegionWriter(L.Callback):
    """Writes `shards/`, a Parquet file for each source and `summary.json` in the run directory.

    A file holds every query of its source whose image could be read, in order, for `data.sources.parquet.ParquetSource`. It is
    `queries.parquet` for `data.predict`; otherwise it is named after its setting, such as `train.parquet`, and `data.regions` names
    the folder.
    """

    _log: AppendLog
    start_over = False  # whether all shards are extracted again, whatever an earlier run finished

    def outputs(self, folder: Path, module: L.LightningModule, data: PerturbedQueryDataModule) -> list[Path]:
        plan = data.plan_extraction(cast(RegionExtractor, module).keep_known)
        return [*(folder / extraction.file for extraction in plan.extractions), folder / SUMMARY]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the shards that this run has finished; raises a DataError if there are shards of another run."""
        folder, run = Path(trainer.default_root_dir), pl_module.run_digest
        data: PerturbedQueryDataModule = trainer.datamodule  # type: ignore[attr-defined]
        path = folder / SHARDS / f"{data.part}.{trainer.global_rank}.jsonl"
        remedy = f"remove {folder}, or give another trainer.default_root_dir"
        log = self._log = AppendLog(path, {"run": run}, remedy, "*.jsonl")

        def clear() -> None:
            if data.parts > 1:
                others = f"the shards of the others: remove {folder} and start all parts"
                raise DataError(f"--overwrite in one run of {data.parts} would remove {others}")
            log.clear()
            for output in self.outputs(folder, pl_module, data):
                output.unlink(missing_ok=True)

        if self.start_over or run is None:
            broadcast_from_first(trainer, clear)
        if data.region_plan.extractions:
            finished = broadcast_from_first(trainer, lambda: {row["shard"] for _, row in log.lines()})
            data.region_plan.finished = finished

    def on_predict_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: RawBatch, *_: Any) -> None:
        if batch.rows:
            self._log.append({"shard": batch.shard, "rows": [row_of(extracted) for extracted in outputs]})

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._log.close()
        trainer.strategy.barrier("shards")
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            data: PerturbedQueryDataModule = trainer.datamodule  # type: ignore[attr-defined]
            # This part's lines are complete before it reads the others', so the last part to end finds all shards.
            lines = {row["shard"]: line._replace(content=b"") for line, row in self._log.lines()}
            shards = len(data.region_plan.shards)
            if not (missing := sum(number not in lines for number in range(shards))):
                self._merge(data, lines, folder)
            elif data.parts == 1:
                what = f"{missing} of {shards} shards are missing"
                raise DataError(f"{folder / SHARDS}: {what}: run again without trainer.limit_predict_batches")
            else:
                rest = f"{missing} of {shards} shards are other parts'"
                outputs = ", ".join(map(str, self.outputs(folder, pl_module, data)))
                print(f"part {data.part} of {data.parts} is done; {rest}: the last to end writes {outputs}")
        trainer.strategy.barrier("merged")

    def _merge(self, data: PerturbedQueryDataModule, lines: Mapping[int, JsonLine], folder: Path) -> None:
        """Write the rows of each source as one file without unreadable ones, and the summary of all."""
        total, plan = RegionSummary(), data.region_plan
        files: dict[str, RegionSummary] = {}

        def usable(line: JsonLine, *summaries: RegionSummary) -> list[dict[str, Any]]:
            """The rows of a shard that can be trained on; the summaries count all rows."""
            rows = self._log.reread(line)["rows"]
            for row, summary in product(rows, summaries):
                summary.add(row)
            return [row for row in rows if row["outcome"] != "unreadable"]

        for index, extraction in enumerate(plan.extractions):
            path, summary = folder / extraction.file, RegionSummary()
            files[extraction.file] = summary
            own = [lines[number] for number, (of, _) in enumerate(plan.shards) if of == index]
            tracked = track(own, f"writing {path}", len(own), "shards")
            write_rows(path, (usable(line, summary, total) for line in tracked), extraction.note)
        content = total.to_dict()
        content["files"] = {name: summary.to_dict() for name, summary in files.items()}
        content["complete"] = [f"data.{setting}" for setting in plan.complete]
        write_json(folder / SUMMARY, content)
        print_summary(folder, content)

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        if hasattr(self, "_log"):
            self._log.close()


def row_of(extracted: Extracted) -> dict[str, Any]:
    """A query and the notes about its extraction, by the columns of `SCHEMA`."""
    rejected = [{**asdict(region), "reason": reason} for region, reason in extracted.rejected]
    notes = {"outcome": extracted.outcome, "rejected": rejected, "note": extracted.note}
    return asdict(extracted.query) | notes


def write_rows(
    path: Path, parts: Iterable[Sequence[Mapping[str, Any]]], note: Mapping[bytes, bytes] | None = None
) -> None:
    """Write a Parquet file, some rows at a time, with `note` in its metadata."""
    schema = SCHEMA.with_metadata(note)
    with replacing(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for rows in parts:
            if rows:
                writer.write_table(pa.Table.from_pylist(list(rows), schema=schema), row_group_size=1024)


class RegionSummary:
    """How many queries have regions, how large they are, and why the others have none."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.named = self.located = 0
        self.shares: list[float] = []
        self.notes: list[str] = []

    def add(self, row: Mapping[str, Any]) -> None:
        self.outcomes[row["outcome"]] += 1
        self.reasons.update(r["reason"] for r in row["rejected"])
        if row["outcome"] in ("found", "rejected", "not detected"):
            self.named += len(row["objects"])
            self.located += len({r["label"] for r in row["regions"]} & set(row["objects"]))
        if row["outcome"] == "found":
            evidence = [r for r in row["regions"] if not row["objects"] or r["label"] in row["objects"]]
            masks = [{**r["mask"], "counts": r["mask"]["counts"].encode()} for r in evidence if r["mask"]]
            pixels = np.prod(masks[0]["size"]) if masks else 1
            self.shares.append(float(coco.area(coco.merge(masks)) / pixels) if masks else 0.0)
        if row["note"] and len(self.notes) < 5:
            self.notes.append(row["note"])

    def to_dict(self) -> dict[str, Any]:
        """The counts, and deciles of the share of the image, in [0, 1], that the regions of a query cover."""
        shares = np.quantile(self.shares, (0.1, 0.5, 0.9)).tolist() if self.shares else [None] * 3
        return {
            "queries": self.outcomes.total(),
            "outcomes": {name: self.outcomes[name] for name in OUTCOMES},
            "phrases": {"named": self.named, "located": self.located},
            "share_of_image": dict(zip(("p10", "median", "p90"), shares, strict=True)),
            "rejected_regions": dict(sorted(self.reasons.items())),
            "unreadable": self.notes,
        }


def print_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Print a summary of all queries, in which `files` has that of each file in `folder`, and `complete` names settings."""
    console = Console(soft_wrap=True, highlight=False, markup=False)
    if n := summary["queries"]:
        rows = [(name, str(k), f"{k / n:.1%}") for name, k in summary["outcomes"].items() if k]
        console.print(text_table(f"Regions of {n} queries", ("", "queries", "share"), rows))
        phrases, share = summary["phrases"], summary["share_of_image"]
        if phrases["named"]:
            console.print(f"phrases: {phrases['located']} of {phrases['named']} located")
        if share["median"] is not None:
            within = f"{share['p10']:.1%} to {share['p90']:.1%}"
            console.print(f"share of the image: median {share['median']:.1%}, 80% of queries within {within}")
        for reason, count in summary["rejected_regions"].items():
            console.print(f"regions left out ({reason}): {count}")
        for note in summary["unreadable"]:
            console.print(f"unreadable: {note}")
    for name, of_file in summary["files"].items():
        outcomes = of_file["outcomes"]
        readable, located = of_file["queries"] - outcomes["unreadable"], outcomes["found"] + outcomes["known"]
        console.print(f"wrote {folder / name}: {readable} queries, {located} with regions")
    if summary["complete"]:
        why = "each query has a region, or an answer that says that its object is absent"
        console.print(f"nothing to extract for {', '.join(summary['complete'])}: {why}")
