"""The output head at labels only: the loss and gradients of the plain path with less memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vlm_calibration.data.collate import SFTBatch
from vlm_calibration.losses.sequence import response_nll, token_log_likelihood
from vlm_calibration.models.adapters import LoraSettings, attach_lora
from vlm_calibration.models.forward import IGNORE, LabelledLogits, labelled_logits

from .families import Spec, build, randomize_adapters
from .steps import allocated


def plain_logits(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> LabelledLogits:
    """Compute all logits, then select those at labels."""
    logits = model(**inputs, use_cache=False).logits
    labelled = labels[:, 1:] != IGNORE
    return LabelledLogits(logits[:, :-1][labelled], labels[:, 1:][labelled], labelled.nonzero()[:, 0])


def _loss(labelled: LabelledLogits, n_rows: int) -> Tensor:
    log_likelihood = token_log_likelihood(labelled.logits, labelled.targets)
    return response_nll(log_likelihood, labelled.rows, torch.ones_like(log_likelihood), n_rows)


def _with_lora(model: Any, checkpointing: bool) -> Any:
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    settings = LoraSettings(r=4, alpha=8, dropout=0.0, parts=["language", "tower", "projector"])
    return randomize_adapters(attach_lora(model, settings)).train()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_loss_and_gradients_are_those_of_the_plain_path(
    load_model: Callable[..., Any], batch: SFTBatch, attention: str, checkpointing: bool
) -> None:
    model = _with_lora(load_model(attention), checkpointing)
    assert model.get_base_model().config._attn_implementation == attention
    results = []
    for logits_of in (plain_logits, labelled_logits):
        model.zero_grad(set_to_none=True)
        labelled = logits_of(model, batch.inputs, batch.labels)
        loss = _loss(labelled, 3)
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        results.append((labelled, loss.detach(), gradients))
    (plain, plain_loss, plain_gradients), (selected, selected_loss, selected_gradients) = results
    assert torch.equal(selected.targets, plain.targets)
    assert torch.equal(selected.rows, plain.rows)
    assert torch.allclose(selected.logits, plain.logits, atol=1e-6, rtol=1e-6)
    assert abs(float(selected_loss - plain_loss)) < 1e-6
    assert len(selected_gradients) > 50
    for name, gradient in plain_gradients.items():
        assert gradient.abs().max() > 0, name
        scale = float(gradient.abs().max())
        assert torch.allclose(selected_gradients[name], gradient, atol=1e-6 * max(1.0, scale), rtol=0), name


def test_a_label_on_the_first_token_is_refused(load_model: Callable[..., Any], batch: SFTBatch) -> None:
    labels = batch.labels.clone()
    labels[1, 0] = 5
    with pytest.raises(ValueError, match="the first token of a sequence has a label"):
        labelled_logits(load_model(), batch.inputs, labels)


def test_the_hook_is_gone_afterwards_even_after_an_error(
    load_model: Callable[..., Any], batch: SFTBatch
) -> None:
    model = _with_lora(load_model(), checkpointing=False)
    head = model.get_base_model().get_output_embeddings()
    assert head.out_features == model.get_base_model().config.text_config.vocab_size
    with torch.no_grad():
        labelled_logits(model, batch.inputs, batch.labels)
        assert not head._forward_pre_hooks
        with pytest.raises(RuntimeError):
            labelled_logits(model, {**batch.inputs, "pixel_values": torch.zeros(1, 3, 7, 7)}, batch.labels)
        assert not head._forward_pre_hooks
        logits = model(**batch.inputs).logits
    assert logits.shape[:2] == batch.inputs["input_ids"].shape


def test_peak_memory_falls() -> None:
    vocabulary, length, rows = 50_000, 256, 2
    model = attach_lora(
        build("llava_clip", spec=Spec(vocabulary=vocabulary)), LoraSettings(r=2, dropout=0.0)
    ).train()
    inputs = {"input_ids": torch.randint(200, vocabulary, (rows, length))}
    labels = torch.full_like(inputs["input_ids"], IGNORE)
    labels[:, -8:] = inputs["input_ids"][:, -8:]

    def step(logits_of: Callable[..., LabelledLogits]) -> Callable[[], None]:
        return lambda: _loss(logits_of(model, inputs, labels), rows).backward()

    step(labelled_logits)()
    plain, selected = allocated(step(plain_logits)), allocated(step(labelled_logits))
    everything = rows * length * vocabulary * 4
    assert plain > everything, "the plain path has all logits"
    assert selected < everything / 4
    assert plain > 5 * selected
