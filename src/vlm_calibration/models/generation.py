"""Batched greedy generation of answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList


class Completed(StoppingCriteria):
    """Ends an answer when its text is complete.

    Args:
        tokenizer: of the model. prompts: int64 [B, L]; answers begin behind them.
        end_of: where a text ends that says all that is wanted, and that nothing to come can change; None for other texts.
            Asked of texts with a percent sign.

    Attributes:
        texts: row -> text of each answer that was complete, up to its end.
        lengths: int64 [B], tokens of each answer when it was found complete, 0 for others.
    """

    def __init__(self, tokenizer: Any, prompts: Tensor, end_of: Callable[[str], int | None]) -> None:
        self.tokenizer = tokenizer
        self.start = prompts.shape[1]
        self.end_of = end_of
        self.percent = prompts.new_tensor(_percent_tokens(tokenizer))
        self.asked = torch.zeros_like(prompts[:, 0], dtype=torch.bool)
        self.texts: dict[int, str] = {}
        self.lengths = prompts.new_zeros(len(prompts))

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Which of B sequences are complete, bool [B]."""
        answers = input_ids[:, self.start :]
        self.asked |= torch.isin(answers[:, -1], self.percent)
        for row in (self.asked & (self.lengths == 0)).nonzero()[:, 0].tolist():
            text = self.tokenizer.decode(answers[row], skip_special_tokens=True)
            end = self.end_of(text)
            if end is not None:
                self.texts[row] = text[:end]
                self.lengths[row] = answers.shape[1]
        return self.lengths > 0


@lru_cache(maxsize=4)
def _percent_tokens(tokenizer: Any) -> list[int]:
    """Ids of the tokens with a percent sign."""
    return [i for token, i in tokenizer.get_vocab().items() if "%" in token]


@torch.no_grad()
def generate_texts(
    model: Any,
    inputs: Mapping[str, Tensor],
    tokenizer: Any,
    max_new_tokens: int,
    end_of: Callable[[str], int | None] | None = None,
) -> list[str]:
    """Answer each prompt greedily.

    Args:
        inputs: left-padded prompts, input_ids int64 [B, L]. max_new_tokens: stop there if the model has not.
        end_of: where a text with a percent sign ends that says all that is wanted, whatever would follow; the model need
            not go on, and what stands behind is dropped. None for a text that does not.

    Returns:
        B texts, without special tokens and surrounding space.

    Raises:
        ValueError: prompts padded on the right, which would be answered behind their padding.
    """
    mask = inputs["attention_mask"]
    if bool((mask[:, -1] == 0).any()):
        raise ValueError("generation needs prompts that are padded on the left")
    prompts = inputs["input_ids"]
    completed = Completed(tokenizer, prompts, end_of) if end_of is not None else None
    output = model.generate(
        **inputs,
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        stopping_criteria=StoppingCriteriaList([completed] if completed is not None else []),
    )
    texts = tokenizer.batch_decode(output[:, prompts.shape[1] :], skip_special_tokens=True)
    for row, text in completed.texts.items() if completed is not None else ():
        texts[row] = text
    return [t.strip() for t in texts]
