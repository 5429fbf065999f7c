"""Small data sets on disk and small samples in memory."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm_calibration.data.collate import ChatFormat
from vlm_calibration.data.noise import Sample
from vlm_calibration.data.sources.base import QuerySource, with_regions
from vlm_calibration.perturbation.levels import CLEAN
from vlm_calibration.records import DataError, LoadedImage, Query
from vlm_calibration.text.confidence import ElicitationPrompt

Samples = Sequence[Sample]


class Listed(QuerySource):
    """Given queries about grey images of `size` (height, width) with the regions of each; those with the ids `damaged` cannot be loaded."""

    def __init__(
        self, *queries: Query, size: tuple[int, int] = (10, 10), damaged: Sequence[str] = ()
    ) -> None:
        self.listed, self.size, self.damaged = queries, size, damaged

    def queries(self) -> Sequence[Query]:
        return self.listed

    def load(self, query: Query) -> LoadedImage:
        if query.id in self.damaged:
            raise DataError(f"record {query.id!r}: damaged")
        return with_regions(query, np.full((*self.size, 3), 128, dtype=np.uint8))


def record(identifier: str = "one", **changes: Any) -> dict[str, Any]:
    """A record about `a.png` with changed keys."""
    plain = {"image": "a.png", "question": "A dog?", "answer": "Yes", "answer_type": "yes_no"}
    return {"id": identifier, **plain, **changes}


@contextmanager
def refused(begin: str, *parts: str) -> Iterator[pytest.ExceptionInfo[DataError]]:
    """Check that the block ends in a DataError of one line that begins with `begin` and holds each of `parts`."""
    with pytest.raises(DataError) as caught:
        yield caught
    message = str(caught.value)
    assert message.startswith(begin)
    assert all(part in message for part in parts), message
    assert "\n" not in message


def pattern(seed: int) -> Image.Image:
    """An image of 64 x 48 pixels that no other seed's resembles."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((64, 48), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str = "PNG", **settings: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


Write = Callable[..., Path]


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Write:
    """Write `data/queries.jsonl` and `data/a.png` (20 x 10 pixels); lines may be objects, text or bytes."""
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (20, 10), "red").save(folder / "a.png")

    def write(*lines: Any) -> Path:
        path = folder / "queries.jsonl"
        with path.open("wb") as file:
            for line in lines:
                text = line if isinstance(line, str | bytes) else json.dumps(line, ensure_ascii=False)
                file.write((text.encode() if isinstance(text, str) else text) + b"\n")
        return path

    return write


@pytest.fixture(scope="session")
def samples() -> Samples:
    """Four samples of different length, kind and confidence; the last image is not square."""
    rows: tuple[tuple[str, str, Any, float], ...] = (
        ("Is there a dog in the image?", "Yes", "yes_no", 1.0),
        ("What is at the top left?", "umbrella", "short", 0.3),
        ("Do you see an elephant?", "No", "yes_no", 0.0),
        ("Describe, in a few words of your own, what you see.", "A cat, (or two!)", "open", 0.85),
    )
    rng = np.random.default_rng(0)
    sizes = [(96, 96), (96, 96), (96, 96), (60, 132)]
    return [
        Sample(Query(f"q{i}", "x", q, a, kind), rng.integers(0, 256, (*size, 3), dtype=np.uint8), c, CLEAN, 0)
        for i, ((q, a, kind, c), size) in enumerate(zip(rows, sizes, strict=True))
    ]


@pytest.fixture(scope="session")
def digit_processor() -> Any:
    """The demo's processor with a tokenizer that splits numbers into digits, so responses differ in length."""
    from ..demo.architecture import build_processor

    return build_processor(digits=True)


@pytest.fixture(scope="session", params=["one token a percentage", "digit by digit"])
def chat(request: pytest.FixtureRequest, processor: Any, digit_processor: Any) -> ChatFormat:
    """Conversations with two kinds of tokenizer: the demo's, and one with which responses differ in length."""
    plain = request.param == "one token a percentage"
    return ChatFormat(processor if plain else digit_processor, ElicitationPrompt())
