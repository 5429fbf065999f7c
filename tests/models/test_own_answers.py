"""A step of stage 2 on own answers, against each query and each response alone."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch

from vlm_calibration.data.candidates import CandidateSettings
from vlm_calibration.losses.distribution import RLCR, SoftLabel
from vlm_calibration.losses.preference import DPO
from vlm_calibration.models.base import BaseModel
from vlm_calibration.stages.dpo import DPOModule
from vlm_calibration.stages.preference_targets import PairPolicy
from vlm_calibration.stages.sft import SFTModule
from vlm_calibration.stages.training import OptimizerSettings
from vlm_calibration.text.confidence import render_answer

from ..stages.own import OwnStep, loss_by_hand
from .families import FOUR
from .processors import cached_family
from .runs import LORA, data_of, fit, write_records

pytestmark = pytest.mark.slow


class Trained(NamedTuple):
    """A base model, an adapter that answers the records, and the file of the records."""

    base: BaseModel
    adapter: str
    records: str


@pytest.fixture(scope="module", params=FOUR)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp(request.param)
    records = write_records(folder)
    base = BaseModel(cached_family(request.param).save(folder / "base"), dtype="float32")
    torch.manual_seed(0)
    sft = SFTModule(base, LORA, OptimizerSettings(lr=2e-2, warmup_fraction=0.0))
    fit(sft, data_of(base.name_or_path, records), 28)
    sft.model.save_pretrained(folder / "sft")
    return Trained(base, str(folder / "sft"), records)


@pytest.mark.parametrize("wrong_answer", [False, True])
def test_a_step_equals_that_of_each_query_and_each_response_alone(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, wrong_answer: bool
) -> None:
    module = DPOModule(trained.base, trained.adapter, pairs=PairPolicy(target="expected"), max_new_tokens=24)
    candidates = CandidateSettings(answers="own", wrong_answer=wrong_answer)
    queries = data_of(trained.base.name_or_path, trained.records, candidates)
    step = OwnStep(module, queries, monkeypatch, n=4)
    step.write({1: "Confidence: 50%"})  # an answer that does not count, in the midst of the packed images

    _, comparison = step.compare()
    decode = queries.processor.tokenizer.decode
    rows = (0, 2, 3)
    for row in rows:
        first = comparison.candidates[row][0]
        assert decode(first.tokens[: first.answer_length]).strip() == render_answer(step.answer(row))
    policy, reference = ([step.stated(row, of, wrong_answer) for row in rows] for of in (False, True))
    targets = [
        step.ask(row, lambda alone, row=row: alone.expected(step.answer(row), step.levels)) for row in rows
    ]
    assert np.array(comparison.targets)[list(rows)] == pytest.approx(targets, abs=1e-3)
    for loss in (SoftLabel(width=0.2, opposite_weight=0.5), RLCR(), DPO(beta=0.4)):
        module.loss = loss
        expected = np.mean(
            [loss_by_hand(loss, *of_row) for of_row in zip(policy, reference, targets, strict=True)]
        )
        assert float(step.step()) == pytest.approx(expected, abs=2e-3), loss
