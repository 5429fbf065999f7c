"""The results of an adapter in an evaluation, for its model card: read from the run directory of `test`.

`run.json` of the evaluation says which adapters and queries it read, by digest. So results are taken only for the very adapter that was
evaluated, and all rows of a table are answers to the same queries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from vlm_calibration.models.base import read_object
from vlm_calibration.records import DataError
from vlm_calibration.reporting.runs import CONFIG, METRICS, RECORD, read_config, systems_of
from vlm_calibration.reporting.tables import COLUMNS
from vlm_calibration.settings import digest

ADAPTERS = "model.init_args.adapters."
"""Prefix of the inputs in `run.json` that are adapters."""
TASK = "image-text-to-text"
"""The task of such a model on the Hub."""
HUB_METRICS = {
    "accuracy": ("accuracy", "Accuracy"),
    "ece": ("expected_calibration_error", "Expected calibration error of the stated confidence"),
    "brier": ("brier_score", "Brier score of the stated confidence"),
    "auroc": ("roc_auc", "AUROC of the stated confidence"),
}
"""Metric -> its type and name in the metadata of the Hub."""


@dataclass(frozen=True)
class Evaluation:
    """The results of one evaluation.

    Attributes:
        adapter: digest of the evaluated adapter that the card describes.
        system: its name in the evaluation.
        dataset: name of the data set on the Hub, or else the kind of source, e.g. "demo" or "jsonl".
        config: configuration of a data set on the Hub.
        split: the split that the source reads; "test" for sources without splits.
        revision: revision of a data set on the Hub, or else the digest of the queries.
        parts: the parts of the test set by name.
        results: "base" and the name of each adapter -> the metrics that tables show, None if undefined.
    """

    adapter: str
    system: str
    dataset: str
    config: str | None
    split: str
    revision: str | None
    parts: list[str]
    results: dict[str, dict[str, float | None]]

    @property
    def n(self) -> int:
        """The number of queries."""
        return int(self.results[self.system]["n"] or 0)


def read_evaluation(folder: Path, adapter: str) -> Evaluation:
    """Read the results of an adapter, with those of the base model and of other adapters beside it.

    Args:
        folder: run directory of a finished `vlm-calibration test`.
        adapter: digest of the adapter's files, as in `run.json`.

    Raises:
        DataError: the folder holds no finished evaluation of a whole test set, or not of this adapter.
    """
    if not (folder / RECORD).is_file():
        raise DataError(f"{folder}: no {RECORD}: give the run directory of `vlm-calibration test`")
    record, config = read_object(folder / RECORD), read_config(folder / CONFIG)
    if config is None or record.get("command") != "test" or not record.get("finished"):
        raise DataError(f"{folder}: not a finished `vlm-calibration test`: evaluate first")
    if ((config.get("trainer") or {}).get("limit_test_batches") or 1.0) != 1.0:
        raise DataError(f"{folder}: a part of the test set: run `vlm-calibration test` without limits")
    inputs = record["inputs"]
    adapters = {
        key.removeprefix(ADAPTERS): value for key, value in inputs.items() if key.startswith(ADAPTERS)
    }
    system = next((name for name, value in adapters.items() if value == adapter), None)
    if system is None:
        raise DataError(
            f"{folder}: this adapter was not evaluated there, or has changed since (adapters: {', '.join(adapters) or 'none'}): "
            "evaluate it again"
        )
    evaluated = systems_of(config)
    results: dict[str, dict[str, float | None]] = {}
    for name in ("base", *adapters):
        if name in evaluated:
            metrics = read_object(folder / name / METRICS)
            results[name] = {key: metrics.get(key) for key in ("n", *COLUMNS)}
    counts = {values["n"] for values in results.values()}
    if len(counts) > 1 or None in counts:
        raise DataError(f"{folder}: the systems did not answer the same queries: evaluate again")
    splits = config["data"]["test"]
    queries = digest(
        f"{key} {value}\n" for key, value in sorted(inputs.items()) if key.startswith("data.test")
    )
    return Evaluation(
        adapter=adapter,
        system=system,
        parts=[
            name if split.get("noise", "none") == "none" else f"{name} (key object perturbed)"
            for name, split in splits.items()
        ],
        results=results,
        **_describe([split["source"] for split in splits.values()], queries),
    )


def _describe(sources: Sequence[Mapping[str, Any]], queries: str) -> dict[str, Any]:
    """The fields of `Evaluation` that tell which data these sources are; `queries` is their digest."""
    kinds = {str(source["class_path"]).rsplit(".", 1)[-1].removesuffix("Source") for source in sources}
    settings = [source.get("init_args") or {} for source in sources]
    split = "+".join(sorted({str(s.get("split") or "test") for s in settings}))
    dataset = "+".join(sorted(kind.lower() for kind in kinds))
    return {"dataset": dataset, "config": None, "split": split, "revision": queries}


def eval_results(evaluation: Evaluation) -> Iterator[EvalResult]:
    """The defined headline metrics of the card's adapter as the Hub's metadata."""
    values = evaluation.results[evaluation.system]
    for name, (kind, title) in HUB_METRICS.items():
        if (value := values.get(name)) is not None:
            yield EvalResult(
                task_type=TASK,
                dataset_type=evaluation.dataset,
                dataset_name=f"{evaluation.dataset}: {', '.join(evaluation.parts)}",
                dataset_config=evaluation.config,
                dataset_split=evaluation.split,
                dataset_revision=evaluation.revision,
                dataset_args={"queries": evaluation.n},
                metric_type=kind,
                metric_name=title,
                metric_value=value,
            )
