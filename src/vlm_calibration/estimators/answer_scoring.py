"""Scores an answer with every confidence that can follow it, and yes against no, in one pass of one packed row for each query."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlm_calibration.data.candidates import Candidate, tokenize_responses
from vlm_calibration.data.collate import ChatFormat, common_prefix
from vlm_calibration.models.forward import logits_at, unwrap_peft
from vlm_calibration.models.generation import PromptCache
from vlm_calibration.models.shared_prefix import (
    Prompts,
    Responses,
    ResponseScores,
    padded,
    padded_table,
    score_responses,
    scores_at,
    why_not_shared,
)
from vlm_calibration.perturbation.levels import ConfidenceLevels, LinearLevels
from vlm_calibration.records import Query
from vlm_calibration.text.confidence import render_answer
from vlm_calibration.text.grading import parse_answer


class _Tree(NamedTuple):
    """The tokens to compute: each row is a tree, in an order in which parents come first."""

    ids: Tensor  # int64 [B, W], the tokens, 0 for padding
    parent: Tensor  # int64 [B, W], the column of the previous token, -1 for the first token and for padding
    rows: Tensor  # int64 [M], with `columns` the place of each token that predicts another
    columns: Tensor
    predictor: Tensor  # int64 [N], index among the M of the token that makes each distinct prediction
    targets: Tensor  # int64 [N], the predicted token
    predictions: Tensor  # int64 [B, K, T], index among the N of token t of response k; -1 for padding

    def attended(self) -> Tensor:
        """bool [B, W, W]: which tokens of its tree each token attends to, itself and its ancestors."""
        batch, width = self.parent.shape
        mask = torch.zeros(batch, width, width, dtype=torch.bool, device=self.parent.device)
        rows = torch.arange(batch, device=self.parent.device)
        for column in range(width):
            previous = self.parent[:, column]
            mask[:, column] = mask[rows, previous.clamp(min=0)] & (previous >= 0)[:, None]
            mask[:, column, column] = True
        return mask


def reads_both_ways(model: Any) -> bool:
    """Whether the tokens of a prompt attend to later ones, so that the cache of a longer prompt cannot be reused."""
    return unwrap_peft(model).config.model_type.startswith("paligemma")


def score_cached(
    model: Any,
    cache: PromptCache,
    prompts: Prompts,
    responses: Responses,
    shared_lengths: Tensor | None = None,
) -> ResponseScores | None:
    """`score_responses` for prompts that begin like the cached ones; None if that would not be exact.

    Args:
        prompts: B prompts, padded on the right; their `lengths` may leave out tokens at the end.
        shared_lengths: int64 [B], how many tokens of each prompt are those of the cached one: fewer than either has, and
            all of an image's; None: they are the same prompts.
    """
    lengths = cache.mask.sum(1)
    shared = prompts.lengths - 1 if shared_lengths is None else shared_lengths
    tree = _build_tree(prompts, responses, shared)
    (batch, width), device = tree.ids.shape, tree.ids.device
    cached, prompt_width = cache.key_values.get_seq_length(), cache.mask.shape[1]
    config = unwrap_peft(model).config
    image_tokens = {getattr(config, name, None) for name in ("image_token_id", "image_token_index")} - {None}
    if (
        why_not_shared(model, cached + width) is not None
        or (reads_both_ways(model) and not (shared_lengths is None and bool((shared == lengths - 1).all())))
        # A tree may not begin with an image, whose features are not embedded as tokens.
        or not image_tokens.isdisjoint(tree.ids[:, 0].tolist())
    ):
        return None
    # The position in the cached prompt at which each tree begins.
    first = prompt_width - lengths + shared
    begin = cache.positions.to(device)[..., torch.arange(batch, device=device), first]
    attended = tree.attended()
    positions = begin[..., None] + attended.sum(-1) - 1
    # Of the cache, a tree attends to the prompt up to where it begins, and to no generated token.
    before = torch.arange(prompt_width, device=device) < first[:, None]
    allowed = torch.zeros(batch, width, cached + width, dtype=torch.bool, device=device)
    allowed[:, :, :prompt_width] = (cache.mask.bool() & before)[:, None]
    allowed[:, :, cached:] = attended

    def replace_mask(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        dtype, original = kwargs["inputs_embeds"].dtype, kwargs.get("attention_mask")
        mask = torch.zeros(allowed.shape, dtype=dtype, device=device)
        mask = mask.masked_fill(~allowed, torch.finfo(dtype).min)[:, None]
        by_kind = dict.fromkeys(original, mask) if isinstance(original, dict) else mask
        return args, {**kwargs, "attention_mask": by_kind, "position_ids": positions}

    inputs = {
        "input_ids": tree.ids,
        "attention_mask": cache.mask.new_ones(batch, cached + width),
        cache.keyword: cache.key_values,
        # Without them, Qwen's models compute positions from those of the last prompts that they saw, of any number of rows.
        "position_ids": positions,
    }
    with unwrap_peft(model).get_decoder().register_forward_pre_hook(replace_mask, with_kwargs=True):
        try:
            logits = logits_at(model, inputs, tree.rows, tree.columns)
        finally:
            cache.key_values.crop(cached - cache.key_values.get_seq_length())
    return scores_at(logits.float().log_softmax(-1)[tree.predictor, tree.targets], tree.predictions)


def _build_tree(prompts: Prompts, responses: Responses, shared: Tensor) -> _Tree:
    """The tokens of prompts after their first `shared` ones, and the responses after them."""
    ids: list[list[int]] = []
    parents: list[list[int]] = []
    predictors: dict[tuple[int, int], int] = {}  # (row, column) -> index among the M
    predictions: dict[tuple[int, int], int] = {}  # (index among the M, token) -> index among the N
    indices: list[list[list[int]]] = []  # as `_Tree.predictions`
    bounds = zip(prompts.inputs["input_ids"].tolist(), shared.tolist(), prompts.lengths.tolist(), strict=True)
    for row, ((prompt, start, end), candidates) in enumerate(zip(bounds, responses, strict=True)):
        tokens, last = prompt[start:end], end - start - 1
        parent = list(range(-1, last))
        children: dict[tuple[int, int], int] = {}  # (column, next token) -> its column
        of_query = []
        for candidate in candidates:
            column, of_response = last, []
            for position, token in enumerate(candidate):
                source = predictors.setdefault((row, column), len(predictors))
                of_response.append(predictions.setdefault((source, token), len(predictions)))
                if position == len(candidate) - 1:
                    break  # the last token of a response predicts nothing
                if (column, token) not in children:
                    children[column, token] = len(tokens)
                    tokens.append(token)
                    parent.append(column)
                column = children[column, token]
            of_query.append(of_response)
        ids.append(tokens)
        parents.append(parent)
        indices.append(of_query)
    device = prompts.lengths.device
    rows, columns = torch.tensor(list(predictors), device=device).unbind(-1)
    predictor, targets = torch.tensor(list(predictions), device=device).unbind(-1)
    padded_tree = padded(ids, 0, device), padded(parents, -1, device)
    return _Tree(*padded_tree, rows, columns, predictor, targets, padded_table(indices, device))


YES_NO = ("Yes", "No")
CACHED = 1 << 14
"""Number of tokenized answers that are kept."""
EVERY_PERCENT = LinearLevels(n_levels=101)
"""The confidences that evaluations and `load_calibrated` score after an answer, whatever a model was taught."""


class ResponsePass(NamedTuple):
    """The scores of one answer.

    Attributes:
        levels: K confidences that can be stated.
        level_log_p: float32 [K], log p of the answer with each of them.
        answer_log_p: float32 [T], log p of each token of the answer.
        yes_no_log_p: float32 [2], log p of the words yes and no; None for other questions.
    """

    levels: tuple[float, ...]
    level_log_p: Tensor
    answer_log_p: Tensor
    yes_no_log_p: Tensor | None
    passes: int

    @property
    def distribution(self) -> dict[float, float]:
        """Confidence -> probability that it is stated after the answer, highest confidence first; sums to 1."""
        p = torch.softmax(self.level_log_p.double(), -1).tolist()
        return dict(zip(self.levels, p, strict=True))

    @property
    def likeliest_level(self) -> float:
        """The confidence that is likeliest to be stated after the answer, the highest of equally likely ones."""
        return self.levels[int(self.level_log_p.argmax())]


class ScoredAnswers(NamedTuple):
    """The scores of B answers, of each answer's `tokens`, with the number of forward passes of each."""

    answers: Sequence[TokenizedAnswer]
    scores: ResponseScores
    passes: list[int]

    def by_answer(self) -> list[ResponsePass]:
        """The scores of each answer, in main memory."""
        log_p, total = self.scores.log_likelihood.float().cpu(), self.scores.total.float().cpu()
        results = []
        for row, answer in enumerate(self.answers):
            levels, words, own = answer.levels, len(answer.candidates), total[row]
            of_answer = log_p[row, 0, answer.offset : answer.offset + answer.candidates[0].answer_length]
            yes_no = own[words : words + 2] if len(answer.tokens) > words else None
            results.append(ResponsePass(levels, own[: len(levels)], of_answer, yes_no, self.passes[row]))
        return results

    @property
    def candidates(self) -> ResponseScores:
        """The scores of the candidates alone, [B, K, T] for the largest number K of candidates."""
        width = max(len(answer.candidates) for answer in self.answers)
        columns = []
        for values in self.scores:
            column = torch.zeros_like(values[:, :width])
            for row, answer in enumerate(self.answers):
                # Tokens of the prompt that precede a candidate in its row are no part of it.
                own = values[row, : len(answer.candidates), answer.offset :]
                column[row, : own.shape[0], : own.shape[1]] = own
            columns.append(column)
        return ResponseScores(*columns)


class TokenizedAnswer(NamedTuple):
    """The responses that one answer is scored with.

    Attributes:
        cut: how many tokens at the end of the prompt the responses replace (mostly 0).
        tokens: token ids of each of `candidates`, then, for a yes/no question, of the words yes and no.
        candidates: the answer with each confidence, in falling order, then the opposite answer if the tokenizer adds it.
        offset: how many leading tokens of each candidate's row in `tokens` belong to the prompt (mostly 0).
    """

    cut: int
    tokens: list[list[int]]
    candidates: tuple[Candidate, ...]
    offset: int

    @property
    def levels(self) -> tuple[float, ...]:
        """The confidences that can be stated after the answer, in falling order."""
        return tuple(c.confidence for c in self.candidates if not c.wrong)


def right_padded(inputs: Mapping[str, Tensor]) -> Prompts:
    """Convert prompts, arguments of a model's forward, from left to right padding."""
    ids, lengths = inputs["input_ids"], inputs["attention_mask"].sum(1)
    starts = (ids.shape[1] - lengths).tolist()
    padded = dict(inputs)
    for name, values in inputs.items():
        if values.shape == ids.shape and name != "pixel_values":
            rows = [row[start:] for row, start in zip(values, starts, strict=True)]
            padded[name] = pad_sequence(rows, batch_first=True)
    return Prompts(padded, lengths)


def strip_common_suffix(first: list[int], second: list[int]) -> tuple[list[int], list[int]]:
    """Two responses without their common ending, such as the end of the turn; at least one token is left of each."""
    same = common_prefix(first[::-1], second[::-1])
    same = min(same, len(first) - 1, len(second) - 1)
    return first[: len(first) - same], second[: len(second) - same]


def score_counted(
    model: Any,
    prompts: Prompts,
    responses: Responses,
    cache: PromptCache | None = None,
    shared_lengths: Tensor | None = None,
) -> tuple[ResponseScores, list[int]]:
    """`score_responses`, from the cache of the prompts if that is exact, and the number of forward passes for each query."""
    if cache is not None:
        cached = score_cached(model, cache, prompts, responses, shared_lengths)
        if cached is not None:
            return cached, [1] * len(responses)
    runs: list[int] = []
    with unwrap_peft(model).get_decoder().register_forward_pre_hook(lambda *_: runs.append(1)):
        scores = score_responses(model, prompts, responses)
    return scores, [1 if len(runs) == 1 else len(r) for r in responses]


def score_answers(
    model: Any, answers: Sequence[TokenizedAnswer], prompts: Prompts, cache: PromptCache | None = None
) -> ScoredAnswers:
    """Score B answers with every level after them in one pass; `prompts` are padded on the right."""
    lengths = prompts.lengths - torch.tensor([a.cut for a in answers], device=prompts.lengths.device)
    tokens = [a.tokens for a in answers]
    return ScoredAnswers(answers, *score_counted(model, prompts._replace(lengths=lengths), tokens, cache))


class AnswerTokenizer:
    """Tokenizes answers with every confidence that can be stated after them; keeps what several systems ask for.

    `levels` and `grid` are as for `stated_levels`; `opposite` adds the opposite answer to a yes/no question.
    """

    def __init__(
        self,
        chat: ChatFormat,
        levels: ConfidenceLevels = EVERY_PERCENT,
        grid: int | None = None,
        opposite: bool = False,
    ) -> None:
        self.chat = chat
        self.opposite = opposite
        self._levels, self._grid = levels, grid
        self._cache: dict[tuple[str, str, str], TokenizedAnswer] = {}

    def tokenize(self, query: Query, answer: str) -> TokenizedAnswer:
        """The answer with every level; for a yes/no question also the words yes and no."""
        key = (query.question, query.answer_type, answer)
        if key in self._cache:
            return self._cache[key]
        answers = [answer]
        if self.opposite and query.answer_type == "yes_no":
            predicted = parse_answer(answer, "yes_no", query.question)
            answers += {"yes": ["No"], "no": ["Yes"]}.get(predicted or "", [])
        stated_cut, candidates = tokenize_responses(self.chat, query, answers, self._levels, self._grid)
        prompt_text = self.chat.render(query.question)
        words_cut, words = 0, []
        if query.answer_type == "yes_no":
            texts = self.chat.conversations(query.question, [render_answer(word) for word in YES_NO])
            words_cut, (yes, no) = self.chat.after_prompt(prompt_text, texts)
            words = list(strip_common_suffix(yes, no))
        cut = max(stated_cut, words_cut)
        # Tokens of the prompt's end that only some responses replace go in front of the others.
        [prompt] = self.chat.token_ids([prompt_text])
        before_stated = prompt[len(prompt) - cut : len(prompt) - stated_cut]
        before_words = prompt[len(prompt) - cut : len(prompt) - words_cut]
        tokens = [[*before_stated, *c.tokens] for c in candidates] + [[*before_words, *w] for w in words]
        if len(self._cache) >= CACHED:
            self._cache.clear()
        self._cache[key] = TokenizedAnswer(cut, tokens, candidates, len(before_stated))
        return self._cache[key]
