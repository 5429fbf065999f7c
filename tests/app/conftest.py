"""One server of the page for all tests, and visits to it in a real browser.

A user's adapter is trained for it, briefly and on two levels of noise alone: 100% confidence without noise, 0% on noise.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from vlm_calibration.commands.report import report
from vlm_calibration.inference.model import DEMO_MODEL, CalibratedModel, load_calibrated

from ..command_line import Server
from .browser import CHROMIUM, FLAGS, App, Visit, missing


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of the browser; without it the tests fail for root, who can install it, and are skipped for others."""
    if why := missing():
        (pytest.fail if os.geteuid() == 0 else pytest.skip)(f"THE WEB PAGE IS NOT TESTED: {why}")
    return CHROMIUM


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    """A browser with a new profile. While it is open, no other test may start an event loop."""
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
        yield started
        started.close()


@pytest.fixture(scope="session")
def trained_run(root: Path, server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    settings = {
        "trainer.max_steps": 50,
        "trainer.default_root_dir": str(folder),
        "trainer.logger": False,
        "trainer.limit_val_batches": 0,
        "trainer.enable_progress_bar": False,
        "trainer.callbacks": [{"class_path": "vlm_calibration.callbacks.adapter.AdapterWriter"}],
        "model.init_args.base.name_or_path": str(DEMO_MODEL),
        "model.init_args.optimizer.lr": 3e-3,
        "model.init_args.answer_weight": "constant",
        "model.init_args.confidence_weight": 3,
        "data.workers": 0,
        "data.train.init_args": {"split": "train", "scenes": 2700, "hard": 0},
        "data.noise.kinds": {"noise": 1},
        "data.noise.clean_fraction": 0,
        "data.noise.absent": "skip",
        "data.noise.wrong_answer_rate": 0,
        "data.noise.levels": {
            "class_path": "vlm_calibration.perturbation.levels.LinearLevels",
            "init_args": {"n_levels": 2},
        },
    }
    options = [
        word for name, value in settings.items() for word in (f"--{name}", json.dumps(value).strip('"'))
    ]
    ended = server.wait(server.start(["fit", "--config", str(root / "configs/sft.yaml"), *options], root))
    assert ended.status == 0, ended.err
    return folder


@pytest.fixture(scope="session")
def model(trained_run: Path) -> CalibratedModel:
    """The page's model, to ask without the page."""
    return load_calibrated(adapter=trained_run, device="cpu")


@pytest.fixture(scope="session")
def report_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    for name, confidence in (("base", 1.0), ("sft", 0.6)):
        rows = [
            {
                "id": f"{i}",
                "question": f"Is there a cow in picture {i}?",
                "answer": "Yes" if i % 5 < 3 else "No",
                "text": f"Yes. Confidence: {confidence:.0%}",
                "predicted": "yes",
                "confidence": confidence,
                "correct": i % 5 < 3,
                "category": None,
                "noise_step": None,
                "answer_type": "yes_no",
            }
            for i in range(40)
        ]
        (folder / name).mkdir()
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name / "predictions.jsonl").write_text(lines)
    report([str(folder)], images=False, replicates=10)
    return folder / "report.html"


@pytest.fixture(scope="session")
def app(
    chromium: str, trained_run: Path, report_page: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[App]:
    arguments = ("--adapter", str(trained_run), "--report", str(report_page), "--device", "cpu")
    started = App(tmp_path_factory.mktemp("app"), arguments)
    try:
        started.wait()
        yield started
        status = started.interrupt()
        assert (status, started.errors.read_text()) == (0, ""), "the server exits without errors"
        assert started.files() == [], "uploads are deleted on exit"
    finally:
        started.process.kill()


@pytest.fixture
def visits(browser: Browser, app: App) -> Iterator[Callable[..., Visit]]:
    """Opens visits, each in a browser profile of its own; none may have errors, or contact another host."""
    begun: list[Visit] = []

    def visit(**size: int) -> Visit:
        begun.append(Visit(browser, app.address, **size))
        return begun[-1]

    yield visit
    for visit_ in begun:
        visit_.close()
    assert [v.complaints for v in begun] == [[]] * len(begun)
    assert {host for v in begun for host in v.hosts} == {app.address}


@pytest.fixture
def visit(visits: Callable[..., Visit]) -> Visit:
    return visits()


@pytest.fixture
def photograph(tmp_path: Path) -> Path:
    """An image that is not from the demo: a red disc on a gradient of greys, wider than high."""
    y, x = np.mgrid[:180, :300]
    pixels = np.repeat((x * 255 // 300)[..., None], 3, axis=2).astype(np.uint8)
    pixels[(y - 90) ** 2 + (x - 220) ** 2 < 40**2] = (220, 30, 30)
    path = tmp_path / "photograph.png"
    Image.fromarray(pixels).save(path)
    return path
