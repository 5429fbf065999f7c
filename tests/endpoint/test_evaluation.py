"""An endpoint is a system like any other: equal answers and metrics, whatever the server does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlm_calibration.estimators.consistency import SelfConsistency
from vlm_calibration.estimators.likelihood import AnswerLikelihood
from vlm_calibration.estimators.p_true import PTrue
from vlm_calibration.estimators.verbal import ExpectedConfidence
from vlm_calibration.perturbation.levels import LinearLevels

from .demo_server import DemoServer

pytestmark = pytest.mark.slow
Evaluate = Callable[..., Any]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def test_an_endpoint_beside_its_own_model(evaluate: Evaluate, url: str, tmp_path: Path) -> None:
    estimators = [ExpectedConfidence([LinearLevels()]), AnswerLikelihood()]
    evaluate("run", url, estimators, with_base=True)
    local, remote = tmp_path / "run/base", tmp_path / "run/endpoint"
    assert len(lines(local)) == 24
    approximate = ("expected", "likelihood")
    for mine, served in zip(lines(local), lines(remote), strict=True):
        for name in approximate:
            print(mine["text"], served["text"], mine[name], served[name])
    for mine, served in zip(lines(local), lines(remote), strict=True):
        for name in approximate:
            assert served.pop(name) == pytest.approx(mine.pop(name), abs=0.02)
        assert served == mine
    exact = {k: v for k, v in metrics(local).items() if "@" not in k}
    assert {k: v for k, v in metrics(remote).items() if "@" not in k} == exact
