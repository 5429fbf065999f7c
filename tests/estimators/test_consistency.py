"""Self-consistency: samples follow the model's probabilities and do not depend on the batch; and the passes of generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser
from torch import nn

from vlm_calibration.data.collate import ChatFormat
from vlm_calibration.data.noise import Sample
from vlm_calibration.estimators import consistency
from vlm_calibration.estimators.base import Estimator
from vlm_calibration.estimators.consistency import InverseTransformSampler, SelfConsistency, agrees
from vlm_calibration.estimators.predictions import graded_prediction
from vlm_calibration.models.generation import Generated
from vlm_calibration.perturbation.levels import CLEAN
from vlm_calibration.records import Query
from vlm_calibration.text.grading import Grading
from vlm_calibration.text.prompts import ElicitationPrompt

from .conftest import ASKED, Answering, samples_of, scenes


def test_the_share_of_samples_that_agree(
    demo: tuple[Any, ChatFormat], answering: Answering, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Yes is sampled three times of four; the answers are yes, other words, no, and none."""
    texts = ("Yes. Confidence: 80%", "no such word", "No", "It is white.")
    answered = answering(*demo, samples_of(scenes(4)), texts)
    sampled = iter(["Yes", "yes.", "No", "Yes. Confidence: 10%"])
    monkeypatch.setattr(
        consistency, "generate", lambda *_: Generated([next(sampled)] * 4, [2, 2, 3, 2], [True] * 4, None)
    )
    assert SelfConsistency(4).estimate(answered) == ([0.75, 0.0, 0.25, None], [8, 8, 12, 8])


def test_tokens_are_sampled_by_their_probabilities() -> None:
    logits = torch.tensor([[0.3, -1.0, -torch.inf, 2.0, 0.0]]).expand(4000, -1)
    numbers = (torch.arange(4000, dtype=torch.float64) / 4000)[torch.randperm(4000)][:, None]
    ids = torch.zeros(4000, 7, dtype=torch.int64)
    tokens = InverseTransformSampler(0.8, numbers, 7)(ids, logits).argmax(-1)
    shares = torch.bincount(tokens, minlength=5) / 4000
    assert shares.tolist() == pytest.approx(torch.softmax(logits[0] / 0.8, -1).tolist(), abs=3e-4)
    assert shares[2] == 0


def test_the_ends_of_the_distribution() -> None:
    largest = 1 - 2**-53
    numbers = torch.tensor([[0.0, largest], [largest, 0.0]], dtype=torch.float64)
    logits = torch.tensor([[-torch.inf, 0.1, 0.2, -torch.inf]]).expand(2, -1)
    sampler = InverseTransformSampler(0.1, numbers, 3)
    assert sampler(torch.zeros(2, 3), logits).argmax(-1).tolist() == [1, 2]
    assert sampler(torch.zeros(2, 4), logits).argmax(-1).tolist() == [2, 1]


@torch.no_grad()
def test_the_samples_of_a_query_do_not_depend_on_the_batch(
    load_model: Any, processor: Any, answering: Answering
) -> None:
    model, chat = load_model(), ChatFormat(processor, ElicitationPrompt())
    rows = tuple((q, a, "short", t) for q, a, _, t in ASKED)
    samples = samples_of(scenes(4), rows)
    estimator = SelfConsistency(8, temperature=0.3, seed=3)

    def rated(chosen: list[Sample], seed: int = 3, temperature: float = 0.3) -> dict[str, float | None]:
        batch = answering(model, chat, chosen)
        estimator.seed, estimator.temperature = seed, temperature
        confidence = estimator.estimate(batch).confidence
        return {s.query.id: c for s, c in zip(chosen, confidence, strict=True)}

    torch.manual_seed(0)
    together = rated(samples)
    assert len(set(together.values())) > 1
    assert any(c is not None and 0 < c < 1 for c in together.values())
    torch.manual_seed(1)
    assert rated(samples[::-1]) == together
    assert {k: v for s in samples for k, v in rated([s]).items()} == together
    assert rated(samples, seed=4) != together
    assert set(rated(samples, temperature=1e-6).values()) <= {1.0, None}, "as the greedy answers"


def test_settings_that_make_no_sense_are_refused() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Estimator, "estimator")
    path = f"{SelfConsistency.__module__}.SelfConsistency"
    for setting, value in {"samples": 0, "temperature": 0.0, "seed": -1}.items():
        with pytest.raises(ArgumentError, match=setting):
            parser.parse_object({"estimator": {"class_path": path, "init_args": {setting: value}}})


@torch.no_grad()
def test_passes_are_counted_to_the_end_of_each_answer(
    load_model: Any, processor: Any, answering: Answering
) -> None:
    model, tokenizer = load_model(), processor.tokenizer
    end = tokenizer.eos_token_id
    script = iter([[7, 7, end], [7, end, 8], [8, 9, 9], [9, 9, 9]])

    def follow_script(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        tokens = torch.tensor(next(script))
        return torch.full_like(output, -100.0).scatter_(-1, tokens[:, None, None], 100.0)

    handle = model.get_output_embeddings().register_forward_hook(follow_script)
    samples = samples_of(scenes(3), ASKED[:3])
    batch = answering(model, ChatFormat(processor, ElicitationPrompt()), samples, max_new_tokens=4)
    handle.remove()
    assert list(batch.answer_passes) == [4, 2, 1]


def test_samples_agree_by_the_rule_that_grades_answers() -> None:
    prediction = graded_prediction(Query("1", "a.png", "What is it?", "dog", "short"), "a dog", CLEAN, 0)
    rules = (Grading(), Grading(short="contains"), Grading(short="token_f1"))
    assert [agrees(prediction, "a big dog. Confidence: 80%", rule) for rule in rules] == [False, True, True]


@pytest.mark.parametrize(("asked", "answer"), [("dog", "no"), ("cat", "yes"), ("bird", None)])
def test_an_answer_and_its_samples_are_graded_by_the_question(asked: str, answer: str | None) -> None:
    query = Query("1", "a.png", f"Is there a {asked}?", "No", "yes_no")
    prediction = graded_prediction(query, "There is a cat, but no dog", CLEAN, 0)
    assert (prediction.predicted, prediction.correct) == (answer, answer == "no")
    samples = ("There is a cat without a dog", "There are zero cats and a dog")
    assert [agrees(prediction, text, Grading()) for text in samples] == [answer is not None, False]


def test_queries_and_samples_draw_numbers_of_their_own(
    demo: tuple[Any, ChatFormat], answering: Answering, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[torch.Tensor] = []
    answered = answering(*demo, samples_of(scenes(4)), ["Yes"] * 4)
    monkeypatch.setattr(consistency, "InverseTransformSampler", lambda _, numbers, __: drawn.append(numbers))
    monkeypatch.setattr(consistency, "generate", lambda *_: Generated(["Yes"] * 4, [2] * 4, [True] * 4, None))
    SelfConsistency(2).estimate(answered)
    assert len(torch.cat(drawn).unique()) == torch.cat(drawn).numel() > 8
