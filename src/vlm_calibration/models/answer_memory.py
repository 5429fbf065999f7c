"""Estimate the memory of answering a batch of prompts: generation with its keys and values, and scoring and ranking of responses.

As for training (`activations`), the language model runs on fake tensors and live bytes are counted, here without gradients: the pass over
the prompts, the new tokens with the cache of keys and values, then what an evaluation computes from that cache.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from vlm_calibration.losses.sequence import token_log_likelihood
from vlm_calibration.models.activations import RESPONSE_TOKENS, isolated_suffixes
from vlm_calibration.models.fake_tensors import FakeModules, LiveBytes, autocast, over_layers
from vlm_calibration.models.forward import unwrap_peft

CACHE = "keys and values"


@dataclass(frozen=True)
class AnsweringStep:
    """The work of one process in one batch of answers.

    Args:
        batch: number of prompts, each with one image.
        tokens: tokens of a prompt with its image.
        new_tokens: length limit of an answer; 0: nothing is generated.
        image_tokens: tokens of the image; None: all tokens.
        scored_tokens: tokens per prompt that are computed from the kept cache to score responses; 0: none are scored.
        sampled: whether further answers are sampled while that cache is kept.
        copied: (responses, tokens of each) that are scored with perturbed copies of the images while that cache is kept, one copy
            at a time; None: none are.
        ranked: (responses, tokens of each) that are compared in a row of their own with the prompt; None: none are.
        systems: answers to the same images in turn, which keep the result of a frozen tower; 1: it is not kept.
        shared: whether responses share the keys and values of their prompt, see `why_not_shared`.
        autocast: dtype of the arithmetic in mixed precision; None: the dtype of the weights.
        cast: dtype to which all weights are converted; None: as loaded.
    """

    batch: int
    tokens: int
    new_tokens: int
    image_tokens: int | None = None
    scored_tokens: int = 0
    sampled: bool = False
    copied: tuple[int, int] | None = None
    ranked: tuple[int, int] | None = None
    systems: int = 1
    shared: bool = True
    autocast: torch.dtype | None = None
    cast: torch.dtype | None = None

    @property
    def longest_row(self) -> int:
        """Tokens of the longest row: a prompt with all that is scored after it."""
        return self.tokens + max(
            self.scored_tokens, math.prod(self.copied or ()), math.prod(self.ranked or ())
        )

    @property
    def images(self) -> int:
        """Tokens of all images."""
        return self.batch * (self.tokens if self.image_tokens is None else self.image_tokens)


class AnsweringPeaks(NamedTuple):
    """Bytes of answering a batch.

    Attributes:
        phases: phase -> peak bytes, keys and values included.
        cache: bytes of the keys and values of prompts and answers.
    """

    phases: dict[str, int]
    cache: int


def answering_peaks(model: Any, step: AnsweringStep) -> AnsweringPeaks:
    """Peak bytes of the language model in each phase of answering a batch.

    Args:
        model: a transformers or peft model with parameters on any device; they become fake ones.
        step: what is done.
    """
    base = unwrap_peft(model)
    decoder, head = base.get_decoder(), base.get_output_embeddings()
    config = base.config.get_text_config(decoder=True)
    peaks = over_layers(decoder, lambda: _run_phases(decoder, head, config, step))
    cache = peaks.pop(CACHE)
    return AnsweringPeaks(peaks, cache)


def _run_phases(decoder: Any, head: Any, config: Any, step: AnsweringStep) -> dict[str, int]:
    fakes = FakeModules([decoder, head])
    phases: dict[str, int] = {CACHE: 0}
    with torch.no_grad(), fakes.mode, autocast(step.autocast), LiveBytes(fakes.parameters) as live:
        if step.new_tokens:
            cache = DynamicCache(config=config)
            with _phase("prompts", live, phases):
                _next_scores(decoder, head, step.batch, step.tokens, cache)
            with _phase("new tokens", live, phases):
                _next_scores(decoder, head, step.batch, step.new_tokens, cache)
            phases[CACHE] = cached = live.now
            if step.scored_tokens:
                with _phase("scoring", live, phases):
                    if step.shared:
                        _score_from_cache(decoder, head, step, cache)
                    else:
                        _rank(decoder, head, step.batch, step.tokens, 1, RESPONSE_TOKENS)
                # A sampled answer begins with a cache of its own while the first one is kept.
                if step.sampled:
                    phases["sampling"] = cached + max(phases["prompts"], phases["new tokens"])
                if step.copied:
                    with _phase("perturbed copies", live, phases):
                        responses, length = step.copied
                        _rank(decoder, head, step.batch, step.tokens, responses if step.shared else 1, length)
            del cache
        if step.ranked:
            with _phase("ranking", live, phases):
                responses, length = step.ranked
                _rank(decoder, head, step.batch, step.tokens, responses if step.shared else 1, length)
    return phases


@contextmanager
def _phase(name: str, live: LiveBytes, phases: dict[str, int]) -> Iterator[None]:
    """Record the peak within this context."""
    live.peak = live.now
    yield
    phases[name] = live.peak


def _embedded(decoder: Any, batch: int, tokens: int) -> Tensor:
    embeddings = decoder.get_input_embeddings().weight
    # An operation, so that the result counts.
    return torch.empty(batch, tokens, embeddings.shape[1], dtype=embeddings.dtype).clone()


def _as_argument(decoder: Any, cache: DynamicCache) -> dict[str, DynamicCache]:
    """The cache under its name among the arguments of the language model; newer versions of transformers call it `cache`."""
    newer = "cache" in inspect.signature(decoder.forward).parameters
    return {"cache" if newer else "past_key_values": cache}


def _next_scores(decoder: Any, head: Any, batch: int, tokens: int, cache: DynamicCache) -> None:
    """Append tokens to the cache, and score the next one as `generate` does: a copy in float32 at the last position."""
    mask = torch.ones(batch, cache.get_seq_length() + tokens, dtype=torch.int64)
    hidden = decoder(
        inputs_embeds=_embedded(decoder, batch, tokens),
        attention_mask=mask,
        use_cache=True,
        **_as_argument(decoder, cache),
    ).last_hidden_state
    logits = head(hidden[:, -1:])
    logits[:, -1].to(dtype=torch.float32, copy=True)


def _score_from_cache(decoder: Any, head: Any, step: AnsweringStep, cache: DynamicCache) -> None:
    """Score a tree of responses, as `estimators.cached` does."""
    length = cache.get_seq_length() + step.scored_tokens
    rows = _embedded(decoder, step.batch, step.scored_tokens)
    hidden = decoder(
        inputs_embeds=rows,
        attention_mask=torch.zeros(step.batch, 1, step.scored_tokens, length, dtype=rows.dtype),
        position_ids=torch.zeros(step.batch, step.scored_tokens, dtype=torch.int64),
        use_cache=True,
        **_as_argument(decoder, cache),
    ).last_hidden_state
    head(hidden.flatten(0, 1)).float().log_softmax(-1)


def _rank(decoder: Any, head: Any, batch: int, tokens: int, responses: int, length: int) -> None:
    """Score responses that share a row with their prompt, as `shared_prefix` does."""
    row = tokens + responses * length
    with isolated_suffixes(decoder, batch, row, responses):
        hidden = decoder(
            inputs_embeds=_embedded(decoder, batch, row),
            attention_mask=torch.ones(batch, row, dtype=torch.int64),
            use_cache=False,
        ).last_hidden_state
    labels = batch * responses * length
    logits = head(hidden[:, -responses * length :].flatten(0, 1))
    token_log_likelihood(logits, torch.zeros(labels, dtype=torch.int64))
