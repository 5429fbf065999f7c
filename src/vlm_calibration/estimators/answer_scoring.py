"""One pass that scores what a model answered with every confidence it could state behind it, and yes against no.

All that estimators ask about an answer's tokens is in one packed row a query (`models.shared_prefix`), so the answer runs
once whatever is asked; image and prompt have run when the answer was generated (`cached`).
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
    """What one pass found about a query.

    levels: K confidences that may be stated. level_log_p: [K], log p of the answer with each of them.
    answer_log_p: [T], log p of each token of the answer. yes_no_log_p: [2], of the words yes and no; None for other questions.
    passes: forward passes it took.
    """

    levels: tuple[float, ...]
    level_log_p: Tensor
    answer_log_p: Tensor
    yes_no_log_p: Tensor | None
    passes: int


class WrittenAnswer(NamedTuple):
    """An answer's responses, as token ids.

    cut: tokens at the prompt's end that are in front of every response. tokens: one for each of `levels`, then, for a yes/no
    question, the words yes and no. own: which tokens of the first are the answer.
    """

    cut: int
    tokens: list[list[int]]
    levels: tuple[float, ...]
    own: slice


def right_padded(
    inputs: Mapping[str, Tensor], cut: Sequence[int] | None = None, behind: Sequence[Sequence[int]] = ()
) -> Prompts:
    """Prompts padded on the left as prompts padded on the right.

    Args:
        inputs: what the model's forward takes, input_ids int64 [B, L].
        cut: how many tokens to take away at the end of each prompt. behind: text tokens to put there.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    padding = (ids.shape[1] - mask.sum(1)).tolist()
    ends = [ids.shape[1] - n for n in cut or [0] * len(ids)]
    tails = behind or [()] * len(ids)
    found = dict(inputs)
    for name, values in inputs.items():
        if values.shape != ids.shape or name == "pixel_values":
            continue
        rows = []
        for row, start, end, tail in zip(values, padding, ends, tails, strict=True):
            # Text has type 0 where tokens have types.
            put = list(tail) if name == "input_ids" else [int(name == "attention_mask")] * len(tail)
            rows.append(torch.cat([row[start:end], row.new_tensor(put)]))
        found[name] = pad_sequence(rows, batch_first=True)
    return Prompts(found, found["attention_mask"].sum(1))


def strip_common_suffix(first: list[int], second: list[int]) -> tuple[list[int], list[int]]:
    """Two responses without the tokens in which they end alike, as a full stop and the end of the turn."""
    same = common_prefix(first[::-1], second[::-1])
    same = min(same, len(first) - 1, len(second) - 1)  # something must be left of each
    return first[: len(first) - same], second[: len(second) - same]


def score_counted(
    model: Any,
    prompts: Prompts,
    responses: Sequence[Sequence[Sequence[int]]],
    known: PromptCache | None = None,
    kept: Tensor | None = None,
) -> tuple[ResponseScores, list[int]]:
    """`score_responses`, and the forward passes of each query: one, or one a response where prefixes cannot be shared.

    Args:
        known: what generation remembers of the same prompts; they are not read again where that is exact.
        kept: how many tokens of each prompt those are, where the prompts go on differently.
    """
    found = score_cached(model, known, prompts, responses, kept) if known is not None else None
    if found is not None:
        return found, [1] * len(responses)
    runs: list[int] = []
    handle = unwrap_peft(model).get_decoder().register_forward_pre_hook(lambda *_: runs.append(1))
    try:
        scores = score_responses(model, prompts, responses)
    finally:
        handle.remove()
    return scores, [1 if len(runs) == 1 else len(r) for r in responses]


def score_answers(
    model: Any,
    written: Sequence[WrittenAnswer],
    prompts: Prompts,
    known: PromptCache | None = None,
) -> list[ResponsePass]:
    """Score B answers with every level behind them in one pass.

    Args:
        prompts: B prompts, padded on the right. known: as in `score_counted`.
    """
    lengths = prompts.lengths - torch.tensor([w.cut for w in written], device=prompts.lengths.device)
    tokens = [w.tokens for w in written]
    scores, passes = score_counted(model, prompts._replace(lengths=lengths), tokens, known)
    log_p, total = scores.log_likelihood.float().cpu(), scores.total.float().cpu()
    found = []
    for row, answer in enumerate(written):
        k = len(answer.levels)
        yes_no = total[row, k : k + 2] if len(answer.tokens) > k else None
        found.append(
            ResponsePass(answer.levels, total[row, :k], log_p[row, 0, answer.own], yes_no, passes[row])
        )
    return found


class AnswerWriter:
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
        self._written: dict[tuple[str, str, str], WrittenAnswer] = {}

    def write(self, query: Query, answer: str) -> WrittenAnswer:
        """The answer with every level, then the words yes and no for a yes/no question."""
        key = (query.question, query.answer_type, answer)
        if key not in self._written:
            if len(self._written) >= self.cache_size:
                self._written.clear()
            self._written[key] = self._write(query, answer)
        return self._written[key]

    def _write(self, query: Query, answer: str) -> WrittenAnswer:
        stated_cut, candidates = self._responses.tokenize(query, [answer])
        words_cut, words = self._yes_and_no(query) if query.answer_type == "yes_no" else (0, [])
        cut = max(stated_cut, words_cut)
        # Tokens of the prompt's end that only some responses replace go in front of the others.
        [prompt] = self.chat.token_ids([self.chat.render(query.question)])
        before_stated = prompt[len(prompt) - cut : len(prompt) - stated_cut]
        before_words = prompt[len(prompt) - cut : len(prompt) - words_cut]
        answer_start = len(before_stated)
        return WrittenAnswer(
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
