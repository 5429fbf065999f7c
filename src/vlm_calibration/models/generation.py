"""Batched greedy generation of answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def generate_texts(
    model: Any, inputs: Mapping[str, Tensor], tokenizer: Any, max_new_tokens: int
) -> list[str]:
    """Answer each prompt greedily.

    Args:
        inputs: left-padded prompts, input_ids int64 [B, L]. max_new_tokens: stop there if the model has not.

    Returns:
        B texts, without special tokens and surrounding space.

    Raises:
        ValueError: prompts padded on the right, which would be answered behind their padding.
    """
    mask = inputs["attention_mask"]
    if bool((mask[:, -1] == 0).any()):
        raise ValueError("generation needs prompts that are padded on the left")
    output = model.generate(
        **inputs,
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
    )
    answers = output[:, inputs["input_ids"].shape[1] :]
    return [t.strip() for t in tokenizer.batch_decode(answers, skip_special_tokens=True)]
