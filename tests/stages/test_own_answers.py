"""Stage 2 on the reference's own answers: targets against each query on its own, and which answers count.

`models/test_whole_path.py` compares candidates and losses with each response on its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import nn

from vlm_calibration.callbacks.checkpoint import RunCheckpoint
from vlm_calibration.data.candidates import CandidateSettings
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.estimators.base import AnsweredBatch
from vlm_calibration.estimators.p_true import TEMPLATE
from vlm_calibration.estimators.teacher import FittedTeacher, TeacherSettings
from vlm_calibration.losses.distribution import RLCR, SoftLabel
from vlm_calibration.losses.preference import DPO
from vlm_calibration.records import DataError, Query
from vlm_calibration.stages.dpo import DPOModule
from vlm_calibration.stages.preference_targets import ESTIMATORS, PairPolicy, Target, TargetChooser
from vlm_calibration.stages.training import trained_parameters

from .conftest import LEVELS, OWN, WITH_OPPOSITE, Data, MakeModule, MakeTrainer, Steps, adapter_weights
from .own import MAPS, MakeStep, OwnStep, nearest

EMPTY, UNCLEAR = "Confidence: 50%", "It is white. Confidence: 50%"


@pytest.fixture
def make_own(make_step: MakeStep) -> MakeStep:
    """As `make_step`, with own answers and a loss for which the target is whether they are correct."""
    plain = {"pairs": PairPolicy(target="correct"), "loss": SoftLabel(width=0.2)}
    return partial(make_step, **{"answers": OWN, **plain})


def test_the_reference_answers_in_eval_mode_with_a_cache(
    make_own: MakeStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = make_own().compare()[1]
    seen: list[tuple[bool, bool, bool]] = []
    original = DPOModule._answer

    def recorded(module: DPOModule, batch: Any) -> Any:
        answered = original(module, batch)
        modes = {m.training for m in module.model.modules()}
        seen.append((modes == {False}, torch.is_grad_enabled(), answered.cache is None))
        return answered

    monkeypatch.setattr(DPOModule, "_answer", recorded)
    step = make_own(gradient_checkpointing=True)
    for name, layer in step.module.model.named_modules():
        if name.endswith("lora_dropout"):
            layer["reference"] = nn.Dropout(0.9)
    step.module.model.train()
    _, comparison = step.compare()
    assert seen == [(True, False, False)]
    assert {m.training for m in step.module.model.modules()} == {True}
    assert comparison.candidates == expected.candidates
    assert comparison.is_correct == expected.is_correct
    assert comparison.of_all is not None
    assert expected.of_all is not None
    torch.testing.assert_close(comparison.of_all, expected.of_all, atol=1e-5, rtol=1e-5)


def _target(step: OwnStep, row: int, target: str) -> float:
    """The target of one query, by hand."""
    query, answer = step.samples[row].query, step.answer(row)
    if target == "level":
        return step.samples[row].confidence
    if target == "correct":
        return float(step.is_correct(row))
    if target == "expected":
        return step.ask(row, lambda alone: alone.expected(answer, LEVELS))
    if target == "self_consistency":
        with torch.no_grad(), step.module.as_reference():
            answered = step.module._answer(step.collate([step.samples[row]]))
            return float(ESTIMATORS[target]().estimate(answered).confidence[0])  # type: ignore[arg-type]
    if target == "likelihood":
        if query.answer_type != "yes_no":
            return step.ask(row, lambda alone: alone.likelihood(answer))
        words = ("Yes.", "No.") if answer.lower().startswith("yes") else ("No.", "Yes.")
        return step.ask(row, lambda alone: alone.against(alone.prompt, *words))
    if target == "p_true":
        asked = TEMPLATE.format(question=query.question, answer=answer)
        return step.ask(row, lambda alone: alone.against(asked, "True", "False"))
    assert target == "fitted"
    weights, intercept = MAPS[query.answer_type]
    features = [_target(step, row, name) for name in ("likelihood", "expected")]
    z = intercept + sum(w * math.log(f / (1 - f)) for w, f in zip(weights, features, strict=True))
    return 1 / (1 + math.exp(-z))


@pytest.mark.slow
def test_targets_are_what_is_computed_for_each_query_alone(make_own: MakeStep) -> None:
    step = make_own(moved=0.4)
    assert any(step.text(row, reference=False) != step.text(row) for row in range(6)), "the reference answers"
    for target in get_args(Target):
        step.module.target = TargetChooser(target, TeacherSettings())
        if target == "fitted":
            step.module.target.fitted = FittedTeacher(TeacherSettings(), MAPS, {})
        _, comparison = step.compare()
        expected = [_target(step, row, target) for row in range(6)]
        assert comparison.targets == pytest.approx(expected, abs=2e-3), target
        assert np.std(expected) > 0.01, target
        for picks, confidence in zip(comparison.picks, expected, strict=True):
            assert picks[0] == nearest(LEVELS, confidence)
            assert sorted(picks) == list(range(len(LEVELS)))


# --- Answers that do not count --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_query_without_an_answer_to_rate_does_not_count(make_own: MakeStep) -> None:
    settings = {"loss": DPO(), "pairs": PairPolicy("likelihood"), "nll_weight": 0.5, "drift_weight": 0.5}
    step = make_own(answers=WITH_OPPOSITE, n=5, **settings)
    step.write({1: UNCLEAR})
    assert step.samples[1].query.answer_type == "yes_no"
    whole = float(step.step())
    logged = dict(step.logged)
    gradients = _gradients(step, step.batch)
    rest = step.collate([s for row, s in enumerate(step.samples) if row != 1])
    assert whole == pytest.approx(float(step.step(rest)), abs=1e-4)
    assert logged == pytest.approx(step.logged, abs=2e-3)
    for name, gradient in _gradients(step, rest).items():
        assert torch.allclose(gradients[name], gradient, atol=1e-4 + 1e-3 * float(gradient.abs().max())), name


def _gradients(step: OwnStep, batch: Any) -> dict[str, torch.Tensor]:
    step.module.zero_grad(set_to_none=True)
    step.step(batch).backward()
    return {n: p.grad.clone() for n, p in step.module.named_parameters() if p.grad is not None}


def test_an_answer_that_the_limit_cuts_off_is_no_answer(make_own: MakeStep) -> None:
    step = make_own(n=5, pairs=PairPolicy(target="level"))
    whole, rest, answer = step.batch, step.collate(step.samples[::2]), DPOModule._answer
    [dog] = step.queries.processor.tokenizer("dog", add_special_tokens=False)["input_ids"]

    def endless(module: DPOModule, batch: Any) -> AnsweredBatch:
        """The answers, of which the second and the fourth go on for ever."""

        def go_on(module: Any, inputs: Any, logits: torch.Tensor) -> None:
            logits[1::2] = 100.0 * nn.functional.one_hot(torch.tensor(dog), logits.shape[-1])

        with module.model.get_output_embeddings().register_forward_hook(go_on):
            return answer(module, batch)

    step.monkeypatch.setattr(DPOModule, "_answer", endless)
    with torch.no_grad(), step.module.as_reference():
        answered = step.module._answer(whole)
        for estimator in (make() for make in ESTIMATORS.values()):
            is_rated = [confidence is not None for confidence in estimator.estimate(answered).confidence]
            assert is_rated == [True, False, True, False, True], estimator.name
    loss = float(step.step(whole))
    assert step.logged["train/cut_off"] == 2
    step.monkeypatch.setattr(DPOModule, "_answer", answer)
    assert loss == pytest.approx(float(step.step(rest)), abs=1e-4)
    assert step.logged["train/cut_off"] == 2, "answers with an end are not counted"


def test_a_batch_in_which_no_query_counts_has_a_loss_of_zero(make_own: MakeStep) -> None:
    step = make_own(n=3)
    step.write(dict.fromkeys(range(3), EMPTY))
    loss = step.step()
    assert float(loss) == 0
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in trained_parameters(step.module))
    assert step.logged == {}
    step.module._validate_pairs(step.batch)
    assert all(int(mean.weight) == 0 for mean in step.module.pair_means.values())  # type: ignore[arg-type, union-attr]


# --- The opposite answer --------------------------------------------------------------------------------------------


def test_yes_and_no_have_the_opposite_answer_as_well_which_a_wrong_answer_is_not_preferred_over(
    make_own: MakeStep,
) -> None:
    step = make_own(answers=WITH_OPPOSITE, loss=RLCR(), n=4)
    golds = [s.query.answer for s in step.samples]
    assert golds[:2] == ["Yes", "No"]
    step.write({0: "No. Confidence: 75%", 1: "no, it is not", 3: UNCLEAR})
    step.step()
    _, comparison = step.compare()
    correct = comparison.correct
    decode = step.queries.processor.tokenizer.decode
    texts = [[decode(c.tokens[: c.answer_length]).strip() for c in row] for row in comparison.compared]
    n = len(LEVELS)
    assert set(texts[0][:n]) == {"No."}
    assert set(texts[0][n:]) == {"Yes."}
    assert correct[0] == [False] * n + [True] * n, "the own answer is wrong, its opposite correct"
    assert set(texts[1][n:]) == {"Yes."}
    assert correct[1] == [True] * n + [False] * n
    assert [c.wrong for c in comparison.compared[0]] == [False] * n + [True] * n
    assert step.samples[2].query.answer_type == "short"
    assert len(texts[2]) == len(texts[3]) == n, "no opposite of a short answer, or of neither yes nor no"
    assert correct[3] == [False] * n

    step.module.loss = DPO()
    wrong, correct_answer, *_ = step.compare()[1].compared
    assert [(c.confidence, c.wrong) for c in wrong] == [(0.0, False), *((c, False) for c in LEVELS[:-1])]
    assert [(c.confidence, c.wrong) for c in correct_answer] == [*((c, False) for c in LEVELS), (1.0, True)]


# --- Runs -----------------------------------------------------------------------------------------------------------


def test_validating_alone_needs_no_fitted_teacher(
    make_module: MakeModule, candidates: Data, trainer: MakeTrainer
) -> None:
    module = make_module(pairs=PairPolicy(target="fitted"))
    [values] = trainer().validate(module, datamodule=candidates(OWN), verbose=False)
    assert "val/accuracy" in values
    assert "val/kl" not in values


@pytest.mark.slow
def test_a_resumed_run_keeps_its_teacher(
    make_module: MakeModule,
    candidates: Data,
    trainer: MakeTrainer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {"pairs": PairPolicy(target="fitted"), "loss": SoftLabel()}
    uninterrupted, seen = make_module(**settings), Steps()
    saver = RunCheckpoint(filename="{epoch}", save_top_k=-1)
    run = trainer(seen, saver, enable_checkpointing=True, max_epochs=2, limit_val_batches=0)
    run.fit(uninterrupted, datamodule=candidates(OWN))
    first = tmp_path / "run" / "checkpoints" / "epoch=0.ckpt"

    monkeypatch.setattr(TargetChooser, "fit", None)
    resumed, rest = make_module(**settings), Steps()
    run = trainer(rest, max_epochs=2, limit_val_batches=0)
    run.fit(resumed, datamodule=candidates(OWN), ckpt_path=str(first))
    assert resumed.target.fitted == uninterrupted.target.fitted is not None
    assert len(seen.losses) == 6
    assert rest.losses == seen.losses[3:]
    there, here = (adapter_weights(m, "default") for m in (uninterrupted, resumed))
    assert all(torch.equal(there[name], here[name]) for name in there)


@pytest.mark.parametrize(
    ("given", "settings", "match"),
    [
        (
            {"candidates": CandidateSettings()},
            {"pairs": PairPolicy("likelihood")},
            r"likelihood.*data\.candidates\.answers",
        ),
        ({}, {"loss": SoftLabel(), "reference": "none"}, r"data\.candidates.*model\.reference"),
        ({}, {"loss": SoftLabel(opposite_weight=0.3)}, r"opposite_weight.*data\.candidates\.wrong_answer"),
        ({"candidates": None}, {}, r"data\.candidates is not set"),
        (
            {"validation": None},
            {"pairs": PairPolicy("fitted")},
            r"data\.teacher is not set, nor data\.validation: `target: fitted`",
        ),
    ],
)
def test_data_that_does_not_fit_the_module_is_rejected(
    make_module: MakeModule, candidates: Data, given: dict[str, Any], settings: dict[str, Any], match: str
) -> None:
    module = make_module(**{"pairs": PairPolicy(target="correct"), **settings})
    with pytest.raises(DataError, match=match):
        module.check_data(candidates(**{"candidates": OWN, **given}))


class YesNo(DemoSource):
    def queries(self) -> Sequence[Query]:
        return [query for query in super().queries() if query.answer_type == "yes_no"]


def test_a_teacher_of_other_data_is_refused(make_module: MakeModule, candidates: Data) -> None:
    data = candidates(OWN, teacher=YesNo("calibration", scenes=1))
    with pytest.raises(DataError, match=r"data\.teacher is a YesNo, unlike"):
        make_module(pairs=PairPolicy(target="fitted")).check_data(data)


def test_the_teacher_s_queries_are_not_those_of_the_validation(
    make_module: MakeModule, candidates: Data, trainer: MakeTrainer
) -> None:
    module = make_module(pairs=PairPolicy(target="fitted"), loss=SoftLabel())
    data = candidates(OWN, teacher=DemoSource("calibration", scenes=2, first=50))
    trainer(max_steps=1).fit(module, datamodule=data)
    assert module.target.fitted is not None
    assert module.target.fitted.scores["n"] == len(data.sets["teacher"].queries) == 6
    assert len(data.sets["validation"].queries) == 3


def test_a_teacher_needs_every_answer_type_in_the_validation_set(
    make_module: MakeModule, candidates: Data, trainer: MakeTrainer
) -> None:
    module = make_module(pairs=PairPolicy(target="fitted"))
    data = candidates(OWN, validation=YesNo("calibration", scenes=1))
    with pytest.raises(DataError, match=r"data\.validation has no short question, but data\.train has"):
        trainer(max_steps=1).fit(module, datamodule=data)
