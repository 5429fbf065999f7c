"""The data module, its sampler and augmentations: the same samples for any number of workers, batch size and number of processes."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import albumentations as A
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from PIL import Image

from vlm_calibration.data.augment import Augmentation
from vlm_calibration.data.candidates import CandidateSettings, ValidationBatch
from vlm_calibration.data.dataset import EvalSplit, PerturbedQueries
from vlm_calibration.data.loading import EpochSampler
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.data.noise import NoisePolicy
from vlm_calibration.data.sources.jsonl import JsonlSource
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.perturbation.levels import LinearLevels
from vlm_calibration.records import DataError, LoadedImage, Query, Region

from .conftest import Listed, record

TRAIN = DemoSource("train", scenes=4)
Drawn = dict[str, tuple[bytes, float]]


def _module(folder: str, **settings: Any) -> PerturbedQueryDataModule:
    plain = {"train": TRAIN, "batch_size": 4, "workers": 0, "max_length": 300, "eval_batch_size": 5}
    return PerturbedQueryDataModule(folder, **{**plain, **settings})  # type: ignore[arg-type]


def _as_process(module: PerturbedQueryDataModule, rank: int, processes: int) -> None:
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    settings = {"global_rank": rank, "world_size": processes, "current_epoch": 0, "strategy": strategy}
    module.trainer = SimpleNamespace(**settings)  # type: ignore[assignment]


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


def test_workers_and_batch_size_make_no_difference(model_folder: str, expected_epochs: list[Drawn]) -> None:
    module = _module(model_folder, workers=2, batch_size=3)
    module.setup("fit")
    loader = module.train_dataloader()
    for epoch in (0, 1):
        # Workers persist from epoch to epoch.
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        assert _drawn(loader) == expected_epochs[epoch]


def test_processes_make_no_difference(model_folder: str, expected_epochs: list[Drawn]) -> None:
    together: Drawn = {}
    for rank in range(5):
        module = _module(model_folder, batch_size=1)
        _as_process(module, rank, 5)
        together |= _epoch(module, 1)
    assert together == {q: expected_epochs[1][q] for q in together}
    assert len(together) == 10, "two each, and none twice"


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
    for processes in (1, 5):
        shards = []
        for rank in range(processes):
            module = _module(model_folder, test=parts)
            _as_process(module, rank, processes)
            module.setup("test")
            shards.append(_drawn(module.test_dataloader()))
        woven = _woven([list(shard) for shard in shards])
        assert woven == [q.id for q in module.sets["test"].queries]
        assert len(woven) == 9 + 9 + 3 * len(LinearLevels().strengths())
        results.append({key: sample for shard in shards for key, sample in shard.items()})
    assert results[0] == results[1]


def test_a_calibration_set_comes_after_the_test_set(model_folder: str) -> None:
    test = {"clean": EvalSplit(DemoSource("test", scenes=4))}
    splits = {"held": EvalSplit(DemoSource("calibration", scenes=2, first=1), "drawn")}
    module = _module(model_folder, test=test, calibration=splits)
    module.setup("test")
    module.answered = {"test": [0, 11], "calibration": [0, 5]}
    asked = [[[q.id for q in batch.queries] for batch in loader] for loader in module.test_dataloader()]
    test_ids, held_ids = ([q.id for q in queries] for queries in module.tested_queries.values())
    assert asked == [[test_ids[1:6], test_ids[6:11]], [held_ids[1:5]]]


def test_names_in_two_folders_are_no_shared_images(model_folder: str, tmp_path: Path) -> None:
    splits = {}
    for name in ("test", "calibration"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (20, 10)).save(tmp_path / name / "a.png")
        (tmp_path / name / "q.jsonl").write_text(json.dumps(record()))
        splits[name] = {"x": EvalSplit(JsonlSource(str(tmp_path / name / "q.jsonl")))}
    _module(model_folder, **splits).setup("test")
    splits["calibration"] = splits["test"]
    splits["test"] = {"first": EvalSplit(DemoSource("test", scenes=1)), **splits["test"]}
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
            {"train": Listed(Query("q1", "x", "What?", "a <image>", "open"))},
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


def test_a_worker_leaves_signals_to_its_parent(model_folder: str) -> None:
    # The Trainer sets handlers, which forked workers would inherit.
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        module = _module(model_folder, workers=1)
        module.setup("fit")
        loader = module.train_dataloader()
        batches = iter(loader)
        [worker] = loader._iterator._workers  # type: ignore[union-attr]
        next(batches)
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
            os.kill(worker.pid, number)
            time.sleep(0.1)  # two of the same that are not handled yet would be one
        assert [len(batch.queries) for batch in batches] == [4, 4]
        assert worker.is_alive()
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(("epoch", "batch", "workers"), [(0, 2, 2), (1, 2, 0), (3, 0, 2)])
def test_what_is_left_behind_a_place_in_the_data(
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


# --- The sampler -----------------------------------------------------------------------------------------------------


def _shards(length: int, processes: int, training: bool, epoch: int = 0, seed: int = 0) -> list[list[int]]:
    shards = []
    for rank in range(processes):
        sampler = EpochSampler(length, rank=rank, num_replicas=processes, training=training, seed=seed)
        sampler.set_epoch(epoch)
        drawn = list(sampler)
        assert len(drawn) == len(sampler)
        assert {e for e, _ in drawn} <= {epoch if training else 0}
        shards.append([i for _, i in drawn])
    return shards


def _woven(shards: list[list[Any]]) -> list[Any]:
    """Sample 0 of every process, then sample 1 of every process, and so on."""
    return [shard[i] for i in range(max(map(len, shards))) for shard in shards if i < len(shard)]


@given(st.integers(0, 60), st.integers(1, 9), st.integers(0, 3))
def test_evaluation_draws_everything_exactly_once(length: int, processes: int, epoch: int) -> None:
    assert _woven(_shards(length, processes, False, epoch)) == list(range(length))


@given(st.integers(0, 60), st.integers(1, 9), st.integers(0, 3))
def test_training_draws_equally_often_and_nothing_twice(length: int, processes: int, epoch: int) -> None:
    shards = _shards(length, processes, True, epoch)
    assert {len(shard) for shard in shards} == {length // processes}
    drawn = list(chain(*shards))
    assert len(set(drawn)) == len(drawn)
    assert length - len(drawn) < processes


def test_order_is_a_function_of_seed_and_epoch() -> None:
    def order(epoch: int, seed: int, processes: int = 1) -> list[int]:
        return _woven(_shards(40, processes, True, epoch, seed))

    assert order(3, 1) == order(3, 1) == order(3, 1, processes=4)
    assert order(3, 1) != order(4, 1)
    assert order(3, 1) != order(3, 2)
    assert order(3, 1) != list(range(40))


def test_what_is_left_out_changes_from_epoch_to_epoch() -> None:
    left_out = set()
    for epoch in range(40):
        drawn = set(chain(*_shards(7, 3, True, epoch)))
        assert len(drawn) == 6
        left_out |= set(range(7)) - drawn
    assert left_out == set(range(7))


@given(st.integers(1, 60), st.integers(1, 9), st.sets(st.integers(0, 59)))
def test_what_is_done_is_left_out_and_moves_nothing(length: int, processes: int, indices: set[int]) -> None:
    done = {index for index in indices if index < length}
    for rank, shard in enumerate(_shards(length, processes, False)):
        sampler = EpochSampler(length, rank=rank, num_replicas=processes, training=False, done=done)
        remaining = [index for index in shard if index not in done]
        assert [index for _, index in sampler] == sampler.indices().tolist() == remaining
        assert len(sampler) == len(remaining)


# --- The user's augmentations: regions move with the pixels, samples stay a pure function of (seed, epoch, query id) ----------

MOVE = A.Affine(translate_percent=(-0.1, 0.1), p=1.0)
RANDOM = (A.HorizontalFlip(p=0.5), MOVE, A.RandomBrightnessContrast(p=1.0))


@pytest.fixture
def textured() -> LoadedImage:
    """A texture with the evidence at the top left and a distractor at the bottom right."""
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    evidence, distractor = np.zeros((2, 20, 30), dtype=bool)
    evidence[2:7, 3:9] = True
    distractor[12:19, 20:28] = True
    return LoadedImage(image, (evidence,), (distractor,), False)


def test_regions_move_with_the_pixels(textured: LoadedImage) -> None:
    flipped = Augmentation([A.HorizontalFlip(p=1.0)])(textured, 0)
    assert np.array_equal(flipped.image, np.flip(textured.image, 1))
    assert np.array_equal(flipped.evidence[0], np.flip(textured.evidence[0], 1))
    assert np.array_equal(flipped.distractors[0], np.flip(textured.distractors[0], 1))
    assert flipped.evidence[0].dtype == bool
    assert flipped.image.flags.c_contiguous
    alone = Augmentation([A.HorizontalFlip(p=1.0)])(textured._replace(evidence=(), distractors=()), 0)
    assert np.array_equal(alone.image, flipped.image)
    assert alone.evidence == alone.distractors == ()


def test_a_crop_that_loses_the_evidence_leaves_the_image_as_it_is(textured: LoadedImage) -> None:
    lost = Augmentation([A.Crop(15, 10, 30, 20)])(textured, 0)
    assert np.array_equal(lost.image, textured.image)
    assert np.array_equal(lost.evidence + lost.distractors, textured.evidence + textured.distractors)
    kept = Augmentation([A.Crop(0, 0, 15, 10)])(textured, 0)
    assert np.array_equal(kept.image, textured.image[:10, :15])
    assert np.array_equal(kept.evidence[0], textured.evidence[0][:10, :15])
    assert kept.distractors == (), "outside the crop"


def test_results_that_are_no_rgb_image_are_refused_by_name(textured: LoadedImage) -> None:
    bad = ((A.Normalize(), "float32"), (A.ToGray(1, p=1.0), r"\(20, 30"), (A.ToTensorV2(), "torch"))
    for transform, found in bad:
        with pytest.raises(DataError, match=rf"data\.augment: .*{type(transform).__name__}.*{found}"):
            Augmentation([A.HorizontalFlip(), transform])(textured, 0)


def test_perturbation_follows_the_augmentation() -> None:
    """The object moves with the flip, and its new place is perturbed."""
    policy = NoisePolicy(resolution="native", distractor_probability=0.0, kinds={"fade": 1.0})
    part = {"": EvalSplit(TRAIN, "every_level")}
    plain = PerturbedQueries(part, policy, None)
    flipped = PerturbedQueries(part, policy, None, augmentation=Augmentation([A.HorizontalFlip(p=1.0)]))
    index = next(i for i, query in enumerate(plain.queries) if query.id.endswith("@fade-0.5"))
    before, after = ((data[0, 0].image != data[0, index].image).any(-1) for data in (plain, flipped))
    moved = np.flip(before, 1)
    assert (moved & after).sum() > 0.9 * (moved | after).sum()


def test_epoch_and_query_decide_what_training_sees(model_folder: str, expected_epochs: list[Drawn]) -> None:
    settings: dict[str, Any] = {"augment": list(RANDOM)}
    first, second = (_epoch(_module(model_folder, **settings), epoch) for epoch in (0, 1))
    plain = expected_epochs[0]
    assert first.keys() == plain.keys()
    assert all(first[query][0] not in (second[query][0], plain[query][0]) for query in first)
    assert _epoch(_module(model_folder, **settings, batch_size=1), 0) == first
    assert _epoch(_module(model_folder, **settings, noise=NoisePolicy(seed=1)), 0) != first


def test_only_training_is_augmented(model_folder: str) -> None:
    other = DemoSource("test", scenes=1)
    splits: dict[str, Any] = {"validation": other, "test": {"": EvalSplit(other, "drawn")}}
    for split, stage in (("validation", "fit"), ("test", "test")):
        images = []
        for augment in (list(RANDOM), None):
            module = _module(model_folder, augment=augment, **splits)
            module.setup(stage)
            images.append([module.sets[split][0, i].image for i in range(3)])
        assert np.array_equal(*images)


def test_a_configuration_names_transforms_by_their_class(model_folder: str) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(PerturbedQueryDataModule, "data")
    flip = json.dumps([{"class_path": "albumentations.HorizontalFlip", "init_args": {"p": 0.25}}])
    parsed = parser.parse_args(["--data.processor", model_folder, "--data.augment", flip])
    [transform] = parser.instantiate_classes(parsed).data.augment
    assert (type(transform), transform.p) == (A.HorizontalFlip, 0.25)
