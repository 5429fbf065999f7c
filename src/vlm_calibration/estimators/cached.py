"""Scores responses to a prompt that has been answered, from the keys and values that generation cached.

Left to compute are the prompt's last token and the responses, as a tree: an answer is computed once for all confidences after it.
As in `models.shared_prefix`, a hook before the language model replaces the mask and positions that the model builds.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlm_calibration.models.forward import logits_at, unwrap_peft
from vlm_calibration.models.generation import PromptCache
from vlm_calibration.models.shared_prefix import (
    Prompts,
    Responses,
    ResponseScores,
    padded,
    padded_table,
    scores_at,
    why_not_shared,
)


class _Tree(NamedTuple):
    """The tokens to compute: each row is a tree, in an order in which parents come first."""

    ids: Tensor  # int64 [B, W], the tokens, 0 for padding
    parent: Tensor  # int64 [B, W], the column of the previous token, -1 for the first token and for padding
    rows: Tensor  # int64 [M], with `columns` the place of each token that predicts another
    columns: Tensor
    predictor: Tensor  # int64 [N], index among the M of the token that makes each distinct prediction
    targets: Tensor  # int64 [N], the predicted token
    predictions: Tensor  # int64 [B, K, T], index among the N of token t of response k; -1 for padding

    def attended(self) -> Tensor:
        """bool [B, W, W]: which tokens of its tree each token attends to, itself and its ancestors."""
        batch, width = self.parent.shape
        mask = torch.zeros(batch, width, width, dtype=torch.bool, device=self.parent.device)
        rows = torch.arange(batch, device=self.parent.device)
        for column in range(width):
            previous = self.parent[:, column]
            mask[:, column] = mask[rows, previous.clamp(min=0)] & (previous >= 0)[:, None]
            mask[:, column, column] = True
        return mask


def reads_both_ways(model: Any) -> bool:
    """Whether the tokens of a prompt attend to later ones, so that the cache of a longer prompt cannot be reused."""
    return unwrap_peft(model).config.model_type.startswith("paligemma")


def score_cached(
    model: Any,
    cache: PromptCache,
    prompts: Prompts,
    responses: Responses,
    shared_lengths: Tensor | None = None,
) -> ResponseScores | None:
    """`score_responses` for prompts that begin like the cached ones; None if that would not be exact.

    Args:
        cache: the cache of B prompts.
        prompts: B prompts, padded on the right; their `lengths` may leave out tokens at the end.
        shared_lengths: int64 [B], how many tokens of each prompt are those of the cached one: fewer than either has, and
            all of an image's; None: they are the same prompts.
    """
    lengths = cache.mask.sum(1)
    shared = prompts.lengths - 1 if shared_lengths is None else shared_lengths
    tree = _build_tree(prompts, responses, shared)
    (batch, width), device = tree.ids.shape, tree.ids.device
    cached, prompt_width = cache.key_values.get_seq_length(), cache.mask.shape[1]
    config = unwrap_peft(model).config
    image_tokens = {getattr(config, name, None) for name in ("image_token_id", "image_token_index")} - {None}
    if (
        why_not_shared(model, cached + width) is not None
        or (reads_both_ways(model) and not (shared_lengths is None and bool((shared == lengths - 1).all())))
        # A tree may not begin with an image, whose features are not embedded as tokens.
        or not image_tokens.isdisjoint(tree.ids[:, 0].tolist())
    ):
        return None
    # The position in the cached prompt at which each tree begins.
    first = prompt_width - lengths + shared
    begin = cache.positions.to(device)[..., torch.arange(batch, device=device), first]
    attended = tree.attended()
    positions = begin[..., None] + attended.sum(-1) - 1
    # Of the cache, a tree attends to the prompt up to where it begins, and to no generated token.
    before = torch.arange(prompt_width, device=device) < first[:, None]
    allowed = torch.zeros(batch, width, cached + width, dtype=torch.bool, device=device)
    allowed[:, :, :prompt_width] = (cache.mask.bool() & before)[:, None]
    allowed[:, :, cached:] = attended

    def replace_mask(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        dtype, original = kwargs["inputs_embeds"].dtype, kwargs.get("attention_mask")
        mask = torch.zeros(allowed.shape, dtype=dtype, device=device)
        mask = mask.masked_fill(~allowed, torch.finfo(dtype).min)[:, None]
        by_kind = dict.fromkeys(original, mask) if isinstance(original, dict) else mask
        return args, {**kwargs, "attention_mask": by_kind, "position_ids": positions}

    inputs = {
        "input_ids": tree.ids,
        "attention_mask": cache.mask.new_ones(batch, cached + width),
        cache.keyword: cache.key_values,
        # Without them, Qwen's models compute positions from those of the last prompts that they saw, of any number of rows.
        "position_ids": positions,
    }
    with unwrap_peft(model).get_decoder().register_forward_pre_hook(replace_mask, with_kwargs=True):
        try:
            logits = logits_at(model, inputs, tree.rows, tree.columns)
        finally:
            cache.key_values.crop(cached - cache.key_values.get_seq_length())
    return scores_at(logits.float().log_softmax(-1)[tree.predictor, tree.targets], tree.predictions)


def _build_tree(prompts: Prompts, responses: Responses, shared: Tensor) -> _Tree:
    """The tokens of prompts after their first `shared` ones, and the responses after them."""
    ids: list[list[int]] = []
    parents: list[list[int]] = []
    predictors: dict[tuple[int, int], int] = {}  # (row, column) -> index among the M
    predictions: dict[tuple[int, int], int] = {}  # (index among the M, token) -> index among the N
    indices: list[list[list[int]]] = []  # as `_Tree.predictions`
    bounds = zip(prompts.inputs["input_ids"].tolist(), shared.tolist(), prompts.lengths.tolist(), strict=True)
    for row, ((prompt, start, end), candidates) in enumerate(zip(bounds, responses, strict=True)):
        tokens, last = prompt[start:end], end - start - 1
        parent = list(range(-1, last))
        children: dict[tuple[int, int], int] = {}  # (column, next token) -> its column
        of_query = []
        for candidate in candidates:
            column, of_response = last, []
            for position, token in enumerate(candidate):
                source = predictors.setdefault((row, column), len(predictors))
                of_response.append(predictions.setdefault((source, token), len(predictions)))
                if position == len(candidate) - 1:
                    break  # the last token of a response predicts nothing
                if (column, token) not in children:
                    children[column, token] = len(tokens)
                    tokens.append(token)
                    parent.append(column)
                column = children[column, token]
            of_query.append(of_response)
        ids.append(tokens)
        parents.append(parent)
        indices.append(of_query)
    device = prompts.lengths.device
    rows, columns = torch.tensor(list(predictors), device=device).unbind(-1)
    predictor, targets = torch.tensor(list(predictions), device=device).unbind(-1)
    padded_tree = padded(ids, 0, device), padded(parents, -1, device)
    return _Tree(*padded_tree, rows, columns, predictor, targets, padded_table(indices, device))
