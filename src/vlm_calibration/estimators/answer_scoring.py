"""Scores an answer with every confidence that can follow it, and yes against no, in one forward pass.

Each query has one packed row (`models.shared_prefix`) with everything that the estimators need to score, so the answer is
computed once. Image and prompt were computed when the answer was generated (`cached`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlm_calibration.data.candidates import ResponseTokenizer
from vlm_calibration.data.collate import ChatFormat
from vlm_calibration.data.layout import common_prefix
from vlm_calibration.estimators.cached import PromptCache, score_cached
from vlm_calibration.models.forward import unwrap_peft
from vlm_calibration.models.shared_prefix import Prompts, ResponseScores, score_responses
from vlm_calibration.perturbation.levels import ConfidenceLevels
from vlm_calibration.records import Query
from vlm_calibration.text.confidence import render_answer

YES_NO = ("Yes", "No")


class ResponsePass(NamedTuple):
    """The scores of one answer.

    Attributes:
        levels: K confidences that can be stated.
        level_log_p: float32 [K], log p of the answer with each of them.
        answer_log_p: float32 [T], log p of each token of the answer.
        yes_no_log_p: float32 [2], log p of the words yes and no; None for other questions.
        passes: number of forward passes.
    """

    levels: tuple[float, ...]
    level_log_p: Tensor
    answer_log_p: Tensor
    yes_no_log_p: Tensor | None
    passes: int


class TokenizedAnswer(NamedTuple):
    """The responses that one answer is scored with.

    Attributes:
        cut: how many tokens at the end of the prompt the responses replace (mostly 0).
        tokens: token ids of a response for each of `levels`, then, for a yes/no question, of the words yes and no.
        levels: the confidences that can be stated, in falling order.
        answer: the position of the answer's tokens in the first response.
    """

    cut: int
    tokens: list[list[int]]
    levels: tuple[float, ...]
    answer: slice

    def without_levels(self) -> TokenizedAnswer:
        """With one confidence after the answer instead of all, for scores that do not depend on them."""
        return self._replace(
            tokens=[self.tokens[0], *self.tokens[len(self.levels) :]], levels=self.levels[:1]
        )


def right_padded(
    inputs: Mapping[str, Tensor], cut: Sequence[int] | None = None, suffixes: Sequence[Sequence[int]] = ()
) -> Prompts:
    """Convert prompts from left to right padding.

    Args:
        inputs: arguments of the model's forward, input_ids int64 [B, L].
        cut: for each prompt how many tokens to remove at its end.
        suffixes: for each prompt the text tokens to append.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    padding = (ids.shape[1] - mask.sum(1)).tolist()
    ends = [ids.shape[1] - n for n in cut or [0] * len(ids)]
    suffixes = suffixes or [()] * len(ids)
    padded = dict(inputs)
    for name, values in inputs.items():
        if values.shape != ids.shape or name == "pixel_values":
            continue
        rows = []
        for row, start, end, suffix in zip(values, padding, ends, suffixes, strict=True):
            # The token type of text is 0.
            tail = list(suffix) if name == "input_ids" else [int(name == "attention_mask")] * len(suffix)
            rows.append(torch.cat([row[start:end], row.new_tensor(tail)]))
        padded[name] = pad_sequence(rows, batch_first=True)
    return Prompts(padded, padded["attention_mask"].sum(1))


def strip_common_suffix(first: list[int], second: list[int]) -> tuple[list[int], list[int]]:
    """Two responses without their common ending, such as a full stop and the end of the turn; at least one token is left of each."""
    same = common_prefix(first[::-1], second[::-1])
    same = min(same, len(first) - 1, len(second) - 1)
    return first[: len(first) - same], second[: len(second) - same]


def score_counted(
    model: Any,
    prompts: Prompts,
    responses: Sequence[Sequence[Sequence[int]]],
    cache: PromptCache | None = None,
    shared_lengths: Tensor | None = None,
) -> tuple[ResponseScores, list[int]]:
    """`score_responses`, and the number of forward passes for each query: one, or one per response if none share a prefix.

    Args:
        cache: keys and values of the prompts, used if that is exact.
        shared_lengths: as in `score_cached`.
    """
    if cache is not None:
        cached = score_cached(model, cache, prompts, responses, shared_lengths)
        if cached is not None:
            return cached, [1] * len(responses)
    runs: list[int] = []
    handle = unwrap_peft(model).get_decoder().register_forward_pre_hook(lambda *_: runs.append(1))
    try:
        scores = score_responses(model, prompts, responses)
    finally:
        handle.remove()
    return scores, [1 if len(runs) == 1 else len(r) for r in responses]


def score_answers(
    model: Any,
    answers: Sequence[TokenizedAnswer],
    prompts: Prompts,
    cache: PromptCache | None = None,
) -> list[ResponsePass]:
    """Score B answers with every level after them in one pass.

    Args:
        answers: B answers.
        prompts: the B prompts, padded on the right.
        cache: keys and values of the prompts, used if that is exact.
    """
    lengths = prompts.lengths - torch.tensor([a.cut for a in answers], device=prompts.lengths.device)
    tokens = [a.tokens for a in answers]
    scores, passes = score_counted(model, prompts._replace(lengths=lengths), tokens, cache)
    log_p, total = scores.log_likelihood.float().cpu(), scores.total.float().cpu()
    results = []
    for row, answer in enumerate(answers):
        k = len(answer.levels)
        yes_no = total[row, k : k + 2] if len(answer.tokens) > k else None
        results.append(
            ResponsePass(answer.levels, total[row, :k], log_p[row, 0, answer.answer], yes_no, passes[row])
        )
    return results


class AnswerTokenizer:
    """Tokenizes answers with every confidence that can be stated after them.

    Results are cached, since several systems often give the same answer to a question.

    Args:
        chat: renders and tokenizes conversations.
        levels: confidences of any of these scales can be stated.
    """

    cache_size = 1 << 14

    def __init__(self, chat: ChatFormat, levels: Sequence[ConfidenceLevels]) -> None:
        self.chat = chat
        self._responses = ResponseTokenizer(chat, levels)
        self._cache: dict[tuple[str, str, str], TokenizedAnswer] = {}

    def tokenize(self, query: Query, answer: str) -> TokenizedAnswer:
        """The answer with every level; for a yes/no question also the words yes and no."""
        key = (query.question, query.answer_type, answer)
        if key not in self._cache:
            if len(self._cache) >= self.cache_size:
                self._cache.clear()
            self._cache[key] = self._tokenize(query, answer)
        return self._cache[key]

    def _tokenize(self, query: Query, answer: str) -> TokenizedAnswer:
        stated_cut, candidates = self._responses.tokenize(query, [answer])
        words_cut, words = self._yes_and_no(query) if query.answer_type == "yes_no" else (0, [])
        cut = max(stated_cut, words_cut)
        # Tokens of the prompt's end that only some responses replace go in front of the others.
        [prompt] = self.chat.token_ids([self.chat.render(query.question)])
        before_stated = prompt[len(prompt) - cut : len(prompt) - stated_cut]
        before_words = prompt[len(prompt) - cut : len(prompt) - words_cut]
        answer_start = len(before_stated)
        return TokenizedAnswer(
            cut,
            [*([*before_stated, *c.tokens] for c in candidates), *([*before_words, *w] for w in words)],
            tuple(c.confidence for c in candidates),
            slice(answer_start, answer_start + candidates[0].answer_length),
        )

    def _yes_and_no(self, query: Query) -> tuple[int, list[list[int]]]:
        """How many tokens at the end of the prompt the words replace, and the tokens in which they differ."""
        texts = self.chat.conversations(query.question, [render_answer(word) for word in YES_NO])
        cut, (yes, no) = self.chat.after_prompt(self.chat.render(query.question), texts)
        return cut, list(strip_common_suffix(yes, no))
