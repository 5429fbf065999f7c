"""Queries whose image and question fill the longest row, to measure what a step on them takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.data.sources.base import QuerySource
from vlm_calibration.records import DataError, LoadedImage, Query
from vlm_calibration.text.confidence import render_response

SIDE, SMALLEST = 2048, 32
"""Sides in pixels of an image without `data.max_pixels`, and of the smallest one that is tried."""
WORDS = 32
"""Words of which the tokens are counted."""


@dataclass(frozen=True)
class LongestQueries(QuerySource):
    """`n` copies of one yes/no question of so many words about an image of noise, with sides of `side` pixels."""

    n: int
    side: int
    words: int

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

    def tokens(self, data: PerturbedQueryDataModule) -> int:
        """Tokens of a row with its response, by the processor and the prompt of some data."""
        query = self.queries()[0]
        text = data.chat.render(query.question, render_response("Yes", 1.0))
        return int(data.chat.inputs([text], [self.load(query).image], "right")["input_ids"].shape[1])


def longest_queries(data: PerturbedQueryDataModule, tokens: int) -> LongestQueries:
    """The largest image that fits into a row of `tokens` tokens of some data, and text that fills the rest.

    Raises:
        DataError: even the smallest image takes more.
    """
    side = math.isqrt(data.max_pixels or SIDE**2)
    while (shortest := LongestQueries(1, side, 1).tokens(data)) > tokens:
        side = side * 7 // 8
        if side < SMALLEST:
            raise DataError(
                f"a row of {tokens} tokens is too short: an image and a question take {shortest}; raise --tokens or data.max_length"
            )
    of_a_word = (LongestQueries(1, side, 1 + WORDS).tokens(data) - shortest) / WORDS
    return LongestQueries(1, side, 1 + math.floor((tokens - shortest) / of_a_word))
