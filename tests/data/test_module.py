"""The data module: the same samples for any number of workers, batch size and number of processes; new noise every epoch."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

from vlm_calibration.data.candidates import CandidateSettings, ValidationBatch
from vlm_calibration.data.dataset import EvalSplit
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.data.sources.jsonl import JsonlSource
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.perturbation.levels import LinearLevels
from vlm_calibration.records import DataError, Query, Region

from .conftest import Listed

TRAIN = DemoSource("train", scenes=4)
Drawn = dict[str, tuple[bytes, float]]


def _module(folder: str, **settings: Any) -> PerturbedQueryDataModule:
    plain = {"train": TRAIN, "batch_size": 4, "workers": 0, "max_length": 300, "eval_batch_size": 5}
    return PerturbedQueryDataModule(folder, **{**plain, **settings})  # type: ignore[arg-type]


def _as_process(module: PerturbedQueryDataModule, rank: int, processes: int) -> None:
    module.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=rank,
        world_size=processes,
        current_epoch=0,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )


def _drawn(batches: Iterable[Any]) -> Drawn:
    """Pixels and confidence by query id."""
    samples: Drawn = {}
    for batch in batches:
        batch = batch.prompts if isinstance(batch, ValidationBatch) else batch
        confidence = batch.levels if hasattr(batch, "levels") else batch.confidence.tolist()
        for query, pixels, level in zip(batch.queries, batch.inputs["pixel_values"], confidence, strict=True):
            assert query.id not in samples
            samples[query.id] = (pixels.numpy().tobytes(), round(level, 6))
    return samples


def _epoch(module: PerturbedQueryDataModule, epoch: int) -> Drawn:
    module.setup("fit")
    loader = module.train_dataloader()
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    return _drawn(loader)


@pytest.fixture(scope="module")
def expected_epochs(model_folder: str) -> list[Drawn]:
    """The samples of the first two epochs, drawn in one process without workers."""
    module = _module(model_folder)
    return [_epoch(module, 0), _epoch(module, 1)]


def test_all_queries_are_drawn_and_epochs_differ(expected_epochs: list[Drawn]) -> None:
    assert set(expected_epochs[0]) == {q.id for q in TRAIN.queries()} == set(expected_epochs[1])
    same = [q for q in expected_epochs[0] if expected_epochs[0][q] == expected_epochs[1][q]]
    assert len(same) <= 3, "a query in ten or so is clean in both"
    assert len({level for _, level in expected_epochs[0].values()}) > 4


@pytest.mark.parametrize("settings", [{"workers": 3}, {"batch_size": 1}, {"batch_size": 3, "workers": 1}])
def test_workers_and_batch_size_make_no_difference(
    model_folder: str, expected_epochs: list[Drawn], settings: dict[str, int]
) -> None:
    module = _module(model_folder, **settings)
    module.setup("fit")
    loader = module.train_dataloader()
    for epoch in (0, 1):
        # Workers persist from epoch to epoch.
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        assert _drawn(loader) == expected_epochs[epoch]


@pytest.mark.parametrize("processes", [2, 5])
def test_processes_make_no_difference(
    model_folder: str, expected_epochs: list[Drawn], processes: int
) -> None:
    together: Drawn = {}
    for rank in range(processes):
        module = _module(model_folder, batch_size=1)
        _as_process(module, rank, processes)
        part = _epoch(module, 1)
        assert len(part) == 12 // processes
        assert not set(part) & set(together)
        together |= part
    assert together == {q: expected_epochs[1][q] for q in together}
    assert len(together) == 12 // processes * processes


def test_the_last_training_batch_is_whole_or_the_only_one(model_folder: str) -> None:
    module = _module(model_folder, batch_size=5)
    assert len(_epoch(module, 0)) == 10
    assert module.val_dataloader() == [], "without validation"
    assert len(_epoch(_module(model_folder, batch_size=50), 0)) == 12
    _as_process(module, 0, 13)
    with pytest.raises(DataError, match="12 training queries are too few for 13 processes"):
        module.train_dataloader()


def test_evaluation_draws_every_query_once_in_order(model_folder: str) -> None:
    """With the same noise whoever answers."""
    parts = {
        "clean": EvalSplit(DemoSource("test", scenes=3)),
        "noised": EvalSplit(DemoSource("test", scenes=3), "drawn"),
        "sweep": EvalSplit(DemoSource("calibration", scenes=1), "every_level"),
    }
    results: list[Drawn] = []
    for processes in (1, 2, 5):
        shards = []
        for rank in range(processes):
            module = _module(model_folder, test=parts)
            _as_process(module, rank, processes)
            module.setup("test")
            shards.append(_drawn(module.test_dataloader()))
        ids = [list(shard) for shard in shards]
        woven = [shard[i] for i in range(len(ids[0])) for shard in ids if i < len(shard)]
        assert woven == [q.id for q in module.sets["test"].queries]
        assert len(woven) == 9 + 9 + 3 * len(LinearLevels().strengths())
        results.append({key: sample for shard in shards for key, sample in shard.items()})
    assert results[0] == results[1] == results[2]


def test_a_calibration_set_comes_after_the_test_set_and_shares_no_image_with_it(model_folder: str) -> None:
    test = {
        "clean": EvalSplit(DemoSource("test", scenes=3)),
        "sweep": EvalSplit(DemoSource("calibration", scenes=1)),
    }
    splits = {"held": EvalSplit(DemoSource("calibration", scenes=2, first=1), "drawn")}
    module = _module(model_folder, test=test, calibration=splits)
    module.setup("test")
    module.answered = {"test": [0, 11], "calibration": [0, 5]}
    asked = [[[q.id for q in batch.queries] for batch in loader] for loader in module.test_dataloader()]
    test_ids, held_ids = ([q.id for q in queries] for queries in module.tested_queries.values())
    assert asked == [[test_ids[1:6], test_ids[6:11]], [held_ids[1:5]]]

    shared = {"held": EvalSplit(DemoSource("calibration", scenes=2))}
    with pytest.raises(DataError, match="share 1 images, 'calibration-000000' among"):
        _module(model_folder, test=test, calibration=shared).setup("test")


def test_images_of_one_name_in_two_folders_are_not_shared(model_folder: str, tmp_path: Path) -> None:
    splits = {}
    for name in ("test", "calibration"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (20, 10)).save(tmp_path / name / "a.png")
        row = {"id": "1", "image": "a.png", "question": "A dog?", "answer": "Yes", "answer_type": "yes_no"}
        (tmp_path / name / "q.jsonl").write_text(json.dumps(row))
        splits[name] = {"x": EvalSplit(JsonlSource(str(tmp_path / name / "q.jsonl")))}
    _module(model_folder, **splits).setup("test")
    splits["calibration"] = splits["test"]
    with pytest.raises(DataError, match=r"share 1 images, .*test/a\.png"):
        _module(model_folder, **splits).setup("test")


def test_validation_is_noised_the_same_each_epoch(model_folder: str) -> None:
    module = _module(model_folder, validation=DemoSource("calibration", scenes=2))
    module.setup("fit")
    loader = module.val_dataloader()
    first = _drawn(loader)
    loader.sampler.set_epoch(7)  # type: ignore[union-attr]
    assert _drawn(loader) == first
    assert len({level for _, level in first.values()}) > 1
    module = _module(model_folder, validation=DemoSource("calibration", scenes=2), train=None)
    module.setup("validate")
    assert _drawn(module.val_dataloader()) == first


@pytest.mark.parametrize(
    ("settings", "stage", "says"),
    [
        ({"train": None}, "fit", "data.train is not set"),
        ({}, "validate", "data.validation is not set"),
        ({}, "test", "data.test is not set"),
        ({"test": {}}, "test", "data.test is not set"),
        (
            {"train": Listed(Query("q1", "x", "What?", "a dog <image>", "open"))},
            "fit",
            "'q1': 'answer' holds '<image>'",
        ),
        ({"processor": None}, "fit", "data.processor is not set"),
        ({"processor": "nowhere"}, "fit", "cannot load a processor from 'nowhere'"),
        ({"train": None}, "predict", r"data\.predict is not set, nor any of data\.train"),
    ],
)
def test_what_is_missing_is_named(model_folder: str, settings: dict[str, Any], stage: str, says: str) -> None:
    module = PerturbedQueryDataModule(**{"processor": model_folder, "train": TRAIN, **settings})
    with pytest.raises(DataError, match=says):
        module.setup(stage)


@pytest.mark.parametrize("answers", [None, "gold", "own"])
def test_a_process_without_a_validation_query_gets_one_empty_batch(model_folder: str, answers: Any) -> None:
    candidates = None if answers is None else CandidateSettings(answers=answers)
    sizes = []
    for rank in range(5):
        module = _module(model_folder, validation=DemoSource("calibration", scenes=1), candidates=candidates)
        _as_process(module, rank, 5)
        module.setup("fit")
        sizes.append([len(batch.prompts.queries) for batch in module.val_dataloader()])
    assert sizes == [[1], [1], [1], [0], [0]]


def test_a_processor_of_unknown_resolution_is_refused_before_anything_is_read(
    model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unread(DemoSource):
        def queries(self) -> Sequence[Query]:
            raise AssertionError("read")

    module = _module(model_folder, train=Unread())
    monkeypatch.setattr(module.processor, "image_processor", transformers.MllamaImageProcessor())
    with pytest.raises(DataError, match=r"data\.noise\.resolution"):
        module.setup("fit")


def test_an_error_in_a_worker_names_the_record(model_folder: str) -> None:
    regions = (Region("dog", (0, 0, 8, 8)),)
    queries = (Query(f"q{i}", "x", "A dog?", "Yes", "yes_no", regions=regions) for i in range(3))
    module = _module(model_folder, train=Listed(*queries, damaged=["q1"]), workers=1, batch_size=1)
    module.setup("fit")
    with pytest.raises(DataError, match="record 'q1': damaged"):
        list(module.train_dataloader())


@pytest.mark.slow
def test_a_worker_leaves_signals_to_its_parent_and_dies_when_told_to_twice(
    model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    # The Trainer sets handlers, which forked workers would inherit.
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        module = _module(model_folder, workers=1)
        module.setup("fit")
        loader = module.train_dataloader()
        batches = iter(loader)
        [worker] = loader._iterator._workers  # type: ignore[union-attr]
        next(batches)
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
            os.kill(worker.pid, number)
        assert len(next(batches).queries) == 4
        assert worker.is_alive()
        with pytest.raises(RuntimeError, match="killed by signal: Terminated"):
            os.kill(worker.pid, signal.SIGTERM)
            time.sleep(60)  # interrupted at once by the worker's end
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("epoch", "batch", "workers"), [(0, 0, 0), (0, 2, 2), (1, 1, 2), (1, 2, 0), (3, 0, 2)]
)
def test_what_is_left_of_the_data_behind_a_place(
    model_folder: str, epoch: int, batch: int, workers: int
) -> None:
    """The position is that of a checkpoint; the number of batches is that of a complete epoch."""

    def orders(batch: int, workers: int) -> list[list[list[str]]]:
        module = _module(model_folder, workers=workers)
        module.load_state_dict({"epoch": epoch, "batch": batch, "queries": 12, "batch_size": 4})
        module.setup("fit")
        loader = module.train_dataloader()
        orders = []
        for own_epoch in (epoch, epoch + 1):
            batches = iter(loader)  # before anyone tells the sampler the first epoch
            loader.sampler.set_epoch(own_epoch)  # type: ignore[attr-defined]
            assert len(loader) == 3
            orders.append([[q.id for q in b.queries] for b in batches])
            loader.sampler.set_epoch(own_epoch + 1)  # type: ignore[attr-defined]
        return orders

    [complete, following], [rest, after] = orders(0, 0), orders(batch, workers)
    assert rest == complete[batch:]
    assert after == following, "later ones are complete"
