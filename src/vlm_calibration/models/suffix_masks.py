"""Attention masks of packed rows (see `shared_prefix`), in which suffixes do not attend to each other.

Eager attention and sdpa take a dense mask, of a number for each pair of tokens. FlexAttention (arXiv 2412.05496) takes a function of two
tokens and a table of the blocks of tokens in which any attend: its kernels skip other blocks, and evaluate the function in those
that are partly masked. The dense mask of 4,200 tokens takes 34 MiB in bfloat16, their tables 18 KiB.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers.masking_utils import causal_mask_function

FLEX = "flex_attention"

BLOCK = 128
"""Tokens of a block."""


def isolate_suffixes(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, segment: Tensor, shift: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pre-hook of the language model: mask other suffixes, and make positions of each suffix continue the prefix.

    `segment` and `shift`, int64 [B, L], are as in `shared_prefix.Packed`.
    """
    blockwise = module.config._attn_implementation == FLEX
    dtype = kwargs["inputs_embeds"].dtype

    def restrict(mask: Any) -> Tensor | BlockMask:
        if blockwise:
            return _block_mask(segment, mask if isinstance(mask, BlockMask) else None)
        return additive_mask(segment, mask, dtype)

    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if positions is None:
        positions = torch.arange(segment.shape[1], device=segment.device)[None]
    return args, {
        **kwargs,
        "attention_mask": {k: restrict(m) for k, m in mask.items()}
        if isinstance(mask, dict)
        else restrict(mask),
        "position_ids": positions - shift,
    }


def additive_mask(segment: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The dense mask of packed rows, float [B, 1, L, L]: 0 where a token attends to another, else the lowest number.

    The model's own mask of the row is bool or additive; one of two dimensions, or None, stands for a causal one.
    """
    length, device = segment.shape[1], segment.device
    query, key = segment[:, :, None], segment[:, None, :]
    same_path = ((key == 0) | (key == query)) & (key >= 0)
    if mask is None or mask.ndim == 2:
        causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        allowed = (same_path & causal)[:, None]
    else:
        allowed = (mask if mask.dtype == torch.bool else mask == 0) & same_path[:, None]
    # The diagonal keeps softmax defined for padding. Additive, because eager attention adds its mask.
    blocked = ~(allowed | torch.eye(length, dtype=torch.bool, device=device))
    return torch.zeros(blocked.shape, dtype=dtype, device=device).masked_fill(blocked, torch.finfo(dtype).min)


def _block_mask(segment: Tensor, mask: BlockMask | None = None) -> BlockMask:
    """The mask of packed rows for FlexAttention. The model's own mask of the row is causal if it is None."""
    inner = causal_mask_function if mask is None else mask.mask_mod
    path = segment.to(torch.int32)

    def attends(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        of_key = path[row, key]
        same_path = ((of_key == 0) | (of_key == path[row, query])) & (of_key >= 0)
        # The diagonal keeps softmax defined for padding.
        return (same_path & inner(row, head, query, key)) | (query == key)

    (batch, length), device = segment.shape, segment.device
    # Uncompiled, it would hold a number for each pair of tokens.
    return create_block_mask(attends, batch, 1, length, length, device, BLOCK_SIZE=BLOCK, _compile=True)
