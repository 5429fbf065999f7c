"""Queries whose image and question fill the longest row, to measure what a step on them takes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.data.sources.base import QuerySource
from vlm_calibration.records import DataError, LoadedImage, Query
from vlm_calibration.text.confidence import render_response

SIDE, SMALLEST = 2048, 32
"""Sides in pixels of an image without `data.max_pixels`, and of the smallest one that is tried."""
WORDS = 32
"""Words of which the tokens are counted."""


class LongestQueries(QuerySource):
    """Copies of one yes/no question about an image of noise.

    Args:
        n: number of queries.
        side: of the image, in pixels.
        words: of the question.
    """

    def __init__(self, n: int, side: int, words: int) -> None:
        self.n, self.side, self.words = n, side, words

    def queries(self) -> Sequence[Query]:
        question = " ".join(["dog"] * self.words)
        return [Query(str(i), "noise", question, "Yes", "yes_no", objects=("dog",)) for i in range(self.n)]

    def labels(self, query: Query) -> Sequence[str]:
        return ["dog"]

    def load(self, query: Query) -> LoadedImage:
        image = np.random.default_rng(0).integers(0, 256, (self.side, self.side, 3), np.uint8)
        mask = np.zeros(image.shape[:2], bool)
        mask[: self.side // 2, : self.side // 2] = True
        return LoadedImage(image, (mask,), ())

    def image_digest(self, query: Query) -> str:
        return query.image


def longest_queries(data: PerturbedQueryDataModule, n: int, tokens: int) -> LongestQueries:
    """Queries that with their response take `tokens` tokens: the largest image that fits, and text.

    Args:
        data: whose processor, prompt and `max_pixels` apply.
        n: number of queries.
        tokens: of a row.

    Raises:
        DataError: even the smallest image takes more.
    """

    def length(words: int) -> int:
        source = LongestQueries(1, side, words)
        [query] = source.queries()
        text = data.chat.render(query.question, render_response("Yes", 1.0))
        return int(data.chat.inputs([text], [source.load(query).image], "right")["input_ids"].shape[1])

    side = math.isqrt(data.max_pixels or SIDE**2)
    while (shortest := length(1)) > tokens:
        side = side * 7 // 8
        if side < SMALLEST:
            raise DataError(
                f"a row of {tokens} tokens is too short: an image and a question take {shortest}; raise --tokens or data.max_length"
            )
    of_a_word = (length(1 + WORDS) - shortest) / WORDS
    return LongestQueries(n, side, 1 + math.floor((tokens - shortest) / of_a_word))
