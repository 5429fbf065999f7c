"""Writes extracted regions: a log line for each finished shard, and in the end a Parquet file of all queries, with a summary.

A line does not depend on the process that wrote it, so an interrupted run resumes with the missing shards and any number of
processes. Several runs may share the shards (`data.parts`); the last one to end writes the files that are common to them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import lightning as L
import pyarrow as pa
import pyarrow.parquet as pq

from vlm_calibration.append_log import AppendLog
from vlm_calibration.callbacks.distributed import broadcast_from_first
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.data.raw import RawBatch, shard_count
from vlm_calibration.data.sources.parquet import NOTES, OPTIONAL, REGION, REQUIRED
from vlm_calibration.files import replacing, write_json
from vlm_calibration.progress import track
from vlm_calibration.records import DataError
from vlm_calibration.regions.extraction import Extracted
from vlm_calibration.reporting.regions import RegionSummary, print_summary
from vlm_calibration.settings import digest, init_args, to_json
from vlm_calibration.stages.regions import RegionExtractor

SHARDS, QUERIES, SUMMARY = "shards", "queries.parquet", "summary.json"
BEGUN = "settings."
"""Prefix of a part's log of its settings alone, in `shards/`; `PART.RANK.jsonl` beside it hold the shards."""
ROW_GROUP = 1024

REJECTED = pa.struct([*REGION, pa.field("reason", pa.string())])
SCHEMA = pa.schema(
    [
        *REQUIRED.items(),
        *OPTIONAL.items(),
        *zip(NOTES, (pa.string(), pa.list_(REJECTED), pa.string()), strict=True),
    ]
)
"""The columns of a query, and notes about its extraction."""


class RegionWriter(L.Callback):
    """Writes `shards/`, `queries.parquet` and `summary.json` in the run directory.

    `queries.parquet` holds every query whose image could be read, in the order of the source, for
    `vlm_calibration.data.sources.parquet.ParquetSource`.
    """

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._log: AppendLog | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the shards that an earlier run has finished.

        Raises:
            DataError: they were extracted with other settings, or from other queries.
        """
        data, folder = _data(trainer), Path(trainer.default_root_dir) / SHARDS
        settings = {
            **to_json(init_args(cast(RegionExtractor, pl_module).pipeline)),
            "precision": str(trainer.precision),
            "data": _data_settings(data),
        }
        remedy = "resume with the same settings and queries, remove the folder, or give another trainer.default_root_dir"
        path = folder / f"{data.part}.{trainer.global_rank}.jsonl"
        log = self._log = AppendLog(path, settings, remedy, "*.jsonl")
        self._rows.clear()
        data.leave_out(broadcast_from_first(trainer, lambda: _begin(log)))

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: RawBatch,
        *_: Any,
    ) -> None:
        assert self._log is not None
        self._rows += [row_of(extracted) for extracted in outputs]
        if batch.last:
            self._log.append({"shard": batch.shard, "rows": self._rows})
            self._rows.clear()

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self._log is not None
        self._log.close()
        trainer.strategy.barrier("shards")
        if trainer.is_global_zero:
            data, folder = _data(trainer), Path(trainer.default_root_dir)
            # This part's lines are complete before it reads the others', so the last part to end finds all shards.
            shards = {line.row["shard"]: line._replace(row={}) for line in self._log.lines()}
            total = _shards(data)
            missing = sum(n not in shards for n in range(total))
            if missing and data.parts == 1:
                raise DataError(
                    f"{folder / SHARDS}: {missing} of {total} shards are missing: run again without "
                    "trainer.limit_predict_batches"
                )
            if missing:
                print(
                    f"part {data.part} of {data.parts} is done; {missing} of {total} shards are other parts': the last "
                    f"to end writes {folder / QUERIES}"
                )
            else:
                numbers = track(range(total), f"writing {folder / QUERIES}", total, "shards")
                _merge((self._log.reread(shards[n])["rows"] for n in numbers), folder)
        trainer.strategy.barrier("merged")

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        if self._log is not None:
            self._log.close()


def _begin(log: AppendLog) -> list[int]:
    """The finished shards. At the first start, write the settings down so that parts with other settings are refused at once."""
    shards = [line.row["shard"] for line in log.lines()]
    if not shards:
        # A file for each part: those that start at the same time must not wait for each other's lock.
        begun = AppendLog(log.path.with_name(BEGUN + log.path.name), log.settings, log.remedy)
        begun.append({"shard": None})
        begun.close()
    return [shard for shard in shards if shard is not None]


def _merge(shards: Iterable[Sequence[dict[str, Any]]], folder: Path) -> None:
    """Write the rows of all shards as one file, and their summary."""
    summary = RegionSummary()
    write_rows(folder / QUERIES, (_usable(rows, summary) for rows in shards))
    write_json(folder / SUMMARY, summary.to_dict())
    print_summary(summary, folder / QUERIES)


def _shards(data: PerturbedQueryDataModule) -> int:
    assert data.predict is not None
    return shard_count(len(data.predict.queries()), data.shard_size)


def _usable(rows: Sequence[dict[str, Any]], summary: RegionSummary) -> list[dict[str, Any]]:
    """The rows that can be trained on; the summary counts all rows."""
    for row in rows:
        summary.add(row)
    return [row for row in rows if row["outcome"] != "unreadable"]


def row_of(extracted: Extracted) -> dict[str, Any]:
    """A query and the notes about its extraction, by the columns of `SCHEMA`."""
    return {
        **asdict(extracted.query),
        "outcome": extracted.outcome,
        "rejected": [{**asdict(r.region), "reason": r.reason} for r in extracted.rejected],
        "note": extracted.note,
    }


def write_rows(path: Path, parts: Iterable[Sequence[Mapping[str, Any]]]) -> None:
    """Write a Parquet file, some rows at a time."""
    with replacing(path) as temporary, pq.ParquetWriter(temporary, SCHEMA) as writer:
        for rows in parts:
            if rows:
                writer.write_table(pa.Table.from_pylist(list(rows), schema=SCHEMA), row_group_size=ROW_GROUP)


def _data(trainer: L.Trainer) -> PerturbedQueryDataModule:
    return trainer.datamodule  # type: ignore[attr-defined]


def _data_settings(data: PerturbedQueryDataModule) -> dict[str, Any]:
    """The settings that decide which query is in which batch."""
    assert data.predict is not None
    queries = data.predict.queries()
    return {
        "queries": len(queries),
        "content": digest(map(repr, queries)),
        "shard_size": data.shard_size,
        "batch_size": data.eval_batch_size,
    }
