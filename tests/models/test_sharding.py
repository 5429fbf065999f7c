"""Weights that are sharded over two processes: losses, scores and gradients equal those of a whole model, for mixed dtypes too."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from vlm_calibration.models.adapters import LoraSettings, attach_lora, using_adapter
from vlm_calibration.models.forward import full_state_dict, shard, shared_vision
from vlm_calibration.models.loading import BaseModel, load_for_training
from vlm_calibration.models.shared_prefix import Prompts, score_responses

from .families import randomize_adapters
from .processors import cached_family, prompts_of, with_response

pytestmark = pytest.mark.slow

FAMILY = "qwen2_5_vl"
TOLERANCE = 1e-6
"""Of losses and gradients: a gradient is the mean over processes instead of a sum over prompts."""


def _load(base: BaseModel) -> Any:
    model = attach_lora(load_for_training(base), LoraSettings(r=4, alpha=8, dropout=0.0))
    return randomize_adapters(model).train()


def _loss(model: Any, prompt: dict[str, Tensor]) -> Tensor:
    inputs = with_response(prompt, [25, 26, 27, 28])
    return model(**inputs, labels=inputs["input_ids"]).loss  # type: ignore[no-any-return]


def _scores(model: Any, prompt: dict[str, Tensor]) -> list[Tensor]:
    """Scores of two responses under the reference and the policy, as in a step of stage 2; each float32 [1, 2]."""
    prompts, responses = Prompts(prompt, prompt["attention_mask"].sum(1)), [[[25, 26], [25, 27, 28]]]
    with shared_vision(model):
        with torch.no_grad(), using_adapter(model, None):
            reference = score_responses(model, prompts, responses, "shared")
        return [reference.total, score_responses(model, prompts, responses, "shared").total]


def _compare(rank: int, port: int, bases: list[BaseModel]) -> None:
    """Train a step of each stage with each model, whole and sharded, and gather the weights."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    _, prompts = prompts_of(FAMILY, 2)
    for base in bases:
        whole, sharded = _load(base), _load(base)
        shard(sharded, mesh)
        dtypes = {p.dtype for p in sharded.parameters()}
        assert dtypes == {torch.float32, torch.uint8 if base.quantization == "nf4" else torch.bfloat16}
        assert all(2 * p.to_local().numel() <= p.numel() + p[0].numel() for p in sharded.parameters())

        losses = [_loss(whole, prompt) for prompt in prompts]
        scores = [_scores(whole, prompt) for prompt in prompts]
        (torch.stack(losses).mean() + torch.stack([policy.sum() for _, policy in scores]).mean()).backward()
        loss = _loss(sharded, prompts[rank])
        loss.backward()
        own = _scores(sharded, prompts[rank])
        own[1].sum().backward()
        torch.testing.assert_close(loss, losses[rank], atol=TOLERANCE, rtol=TOLERANCE)
        torch.testing.assert_close(own, scores[rank], atol=TOLERANCE, rtol=TOLERANCE)
        assert not torch.equal(*own)
        pairs = zip(whole.parameters(), sharded.parameters(), strict=True)
        for p, q in ((p, q) for p, q in pairs if p.requires_grad):
            largest = float(p.grad.abs().max())
            assert largest > 100 * TOLERANCE
            atol = TOLERANCE * max(1.0, largest)
            torch.testing.assert_close(q.grad.full_tensor(), p.grad, atol=atol, rtol=TOLERANCE)
        gathered = full_state_dict(sharded)
        expected = {name: p for name, p in whole.named_parameters() if p.requires_grad}
        assert gathered.keys() == expected.keys() != set()
        assert all(torch.equal(gathered[name], p) for name, p in expected.items())
    dist.destroy_process_group()


def test_sharded_models_of_several_dtypes_train_as_whole_ones(tmp_path: Path) -> None:
    """A bfloat16 model and an nf4 one, with float32 adapters."""
    cached_family(FAMILY).model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    bases = [BaseModel(str(tmp_path), "bfloat16", quantization) for quantization in ("none", "nf4")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # A fork spares the imports; after a backward pass with a GPU, autograd refuses it.
    how = "spawn" if torch.cuda.is_available() else "fork"
    mp.start_processes(_compare, (port, bases), nprocs=2, start_method=how)
