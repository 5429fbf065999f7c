"""The results of an adapter in an evaluation, for its model card: read from the run directory of `test`, as Markdown and as metadata.

`run.json` of the evaluation says which adapters and queries it read, by digest. So results are taken only for the very adapter that was
evaluated, and all rows of a table are answers to the same queries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from vlm_calibration.files import read_json
from vlm_calibration.records import DataError
from vlm_calibration.reporting.markdown import code, number, table
from vlm_calibration.reporting.runs import CONFIG, METRICS, RECORD, read_config
from vlm_calibration.reporting.tables import COLUMNS, column
from vlm_calibration.settings import digest

BASE = "base"
ADAPTERS = "model.init_args.adapters."
TEST = "data.test"
"""Prefixes of the inputs in `run.json` that are adapters, and queries of the test set."""
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
    def key(self) -> tuple[str | None, ...]:
        """What tells the data of two evaluations apart in metadata of the Hub."""
        return self.dataset, self.config, self.split, self.revision

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
    inputs, config = _read_inputs(folder), read_config(folder / CONFIG)
    if config is None or ((config.get("trainer") or {}).get("limit_test_batches") or 1.0) != 1.0:
        raise DataError(
            f"{folder}: not an evaluation of the whole test set: run `vlm-calibration test` without limits"
        )
    adapters = {
        name.removeprefix(ADAPTERS): value for name, value in inputs.items() if name.startswith(ADAPTERS)
    }
    system = next((name for name, value in adapters.items() if value == adapter), None)
    if system is None:
        names = ", ".join(adapters) or "none"
        raise DataError(
            f"{folder}: this adapter was not evaluated there, or has changed since (adapters: {names}): evaluate it again"
        )
    with_base = config["model"]["init_args"].get("with_base", True)
    results = {
        name: _read_metrics(folder / name / METRICS)
        for name in ([BASE] if with_base else []) + list(adapters)
    }
    if len({values["n"] for values in results.values()}) > 1:
        raise DataError(f"{folder}: the systems answered different numbers of queries: evaluate again")
    queries = [f"{name} {value}\n" for name, value in sorted(inputs.items()) if name.startswith(TEST)]
    splits = config["data"]["test"]
    return Evaluation(
        adapter=adapter,
        system=system,
        parts=[
            name if split.get("noise", "none") == "none" else f"{name} (key object perturbed)"
            for name, split in splits.items()
        ],
        results=results,
        **_describe([split["source"] for split in splits.values()], digest(queries)),
    )


def _read_inputs(folder: Path) -> dict[str, str]:
    """Setting -> digest of its content, of a finished evaluation."""
    path = folder / RECORD
    if not path.is_file():
        raise DataError(f"{folder}: no {RECORD}: give the run directory of `vlm-calibration test`")
    record = read_json(path)
    if not isinstance(record, dict) or record.get("command") != "test" or not record.get("finished"):
        raise DataError(f"{path}: not the record of a finished `vlm-calibration test`: evaluate first")
    return dict(record["inputs"])


def _read_metrics(path: Path) -> dict[str, float | None]:
    metrics = read_json(path)
    if not isinstance(metrics, dict) or not isinstance(metrics.get("n"), int):
        raise DataError(f"{path}: not the metrics of an evaluation: evaluate again")
    return {name: metrics.get(name) for name in ("n", *COLUMNS)}


def _describe(sources: Sequence[Mapping[str, Any]], queries: str) -> dict[str, Any]:
    """The fields of `Evaluation` that tell which data these sources are; `queries` is their digest."""
    names = [str(source["class_path"]).rsplit(".", 1)[-1].removesuffix("Source") for source in sources]
    settings = [source.get("init_args") or {} for source in sources]
    splits = sorted({str(s.get("split") or "test") for s in settings})
    described = {"dataset": "+".join(sorted({name.lower() for name in names})), "split": "+".join(splits)}
    return described | {"config": None, "revision": queries}


# --- In a card ------------------------------------------------------------------------------------------------------


def results_section(evaluation: Evaluation, merged: bool) -> str:
    """The results as Markdown: a row each for the base model and the adapters, this one in bold."""
    rows = []
    for system, values in evaluation.results.items():
        mark = "**" if system == evaluation.system else ""
        label = "base model" if system == BASE else system
        cells = [number(values.get(name), column(name)[1]) for name in COLUMNS]
        rows.append([f"{mark}{cell}{mark}" for cell in (f"{label}{' (this one)' if mark else ''}", *cells)])
    revision = f" (revision {code(evaluation.revision)})" if evaluation.revision else ""
    lines = [
        f"The same {evaluation.n} queries of {code(evaluation.dataset)}, split {code(evaluation.split)}{revision}, for all rows; "
        f"parts: {', '.join(evaluation.parts)}. Calibration (ECE to overconfidence) is over the answers whose confidence could be "
        "parsed, accuracy over all.",
        *(["Measured with the adapter beside the base model, before it was merged."] if merged else []),
        table(["", *(column(name)[0] for name in COLUMNS)], rows),
    ]
    return "\n\n".join(lines)


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
