"""Scores responses behind a prompt that has just been answered, without reading the prompt again.

Generation leaves the prompt's keys and values in its cache. What is left to compute are the prompt's last token and the
responses, as a tree: where they begin alike they share their tokens, so that an answer is computed once for all confidences
behind it. The same holds of another prompt that begins like the one in the cache, from where it goes on differently. As in
`models.shared_prefix`, the model builds mask and positions in its own way, and a hook in front of its language model puts
right what each token sees and where it stands. Where that would not be exact, nothing is scored here.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from vlm_calibration.models.forward import logits_at, unwrap_peft
from vlm_calibration.models.shared_prefix import (
    Prompts,
    Responses,
    ResponseScores,
    padded,
    padded_table,
    scores_at,
    why_not_shared,
)

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


class _Tree(NamedTuple):
    """The tokens to compute, [B, W], each row a tree in an order in which parents come first.

    ids: the tokens, 0 for padding. parent: the column of the token that comes before, -1 for the first and for padding.
    depth: how many come before. first: int64 [B], the column of the prompt that the first stands in. rows, columns: int64 [M],
    the tokens that predict. predictor, targets: int64 [N], the different predictions: by which of the M, and of which token.
    which: int64 [B, K, T], which of the N is token t of response k; -1 where there is none.
    """

    ids: Tensor
    parent: Tensor
    depth: Tensor
    first: Tensor
    rows: Tensor
    columns: Tensor
    predictor: Tensor
    targets: Tensor
    which: Tensor


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
    return unwrap_peft(model).config.model_type.startswith("paligemma")


def score_cached(
    model: Any,
    known: PromptCache,
    prompts: Prompts,
    responses: Responses,
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
    tree = _tree(prompts, responses, kept, known.mask.shape[1] - lengths + kept)
    held = known.cache.get_seq_length()
    if why_not_shared(model, held + tree.ids.shape[1]) is not None:
        return None
    if reads_both_ways(model) and not (same and bool((kept == lengths - 1).all())):
        return None
    if bool(torch.isin(tree.ids[:, 0], _image_tokens(model, tree.ids)).any()):
        return None  # which is not read as a token
    hook = partial(_place, known=known, tree=tree)
    handle = unwrap_peft(model).get_decoder().register_forward_pre_hook(hook, with_kwargs=True)
    inputs = {
        "input_ids": tree.ids,
        "attention_mask": known.mask.new_ones(len(tree.ids), held + tree.ids.shape[1]),
        known.keyword: known.cache,
    }
    try:
        logits = logits_at(model, inputs, tree.rows, tree.columns)
    finally:
        handle.remove()
        known.cache.crop(held - known.cache.get_seq_length())
    return scores_at(logits.float().log_softmax(-1)[tree.predictor, tree.targets], tree.which)


def _tree(prompts: Prompts, responses: Responses, kept: Tensor, first: Tensor) -> _Tree:
    """What prompts hold behind their first `kept` tokens, and the responses behind them."""
    ids: list[list[int]] = []
    parents: list[list[int]] = []
    depths: list[list[int]] = []
    predictors: dict[tuple[int, int], int] = {}  # (row, column) -> which of the M
    predictions: dict[tuple[int, int], int] = {}  # (which of the M, token) -> which of the N
    which: list[list[list[int]]] = []
    bounds = zip(prompts.inputs["input_ids"].tolist(), kept.tolist(), prompts.lengths.tolist(), strict=True)
    for row, ((prompt, start, end), candidates) in enumerate(zip(bounds, responses, strict=True)):
        tokens = prompt[start:end]
        parent, depth = list(range(-1, len(tokens) - 1)), list(range(len(tokens)))
        last = len(tokens) - 1
        children: dict[tuple[int, int], int] = {}  # (column, token) -> the column of that token behind it
        of_row = []
        for candidate in candidates:
            column, found = last, []
            for place, token in enumerate(candidate):
                predictor = predictors.setdefault((row, column), len(predictors))
                found.append(predictions.setdefault((predictor, token), len(predictions)))
                if place == len(candidate) - 1:
                    break  # the last token of a response predicts nothing
                if (column, token) not in children:
                    children[column, token] = len(tokens)
                    tokens.append(token)
                    parent.append(column)
                    depth.append(depth[column] + 1)
                column = children[column, token]
            of_row.append(found)
        ids.append(tokens)
        parents.append(parent)
        depths.append(depth)
        which.append(of_row)
    device = prompts.lengths.device
    rows, columns = torch.tensor(list(predictors), device=device).unbind(-1)
    by, targets = torch.tensor(list(predictions), device=device).unbind(-1)
    return _Tree(
        padded(ids, 0, device),
        padded(parents, -1, device),
        padded(depths, 0, device),
        first,
        rows,
        columns,
        by,
        targets,
        padded_table(which, device),
    )


def _seen(parent: Tensor) -> Tensor:
    """Which tokens of its tree each token sees: itself and what comes before it, bool [B, W, W]."""
    batch, width = parent.shape
    seen = torch.zeros(batch, width, width, dtype=torch.bool, device=parent.device)
    rows = torch.arange(batch, device=parent.device)
    for column in range(width):
        before = parent[:, column]
        seen[:, column] = seen[rows, before.clamp(min=0)] & (before >= 0)[:, None]
        seen[:, column, column] = True
    return seen


def _image_tokens(model: Any, like: Tensor) -> Tensor:
    config = unwrap_peft(model).config
    ids = {getattr(config, name, None) for name in ("image_token_id", "image_token_index")}
    return like.new_tensor([i for i in ids if i is not None])


def _place(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, known: PromptCache, tree: _Tree
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """In front of the language model: what each token of the tree sees, and its position."""
    dtype, device = kwargs["inputs_embeds"].dtype, tree.ids.device
    batch, width = tree.ids.shape
    prompt = known.mask.shape[1]
    # Of the cache: the prompt up to where the tree begins, and nothing that was generated.
    columns = torch.arange(prompt, device=device)
    of_prompt = known.mask.bool() & (columns[None] < tree.first[:, None])
    open_to = torch.zeros(batch, width, known.cache.get_seq_length() + width, dtype=torch.bool, device=device)
    open_to[:, :, :prompt] = of_prompt[:, None]
    open_to[:, :, -width:] = _seen(tree.parent)
    mask = torch.zeros(open_to.shape, dtype=dtype, device=device).masked_fill(
        ~open_to, torch.finfo(dtype).min
    )[:, None]
    # Where the prompt has its token that the tree begins at, or another one in its place.
    rows = torch.arange(batch, device=device)
    begin = known.positions.to(device)[..., rows, tree.first]
    given = kwargs.get("attention_mask")
    return args, {
        **kwargs,
        "attention_mask": dict.fromkeys(given, mask) if isinstance(given, dict) else mask,
        "position_ids": begin[..., None] + tree.depth,
    }
