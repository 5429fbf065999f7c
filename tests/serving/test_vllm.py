"""vLLM serves what is exported: the merged demo, and adapters as they are. Needs `tests/serving/setup`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Question
from .served import VLLM, ask_served, serving, vllm_serve

pytestmark = [
    pytest.mark.serving,
    pytest.mark.slow,
    pytest.mark.skipif(not VLLM.exists(), reason="vLLM is not installed: run tests/serving/setup"),
]
NAME = "calibrated"


def test_vllm_serves_the_merged_demo(
    merged: str, questions: list[Question], answered: Callable[..., list[str]], tmp_path: Path
) -> None:
    expected = answered(base=merged)
    with serving(vllm_serve(merged, "--served-model-name", NAME), tmp_path / "log") as url:
        assert [ask_served(url, NAME, q.image, q.prompt) for q in questions] == expected


def test_vllm_serves_an_adapter_of_the_language_model_as_it_is(
    demo_adapter: Callable[..., str],
    demo_model: str,
    questions: list[Question],
    answered: Callable[..., list[str]],
    tmp_path: Path,
) -> None:
    adapter = demo_adapter("language", scale=0.16)
    expected = answered(adapter=adapter)
    lora = ("--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"{NAME}={adapter}")
    with serving(vllm_serve(demo_model, *lora), tmp_path / "log") as url:
        assert [ask_served(url, NAME, q.image, q.prompt) for q in questions] == expected
