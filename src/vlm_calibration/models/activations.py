"""Estimate the activation memory of a training step without computing activations.

A step of the language model runs forward and backward on fake tensors (`fake_tensors`), and the peak of live bytes is counted: tensors
saved by autograd, with or without checkpointing, and temporaries. The vision tower is estimated on its own (`vision_memory`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlm_calibration.losses.sequence import token_log_likelihood
from vlm_calibration.models.fake_tensors import FakeModules, LiveBytes, autocast, over_layers
from vlm_calibration.models.forward import unwrap_peft
from vlm_calibration.models.suffix_masks import isolate_suffixes

RESPONSE_TOKENS = 16
"""Tokens of an answer with its confidence up to the end of the turn: "a red bicycle. Confidence: 80%" with a margin."""


@dataclass(frozen=True)
class TrainingStep:
    """The work of one process in one training step.

    Args:
        batch: number of prompts, each with one image.
        tokens: tokens of a prompt with its image and one response.
        image_tokens: tokens of the image, None: all tokens.
        responses: responses per prompt; each further response lengthens the row (see `shared_prefix`).
        shares_image: rows per image, where each response has a row of its own.
        checkpointing: recompute activations in the backward pass.
        autocast: dtype of the arithmetic in mixed precision; None: the dtype of the weights.
        cast: dtype to which all weights including the adapter's are converted; None: as loaded.
    """

    batch: int
    tokens: int
    image_tokens: int | None = None
    responses: int = 1
    shares_image: int = 1
    checkpointing: bool = False
    autocast: torch.dtype | None = torch.bfloat16
    cast: torch.dtype | None = None

    @property
    def images(self) -> int:
        """Tokens of all images."""
        per_image = self.tokens if self.image_tokens is None else self.image_tokens
        return self.batch * per_image // self.shares_image

    @property
    def row(self) -> int:
        """Tokens per row."""
        return self.tokens + (self.responses - 1) * RESPONSE_TOKENS

    @property
    def labels(self) -> int:
        """Positions per row at which the output head runs."""
        return self.responses * RESPONSE_TOKENS


def training_peak(model: Any, step: TrainingStep) -> tuple[int, int]:
    """Peak bytes of activations in a step of the language model, and of its output head alone."""
    base = unwrap_peft(model)
    decoder, head = base.get_decoder(), base.get_output_embeddings()
    inside = {id(p) for p in decoder.parameters()}
    differentiable = any(p.requires_grad for p in base.parameters() if id(p) not in inside)
    peaks = over_layers(decoder, lambda: _training_peaks(decoder, head, step, differentiable))
    return peaks["step"], peaks["head"]


def _training_peaks(decoder: Any, head: Any, step: TrainingStep, differentiable: bool) -> dict[str, int]:
    fakes = FakeModules([decoder, head])
    embeddings = decoder.get_input_embeddings().weight
    labels, width = step.batch * step.labels, embeddings.shape[1]

    def loss_at(hidden: Tensor) -> Tensor:
        with autocast(step.autocast):
            return -token_log_likelihood(head(hidden), torch.zeros(labels, dtype=torch.int64)).sum()

    with fakes.mode, isolated_suffixes(decoder, step.batch, step.row, step.responses):
        for parameter in fakes.parameters:
            if parameter.requires_grad:  # the state from the second accumulated batch on
                parameter.grad = torch.zeros_like(parameter)
        existing = [*fakes.parameters, *(p.grad for p in fakes.parameters if p.grad is not None)]
        rows = torch.empty(step.batch, step.row, width, dtype=embeddings.dtype, requires_grad=differentiable)
        mask = torch.ones(step.batch, step.row, dtype=torch.int64)
        with LiveBytes(existing) as step_bytes:
            with autocast(step.autocast):
                hidden = decoder(inputs_embeds=rows, attention_mask=mask, use_cache=False).last_hidden_state
            loss_at(hidden[:, -step.labels :].flatten(0, 1)).backward()
        with LiveBytes(existing) as head_bytes:
            loss_at(torch.empty(labels, width, dtype=hidden.dtype, requires_grad=True)).backward()
    return {"step": step_bytes.peak, "head": head_bytes.peak}


@contextmanager
def isolated_suffixes(decoder: Any, batch: int, row: int, responses: int) -> Iterator[None]:
    """Mask the responses that share a row from each other in this context, as in `shared_prefix`; one response needs no mask."""
    if responses == 1:
        yield
        return
    segment, shift = (torch.zeros(batch, row, dtype=torch.int64) for _ in range(2))
    hook = partial(isolate_suffixes, segment=segment, shift=shift)
    handle = decoder.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
