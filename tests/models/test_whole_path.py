"""Every family end to end: SFT, DPO from the SFT adapter, answer, save, and load with transformers and peft; and stage 2 on own answers.

Each family has a real processor and a tiny random model, in full precision; one also with a quantised language model
(`test_shipped_training.py` trains others).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from vlm_calibration.data.candidates import CandidateSettings
from vlm_calibration.estimators.answer_scoring import AnswerTokenizer
from vlm_calibration.estimators.base import AnsweredBatch
from vlm_calibration.losses.distribution import RLCR, SoftLabel
from vlm_calibration.losses.preference import DPO
from vlm_calibration.losses.sequence import token_log_likelihood
from vlm_calibration.models.adapters import using_adapter
from vlm_calibration.models.forward import labelled_logits, unwrap_peft
from vlm_calibration.models.shared_prefix import Prompts, Scoring, score_responses, why_not_shared
from vlm_calibration.stages.dpo import DPOModule
from vlm_calibration.stages.preference_targets import PairPolicy
from vlm_calibration.text.confidence import render_answer

from ..stages.own import OwnStep, loss_by_hand
from .families import FOUR
from .processors import FAMILIES, cached_family
from .runs import Run, data_of, run_through, write_records

pytestmark = pytest.mark.slow

EVERY_TIME = [(name, "none") for name in (*FOUR, "paligemma2")]
CASES = [
    *EVERY_TIME,
    *((name, "none") for name in FAMILIES if name not in dict(EVERY_TIME)),
    *(("qwen2_5_vl", quantization) for quantization in ("nf4", "int8")),
]
"""The others are nightly: each differs little from one that is run every time."""


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_records(tmp_path_factory.mktemp("records"))


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(case, id="-".join(case), marks=[] if case in EVERY_TIME else pytest.mark.nightly)
        for case in CASES
    ],
)
def run(request: pytest.FixtureRequest, records: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    name, quantization = request.param
    return run_through(cached_family(name), quantization, records, tmp_path_factory.mktemp(name))


def _lora(parameters: Iterable[str], adapter: str = "default") -> set[str]:
    return {n for n in parameters if ".lora_" in n and f".{adapter}." in n}


def test_sft_learns(run: Run) -> None:
    watch = run.watched["sft"]
    assert watch.losses[-1] < 0.6 * watch.losses[0]
    trained = _lora(watch.before)
    assert set(watch.gradients) == {n for n, p in run.sft.named_parameters() if p.requires_grad} == trained
    assert len(trained) == 2 * 2 * 7, "A and B in seven linear layers of each of two layers"
    for name, gradient in watch.gradients.items():
        assert gradient.isfinite().all(), name
        assert (gradient.abs().max() > 0) == ("lora_B" in name), name  # while B is zero
    for name, parameter in run.sft.named_parameters():
        assert torch.equal(parameter, watch.before[name]) == (name not in trained), name


def test_dpo_goes_on_from_the_sft_adapter(run: Run) -> None:
    watch = run.watched["dpo"]
    assert watch.losses[0] == pytest.approx(math.log(2), abs=1e-5), "policy and reference are equal at first"
    assert watch.losses[1] < watch.losses[0]
    trained, reference = _lora(watch.before), _lora(watch.before, "reference")
    assert set(watch.gradients) == trained
    sft = dict(run.sft.named_parameters())
    for name in trained:
        assert torch.equal(watch.before[name], sft[name])
        assert watch.gradients[name].isfinite().all(), name
        assert watch.gradients[name].abs().max() > 0, name
    assert {n.replace(".reference.", ".default.") for n in reference} == trained
    for name, parameter in run.dpo.named_parameters():
        assert torch.equal(parameter, watch.before[name]) == (name not in trained), name


@pytest.mark.parametrize("scoring", ["shared", "plain"])
def test_both_stages_find_a_response_as_likely(run: Run, scoring: Scoring) -> None:
    """SFT by the whole conversation, DPO by a prompt with candidates behind it."""
    batch, pairs = run.batch("sft"), run.batch("candidates")
    with torch.no_grad():
        labelled = labelled_logits(run.dpo.model, batch.inputs, batch.labels)
        tokens = [[c.tokens for c in row] for row in pairs.candidates]
        prompts = Prompts(pairs.inputs, pairs.lengths)
        scores = score_responses(run.dpo.model, prompts, tokens, scoring)
    likelihood = token_log_likelihood(labelled.logits, labelled.targets)
    for row, candidates in enumerate(pairs.candidates):
        k = [c.confidence for c in candidates].index(0.5)
        expected = likelihood[labelled.rows == row]
        assert torch.allclose(scores.log_likelihood[row, k, : len(expected)], expected, atol=run.tolerance)
    assert why_not_shared(run.dpo.model, 1000) is None


def test_the_model_answers_as_it_learnt(run: Run) -> None:
    tokenizer = AnswerTokenizer(run.data.chat)
    predictions = AnsweredBatch.generate(run.dpo.model, run.batch("prompts"), tokenizer, 16).predictions
    assert [p.id for p in predictions] == ["q0", "q1", "q2", "q3"]
    assert [p.noise_step for p in predictions] == [500] * 4
    for number, answer in ((0, "Yes"), (2, "No")):
        assert predictions[number].text == f"{answer}. Confidence: 50%", "generation stops at the end"
        assert predictions[number].correct
        assert predictions[number].confidence == 0.5


def test_generation_finds_tokens_as_likely_as_training(run: Run) -> None:
    """One continues an answer token by token from a cache, the other reads prompt and answer in one pass."""
    prompts, pairs = run.batch("prompts"), run.batch("candidates")
    output = run.dpo.model.generate(
        **prompts.inputs,
        do_sample=False,
        max_new_tokens=6,
        min_new_tokens=6,
        output_logits=True,
        return_dict_in_generate=True,
    )
    answers = output.sequences[:, prompts.inputs["input_ids"].shape[1] :]
    generated = torch.stack(output.logits, dim=1).log_softmax(-1).gather(-1, answers[..., None])[..., 0]
    with torch.no_grad():
        prefix = Prompts(pairs.inputs, pairs.lengths)
        scores = score_responses(run.dpo.model, prefix, [[a] for a in answers.tolist()])
    assert torch.allclose(scores.log_likelihood[:, 0], generated, atol=run.tolerance)


def test_a_step_on_own_answers_equals_that_of_each_query_and_each_response_alone(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = DPOModule(run.base, run.adapters["sft"], pairs=PairPolicy(target="expected"), max_new_tokens=24)
    wrong_answer = run.family.name != "llava_clip"
    candidates = CandidateSettings(answers="own", wrong_answer=wrong_answer)
    step = OwnStep(module, data_of(run.base.name_or_path, run.records, candidates), monkeypatch, n=4)
    step.write({1: "Confidence: 50%"})  # an answer that does not count, in the midst of the packed images

    _, comparison = step.compare()
    rows = (0, 2, 3)
    for row in rows:
        first = comparison.candidates[row][0]
        text = run.data.processor.tokenizer.decode(first.tokens[: first.answer_length])
        assert text.strip() == render_answer(step.answer(row))
    policy, reference = ([step.stated(row, of, wrong_answer) for row in rows] for of in (False, True))
    targets = [
        step.ask(row, lambda alone, row=row: alone.expected(step.answer(row), step.levels)) for row in rows
    ]
    assert np.array(comparison.targets)[list(rows)] == pytest.approx(targets, abs=1e-3)
    for loss in (SoftLabel(width=0.2, opposite_weight=0.5), RLCR(), DPO(beta=0.4)):
        module.loss = loss
        alone = zip(policy, reference, targets, strict=True)
        expected = np.mean([loss_by_hand(loss, *of_row) for of_row in alone])
        # int8 looks for outliers among the activations of a whole batch.
        tolerance = 0.1 if run.base.quantization == "int8" else 2e-3
        assert float(step.step()) == pytest.approx(expected, abs=tolerance), loss


def test_transformers_and_peft_alone_give_the_same_logits(run: Run) -> None:
    """That they need nothing of this package is tested by the card's program in `callbacks/test_adapter.py`."""
    settings = getattr(unwrap_peft(run.dpo.model).config, "quantization_config", None)
    quantized = settings and BitsAndBytesConfig.from_dict(settings.to_dict())
    base = AutoModelForImageTextToText.from_pretrained(
        run.base.name_or_path, dtype=torch.float32, quantization_config=quantized
    )
    for module in base.modules():  # bitsandbytes computes in bfloat16 on some CPUs unless told not to
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    plain = PeftModel.from_pretrained(base, run.adapters["sft"], adapter_name="sft").eval()
    plain.load_adapter(run.adapters["dpo"], adapter_name="dpo")
    inputs, logits, ours = run.batch("prompts").inputs, {}, {}
    with torch.no_grad():
        for name, adapter in (("sft", "reference"), ("dpo", "default"), ("base", None)):
            with using_adapter(run.dpo.model, adapter):
                ours[name] = run.dpo.model(**inputs).logits[:, -1]
        for name in run.adapters:
            plain.set_adapter(name)
            logits[name] = plain(**inputs).logits[:, -1]
    for name in logits:
        assert torch.allclose(logits[name], ours[name], atol=1e-4)
        assert not torch.allclose(logits[name], ours["base"], atol=0.5)
    assert not torch.allclose(ours["sft"], ours["dpo"], atol=1e-2)
