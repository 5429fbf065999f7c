"""Writes extracted regions: a Parquet file a finished shard, and in the end all of them as one, with a summary.

A shard's file appears whole or not at all, and its name and content do not depend on the process that wrote it; so a run that
was ended goes on with the shards that are missing, with as many processes as there are now. Several runs may share the shards
(`data.parts`); the one that finds them all there writes what is common to them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import lightning as L
import pyarrow as pa
import pyarrow.parquet as pq

from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.data.raw import RawBatch, shard_count
from vlm_calibration.data.sources.parquet import NOTES, OPTIONAL, REGION, REQUIRED
from vlm_calibration.files import clear_leftovers, replacing, write_json, writing
from vlm_calibration.records import DataError
from vlm_calibration.regions.extraction import Extracted
from vlm_calibration.reporting.regions import RegionSummary, print_summary
from vlm_calibration.settings import digest, init_args, to_json
from vlm_calibration.stages.regions import RegionExtractor

SHARDS, QUERIES, SUMMARY, SETTINGS = "shards", "queries.parquet", "summary.json", "settings.json"
ROW_GROUP = 1024

REJECTED = pa.struct([*REGION, pa.field("reason", pa.string())])
SCHEMA = pa.schema(
    [
        *REQUIRED.items(),
        *OPTIONAL.items(),
        *zip(NOTES, (pa.string(), pa.list_(REJECTED), pa.string()), strict=True),
    ]
)
"""A query's columns, and what is noted about its extraction."""


class RegionWriter(L.Callback):
    """`shards/`, `queries.parquet` and `summary.json` in the run directory.

    `queries.parquet` holds every query whose image could be read, in the order of the source, for
    `vlm_calibration.data.sources.parquet.ParquetSource`.
    """

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find out which shards an earlier run has finished, the same ones in every process."""
        # Lightning lets all processes through to here, and on from here, together.
        folder = Path(trainer.default_root_dir) / SHARDS
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        data = _data(trainer)
        settings = {
            **to_json(init_args(cast(RegionExtractor, pl_module).pipeline)),
            "precision": str(trainer.precision),
            "data": _data_settings(data),
        }
        if trainer.is_global_zero:
            own = {f"{n:08d}.parquet" for n in range(data.part, _shards(data), data.parts)}
            clear_leftovers(folder, None if data.parts == 1 else own.__contains__)
        _check_settings(folder / SETTINGS, settings, write=trainer.is_global_zero)
        self._rows.clear()
        data.leave_out({int(path.stem) for path in folder.glob("*.parquet")})

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: RawBatch,
        *_: Any,
    ) -> None:
        self._rows += [row_of(extracted) for extracted in outputs]
        if batch.last:
            folder = Path(trainer.default_root_dir) / SHARDS
            write_rows(folder / f"{batch.shard:08d}.parquet", [self._rows])
            self._rows.clear()

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.strategy.barrier("shards")
        if trainer.is_global_zero:
            data, folder = _data(trainer), Path(trainer.default_root_dir)
            paths = [folder / SHARDS / f"{n:08d}.parquet" for n in range(_shards(data))]
            # Files come before this look at them, so that the last part to end sees all.
            missing = sum(not path.exists() for path in paths)
            if missing and data.parts > 1:
                print(
                    f"part {data.part} of {data.parts} is done; {missing} of {len(paths)} shards are other parts': the last "
                    f"to end writes {folder / QUERIES}"
                )
            else:
                _merge(paths, folder)
        trainer.strategy.barrier("merged")


def _merge(shards: Sequence[Path], folder: Path) -> None:
    """Write what is in all shards as one, and sum it up."""
    summary = RegionSummary()
    write_rows(folder / QUERIES, (_usable(read_rows(path), summary) for path in shards))
    write_json(folder / SUMMARY, summary.to_dict())
    print_summary(summary, folder / QUERIES)


def _shards(data: PerturbedQueryDataModule) -> int:
    assert data.predict is not None
    return shard_count(len(data.predict.queries()), data.shard_size)


def _usable(rows: Sequence[dict[str, Any]], summary: RegionSummary) -> list[dict[str, Any]]:
    """The rows that can be trained on; all are counted."""
    for row in rows:
        summary.add(row)
    return [row for row in rows if row["outcome"] != "unreadable"]


def row_of(extracted: Extracted) -> dict[str, Any]:
    """The columns of `SCHEMA`."""
    return {
        **asdict(extracted.query),
        "outcome": extracted.outcome,
        "rejected": [{**asdict(r.region), "reason": r.reason} for r in extracted.rejected],
        "note": extracted.note,
    }


def write_rows(path: Path, parts: Iterable[Sequence[Mapping[str, Any]]]) -> None:
    """Rows, a part at a time, as a Parquet file."""
    with replacing(path) as temporary, pq.ParquetWriter(temporary, SCHEMA) as writer:
        for rows in parts:
            if rows:
                writer.write_table(pa.Table.from_pylist(list(rows), schema=SCHEMA), row_group_size=ROW_GROUP)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that `write_rows` has written.

    Raises:
        DataError: the file is not there, or is damaged.
    """
    try:
        return pq.read_table(path, schema=SCHEMA).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{path}: cannot be read: {error}; remove it, and its queries are done anew"
        ) from error


def _data(trainer: L.Trainer) -> PerturbedQueryDataModule:
    return trainer.datamodule  # type: ignore[attr-defined]


def _data_settings(data: PerturbedQueryDataModule) -> dict[str, Any]:
    """What decides which query is in which batch."""
    assert data.predict is not None
    queries = data.predict.queries()
    return {
        "queries": len(queries),
        "content": digest(map(repr, queries)),
        "shard_size": data.shard_size,
        "batch_size": data.eval_batch_size,
    }


def _check_settings(path: Path, settings: dict[str, Any], *, write: bool) -> None:
    """Shards of other settings must not be mixed with those to come."""
    plain = json.loads(json.dumps(settings))
    if not path.exists():
        if write:
            write_json(path, plain)
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    for part in sorted({*before, *plain}):
        for name in sorted({*_items(before, part), *_items(plain, part)}):
            was, now = _items(before, part).get(name), _items(plain, part).get(name)
            if was != now:
                raise DataError(
                    f"{path.parent}: these shards were begun with {part}.{name} = {was!r}, found {now!r}: go on with "
                    "the same settings and queries, remove the folder, or give another trainer.default_root_dir"
                )


def _items(settings: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    value = settings.get(part)
    return value if isinstance(value, dict) else {"value": value}
