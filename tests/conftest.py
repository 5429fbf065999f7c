"""Fixtures of all tests: no network, one thread, a tiny model with random weights, adapters, and short trainings."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
import yaml
from hypothesis import settings

from .command_line import Arguments, Ended, Run, Server, callback, instance

if TYPE_CHECKING:
    from vlm_calibration.inference.model import CalibratedModel

torch.set_num_threads(1)
# An example may be slow on a busy machine.
settings.register_profile("tests", deadline=None, max_examples=30)
settings.load_profile("tests")

MARKS = {
    "server": pytest.mark.slow,
    "cluster": pytest.mark.nightly,
    "browser": pytest.mark.nightly,
    "cuda": pytest.mark.gpu,
}
"""Fixture -> marker of every test that uses it and is not marked `slow` itself. Other slow tests are marked where they are defined."""


def pytest_itemcollected(item: pytest.Item) -> None:
    for fixture, mark in MARKS.items():
        if fixture in getattr(item, "fixturenames", ()) and item.get_closest_marker("slow") is None:
            item.add_marker(mark)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With several test processes, start with the files that have most slow tests, so that all processes end at about the same time."""
    if hasattr(config, "workerinput"):
        slow = Counter(
            item.path
            for item in items
            if item.get_closest_marker("slow") and not item.get_closest_marker("nightly")
        )
        items.sort(key=lambda item: -slow[item.path])


OFFLINE = "callbacks/test_adapter callbacks/test_wandb_log reporting/test_dashboard test_cli test_quiet"
TOGETHER = {**dict.fromkeys(OFFLINE.split(), "offline_runs"), "slurm/": "cluster", "app/": "browser"}
"""Begin of the path of a test file below this folder -> the fixture that all such files share."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several test processes, one runs all tests of a file, and of files that are `TOGETHER`, so that fixtures are set up once."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0].removeprefix("tests/")
            return next((name for begin, name in TOGETHER.items() if file.startswith(begin)), file)

    return ByFile(config, log)


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return Path(__file__).parents[1]


@pytest.fixture(scope="session", autouse=True)
def no_test_touches_the_runs_of_the_checkout(root: Path) -> Iterator[None]:
    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (root / "runs").rglob("*")}

    before = files()
    yield
    assert files() == before


@pytest.fixture(scope="session")
def cuda() -> torch.device:
    """A CUDA GPU; skips the test without one."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU, and torch finds none")
    return torch.device("cuda")


@pytest.fixture(scope="session")
def easy_vqa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `tests.performance.easy_vqa` writes: a base model at full size (some minutes), and a tenth of the data to calibrate."""
    from .performance.easy_vqa import main

    folder = tmp_path_factory.mktemp("easy")
    main(["--out", str(folder), "--share", "0.1"])
    return folder


@pytest.fixture(scope="session")
def processor() -> Any:
    """The demo's processor: one token per percentage, 96 x 96 pixels, 64 image tokens."""
    from .demo.architecture import build_processor

    return build_processor()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, processor: Any) -> str:
    """Folder for `from_pretrained`: the demo's architecture with random weights, and its processor."""
    from .demo.architecture import build_model

    folder = tmp_path_factory.mktemp("model")
    model = build_model()
    with torch.no_grad():
        # At their usual scale, random weights give the same answer for every image.
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed_tokens" not in name:
                parameter.mul_(6.0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def ending_model(tmp_path_factory: pytest.TempPathFactory, model_folder: str) -> str:
    """A copy of `model_folder` in which any token ends an answer. Its own answers never end, and stage 2 does not rate such."""
    folder = tmp_path_factory.mktemp("ending") / "model"
    shutil.copytree(model_folder, folder)
    path = folder / "generation_config.json"
    vocabulary = json.loads((folder / "config.json").read_text(encoding="utf-8"))["text_config"]["vocab_size"]
    settings = {**json.loads(path.read_text(encoding="utf-8")), "eos_token_id": list(range(vocabulary))}
    path.write_text(json.dumps(settings), encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="session")
def load_model(model_folder: str) -> Callable[..., Any]:
    """Function that returns a fresh copy of `model_folder`, for tests that change the model."""
    from vlm_calibration.models.loading import BaseModel, load_base

    @cache
    def loaded(attn_implementation: str | None) -> Any:
        return load_base(BaseModel(model_folder, dtype="float32", attn_implementation=attn_implementation))

    def load(attn_implementation: str | None = None) -> Any:
        return deepcopy(loaded(attn_implementation))

    return load


@pytest.fixture(scope="session")
def new_adapter(
    tmp_path_factory: pytest.TempPathFactory, load_model: Callable[..., Any]
) -> Callable[..., str]:
    """Function that writes a LoRA adapter with random weights, B included, and returns its folder; `base`: not for `model_folder`."""
    from vlm_calibration.models.adapters import LoraSettings, attach_lora
    from vlm_calibration.models.loading import BaseModel, load_base

    def write(seed: int, base: str | None = None, scale: float = 0.1, **settings: Any) -> str:
        folder = tmp_path_factory.mktemp(f"adapter-{seed}")
        model = load_model() if base is None else load_base(BaseModel(base, dtype="float32"))
        model = attach_lora(model, LoraSettings(**{"r": 4, "alpha": 8, "dropout": 0.0, **settings}))
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * scale
        model.save_pretrained(folder)
        return str(folder)

    return write


@pytest.fixture(scope="session")
def server(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(root, tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture
def run(server: Server, tmp_path: Path) -> Run:
    """Function that runs the command line in `tmp_path`."""

    def ended(*arguments: str) -> Ended:
        return server.wait(server.start(list(arguments), tmp_path))

    return ended


@pytest.fixture
def run_each(server: Server, tmp_path: Path) -> Callable[..., tuple[Ended, Ended]]:
    """Function that runs the command line in `tmp_path` in two processes, which start as a cluster starts them, so that one may die alone.

    Returns how each of them ended. `run_plainly` starts them as Lightning does, which ends the second one where the first one fails.
    """

    def ended(*arguments: str) -> tuple[Ended, Ended]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "NODE_RANK": "0"}
        settings = [*arguments, "--trainer.devices", "2"]
        pids = [server.start(settings, tmp_path, {**place, "LOCAL_RANK": str(n)}) for n in (1, 0)]
        first, second = server.wait(pids[1]), server.wait(pids[0])
        # What `wait` reads is what was started last.
        out, err = ((server.folder / f"{server.started - 1}.{name}").read_text() for name in ("out", "err"))
        return first, Ended(second.status, out, err)

    return ended


@pytest.fixture
def run_two(run_each: Callable[..., tuple[Ended, Ended]]) -> Run:
    """As `run_each`; the status is that of the first process, and the output that of both."""

    def ended(*arguments: str) -> Ended:
        first, second = run_each(*arguments)
        return Ended(first.status, first.out + second.out, first.err + second.err)

    return ended


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Function that calls `main` in this process, in `tmp_path`: for mistakes, and for commands that train and evaluate nothing."""
    from vlm_calibration.cli import main

    monkeypatch.chdir(tmp_path)

    def ended(*arguments: str) -> Ended:
        capsys.readouterr()
        status = main(arguments)
        return Ended(status, *capsys.readouterr())

    return ended


@pytest.fixture(scope="session")
def offline_runs(root: Path, server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Short runs of both stages and of an evaluation, with the files of `configs/`: stage -> its `OfflineRun`."""
    from .wandb_log import run_stages

    return run_stages(root, server, tmp_path_factory.mktemp("offline"))


@pytest.fixture
def fit(root: Path, model_folder: str, ending_model: str, tmp_path: Path) -> Arguments:
    """Function that returns the arguments of a short training: a file of `configs/` and an overlay."""

    def arguments(stage: str = "sft", **sections: dict[str, Any]) -> list[str]:
        names = ("checkpoint.RunCheckpoint", "adapter.AdapterWriter", "predictions.PredictionWriter")
        base = {"name_or_path": ending_model if stage == "dpo" else model_folder}
        trainer = {"accelerator": "cpu", "logger": False, "callbacks": [*map(callback, names)]}
        trainer |= {"enable_progress_bar": False, "default_root_dir": str(tmp_path / "run")}
        sources = {"train": 100, "validation": 1}
        data: dict[str, Any] = {n: instance("demo.source.DemoSource", scenes=k) for n, k in sources.items()}
        data |= {"noise": {"levels": instance("perturbation.levels.LinearLevels")}, "max_length": 400}
        data |= {"teacher": None} if stage == "dpo" else {}
        overlay = {
            "trainer": {**trainer, "max_steps": 2, "max_epochs": None, **sections.get("trainer", {})},
            "model": {"init_args": {"base": base, "max_new_tokens": 3}},
            "data": {**data, "batch_size": 2, "workers": 1, **sections.get("data", {})},
        }
        path = tmp_path / f"{stage}-overlay.yaml"
        path.write_text(yaml.safe_dump(overlay), encoding="utf-8")
        return ["fit", "--config", str(root / "configs" / f"{stage}.yaml"), "--config", str(path)]

    return arguments


@pytest.fixture
def start(fit: Arguments, tmp_path: Path) -> Arguments:
    """Function that returns the arguments of a training in folder `name` that `disaster` ends: two epochs of seven batches.

    Stage "sft" trains with dropout. Stage "dpo" validates before training as well.
    """

    def arguments(
        name: str,
        *disaster: dict[str, Any],
        stage: str = "sft",
        every: int = 2,
        workers: int = 0,
        **trainer: Any,
    ) -> list[str]:
        callbacks = [
            *disaster,
            callback("checkpoint.RunCheckpoint", every_n_train_steps=every),
            *map(callback, ("nan_guard.NanGuard", "adapter.AdapterWriter", "predictions.PredictionWriter")),
            callback("results_table.ResultsTable"),
        ]
        settings = {"max_steps": -1, "max_epochs": 2, "callbacks": callbacks}
        settings["num_sanity_val_steps"] = -1 if stage == "dpo" else 0
        command = fit(
            stage,
            trainer={**settings, "default_root_dir": str(tmp_path / name), **trainer},
            data={"train": instance("demo.source.DemoSource", scenes=5), "workers": workers},
        )
        return [*command, *(["--model.init_args.lora.dropout", "0.2"] if stage == "sft" else [])]

    return arguments


@pytest.fixture(scope="session")
def adapter_run(tmp_path_factory: pytest.TempPathFactory, new_adapter: Callable[..., str]) -> Path:
    """A run directory with an adapter of the demo's model, with its processor and card, as training leaves it."""
    from vlm_calibration.data.module import PerturbedQueryDataModule
    from vlm_calibration.inference.model import DEMO_MODEL
    from vlm_calibration.reporting.card import EXAMPLE, Card, save_card

    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(new_adapter(0, str(DEMO_MODEL), 0.13, alpha=4), folder / "adapter")
    data = PerturbedQueryDataModule(str(DEMO_MODEL))
    data.processor.save_pretrained(folder / "adapter")
    card = Card(str(DEMO_MODEL), template=data.prompt.template, conversation=data.chat.render(EXAMPLE))
    save_card(folder / "adapter", card)
    return folder


@pytest.fixture(scope="session")
def calibrated(adapter_run: Path) -> CalibratedModel:
    from vlm_calibration.inference.model import load_calibrated

    return load_calibrated(adapter=adapter_run, device="cpu", max_new_tokens=16)
