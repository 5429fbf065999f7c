"""Servers answer an evaluation as the model itself does. vLLM needs `tests/serving/setup`, and also serves adapters as they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from vlm_calibration import load_calibrated
from vlm_calibration.inference.model import DEMO_MODEL

from ..endpoint.test_evaluation import lines, metrics
from .served import VLLM, ask_served, questions, save_qwen, serving, transformers_serve, vllm_serve

pytestmark = pytest.mark.slow
NAME = "calibrated"


def with_vllm(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that starts vLLM."""
    skip = pytest.mark.skipif(not VLLM.exists(), reason="vLLM is not installed: run tests/serving/setup")
    return pytest.mark.serving(pytest.mark.nightly(skip(test)))


def test_transformers_serves_the_merged_demo(
    merged: str, evaluate_served: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    with serving(transformers_serve(merged), tmp_path / "log") as url:
        _, served = evaluate_served(merged, url, merged)
    assert json.loads((served / "notes.json").read_text()) == dict.fromkeys(
        ("expected", "likelihood"), "the server gives no log-probabilities (logprobs)"
    )
    assert {(line["expected"], line["likelihood"]) for line in lines(served)} == {(None, None)}
    assert metrics(served)["ece@expected"] is None


@with_vllm
def test_vllm_serves_the_merged_demo(
    merged: str, evaluate_served: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    with serving(vllm_serve(merged, "--served-model-name", NAME), tmp_path / "log") as url:
        local, served = evaluate_served(merged, url, NAME)
    assert not (served / "notes.json").exists()
    for mine, its in zip(lines(local), lines(served), strict=True):
        assert its["likelihood"] == pytest.approx(mine["likelihood"], abs=1e-5)
        if mine["answer_type"] == "yes_no":
            assert its["expected"] == pytest.approx(mine["expected"], abs=5e-4)
        elif "%" in mine["text"]:
            # After a short answer the random adapter often continues "100" with a full stop: the local value counts what follows.
            assert its["expected"] == pytest.approx(mine["expected"], abs=0.05)
        else:
            assert its["expected"] is None


@with_vllm
def test_vllm_serves_a_random_qwen(evaluate_served: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    folder = save_qwen(tmp_path / "qwen")
    with serving(vllm_serve(folder, "--served-model-name", NAME), tmp_path / "log") as url:
        evaluate_served(folder, url, NAME)


@with_vllm
def test_vllm_serves_an_adapter_of_the_language_model_as_it_is(
    demo_adapter: Callable[..., str], tmp_path: Path
) -> None:
    adapter, asked = demo_adapter("language", scale=0.16), questions(60)
    expected, base = (
        list(load_calibrated(**model, device="cpu").ask_many((q.image, q.text) for q in asked))
        for model in ({"adapter": adapter}, {"base": str(DEMO_MODEL)})
    )
    texts = [answer.text for answer in expected]
    assert texts != [answer.text for answer in base]
    assert all(answer.confidence is not None for answer in expected)
    lora = ("--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"{NAME}={adapter}")
    with serving(vllm_serve(str(DEMO_MODEL), *lora), tmp_path / "log") as url:
        assert [ask_served(url, NAME, q.image, q.prompt) for q in asked] == texts
