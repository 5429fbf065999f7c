"""The benchmark of real sizes on a GPU: its dry run on the CPU, and its page."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.processors import FAMILIES
from tests.models.published import MODELS
from tests.performance import gpu
from tests.performance.gpu_steps import LIGER, OURS, REAL, TASKS, TRL, Cell, alike_samples, with_tokens_of

from vlm_calibration.data.collate import ChatFormat, SFTCollator
from vlm_calibration.losses.sequence import IGNORE
from vlm_calibration.text.confidence import ElicitationPrompt

NAME = "tiny qwen2_5_vl"


def test_without_a_gpu_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        gpu.main([])
    assert "needs a CUDA GPU" in str(ended.value)
    assert "\n" not in str(ended.value)


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
    missing = [line for line in lines if "not measured" in line]
    assert all("liger_kernel is not installed" in line for line in missing)
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


def _cell(side: str, **changes: Any) -> Cell:
    values = {"seconds": [2.0 if side == TRL else 1.0], "losses": [0.7, 0.6, 0.5], "peak": 2**31}
    return Cell("m", "bf16", "SFT", side, **{**values, **changes})


def _page(*cells: Cell, failed: tuple[str, ...] = ()) -> tuple[str, bool]:
    return gpu.page(cells, failed, gpu.parse(["--device", "cpu", "--models", "tiny"]))


def test_losses_that_differ_and_what_was_not_measured_cannot_be_missed() -> None:
    text, agree = _page(_cell(OURS), _cell(TRL))
    assert agree
    assert "2.00x" in text
    assert "DISAGREE" not in text
    text, agree = _page(_cell(OURS), _cell(TRL, losses=[0.7, 0.6, 0.53]))
    assert not agree
    assert "**LOSSES DISAGREE: m, bf16, SFT: TRL's" in text
    assert _page(_cell(OURS), _cell(TRL, losses=[0.7, 0.6, 0.5, 9.0]))[1], "later steps are not compared"
    text, agree = _page(_cell(OURS), _cell(TRL, reason="out of memory: CUDA"), failed=("m: ended",))
    assert agree
    assert "not measured: out of memory: CUDA" in text
    assert "**FAILED: m: ended**" in text
