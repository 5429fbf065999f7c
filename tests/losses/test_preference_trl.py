"""Preference losses against TRL's own: loss and gradient of the same model on the same responses.

TRL's trainers are created without their constructors, with the settings that their losses read. TRL pads and collates, runs the
model, and computes log-likelihoods and loss; our side runs the model on one response at a time.
"""

from __future__ import annotations

import os
from collections import defaultdict
from types import SimpleNamespace
from typing import Any, NamedTuple

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from trl import DPOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import add_fused_lm_head

from vlm_calibration.losses.candidates import CandidateScores
from vlm_calibration.losses.preference import DPO, SimPO
from vlm_calibration.losses.sequence import token_log_likelihood

# A prompt and three responses of each query, the first one chosen; equally many pairs a query, so that TRL's mean over
# pairs is our mean over queries.
QUERIES = [
    ([3, 8, 2], [[5, 1], [9, 4, 4, 7], [6]]),
    ([7], [[2, 2, 10], [3], [11, 5, 1, 8, 9]]),
    ([4, 4, 9, 1, 6], [[10], [1, 7], [8, 8, 3]]),
]
PAIRS = [
    {"prompt_ids": prompt, "chosen_ids": responses[0], "rejected_ids": rejected}
    for prompt, responses in QUERIES
    for rejected in responses[1:]
]
collate = DataCollatorForPreference(pad_token_id=0)


class Models(NamedTuple):
    policy: LlamaForCausalLM
    reference: LlamaForCausalLM


@pytest.fixture(scope="module")
def models() -> Models:
    """Random models with weights so large that the log-likelihoods of responses differ widely."""
    config = LlamaConfig(
        vocab_size=12,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.4,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = Models(LlamaForCausalLM(config), LlamaForCausalLM(config).requires_grad_(False))
    for model in models:
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    return models


def _log_likelihood(model: LlamaForCausalLM, prompt: list[int], response: list[int]) -> Tensor:
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return token_log_likelihood(logits, torch.tensor(response))


def score(models: Models) -> CandidateScores:
    policy, reference = (
        torch.stack([torch.stack([_log_likelihood(model, p, r).sum() for r in rs]) for p, rs in QUERIES])
        for model in models
    )
    lengths = torch.tensor([[len(r) for r in responses] for _, responses in QUERIES])
    distance = (torch.arange(3) / 2).expand_as(policy)
    everywhere, zeros = torch.ones_like(policy, dtype=torch.bool), torch.zeros_like(policy)
    return CandidateScores(
        policy, reference, lengths, distance, everywhere, zeros, zeros, zeros[:, 0], everywhere, everywhere
    )


def _trainer(kind: type, **settings: Any) -> Any:
    trainer = object.__new__(kind)
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
    )
    vars(trainer).update(accelerator=accelerator, aux_loss_enabled=False, label_smoothing=0.0)
    vars(trainer).update(settings)
    return trainer


def trl_dpo(models: Models, beta: float) -> Tensor:
    """Mean of `DPOTrainer`'s loss over all pairs."""
    trainer = _trainer(
        DPOTrainer,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        model=models.policy,
        ref_model=models.reference,
        precompute_ref_logps=False,
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        use_weighting=False,
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        beta=beta,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    return trainer._compute_loss(models.policy, collate(PAIRS), False)


def trl_simpo(models: Models, beta: float, simpo_gamma: float) -> Tensor:
    """Mean of `CPOTrainer`'s SimPO loss over all pairs."""
    batch = collate(PAIRS)
    batch["labels"] = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
    halves = {
        f"{side}_{name}": half
        for name, values in batch.items()
        for side, half in zip(("chosen", "rejected"), values.chunk(2), strict=True)
    }
    settings = {"beta": beta, "simpo_gamma": simpo_gamma, "cpo_alpha": 0, "alpha": 0.0, "pad_token_id": 0}
    trainer = _trainer(CPOTrainer, loss_type="simpo", is_encoder_decoder=False, **settings)
    return trainer.get_batch_loss_metrics(models.policy, halves)[0]


def assert_same(models: Models, ours: Tensor, theirs: Tensor) -> None:
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    parameters = list(models.policy.parameters())
    ours_grad, theirs_grad = (torch.autograd.grad(loss, parameters) for loss in (ours, theirs))
    assert max(float(g.abs().max()) for g in theirs_grad) > 1e-3
    for ours, theirs in zip(ours_grad, theirs_grad, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_dpo(models: Models) -> None:
    assert_same(models, DPO(beta=0.7)(score(models)), trl_dpo(models, 0.7))


def test_simpo(models: Models) -> None:
    scores = score(models)._replace(reference=None)
    theirs = trl_simpo(models, 2.5, 0.3)
    assert_same(models, SimPO(beta=2.5, gamma=0.3)(scores), theirs)
