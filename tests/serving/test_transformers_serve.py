"""`transformers serve` answers as the library does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Question
from .served import ask_served, serving, transformers_serve


@pytest.mark.slow
def test_transformers_serves_the_merged_demo(
    merged: str, questions: list[Question], answered: Callable[..., list[str]], tmp_path: Path
) -> None:
    expected = answered(base=merged)
    with serving(transformers_serve(merged), tmp_path / "log") as url:
        assert [ask_served(url, merged, q.image, q.prompt) for q in questions] == expected
