"""Queries of several parts as one dataset: names, steps, who is left out, and errors that name the record."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from vlm_calibration.data.dataset import Part, PerturbedQueries
from vlm_calibration.data.noise import NoisePolicy
from vlm_calibration.data.sources.base import QuerySource
from vlm_calibration.perturbation.levels import LinearLevels
from vlm_calibration.records import DataError, LoadedImage, Query, Region

POLICY = NoisePolicy(resolution="native", distractor_probability=0.0)


class Square(QuerySource):
    """Two queries over one grey image: about the dog that is in it, and about a cat that is not."""

    def queries(self) -> Sequence[Query]:
        regions = (Region("dog", (2, 2, 8, 8)),)
        return [
            Query("dog", "x", "A dog?", "Yes", "yes_no", ("dog",), regions, "existence"),
            Query("cat", "x", "A cat?", "No", "yes_no", ("cat",), regions),
        ]

    def load(self, query: Query) -> LoadedImage:
        mask = np.zeros((10, 10), dtype=bool)
        mask[2:8, 2:8] = True
        evidence, others = ((mask,), ()) if query.objects == ("dog",) else ((), (mask,))
        return LoadedImage(np.full((10, 10, 3), 128, dtype=np.uint8), evidence, others)


def _dataset(policy: NoisePolicy = POLICY, **parts: Part) -> PerturbedQueries:
    return PerturbedQueries(parts or {"": Part(Square(), "drawn")}, policy, None)


def test_parts_get_names_and_one_part_none() -> None:
    dataset = _dataset(clean=Part(Square()), noised=Part(Square(), "drawn"))
    assert [q.id for q in dataset.queries] == ["clean:dog", "clean:cat", "noised:dog", "noised:cat"]
    assert [q.category for q in dataset.queries] == ["clean/existence", "clean", "noised/existence", "noised"]
    assert [(q.id, q.category) for q in _dataset().queries] == [("dog", "existence"), ("cat", None)]


def test_a_clean_part_stays_clean_and_states_the_clean_confidence() -> None:
    dataset = _dataset(clean=Part(Square()))
    for epoch in range(5):
        sample = dataset[epoch, 0]
        assert (sample.image == 128).all()
        assert (sample.step, sample.confidence) == (0, 1.0)


def test_every_step_asks_each_query_at_each_step() -> None:
    dataset = _dataset(sweep=Part(Square(), "every_step"))
    steps = LinearLevels().steps
    assert len(dataset) == 2 * len(steps)
    assert [q.id for q in dataset.queries[:3]] == ["sweep:dog@0", "sweep:dog@100", "sweep:dog@200"]
    samples = [dataset[0, i] for i in range(len(dataset))]
    assert [s.step for s in samples] == [*steps, *steps]
    assert len({q.id for q in dataset.queries}) == len(dataset)


def test_the_same_query_in_two_parts_gets_different_noise() -> None:
    policy = NoisePolicy(resolution="native", level_weights=[0] * 10 + [1])
    dataset = _dataset(policy, one=Part(Square(), "drawn"), two=Part(Square(), "drawn"))
    assert not np.array_equal(dataset[0, 0].image, dataset[0, 2].image)


def test_skip_leaves_out_what_has_no_evidence() -> None:
    dataset = _dataset(NoisePolicy(resolution="native", absent="skip"))
    assert [q.id for q in dataset.queries] == ["dog"]


def test_nothing_left_is_an_error() -> None:
    class Absent(Square):
        def queries(self) -> Sequence[Query]:
            return super().queries()[1:]

    with pytest.raises(DataError, match="no query is left"):
        _dataset(NoisePolicy(resolution="native", absent="skip"), some=Part(Absent(), "drawn"))


def test_an_error_names_the_record() -> None:
    class Wrong(Square):
        def load(self, query: Query) -> LoadedImage:
            return super().load(query)._replace(evidence=(np.zeros((10, 10), dtype=bool),))

    with pytest.raises(DataError, match=r"record 'bad:dog': region mask is empty"):
        _dataset(bad=Part(Wrong(), "drawn"))[0, 0]
