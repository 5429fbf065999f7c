"""An adapter of the demo, the demo with it merged, and questions that both are asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from vlm_calibration import cli, load_calibrated
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.models.adapters import LoraSettings, attach_lora
from vlm_calibration.models.loading import BaseModel, load_base
from vlm_calibration.text.prompts import ElicitationPrompt

QUESTIONS = 60


class Question(NamedTuple):
    """A question about the image of one scene.

    Attributes:
        image: uint8 [H, W, 3].
        text: the question.
        prompt: what a server is sent.
    """

    image: np.ndarray
    text: str
    prompt: str


@pytest.fixture(scope="session")
def demo_model(root: Path) -> str:
    return str(root / "src/vlm_calibration/demo/model")


@pytest.fixture(scope="session")
def questions() -> list[Question]:
    """One question about each of 60 scenes."""
    source = DemoSource("test", scenes=QUESTIONS)
    of_scene = {query.image: query for query in source.queries()}
    assert len(of_scene) == QUESTIONS
    prompt = ElicitationPrompt()
    return [
        Question(source.load(query).image, query.question, prompt.render(query.question))
        for query in of_scene.values()
    ]


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
def answered(demo_model: str, questions: Sequence[Question]) -> Callable[..., list[str]]:
    """Function that asks a merged model or an adapter in this process, and checks that its answers are not the base model's."""

    def texts(**which: str) -> list[str]:
        model = load_calibrated(**which, device="cpu")
        answers = list(model.ask_many((q.image, q.text) for q in questions))
        base = load_calibrated(demo_model, device="cpu")
        before = [answer.text for answer in base.ask_many((q.image, q.text) for q in questions)]
        assert [answer.text for answer in answers] != before
        assert all(answer.confidence is not None for answer in answers)
        return [answer.text for answer in answers]

    return texts


@pytest.fixture(scope="session")
def merged(demo_adapter: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The demo with an adapter of language model and projector merged into it, as `vlm-calibration export` writes it."""
    folder = str(tmp_path_factory.mktemp("served") / "merged")
    assert (
        cli.main(["export", demo_adapter("language", "projector", scale=0.12), "--merge", "--out", folder])
        == 0
    )
    return folder
