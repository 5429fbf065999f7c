"""Log-likelihoods of several responses to one prompt, with image and prompt computed once.

Candidates differ in a few tokens at their end. One row a query holds `[prefix, suffix 1, suffix 2, ...]`, where the prefix
reaches to the first token in which two responses differ, and no suffix sees another. The model builds its own attention
mask and positions for that row; a hook in front of its language model then closes the mask between suffixes and lets each
suffix's positions follow on the prefix. So nothing here depends on the family, and it holds under gradient checkpointing,
where an expanded key-value cache is silently wrong. The plain path, one forward for each candidate, is what all of
this equals.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlm_calibration.losses.sequence import token_log_likelihood
from vlm_calibration.models.forward import logits_at, unwrap_peft

logger = logging.getLogger(__name__)

Scoring = Literal["auto", "shared", "plain"]
Responses = Sequence[Sequence[Sequence[int]]]
"""For each query its candidates, each a sequence of token ids that follow the query's prompt."""

ATTENTION = ("eager", "sdpa")
LAYER_TYPES = ("full_attention", "sliding_attention")


class Prompts(NamedTuple):
    """Prompts that responses are to follow.

    inputs: what the model's forward takes, padded on the right. lengths: int64 [B], how many leading tokens of each row
    come before the responses; the rest of a row is not looked at.
    """

    inputs: Mapping[str, Tensor]
    lengths: Tensor


class ResponseScores(NamedTuple):
    """log_likelihood: float32 [B, K, T], of each token of each candidate, 0 elsewhere. tokens: bool [B, K, T], where one is."""

    log_likelihood: Tensor
    tokens: Tensor

    @property
    def total(self) -> Tensor:
        """log p of each candidate as a whole, [B, K]."""
        return self.log_likelihood.sum(-1)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each candidate, int64 [B, K]; 0 where a query has fewer than K."""
        return self.tokens.sum(-1)


def score_responses(
    model: Any, prompts: Prompts, responses: Responses, scoring: Scoring = "auto"
) -> ResponseScores:
    """Log-likelihoods of every candidate's tokens.

    Args:
        model: a transformers or peft model.
        scoring: "shared" packs, "plain" runs one forward for each candidate, "auto" packs where that is exact and says
            once in the log why it does not.

    Raises:
        ValueError: a query without candidates or a candidate without tokens; "shared" with a model whose prefix cannot be
            shared.
    """
    if len(responses) != len(prompts.lengths) or not all(r and all(r) for r in responses):
        raise ValueError("every query needs at least one response, and every response at least one token")
    if scoring == "plain":
        return score_plainly(model, prompts, responses)
    packed = pack(prompts, responses)
    reason = why_not_shared(model, packed.inputs["input_ids"].shape[1])
    if reason is None:
        return score_packed(model, packed)
    if scoring == "shared":
        raise ValueError(f"the prefix cannot be shared: {reason}; use `scoring: plain`")
    _say_once(f"scoring each response on its own, which is slower: {reason}")
    return score_plainly(model, prompts, responses)


def why_not_shared(model: Any, row_length: int) -> str | None:
    """Why packed rows of this length would be wrong for the model, or None.

    Args:
        row_length: tokens of the longest packed row.
    """
    config = unwrap_peft(model).config.get_text_config()
    attention = config._attn_implementation
    if attention not in ATTENTION:
        return f"attention {attention!r} takes no mask of its own kind (attn_implementation: sdpa does)"
    kinds = getattr(config, "layer_types", None)
    if strange := sorted(set(kinds or ()) - set(LAYER_TYPES)):
        return f"{type(unwrap_peft(model)).__name__} has {strange[0]} layers, which read a row from left to right"
    window = getattr(config, "sliding_window", None)
    slides = kinds is None or "sliding_attention" in kinds
    if window is not None and slides and window < row_length:
        return f"a row of {row_length} tokens is longer than the attention window of {window}"
    return None


_said: set[str] = set()


def _say_once(message: str) -> None:
    # Row lengths differ from batch to batch; the reason is the same.
    kind = re.sub(r"\d+", "#", message)
    if kind not in _said:
        _said.add(kind)
        logger.warning(message)


class Packed(NamedTuple):
    """Rows `[prefix, suffix 1, suffix 2, ...]`.

    inputs: what the model's forward takes. segment: int64 [B, L], 0 for the prefix, k for suffix k, -1 for padding.
    shift: int64 [B, L], how far a token is behind where it would be without the suffixes before its own.
    rows, positions, targets: int64 [N], the N different predictions: where each is made, and of which token.
    lengths: int64 [B], tokens of each prompt. which: int64 [B, K, T], which of the N is token t of candidate k; -1 where
    there is none.
    """

    inputs: dict[str, Tensor]
    segment: Tensor
    shift: Tensor
    rows: Tensor
    positions: Tensor
    targets: Tensor
    lengths: Tensor
    which: Tensor


def pack(prompts: Prompts, responses: Responses) -> Packed:
    """Lay the candidates of each query out in one row."""
    ids: list[list[int]] = []  # behind the prompt
    segments: list[list[int]] = []
    shifts: list[list[int]] = []
    places: dict[tuple[int, int, int], int] = {}  # (row, position, target) -> which of the N

    def predictions(row: int, positions: Iterable[int], targets: Sequence[int]) -> list[int]:
        # Suffixes that begin alike share their first prediction, unless all of them do.
        return [
            places.setdefault((row, position, token), len(places))
            for position, token in zip(positions, targets, strict=False)
        ]

    index: list[list[list[int]]] = []
    lengths = prompts.lengths.tolist()
    for row, (length, candidates) in enumerate(zip(lengths, responses, strict=True)):
        shared = _shared_length(candidates)
        common = list(candidates[0][:shared])
        first = predictions(row, range(length - 1, length - 1 + shared), common)
        behind, segment, shift, of_row = common, [0] * shared, [0] * shared, []
        for k, candidate in enumerate(candidates, start=1):
            suffix = list(candidate[shared:])
            start = length + len(behind)
            # The last token of a response predicts nothing. The first of a suffix is predicted by the prefix's last.
            where = [length + shared - 1, *range(start, start + len(suffix) - 1)]
            of_row.append([*first, *predictions(row, where, suffix)])
            behind = behind + suffix[:-1]
            segment += [k] * (len(suffix) - 1)
            shift += [start - length - shared] * (len(suffix) - 1)
        ids.append(behind)
        segments.append([0] * length + segment)
        shifts.append([0] * length + shift)
        index.append(of_row)
    device = prompts.lengths.device
    rows, positions, targets = torch.tensor(list(places), device=device).unbind(-1)
    return Packed(
        _followed_by(prompts, ids),
        padded(segments, -1, device),
        padded(shifts, 0, device),
        rows,
        positions,
        targets,
        prompts.lengths,
        padded_table(index, device),
    )


def score_packed(model: Any, packed: Packed) -> ResponseScores:
    """One forward over packed rows."""
    decoder = unwrap_peft(model).get_decoder()
    hook = partial(_separate, segment=packed.segment, shift=packed.shift)
    handle = decoder.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        inputs = _with_response_types(model, packed)
        logits = logits_at(model, inputs, packed.rows, packed.positions)
    finally:
        handle.remove()
    return scores_at(token_log_likelihood(logits, packed.targets), packed.which)


def score_plainly(model: Any, prompts: Prompts, responses: Responses) -> ResponseScores:
    """One forward for each k over the k-th candidate of every query; images stay as they are."""
    columns = []
    for k in range(max(map(len, responses))):
        # A query with fewer candidates repeats its first, and what comes of it is dropped.
        column = [[r[k] if k < len(r) else r[0]] for r in responses]
        alone = pack(prompts, column)
        inputs = _with_response_types(model, alone)
        logits = logits_at(model, inputs, alone.rows, alone.positions)
        found = scores_at(token_log_likelihood(logits, alone.targets), alone.which)
        there = torch.tensor([k < len(r) for r in responses], device=found.tokens.device)[:, None]
        columns.append((found.log_likelihood[:, 0] * there, found.tokens[:, 0] & there))
    log_likelihood, tokens = (
        pad_sequence([c[i].T for c in columns], batch_first=True).permute(2, 0, 1) for i in (0, 1)
    )
    return ResponseScores(log_likelihood, tokens)


def _shared_length(candidates: Sequence[Sequence[int]]) -> int:
    """Tokens with which all candidates begin."""
    shared = 0
    for tokens in zip(*candidates, strict=False):
        if len(set(tokens)) > 1:
            break
        shared += 1
    return shared


def _followed_by(prompts: Prompts, ids: list[list[int]]) -> dict[str, Tensor]:
    """The prompts' inputs with further tokens behind each prompt, of the kind that text is."""
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


def _with_response_types(model: Any, packed: Packed) -> dict[str, Tensor]:
    """PaliGemma reads tokens of type 0 in both directions; what it is to say has type 1."""
    inputs = packed.inputs
    if "token_type_ids" not in inputs or not unwrap_peft(model).config.model_type.startswith("paligemma"):
        return inputs
    types = inputs["token_type_ids"]
    response = torch.arange(types.shape[1], device=types.device)[None] >= packed.lengths[:, None]
    return {**inputs, "token_type_ids": torch.where(response, torch.ones_like(types), types)}


def _separate(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, segment: Tensor, shift: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """In front of the language model: close the mask between suffixes, and let each follow on the prefix."""
    embeddings = kwargs["inputs_embeds"]
    length, dtype = segment.shape[1], embeddings.dtype
    query, key = segment[:, :, None], segment[:, None, :]
    open_to = ((key == 0) | (key == query)) & (key >= 0)
    causal = torch.ones(length, length, dtype=torch.bool, device=segment.device).tril()
    diagonal = torch.eye(length, dtype=torch.bool, device=segment.device)

    def closed(mask: Tensor | None) -> Tensor:
        if mask is None or mask.ndim == 2:  # the model will make a causal one of it
            allowed = (open_to & causal)[:, None]
        else:
            allowed = (mask if mask.dtype == torch.bool else mask == 0) & open_to[:, None]
        # A row without an open place, as padding has, would be a mean over nothing. Additive, since eager attention
        # adds whatever it is given.
        blocked = ~(allowed | diagonal)
        return torch.zeros(blocked.shape, dtype=dtype, device=segment.device).masked_fill(
            blocked, torch.finfo(dtype).min
        )

    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if positions is None:
        positions = torch.arange(length, device=segment.device)[None]
    return args, {
        **kwargs,
        "attention_mask": {k: closed(m) for k, m in mask.items()} if isinstance(mask, dict) else closed(mask),
        "position_ids": positions - shift,
    }


def scores_at(log_likelihood: Tensor, index: Tensor) -> ResponseScores:
    """The scores of candidates whose tokens are predictions of these numbers, int64 [B, K, T]; -1 where there is none."""
    tokens = index >= 0
    return ResponseScores(torch.where(tokens, log_likelihood[index.clamp(min=0)], 0.0), tokens)


def padded(rows: list[list[int]], value: int, device: torch.device) -> Tensor:
    """Ragged rows as int64 [B, L], this value behind the shorter ones."""
    return pad_sequence([torch.tensor(r) for r in rows], batch_first=True, padding_value=value).to(device)


def padded_table(index: list[list[list[int]]], device: torch.device) -> Tensor:
    """[B, K, T] of ragged lists, -1 where there is nothing."""
    widest = max(len(c) for row in index for c in row)
    most = max(map(len, index))
    table = torch.full((len(index), most, widest), -1)
    for b, row in enumerate(index):
        for k, candidate in enumerate(row):
            table[b, k, : len(candidate)] = torch.tensor(candidate, dtype=torch.int64)
    return table.to(device)
