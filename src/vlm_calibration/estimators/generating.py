"""Greedy answers to a batch, graded; and a generation that counts its forward passes and can keep the cache of the prompts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from vlm_calibration.data.collate import PromptBatch
from vlm_calibration.estimators.cached import PromptCache
from vlm_calibration.estimators.predictions import EstimatedPrediction, graded_prediction
from vlm_calibration.models.forward import unwrap_peft
from vlm_calibration.models.generation import CompleteAnswerCriteria, generate_texts
from vlm_calibration.text.confidence import end_of_confidence


def answer_batch(
    model: Any, batch: PromptBatch, tokenizer: Any, max_new_tokens: int
) -> list[EstimatedPrediction]:
    """Generate, parse and grade the answers to a batch; no prompts give no answers. Generation stops after the confidence.

    `model` is a transformers or peft model, or a `GenerationRecorder` of one.
    """
    if not batch.queries:
        return []
    texts = generate_texts(model, batch.inputs, tokenizer, max_new_tokens, end_of_confidence)
    rows = zip(batch.queries, texts, batch.perturbations, batch.noise_steps, strict=True)
    return [graded_prediction(*row, batch.grading) for row in rows]


class GenerationRecorder:
    """Wraps a model for `generate`: counts the tokens of each answer, and can keep the prompts' keys and values.

    Args:
        model: a transformers or peft model.
        sampler: samples the tokens; None: greedy decoding.
        keep_cache: keep the prompts' keys and values.

    Attributes:
        passes: after `generate`, the forward passes for each row: the number of its new tokens, its end included.
        complete: after `generate`, for each row whether its answer ends before the limit of new tokens cuts it off.
        cache: the kept keys and values; None if they are not kept, or the model has a cache of another kind.
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
        # The position ids of each pass of the language model; None for a pass in which it counts them itself.
        positions: list[Tensor | None] = []
        decoder = unwrap_peft(self.model).get_decoder()
        handle = decoder.register_forward_pre_hook(
            lambda module, args, kwargs: positions.append(kwargs.get("position_ids")), with_kwargs=True
        )
        try:
            output = self.model.generate(**settings, **extra)
        finally:
            handle.remove()
        if self.keep_cache:
            self.cache = _prompt_cache(output, settings["attention_mask"], positions[0])
        answers = output.sequences[:, settings["input_ids"].shape[1] :]
        ends = self.model.generation_config.eos_token_id
        ends = torch.as_tensor([] if ends is None else ends, device=answers.device).reshape(-1)
        ended = torch.isin(answers, ends).cumsum(1) > 0
        self.passes = ((~ended).sum(1) + ended.any(1)).tolist()
        self.complete = ended.any(1).tolist()
        for criterion in settings.get("stopping_criteria", ()):
            if isinstance(criterion, CompleteAnswerCriteria):
                for row, length in enumerate(criterion.lengths.tolist()):
                    self.passes[row] = length or self.passes[row]
                    self.complete[row] |= length > 0
        return output.sequences


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
