"""Batched generation of answers, with the cost of each answer and the cache of the prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList, StoppingCriteriaList

from vlm_calibration.models.forward import unwrap_peft

Sampler = Callable[[Tensor, Tensor], Tensor]
"""Replaces the scores of the next token, after given token ids: a logits processor of transformers."""


class PromptCache(NamedTuple):
    """The cache of a generation from B prompts, padded on the left.

    Attributes:
        key_values: of the prompts, and of the generated tokens.
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


@torch.no_grad()
def generate(
    model: Any,
    inputs: Mapping[str, Tensor],
    tokenizer: Any,
    max_new_tokens: int,
    end_of: Callable[[str], int | None] | None = None,
    sampler: Sampler | None = None,
    keep_cache: bool = False,
) -> Generated:
    """Generate an answer to each prompt.

    Args:
        model: a transformers or peft model from `load_base`, which decodes greedily.
        inputs: left-padded prompts, input_ids int64 [B, L]; a ValueError if they are right-padded.
        end_of: the position at which a text with a percent sign is complete, or None; an answer ends there.
        sampler: changes the scores before the likeliest token is taken; None: they stay.
    """
    mask, prompts = inputs["attention_mask"], inputs["input_ids"]
    if bool((mask[:, -1] == 0).any()):
        raise ValueError("generation needs prompts that are padded on the left")
    start = prompts.shape[1]
    # Row -> a complete text, up to its end, and its number of tokens.
    complete_texts: dict[int, tuple[str, int]] = {}
    with_percent: set[int] = set()

    def is_complete(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        tokens = tokenizer.convert_ids_to_tokens(input_ids[:, -1].tolist())
        with_percent.update(row for row, token in enumerate(tokens) if "%" in (token or ""))
        for row in with_percent - complete_texts.keys():
            answer = input_ids[row, start:]
            text = tokenizer.decode(answer, skip_special_tokens=True)
            if end_of is not None and (end := end_of(text)) is not None:
                complete_texts[row] = text[:end], len(answer)
        return torch.tensor([row in complete_texts for row in range(len(input_ids))], device=input_ids.device)

    positions: list[Tensor | None] = []  # of each pass of the language model; None: it counts them itself

    def record(module: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        positions.append(kwargs.get("position_ids"))

    with unwrap_peft(model).get_decoder().register_forward_pre_hook(record, with_kwargs=True):
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            stopping_criteria=StoppingCriteriaList([] if end_of is None else [is_complete]),
            logits_processor=LogitsProcessorList([] if sampler is None else [sampler]),
            return_dict_in_generate=True,
        )
    answers = output.sequences[:, start:]
    ends = model.generation_config.eos_token_id
    ends = torch.as_tensor([] if ends is None else ends, device=answers.device).reshape(-1)
    ended = torch.isin(answers, ends).cumsum(1) > 0
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    passes, complete = ((~ended).sum(1) + ended.any(1)).tolist(), ended.any(1).tolist()
    for row, (text, length) in complete_texts.items():
        texts[row], passes[row], complete[row] = text, length, True
    cache = _prompt_cache(output, mask, positions[0]) if keep_cache else None
    return Generated([text.strip() for text in texts], passes, complete, cache)


def second_choice(start: int) -> Sampler:
    """Decodes greedily from the second-likeliest of the first new tokens; `start` is the number of columns of the prompts."""

    def rule_out(input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] > start:
            return scores
        return scores.scatter(1, scores.argmax(1, keepdim=True), -torch.inf)

    return rule_out


def _prompt_cache(output: Any, mask: Tensor, positions: Tensor | None) -> PromptCache | None:
    """The cache in the dictionary that `generate` returned; positions that are not given count from the first column."""
    keyword = "cache" if "cache" in output else "past_key_values"  # transformers renames it
    cache = output.get(keyword)
    if not isinstance(cache, DynamicCache):
        return None
    if positions is None:
        positions = torch.arange(mask.shape[1], device=mask.device)[None]
    return PromptCache(cache, mask, positions.expand(*positions.shape[:-2], *mask.shape), keyword)
