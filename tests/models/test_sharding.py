"""Weights that are sharded over two processes: passes, gradients and answers equal those of a whole model, for mixed dtypes too."""

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

from vlm_calibration.models.adapters import LoraSettings, attach_lora
from vlm_calibration.models.loading import BaseModel, load_for_training
from vlm_calibration.models.sharding import shard, wait_for_others
from vlm_calibration.records import DataError

from .families import Prompt, Spec, build, new_prompts, randomize_adapters

pytestmark = pytest.mark.slow

FAMILY = "qwen2_5_vl"
TOLERANCE = 1e-6
"""Of losses and gradients: a gradient is the mean over processes instead of a sum over prompts."""


def _load(base: BaseModel) -> Any:
    model = attach_lora(load_for_training(base), LoraSettings(r=4, alpha=8, dropout=0.0))
    return randomize_adapters(model).train()


def _loss(model: Any, prompt: Prompt) -> Tensor:
    inputs = prompt.text_inputs([5, 6, 7, 8])
    return model(**inputs, **prompt.image, labels=inputs["input_ids"]).loss  # type: ignore[no-any-return]


def _answer(model: Any, prompt: Prompt, tokens: int) -> list[int]:
    inputs = {**prompt.text_inputs(), **prompt.image}
    settings = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False}
    return model.generate(**inputs, **settings)[0].tolist()  # type: ignore[no-any-return]


def _compare(rank: int, port: int, bases: list[BaseModel]) -> None:
    """Train a step and answer with each model, whole and sharded; the processes answer different numbers of tokens.

    Then one of them runs a pass with gradients more than the other.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    prompts = new_prompts(FAMILY, 2)
    for base in bases:
        whole, sharded = _load(base), _load(base)
        shard(sharded, mesh)
        dtypes = {p.dtype for p in sharded.parameters()}
        assert dtypes == {torch.float32, torch.uint8 if base.quantization == "nf4" else torch.bfloat16}
        assert all(2 * p.to_local().numel() <= p.numel() + p[0].numel() for p in sharded.parameters())

        losses = [_loss(whole, prompt) for prompt in prompts]
        torch.stack(losses).mean().backward()
        loss = _loss(sharded, prompts[rank])
        wait_for_others(sharded)
        loss.backward()
        torch.testing.assert_close(loss, losses[rank], atol=TOLERANCE, rtol=TOLERANCE)
        trained = [(p, q) for p, q in zip(whole.parameters(), sharded.parameters(), strict=True)]
        trained = [(p, q) for p, q in trained if p.requires_grad]
        assert trained
        for p, q in trained:
            assert p.grad is not None
            assert p.grad.abs().max() > 100 * TOLERANCE
            torch.testing.assert_close(q.grad.full_tensor(), p.grad, atol=TOLERANCE, rtol=TOLERANCE)

        with torch.no_grad():
            answered = prompts if rank else prompts[:1]
            answers = [_answer(sharded.eval(), prompt, 4 + 3 * rank) for prompt in answered]
            wait_for_others(sharded)
            assert answers == [_answer(whole.eval(), prompt, 4 + 3 * rank) for prompt in answered]
        for prompt in answered:
            _loss(sharded, prompt)
        with pytest.raises(DataError, match="ran 1 in one and 2 in another"):
            wait_for_others(sharded)
    dist.destroy_process_group()


def test_sharded_models_of_several_dtypes_train_and_answer_as_whole_ones(tmp_path: Path) -> None:
    """A bfloat16 model and an nf4 one, with float32 adapters."""
    build(FAMILY, dtype=torch.bfloat16, spec=Spec(width=64)).save_pretrained(tmp_path)
    bases = [BaseModel(str(tmp_path), "bfloat16", quantization) for quantization in ("none", "nf4")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_compare, (port, bases), nprocs=2)
