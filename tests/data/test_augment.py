"""The user's augmentations: regions move with the pixels, samples stay a pure function of (seed, epoch, query id)."""

from __future__ import annotations

import json
from typing import Any

import albumentations as A
import numpy as np
import pytest
from jsonargparse import ArgumentParser

from vlm_calibration.data.augment import Augmentation
from vlm_calibration.data.dataset import EvalSplit, PerturbedQueries
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.data.noise import NoisePolicy
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.records import DataError, LoadedImage

RANDOM = (
    A.HorizontalFlip(p=0.5),
    A.Affine(translate_percent=(-0.1, 0.1), p=1.0),
    A.RandomBrightnessContrast(p=1.0),
)
SOURCE = DemoSource("train", scenes=3)


@pytest.fixture
def loaded() -> LoadedImage:
    """A texture with the evidence at the top left and a distractor at the bottom right."""
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    evidence, distractor = np.zeros((2, 20, 30), dtype=bool)
    evidence[2:7, 3:9] = True
    distractor[12:19, 20:28] = True
    return LoadedImage(image, (evidence,), (distractor,), False)


def _equal(a: LoadedImage, b: LoadedImage) -> bool:
    masks = ((*a.evidence, *a.distractors), (*b.evidence, *b.distractors))
    return np.array_equal(a.image, b.image) and all(map(np.array_equal, *masks))


def test_regions_move_with_the_pixels(loaded: LoadedImage) -> None:
    flipped = Augmentation([A.HorizontalFlip(p=1.0)])(loaded, 0)
    assert np.array_equal(flipped.image, np.flip(loaded.image, 1))
    assert np.array_equal(flipped.evidence[0], np.flip(loaded.evidence[0], 1))
    assert np.array_equal(flipped.distractors[0], np.flip(loaded.distractors[0], 1))
    assert flipped.evidence[0].dtype == bool
    assert flipped.image.flags.c_contiguous
    alone = Augmentation([A.HorizontalFlip(p=1.0)])(loaded._replace(evidence=(), distractors=()), 0)
    assert np.array_equal(alone.image, flipped.image)
    assert alone.evidence == alone.distractors == ()


def test_a_crop_that_loses_the_evidence_leaves_the_image_as_it_is(loaded: LoadedImage) -> None:
    lost = Augmentation([A.Crop(15, 10, 30, 20)])(loaded, 0)
    assert _equal(lost, loaded)
    kept = Augmentation([A.Crop(0, 0, 15, 10)])(loaded, 0)
    assert np.array_equal(kept.image, loaded.image[:10, :15])
    assert np.array_equal(kept.evidence[0], loaded.evidence[0][:10, :15])
    assert kept.distractors == (), "outside the crop"


def test_results_that_are_no_rgb_image_are_refused_by_name(loaded: LoadedImage) -> None:
    for transform, found in (
        (A.Normalize(), "float32"),
        (A.ToGray(1, p=1.0), r"\(20, 30"),
        (A.ToTensorV2(), "torch"),
    ):
        with pytest.raises(DataError, match=rf"data\.augment: .*{type(transform).__name__}.*{found}"):
            Augmentation([A.HorizontalFlip(), transform])(loaded, 0)


# --- In the data module -------------------------------------------------------------------------------------------


def _samples(folder: str, epoch: int, **settings: Any) -> dict[str, bytes]:
    """Query id -> its pixels, in an epoch of training."""
    plain: dict[str, Any] = {"train": SOURCE, "batch_size": 3, "workers": 0, "max_length": 300}
    module = PerturbedQueryDataModule(folder, **{**plain, "augment": list(RANDOM), **settings})
    module.setup("fit")
    loader = module.train_dataloader()
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    return {
        query.id: pixels.numpy().tobytes()
        for batch in loader
        for query, pixels in zip(batch.queries, batch.inputs["pixel_values"], strict=True)
    }


def test_epoch_and_query_decide_what_training_sees(model_folder: str) -> None:
    first, second = (_samples(model_folder, epoch) for epoch in (0, 1))
    plain = _samples(model_folder, 0, augment=None)
    assert len(first) == 9
    assert all(first[query] != second[query] and first[query] != plain[query] for query in first)
    assert _samples(model_folder, 0, batch_size=1) == first
    assert _samples(model_folder, 0, noise=NoisePolicy(seed=1)) != first


def test_perturbation_follows_the_augmentation() -> None:
    """The object moves with the flip, and its new place is perturbed."""
    policy = NoisePolicy(resolution="native", distractor_probability=0.0, kinds={"fade": 1.0})
    part = {"": EvalSplit(SOURCE, "every_level")}
    plain = PerturbedQueries(part, policy, None)
    flipped = PerturbedQueries(part, policy, None, augmentation=Augmentation([A.HorizontalFlip(p=1.0)]))
    index = next(i for i, query in enumerate(plain.queries) if query.id.endswith("@fade-0.5"))
    changed, changed_flipped = (
        (data[0, 0].image != data[0, index].image).any(-1) for data in (plain, flipped)
    )
    overlap = (np.flip(changed, 1) & changed_flipped).sum() / (np.flip(changed, 1) | changed_flipped).sum()
    assert overlap > 0.9


def test_only_training_is_augmented(model_folder: str) -> None:
    other = DemoSource("test", scenes=1)
    for split, stage, source in (
        ("validation", "fit", other),
        ("test", "test", {"": EvalSplit(other, "drawn")}),
    ):
        settings: dict[str, Any] = {"train": SOURCE, split: source}
        images = []
        for augment in (list(RANDOM), None):
            module = PerturbedQueryDataModule(model_folder, augment=augment, **settings)
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
