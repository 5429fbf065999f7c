"""Which response is preferred: the target by likelihoods and by fitted teachers, and which candidates are compared.

Likelihoods are checked against plain forwards over whole conversations, one at a time; maps and scores of teachers against
scikit-learn.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import combinations
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, roc_auc_score
from sklearn.model_selection import GroupKFold
from torch import Tensor

from vlm_calibration.data.candidates import Candidate, CandidateSettings
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.estimators.teacher import FittedTeacher, TaughtAnswer, TeacherSettings
from vlm_calibration.estimators.verbal import expected_confidence
from vlm_calibration.losses.preference import SimPO
from vlm_calibration.models.adapters import load_adapters
from vlm_calibration.models.generation import generate
from vlm_calibration.models.loading import BaseModel, load_base
from vlm_calibration.models.shared_prefix import ResponseScores
from vlm_calibration.records import DataError, Query
from vlm_calibration.stages import preference_targets
from vlm_calibration.stages.dpo_terms import kl_divergence, picked
from vlm_calibration.stages.preference_targets import PairPolicy, TargetChooser, choose, level_log_p, nearest
from vlm_calibration.text.confidence import end_of_confidence
from vlm_calibration.text.grading import grade

from .conftest import LEVELS, OWN, Data, MakeModule, MakeTrainer
from .own import MakeStep


def test_the_expected_level_is_that_of_plain_forwards(make_step: MakeStep) -> None:
    step = make_step(CandidateSettings(grid=5), 4, reference="base")
    levels = tuple(percent / 100 for percent in range(100, -1, -5))
    expected, policy = (
        [
            step.ask(row, lambda alone, row=row: alone.expected(step.answer(row), levels), of)
            for row in range(4)
        ]
        for of in (True, False)
    )
    with torch.no_grad():
        comparison = step.compare()[1]
    assert comparison.targets == pytest.approx(expected, abs=1e-4)
    chosen = [row[0].confidence for row in comparison.compared]
    assert chosen == [min(levels, key=lambda c: abs(c - e)) for e in expected]
    assert all(sorted(c.confidence for c in row) == sorted(levels) for row in comparison.compared)
    assert set(chosen) - set(LEVELS)
    assert max(abs(a - b) for a, b in zip(policy, expected, strict=True)) > 0.01, "the reference decides"


@pytest.mark.parametrize("settings", [{"reference": "none"}, {}])
def test_a_reference_that_is_not_needed_does_not_score(
    make_step: MakeStep, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    step = make_step(n=4, **settings, loss=SimPO(), pairs=PairPolicy(target="level"))
    with monkeypatch.context() as patched:
        patched.setattr(step.module, "score", None)
        assert step.compare()[1].reference is None
    assert step.step().isfinite()
    adapters = set(step.module.model.peft_config)
    assert adapters == ({"default"} if settings else {"default", "reference"})


QUERY = Query("q", "x.png", "A dog?", "Yes", "yes_no")
TENTHS = tuple(i / 10 for i in range(10, -1, -1))


def _candidates(levels: Sequence[float] = TENTHS, wrong: bool = False) -> tuple[Candidate, ...]:
    """One response per level, then the same with a wrong answer."""
    correct = [Candidate((i,), 1, 0, c, False) for i, c in enumerate(levels)]
    return (*correct, *(c._replace(wrong=True) for c in correct if wrong))


# The levels with a wrong answer do not count.
CANDIDATES = _candidates((1.0, 0.5, 0.0), wrong=True)


def _totals(*rows: Sequence[float]) -> Tensor:
    return torch.tensor([[*row, 5.0, 6.0, 7.0] for row in rows])


def test_mean_and_divergence_by_hand() -> None:
    totals = _totals([math.log(0.1), math.log(0.1), math.log(0.2)], [-900.0, -901.0, -900.0])
    first, second = (expected_confidence(*levels) for levels in level_log_p(totals, (CANDIDATES,) * 2))
    assert first == pytest.approx(0.25 * 1 + 0.25 * 0.5)
    weight = 1 / (2 + math.exp(-1))
    assert second == pytest.approx(weight + 0.5 * weight * math.exp(-1))

    now, before = _totals([0, 1, 2], [0, 0, 0]), _totals([2, 1, 0], [-7, -7, -7])
    p = np.exp([0, 1, 2]) / np.exp([0, 1, 2]).sum()
    divergence = kl_divergence(now, before, (CANDIDATES,) * 2)
    assert float(divergence) == pytest.approx((p @ np.log(p / p[::-1]) + 0) / 2)
    assert float(kl_divergence(now, now, (CANDIDATES,) * 2)) == 0


@given(
    st.sets(st.integers(0, 100), min_size=1, max_size=12),
    st.none() | st.integers(1, 15),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_the_chosen_one_comes_first_and_is_never_rejected(
    percents: set[int], n_rejected: int | None, with_wrong: bool, random: Any
) -> None:
    policy = PairPolicy(rejected="all" if n_rejected is None else "uniform", n_rejected=n_rejected)
    candidates = _candidates([percent / 100 for percent in sorted(percents, reverse=True)], with_wrong)
    target, epoch = random.randrange(len(percents)), random.randrange(4)
    picks = choose(policy, candidates, target, QUERY, epoch)
    assert picks == choose(policy, candidates, target, QUERY, epoch)
    assert picks[0] == target
    assert len(set(picks)) == len(picks)
    n_levels = sum(not c.wrong for c in candidates)
    n_rejected = n_levels - 1 if policy.rejected == "all" else min(policy.n_rejected or 1, n_levels - 1)
    levels, wrong = picks[1 : n_rejected + 1], picks[n_rejected + 1 :]
    assert len(levels) == n_rejected
    assert not any(candidates[i].wrong for i in levels)
    assert wrong == ([target + n_levels] if len(candidates) > n_levels else []), "last, and at the same level"


def test_uniform_is_uniform_and_draws_one_by_default() -> None:
    candidates = _candidates((1.0, 0.8, 0.4, 0.1, 0.0))
    for n, sets in ((None, [(0,), (1,), (3,), (4,)]), (2, list(combinations([0, 1, 3, 4], 2)))):
        policy = PairPolicy(rejected="uniform", n_rejected=n)
        drawn = Counter(tuple(sorted(choose(policy, candidates, 2, QUERY, e)[1:])) for e in range(2000))
        assert sorted(drawn) == sets
        assert chisquare(list(drawn.values())).pvalue > 1e-3


def test_what_is_drawn_is_a_pure_function_of_seed_epoch_and_id() -> None:
    def drawn(seed: int = 0, epoch: int = 0, name: str = "q") -> tuple[int, ...]:
        policy = PairPolicy(rejected="uniform", n_rejected=6, seed=seed)
        return tuple(choose(policy, _candidates(), 5, replace(QUERY, id=name), epoch))

    expected = drawn()
    np.random.default_rng(0).random(10)
    np.random.seed(3)  # noqa: NPY002  (the legacy stream must not matter)
    torch.manual_seed(3)
    assert drawn() == expected
    assert len({expected, drawn(seed=1), drawn(epoch=1), drawn(name="r")}) == 4


@pytest.mark.parametrize(
    ("make", "settings", "culprit"),
    [
        (PairPolicy, {"n_rejected": 1}, r"pairs\.n_rejected .* not allowed with `rejected: all`, found 1"),
        (PairPolicy, {"rejected": "uniform", "n_rejected": 0}, r"pairs\.n_rejected .* found 0"),
        (PairPolicy, {"seed": -1}, r"pairs\.seed must be at least 0, found -1"),
        (TeacherSettings, {"features": ()}, r"teacher.*at least one"),
        (TeacherSettings, {"features": ("expected", "expected")}, r"teacher.*expected"),
        (
            TeacherSettings,
            {"features": ("expected", "p_true"), "map": "isotonic"},
            r"teacher.*isotonic.*p_true",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(make: Any, settings: dict[str, Any], culprit: str) -> None:
    with pytest.raises(DataError, match=rf"model\.{culprit}"):
        make(**settings)


def test_the_nearest_level_is_the_higher_of_two() -> None:
    assert nearest((1.0, 0.5, 0.0), 0.75) == 0
    assert nearest((0.0, 0.5, 1.0), 0.75) == 2
    assert nearest((0.9, 0.8, 0.7), 0.75) == 1
    assert nearest((0.9, 0.2), 0.99) == 0


FITTED = PairPolicy(target="fitted")
ONE = TeacherSettings(features=("expected",))
TWO = TeacherSettings()
ISOTONIC = TeacherSettings(features=("expected",), map="isotonic")
SETTINGS = [TeacherSettings(features=("expected", "likelihood", "p_true")), ISOTONIC]


def _answers(settings: TeacherSettings, n: int = 120, seed: int = 0) -> list[TaughtAnswer]:
    """Answers of two types about n / 4 images, correct more often where the features are high; some are exactly 0 or 1."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        features = np.round(rng.random(len(settings.features)), 2)
        correct = bool(rng.random() < 0.2 + 0.7 * features.mean())
        kind = ("yes_no", "short")[int(rng.random() < 0.3)]
        rows.append(TaughtAnswer(tuple(features.tolist()), correct, kind, f"image-{i % (n // 4)}"))
    extreme = (0.0, 1.0)
    rows += [TaughtAnswer((e,) * len(settings.features), e > 0.5, "yes_no", f"image-{e}") for e in extreme]
    return rows


def _log_odds(features: Any) -> np.ndarray:
    clipped = np.clip(np.asarray(features, dtype=np.float64), 1e-6, 1 - 1e-6)
    return np.log(clipped / (1 - clipped))


def _peer(
    settings: TeacherSettings, rows: Sequence[TaughtAnswer], asked: Sequence[TaughtAnswer]
) -> list[float]:
    """The accuracy of the asked answers by scikit-learn's own predictions, fitted on `rows`; NaN for a type without a row."""
    values = []
    for answer in asked:
        own = [row for row in rows if row.answer_type == answer.answer_type]
        x, y = np.array([row.features for row in own]), np.array([row.correct for row in own])
        if not own:
            values.append(math.nan)
        elif settings.map == "isotonic":
            peer = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(x[:, 0], y)
            values.append(float(peer.predict([answer.features[0]])[0]))
        elif y.min() == y.max():
            values.append((y.sum() + 1) / (len(y) + 2))
        else:
            logistic = LogisticRegression(max_iter=1000).fit(_log_odds(x), y)
            values.append(float(logistic.predict_proba(_log_odds([answer.features]))[0, 1]))
    return values


def test_a_query_with_fewer_picks_ends_with_empty_candidates() -> None:
    """Else the statistics of a validation would count its chosen candidate as a rejected one."""
    tokens = torch.ones(2, 3, 2, dtype=torch.bool)
    scores = picked(ResponseScores(-torch.arange(1.0, 13).view(2, 3, 2), tokens), [(2, 0, 1), (1,)])
    assert scores.total.tolist() == [[-11, -3, -7], [-19, 0, 0]]
    assert scores.lengths.tolist() == [[2, 2, 2], [2, 0, 0]]
    assert scores.tokens.dtype == torch.bool


# --- Maps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS, ids=repr)
def test_the_map_of_each_answer_type_is_that_of_scikit_learn(settings: TeacherSettings) -> None:
    rows, asked = _answers(settings), _answers(settings, 40, seed=1)
    fitted = FittedTeacher.fit(settings, rows)
    ours = [fitted(row.features, row.answer_type) for row in asked]
    assert ours == pytest.approx(_peer(settings, rows, asked), abs=1e-5)
    assert set(fitted.maps) == {"yes_no", "short"}
    assert np.std(ours) > 0.1
    swapped = [fitted(r.features, "short" if r.answer_type == "yes_no" else "yes_no") for r in asked]
    assert swapped != pytest.approx(ours, abs=0.02), "the types have maps of their own"


confidences = st.integers(0, 20).map(lambda n: n / 20)
kinds = st.sampled_from(["yes_no", "short"])
images = st.sampled_from([f"image-{i}" for i in range(8)])


@given(
    st.lists(st.tuples(confidences, confidences, st.booleans(), kinds, images), min_size=1, max_size=40),
    st.sampled_from([ISOTONIC, ONE, TWO]),
    st.randoms(use_true_random=False),
)
def test_any_answers_give_a_monotone_map_to_shares_whatever_their_order(
    drawn: list[tuple[float, float, bool, Any, str]], settings: TeacherSettings, random: Any
) -> None:
    rows = [
        TaughtAnswer((a, b)[: len(settings.features)], correct, kind, image)
        for a, b, correct, kind, image in drawn
    ]
    fitted = FittedTeacher.fit(settings, rows)
    assert set(fitted.maps) == {row.answer_type for row in rows}
    grid = np.linspace(0, 1, 21)
    for kind in fitted.maps:
        for other in (0.0, 0.5, 1.0):
            values = [fitted((c, other)[: len(settings.features)], kind) for c in grid]
            assert all(0 <= value <= 1 for value in values)
            steps = np.diff(values)
            rises, falls = (steps >= -1e-12).all(), (steps <= 1e-12).all()
            assert rises if settings.map == "isotonic" else rises or falls
    assert all(math.isfinite(score) for score in fitted.scores.values())
    shuffled = list(rows)
    random.shuffle(shuffled)
    again = FittedTeacher.fit(settings, shuffled)
    assert (again.maps, again.scores) == (fitted.maps, fitted.scores)


def test_answers_of_one_outcome_follow_the_rule_of_succession() -> None:
    rows = [TaughtAnswer((0.1 * i, 0.5), False, "short", f"{i}") for i in range(3)]
    fitted = FittedTeacher.fit(TWO, [*rows, TaughtAnswer((0.3, 0.3), True, "yes_no", "a")])
    for features in ((0.0, 0.0), (0.9, 0.1), (1.0, 1.0)):
        assert fitted(features, "short") == pytest.approx(1 / 5)
        assert fitted(features, "yes_no") == pytest.approx(2 / 3)
    with pytest.raises(DataError, match=r"no open answer.*data\.validation.*short, yes_no"):
        fitted((0.5, 0.5), "open")


# --- State ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS, ids=repr)
def test_a_checkpoint_keeps_the_teacher_of_its_settings(settings: TeacherSettings) -> None:
    fitted = FittedTeacher.fit(settings, _answers(settings))
    file = io.BytesIO()
    torch.save(asdict(fitted), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    again = FittedTeacher.from_state(settings, state)
    assert (again, repr(again)) == (fitted, repr(fitted))
    assert all(word in repr(fitted) for word in (settings.map, *settings.features))
    for other in (ONE, TWO):
        with pytest.raises(DataError, match=r"--ckpt_path.*model\.teacher"):
            FittedTeacher.from_state(other, state)


# --- Scores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "n_images"), [(SETTINGS[0], 30), (SETTINGS[0], 3), (ISOTONIC, 30)])
def test_scores_are_of_answers_about_images_that_the_maps_were_not_fitted_on(
    settings: TeacherSettings, n_images: int
) -> None:
    rows = sorted(_answers(settings, 4 * n_images)[: 4 * n_images])
    scores = FittedTeacher.fit(settings, rows).scores
    confidence = np.full(len(rows), np.nan)
    for train, test in GroupKFold(min(5, n_images)).split(rows, groups=[row.image for row in rows]):
        assert not {rows[i].image for i in train} & {rows[i].image for i in test}
        confidence[test] = _peer(settings, [rows[i] for i in train], [rows[i] for i in test])
    correct = np.array([row.correct for row in rows])
    expected = {"n": len(rows), "accuracy": correct.mean()}
    rated = ~np.isnan(confidence)  # with three images, a fold can hold all answers of a type
    assert rated.all() or n_images == 3
    confidence, correct = confidence[rated], correct[rated]
    bins = np.minimum((confidence * 10).astype(int), 9)
    gaps = [abs((confidence[bins == b] - correct[bins == b]).sum()) for b in range(10)]
    expected |= {
        "brier": brier_score_loss(correct, confidence),
        "ece": sum(gaps) / len(correct),
        "auroc": roc_auc_score(correct, confidence),
    }
    assert scores == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("rows", "undefined"),
    [
        ([("yes_no", True, "a"), ("yes_no", False, "a")], {"brier", "ece", "auroc"}),  # a single image
        ([("yes_no", True, "a"), ("short", False, "b")], {"brier", "ece", "auroc"}),  # a type in one fold
        ([("yes_no", True, "a"), ("yes_no", True, "b")], {"auroc"}),
        ([("yes_no", True, "a"), ("yes_no", False, "b")], set()),
    ],
)
@pytest.mark.filterwarnings("error")
def test_scores_that_are_undefined_are_left_out(
    rows: list[tuple[Any, bool, str]], undefined: set[str]
) -> None:
    answers = [TaughtAnswer((0.4,), correct, kind, image) for kind, correct, image in rows]
    scores = FittedTeacher.fit(ONE, answers).scores
    assert set(scores) == {"n", "accuracy", "brier", "ece", "auroc"} - undefined
    assert all(math.isfinite(score) for score in scores.values())


# --- Fitting in a run -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_is_fitted_on_what_the_reference_answers(
    make_module: MakeModule,
    demo_folder: str,
    adapter: str,
    candidates: Data,
    trainer: MakeTrainer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    modes: list[tuple[bool, bool]] = []
    original = TargetChooser.features

    def recorded(target: TargetChooser, answered: Any) -> Any:
        modes.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return original(target, answered)

    monkeypatch.setattr(TargetChooser, "features", recorded)
    gather = Mock(side_effect=preference_targets.gather)
    monkeypatch.setattr(preference_targets, "gather", gather)
    queries = candidates(OWN, validation=DemoSource("calibration", scenes=4))
    settings: dict[str, Any] = {"max_steps": 1, "limit_train_batches": 1, "limit_val_batches": 0}
    trainer(**settings, precision="bf16-mixed").fit(make_module(pairs=FITTED), datamodule=queries)
    assert modes == [(False, True)] * 4, (
        "three batches of validation and a step, in the precision of training"
    )
    module = make_module(pairs=FITTED, gradient_checkpointing=True)
    trainer(**settings).fit(module, datamodule=queries)
    assert module.target.fitted is not None
    assert modes[4:] == [(False, False)] * 4
    assert module.model.training

    # By hand: generate alone with the adapter, and grade. `test_own_answers.py` tests the features.
    model = load_adapters(load_base(BaseModel(demo_folder, dtype="float32")), {"sft": adapter}).eval()
    dataset, chat = queries.val_dataloader().dataset, queries.chat
    expected = []
    for sample in [dataset[0, i] for i in range(12)]:
        query = sample.query
        inputs = chat.inputs([chat.render(query.question)], [sample.image], "left")
        [text] = generate(model, inputs, chat.processor.tokenizer, 8, end_of_confidence).texts
        correct = grade(text, query.answer, query.answer_type).correct
        expected.append((correct, query.answer_type, query.image))
    rows = gather.call_args.args[0]
    assert [row[1:] for row in rows] == expected
    assert {row.correct for row in rows} == {True, False}
    assert module.target.fitted == FittedTeacher.fit(TWO, rows)


OTHERS = [TaughtAnswer((0.3, 0.4), False, kind, "a") for kind in ("yes_no", "short")]
OTHERS += [TaughtAnswer((0.8, 0.7), True, kind, "b") for kind in ("yes_no", "short")]


def test_the_teacher_is_that_of_all_processes_and_needs_answers(
    make_module: MakeModule, candidates: Data, trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process none of whose own answers is rated must not raise while the others wait for it."""
    own: list[list[TaughtAnswer]] = []
    queries = candidates(OWN)

    def gather(rows: list[TaughtAnswer]) -> list[TaughtAnswer]:
        own.append(rows)
        return rows + OTHERS

    monkeypatch.setattr(TargetChooser, "features", lambda _, answered: [None] * len(answered.predictions))
    with pytest.raises(DataError, match="`target: fitted`.*nothing to fit"):
        trainer(max_steps=1).fit(make_module(pairs=FITTED), datamodule=queries)
    monkeypatch.setattr(preference_targets, "gather", gather)
    module = make_module(pairs=FITTED)
    trainer(max_steps=1, limit_val_batches=0).fit(module, datamodule=queries)
    assert own == [[]]
    assert module.target.fitted is not None
    assert module.target.fitted.maps == FittedTeacher.fit(TWO, OTHERS).maps
