"""Scores responses behind a prompt that has just been answered, without reading the prompt again.

Generation leaves the prompt's keys and values in its cache. A row `[last token of the prompt, response 1, response 2, ...]` over
that cache is all that is left to compute: some dozens of tokens, where image and prompt have hundreds. The same holds of
another prompt that begins like it, from where it goes on differently. As in
`models.shared_prefix`, the model builds mask and positions in its own way, and a hook in front of its language model puts
right what each token sees and where it stands. Where that would not be exact, nothing is scored here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from vlm_calibration.losses.sequence import token_log_likelihood
from vlm_calibration.models.forward import base_of, logits_at
from vlm_calibration.models.shared_prefix import Packed, Prompts, ResponseScores, pack, why_not_shared

KEYWORDS = ("cache", "past_key_values")
"""What transformers calls the cache, the newer name first."""


class PromptCache(NamedTuple):
    """What generation remembers of B prompts, padded on the left.

    cache: keys and values of the prompts, and of what was generated behind them. mask: int64 [B, P], where a prompt has a
    token. positions: int64 [..., B, P], where the language model put each; several axes where positions have them. keyword:
    what transformers calls the cache.
    """

    cache: DynamicCache
    mask: Tensor
    positions: Tensor
    keyword: str


class _Chunk(NamedTuple):
    """The tokens to compute, [B, W]: ids, segment and shift as in `Packed`. first: the column of the prompt that they begin at."""

    ids: Tensor
    segment: Tensor
    shift: Tensor
    first: Tensor


def remembered(output: Any, inputs: Mapping[str, Tensor], positions: Tensor | None) -> PromptCache | None:
    """What can be used again of a generation, None if nothing.

    Args:
        output: what `generate` returned as a dictionary. inputs: what it was given.
        positions: the position ids of the language model's first pass; None: its own, counted from the first column.
    """
    keyword = next((name for name in KEYWORDS if name in output), KEYWORDS[0])
    cache, mask = output.get(keyword), inputs["attention_mask"]
    if not isinstance(cache, DynamicCache):
        return None
    if positions is None:
        positions = torch.arange(mask.shape[1], device=mask.device)[None]
    return PromptCache(cache, mask, positions.expand(*positions.shape[:-2], *mask.shape), keyword)


def reads_both_ways(model: Any) -> bool:
    """Whether a token of the prompt sees those behind it, so that a prompt of which something is cut off is another one."""
    return base_of(model).config.model_type.startswith("paligemma")


def score_cached(
    model: Any,
    known: PromptCache,
    prompts: Prompts,
    responses: Sequence[Sequence[Sequence[int]]],
    kept: Tensor | None = None,
) -> ResponseScores | None:
    """`score_responses` behind prompts that begin as those in a cache do; None where that would not be exact.

    Args:
        prompts: prompts, padded on the right; their `lengths` may leave out tokens at the end.
        kept: int64 [B], with how many tokens they begin as those in the cache, fewer than either has, an image wholly among
            them; None: they are the same prompts.
    """
    lengths = known.mask.sum(1)
    same = kept is None
    kept = prompts.lengths - 1 if kept is None else kept
    packed = pack(prompts, responses)
    chunk = _chunk(packed, kept, known.mask.shape[1] - lengths + kept)
    held = known.cache.get_seq_length()
    if why_not_shared(model, held + chunk.ids.shape[1]) is not None:
        return None
    if reads_both_ways(model) and not (same and bool((kept == lengths - 1).all())):
        return None
    if bool(torch.isin(chunk.ids[:, 0], _image_tokens(model, chunk.ids)).any()):
        return None  # which is not read as a token
    hook = partial(_place, known=known, chunk=chunk)
    handle = base_of(model).get_decoder().register_forward_pre_hook(hook, with_kwargs=True)
    inputs = {
        "input_ids": chunk.ids,
        "attention_mask": known.mask.new_ones(len(chunk.ids), held + chunk.ids.shape[1]),
        known.keyword: known.cache,
    }
    try:
        logits = logits_at(model, inputs, packed.rows, packed.positions - kept[packed.rows])
    finally:
        handle.remove()
        known.cache.crop(held - known.cache.get_seq_length())
    found, tokens = token_log_likelihood(logits, packed.targets), packed.which >= 0
    return ResponseScores(torch.where(tokens, found[packed.which.clamp(min=0)], 0.0), tokens)


def _chunk(packed: Packed, kept: Tensor, first: Tensor) -> _Chunk:
    """What packed rows hold behind their first `kept` tokens."""
    starts, ends = kept.tolist(), (packed.segment >= 0).sum(1).tolist()

    def behind(values: Tensor, padding: int) -> Tensor:
        rows = [row[start:end] for row, start, end in zip(values, starts, ends, strict=True)]
        return pad_sequence(rows, batch_first=True, padding_value=padding)

    return _Chunk(
        behind(packed.inputs["input_ids"], 0), behind(packed.segment, -1), behind(packed.shift, 0), first
    )


def _image_tokens(model: Any, like: Tensor) -> Tensor:
    config = base_of(model).config
    ids = {getattr(config, name, None) for name in ("image_token_id", "image_token_index")}
    return like.new_tensor([i for i in ids if i is not None])


def _place(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, known: PromptCache, chunk: _Chunk
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """In front of the language model: what each token of the chunk sees, and its position."""
    dtype, device = kwargs["inputs_embeds"].dtype, chunk.ids.device
    batch, width = chunk.ids.shape
    prompt = known.mask.shape[1]
    # Of the cache: the prompt up to where the chunk begins, and nothing that was generated.
    columns = torch.arange(prompt, device=device)
    of_prompt = known.mask.bool() & (columns[None] < chunk.first[:, None])
    open_to = torch.zeros(batch, width, known.cache.get_seq_length() + width, dtype=torch.bool, device=device)
    open_to[:, :, :prompt] = of_prompt[:, None]
    query, key = chunk.segment[:, :, None], chunk.segment[:, None, :]
    causal = torch.ones(width, width, dtype=torch.bool, device=device).tril()
    diagonal = torch.eye(
        width, dtype=torch.bool, device=device
    )  # a row of nothing would be a mean over nothing
    open_to[:, :, -width:] = (((key == 0) | (key == query)) & (key >= 0) & causal) | diagonal
    mask = torch.zeros(open_to.shape, dtype=dtype, device=device).masked_fill(
        ~open_to, torch.finfo(dtype).min
    )[:, None]
    # Where the prompt has its token that the chunk begins at, or another one in its place.
    rows = torch.arange(batch, device=device)
    begin = known.positions.to(device)[..., rows, chunk.first]
    given = kwargs.get("attention_mask")
    return args, {
        **kwargs,
        "attention_mask": dict.fromkeys(given, mask) if isinstance(given, dict) else mask,
        "position_ids": begin[..., None] + torch.arange(width, device=device) - chunk.shift,
    }
