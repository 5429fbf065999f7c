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
        complete: whether a text says all that is wanted; asked where a text ends in a percent sign.

    Attributes:
        lengths: int64 [B], of the answers that were complete in tokens, 0 for others.
    """

    def __init__(self, tokenizer: Any, prompts: Tensor, complete: Callable[[str], bool]) -> None:
        self.tokenizer = tokenizer
        self.start = prompts.shape[1]
        self.complete = complete
        self.closing = prompts.new_tensor(_closing_tokens(tokenizer))
        self.lengths = prompts.new_zeros(len(prompts))

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Which of B sequences are complete, bool [B]."""
        answers = input_ids[:, self.start :]
        closed = torch.isin(answers[:, -1], self.closing) & (self.lengths == 0)
        for row in closed.nonzero()[:, 0].tolist():
            if self.complete(self.tokenizer.decode(answers[row], skip_special_tokens=True)):
                self.lengths[row] = answers.shape[1]
        return self.lengths > 0


@lru_cache(maxsize=4)
def _closing_tokens(tokenizer: Any) -> list[int]:
    """Ids of the tokens that end in a percent sign."""
    return [i for token, i in tokenizer.get_vocab().items() if token.endswith("%")]


@torch.no_grad()
def generate_texts(
    model: Any,
    inputs: Mapping[str, Tensor],
    tokenizer: Any,
    max_new_tokens: int,
    complete: Callable[[str], bool] | None = None,
) -> list[str]:
    """Answer each prompt greedily.

    Args:
        inputs: left-padded prompts, input_ids int64 [B, L]. max_new_tokens: stop there if the model has not.
        complete: whether a text that ends in a percent sign says all that is wanted, and the model need not go on.

    Returns:
        B texts, without special tokens and surrounding space.

    Raises:
        ValueError: prompts padded on the right, which would be answered behind their padding.
    """
    mask = inputs["attention_mask"]
    if bool((mask[:, -1] == 0).any()):
        raise ValueError("generation needs prompts that are padded on the left")
    prompts = inputs["input_ids"]
    completed = Completed(tokenizer, prompts, complete) if complete is not None else None
    output = model.generate(
        **inputs,
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        stopping_criteria=StoppingCriteriaList([completed] if completed is not None else []),
    )
    answers = list(output[:, prompts.shape[1] :])
    if completed is not None:
        answers = [a[:n] if n else a for a, n in zip(answers, completed.lengths.tolist(), strict=True)]
    return [t.strip() for t in tokenizer.batch_decode(answers, skip_special_tokens=True)]
