"""Both stages on a GPU in bfloat16: their steps against float32 on the CPU, shared prefixes, and nf4."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.performance.gpu_steps import TASKS, Bench, alike_samples, write_random
from tests.performance.preference import BATCH, OurStep

from vlm_calibration.models.base import BaseModel
from vlm_calibration.models.loading import load_for_training
from vlm_calibration.models.shared_prefix import Prompts, score_responses

pytestmark = pytest.mark.slow

BF16 = torch.bfloat16
NAME = "tiny qwen2_5_vl"
SAMPLES = alike_samples(BATCH, 48)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cuda")
    write_random(NAME, folder, "cpu")
    return folder


def _gradients(
    task: str, folder: Path, device: torch.device | str, autocast: torch.dtype | None
) -> tuple[float, torch.Tensor]:
    """Loss of a step, and its gradients as one vector, float32 on the CPU."""
    base = BaseModel(str(folder), dtype="bfloat16" if autocast else "float32")
    ours = OurStep(TASKS[task], folder, True, load_for_training(base).to(device), autocast)
    loss = ours.loss(ours.collate(SAMPLES).to(device))
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten().float().cpu() for p in ours.trained])


@pytest.mark.parametrize("task", ["sft", "dpo4"])
def test_a_step_in_bfloat16_on_a_gpu_is_that_in_float32_on_the_cpu(
    cuda: torch.device, folder: Path, task: str
) -> None:
    loss, gradients = _gradients(task, folder, cuda, BF16)
    expected_loss, expected = _gradients(task, folder, "cpu", None)
    assert loss == pytest.approx(expected_loss, rel=0.03)
    assert torch.cosine_similarity(gradients, expected, dim=0) > 0.98
    assert gradients.norm() == pytest.approx(expected.norm().item(), rel=0.1)


def test_shared_prefixes_on_a_gpu_score_as_separate_responses(cuda: torch.device, folder: Path) -> None:
    model = load_for_training(BaseModel(str(folder), dtype="bfloat16")).to(cuda)
    ours = OurStep(TASKS["dpo10"], folder, False, model, BF16)
    batch = ours.collate(SAMPLES).to(cuda)
    prompts = Prompts(batch.inputs, batch.lengths)
    tokens = [[c.tokens for c in row] for row in batch.candidates]
    with torch.no_grad(), torch.autocast("cuda", dtype=BF16):
        shared, plain = (score_responses(ours.model, prompts, tokens, how) for how in ("shared", "plain"))  # type: ignore[arg-type]
    assert torch.equal(shared.tokens, plain.tokens)
    torch.testing.assert_close(shared.total, plain.total, rtol=0.02, atol=0.1)


@pytest.mark.parametrize("weights", ["bf16", "nf4"])
def test_training_on_a_gpu_lowers_the_loss(cuda: torch.device, folder: Path, weights: str) -> None:
    bench = Bench(NAME, folder, weights, "cuda", deadline=float("inf"))
    ours = OurStep(TASKS["sft"], folder, True, bench.model, BF16)
    losses = [ours(SAMPLES)[0] for _ in range(10)]
    assert losses[-1] < losses[0] - 0.05
