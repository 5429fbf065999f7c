"""The isotonic map of `target: recalibrated`: the regression, and the answers of the reference that it is fitted on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression

from vlm_calibration.data.candidates import (
    CandidateBatch,
)
from vlm_calibration.data.noise import Sample
from vlm_calibration.demo.architecture import CHAT_TEMPLATE
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.models.adapters import load_adapters
from vlm_calibration.models.generation import generate_texts
from vlm_calibration.models.loading import BaseModel, load_base
from vlm_calibration.models.shared_prefix import ResponseScores
from vlm_calibration.perturbation.levels import CLEAN
from vlm_calibration.records import DataError, Query
from vlm_calibration.stages import preference_targets
from vlm_calibration.stages.answering import graded_prediction
from vlm_calibration.stages.preference_targets import (
    IsotonicMap,
    PairPolicy,
    fit_isotonic_map,
)
from vlm_calibration.text.confidence import render_response, strip_confidence
from vlm_calibration.text.grading import grade

from .preference import LEVELS, Data, MakeModule

rows = st.lists(
    st.tuples(st.integers(0, 20).map(lambda n: n / 20), st.booleans(), st.sampled_from(["yes_no", "short"])),
    min_size=1,
    max_size=60,
)


@given(rows, st.randoms(use_true_random=False))
def test_the_map_is_isotonic_regression_for_each_answer_type(
    answers: list[tuple[float, bool, str]], random: Any
) -> None:
    fitted = fit_isotonic_map(*zip(*answers, strict=True))
    grid = np.linspace(0, 1, 81)
    assert set(fitted.knots) == {kind for _, _, kind in answers}
    for kind in fitted.knots:
        x, y = zip(*((c, float(r)) for c, r, k in answers if k == kind), strict=True)
        peer = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(x, y)
        ours = [fitted(c, kind) for c in grid]
        np.testing.assert_allclose(ours, peer.predict(grid), atol=1e-9)
        assert all(0 <= value <= 1 for value in ours)
        assert (np.diff(ours) >= -1e-12).all()
    shuffled = list(answers)
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


def test_each_answer_type_has_its_own_map() -> None:
    fitted = fit_isotonic_map([0.5, 0.5, 0.5], [True, True, False], ["yes_no", "yes_no", "short"])
    assert (fitted(0.3, "yes_no"), fitted(0.3, "short")) == (1.0, 0.0)


def test_an_answer_type_without_a_map_keeps_its_confidence() -> None:
    fitted = IsotonicMap({"yes_no": ([0.0, 1.0], [0.4, 0.6])})
    assert fitted(0.9, "yes_no") == pytest.approx(0.58)
    assert fitted(0.9, "open") == 0.9


@pytest.mark.parametrize("kind", ["yes_no", "open"])
def test_nan_is_no_confidence(kind: str) -> None:
    with pytest.raises(ValueError, match="confidence is not a number"):
        IsotonicMap({"yes_no": ([0.0, 1.0], [0.4, 0.6])})(math.nan, kind)


def _assert_fitted_on(fitted: IsotonicMap, rows: Sequence[tuple[float, bool, str]]) -> None:
    expected = fit_isotonic_map(*zip(*rows, strict=True))
    assert fitted.knots.keys() == expected.knots.keys()
    for kind, (confidence, accuracy) in expected.knots.items():
        assert fitted.knots[kind][0] == pytest.approx(confidence, abs=1e-3)
        assert fitted.knots[kind][1] == pytest.approx(accuracy, abs=1e-3)


@pytest.mark.slow
def test_the_map_is_fitted_on_what_the_reference_answers_and_expects(
    make_module: MakeModule,
    demo_folder: str,
    adapter: str,
    candidates: Data,
    trainer: Callable[..., L.Trainer],
) -> None:
    module = make_module(pairs=PairPolicy(target="recalibrated"))
    queries = candidates(validation=DemoSource("calibration", scenes=4))
    run = trainer(max_steps=1, limit_train_batches=1)
    run.fit(module, datamodule=queries)
    assert module.recalibration is not None

    # By hand: generate with the adapter, and score every level after the answer.
    model = load_adapters(load_base(BaseModel(demo_folder, dtype="float32")), {"sft": adapter}).eval()
    rows: list[tuple[float, bool, str]] = []
    for batch in queries.val_dataloader():
        texts = generate_texts(model, batch.prompts.inputs, queries.processor.tokenizer, 8)
        for row, (query, text) in enumerate(zip(batch.prompts.queries, texts, strict=True)):
            graded = grade(text, query.answer, query.answer_type)
            assert graded.predicted is not None
            log_p = [_log_p(model, queries, query, strip_confidence(text), c, batch, row) for c in LEVELS]
            p = torch.softmax(torch.tensor(log_p), -1)
            rows.append((float(p @ torch.tensor(LEVELS, dtype=p.dtype)), graded.correct, query.answer_type))
    assert len(rows) == 12
    assert {correct for _, correct, _ in rows} == {True, False}
    _assert_fitted_on(module.recalibration, rows)


def _log_p(
    model: Any, queries: Any, query: Query, answer: str, confidence: float, batch: Any, row: int
) -> float:
    """log p of the whole response under the model, by a plain forward."""
    chat, pixels = queries.chat, batch.prompts.inputs["pixel_values"][row : row + 1]
    blank = np.zeros((96, 96, 3), dtype=np.uint8)
    prompt, full = (
        chat.inputs([chat.render(query.question, *response)], [blank], "right")["input_ids"]
        for response in ((), (render_response(answer, confidence),))
    )
    with torch.no_grad():
        logits = model(input_ids=full, attention_mask=torch.ones_like(full), pixel_values=pixels).logits[0]
    start = prompt.shape[1]
    assert torch.equal(full[0, :start], prompt[0])
    log_p = torch.log_softmax(logits.double(), -1)[range(start - 1, full.shape[1] - 1), full[0, start:]]
    return float(log_p.sum())


class Reference:
    """Scores nothing, and records the sequences that it is asked to score."""

    def __init__(self) -> None:
        self.asked: list[list[list[int]]] = []

    def score_reference(self, batch: CandidateBatch, candidates: Any) -> ResponseScores:
        prompts = [
            ids[:length].tolist()
            for ids, length in zip(batch.inputs["input_ids"], batch.lengths, strict=True)
        ]
        self.asked = [
            [[*prompt, *c.tokens] for c in row] for prompt, row in zip(prompts, candidates, strict=True)
        ]
        zeros = torch.zeros(len(candidates), max(map(len, candidates)), 1)
        return ResponseScores(zeros, zeros > 0)


@pytest.mark.parametrize("text", ["Yes. Confidence: 90%", "A cat. Confidence: 80%"])
def test_the_reference_scores_the_whole_conversation(
    candidates: Data, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """However many tokens of the prompt an answer replaces: here "Yes" merges with the space before it, and "A cat" does not."""
    queries = candidates()
    template = CHAT_TEMPLATE.replace("'<|assistant|>'", "'<|assistant|> '").replace(
        "<|assistant|>{% endif %}", "<|assistant|> {% endif %}"
    )
    monkeypatch.setattr(queries.processor, "chat_template", template)
    blank = np.zeros((96, 96, 3), dtype=np.uint8)
    query = Query("q", "x", "What is it?", "Yes", "open")
    collator = queries.candidate_collator
    assert collator is not None
    batch = collator([Sample(query, blank, 1.0, CLEAN, 0)])
    reference = Reference()
    preference_targets._score_answers(
        reference, batch, [graded_prediction(query, text, CLEAN, 0)], collator.responses
    )
    chat = queries.chat
    for ids, level in zip(reference.asked[0], LEVELS, strict=True):
        conversation = chat.render(query.question, render_response(strip_confidence(text), level))
        assert ids == chat.inputs([conversation], [blank], "right")["input_ids"][0].tolist()


def test_the_map_is_that_of_all_processes(
    make_module: MakeModule,
    candidates: Data,
    trainer: Callable[..., L.Trainer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A process whose own queries cannot be used must not raise while the others wait for it."""
    others = [(0.3, False, "yes_no"), (0.8, True, "yes_no")]
    monkeypatch.setattr(preference_targets, "_score_answers", lambda *_: [])
    monkeypatch.setattr(preference_targets, "_all_gather", lambda rows: rows + others)
    module = make_module(pairs=PairPolicy(target="recalibrated"))
    trainer(max_steps=1, limit_val_batches=0).fit(module, datamodule=candidates())
    assert module.recalibration == fit_isotonic_map(*zip(*others, strict=True))


def test_a_process_without_validation_queries_fits_the_map_of_the_others(
    make_module: MakeModule,
    candidates: Data,
    trainer: Callable[..., L.Trainer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    others = [(0.3, False, "yes_no"), (0.8, True, "yes_no")]
    monkeypatch.setattr(preference_targets, "_all_gather", lambda rows: rows + others)
    module, queries = make_module(pairs=PairPolicy(target="recalibrated")), candidates()

    def nothing() -> list[Any]:  # Lightning asks for the code of a loader's function, which `list` has not
        return []

    monkeypatch.setattr(queries, "val_dataloader", nothing)
    trainer(max_steps=1, limit_val_batches=0).fit(module, datamodule=queries)
    assert module.recalibration == fit_isotonic_map(*zip(*others, strict=True))


def test_a_map_needs_answers_to_be_fitted_on(
    make_module: MakeModule,
    candidates: Data,
    trainer: Callable[..., L.Trainer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = PairPolicy(target="recalibrated")
    with pytest.raises(DataError, match=r"data\.validation is not set: `target: recalibrated`"):
        trainer(max_steps=1).fit(make_module(pairs=policy), datamodule=candidates(validation=None))
    monkeypatch.setattr(preference_targets, "_score_answers", lambda *_: [])
    with pytest.raises(DataError, match="`target: recalibrated`.*nothing to fit"):
        trainer(max_steps=1).fit(make_module(pairs=policy), datamodule=candidates())
