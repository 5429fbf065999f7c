"""The prediction writer in validation: the same files for any number of processes, and no partial files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vlm_calibration.callbacks.predictions import PredictionWriter
from vlm_calibration.records import Prediction

from ..trainers import fake_trainer


def _prediction(number: int) -> Prediction:
    return Prediction(f"q{number}", "Größe?", "Yes", "Yes\n", "yes", 0.5, True, None, 0, "yes_no")


class Processes:
    """Writers of several processes that share a run directory; rank 0 is called last in place of barriers."""

    def __init__(self, folder: Path, count: int, sanity_checking: bool = False) -> None:
        self.folder = folder
        queries = [SimpleNamespace(id=f"q{i}") for i in range(20)]
        self.writers = [PredictionWriter() for _ in range(count)]
        data = SimpleNamespace(sets={"validation": SimpleNamespace(queries=queries)})
        shared = {"datamodule": data, "world_size": count, "sanity_checking": sanity_checking}
        ranks = ({"global_rank": rank, "is_global_zero": rank == 0} for rank in range(count))
        self.trainers = [fake_trainer(folder, **rank, **shared) for rank in ranks]
        for writer, trainer in reversed(list(zip(self.writers, self.trainers, strict=True))):
            writer.setup(trainer, None, "validate")  # type: ignore[arg-type]

    def write(self, systems: dict[str, list[Prediction]]) -> None:
        """Distribute the predictions as the sampler does, and write them in batches of two."""
        count = len(self.writers)
        for rank, (writer, trainer) in enumerate(zip(self.writers, self.trainers, strict=True)):
            shards = {system: predictions[rank::count] for system, predictions in systems.items()}
            for start in range(0, max(map(len, shards.values())), 2):
                outputs = {system: shard[start : start + 2] for system, shard in shards.items()}
                writer.on_validation_batch_end(trainer, None, outputs, None, 0, 0)  # type: ignore[arg-type]

    def finish(self, results: dict[str, dict[str, float]]) -> None:
        module: Any = SimpleNamespace(results=results)
        for writer, trainer in reversed(list(zip(self.writers, self.trainers, strict=True))):
            writer.on_validation_end(trainer, module)


@pytest.mark.parametrize(("count", "total"), [(1, 4), (2, 11), (3, 11), (5, 1)])
def test_files_are_the_same_for_any_number_of_processes(tmp_path: Path, count: int, total: int) -> None:
    predictions = [_prediction(i) for i in range(total)]
    processes = Processes(tmp_path, count)
    others = [replace(p, text="No\n") for p in predictions]
    processes.write({"base": predictions, "sft": others})
    processes.finish({"base": {"n": float(total)}, "sft": {"n": float(total)}})
    for system, expected in (("base", predictions), ("sft", others)):
        lines = (tmp_path / system / "predictions.jsonl").read_text(encoding="utf-8").split("\n")
        assert lines.pop() == ""
        assert [json.loads(line) for line in lines] == [p.to_dict() for p in expected]
        assert "Größe" in lines[0], "UTF-8 as it is"
        assert {p.name for p in (tmp_path / system).iterdir()} == {"predictions.jsonl", "metrics.json"}


def _ids(folder: Path) -> list[str]:
    lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["id"] for line in lines]


def test_what_one_process_leaves_out_does_not_change_the_order(tmp_path: Path) -> None:
    """Of twelve queries the first process answers two of the even ones, and the second all odd ones."""
    processes = Processes(tmp_path, 2)
    dealt = [[_prediction(i) for i in (8, 10)], [_prediction(i) for i in range(1, 12, 2)]]
    for writer, trainer, predictions in zip(processes.writers, processes.trainers, dealt, strict=True):
        writer.on_validation_batch_end(trainer, None, {"": predictions}, None, 0, 0)  # type: ignore[arg-type]
    processes.finish({"": {"n": 8.0}})
    assert _ids(tmp_path) == [f"q{i}" for i in (1, 3, 5, 7, 8, 9, 10, 11)]


def test_each_validation_replaces_the_files_of_the_run(tmp_path: Path) -> None:
    sanity_check = Processes(tmp_path, 1, sanity_checking=True)
    sanity_check.write({"": [_prediction(0)]})
    sanity_check.finish({"": {"n": 1.0}})
    assert [p.name for p in tmp_path.iterdir()] == ["predictions.jsonl"], "no metrics"
    processes = Processes(tmp_path, 2)
    results = {"accuracy": 1.0, "ece": 0.25, "auroc": float("nan"), "n/a": 1.0}
    for start in (0, 5):
        processes.write({"": [_prediction(start), _prediction(start + 1), _prediction(start + 2)]})
        processes.finish({"": {"n": 3.0, **results}})
    assert {p.name for p in tmp_path.iterdir()} == {"predictions.jsonl", "metrics.json"}
    assert _ids(tmp_path) == ["q5", "q6", "q7"]
    text = (tmp_path / "metrics.json").read_text(encoding="utf-8")
    expected = {"n": 3, "accuracy": 1.0, "ece": 0.25, "auroc": None, "n/a": 1}
    assert text == json.dumps(expected, indent=2) + "\n", "counts without a decimal point, and no NaN"


def test_an_error_leaves_no_parts(tmp_path: Path) -> None:
    (tmp_path / "predictions.jsonl").write_text("old\n")
    processes = Processes(tmp_path, 2)
    processes.write({"": [_prediction(0), _prediction(1)], "sft": [_prediction(0), _prediction(1)]})
    for writer, trainer in zip(processes.writers, processes.trainers, strict=True):
        writer.on_exception(trainer, None, KeyboardInterrupt())  # type: ignore[arg-type]
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["predictions.jsonl"]
    assert (tmp_path / "predictions.jsonl").read_text() == "old\n"


def test_parts_of_a_killed_run_do_not_leak_into_the_next(tmp_path: Path) -> None:
    killed = Processes(tmp_path, 3)
    killed.write({"": [_prediction(i) for i in range(9)], "sft": [_prediction(i) for i in range(9)]})
    processes = Processes(tmp_path, 2)
    # The second process answers nothing, and so opens no part of its own.
    processes.write({"": [_prediction(0)], "sft": [_prediction(0)]})
    processes.finish({"": {"n": 1.0}, "sft": {"n": 1.0}})
    for folder in (tmp_path, tmp_path / "sft"):
        assert _ids(folder) == ["q0"]
        assert {p.name for p in folder.iterdir()} - {"sft"} == {"predictions.jsonl", "metrics.json"}
