"""Batched generation of answers, with the cost of each answer and the cache of the prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from vlm_calibration.models.forward import unwrap_peft


class PromptCache(NamedTuple):
    """The cache of a generation from B prompts, padded on the left.

    Attributes:
        key_values: keys and values of the prompts, and of the generated tokens.
        mask: int64 [B, P], 1 at the tokens of the prompts.
        positions: int64 [..., B, P], position ids of the prompts, with leading axes for positions of several axes.
        keyword: name of `key_values` among the arguments of the model's forward.
    """

    key_values: DynamicCache
    mask: Tensor
    positions: Tensor
    keyword: str


class Generated(NamedTuple):
    """The answers to B prompts.

    Attributes:
        texts: of each, without special tokens and surrounding space.
        passes: forward passes for each: the number of its new tokens, its end included.
        complete: for each whether it ends before the limit of new tokens cuts it off.
        cache: None if it is not kept, or the model has a cache of another kind.
    """

    texts: list[str]
    passes: list[int]
    complete: list[bool]
    cache: PromptCache | None


class CompleteAnswerCriteria(StoppingCriteria):
    """Stops the generation of an answer when its text is complete.

    Args:
        tokenizer: the model's tokenizer.
        prompts: int64 [B, L]; answers begin behind them.
        end_of: returns the position at which a complete text ends, None for an incomplete one. Called only for texts with
            a percent sign.

    Attributes:
        texts: row -> text of each complete answer, up to its end.
        lengths: int64 [B], tokens of each answer when it became complete, else 0.
    """

    def __init__(self, tokenizer: Any, prompts: Tensor, end_of: Callable[[str], int | None]) -> None:
        self.tokenizer = tokenizer
        self.start = prompts.shape[1]
        self.end_of = end_of
        self.percent = prompts.new_tensor(_percent_tokens(tokenizer))
        self.has_percent = torch.zeros_like(prompts[:, 0], dtype=torch.bool)
        self.texts: dict[int, str] = {}
        self.lengths = prompts.new_zeros(len(prompts))

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Whether each sequence is complete, bool [B]."""
        answers = input_ids[:, self.start :]
        self.has_percent |= torch.isin(answers[:, -1], self.percent)
        for row in (self.has_percent & (self.lengths == 0)).nonzero()[:, 0].tolist():
            text = self.tokenizer.decode(answers[row], skip_special_tokens=True)
            end = self.end_of(text)
            if end is not None:
                self.texts[row] = text[:end]
                self.lengths[row] = answers.shape[1]
        return self.lengths > 0


@lru_cache(maxsize=4)
def _percent_tokens(tokenizer: Any) -> list[int]:
    """Ids of the tokens that contain a percent sign."""
    return [i for token, i in tokenizer.get_vocab().items() if "%" in token]


@torch.no_grad()
def generate(
    model: Any,
    inputs: Mapping[str, Tensor],
    tokenizer: Any,
    max_new_tokens: int,
    end_of: Callable[[str], int | None] | None = None,
    sampler: LogitsProcessor | None = None,
    keep_cache: bool = False,
) -> Generated:
    """Generate an answer to each prompt.

    Args:
        model: a transformers or peft model from `load_base`, which decodes greedily.
        inputs: left-padded prompts, input_ids int64 [B, L].
        tokenizer: the model's tokenizer.
        max_new_tokens: length limit of an answer.
        end_of: as for `CompleteAnswerCriteria`: generation stops there, and text behind it is dropped.
        sampler: samples the tokens; None: greedy decoding.
        keep_cache: keep the prompts' keys and values.

    Raises:
        ValueError: prompts are padded on the right.
    """
    mask, prompts = inputs["attention_mask"], inputs["input_ids"]
    if bool((mask[:, -1] == 0).any()):
        raise ValueError("generation needs prompts that are padded on the left")
    criterion = CompleteAnswerCriteria(tokenizer, prompts, end_of) if end_of is not None else None
    # The position ids of each pass of the language model; None for a pass in which it counts them itself.
    positions: list[Tensor | None] = []
    handle = (
        unwrap_peft(model)
        .get_decoder()
        .register_forward_pre_hook(
            lambda module, args, kwargs: positions.append(kwargs.get("position_ids")), with_kwargs=True
        )
    )
    try:
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            stopping_criteria=StoppingCriteriaList([criterion] if criterion is not None else []),
            logits_processor=LogitsProcessorList([sampler] if sampler is not None else []),
            return_dict_in_generate=True,
        )
    finally:
        handle.remove()
    answers = output.sequences[:, prompts.shape[1] :]
    ends = model.generation_config.eos_token_id
    ends = torch.as_tensor([] if ends is None else ends, device=answers.device).reshape(-1)
    ended = torch.isin(answers, ends).cumsum(1) > 0
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    passes, complete = ((~ended).sum(1) + ended.any(1)).tolist(), ended.any(1).tolist()
    if criterion is not None:
        lengths = criterion.lengths.tolist()
        for row, text in criterion.texts.items():
            texts[row], passes[row], complete[row] = text, lengths[row], True
    cache = _prompt_cache(output, mask, positions[0]) if keep_cache else None
    return Generated([text.strip() for text in texts], passes, complete, cache)


def _prompt_cache(output: Any, mask: Tensor, positions: Tensor | None) -> PromptCache | None:
    """The cache in the dictionary that `generate` returned; positions that are not given count from the first column."""
    # transformers renames it.
    keyword = "cache" if "cache" in output else "past_key_values"
    cache = output.get(keyword)
    if not isinstance(cache, DynamicCache):
        return None
    if positions is None:
        positions = torch.arange(mask.shape[1], device=mask.device)[None]
    return PromptCache(cache, mask, positions.expand(*positions.shape[:-2], *mask.shape), keyword)
