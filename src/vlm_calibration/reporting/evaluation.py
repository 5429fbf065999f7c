"""The results of an adapter in a run directory of `vlm-calibration test`, for its model card."""

from __future__ import annotations

from pathlib import Path

from vlm_calibration.estimators.predictions import PREDICTIONS
from vlm_calibration.records import DataError
from vlm_calibration.reporting.card import Evaluation
from vlm_calibration.reporting.report.data import BASE, read_systems
from vlm_calibration.reporting.report.table import plain_rows, stated_rows
from vlm_calibration.reporting.runs import CONFIG, RECORD, read_config, read_record, systems_of
from vlm_calibration.reporting.tables import COLUMNS
from vlm_calibration.settings import digest

ADAPTERS = "model.init_args.adapters."
"""Prefix of the inputs in `run.json` that are adapters."""


def read_evaluation(folder: Path, adapter: str) -> Evaluation:
    """Read the results of an adapter, by the digest of its files, with those of the base model and of other adapters beside it.

    DataError if the run directory holds no finished `vlm-calibration test` of a whole test set, or not of this adapter.
    """
    record, config = read_record(folder), read_config(folder / CONFIG)
    if record is None:
        raise DataError(f"{folder}: no {RECORD}: give the run directory of `vlm-calibration test`")
    if not config or record.command != "test" or not record.finished:
        raise DataError(f"{folder}: not a finished `vlm-calibration test`: evaluate first")
    if ((config.get("trainer") or {}).get("limit_test_batches") or 1.0) != 1.0:
        raise DataError(f"{folder}: a part of the test set: run `vlm-calibration test` without limits")
    inputs = record.inputs
    adapters = {key[len(ADAPTERS) :]: value for key, value in inputs.items() if key.startswith(ADAPTERS)}
    system = next((name for name, value in adapters.items() if value == adapter), None)
    if system is None:
        raise DataError(
            f"{folder}: this adapter was not evaluated there, or has changed since (adapters: {', '.join(adapters) or 'none'}): "
            "evaluate it again"
        )
    systems = read_systems([str(folder)])
    if missing := [name for name in systems_of(config) if name not in {s.name for s in systems}]:
        raise DataError(f"{folder / missing[0]}: no {PREDICTIONS}: evaluate again")
    rows = stated_rows(plain_rows([s for s in systems if s.name in (BASE, *adapters)]))
    splits = config["data"]["test"]
    sources = [split["source"] for split in splits.values()]
    kinds = {str(source["class_path"]).rsplit(".", 1)[-1].removesuffix("Source") for source in sources}
    queries = (f"{key} {value}\n" for key, value in sorted(inputs.items()) if key.startswith("data.test"))
    return Evaluation(
        adapter=adapter,
        system=system,
        dataset="+".join(sorted(kind.lower() for kind in kinds)),
        split="+".join(sorted({str((s.get("init_args") or {}).get("split") or "test") for s in sources})),
        revision=digest(queries),
        parts=[
            name if split.get("noise", "none") == "none" else f"{name} (key object perturbed)"
            for name, split in splits.items()
        ],
        results=rows.set_index("system")[["n", *COLUMNS]].to_dict("index"),
    )
