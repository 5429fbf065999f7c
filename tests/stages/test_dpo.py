"""The preference stage on the demo model: what is compared, what the loss is, what training changes, logs and writes.

Likelihoods are checked against plain forwards over whole conversations, one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from vlm_calibration.callbacks.adapter import AdapterWriter
from vlm_calibration.callbacks.before_after import BeforeAfterCheck
from vlm_calibration.callbacks.checkpoint import RunCheckpoint
from vlm_calibration.data.collate import IGNORE, ChatFormat, SFTCollator
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.data.noise import NoisePolicy, Sample
from vlm_calibration.data.pairs import (
    Candidate,
    IsotonicMap,
    PairBatch,
    PairPolicy,
    fit_isotonic_map,
)
from vlm_calibration.demo.architecture import CHAT_TEMPLATE
from vlm_calibration.demo.source import DemoSource
from vlm_calibration.losses.preference import DPO, Hinge, Listwise, SimPO
from vlm_calibration.models.adapters import LoraSettings, attach_lora, load_adapters, using_adapter
from vlm_calibration.models.generation import generate_texts
from vlm_calibration.models.loading import BaseModel, load_base
from vlm_calibration.models.shared_prefix import ResponseScores
from vlm_calibration.perturbation.levels import LinearLevels
from vlm_calibration.records import DataError, Query
from vlm_calibration.stages import dpo, recalibration
from vlm_calibration.stages.answering import graded_prediction
from vlm_calibration.stages.dpo import DPOModule
from vlm_calibration.stages.level_distribution import LevelDistribution, divergence
from vlm_calibration.stages.optimization import OptimizerSettings
from vlm_calibration.stages.sft import SFTModule
from vlm_calibration.stages.training import trained_parameters
from vlm_calibration.text.confidence import render_response, strip_confidence
from vlm_calibration.text.grading import grade

Data = Callable[..., PerturbedQueryDataModule]
LEVELS = (1.0, 0.75, 0.5, 0.25, 0.0)
NOISE = NoisePolicy(levels=LinearLevels(n_levels=5), distractor_probability=0.0, wrong_answer_rate=1.0)
"""Five levels, and wrong responses among the right ones."""
EXPECTED = PairPolicy(target="expected")
ALL_PARTS = ["language", "tower", "projector"]
STAGE_1_LR, STAGE_1_STEPS = 5e-3, 25


@pytest.fixture(scope="session")
def demo_folder(root: Path) -> str:
    """The demo model as shipped, which answers questions about the scenes."""
    return str(root / "src" / "vlm_calibration" / "demo" / "model")


@pytest.fixture(scope="session")
def demo_adapter(tmp_path_factory: pytest.TempPathFactory, demo_folder: str) -> Callable[..., str]:
    """Writes an adapter for the demo model with small random weights, so that it still answers; returns its folder."""

    def write(**settings: Any) -> str:
        folder = tmp_path_factory.mktemp("adapter")
        plain = {"r": 4, "alpha": 8, "dropout": 0.0}
        model = attach_lora(
            load_base(BaseModel(demo_folder, dtype="float32")), LoraSettings(**{**plain, **settings})
        )
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
        model.save_pretrained(folder)
        return str(folder)

    return write


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory, demo_folder: str) -> str:
    """A short first stage: the demo model goes on answering, and spreads its confidence over the levels."""
    L.seed_everything(0)
    sft = SFTModule(
        BaseModel(demo_folder, dtype="float32"),
        LoraSettings(r=4, alpha=8, dropout=0.0),
        OptimizerSettings(lr=STAGE_1_LR),
    )
    queries = PerturbedQueryDataModule(
        demo_folder, train=DemoSource("train", scenes=100), noise=NOISE, batch_size=12, workers=0
    )
    folder = tmp_path_factory.mktemp("stage-1")
    L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        max_steps=STAGE_1_STEPS,
    ).fit(sft, datamodule=queries)
    sft.model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def module(demo_folder: str, adapter: str) -> Callable[..., DPOModule]:
    def make(folder: str | None = adapter, **settings: Any) -> DPOModule:
        plain = {"max_new_tokens": 8, "optimizer": OptimizerSettings(lr=3e-3)}
        return DPOModule(BaseModel(demo_folder, dtype="float32"), folder, **{**plain, **settings})

    return make


@pytest.fixture
def pairs(data: Data) -> Data:
    """As `data`, for pairs."""

    def make(pairs: PairPolicy | None = EXPECTED, **settings: Any) -> Any:
        return data(**{"noise": NOISE, "pairs": pairs, **settings})

    return make


class Observed:
    """A module outside a Trainer, on the first samples of its data, with what it logs.

    The policy is moved away from the reference, so that the two differ.
    """

    def __init__(
        self,
        module: DPOModule,
        queries: PerturbedQueryDataModule,
        monkeypatch: pytest.MonkeyPatch,
        n: int = 4,
    ) -> None:
        self.module = module
        self.logged: dict[str, float] = {}
        module.configure_model()
        module.trainer = SimpleNamespace(datamodule=queries)  # type: ignore[assignment]
        monkeypatch.setattr(module, "log", lambda name, value, **_: self.logged.update({name: float(value)}))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in trained_parameters(module):
                parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
        queries.setup("fit")
        dataset = queries.train_dataloader().dataset
        self.samples: list[Sample] = [dataset[0, i] for i in range(n)]
        self.chat: ChatFormat = queries.chat
        collator = queries.pair_collator
        assert collator is not None
        self.batch: PairBatch = collator(self.samples)

    def step(self, batch: PairBatch | None = None) -> Tensor:
        return self.module.training_step(self.batch if batch is None else batch, 0)

    def chosen(self) -> list[list[Candidate]]:
        with torch.no_grad():
            return [list(row) for row in self.module.compared(self.batch)[0]]

    def by_token(self, row: int, candidate: Candidate, reference: bool = False) -> list[float]:
        """log p of a candidate's tokens, by a plain forward over the whole conversation."""
        sample, model = self.samples[row], self.module.model
        answer = sample.answer
        if candidate.wrong:
            said = self.chat.processor.tokenizer.decode(candidate.tokens[: candidate.answer_length])
            answer = said.strip().rstrip(".")
            assert answer in sample.wrong
        stated = sample._replace(confidence=candidate.confidence, wrong_answer=answer)
        batch = SFTCollator(self.chat, 10_000)([stated])
        labels, is_stated = batch.labels[0], batch.confidence_mask[0]
        name = ("reference" if self.module.reference == "adapter" else None) if reference else "default"
        with torch.no_grad(), using_adapter(model, name):
            log_p = torch.log_softmax(model(**batch.inputs).logits[0].double(), -1)
        places = (labels != IGNORE).nonzero()[:, 0]
        assert int((~is_stated[places]).sum()) == candidate.answer_length
        return log_p[places - 1, labels[places]].tolist()

    def plain(self, row: int, candidate: Candidate, reference: bool = False) -> tuple[float, float, int]:
        """log p of a candidate and of its answer alone, and its length."""
        values = self.by_token(row, candidate, reference)
        return sum(values), sum(values[: candidate.answer_length]), len(values)

    def expected(self, row: int, reference: bool = True) -> float:
        """The mean of the levels under a softmax over the plain log-likelihoods of all of them."""
        levels = [c for c in self.batch.candidates[row] if not c.wrong]
        log_p = np.array([self.plain(row, c, reference)[0] for c in levels])
        p = np.exp(log_p - log_p.max())
        return float((p / p.sum()) @ [c.confidence for c in levels])


def _nearest(confidence: float) -> float:
    return min(LEVELS, key=lambda c: abs(c - confidence))


# --- What is compared --------------------------------------------------------------------------------------------


def test_the_level_of_the_noise_is_chosen(
    module: Callable[..., DPOModule], pairs: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    observed = Observed(module(), pairs(PairPolicy(target="level")), monkeypatch, 9)
    for row, sample in zip(observed.chosen(), observed.samples, strict=True):
        assert row[0].confidence == sample.confidence
        assert {c.confidence for c in row[1:]} == set(LEVELS) - {sample.confidence}
    assert len({s.confidence for s in observed.samples}) > 2


@pytest.mark.parametrize("reference", ["adapter", "base"])
def test_the_expected_level_is_that_of_plain_forwards(
    module: Callable[..., DPOModule], pairs: Data, monkeypatch: pytest.MonkeyPatch, reference: str
) -> None:
    observed = Observed(module(reference=reference), pairs(), monkeypatch)
    expected = [observed.expected(row) for row in range(4)]
    assert [row[0].confidence for row in observed.chosen()] == [_nearest(e) for e in expected]
    found = observed.module.score_reference(observed.batch, observed.batch.candidates)
    belief = LevelDistribution(found.total, observed.batch.candidates)
    assert [belief.expected(row) for row in range(4)] == pytest.approx(expected, abs=1e-4)
    policy = [observed.expected(row, reference=False) for row in range(4)]
    assert max(abs(a - b) for a, b in zip(policy, expected, strict=True)) > 0.01, "it is the reference's"


def test_a_grid_lets_the_expected_confidence_be_stated_more_finely(
    module: Callable[..., DPOModule], pairs: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    observed = Observed(module(), pairs(PairPolicy(target="expected", grid=5)), monkeypatch, 6)
    finer = [percent / 100 for percent in range(0, 101, 5)]
    expected = [observed.expected(row) for row in range(6)]
    chosen = observed.chosen()
    assert [row[0].confidence for row in chosen] == [min(finer, key=lambda c: abs(c - e)) for e in expected]
    assert {row[0].confidence for row in chosen} - set(LEVELS)
    assert all(sorted(c.confidence for c in row) == finer for row in chosen)


def test_the_recalibrated_level_is_the_map_of_the_expected_one(
    module: Callable[..., DPOModule], pairs: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    observed = Observed(module(), pairs(PairPolicy(target="recalibrated")), monkeypatch, 6)
    observed.module.recalibration = IsotonicMap({"yes_no": ([0.0, 1.0], [0.1, 0.3])})
    for row, (picks, sample) in enumerate(zip(observed.chosen(), observed.samples, strict=True)):
        expected = observed.expected(row)
        if sample.query.answer_type == "yes_no":
            assert picks[0].confidence == _nearest(0.1 + 0.2 * expected) == 0.25
        else:
            assert picks[0].confidence == _nearest(expected)


def test_what_the_reference_would_state_is_rejected(
    module: Callable[..., DPOModule], pairs: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = PairPolicy(target="level", rejected="far", on_policy=True)
    observed = Observed(module(), pairs(policy), monkeypatch, 9)
    differs = 0
    for row, picks in enumerate(observed.chosen()):
        levels = observed.batch.candidates[row]
        own = max(levels, key=lambda c: observed.plain(row, c, reference=True)[0])
        assert picks[0].confidence == observed.samples[row].confidence
        assert len(picks) == 2
        if own != picks[0]:
            assert picks[1] == own
            differs += 1
    assert differs > 2


@pytest.mark.parametrize("target", ["level", "expected"])
def test_the_references_likelihoods_belong_to_the_candidates(
    module: Callable[..., DPOModule], pairs: Data, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    policy = PairPolicy(target=target, rejected="uniform", n_rejected=2, wrong_answer=True)  # type: ignore[arg-type]
    observed = Observed(module(), pairs(policy), monkeypatch, 9)
    with torch.no_grad():
        chosen, reference = observed.module.compared(observed.batch)
    assert reference is not None
    assert {len(row) for row in chosen} == {3, 4}, "beside a mistake there is no wrong answer"
    assert [len(row) == 4 for row in chosen] == list(observed.batch.is_correct)
    for row, candidates in enumerate(chosen):
        plain = [observed.plain(row, c, reference=True)[0] for c in candidates]
        assert reference.total[row, : len(candidates)].tolist() == pytest.approx(plain, abs=1e-3)


@pytest.mark.parametrize("settings", [{"loss": SimPO(), "reference": "none"}, {"loss": SimPO()}])
def test_a_reference_that_is_not_needed_is_not_asked(
    module: Callable[..., DPOModule], pairs: Data, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    observed = Observed(module(**settings), pairs(PairPolicy(target="level")), monkeypatch)

    def asked(*_: Any) -> Tensor:
        raise AssertionError("asked")

    monkeypatch.setattr(observed.module, "score_reference", asked)
    assert observed.module.compared(observed.batch)[1] is None
    assert observed.step().isfinite()
    held = set(observed.module.model.peft_config)
    assert held == ({"default"} if "reference" in settings else {"default", "reference"})


@pytest.mark.parametrize("reference", ["adapter", "base"])
def test_the_reference_is_the_same_while_the_policy_is_trained(
    module: Callable[..., DPOModule],
    demo_adapter: Callable[..., str],
    pairs: Data,
    monkeypatch: pytest.MonkeyPatch,
    reference: str,
) -> None:
    observed = Observed(module(demo_adapter(dropout=0.3), reference=reference), pairs(), monkeypatch)
    scores = observed.module.score_reference
    assert observed.module.model.training
    first, again = (scores(observed.batch, observed.batch.candidates).total for _ in range(2))
    assert observed.module.model.training
    assert torch.equal(first, again), "no dropout in what is frozen"
    observed.module.eval()
    assert torch.allclose(first, scores(observed.batch, observed.batch.candidates).total, atol=1e-4)


# --- The loss ----------------------------------------------------------------------------------------------------


def test_loss_and_statistics_by_hand(
    module: Callable[..., DPOModule], pairs: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    beta = 0.4
    policy = PairPolicy(target="level", wrong_answer=True)
    observed = Observed(module(loss=DPO(beta=beta)), pairs(policy), monkeypatch, 5)
    loss = float(observed.step())
    terms: dict[str, list[float]] = {
        name: [] for name in ("loss", "reward_margin", "reward_accuracy", "logp_chosen", "logp_rejected")
    }
    answers = []
    for row, candidates in enumerate(observed.chosen()):
        policy_p, answer_p, _ = zip(*(observed.plain(row, c) for c in candidates), strict=True)
        reference_p = [observed.plain(row, c, reference=True)[0] for c in candidates]
        rewards = beta * (np.array(policy_p) - np.array(reference_p))
        margin = rewards[0] - rewards[1:]
        terms["loss"].append(np.log1p(np.exp(-margin)).mean())
        terms["reward_margin"].append(margin.mean())
        terms["reward_accuracy"].append((margin > 0).mean())
        terms["logp_chosen"].append(policy_p[0])
        terms["logp_rejected"].append(np.mean(policy_p[1:]))
        if observed.samples[row].wrong_answer is None:
            answers.append(answer_p[0])
    wanted = {f"train/{name}": float(np.mean(values)) for name, values in terms.items()}
    wanted |= {"train/logp_answer": float(np.mean(answers)), "train/skipped": 0.0}
    assert 0 < len(answers) < 5
    assert observed.logged == pytest.approx(wanted, abs=2e-3)
    assert loss == pytest.approx(wanted["train/loss"], abs=1e-4)
    assert abs(loss - math.log(2)) > 0.01


def test_at_the_start_the_policy_is_the_reference(
    module: Callable[..., DPOModule], pairs: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = module(loss=DPO(beta=1.0))
    observed = Observed(made, pairs(), monkeypatch)
    held = dict(made.named_parameters())
    with torch.no_grad():
        for name, parameter in held.items():
            if ".default." in name:
                parameter.copy_(held[name.replace(".default.", ".reference.")])
    assert float(observed.step()) == pytest.approx(math.log(2), abs=1e-4)
    assert observed.logged["train/reward_margin"] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(
    ("settings", "constant", "confidence_weight"),
    [({}, False, 1.0), ({"answer_weight": "constant", "confidence_weight": 2.5}, True, 2.5)],
)
def test_tokens_of_chosen_responses_weigh_as_stated(
    module: Callable[..., DPOModule],
    pairs: Data,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    constant: bool,
    confidence_weight: float,
) -> None:
    losses = {}
    for weight in (0.0, 0.7):
        with monkeypatch.context() as patch:
            made = module(nll_weight=weight, **settings)
            observed = Observed(made, pairs(PairPolicy(target="level")), patch, 9)
            losses[weight] = float(observed.step())
    nll, weights = [], []
    for row, [first, *_] in enumerate(observed.chosen()):
        log_p, answer_p, length = observed.plain(row, first)
        sample = observed.samples[row]
        weight = (1.0 if constant else sample.confidence) * (sample.wrong_answer is None)
        weights.append(weight)
        nll.append(-(weight * answer_p + confidence_weight * (log_p - answer_p)) / length)
    assert 0 < sum(weight > 0 for weight in weights) < 9, "wrong answers are not taught"
    assert losses[0.7] - losses[0.0] == pytest.approx(0.7 * np.mean(nll), abs=1e-3)


@pytest.mark.parametrize("loss", [DPO(), SimPO()], ids=repr)
@pytest.mark.parametrize(
    "policy",
    [
        EXPECTED,
        PairPolicy(target="expected", rejected="far", n_rejected=2),
        PairPolicy(target="level", wrong_answer=True),
    ],
    ids=repr,
)
def test_what_responses_share_is_held_where_the_reference_has_it(
    module: Callable[..., DPOModule],
    pairs: Data,
    monkeypatch: pytest.MonkeyPatch,
    loss: Any,
    policy: PairPolicy,
) -> None:
    losses = {}
    for weight in (0.0, 0.7):
        with monkeypatch.context() as patch:
            observed = Observed(module(loss=loss, drift_weight=weight), pairs(policy), patch, 6)
            losses[weight] = float(observed.step())
    anchors = []
    for row, candidates in enumerate(observed.chosen()):
        now, before = (
            [observed.by_token(row, c, reference) for c in candidates] for reference in (False, True)
        )
        answer = candidates[0].answer_length
        # "%" and the end of the turn
        endings = [(sum(n[-2:]) - sum(b[-2:])) ** 2 for n, b in zip(now, before, strict=True)]
        anchors.append((sum(now[0][:answer]) - sum(before[0][:answer])) ** 2 + np.mean(endings))
    assert max(anchors) > 0.01
    assert losses[0.7] - losses[0.0] == pytest.approx(0.7 * np.mean(anchors), abs=1e-3)


@pytest.mark.parametrize("loss", [DPO(), Listwise(beta=0.5)], ids=repr)
def test_a_shared_prefix_changes_neither_loss_nor_gradient(
    module: Callable[..., DPOModule], pairs: Data, monkeypatch: pytest.MonkeyPatch, loss: Any
) -> None:
    policy = PairPolicy(target="expected", wrong_answer=True)
    found = []
    for scoring in ("plain", "shared"):
        with monkeypatch.context() as patch:
            observed = Observed(
                module(loss=loss, scoring=scoring, nll_weight=0.5, drift_weight=0.5), pairs(policy), patch
            )
            value = observed.step()
            value.backward()
            gradients = [p.grad for p in trained_parameters(observed.module)]
            found.append((float(value), torch.cat([g.flatten() for g in gradients])))  # type: ignore[union-attr]
    (plain, plain_gradient), (shared, shared_gradient) = found
    assert shared == pytest.approx(plain, rel=1e-4)
    assert float(plain_gradient.norm()) > 0
    assert float((shared_gradient - plain_gradient).norm()) < 1e-3 * float(plain_gradient.norm())


def test_gradients_reach_the_policy_alone(
    module: Callable[..., DPOModule], pairs: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    observed = Observed(module(nll_weight=0.1), pairs(), monkeypatch)
    observed.step().backward()
    for name, parameter in observed.module.named_parameters():
        assert parameter.requires_grad == (".default." in name)
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (".default." in name)


def test_only_the_wanted_parts_are_trained(
    module: Callable[..., DPOModule], demo_adapter: Callable[..., str], pairs: Data, trainer: Any
) -> None:
    folder = demo_adapter(parts=ALL_PARTS)
    made = module(folder, parts=["projector"])
    trainer(max_steps=1, limit_val_batches=0).fit(made, datamodule=pairs())
    saved = load_file(Path(folder) / "adapter_model.safetensors")
    changed = {name for name, p in _of_adapter(made, "default").items() if not torch.equal(p, saved[name])}
    assert changed == {name for name in saved if "multi_modal_projector" in name}
    with pytest.raises(DataError, match=r"the adapter at .* has no layer in tower"):
        module(parts=["tower"]).configure_model()
    with pytest.raises(DataError, match=r"model\.parts is for an adapter that is given"):
        module(None, reference="base", parts=["projector"])


def test_a_batch_of_which_all_is_too_long_teaches_nothing(
    module: Callable[..., DPOModule], pairs: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    observed = Observed(module(), pairs(max_length=70, on_too_long="skip"), monkeypatch)
    assert observed.batch.inputs == {}
    loss = observed.step()
    assert float(loss) == 0
    loss.backward()
    parameters = trained_parameters(observed.module)
    assert parameters
    assert all(p.grad is not None and not p.grad.any() for p in parameters), "processes stay in step"
    assert observed.module.skipped == 4


# --- Runs --------------------------------------------------------------------------------------------------------


def _of_adapter(module: DPOModule, name: str) -> dict[str, Tensor]:
    """Weights of one adapter, named as in its file."""
    return {
        key.removeprefix("model.").replace(f".{name}.", "."): p.detach().clone()
        for key, p in module.named_parameters()
        if f".{name}." in key
    }


class Steps(L.Callback):
    """Keeps the loss and the gradient of each optimiser step, and what each validation found."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradients: list[Tensor] = []
        self.validated: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))

    def on_before_optimizer_step(self, trainer: Any, module: Any, *_: Any) -> None:
        self.gradients.append(torch.cat([p.grad.flatten() for p in trained_parameters(module)]))

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        self.validated.append({k: float(v) for k, v in trainer.callback_metrics.items()})


LOGGED = {"reward_margin", "reward_accuracy", "logp_chosen", "logp_rejected", "logp_answer"}


@pytest.mark.parametrize(
    ("settings", "policy"),
    [
        ({}, PairPolicy(target="expected")),
        ({"reference": "base", "loss": Hinge(beta=1.0)}, PairPolicy(target="expected", on_policy=True)),
        (
            {"reference": "none", "loss": SimPO()},
            PairPolicy(target="level", rejected="uniform", n_rejected=2, wrong_answer=True),
        ),
    ],
    ids=["adapter", "base", "none"],
)
def test_a_run_changes_the_policy_alone_and_writes_what_it_should(
    module: Callable[..., DPOModule],
    demo_folder: str,
    adapter: str,
    pairs: Data,
    trainer: Callable[..., L.Trainer],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, Any],
    policy: PairPolicy,
) -> None:
    seen = Steps()
    made = module(**settings)
    run = trainer(
        *(seen, RunCheckpoint(), AdapterWriter(), BeforeAfterCheck(tolerance=1.0)),
        enable_checkpointing=True,
        max_epochs=1,
        num_sanity_val_steps=-1,
    )
    run.fit(made, datamodule=pairs(policy))
    assert len(seen.losses) == 3

    saved = load_file(Path(adapter) / "adapter_model.safetensors")
    held = _of_adapter(made, "reference")
    assert held.keys() == (saved.keys() if made.reference == "adapter" else set())
    assert all(torch.equal(held[name], saved[name]) for name in held), "bit by bit"
    policy_now = _of_adapter(made, "default")
    assert policy_now.keys() == saved.keys()
    assert not any(torch.equal(policy_now[name], saved[name]) for name in saved)
    base = dict(load_base(BaseModel(demo_folder, dtype="float32")).named_parameters())
    for name, parameter in made.model.get_base_model().named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, base[name.replace("base_layer.", "")]), name

    before, after = seen.validated
    wanted = LOGGED | ({"kl"} if made.reference != "none" else set())
    for values in (before, after):
        assert {f"val/{name}" for name in wanted} <= set(values)
        assert ("val/kl" in values) == ("kl" in wanted)
    if made.reference == "adapter":
        assert before["val/kl"] == pytest.approx(0, abs=1e-5)
        assert before["val/reward_margin"] == pytest.approx(0, abs=1e-3)
        assert after["val/kl"] > 1e-4
    assert {f"train/{name}" for name in LOGGED | {"loss", "skipped"}} <= set(after)
    assert "before" in capsys.readouterr().out

    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    trained = {name: p for name, p in made.named_parameters() if p.requires_grad}
    assert set(checkpoint["state_dict"]) == set(trained)
    assert all(".default." in name for name in trained)
    assert checkpoint["recalibration"] is None

    folder = tmp_path / "run" / "adapter"
    assert not (folder / "reference").exists()
    again = PeftModel.from_pretrained(load_base(BaseModel(demo_folder, dtype="float32")), folder)
    loaded = {name.replace(".default.", "."): p for name, p in again.named_parameters() if "lora_" in name}
    assert all(torch.equal(loaded[name], policy_now[name]) for name in saved)


def test_without_a_first_stage_a_new_adapter_is_trained_on_the_base_model(
    module: Callable[..., DPOModule], pairs: Data, trainer: Callable[..., L.Trainer]
) -> None:
    lora = LoraSettings(r=2, alpha=4, dropout=0.0, parts=["projector"])
    made, seen = module(None, lora=lora, reference="base"), Steps()
    run = trainer(seen, max_epochs=1, num_sanity_val_steps=-1)
    run.fit(made, datamodule=pairs(PairPolicy(target="level")))
    assert seen.validated[0]["val/kl"] == pytest.approx(0, abs=1e-5)
    assert set(made.model.peft_config) == {"default"}
    trained = _of_adapter(made, "default")
    assert trained
    assert all("multi_modal_projector" in name and p.any() for name, p in trained.items())


def test_training_goes_on_from_a_checkpoint(
    module: Callable[..., DPOModule],
    pairs: Data,
    trainer: Callable[..., L.Trainer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    knots = {"yes_no": ([0.2, 0.9], [0.3, 0.6])}
    monkeypatch.setattr(dpo, "fit_recalibration", lambda module: IsotonicMap(knots))
    policy = PairPolicy(target="recalibrated", rejected="uniform", n_rejected=2)
    whole, seen = module(), Steps()
    saver = RunCheckpoint(filename="{epoch}", save_top_k=-1)
    run = trainer(seen, saver, enable_checkpointing=True, max_epochs=2, limit_val_batches=0)
    run.fit(whole, datamodule=pairs(policy))
    first = tmp_path / "run" / "checkpoints" / "epoch=0.ckpt"
    assert torch.load(first, weights_only=True)["recalibration"] == knots

    def fitted(module: Any) -> IsotonicMap:
        raise AssertionError("the map is the one that the run began with")

    monkeypatch.setattr(dpo, "fit_recalibration", fitted)
    resumed, rest = module(), Steps()
    run = trainer(rest, max_epochs=2, limit_val_batches=0)
    run.fit(resumed, datamodule=pairs(policy), ckpt_path=str(first))
    assert resumed.recalibration == IsotonicMap(knots)
    assert len(seen.losses) == 6
    assert rest.losses == seen.losses[3:]
    there, here = (_of_adapter(m, "default") for m in (whole, resumed))
    assert all(torch.equal(there[name], here[name]) for name in there)


def test_accumulated_batches_are_one_large_batch(
    module: Callable[..., DPOModule], pairs: Data, trainer: Callable[..., L.Trainer]
) -> None:
    gradients = []
    for size, batches in ((6, 1), (3, 2)):
        seen = Steps()
        queries = pairs(
            PairPolicy(target="expected", rejected="uniform", n_rejected=2),
            train=DemoSource("train", scenes=2),
            batch_size=size,
        )
        run = trainer(seen, max_epochs=1, limit_val_batches=0, accumulate_grad_batches=batches)
        run.fit(module(nll_weight=0.3), datamodule=queries)
        gradients += seen.gradients
    one, two = gradients
    assert float((one - two).norm()) < 1e-4 * float(one.norm())


def test_training_learns_to_state_the_target(
    module: Callable[..., DPOModule], pairs: Data, trainer: Callable[..., L.Trainer]
) -> None:
    seen = Steps()
    noise = NoisePolicy(levels=LinearLevels(n_levels=5), distractor_probability=0.0, clean_fraction=1.0)
    queries = pairs(PairPolicy(target="level"), noise=noise)
    trainer(seen, max_epochs=5, limit_val_batches=0).fit(module(loss=DPO(beta=1.0)), datamodule=queries)
    assert sum(seen.losses[-3:]) < 0.5 * sum(seen.losses[:3])


# --- The map of `target: recalibrated` ---------------------------------------------------------------------------


def _fits(fitted: IsotonicMap, rows: Sequence[tuple[float, bool, str]]) -> None:
    wanted = fit_isotonic_map(*zip(*rows, strict=True))
    assert fitted.knots.keys() == wanted.knots.keys()
    for kind, (confidence, accuracy) in wanted.knots.items():
        assert fitted.knots[kind][0] == pytest.approx(confidence, abs=1e-3)
        assert fitted.knots[kind][1] == pytest.approx(accuracy, abs=1e-3)


def test_the_map_is_fitted_on_what_the_reference_answers_and_expects(
    module: Callable[..., DPOModule],
    demo_folder: str,
    adapter: str,
    pairs: Data,
    trainer: Callable[..., L.Trainer],
) -> None:
    made = module()
    queries = pairs(PairPolicy(target="recalibrated"), validation=DemoSource("calibration", scenes=4))
    run = trainer(max_steps=1, limit_train_batches=1)
    run.fit(made, datamodule=queries)
    assert made.recalibration is not None

    # By hand: generate with the adapter, and ask for every level behind the answer as it was given.
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
    assert {right for _, right, _ in rows} == {True, False}
    _fits(made.recalibration, rows)


def _log_p(
    model: Any, queries: Any, query: Query, answer: str, confidence: float, batch: Any, row: int
) -> float:
    """log p of the whole response under the model, by a plain forward."""
    chat, pixels = queries.chat, batch.prompts.inputs["pixel_values"][row : row + 1]
    blank = np.zeros((96, 96, 3), dtype=np.uint8)
    prompt, full = (
        chat.inputs([chat.render(query.question, *said)], [blank], "right")["input_ids"]
        for said in ((), (render_response(answer, confidence),))
    )
    with torch.no_grad():
        logits = model(input_ids=full, attention_mask=torch.ones_like(full), pixel_values=pixels).logits[0]
    start = prompt.shape[1]
    assert torch.equal(full[0, :start], prompt[0])
    log_p = torch.log_softmax(logits.double(), -1)[range(start - 1, full.shape[1] - 1), full[0, start:]]
    return float(log_p.sum())


class Reference:
    """Answers nothing, and keeps the sequences that it is asked about."""

    def __init__(self) -> None:
        self.asked: list[list[list[int]]] = []

    def score_reference(self, batch: PairBatch, candidates: Any) -> ResponseScores:
        prompts = [
            ids[:length].tolist()
            for ids, length in zip(batch.inputs["input_ids"], batch.lengths, strict=True)
        ]
        self.asked = [
            [[*prompt, *c.tokens] for c in row] for prompt, row in zip(prompts, candidates, strict=True)
        ]
        nothing = torch.zeros(len(candidates), max(map(len, candidates)), 1)
        return ResponseScores(nothing, nothing > 0)


@pytest.mark.parametrize("text", ["Yes. Confidence: 90%", "A cat. Confidence: 80%"])
def test_what_is_asked_of_the_reference_is_the_conversation(
    pairs: Data, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """Whatever of the prompt's end an answer takes into its first token; "Yes" takes the space here, and "A cat" does not."""
    queries = pairs(PairPolicy(target="recalibrated"))
    template = CHAT_TEMPLATE.replace("'<|assistant|>'", "'<|assistant|> '").replace(
        "<|assistant|>{% endif %}", "<|assistant|> {% endif %}"
    )
    monkeypatch.setattr(queries.processor, "chat_template", template)
    blank = np.zeros((96, 96, 3), dtype=np.uint8)
    query = Query("q", "x", "What is it?", "Yes", "open")
    collator = queries.pair_collator
    assert collator is not None
    batch = collator([Sample(query, blank, 1.0, 0)])
    reference = Reference()
    recalibration._expected(reference, batch, [graded_prediction(query, text, 0)], collator)  # type: ignore[arg-type]
    chat = queries.chat
    for ids, level in zip(reference.asked[0], LEVELS, strict=True):
        conversation = chat.render(query.question, render_response(strip_confidence(text), level))
        assert ids == chat.inputs([conversation], [blank], "right")["input_ids"][0].tolist()


def test_the_map_is_that_of_all_processes(
    module: Callable[..., DPOModule],
    pairs: Data,
    trainer: Callable[..., L.Trainer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A process whose own queries could not be used must not stop while the others wait for it."""
    others = [(0.3, False, "yes_no"), (0.8, True, "yes_no")]
    monkeypatch.setattr(recalibration, "_expected", lambda *_: [])
    monkeypatch.setattr(recalibration, "_of_all_processes", lambda rows: rows + others)
    made = module()
    trainer(max_steps=1, limit_val_batches=0).fit(made, datamodule=pairs(PairPolicy(target="recalibrated")))
    assert made.recalibration == fit_isotonic_map(*zip(*others, strict=True))


def test_a_process_without_validation_queries_fits_the_map_of_the_others(
    module: Callable[..., DPOModule],
    pairs: Data,
    trainer: Callable[..., L.Trainer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    others = [(0.3, False, "yes_no"), (0.8, True, "yes_no")]
    monkeypatch.setattr(recalibration, "_of_all_processes", lambda rows: rows + others)
    made, queries = module(), pairs(PairPolicy(target="recalibrated"))

    def nothing() -> list[Any]:  # Lightning asks for the code of a loader's function, which `list` has not
        return []

    monkeypatch.setattr(queries, "val_dataloader", nothing)
    trainer(max_steps=1, limit_val_batches=0).fit(made, datamodule=queries)
    assert made.recalibration == fit_isotonic_map(*zip(*others, strict=True))


def test_a_map_needs_answers_to_be_fitted_on(
    module: Callable[..., DPOModule],
    pairs: Data,
    trainer: Callable[..., L.Trainer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = PairPolicy(target="recalibrated")
    with pytest.raises(DataError, match=r"data\.validation is not set: `target: recalibrated`"):
        trainer(max_steps=1).fit(module(), datamodule=pairs(policy, validation=None))
    monkeypatch.setattr(recalibration, "_expected", lambda *_: [])
    with pytest.raises(DataError, match="nothing to fit the map of"):
        trainer(max_steps=1).fit(module(), datamodule=pairs(policy))


# --- LevelDistribution ------------------------------------------------------------------------------------------------------


def _belief(*rows: Sequence[float]) -> LevelDistribution:
    """Three levels with the same again for a wrong answer, which does not count."""
    levels = [Candidate((1,), 1, 0, c, False) for c in (1.0, 0.5, 0.0)]
    candidates = (*levels, *(c._replace(wrong=True) for c in levels))
    return LevelDistribution(torch.tensor([[*row, 5.0, 6.0, 7.0] for row in rows]), (candidates,) * len(rows))


def test_belief_by_hand() -> None:
    believed = _belief([math.log(0.1), math.log(0.1), math.log(0.2)], [-900.0, -901.0, -900.0])
    assert believed.expected(0) == pytest.approx(0.25 * 1 + 0.25 * 0.5)
    assert believed.own(0) == 2
    weight = 1 / (2 + math.exp(-1))
    assert believed.expected(1) == pytest.approx(weight + 0.5 * weight * math.exp(-1))
    assert believed.own(1) in (0, 2)


def test_divergence_by_hand() -> None:
    now, before = _belief([0.0, 1.0, 2.0], [0.0, 0.0, 0.0]), _belief([2.0, 1.0, 0.0], [-7.0, -7.0, -7.0])
    p = np.exp([0, 1, 2]) / np.exp([0, 1, 2]).sum()
    assert float(divergence(now, before)) == pytest.approx((p @ np.log(p / p[::-1]) + 0) / 2)
    assert float(divergence(now, now)) == 0


# --- Errors ------------------------------------------------------------------------------------------------------


def test_data_without_pairs_are_refused(
    module: Callable[..., DPOModule], pairs: Data, trainer: Callable[..., L.Trainer]
) -> None:
    with pytest.raises(DataError, match=r"data\.pairs is not set: preference optimisation needs it"):
        trainer(max_steps=1).fit(module(), datamodule=pairs(None))


@pytest.mark.parametrize("loss", [DPO(), Listwise()], ids=repr)
def test_a_loss_that_needs_a_reference_is_given_one(module: Callable[..., DPOModule], loss: Any) -> None:
    with pytest.raises(DataError, match=rf"model\.reference: {type(loss).__name__} needs one, found none"):
        module(reference="none", loss=loss)
    module(reference="none", loss=DPO(reference_free=True))


def test_an_anchor_needs_a_reference(module: Callable[..., DPOModule]) -> None:
    with pytest.raises(DataError, match=r"model\.drift_weight compares with the reference, but .* is none"):
        module(reference="none", loss=SimPO(), drift_weight=0.3)


@pytest.mark.parametrize(
    "policy", [PairPolicy(target="expected"), PairPolicy(target="level", rejected="far", on_policy=True)]
)
def test_a_target_that_asks_the_reference_is_refused_without_one(
    module: Callable[..., DPOModule], pairs: Data, trainer: Callable[..., L.Trainer], policy: PairPolicy
) -> None:
    with pytest.raises(DataError, match=r"ask the reference, but model\.reference is none"):
        trainer(max_steps=1).fit(module(reference="none", loss=SimPO()), datamodule=pairs(policy))


def test_a_missing_adapter_says_to_train_one_first(
    module: Callable[..., DPOModule], pairs: Data, trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=f"no adapter at {tmp_path}/none .*: train one first"):
        trainer(max_steps=1).fit(module(f"{tmp_path}/none"), datamodule=pairs())


def test_an_adapter_to_compare_with_must_be_given(module: Callable[..., DPOModule]) -> None:
    with pytest.raises(DataError, match=r"model\.reference: adapter, but model\.adapter is not set"):
        module(None)


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf])
def test_a_weight_that_makes_no_sense_is_refused(module: Callable[..., DPOModule], weight: float) -> None:
    for name in ("nll_weight", "confidence_weight", "drift_weight"):
        with pytest.raises(DataError, match=rf"model\.{name} must be a finite number of at least 0"):
            module(**{name: weight})
