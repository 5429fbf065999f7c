"""The adapter folder is replaced at once; the program on its card gives our answers with peft alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from peft import PeftConfig, PeftModel
from PIL import Image
from safetensors.torch import load_file

from vlm_calibration.callbacks.adapter import AdapterWriter, shown_path
from vlm_calibration.data.collate import PromptCollator
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.data.noise import NoisePolicy, Sample
from vlm_calibration.demo.scenes import render_scene
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.estimators.answer_scoring import AnswerTokenizer
from vlm_calibration.estimators.base import AnsweredBatch
from vlm_calibration.models.adapters import LoraSettings, attach_lora
from vlm_calibration.models.base import DEMO_MODEL, adapter_digest
from vlm_calibration.models.loading import BaseModel, load_base
from vlm_calibration.perturbation.levels import CLEAN
from vlm_calibration.records import DataError, Query
from vlm_calibration.reporting.card import EXAMPLE, card_text, load_card
from vlm_calibration.reporting.report.summary import read_evaluation
from vlm_calibration.reporting.runs import RunRecord
from vlm_calibration.stages.sft import SFTModule
from vlm_calibration.stages.training import OptimizerSettings
from vlm_calibration.text.confidence import strip_confidence
from vlm_calibration.text.grading import Grading

from ..command_line import LIMIT, Patch
from ..level_tables import measured, noise_counts
from ..trainers import fake_trainer, plain_trainer
from ..wandb_log import OfflineRun

DEMO = str(DEMO_MODEL)
"""The demo's trained model, which states its confidence."""
PIXELS = 10**6
"""`data.max_pixels`, more than the demo model's images have."""
COUNTS = {"yes_no": noise_counts((0, 10, 9), (1, 10, 5)), "short": noise_counts((0, 10, 8), (1, 10, 0))}
RECORDED = {
    "model.init_args.optimizer.lr": 0.01,
    "data.train.init_args.split": "train",
    "data.train.init_args.hub_token": "hf_1",
    "data.max_length": None,
}
"""Settings in the record of the run."""


def _data(model: str, **settings: Any) -> PerturbedQueryDataModule:
    levels = measured(model, COUNTS, max_pixels=settings.get("max_pixels"))
    sets = {"train": DemoSource("train", scenes=24), "validation": DemoSource("calibration", scenes=2)}
    plain = {"noise": NoisePolicy(levels=levels, wrong_answer_rate=1.0), "max_length": 300}
    return PerturbedQueryDataModule(model, **{**sets, **plain, "batch_size": 12, "workers": 0, **settings})


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter of a short stage 1 on the demo's model."""
    module = SFTModule(
        BaseModel(DEMO, dtype="float32"),
        LoraSettings(r=8, alpha=16, dropout=0.0, parts=["language", "projector"]),
        OptimizerSettings(lr=1e-2),
        max_new_tokens=16,
    )
    folder = tmp_path_factory.mktemp("sft")
    RunRecord("fit", "SFTModule", False, RECORDED, {}).write(folder)
    trainer = plain_trainer(folder, AdapterWriter(), num_sanity_val_steps=-1, max_epochs=1)
    trainer.fit(module, _data(DEMO, max_pixels=PIXELS))
    return folder / "adapter"


@pytest.mark.slow
def test_the_folder_holds_adapter_processor_and_card_which_says_what_was_trained(sft: Path) -> None:
    assert {
        *("adapter_config.json", "adapter_model.safetensors", "README.md", "calibration.json"),
        *("processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    } == {p.name for p in sft.iterdir()}
    text = (sft / "README.md").read_text(encoding="utf-8")
    assert "More Information Needed" not in text, "peft's own card"
    card = load_card(sft)
    assert card is not None
    assert text == card_text(card)
    config = PeftConfig.from_pretrained(str(sft))
    assert (config.base_model_name_or_path, config.revision) == (DEMO, None)
    assert card.max_pixels == PIXELS
    assert (card.base, card.revision, card.quantization, card.merged) == (DEMO, None, "none", False)
    assert card.location == str(sft)
    assert card.training == {
        "stage": "stage 1: supervised fine-tuning (SFT)",
        "steps": "6",
        "adapter": "LoRA, r=8, alpha=16, dropout=0.0",
        "model.init_args.optimizer.lr": "0.01",
        "data.train.init_args.split": "train",
    }, "neither secrets nor what is not set"
    assert card.levels == {
        "yes_no": [("", 0, 0.9), ("noise", 1, 0.5)],
        "short": [("", 0, 0.8), ("noise", 1, 0.0)],
    }
    assert list(card.results) == ["before", "after"]
    assert card.results["after"]["n"] == 6
    assert card.results["before"] != card.results["after"]
    assert str(card.conversation).startswith(f"<|user|><image>{EXAMPLE}\nAnswer briefly")


DRIVER = """
import shutil, sys
program, *images = sys.argv[1:]
for image in images:
    shutil.copy(image, "image.png")
    exec(open(program).read(), {})
assert not [name for name in sys.modules if name.startswith(("vlm_calibration", "lightning"))]
"""


@pytest.mark.slow
def test_the_cards_program_says_what_we_say(sft: Path, tmp_path: Path) -> None:
    text = (sft / "README.md").read_text(encoding="utf-8")
    program = text.split("```python\n", 1)[1].split("```", 1)[0]
    (tmp_path / "program.py").write_text(program, encoding="utf-8")
    samples = []
    for scene in range(6):
        image = np.asarray(render_scene(scene).image)
        Image.fromarray(image).save(tmp_path / f"{scene}.png")
        samples.append(Sample(Query(f"q{scene}", "x", EXAMPLE, "Yes", "yes_no"), image, 1.0, CLEAN, 0))
    command = [sys.executable, "-c", DRIVER, "program.py", *(f"{scene}.png" for scene in range(6))]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert ran.returncode == 0, ran.stderr
    data = _data(DEMO)
    batch = PromptCollator(data.chat)(samples)
    base = load_base(BaseModel(DEMO))
    tokenizer = AnswerTokenizer(data.chat)
    before = AnsweredBatch.generate(base, batch, tokenizer, 16).predictions
    adapted = PeftModel.from_pretrained(base, str(sft)).eval()
    found = AnsweredBatch.generate(adapted, batch, tokenizer, 16).predictions
    assert ran.stdout.splitlines() == [f"{strip_confidence(p.text)} {p.confidence}" for p in found]
    assert all(p.confidence is not None for p in found)
    assert [p.confidence for p in before] != [p.confidence for p in found], "the adapter speaks"


@pytest.mark.slow
def test_the_card_of_stage_2_and_its_evaluation(offline_runs: dict[str, OfflineRun]) -> None:
    adapter = offline_runs["dpo"].directory / "adapter"
    card = load_card(adapter)
    assert card is not None
    assert card.training["stage"] == "stage 2: soft labels on own answers"
    assert card.training["adapter"] == "LoRA, r=16, alpha=32, dropout=0.0", "of the adapter it starts from"
    found = read_evaluation(offline_runs["eval"].directory, adapter_digest(adapter))
    assert (found.system, found.dataset, found.split) == ("dpo", "demo", "test")


# --- Whole or not at all ----------------------------------------------------------------------------------------


@pytest.fixture
def data(model_folder: str) -> PerturbedQueryDataModule:
    return _data(model_folder, noise=NoisePolicy())


@pytest.fixture
def module(load_model: Callable[..., Any]) -> Any:
    """A trained module, of a base model on the Hub."""
    model: Any = attach_lora(
        load_model(), LoraSettings(r=1, alpha=2, dropout=0.5, use_rslora=True, use_dora=True)
    )
    model.config._commit_hash = "0123abcd"
    base = BaseModel("org/model", revision="main", quantization="nf4")
    return SimpleNamespace(model=model, base=base, max_new_tokens=7)


def test_the_adapter_appears_whole_where_training_has_ended(
    tmp_path: Path, data: PerturbedQueryDataModule, module: Any
) -> None:
    for settings in ({"interrupted": True}, {"is_global_zero": False}):
        AdapterWriter().on_fit_end(fake_trainer(tmp_path, datamodule=data, **settings), module)
        assert list(tmp_path.iterdir()) == []
    folder = tmp_path / "adapter"
    for value in (1.0, 2.0):
        for parameter in module.model.parameters():
            parameter.data.fill_(value)
        AdapterWriter().on_fit_end(fake_trainer(tmp_path, datamodule=data), module)
        assert all((w == value).all() for w in load_file(folder / "adapter_model.safetensors").values())
        assert json.loads((folder / "adapter_config.json").read_text())["revision"] == "0123abcd"
        assert (folder / "tokenizer.json").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
    _, front, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert yaml.safe_load(front)["base_model_revision"] == "0123abcd", "the commit, not the branch asked for"
    assert "rsLoRA DoRA LoRA, r=1, alpha=2, dropout=0.5" in text
    assert "quantised (nf4)" in text
    assert "| perturbation | strength | any answer |\n| --- | --- | --- |\n|  | 0 | 100% |" in text


def test_the_card_says_that_levels_are_by_ranking(model_folder: str, tmp_path: Path, module: Any) -> None:
    levels = measured(model_folder, {"open": COUNTS["short"]}, grading=Grading(rank_levels=True))
    data = _data(model_folder, noise=NoisePolicy(levels=levels))
    card = AdapterWriter().card(fake_trainer(tmp_path, datamodule=data), module)
    assert card.training["levels"] == "open answers by ranking"
    assert card.levels == {"open": [("", 0, 0.8), ("noise", 1, 0.0)]}


def test_only_the_validations_of_this_training_count(
    tmp_path: Path, data: PerturbedQueryDataModule, module: Any
) -> None:
    writer, trainer = AdapterWriter(), fake_trainer(tmp_path, datamodule=data)
    writer.validations["after"] = {"ece": 0.25}
    assert writer.card(trainer, module).results == {"after": {"ece": 0.25}}
    writer.setup(trainer, module, "fit")
    assert writer.card(trainer, module).results == {}
    writer.validations["after"] = {"ece": float("nan"), "accuracy": 0.5, "accuracy/short": 0.1}
    assert writer.card(trainer, module).results == {"after": {"accuracy": 0.5, "ece": None}}


def test_what_cannot_be_written_up_stops_the_run_before_training(
    tmp_path: Path, data: PerturbedQueryDataModule, module: Any, monkeypatch: Patch
) -> None:
    def refuse(question: str) -> str:
        raise DataError("a template that refuses")

    monkeypatch.setattr(data.chat, "render", refuse)
    with pytest.raises(DataError, match="a template that refuses"):
        AdapterWriter().on_fit_start(fake_trainer(tmp_path, datamodule=data), module)


def test_paths_below_the_working_directory_are_relative(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shown_path(tmp_path / "runs/x") == "runs/x"
    assert shown_path(Path("runs/x")) == "runs/x"
    assert shown_path(tmp_path.parent / "y") == str(tmp_path.parent / "y")
