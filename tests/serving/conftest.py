"""An adapter of the demo, the demo with it merged, and evaluations of both."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vlm_calibration import cli
from vlm_calibration.data.dataset import EvalSplit
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.inference.model import DEMO_MODEL
from vlm_calibration.models.adapters import LoraSettings, attach_lora
from vlm_calibration.models.loading import BaseModel, load_base

from ..endpoint.conftest import evaluate as evaluate
from ..endpoint.test_evaluation import ESTIMATORS, Evaluate, lines, metrics


@pytest.fixture(scope="session")
def demo_adapter(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Function that writes a random adapter of some parts of the demo.

    Scales at which several answers differ from the base model's and all state a confidence: 0.16 for the language model alone, 0.12
    with the projector.
    """

    def write(*parts: Any, scale: float) -> str:
        folder = tmp_path_factory.mktemp("-".join(parts))
        torch.manual_seed(0)  # of the other half of the adapter
        lora = LoraSettings(r=8, alpha=8, parts=list(parts))
        model = attach_lora(load_base(BaseModel(str(DEMO_MODEL))), lora)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * scale
        model.save_pretrained(folder)
        return str(folder)

    return write


@pytest.fixture(scope="session")
def merged(demo_adapter: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The demo with an adapter of language model and projector merged into it, as `vlm-calibration export` writes it."""
    folder = str(tmp_path_factory.mktemp("served") / "merged")
    adapter = demo_adapter("language", "projector", scale=0.12)
    assert cli.main(["export", adapter, "--merge", "--out", folder]) == 0
    return folder


@pytest.fixture
def evaluate_served(evaluate: Evaluate, tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Function that evaluates a model in process and behind the address of its server on 48 queries.

    It checks that the files agree on all that is not read from token probabilities, and returns the folders of both systems.
    """

    def compared(folder: str, url: str, name: str) -> tuple[Path, Path]:
        test = {"": EvalSplit(DemoSource("test", scenes=16))}
        data = PerturbedQueryDataModule(folder, test=test, eval_batch_size=4, workers=0)
        settings = {"served": name, "base": BaseModel(folder), "with_base": True, "data": data}
        evaluate("run", f"{url}/v1", ESTIMATORS, **settings)
        local, served = tmp_path / "run/base", tmp_path / "run/endpoint"
        assert len(lines(local)) == 48
        assert _without_estimates(served) == _without_estimates(local)
        return local, served

    return compared


def _without_estimates(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The answers and metrics of a system, without those of further estimators.

    Texts are without an unfinished character at their end, of which servers send nothing.
    """
    answers = [
        {k: v for k, v in line.items() if k not in ("expected", "likelihood")} for line in lines(folder)
    ]
    for line in answers:
        for name in ("text", "predicted"):
            line[name] = re.sub(r"[\ufffd\s]+\Z", "", line[name] or "")
    return answers, {k: v for k, v in metrics(folder).items() if "@" not in k}
