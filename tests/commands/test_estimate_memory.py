"""`vlm-calibration estimate-memory`: what configurations quote of it, measured steps, and what it refuses."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import lightning as L
import pytest
import torch
import yaml

from vlm_calibration.callbacks.throughput import PeakMemory
from vlm_calibration.cli import main
from vlm_calibration.models.memory import STATE_BYTES
from vlm_calibration.stages.training import OptimizerSettings

from ..models.published import MODELS
from ..models.steps import allocated
from ..trainers import plain_trainer

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(p.stem for p in (CONFIGS / "model").glob("*.yaml") if p.stem != "qlora")


@pytest.fixture(autouse=True)
def program_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["vlm-calibration"])
    monkeypatch.setenv("COLUMNS", "240")


def _published(name: str, folder: Path) -> str:
    """Save the configuration of a published model, by the name of its file; returns the folder."""
    MODELS[name].config().save_pretrained(folder)
    return str(folder)


def _rows(out: str) -> dict[str, list[str]]:
    """Label of each row of the tables -> its cells."""
    rows = (re.split(r"\s{2,}", line.strip()) for line in out.splitlines())
    return {label: cells for label, *cells in rows if cells}


def test_every_file_is_of_a_published_model() -> None:
    assert set(MODELS) == set(FILES)
    for name, model in MODELS.items():
        settings = yaml.safe_load((CONFIGS / "model" / f"{name}.yaml").read_text(encoding="utf-8"))
        assert settings["model"]["init_args"]["base"]["name_or_path"] == model.repository
        assert settings["data"]["batch_size"] * settings["trainer"]["accumulate_grad_batches"] == 32


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "smolvlm2_256m",
        "qlora",
        *(pytest.param(n, marks=pytest.mark.nightly) for n in MODELS if n != "smolvlm2_256m"),
    ],
)
def test_files_quote_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    # The file `qlora.yaml` quotes itself behind another one.
    overlays = ["qwen2_5_vl_7b", "qlora"] if name == "qlora" else [name]
    configs = [a for n in ("sft", *(f"model/{o}" for o in overlays)) for a in ("--config", n)]
    folder = _published(overlays[0], tmp_path)
    assert main(["estimate-memory", *configs, "--model.init_args.base.name_or_path", folder]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("# ")]
    assert line in (CONFIGS / "model" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()


@pytest.mark.slow
def test_overlays_alone_are_of_all_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = ["--model.init_args.base.name_or_path", _published("qwen2_5_vl_7b", tmp_path)]
    assert main(["estimate-memory", "--config", "model/qwen2_5_vl_7b", *folder, "--tokens=1000"]) == 0
    out = capsys.readouterr().out
    for stage in ("sft", "dpo", "levels", "eval/jsonl"):
        assert f"{stage} on one GPU, GiB" in out
    rows = _rows(out)
    assert rows["--model.init_args.base.quantization nf4"][0] == "10.0", "of stage 2, which has a reference"
    # 28 layers with 4 heads of 128 in bfloat16, 8 rows of 1,000 tokens and 64 new ones.
    assert rows["answers"][1] == f"{2 * 28 * 4 * 128 * 2 * 8 * 1064 / 2**30:.2f}"


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", pytest.param("dpo", marks=pytest.mark.nightly)])
def test_measured_steps(capsys: pytest.CaptureFixture[str], stage: str) -> None:
    """The demo's model: half the batch takes half of the activations, checkpointing fewer."""
    settings = ["--config", stage, "--tokens", "200", "--data.batch_size", "8"]
    assert main(["estimate-memory", "--measure", *settings]) == 0
    rows = _rows(capsys.readouterr().out)
    configured, checkpointed, halved = (
        float(next(cells for label, cells in rows.items() if name in label)[-2])
        for name in ("as configured", "gradient_checkpointing", "batch_size 4")
    )
    assert halved == pytest.approx(configured / 2, rel=0.3)
    assert checkpointed < configured


class _Stack(L.LightningModule):
    """Layers that keep their inputs for the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(6)), torch.nn.GELU())

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layers(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


def test_the_peak_is_that_of_the_allocator(tmp_path: Path) -> None:
    measured = PeakMemory()
    loader: Any = torch.utils.data.DataLoader(
        range(3 * 512),  # type: ignore[arg-type]
        batch_size=512,
        collate_fn=lambda rows: torch.ones(len(rows), 256),
    )
    plain_trainer(tmp_path, measured, max_steps=3).fit(_Stack(), loader)
    module, batch = _Stack(), torch.randn(512, 256)
    optimizer = torch.optim.AdamW(module.parameters())

    def step() -> None:
        optimizer.zero_grad()
        module.training_step(batch, 0).backward()
        optimizer.step()

    step()
    states = 2 * sum(p.nbytes for p in module.parameters()) + batch.nbytes
    assert measured.peak == pytest.approx(allocated(step) + states, rel=0.1)


def test_every_optimizer_is_known() -> None:
    assert set(get_args(get_type_hints(OptimizerSettings)["name"])) == set(STATE_BYTES)


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--tokens", "0"], 2, "--tokens: expected a whole number of at least 1, found '0'"),
        (["--config", "sft", "--config", "dpo"], 2, "one stage at a time, found sft and dpo"),
        (["--config=regions"], 1, "regions: no estimate for RegionExtractor"),
        (["--config=sft", "--model.init_args.base.name_or_path=no/model"], 1, "model from 'no/model'"),
    ],
)
def test_what_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, says: str
) -> None:
    assert main(["estimate-memory", *arguments]) == status
    assert says in capsys.readouterr().err
