"""One pass that scores what a model answered with every confidence it could state behind it, and yes against no.

All that estimators ask about an answer's tokens is in one packed row a query (`models.shared_prefix`), so image, prompt and
answer run once whatever is asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlm_calibration.data.collate import ChatFormat
from vlm_calibration.data.layout import common_prefix
from vlm_calibration.data.pairs import PairCollator, PairPolicy
from vlm_calibration.models.forward import base_of
from vlm_calibration.models.shared_prefix import Prompts, ResponseScores, score_responses
from vlm_calibration.perturbation.levels import Levels
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


class _Wanted(NamedTuple):
    """cut: tokens at the prompt's end that are scored too. levels and answer_length: as in `ResponsePass`, in tokens."""

    cut: int
    tokens: list[list[int]]
    levels: tuple[float, ...]
    answer: slice


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


def behind_prompt(chat: ChatFormat, prompt: str, conversations: Sequence[str]) -> tuple[int, list[list[int]]]:
    """Token ids of conversations behind the beginning that all of them share with their prompt.

    Returns:
        How many tokens at the prompt's end they do not share (most often 0), and the ids.
    """
    first, *full = chat.token_ids([prompt, *conversations])
    start = min(common_prefix(first, ids) for ids in full)
    return len(first) - start, [ids[start:] for ids in full]


def apart(first: list[int], second: list[int]) -> tuple[list[int], list[int]]:
    """Two responses without the tokens in which they end alike, as a full stop and the end of the turn."""
    same = common_prefix(first[::-1], second[::-1])
    same = min(same, len(first) - 1, len(second) - 1)  # something must be left of each
    return first[: len(first) - same], second[: len(second) - same]


def score_counted(
    model: Any, prompts: Prompts, responses: Sequence[Sequence[Sequence[int]]]
) -> tuple[ResponseScores, list[int]]:
    """`score_responses`, and the forward passes of each query: one, or one a response where prefixes cannot be shared."""
    runs: list[int] = []
    handle = base_of(model).get_decoder().register_forward_pre_hook(lambda *_: runs.append(1))
    try:
        scores = score_responses(model, prompts, responses)
    finally:
        handle.remove()
    return scores, [1 if len(runs) == 1 else len(r) for r in responses]


def score_answers(
    model: Any,
    chat: ChatFormat,
    prompts: Prompts,
    queries: Sequence[Query],
    answers: Sequence[str | None],
    levels: Levels,
) -> list[ResponsePass | None]:
    """Score B answers with every level behind them in one pass; None where there is no answer.

    Args:
        prompts: B prompts, padded on the right.
        levels: the confidences that may be stated.
    """
    collator = PairCollator(chat, levels, PairPolicy(), max_length=0)
    # A query without an answer keeps its row, and what comes of it is dropped.
    wanted = [_wanted(collator, q, a or q.answer) for q, a in zip(queries, answers, strict=True)]
    lengths = prompts.lengths - torch.tensor([w.cut for w in wanted], device=prompts.lengths.device)
    scores, passes = score_counted(model, prompts._replace(lengths=lengths), [w.tokens for w in wanted])
    log_p, total = scores.log_likelihood.float().cpu(), scores.total.float().cpu()
    found: list[ResponsePass | None] = []
    for row, (want, answer) in enumerate(zip(wanted, answers, strict=True)):
        k = len(want.levels)
        yes_no = total[row, k : k + 2] if len(want.tokens) > k else None
        scored = ResponsePass(want.levels, total[row, :k], log_p[row, 0, want.answer], yes_no, passes[row])
        found.append(scored if answer is not None else None)
    return found


def _wanted(collator: PairCollator, query: Query, answer: str) -> _Wanted:
    """The responses to one query: the answer with every level, then yes and no alone if that is the question."""
    chat = collator.chat
    cut, candidates = collator.candidates(query, [answer])
    tokens, answer_length = [list(c.tokens) for c in candidates], candidates[0].answer_length
    if query.answer_type == "yes_no":
        prompt = chat.render(query.question)
        texts = chat.conversations(query.question, [render_answer(word) for word in YES_NO])
        other_cut, (yes, no) = behind_prompt(chat, prompt, texts)
        shared, [ids] = max(cut, other_cut), chat.token_ids([prompt])
        tokens = [[*ids[len(ids) - shared : len(ids) - cut], *t] for t in tokens]
        tokens += [[*ids[len(ids) - shared : len(ids) - other_cut], *t] for t in apart(yes, no)]
        first, cut = shared - cut, shared
    else:
        first = 0
    return _Wanted(cut, tokens, tuple(c.confidence for c in candidates), slice(first, first + answer_length))
