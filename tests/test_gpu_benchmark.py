"""The benchmark of real sizes on a GPU: its dry run on the CPU, its page, and the FLOPs of the model of time against those that torch counts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.models.processors import FAMILIES, cached_family
from tests.models.published import MODELS
from tests.performance import gpu, scale
from tests.performance.gpu_models import REAL, with_tokens_of, write_random
from tests.performance.gpu_steps import LIGER, OURS, PARTS, TASKS, TRL, Cell, alike_samples
from tests.performance.preference import BATCH, LORA, OurStep

from vlm_calibration.data.collate import ChatFormat, PromptCollator, SFTCollator
from vlm_calibration.losses.sequence import IGNORE
from vlm_calibration.models.base import BaseModel
from vlm_calibration.models.loading import load_for_training
from vlm_calibration.text.prompts import ElicitationPrompt

NAME = "tiny qwen2_5_vl"


def test_without_a_gpu_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        gpu.main([])
    assert "needs a CUDA GPU" in str(ended.value)
    assert "\n" not in str(ended.value)


# --- The dry run ----------------------------------------------------------------------------------------------------


@pytest.mark.nightly
def test_every_part_runs_on_the_cpu(root: Path, tmp_path: Path) -> None:
    page = tmp_path / "gpu.md"
    command = [sys.executable, "-m", "tests.performance.gpu", "--device", "cpu", "--models", NAME]
    ran = subprocess.run(
        [*command, "--weights", "nf4", "--out", str(page)], cwd=root, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    lines = page.read_text().splitlines()
    for task in TASKS.values():
        of_task = [line for line in lines if line.startswith(f"| {NAME} | nf4 | {task.title} |")]
        sides = [line.split(" | ")[3] for line in of_task if line.count("|") == len(gpu.STEP_HEADER) + 1]
        assert sides == ([OURS, TRL, LIGER] if task.rejected else [OURS, TRL])
        assert sum("%" in line and line.count("%") == len(PARTS) for line in of_task) == 1
    assert not [
        line for line in lines if "not measured" in line and "liger_kernel is not installed" not in line
    ]
    section = lines.index("## Answers")
    assert any(line.startswith(f"| {NAME} | nf4 |") for line in lines[section:])


@pytest.mark.parametrize("name", REAL)
def test_batches_of_real_sizes_fit_the_published_models(name: str) -> None:
    """The processor's image tokens are those that the model makes of the image, and responses have equally many tokens."""
    entry = REAL[name]
    family = FAMILIES[entry.family](**entry.images)  # type: ignore[arg-type]
    config = with_tokens_of(family, MODELS[name].config())
    batch = SFTCollator(ChatFormat(family.processor, ElicitationPrompt()), 4096)(alike_samples(2, entry.side))
    ids = batch.inputs["input_ids"]
    assert ids.max() < config.get_text_config().vocab_size
    assert 1000 < int((ids[0] == config.image_token_id).sum()) < 1400
    assert len(set((batch.labels != IGNORE).sum(1).tolist())) == 1


# --- The page -------------------------------------------------------------------------------------------------------


def _cell(side: str, **changes: Any) -> Cell:
    values = {
        "seconds": [2.0 if side == TRL else 1.0],
        "collating": [0.1],
        "losses": [0.7, 0.6, 0.5],
        "peak": 2**31,
    }
    return Cell("m", "bf16", "SFT", side, **{**values, **changes})


def _page(*cells: Cell, failed: tuple[str, ...] = ()) -> tuple[str, bool]:
    return gpu.page(cells, failed, gpu.parse(["--device", "cpu", "--models", "tiny"]))


def test_a_page_compares_sides() -> None:
    text, agree = _page(_cell(OURS, parts=dict.fromkeys(PARTS, 1 / 6)), _cell(TRL))
    assert agree
    assert "2.00x" in text
    assert "DISAGREE" not in text


def test_losses_that_differ_cannot_be_missed() -> None:
    text, agree = _page(_cell(OURS), _cell(TRL, losses=[0.7, 0.6, 0.53]))
    assert not agree
    assert "**LOSSES DISAGREE: m, bf16, SFT: TRL's" in text
    assert _page(_cell(OURS), _cell(TRL, losses=[0.7, 0.6, 0.5, 9.0]))[1], "later steps are not compared"


def test_a_page_says_what_was_not_measured() -> None:
    text, agree = _page(_cell(OURS), _cell(TRL, reason="out of memory: CUDA"), failed=("m: ended",))
    assert agree
    assert "not measured: out of memory: CUDA" in text
    assert "**FAILED: m: ended**" in text


# --- Time and cost --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_random(NAME, folder, "cpu")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_are_those_that_torch_counts_in_a_step(tiny_folder: Path, checkpointing: bool) -> None:
    base = BaseModel(str(tiny_folder), dtype="float32")
    model = load_for_training(base)
    decoder = scale.decoder_of(model, LORA)
    ours = OurStep(TASKS["sft"], tiny_folder, checkpointing, model)
    batch = ours.collate(alike_samples(BATCH, 48))
    with scale.flop_counter() as counter:
        ours.loss(batch).backward()
    rows, length = batch.inputs["input_ids"].shape
    labels = int((batch.labels != IGNORE).sum())
    grids = batch.inputs["image_grid_thw"].tolist()
    predicted = rows * decoder.training(length, checkpointing) + 4 * decoder.head * labels
    predicted += sum(scale.tower_flops(model, (height, width)) for _, height, width in grids)
    assert predicted == pytest.approx(counter.get_total_flops(), rel=0.03)


@pytest.mark.slow
def test_flops_of_an_own_answer_are_those_that_torch_counts(tiny_folder: Path) -> None:
    """The prompt's pass, and each new token's."""
    model = load_for_training(BaseModel(str(tiny_folder), dtype="float32")).eval()
    decoder = scale.decoder_of(model, LORA)._replace(adapters=0)
    batch = PromptCollator(ChatFormat(cached_family("qwen2_5_vl").processor, ElicitationPrompt()))(
        alike_samples(1, 48)
    )
    length = batch.inputs["input_ids"].shape[1]
    new = 8
    with scale.flop_counter() as counter:
        model.generate(**batch.inputs, do_sample=False, max_new_tokens=new, min_new_tokens=new)
    [[_, height, width]] = batch.inputs["image_grid_thw"].tolist()
    predicted = decoder.forward(length) + scale.tower_flops(model, (height, width)) + 2 * decoder.head * new
    predicted += sum(decoder.forward(1, length + i) for i in range(1, new))
    assert predicted == pytest.approx(counter.get_total_flops(), rel=0.03)


@pytest.fixture
def work() -> Callable[..., scale.Workload]:
    def make(own: bool = False, **assumed: Any) -> scale.Workload:
        decoder = scale.Decoder(7_000_000_000, 40_000_000, 28 * 3584, 545_000_000)
        return scale.Workload(decoder, 5e9, 784, 1.5e10, 1.6e8, own, replace(scale.Assumptions(), **assumed))

    return make


def test_one_gpu_takes_the_time_of_its_queries(work: Callable[..., scale.Workload]) -> None:
    same = work(pixels=(784_000, 784_000))
    expected = 1000 * sum(same.flops(1000).values()) / (989e12 * 0.4) / 3600
    forecast = scale.simulate(same, 1000, gpus=1, batch=2, steps=3)
    assert forecast.hours == pytest.approx(expected)
    assert forecast.efficiency == pytest.approx(1.0)


def test_gpus_wait_for_the_slowest_and_for_gradients(work: Callable[..., scale.Workload]) -> None:
    alike = work(pixels=(784_000, 784_000))
    efficiency = scale.simulate(alike, 1000, gpus=8, batch=2, steps=3).efficiency
    step = alike.seconds(np.array([1000, 1000]))
    assert efficiency == pytest.approx(step / (step + 2 * 7 / 8 * 1.6e8 / 50e9))
    few, many = (scale.simulate(work(), 10**6, gpus=n, batch=2, steps=50) for n in (8, 64))
    assert few.hours / 8 < many.hours < few.hours
    assert many.efficiency < few.efficiency < efficiency


def test_own_answers_add_time_and_larger_batches_share_their_reading(
    work: Callable[..., scale.Workload],
) -> None:
    gold, own = work(), work(own=True)
    assert sum(own.flops(1000).values()) > 1.2 * sum(gold.flops(1000).values())
    assert own.seconds(np.full(8, 1000)) < 8 * own.seconds(np.array([1000]))
    assert gold.seconds(np.full(8, 1000)) == pytest.approx(8 * gold.seconds(np.array([1000])))


@pytest.mark.slow
def test_the_page_shows_what_is_computed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scale.main([])
    page = (root / "configs" / "README.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip() in page
