"""The shape of a perturbed region does not tell the answer: objects that are there and that are not get the same shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy.stats import chi2_contingency

from vlm_calibration.data.dataset import EvalSplit, PerturbedQueries
from vlm_calibration.data.noise import NoisePolicy
from vlm_calibration.perturbation.masks import bounding_box, mask_to_rle
from vlm_calibration.records import DataError, Query, Region

from ..level_tables import OnlyAt
from .conftest import Listed

SIZE = 48


def _region(label: str, height: int, width: int, *, outlined: bool) -> Region:
    """A triangle, or without an outline its box."""
    mask = np.zeros((SIZE, SIZE), dtype=bool)
    mask[5 : 5 + height, 8 : 8 + width] = np.tri(height, width, dtype=bool)
    return Region(label, (8, 5, 8 + width, 5 + height), mask_to_rle(mask) if outlined else None)


def located(outlined: Sequence[bool], others: bool) -> list[Query]:
    """As many yes as no about existence; only what is there has a region of its own, triangles of five sizes.

    Args:
        outlined: for each size, whether its regions have masks.
        others: whether every image has a box of another object as well.
    """
    cats = (_region("cat", 21, 3, outlined=False),) if others else ()
    queries = []
    for i, has_mask in enumerate(outlined):
        dog = _region("dog", 4 + 3 * i, 12 - i, outlined=has_mask)
        queries += [
            Query(f"yes {i}", "x", "Is there a dog?", "Yes", "yes_no", ("dog",), (dog, *cats)),
            Query(f"no {i}", "x", "Is there a dog?", "No", "yes_no", ("dog",), cats),
            Query(f"red {i}", "x", "What colour is it?", "red", "short", ("sky",), (_sky(i),)),
        ]
    return queries


def _dataset(
    queries: Sequence[Query],
    noise: Any = "drawn",
    damaged: Sequence[str] = (),
    rule: Any = "raise",
    **policy: Any,
) -> PerturbedQueries:
    source = Listed(*queries, size=(SIZE, SIZE), damaged=damaged)
    source.on_bad_record = rule
    settings = NoisePolicy(levels=OnlyAt(), resolution="native", **policy)
    return PerturbedQueries({"": EvalSplit(source, noise)}, settings, None)


def _sky(i: int) -> Region:
    """A region of what no question about existence asks for."""
    return _region("sky", 2, 30 + i, outlined=False)


@pytest.mark.parametrize("noise", ["drawn", "every_level"])
@pytest.mark.parametrize(
    "outlined", [[True] * 5, [False] * 5, [True, False] * 2 + [True]], ids=["masks", "boxes", "both"]
)
@pytest.mark.parametrize("others", [False, True], ids=["alone", "with other objects"])
def test_both_answers_get_regions_of_one_distribution(outlined: list[bool], others: bool, noise: Any) -> None:
    dataset = _dataset(located(outlined, others), noise, distractor_probability=0.4)
    shapes: dict[str, Counter[tuple[tuple[int, ...], bytes]]] = {"Yes": Counter(), "No": Counter()}
    for epoch in range(60):
        for index, query in enumerate(dataset.queries):
            if query.answer_type == "yes_no" and not query.id.endswith("@0"):
                changed = (dataset[epoch, index].image != 128).any(axis=-1)
                shape = changed[bounding_box(changed).slices]
                shapes[query.answer][shape.shape, shape.tobytes()] += 1
    assert set(shapes["Yes"]) == set(shapes["No"])
    assert len(shapes["No"]) == 5
    table = [[shapes[answer][shape] for shape in shapes["Yes"]] for answer in ("Yes", "No")]
    assert chi2_contingency(table).pvalue > 1e-3


def test_without_a_shape_to_give_boxes_are_perturbed_and_the_run_says_so() -> None:
    absent = [query for query in located([True] * 5, True) if query.answer == "No"]
    with pytest.warns(UserWarning, match=r"data: .*shape those of 5 absent objects could have.*random boxes"):
        dataset = _dataset(absent)
    changed = (dataset[0, 0].image != 128).any(axis=-1)
    assert changed[bounding_box(changed).slices].all()


@pytest.mark.parametrize("rule", ["raise", "skip"])
def test_a_shape_comes_from_an_image_that_can_be_loaded(rule: Any) -> None:
    dataset = _dataset(located([True] * 5, False), damaged=[f"yes {i}" for i in range(4)], rule=rule)
    keys = [
        (epoch, i) for epoch in range(5) for i, query in enumerate(dataset.queries) if query.answer == "No"
    ]
    if rule == "raise":
        with pytest.raises(DataError, match="damaged"):
            dataset.__getitems__(keys)
    else:
        for sample in dataset.__getitems__(keys).samples:
            assert (sample.image != 128).any(axis=-1).sum() == np.tri(16, 8).sum()
