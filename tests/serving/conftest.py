"""An adapter of the demo, the demo with it merged, and evaluations of both."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vlm_calibration import cli
from vlm_calibration.models.adapters import LoraSettings, attach_lora
from vlm_calibration.models.loading import BaseModel, load_base

from ..command_line import Server, write_evaluation
from ..endpoint.test_evaluation import lines, metrics

SCENES, TOKENS = 16, 16
"""Of an evaluation: its scenes, of three queries each, and the length limit of an answer."""


@pytest.fixture(scope="session")
def demo_model(root: Path) -> str:
    return str(root / "src/vlm_calibration/demo/model")


@pytest.fixture(scope="session")
def demo_adapter(demo_model: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Function that writes a random adapter of some parts of the demo.

    Scales at which several answers differ from the base model's and all state a confidence: 0.16 for the language model alone, 0.12
    with the projector.
    """

    def write(*parts: Any, scale: float) -> str:
        folder = tmp_path_factory.mktemp("-".join(parts))
        torch.manual_seed(0)  # of the other half of the adapter
        model = attach_lora(load_base(BaseModel(demo_model)), LoraSettings(r=8, alpha=8, parts=list(parts)))
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
def evaluate(server: Server, tmp_path: Path) -> Callable[..., Path]:
    """Function that runs `vlm-calibration test` on 48 queries; returns the run directory.

    Its arguments say which model, as those of the command line do.
    """
    kinds = ("verbal.ExpectedConfidence", "likelihood.AnswerLikelihood")
    estimators = [{"class_path": f"vlm_calibration.estimators.{kind}"} for kind in kinds]
    settings = {"max_new_tokens": TOKENS, "estimators": estimators}
    command = write_evaluation(tmp_path / "eval.yaml", "${runs}", SCENES, **settings)

    def run(name: str, *which: str) -> Path:
        ended = server.wait(server.start([*command, *which, "--runs", name], tmp_path))
        assert ended.status == 0, ended.err
        return tmp_path / name

    return run


@pytest.fixture
def evaluate_served(evaluate: Callable[..., Path]) -> Callable[..., tuple[Path, Path]]:
    """Function that evaluates a model in process and behind the address of its server.

    It checks that the files agree on all that is not read from token probabilities, and returns the folders of both systems.
    """

    def compared(folder: str, url: str, name: str) -> tuple[Path, Path]:
        local = evaluate("local", "--model.init_args.base.name_or_path", folder) / "base"
        address = ("--config", "system/endpoint", "--url", f"{url}/v1", "--served-model", name)
        served = evaluate("served", *address) / "endpoint"
        texts, exact = zip(*(_without_estimates(folder) for folder in (local, served)), strict=True)
        assert len(texts[0]) == 3 * SCENES
        assert texts[1] == texts[0]
        assert exact[1] == exact[0]
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
