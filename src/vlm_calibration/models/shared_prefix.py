"""Log-likelihoods of several responses to one prompt, with image and prompt computed once.

Each query becomes one row `[prefix, suffix 1, suffix 2, ...]`. The prefix ends before the first token in which two responses differ, and
suffixes do not attend to each other: a pre-hook of the language model changes the mask and the positions that the model has built for the
row. This works for every model family, and under gradient checkpointing, where an expanded key-value cache is silently wrong.

Eager attention and sdpa take a dense mask. The kernels of FlexAttention (arXiv 2412.05496) skip blocks of tokens in which none attend:
for 4,200 tokens a dense mask takes 34 MiB in bfloat16, the tables of blocks 18 KiB.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cache, partial
from itertools import takewhile
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.utils.rnn import pad_sequence
from transformers.masking_utils import causal_mask_function

from vlm_calibration.losses.sequence import token_log_likelihood
from vlm_calibration.models.base import FLEX
from vlm_calibration.models.forward import logits_at, unwrap_peft

logger = logging.getLogger(__name__)

Scoring = Literal["auto", "shared", "plain"]
Responses = Sequence[Sequence[Sequence[int]]]
"""For each query its candidates, each a sequence of token ids behind the query's prompt."""

BLOCK = 128
"""Tokens of a block of FlexAttention's mask."""


class Prompts(NamedTuple):
    """Arguments of a forward for B prompts, padded on the right; and the length of each, int64 [B]: the rest of a row is ignored."""

    inputs: Mapping[str, Tensor]
    lengths: Tensor


class ResponseScores(NamedTuple):
    """The log-likelihoods of the tokens of B x K candidates, float32 [B, K, T], 0 where there is no token; and the mask of tokens."""

    log_likelihood: Tensor
    tokens: Tensor

    @property
    def total(self) -> Tensor:
        """Log-likelihood of each candidate, float32 [B, K]."""
        return self.log_likelihood.sum(-1)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each candidate, int64 [B, K]; 0 if a query has fewer than K."""
        return self.tokens.sum(-1)


def score_responses(
    model: Any, prompts: Prompts, responses: Responses, scoring: Scoring = "auto"
) -> ResponseScores:
    """Score packed rows ("shared"), or each candidate in a forward of its own ("plain"); "auto" packs if that is exact, else logs why not.

    A ValueError for a query without candidates, a candidate without tokens, or "shared" where the prefix cannot be shared.
    """
    if len(responses) != len(prompts.lengths) or not all(r and all(r) for r in responses):
        raise ValueError("every query needs at least one response, and every response at least one token")
    if scoring == "plain":
        return _score_plain(model, prompts, responses)
    packed = pack(prompts, responses)
    reason = why_not_shared(model, packed.inputs["input_ids"].shape[1])
    if reason is None:
        hook = partial(isolate_suffixes, segment=packed.segment, shift=packed.shift)
        with unwrap_peft(model).get_decoder().register_forward_pre_hook(hook, with_kwargs=True):
            return _score_rows(model, packed, prompts.lengths)
    if scoring == "shared":
        raise ValueError(f"the prefix cannot be shared: {reason}; use `scoring: plain`")
    _warn_once(f"scoring each response separately, which is slower: {reason}")
    return _score_plain(model, prompts, responses)


def why_not_shared(model: Any, row_length: int) -> str | None:
    """The reason why packed rows of at most `row_length` tokens are wrong for the model, or None."""
    config = unwrap_peft(model).config.get_text_config()
    attention = config._attn_implementation
    if attention not in ("eager", "sdpa", FLEX):
        return f"attention {attention!r} takes no custom mask (use `attn_implementation: sdpa` or `{FLEX}`)"
    kinds = getattr(config, "layer_types", None)
    if unsupported := sorted(set(kinds or ()) - {"full_attention", "sliding_attention"}):
        return f"{type(unwrap_peft(model)).__name__} has {unsupported[0]} layers, which process a row sequentially"
    window = getattr(config, "sliding_window", None)
    slides = kinds is None or "sliding_attention" in kinds
    if window is not None and slides and window < row_length:
        return f"rows are longer than the attention window of {window} tokens"
    return None


_warn_once = cache(logger.warning)


class Packed(NamedTuple):
    """Rows `[prefix, suffix 1, suffix 2, ...]` and the N distinct predictions made in them.

    Attributes:
        segment: int64 [B, L], 0 for the prefix, k for suffix k, -1 for padding.
        shift: int64 [B, L], distance of a token from its position without the preceding suffixes.
        rows, positions, targets: int64 [N], place of each prediction, and the predicted token.
        predictions: int64 [B, K, T], the number of the prediction of token t of candidate k; -1 where there is no token.
    """

    inputs: dict[str, Tensor]
    segment: Tensor
    shift: Tensor
    rows: Tensor
    positions: Tensor
    targets: Tensor
    predictions: Tensor


def pack(prompts: Prompts, responses: Responses) -> Packed:
    packed = []  # of each query: tokens behind the prompt, their segments and shifts, and the predictions
    # (row, position, target) -> number of the prediction. Suffixes with the same first token share its prediction.
    numbers: dict[tuple[int, int, int], int] = {}
    for row, (length, candidates) in enumerate(zip(prompts.lengths.tolist(), responses, strict=True)):
        alike = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*candidates, strict=False))
        behind = [tokens[0] for tokens in alike]
        shared, end = len(behind), length + len(behind)
        segment, shift, of_row = [0] * end, [0] * end, []
        for k, candidate in enumerate(candidates, start=1):
            # The prefix's last token predicts a suffix's first; the last token of a response predicts nothing.
            start, own = length + len(behind), len(candidate) - shared - 1
            positions = [*range(length - 1, end), *range(start, start + own)]
            predicted = zip(positions, candidate, strict=False)
            of_row.append([numbers.setdefault((row, *place), len(numbers)) for place in predicted])
            behind += candidate[shared:-1]
            segment += [k] * own
            shift += [start - end] * own
        packed.append((behind, segment, shift, of_row))
    ids, segments, shifts, index = (list(column) for column in zip(*packed, strict=True))
    device = prompts.lengths.device
    rows, at, targets = torch.tensor(list(numbers), device=device).unbind(-1)
    return Packed(
        append_tokens(prompts, ids),
        padded(segments, -1, device),
        padded(shifts, 0, device),
        *(rows, at, targets),
        padded_table(index, device),
    )


def isolate_suffixes(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, segment: Tensor, shift: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pre-hook of the language model: mask other suffixes, and make positions of each suffix continue the prefix."""

    def restrict(mask: Any) -> Any:
        if isinstance(mask, dict):
            return {kind: restrict(of_kind) for kind, of_kind in mask.items()}
        if module.config._attn_implementation == FLEX:
            return _block_mask(segment, mask)
        return additive_mask(segment, mask, kwargs["inputs_embeds"].dtype)

    positions = kwargs.get("position_ids")
    if positions is None:
        positions = torch.arange(segment.shape[1], device=segment.device)[None]
    mask = restrict(kwargs.get("attention_mask"))
    return args, {**kwargs, "attention_mask": mask, "position_ids": positions - shift}


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


def _block_mask(segment: Tensor, mask: Any) -> BlockMask:
    """As `additive_mask`, for FlexAttention. The model's own mask is causal if it is no BlockMask."""
    inner = mask.mask_mod if isinstance(mask, BlockMask) else causal_mask_function
    path = segment.to(torch.int32)

    def attends(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        of_key = path[row, key]
        same_path = ((of_key == 0) | (of_key == path[row, query])) & (of_key >= 0)
        # The diagonal keeps softmax defined for padding.
        return (same_path & inner(row, head, query, key)) | (query == key)

    (batch, length), device = segment.shape, segment.device
    # Uncompiled, it would hold a number for each pair of tokens.
    return create_block_mask(attends, batch, 1, length, length, device, BLOCK_SIZE=BLOCK, _compile=True)


def _score_plain(model: Any, prompts: Prompts, responses: Responses) -> ResponseScores:
    """Score the k-th candidate of every query with one forward per k."""
    columns = []
    for k in range(max(map(len, responses))):
        # A query with fewer candidates repeats its first, whose score is masked.
        packed = pack(prompts, [[r[k] if k < len(r) else r[0]] for r in responses])
        columns.append(_score_rows(model, packed, prompts.lengths))
    log_likelihood, tokens = (
        pad_sequence([c[i][:, 0].T for c in columns], batch_first=True).permute(2, 0, 1) for i in (0, 1)
    )
    mask = torch.tensor([[k < len(r) for k in range(len(columns))] for r in responses], device=tokens.device)
    return ResponseScores(log_likelihood * mask[..., None], tokens & mask[..., None])


def append_tokens(prompts: Prompts, ids: list[list[int]]) -> dict[str, Tensor]:
    lengths = prompts.lengths.tolist()
    shape = prompts.inputs["input_ids"].shape
    inputs = dict(prompts.inputs)
    for name, values in prompts.inputs.items():
        if values.shape != shape or name == "pixel_values":
            continue
        rows = []
        for row, length, behind in zip(values, lengths, ids, strict=True):
            tail = behind if name == "input_ids" else [int(name == "attention_mask")] * len(behind)
            rows.append(torch.cat([row[:length], row.new_tensor(tail)]))
        inputs[name] = pad_sequence(rows, batch_first=True)
    return inputs


def _score_rows(model: Any, packed: Packed, prompt_lengths: Tensor) -> ResponseScores:
    inputs = packed.inputs
    if "token_type_ids" in inputs and unwrap_peft(model).config.model_type.startswith("paligemma"):
        # PaliGemma attends to tokens of type 0 in both directions; responses are of type 1.
        types = inputs["token_type_ids"]
        response = torch.arange(types.shape[1], device=types.device)[None] >= prompt_lengths[:, None]
        inputs = {**inputs, "token_type_ids": types.masked_fill(response, 1)}
    logits = logits_at(model, inputs, packed.rows, packed.positions)
    return scores_at(token_log_likelihood(logits, packed.targets), packed.predictions)


def scores_at(log_likelihood: Tensor, predictions: Tensor) -> ResponseScores:
    """Scores of candidates from the log-likelihoods float32 [N] of N predictions; `predictions` as in `Packed`."""
    tokens = predictions >= 0
    return ResponseScores(torch.where(tokens, log_likelihood[predictions.clamp(min=0)], 0.0), tokens)


def padded(rows: list[list[int]], value: int, device: torch.device) -> Tensor:
    """Pad ragged rows on the right with `value`, int64 [B, L]."""
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value).to(device)


def padded_table(index: list[list[list[int]]], device: torch.device) -> Tensor:
    """Pad nested ragged lists with -1, int64 [B, K, T]."""
    candidates = padded([candidate for row in index for candidate in row], -1, device)
    rows = list(candidates.split([len(row) for row in index]))
    return pad_sequence(rows, batch_first=True, padding_value=-1)
