"""Every family end to end: SFT, DPO from the SFT adapter, answer, save, and load with transformers and peft; and stage 2 on own answers.

Each family has a real processor and a tiny random model, in full precision; one also with a quantised language model, and two are
trained with the shipped presets: nf4, bfloat16 and gradient checkpointing together. They train on four records with images of
different sizes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from vlm_calibration.data.candidates import CandidateSettings
from vlm_calibration.data.collate import PromptCollator, SFTCollator
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.data.noise import NoisePolicy
from vlm_calibration.data.sources.jsonl import JsonlSource
from vlm_calibration.estimators.answer_scoring import AnswerTokenizer
from vlm_calibration.estimators.base import AnsweredBatch
from vlm_calibration.losses.distribution import RLCR, SoftLabel
from vlm_calibration.losses.preference import DPO
from vlm_calibration.losses.sequence import token_log_likelihood
from vlm_calibration.models.adapters import LoraSettings, using_adapter
from vlm_calibration.models.base import BaseModel
from vlm_calibration.models.forward import labelled_logits, unwrap_peft
from vlm_calibration.models.generation import generate
from vlm_calibration.models.shared_prefix import Prompts, Scoring, score_responses, why_not_shared
from vlm_calibration.stages.dpo import DPOModule
from vlm_calibration.stages.preference_targets import PairPolicy
from vlm_calibration.stages.sft import SFTModule
from vlm_calibration.stages.training import OptimizerSettings
from vlm_calibration.text.confidence import render_answer

from ..level_tables import OnlyAt
from ..stages.own import OwnStep, loss_by_hand
from ..trainers import plain_trainer
from .families import FOUR, randomize_adapters
from .processors import FAMILIES, SIZES, Family, cached_family

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).parents[2] / "configs" / "model"
EVERY_TIME = [(name, "none") for name in (*FOUR, "paligemma2")]
CASES = [
    *EVERY_TIME,
    *((name, "none") for name in FAMILIES if name not in dict(EVERY_TIME)),
    *(("qwen2_5_vl", quantization) for quantization in ("nf4", "int8")),
]
"""The others are nightly: each differs little from one that is run every time."""
NOISE = NoisePolicy(levels=OnlyAt(n_levels=3, drawn=(0.5,)), distractor_probability=0.0)
"""Every sample has half of the noise, so every response states 50%."""
LORA = LoraSettings(r=4, alpha=16, dropout=0.0)


def write_records(folder: Path) -> str:
    """Write four records with different images, questions and answers; return the path of their JSONL file."""
    rng = np.random.default_rng(0)
    texts = (
        ("A dog?", "Yes", "yes_no"),
        ("What is at the very top left?", "umbrella", "short"),
        ("Do you see a cup?", "No", "yes_no"),
        ("Say in a few words what this is.", "a cat, or two", "open"),
    )
    keys = ("id", "image", "question", "answer", "answer_type", "regions")
    lines = []
    for i, (text, (height, width)) in enumerate(zip(texts, SIZES, strict=True)):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        region = {"label": "it", "box": [2, 2, width - 2, height - 2]}
        lines.append(json.dumps(dict(zip(keys, (f"q{i}", f"{i}.png", *text, [region]), strict=True))))
    path = folder / "queries.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


class Watch(L.Callback):
    """Records the loss of every step, the first gradients, and all parameters before training."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.before: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.before = {n: p.detach().clone() for n, p in pl_module.named_parameters()}

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.gradients:
            named = pl_module.named_parameters()
            self.gradients = {n: p.grad.clone() for n, p in named if p.grad is not None}

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))


def data_of(
    folder: str, records: str, candidates: CandidateSettings | None = None
) -> PerturbedQueryDataModule:
    """A data module with all records in one batch, noised at the resolution of the model."""
    source = JsonlSource(records)
    return PerturbedQueryDataModule(
        folder, train=source, noise=NOISE, candidates=candidates, batch_size=len(SIZES), workers=0
    )


def fit(
    module: L.LightningModule, data: PerturbedQueryDataModule, steps: int, precision: str = "32-true"
) -> Watch:
    """Train for a number of steps."""
    watch = Watch()
    plain_trainer(Path(), watch, max_steps=steps, precision=precision).fit(module, datamodule=data)
    return watch


@dataclass
class Run:
    """A family's run through both stages.

    Attributes:
        family: the model family.
        base: the base model.
        records: path of the records.
        data: the data of stage 2.
        sft, dpo: the modules of the stages, after training.
        watched: stage -> its recorded training.
        adapters: stage -> folder of its adapter.
    """

    family: Family
    base: BaseModel
    records: str
    data: PerturbedQueryDataModule
    sft: SFTModule
    dpo: DPOModule
    watched: dict[str, Watch]
    adapters: dict[str, str]

    @property
    def tolerance(self) -> float:
        """Tolerance between log-likelihoods that are computed in two ways.

        Which features LLM.int8() treats as outliers depends on the rest of the batch.
        """
        return 0.05 if self.base.quantization == "int8" else 1e-4

    def batch(self, kind: Literal["sft", "candidates", "prompts"]) -> Any:
        """The records, collated for SFT, preference optimisation or generation."""
        collators = {
            "sft": SFTCollator(self.data.chat, self.data.max_length),
            "candidates": self.data.candidate_collator,
            "prompts": PromptCollator(self.data.chat),
        }
        dataset = self.data.train_dataloader().dataset
        return collators[kind]([dataset[0, i] for i in range(len(SIZES))])  # type: ignore[operator]


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
    """SFT, then DPO from its adapter; both adapters are saved."""
    name, quantization = request.param
    family, folder = cached_family(name), tmp_path_factory.mktemp(name)
    base = BaseModel(family.save(folder / "base"), dtype="float32", quantization=quantization)
    watched, adapters = {}, {stage: str(folder / stage) for stage in ("sft", "dpo")}
    torch.manual_seed(0)
    sft = SFTModule(base, LORA, OptimizerSettings(lr=2e-2, warmup_fraction=0.0))
    watched["sft"] = fit(sft, data_of(base.name_or_path, records), 28)
    sft.model.save_pretrained(adapters["sft"])
    data = data_of(base.name_or_path, records, CandidateSettings())
    dpo = DPOModule(
        base,
        adapters["sft"],
        pairs=PairPolicy(target="level"),
        optimizer=OptimizerSettings(lr=1e-3, warmup_fraction=0.0),
    )
    watched["dpo"] = fit(dpo, data, 2)
    dpo.model.save_pretrained(adapters["dpo"], selected_adapters=["default"])
    dpo.model.eval()
    return Run(family, base, records, data, sft, dpo, watched, adapters)


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


# --- Shipped presets ---


@pytest.mark.parametrize("name", ["qwen2_5_vl", pytest.param("gemma3", marks=pytest.mark.nightly)])
def test_shared_and_plain_scores_train_alike(name: str, tmp_path: Path) -> None:
    """Losses agree within 1%, gradients within 5% of their norm; the rest is rounding in bfloat16."""
    qlora, preset = (
        yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) for name in ("qlora", "qwen2_5_vl_7b")
    )
    settings, precision = qlora["model"]["init_args"]["base"], preset["trainer"]["precision"]
    checkpointing = preset["model"]["init_args"]["gradient_checkpointing"]
    expected = {"quantization": "nf4", "dtype": "bfloat16"}
    assert (settings, precision, checkpointing) == (expected, "bf16-mixed", True)
    family, records = cached_family(name), write_records(tmp_path)
    base = BaseModel(family.save(tmp_path / "base"), **settings)
    torch.manual_seed(0)
    sft = SFTModule(
        base, LORA, OptimizerSettings(lr=1e-2, warmup_fraction=0.0), gradient_checkpointing=checkpointing
    )
    runs = {"sft": (sft, fit(sft, data_of(base.name_or_path, records), 6, precision))}
    sft.model.save_pretrained(tmp_path / "adapter")
    for scoring in ("shared", "plain"):
        dpo = DPOModule(
            base,
            str(tmp_path / "adapter"),
            pairs=PairPolicy(target="level"),
            optimizer=OptimizerSettings(lr=1e-3, warmup_fraction=0.0),
            nll_weight=1.0,  # without it the first loss is log 2 for any scores
            scoring=scoring,  # type: ignore[arg-type]
            gradient_checkpointing=checkpointing,
        )
        data = data_of(base.name_or_path, records, CandidateSettings())
        runs[scoring] = dpo, fit(dpo, data, 3, precision)  # type: ignore[assignment]

    for module, watch in runs.values():
        model = unwrap_peft(module.model)
        layers = [m for m in model.get_decoder().modules() if isinstance(m, Linear4bit)]
        assert len(layers) == len([m for m in model.modules() if isinstance(m, Linear4bit)]) == 2 * 7
        assert {(m.compute_dtype, m.weight.quant_type) for m in layers} == {(torch.bfloat16, "nf4")}
        assert model.is_gradient_checkpointing
        assert all(math.isfinite(loss) for loss in watch.losses)
        assert watch.losses[-1] < watch.losses[0]
        assert len(watch.gradients) == 2 * 2 * 7
        assert all(gradient.isfinite().all() for gradient in watch.gradients.values())
        moved = {n for n, p in module.named_parameters() if not torch.equal(p, watch.before[n])}
        assert moved == set(watch.gradients), "only the adapter"
    shared, plain = runs["shared"][1], runs["plain"][1]
    assert shared.losses == pytest.approx(plain.losses, rel=0.01)
    differences = [shared.gradients[n] - g for n, g in plain.gradients.items()]
    difference, norm = (
        math.sqrt(sum(float(g.square().sum()) for g in gradients))
        for gradients in (differences, plain.gradients.values())
    )
    assert difference < 0.05 * norm


def test_gradients_are_as_before_after_a_pass_in_eval_mode(tmp_path: Path) -> None:
    """As in validation between steps; on some CPUs bitsandbytes would repack weights in eval mode."""
    base = BaseModel(cached_family("qwen2_5_vl").save(tmp_path / "base"), "float32", "nf4")
    data, module = data_of(base.name_or_path, write_records(tmp_path)), SFTModule(base, LORA)
    fit(module, data, 1)
    dataset = data.train_dataloader().dataset
    samples = [dataset[0, i] for i in range(4)]
    batch, prompts = SFTCollator(data.chat, data.max_length)(samples), PromptCollator(data.chat)(samples)
    randomize_adapters(module.model)
    gradients = []
    for _ in range(2):
        module.model.train()
        module.zero_grad(set_to_none=True)
        labelled = labelled_logits(module.model, batch.inputs, batch.labels)
        (-token_log_likelihood(labelled.logits, labelled.targets).mean()).backward()
        gradients.append({n: p.grad for n, p in module.named_parameters() if p.grad is not None})
        module.model.eval()
        generate(module.model, prompts.inputs, data.processor.tokenizer, 2)
    before, after = gradients
    assert any(g.abs().max() > 0 for g in before.values())
    for name, gradient in before.items():
        assert torch.allclose(after[name], gradient, atol=1e-5 * float(gradient.abs().max()), rtol=0), name
