"""Generation that tells what it cost and leaves behind what can be used again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from vlm_calibration.estimators.cached import PromptCache, remembered
from vlm_calibration.models.forward import unwrap_peft
from vlm_calibration.models.generation import CompleteAnswerCriteria


class GenerationRecorder:
    """A model to generate with, which counts the tokens that each answer took, and may keep what it read of the prompts.

    Args:
        model: a transformers or peft model.
        drawn: where tokens are not to be the likeliest ones, what draws them.
        remember: keep the prompts' keys and values.

    Attributes:
        passes: after `generate`, how many tokens each row took, its end included: the forward passes that it cost.
        known: what was kept of the prompts, None if nothing.
    """

    def __init__(self, model: Any, drawn: LogitsProcessor | None = None, remember: bool = False) -> None:
        self.model = model
        self.drawn = drawn
        self.remember = remember
        self.passes: list[int] = []
        self.known: PromptCache | None = None

    def generate(self, **settings: Any) -> Tensor:
        """`model.generate`: int64 [B, L], prompts with their answers."""
        more: dict[str, Any] = {"return_dict_in_generate": True}
        if self.drawn is not None:
            more["logits_processor"] = LogitsProcessorList([self.drawn])
        with _positions_of(self.model) as positions:
            output = self.model.generate(**settings, **more)
        if self.remember:
            self.known = remembered(output, settings, positions[0])
        new = output.sequences[:, settings["input_ids"].shape[1] :]
        self.passes = self._lengths(new)
        for criterion in settings.get("stopping_criteria", ()):
            if isinstance(criterion, CompleteAnswerCriteria):
                lengths = criterion.lengths.tolist()
                self.passes = [own or n for own, n in zip(lengths, self.passes, strict=True)]
        return output.sequences

    def _lengths(self, new: Tensor) -> list[int]:
        ends = self.model.generation_config.eos_token_id
        ends = torch.as_tensor([] if ends is None else ends, device=new.device).reshape(-1)
        over = torch.isin(new, ends).cumsum(1) > 0
        return ((~over).sum(1) + over.any(1)).tolist()


@contextmanager
def _positions_of(model: Any) -> Iterator[list[Tensor | None]]:
    """The position ids that the language model is given, of one pass after the other; None where it is to count itself."""
    seen: list[Tensor | None] = []
    handle = (
        unwrap_peft(model)
        .get_decoder()
        .register_forward_pre_hook(lambda m, a, k: seen.append(k.get("position_ids")), with_kwargs=True)
    )
    try:
        yield seen
    finally:
        handle.remove()
