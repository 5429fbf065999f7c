"""The server over the demo's model, and evaluations of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vlm_calibration.callbacks.predictions import PredictionWriter
from vlm_calibration.data.dataset import EvalSplit
from vlm_calibration.data.module import PerturbedQueryDataModule, load_processor
from vlm_calibration.data.noise import NoisePolicy
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.endpoint.client import Endpoint
from vlm_calibration.inference.model import DEMO_MODEL
from vlm_calibration.models.loading import BaseModel, load_base
from vlm_calibration.stages.evaluation import EvaluationModule

from ..trainers import plain_trainer
from .demo_server import MODEL, DemoServer, serving


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("INITIAL_RETRY_DELAY", "MAX_RETRY_DELAY"):
        monkeypatch.setattr(f"openai._base_client.{name}", 0.02)


@pytest.fixture(scope="session")
def demo() -> Any:
    """The demo's base model, its processor, and what it has completed."""
    return load_base(BaseModel(str(DEMO_MODEL), dtype="float32")).eval(), load_processor(str(DEMO_MODEL)), {}


@pytest.fixture
def api(demo: Any) -> DemoServer:
    return DemoServer(*demo)


@pytest.fixture
def url(api: DemoServer) -> Iterator[str]:
    with serving(api) as address:
        yield address


@pytest.fixture
def evaluate(tmp_path: Path) -> Callable[..., EvaluationModule]:
    """Evaluates an address, by default of `DemoServer`, and the base model on request, on scenes of two parts into a folder."""

    def run(
        folder: str,
        url: str,
        estimators: Any = (),
        *,
        served: str = MODEL,
        start_over: bool = False,
        data: Any = None,
        **module: Any,
    ) -> EvaluationModule:
        endpoint = Endpoint(url, served, retries=module.pop("retries", 8))
        base = BaseModel(str(DEMO_MODEL), dtype="float32")
        settings = {"base": base, "with_base": False, "max_new_tokens": 16, **module}
        evaluated = EvaluationModule(
            estimators=list(estimators), endpoints={"endpoint": endpoint}, **settings
        )
        writer = PredictionWriter()
        writer.start_over = start_over
        trainer = plain_trainer(tmp_path / folder, writer)
        trainer.test(evaluated, datamodule=data or queries(), verbose=False)
        return evaluated

    return run


def queries(**settings: Any) -> PerturbedQueryDataModule:
    """Six queries about untouched scenes, and as many about perturbed ones."""
    source = DemoSource("test", scenes=2)
    return PerturbedQueryDataModule(
        settings.pop("processor", str(DEMO_MODEL)),
        test={"clean": EvalSplit(source), "perturbed": EvalSplit(source, "drawn")},
        noise=NoisePolicy(kinds={"noise": 1, "blur": 1}, distractor_probability=0.0),
        eval_batch_size=4,
        workers=0,
        **settings,
    )
