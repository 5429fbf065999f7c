"""Batched greedy generation of answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList


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
def generate_texts(
    model: Any,
    inputs: Mapping[str, Tensor],
    tokenizer: Any,
    max_new_tokens: int,
    end_of: Callable[[str], int | None] | None = None,
) -> list[str]:
    """Generate an answer to each prompt greedily.

    Args:
        model: a transformers or peft model from `load_base`, which decodes greedily.
        inputs: left-padded prompts, input_ids int64 [B, L].
        tokenizer: the model's tokenizer.
        max_new_tokens: length limit of an answer.
        end_of: as for `CompleteAnswerCriteria`: generation stops there, and text behind it is dropped.

    Returns:
        B texts without special tokens and surrounding space.

    Raises:
        ValueError: prompts are padded on the right.
    """
    mask = inputs["attention_mask"]
    if bool((mask[:, -1] == 0).any()):
        raise ValueError("generation needs prompts that are padded on the left")
    prompts = inputs["input_ids"]
    criteria = [CompleteAnswerCriteria(tokenizer, prompts, end_of)] if end_of is not None else []
    output = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        stopping_criteria=StoppingCriteriaList(criteria),
    )
    texts = tokenizer.batch_decode(output[:, prompts.shape[1] :], skip_special_tokens=True)
    for criterion in criteria:
        for row, text in criterion.texts.items():
            texts[row] = text
    return [t.strip() for t in texts]
