"""Candidates of preference optimisation: which are compared, that they are whole conversations, and the isotonic map.

As in `test_collate.py` two kinds of tokenizer matter: the demo's, to which a percentage is one token, and one that splits
numbers into digits, so that responses are of unlike length.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from sklearn.isotonic import IsotonicRegression

from vlm_calibration.data.collate import ChatFormat, PromptCollator, SFTCollator
from vlm_calibration.data.noise import Sample
from vlm_calibration.data.pairs import (
    Candidate,
    IsotonicMap,
    PairBatch,
    PairCollator,
    PairPolicy,
    ValidationCollator,
    choose,
    fit_isotonic_map,
    nearest,
    stated_levels,
)
from vlm_calibration.demo.architecture import CHAT_TEMPLATE, IMAGE_TOKENS
from vlm_calibration.perturbation.levels import AnchoredLevels, LevelTable, LinearLevels, StepCount
from vlm_calibration.records import DataError, Query
from vlm_calibration.text.confidence import parse_confidence, render_answer, render_response
from vlm_calibration.text.prompts import ElicitationPrompt

QUERY = Query("q", "x.png", "A dog?", "Yes", "yes_no")
TENTHS = tuple(i / 10 for i in range(10, -1, -1))


def _candidates(levels: Sequence[float] = TENTHS, wrong: bool = False) -> tuple[Candidate, ...]:
    """One response a level, and then the same again with a wrong answer."""
    right = [Candidate((i,), 1, 0, c, False) for i, c in enumerate(levels)]
    return (*right, *(c._replace(wrong=True) for c in right if wrong))


def _rejected(target: int, epoch: int = 0, levels: Sequence[float] = TENTHS, **settings: Any) -> list[int]:
    own = settings.pop("own", None)
    chosen, *rest = choose(PairPolicy(**settings), _candidates(levels), target, QUERY, epoch, own)
    assert chosen == target
    return rest


# --- What is chosen and rejected ---------------------------------------------------------------------------------


@st.composite
def _choices(draw: st.DrawFn) -> tuple[PairPolicy, tuple[Candidate, ...], int, int, int]:
    """A policy, candidates, the target's index, an epoch and the reference's own index."""
    levels = sorted(draw(st.sets(st.integers(0, 100), min_size=1, max_size=12)), reverse=True)
    rejected = draw(st.sampled_from(["all", "uniform", "far", "adjacent"]))
    policy = PairPolicy(
        rejected=rejected,  # type: ignore[arg-type]
        n_rejected=None if rejected == "all" else draw(st.none() | st.integers(1, 15)),
        on_policy=draw(st.booleans()),
        seed=draw(st.integers(0, 5)),
    )
    which = st.integers(0, len(levels) - 1)
    candidates = _candidates([level / 100 for level in levels], draw(st.booleans()))
    return policy, candidates, draw(which), draw(st.integers(0, 3)), draw(which)


@given(_choices())
def test_the_chosen_one_comes_first_and_is_never_rejected(
    case: tuple[PairPolicy, tuple[Candidate, ...], int, int, int],
) -> None:
    policy, candidates, target, epoch, own = case
    picks = choose(policy, candidates, target, QUERY, epoch, own)
    assert picks == choose(policy, candidates, target, QUERY, epoch, own)
    assert picks[0] == target
    assert len(set(picks)) == len(picks)
    n_levels = sum(not c.wrong for c in candidates)
    wanted = n_levels - 1 if policy.rejected == "all" else min(policy.n_rejected or 1, n_levels - 1)
    levels, wrong = picks[1 : wanted + 1], picks[wanted + 1 :]
    assert len(levels) == wanted
    assert not any(candidates[i].wrong for i in levels)
    assert wrong == ([target + n_levels] if len(candidates) > n_levels else []), "last, and at the same level"
    if policy.on_policy and own != target:
        assert own in levels


def test_all_others_are_rejected() -> None:
    assert _rejected(3, rejected="all") == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]
    assert _rejected(0, rejected="all", levels=(1.0,)) == []
    assert _rejected(0, rejected="far", levels=(1.0,)) == []


@pytest.mark.parametrize("rejected", ["uniform", "far", "adjacent"])
def test_one_is_rejected_unless_asked_for_more_and_never_more_than_there_are(rejected: str) -> None:
    assert len(_rejected(4, rejected=rejected)) == 1
    assert len(_rejected(4, rejected=rejected, n_rejected=3)) == 3
    assert sorted(_rejected(4, rejected=rejected, n_rejected=50)) == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10]


def test_uniform_is_uniform() -> None:
    levels = (1.0, 0.8, 0.4, 0.1, 0.0)
    one = Counter(_rejected(2, e, levels, rejected="uniform")[0] for e in range(2000))
    assert sorted(one) == [0, 1, 3, 4]
    assert chisquare(list(one.values())).pvalue > 1e-3
    two = Counter(
        tuple(sorted(_rejected(2, e, levels, rejected="uniform", n_rejected=2))) for e in range(2000)
    )
    assert sorted(two) == list(combinations([0, 1, 3, 4], 2))
    assert chisquare(list(two.values())).pvalue > 1e-3


def test_what_is_drawn_is_a_pure_function_of_seed_epoch_and_id() -> None:
    def drawn(seed: int = 0, epoch: int = 0, name: str = "q") -> tuple[int, ...]:
        policy = PairPolicy(rejected="uniform", n_rejected=6, seed=seed)
        return tuple(choose(policy, _candidates(), 5, replace(QUERY, id=name), epoch))

    wanted = drawn()
    np.random.default_rng(0).random(10)
    np.random.seed(3)  # noqa: NPY002  (the legacy stream must not matter)
    torch.manual_seed(3)
    assert drawn() == wanted
    assert len({wanted, drawn(seed=1), drawn(epoch=1), drawn(name="r")}) == 4


@pytest.mark.parametrize("rejected", ["far", "adjacent"])
@pytest.mark.parametrize("target", range(11))
@pytest.mark.parametrize("n", [1, 2, 5])
def test_far_and_adjacent_are_those_of_a_naive_sort(rejected: str, target: int, n: int) -> None:
    # In tenths, so that equal distances are equal: in floats 0.3 - 0.2 is not 0.2 - 0.1.
    away = {i: abs(i - target) for i in range(11) if i != target}
    wanted = sorted(away.values(), reverse=rejected == "far")[:n]
    found = [_rejected(target, epoch, rejected=rejected, n_rejected=n) for epoch in range(40)]
    assert all([away[i] for i in picks] == wanted for picks in found)
    # What is equally far comes in at random.
    could_be = {i for i in away if away[i] in wanted}
    assert {i for picks in found for i in picks} == could_be


def test_ties_fall_evenly() -> None:
    nearest_two = Counter(_rejected(8, epoch, rejected="adjacent")[0] for epoch in range(1000))
    assert set(nearest_two) == {7, 9}
    assert abs(nearest_two[7] / 1000 - 0.5) < 0.06


@pytest.mark.parametrize("rejected", ["uniform", "far", "adjacent"])
@pytest.mark.parametrize("n", [1, 3])
def test_on_policy_rejects_what_the_reference_would_state(rejected: str, n: int) -> None:
    for epoch in range(20):
        plain = _rejected(6, epoch, rejected=rejected, n_rejected=n)
        same = _rejected(6, epoch, rejected=rejected, n_rejected=n, on_policy=True, own=6)
        assert same == plain, "nothing to correct"
        for own in (0, 5, 10):
            found = _rejected(6, epoch, rejected=rejected, n_rejected=n, on_policy=True, own=own)
            assert found == [own, *(i for i in plain if i != own)][:n]
            without = _rejected(6, epoch, rejected=rejected, n_rejected=n, own=own)
            assert without == plain, "only if asked for"


def test_on_policy_adds_nothing_to_all() -> None:
    assert _rejected(2, rejected="all", on_policy=True, own=7) == _rejected(2, rejected="all")


def test_a_wrong_answer_comes_last_and_states_the_target() -> None:
    candidates = _candidates((0.9, 0.5, 0.1), wrong=True)
    assert choose(PairPolicy(), candidates, 1, QUERY, 0) == [1, 0, 2, 4]
    assert choose(PairPolicy(rejected="far"), candidates, 0, QUERY, 0) == [0, 2, 3]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"n_rejected": 1}, "pairs.n_rejected must be at least 1, and not be given with `rejected: all`"),
        ({"rejected": "far", "n_rejected": 0}, "pairs.n_rejected must be at least 1"),
        ({"rejected": "uniform", "n_rejected": -2}, "found -2"),
        ({"seed": -1}, "pairs.seed must be at least 0, found -1"),
        ({"grid": 0}, "pairs.grid must be a whole number of percent that divides 100, found 0"),
        ({"grid": 30}, "pairs.grid must be a whole number of percent that divides 100, found 30"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError) as caught:
        PairPolicy(**settings)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        ({"target": "level"}, False),
        ({"target": "level", "rejected": "far", "wrong_answer": True}, False),
        ({"target": "level", "rejected": "far", "on_policy": True}, True),
        ({"target": "expected"}, True),
        ({"target": "recalibrated"}, True),
    ],
)
def test_when_the_reference_is_asked(settings: dict[str, Any], needed: bool) -> None:
    assert PairPolicy(**settings).needs_reference is needed


# --- ConfidenceLevels ------------------------------------------------------------------------------------------------------


def test_stated_levels_of_linear_levels() -> None:
    assert stated_levels(LinearLevels(), "yes_no") == TENTHS
    assert stated_levels(LinearLevels(n_levels=5), "open") == (1.0, 0.75, 0.5, 0.25, 0.0)


def test_levels_that_read_alike_are_stated_once() -> None:
    levels = stated_levels(LinearLevels(n_levels=201), "yes_no")
    assert [render_response("Yes", c) for c in levels] == [
        f"Yes. Confidence: {p}%" for p in range(100, -1, -1)
    ]


def test_stated_levels_of_anchored_levels_are_those_of_the_answer_type() -> None:
    accuracies = {"yes_no": (99, 98, 90, 61, 60, 50), "short": (97, 80, 41, 40, 5, 4)}
    counts = {
        kind: tuple(StepCount(200 * i, 100, right) for i, right in enumerate(found))
        for kind, found in accuracies.items()
    }
    table = LevelTable(counts)
    plain = AnchoredLevels(table=table, grid=5)
    assert stated_levels(plain, "yes_no") == (1.0, 0.9, 0.6, 0.5)
    assert stated_levels(plain, "short") == (0.95, 0.8, 0.4, 0.05)
    grouped = AnchoredLevels(table=table, grid=1, groups=3)
    for kind in accuracies:
        levels = stated_levels(grouped, kind)
        assert len(levels) == 3
        assert sorted(levels, reverse=True) == list(levels)
        assert set(levels) == {grouped.confidence(step, kind) for step in grouped.steps}
    assert stated_levels(grouped, "yes_no") == (0.96, 0.61, 0.5)
    assert stated_levels(AnchoredLevels(table=table, groups=1), "short") == (0.45,)


def test_a_grid_adds_its_percentages_to_the_levels() -> None:
    coarse = AnchoredLevels(
        table=LevelTable({"yes_no": (StepCount(0, 100, 96), StepCount(500, 100, 50))}), grid=1
    )
    assert stated_levels(coarse, "yes_no", 25) == (1.0, 0.96, 0.75, 0.5, 0.25, 0.0)
    assert stated_levels(coarse, "yes_no", 100) == (1.0, 0.96, 0.5, 0.0)
    for grid in (1, 2, 4, 5, 10, 20):
        percents = [round(100 * c) for c in stated_levels(coarse, "yes_no", grid)]
        assert percents == sorted({96, 50, *range(0, 101, grid)}, reverse=True)
    assert stated_levels(LinearLevels(), "yes_no", 10) == TENTHS, "a percentage is stated once"


@pytest.mark.parametrize(
    ("levels", "confidence", "expected"),
    [
        ((1.0, 0.5, 0.0), 0.75, 0),
        ((1.0, 0.5, 0.0), 0.25, 1),
        ((0.0, 0.5, 1.0), 0.75, 2),
        ((0.9, 0.8, 0.7), 0.85, 0),
        ((0.9, 0.8, 0.7), 0.75, 1),
        ((0.9, 0.2), 0.99, 0),
        ((0.4,), 0.99, 0),
    ],
)
def test_the_nearest_level_is_the_higher_of_two(
    levels: tuple[float, ...], confidence: float, expected: int
) -> None:
    assert nearest(levels, confidence) == expected


@given(st.lists(st.integers(0, 100), min_size=1, unique=True), st.integers(0, 100))
def test_no_level_is_nearer_than_the_nearest(percents: list[int], percent: int) -> None:
    # Halves and quarters are exact, so that ties are ties.
    found = percents[nearest([p / 128 for p in percents], percent / 128)]
    assert found == min(percents, key=lambda p: (abs(p - percent), -p))


# --- Candidates --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["one token a percentage", "digit by digit"])
def chat(request: pytest.FixtureRequest, processor: Any, digit_processor: Any) -> ChatFormat:
    plain = request.param == "one token a percentage"
    return ChatFormat(processor if plain else digit_processor, ElicitationPrompt())


def _collate(
    chat: ChatFormat,
    samples: Sequence[Sample],
    wrong_answers: bool = False,
    length: int = 400,
    seed: int = 0,
    **policy: Any,
) -> PairBatch:
    policy_of_pairs = PairPolicy(wrong_answer=wrong_answers, seed=seed)
    return PairCollator(chat, LinearLevels(), policy_of_pairs, length, **policy)(samples)


def _prompt(chat: ChatFormat, batch: PairBatch, row: int) -> list[int]:
    """Token ids before the responses, with one image token for all."""
    ids = batch.inputs["input_ids"][row][: batch.lengths[row]].tolist()
    image = chat.processor.tokenizer.convert_tokens_to_ids("<image>")
    assert ids.count(image) == IMAGE_TOKENS
    first = ids.index(image)
    return ids[: first + 1] + ids[first + IMAGE_TOKENS :]


def _unspaced(text: str) -> str:
    """Byte-level tokenizers may put a space in front of a text."""
    return re.sub(r"(<\|user\|>|<\|assistant\|>|<image>) ", r"\1", text)


def test_the_digits_are_tokens_of_their_own(digit_processor: Any) -> None:
    ids = digit_processor.tokenizer("Confidence: 85%", add_special_tokens=False)["input_ids"]
    assert {"8", "5"} <= set(digit_processor.tokenizer.convert_ids_to_tokens(ids))


def _check_candidates(
    chat: ChatFormat, batch: PairBatch, row: int, answers: Sequence[str], levels: Sequence[float] = TENTHS
) -> None:
    """Each answer with each level, and each of them the whole conversation behind the prompt."""
    stated = [(a, c) for a in answers for c in levels]
    assert [(c.confidence, c.wrong) for c in batch.candidates[row]] == [
        (c, a != answers[0]) for a, c in stated
    ]
    prompt, question = _prompt(chat, batch, row), batch.queries[row].question
    for (answer, confidence), candidate in zip(stated, batch.candidates[row], strict=True):
        text = chat.render(question, render_response(answer, confidence))
        decoded = chat.processor.tokenizer.decode([*prompt, *candidate.tokens])
        assert _unspaced(decoded) == _unspaced(text)
        assert [*prompt, *candidate.tokens] == chat.processor.tokenizer(text)["input_ids"]
        said = chat.processor.tokenizer.decode(candidate.tokens[: candidate.answer_length])
        assert said.strip() == render_answer(answer)
        rest = chat.processor.tokenizer.decode(candidate.tokens[candidate.answer_length :])
        assert re.fullmatch(r"\s*Confidence: \d+%<\|end\|>", rest)
        assert parse_confidence(rest) == confidence
        ending = candidate.tokens[len(candidate.tokens) - candidate.ending_length :]
        assert chat.processor.tokenizer.decode(ending) == "%<|end|>"


def test_prompt_and_candidate_are_the_whole_conversation(chat: ChatFormat, samples: Sequence[Sample]) -> None:
    batch = _collate(chat, samples)
    for row, sample in enumerate(samples):
        _check_candidates(chat, batch, row, [sample.query.answer])
    lengths = {len(c.tokens) for c in batch.candidates[0]}
    one_token = "85" in chat.processor.tokenizer.tokenize("85")[0]
    assert len(lengths) == (1 if one_token else 3), "1, 2 or 3 digits"


def test_a_wrong_answer_beside_each_level(chat: ChatFormat, samples: Sequence[Sample]) -> None:
    wrong = [("No",), ("a pizza", "umbrella"), (), ("A cat, (or two!)", "Two cats. Maybe.")]
    asked = [s._replace(wrong=w) for s, w in zip(samples, wrong, strict=True)]
    batch = _collate(chat, asked, wrong_answers=True)
    _check_candidates(chat, batch, 0, ["Yes", "No"])
    _check_candidates(chat, batch, 1, ["umbrella", "a pizza"])
    _check_candidates(chat, batch, 2, ["No"])
    _check_candidates(chat, batch, 3, ["A cat, (or two!)", "Two cats. Maybe."])
    assert batch.is_correct == (True,) * 4
    for row, without in enumerate(_collate(chat, asked).candidates):
        assert batch.candidates[row][: len(without)] == without, "the other responses stay as they are"


def test_which_wrong_answer_changes_from_epoch_to_epoch(processor: Any, samples: Sequence[Sample]) -> None:
    chat = ChatFormat(processor, ElicitationPrompt())
    names = ("dog", "cat", "umbrella", "car")

    def said(epoch: int, name: str = "q", seed: int = 0) -> str:
        policy = PairPolicy(wrong_answer=True, seed=seed)
        collator = PairCollator(chat, LinearLevels(n_levels=2), policy, 400)
        query = replace(samples[1].query, id=name)
        _, [right, _, wrong, _] = collator._of_sample(
            samples[1]._replace(query=query, epoch=epoch, wrong=names)
        )
        assert (right.wrong, wrong.wrong) == (False, True)
        return processor.tokenizer.decode(wrong.tokens[: wrong.answer_length]).strip(" .")

    found = [said(epoch) for epoch in range(150)]
    assert found == [said(epoch) for epoch in range(150)]
    assert found != [said(epoch, "r") for epoch in range(150)]
    assert found != [said(epoch, seed=1) for epoch in range(150)]
    counts = Counter(found)
    assert set(counts) == {"dog", "cat", "car"}, "never the gold answer"
    assert chisquare(list(counts.values())).pvalue > 1e-3


def test_a_wrong_answer_is_what_the_responses_give(chat: ChatFormat, samples: Sequence[Sample]) -> None:
    mistaken = [samples[0]._replace(wrong_answer="No", wrong=("No",)), samples[1]._replace(wrong=("dog",))]
    batch = _collate(chat, mistaken, wrong_answers=True)
    _check_candidates(chat, batch, 0, ["No"])
    _check_candidates(chat, batch, 1, ["umbrella", "dog"])
    assert batch.is_correct == (False, True)
    assert batch.queries[0].answer == "Yes"


def test_what_travels_with_the_candidates(chat: ChatFormat, samples: Sequence[Sample]) -> None:
    asked = [s._replace(epoch=i) for i, s in enumerate(samples)]
    batch = _collate(chat, asked)
    assert batch.levels == (1.0, 0.3, 0.0, 0.85)
    assert batch.is_correct == (True,) * 4
    assert batch.epochs == (0, 1, 2, 3)
    assert batch.queries == tuple(s.query for s in samples)
    assert batch.skipped == ()
    assert batch.lengths.dtype == torch.int64
    moved = batch.to("meta")
    assert {t.device.type for t in (*moved.inputs.values(), moved.lengths)} == {"meta"}
    assert moved.candidates == batch.candidates


def test_a_sample_is_the_same_whatever_else_is_in_the_batch(
    chat: ChatFormat, samples: Sequence[Sample]
) -> None:
    together = _collate(chat, samples)
    for row, sample in enumerate(samples):
        alone = _collate(chat, [sample])
        length = int(alone.lengths[0])
        assert (together.lengths[row], together.candidates[row]) == (length, alone.candidates[0])
        for name in ("input_ids", "attention_mask"):
            assert torch.equal(together.inputs[name][row, :length], alone.inputs[name][0, :length])
        assert torch.equal(together.inputs["pixel_values"][row], alone.inputs["pixel_values"][0])
        assert together.inputs["attention_mask"][row].sum() == length, "padded on the right"


def _longest(chat: ChatFormat, sample: Sample) -> int:
    """Tokens of the longest conversation, as the collator of the first stage counts them."""
    collator = SFTCollator(chat, 10_000)
    return max(int(collator([sample._replace(confidence=c)]).inputs["attention_mask"].sum()) for c in TENTHS)


def test_too_long_is_an_error_that_names_the_record(chat: ChatFormat, samples: Sequence[Sample]) -> None:
    length = _longest(chat, samples[3])
    assert _collate(chat, samples, length=length).skipped == ()
    with pytest.raises(DataError, match=f"record 'q3': {length} tokens, more than max_length {length - 1}"):
        _collate(chat, samples, length=length - 1)


def test_too_long_is_skipped_and_listed(chat: ChatFormat, samples: Sequence[Sample]) -> None:
    # The wrong answer of the first is what makes it too long.
    asked = [samples[0]._replace(wrong=("No, " * 40,)), *samples[1:]]
    length = _longest(chat, samples[3])
    batch = _collate(chat, asked, wrong_answers=True, length=length - 1, on_too_long="skip")
    expected = _collate(chat, samples[1:3], wrong_answers=True)
    assert batch.skipped == ("q0", "q3")
    assert batch.queries == expected.queries
    assert batch.candidates == expected.candidates
    assert batch.levels == expected.levels
    assert torch.equal(batch.lengths, expected.lengths)
    assert all(torch.equal(batch.inputs[k], expected.inputs[k]) for k in expected.inputs)


def test_a_batch_of_which_all_is_skipped(chat: ChatFormat, samples: Sequence[Sample]) -> None:
    batch = _collate(chat, samples, length=IMAGE_TOKENS, on_too_long="skip")
    assert batch.inputs == {}
    assert batch.candidates == batch.queries == batch.levels == batch.is_correct == batch.epochs == ()
    assert batch.skipped == ("q0", "q1", "q2", "q3")
    assert batch.to("cpu").skipped == batch.skipped


@pytest.mark.parametrize("change", [{"question": "<image>\nA dog?"}, {"answer": "<image>"}])
def test_text_that_stands_for_the_image_is_refused(
    chat: ChatFormat, samples: Sequence[Sample], change: dict[str, str]
) -> None:
    query = replace(samples[1].query, **change)  # type: ignore[arg-type]
    [name] = change
    with pytest.raises(DataError, match=f"record 'q1': '{name}' holds '<image>'"):
        _collate(chat, [samples[0], samples[1]._replace(query=query)])


@pytest.mark.parametrize("change", [{"wrong_answer": "<image>"}, {"wrong": ("<image>",)}])
def test_a_wrong_answer_that_stands_for_the_image_is_refused(
    processor: Any, samples: Sequence[Sample], change: dict[str, Any]
) -> None:
    with pytest.raises(DataError, match="record 'q1'.*<image>"):
        _collate(
            ChatFormat(processor, ElicitationPrompt()), [samples[1]._replace(**change)], wrong_answers=True
        )


def test_a_template_whose_prompt_ends_within_the_first_token_of_the_answer(
    processor: Any, samples: Sequence[Sample]
) -> None:
    # The space belongs to the prompt alone but is part of the token " Yes" in the conversation.
    spaced = copy(processor)
    spaced.chat_template = CHAT_TEMPLATE.replace("'<|assistant|>'", "'<|assistant|> '").replace(
        "<|assistant|>{% endif %}", "<|assistant|> {% endif %}"
    )
    chat = ChatFormat(spaced, ElicitationPrompt())
    assert chat.render("A dog?").endswith("<|assistant|> ")
    asked = [samples[0]._replace(wrong=("A cat",)), *samples[1:]]
    batch = _collate(chat, asked, wrong_answers=True)
    # " A" is two tokens, so nothing need be taken back of the last one's prompt; the first has an answer of either kind.
    assert (batch.inputs["attention_mask"].sum(dim=1) - batch.lengths).tolist() == [1, 1, 1, 0]
    _check_candidates(chat, batch, 0, ["Yes", "A cat"])
    for row in (1, 2, 3):
        _check_candidates(chat, batch, row, [samples[row].query.answer])


def test_what_follows_the_end_of_turn_is_left_out(processor: Any, samples: Sequence[Sample]) -> None:
    breaking = copy(processor)
    breaking.chat_template = CHAT_TEMPLATE.replace("<|end|>", "<|end|>\n")
    batch = _collate(ChatFormat(breaking, ElicitationPrompt()), samples)
    said = [processor.tokenizer.decode(c.tokens) for row in batch.candidates for c in row]
    assert all(text.endswith("%<|end|>") for text in said)


@pytest.mark.parametrize("pairs", [True, False])
def test_validation_is_prompts_and_pairs_of_the_same_samples(
    chat: ChatFormat, samples: Sequence[Sample], pairs: bool
) -> None:
    collator = PairCollator(chat, LinearLevels(), PairPolicy(), 400) if pairs else None
    batch = ValidationCollator(PromptCollator(chat), collator)(samples)
    prompts = PromptCollator(chat)(samples)
    assert batch.prompts.queries == prompts.queries
    assert torch.equal(batch.prompts.inputs["input_ids"], prompts.inputs["input_ids"])
    assert (batch.pairs is None) is not pairs
    assert batch.pairs is None or batch.pairs.queries == prompts.queries
    moved = batch.to("meta")
    assert moved.prompts.inputs["input_ids"].device.type == "meta"
    assert moved.pairs is None or moved.pairs.lengths.device.type == "meta"


# --- Conversations -----------------------------------------------------------------------------------------------

PART = "part['text']"
TEMPLATES = {
    "as it is": CHAT_TEMPLATE,
    "upper case": CHAT_TEMPLATE.replace(PART, f"{PART} | upper"),
    "stripped": CHAT_TEMPLATE.replace(PART, f"{PART} | trim"),
    "said twice": CHAT_TEMPLATE.replace(PART, f"{PART} + ' ' + {PART}"),
    "left out": CHAT_TEMPLATE.replace(PART, "''"),
    "marked when certain": CHAT_TEMPLATE.replace(PART, f"({PART} + '!' if '100%' in {PART} else {PART})"),
    "with a line break": CHAT_TEMPLATE.replace("<|end|>", "<|end|>\n"),
}


@pytest.fixture(scope="module")
def chats(processor: Any) -> dict[str, ChatFormat]:
    made = {}
    for name, template in TEMPLATES.items():
        own = copy(processor)
        own.chat_template = template
        made[name] = ChatFormat(own, ElicitationPrompt())
    return made


def _one_by_one(chat: ChatFormat, question: str, responses: Sequence[str]) -> list[str]:
    return [chat.render(question, r) for r in responses]


@given(
    name=st.sampled_from(sorted(TEMPLATES)),
    question=st.text("Yes. No%10 Confidence:?é", max_size=30),
    answers=st.lists(st.text("Yes. no%10:é\n", max_size=12), min_size=1, max_size=2),
    percents=st.lists(st.integers(0, 100), min_size=1, max_size=4, unique=True),
)
def test_conversations_are_those_rendered_one_by_one(
    chats: dict[str, ChatFormat], name: str, question: str, answers: list[str], percents: list[int]
) -> None:
    falling = sorted(percents, reverse=True)
    responses = [render_response(a, p / 100) for a in answers for p in falling]
    stated = chats[name].conversations(question, responses)
    assert stated == _one_by_one(chats[name], question, responses)
    bare = [render_answer(a) for a in answers]
    assert chats[name].conversations(question, bare) == _one_by_one(chats[name], question, bare)


@pytest.mark.parametrize("name", TEMPLATES)
def test_conversations_of_every_level_under_every_template(chats: dict[str, ChatFormat], name: str) -> None:
    responses = [render_response(a, c) for a in ("Yes", "No") for c in TENTHS]
    for order in (responses, responses[::-1]):
        found = chats[name].conversations("A dog?", order)
        assert found == _one_by_one(chats[name], "A dog?", order)


def test_the_template_runs_twice_where_it_inserts_text_as_it_is(
    chats: dict[str, ChatFormat], monkeypatch: pytest.MonkeyPatch
) -> None:
    responses = [render_response("Yes", c) for c in TENTHS]
    for name, runs in (("as it is", 2), ("upper case", 11)):
        rendered: list[str] = []
        render = chats[name].render

        def counted(
            question: str, response: str, render: Any = render, rendered: list[str] = rendered
        ) -> str:
            rendered.append(response)
            return render(question, response)

        with monkeypatch.context() as patch:
            patch.setattr(chats[name], "render", counted)
            chats[name].conversations("A dog?", responses)
        assert len(rendered) == runs


def test_a_template_that_changes_text_changes_the_candidates_with_it(
    chats: dict[str, ChatFormat], samples: Sequence[Sample]
) -> None:
    chat = chats["upper case"]
    batch = _collate(chat, samples[:1])
    for candidate in batch.candidates[0]:
        percent = round(candidate.confidence * 100)
        said = chat.processor.tokenizer.decode(candidate.tokens).strip()
        assert said == f"YES. CONFIDENCE: {percent}%<|end|>"
        assert chat.processor.tokenizer.decode(candidate.tokens[: candidate.answer_length]).strip() == "YES."


# --- The isotonic map --------------------------------------------------------------------------------------------

rows = st.lists(
    st.tuples(st.integers(0, 20).map(lambda n: n / 20), st.booleans(), st.sampled_from(["yes_no", "short"])),
    min_size=1,
    max_size=60,
)


@given(rows, st.randoms(use_true_random=False))
def test_the_map_is_isotonic_regression_for_each_answer_type(
    found: list[tuple[float, bool, str]], random: Any
) -> None:
    fitted = fit_isotonic_map(*zip(*found, strict=True))
    grid = np.linspace(0, 1, 81)
    assert set(fitted.knots) == {kind for _, _, kind in found}
    for kind in fitted.knots:
        x, y = zip(*((c, float(r)) for c, r, k in found if k == kind), strict=True)
        peer = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(x, y)
        ours = [fitted(c, kind) for c in grid]
        np.testing.assert_allclose(ours, peer.predict(grid), atol=1e-9)
        assert all(0 <= value <= 1 for value in ours)
        assert (np.diff(ours) >= -1e-12).all()
    shuffled = list(found)
    random.shuffle(shuffled)
    assert fit_isotonic_map(*zip(*shuffled, strict=True)) == fitted


def test_the_map_by_hand() -> None:
    confidence = [0.2, 0.2, 0.4, 0.6, 0.6, 0.9]
    fitted = fit_isotonic_map(confidence, [False, True, False, True, True, True], ["open"] * 6)
    # 0.2 is right half the time, 0.4 never: pooled, by their counts, to a third.
    assert fitted.knots["open"][0] == [0.2, 0.4, 0.6, 0.9]
    assert fitted.knots["open"][1] == pytest.approx([1 / 3, 1 / 3, 1, 1])
    assert fitted(0.5, "open") == pytest.approx(2 / 3), "linear between knots"
    assert fitted(0.0, "open") == pytest.approx(1 / 3)
    assert fitted(1.0, "open") == 1.0


def test_types_are_fitted_apart() -> None:
    fitted = fit_isotonic_map([0.5, 0.5, 0.5], [True, True, False], ["yes_no", "yes_no", "short"])
    assert (fitted(0.3, "yes_no"), fitted(0.3, "short")) == (1.0, 0.0)


def test_a_type_that_was_not_measured_keeps_its_confidence() -> None:
    fitted = IsotonicMap({"yes_no": ([0.0, 1.0], [0.4, 0.6])})
    assert fitted(0.9, "yes_no") == pytest.approx(0.58)
    assert fitted(0.9, "open") == 0.9


@pytest.mark.parametrize("kind", ["yes_no", "open"])
def test_no_number_is_no_confidence(kind: str) -> None:
    with pytest.raises(ValueError, match="confidence is not a number"):
        IsotonicMap({"yes_no": ([0.0, 1.0], [0.4, 0.6])})(math.nan, kind)
