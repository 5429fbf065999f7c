"""Attention masks of packed rows (see `shared_prefix`), in which suffixes do not attend to each other.

Eager attention and sdpa take a dense mask, of a number for each pair of tokens. FlexAttention (arXiv 2412.05496) takes a function of two
tokens and a table of the blocks of tokens in which any attend: its kernels skip other blocks, and evaluate the function in those
that are partly masked. The dense mask of 4,200 tokens takes 34 MiB in bfloat16, their tables 18 KiB.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers.masking_utils import causal_mask_function

FLEX = "flex_attention"

BLOCK, MOST_BLOCKS = 128, 128
"""Tokens of a block, and blocks of a row at most: in longer rows blocks are larger, so that tables take at most 16 bytes a token."""


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
        return _additive_mask(segment, mask, dtype)

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


def _additive_mask(segment: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
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

    # As `torch.nn.attention.flex_attention.create_block_mask`, which without compilation evaluates all pairs of tokens at once; here
    # it is those of one block of queries.
    (batch, length), device, size = segment.shape, segment.device, BLOCK
    while length > MOST_BLOCKS * size:
        size *= 2
    n_blocks = -(-length // size)
    rows = torch.arange(batch, device=device)[:, None, None]
    keys = torch.arange(length, device=device)
    counts = torch.zeros(batch, n_blocks, n_blocks, dtype=torch.int32, device=device)
    for start in range(0, length, BLOCK):
        queries = torch.arange(start, min(start + BLOCK, length), device=device)[:, None]
        allowed = attends(rows, torch.zeros_like(rows), queries, keys)  # [B, BLOCK, L]
        of_key = allowed.sum(1, dtype=torch.int32)
        of_key = torch.nn.functional.pad(of_key, (0, n_blocks * size - length))
        counts[:, start // size] += of_key.view(batch, n_blocks, size).sum(-1, dtype=torch.int32)
    whole = counts == size**2
    partial, full = (_listed(blocks[:, None]) for blocks in ((counts > 0) & ~whole, whole))
    return BlockMask.from_kv_blocks(
        *partial, *full, BLOCK_SIZE=size, mask_mod=attends, seq_lengths=(length, length)
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Number of blocks in each line, int32 [..., n], and their columns before all other columns, int32 [..., n, n]."""
    columns = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), columns.to(torch.int32)
