"""The reference for estimators: one unpadded forward for each whole conversation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vlm_calibration.data.collate import ChatFormat
from vlm_calibration.text.confidence import ElicitationPrompt, render_answer, render_response


@dataclass
class Alone:
    """One question about one image, and a model to ask."""

    model: Any
    chat: ChatFormat
    image: np.ndarray
    question: str

    def read(self, text: str) -> dict[str, torch.Tensor]:
        return self.chat.inputs([text], [self.image], "right")

    def response(self, prompt: str, response: str) -> tuple[list[int], list[float]]:
        """Token ids of a response to a rendered prompt, through the end of its turn, and log p of each."""
        plain = ChatFormat(self.chat.processor, ElicitationPrompt("{question}"))
        before = self.read(plain.render(prompt))["input_ids"][0].tolist()
        inputs = self.read(plain.render(prompt, response))
        ids = inputs["input_ids"][0].tolist()
        start = next((i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), len(before))
        if self.chat.is_paligemma:
            inputs["token_type_ids"][0, start:] = 1
        with torch.no_grad():
            log_p = torch.log_softmax(self.model(**inputs, use_cache=False).logits[0].double(), -1)
        end = next(i for i in range(start, len(ids)) if ids[i] in self.chat.special_ids)
        return ids[start : end + 1], [float(log_p[i - 1, ids[i]]) for i in range(start, end + 1)]

    @property
    def prompt(self) -> str:
        return self.chat.prompt.render(self.question)

    def expected(self, answer: str, levels: Sequence[float]) -> float:
        """The mean level, from one forward a level."""
        totals = [math.fsum(self.response(self.prompt, render_response(answer, c))[1]) for c in levels]
        weights = [math.exp(t - max(totals)) for t in totals]
        return math.fsum(w * c for w, c in zip(weights, levels, strict=True)) / math.fsum(weights)

    def likelihood(self, answer: str) -> float:
        """The geometric mean of the probabilities of the answer's tokens."""
        bare, _ = self.response(self.prompt, render_answer(answer))
        full, log_p = self.response(self.prompt, render_response(answer, 0.5))
        length = next(i for i, (a, b) in enumerate(zip(bare, full, strict=False)) if a != b)
        return math.exp(math.fsum(log_p[:length]) / length)

    def against(self, prompt: str, first: str, second: str) -> float:
        """The probability of the first of two responses, by the tokens before their common ending."""
        (a, p), (b, q) = self.response(prompt, first), self.response(prompt, second)
        while len(a) > 1 and len(b) > 1 and a[-1] == b[-1]:
            a, b, p, q = a[:-1], b[:-1], p[:-1], q[:-1]
        return 1 / (1 + math.exp(math.fsum(q) - math.fsum(p)))
