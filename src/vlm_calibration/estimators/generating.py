"""Generation that counts its forward passes and can keep the cache of the prompts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from vlm_calibration.estimators.cached import PromptCache, prompt_cache
from vlm_calibration.models.forward import unwrap_peft
from vlm_calibration.models.generation import CompleteAnswerCriteria


class GenerationRecorder:
    """Wraps a model for `generate`: counts the tokens of each answer, and can keep the prompts' keys and values.

    Args:
        model: a transformers or peft model.
        sampler: samples the tokens; None: greedy decoding.
        keep_cache: keep the prompts' keys and values.

    Attributes:
        passes: after `generate`, the forward passes for each row: the number of its new tokens, its end included.
        complete: after `generate`, for each row whether its answer ends before the limit of new tokens cuts it off.
        cache: the kept keys and values, or None.
    """

    def __init__(self, model: Any, sampler: LogitsProcessor | None = None, keep_cache: bool = False) -> None:
        self.model = model
        self.sampler = sampler
        self.keep_cache = keep_cache
        self.passes: list[int] = []
        self.complete: list[bool] = []
        self.cache: PromptCache | None = None

    def generate(self, **settings: Any) -> Tensor:
        """`model.generate`: int64 [B, L], the prompts followed by their answers."""
        extra: dict[str, Any] = {"return_dict_in_generate": True}
        if self.sampler is not None:
            extra["logits_processor"] = LogitsProcessorList([self.sampler])
        with _record_positions(self.model) as positions:
            output = self.model.generate(**settings, **extra)
        if self.keep_cache:
            self.cache = prompt_cache(output, settings, positions[0])
        answers = output.sequences[:, settings["input_ids"].shape[1] :]
        self.passes, self.complete = self._lengths(answers)
        for criterion in settings.get("stopping_criteria", ()):
            if isinstance(criterion, CompleteAnswerCriteria):
                lengths = criterion.lengths.tolist()
                self.passes = [length or n for length, n in zip(lengths, self.passes, strict=True)]
                self.complete = [length > 0 or c for length, c in zip(lengths, self.complete, strict=True)]
        return output.sequences

    def _lengths(self, answers: Tensor) -> tuple[list[int], list[bool]]:
        ends = self.model.generation_config.eos_token_id
        ends = torch.as_tensor([] if ends is None else ends, device=answers.device).reshape(-1)
        ended = torch.isin(answers, ends).cumsum(1) > 0
        return ((~ended).sum(1) + ended.any(1)).tolist(), ended.any(1).tolist()


@contextmanager
def _record_positions(model: Any) -> Iterator[list[Tensor | None]]:
    """Record the position ids of each pass of the language model; None for a pass in which it counts them itself."""
    positions: list[Tensor | None] = []
    handle = (
        unwrap_peft(model)
        .get_decoder()
        .register_forward_pre_hook(lambda m, a, k: positions.append(k.get("position_ids")), with_kwargs=True)
    )
    try:
        yield positions
    finally:
        handle.remove()
