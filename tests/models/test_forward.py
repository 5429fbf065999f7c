"""The output head at labels only, with loss and gradients of the plain path and less memory; frozen vision modules run once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vlm_calibration.data.collate import SFTBatch
from vlm_calibration.losses.sequence import response_nll, token_log_likelihood
from vlm_calibration.models.adapters import LoraSettings, attach_lora, using_adapter
from vlm_calibration.models.forward import (
    IGNORE,
    LabelledLogits,
    frozen_vision,
    labelled_logits,
    shared_vision,
    unwrap_peft,
)

from .families import FOUR, Spec, build, randomize_adapters
from .processors import cached_family, prompts_of
from .steps import allocated


def plain_logits(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> LabelledLogits:
    """Compute all logits, then select those at labels."""
    logits = model(**inputs, use_cache=False).logits
    labelled = labels[:, 1:] != IGNORE
    return LabelledLogits(logits[:, :-1][labelled], labels[:, 1:][labelled], labelled.nonzero()[:, 0])


def _loss(labelled: LabelledLogits, n_rows: int) -> Tensor:
    log_likelihood = token_log_likelihood(labelled.logits, labelled.targets)
    return response_nll(log_likelihood, labelled.rows, torch.ones_like(log_likelihood), n_rows)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_loss_and_gradients_are_those_of_the_plain_path(
    load_model: Callable[..., Any], batch: SFTBatch, attention: str, checkpointing: bool
) -> None:
    base = load_model(attention)
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    settings = LoraSettings(r=4, alpha=8, dropout=0.0, parts=["language", "tower", "projector"])
    model = randomize_adapters(attach_lora(base, settings)).train()
    assert model.get_base_model().config._attn_implementation == attention
    results = []
    for logits_of in (plain_logits, labelled_logits):
        model.zero_grad(set_to_none=True)
        labelled = logits_of(model, batch.inputs, batch.labels)
        loss = _loss(labelled, 3)
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        results.append((labelled, loss.detach(), gradients))
    labels = batch.labels.clone()
    labels[1, 0] = 5
    with pytest.raises(ValueError, match="the first token of a sequence has a label"):
        labelled_logits(model, batch.inputs, labels)
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


def test_peak_memory_falls() -> None:
    vocabulary, length, rows = 50_000, 256, 2
    base = build("llava_clip", spec=Spec(vocabulary=vocabulary))
    model = attach_lora(base, LoraSettings(r=2, dropout=0.0)).train()
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


# --- Frozen vision modules run once for several passes ---

TOWER_AND_PROJECTOR = ("model.vision_tower", "model.multi_modal_projector")
VISION = dict.fromkeys(FOUR, TOWER_AND_PROJECTOR) | {"qwen2_5_vl": ("model.visual",)}
"""Tower and, if it is a separate module, projector."""
VISION_PARTS = [("language", "projector"), ("language", "tower"), ("projector",), ("tower",)]


def adapted(family: str, *parts: str) -> Any:
    """A model with a random adapter on these parts and all else frozen."""
    settings = LoraSettings(r=4, alpha=8, dropout=0.0, parts=list(parts))  # type: ignore[arg-type]
    return randomize_adapters(attach_lora(cached_family(family).model(), settings)).eval()


def names_of(model: Any) -> set[str]:
    """Names of the frozen vision modules."""
    names = {id(module): name for name, module in unwrap_peft(model).named_modules()}
    return {names[id(module)] for module in frozen_vision(model)}


def count_runs(module: nn.Module) -> list[int]:
    """A list that grows whenever the module's first layer runs."""
    runs: list[int] = []
    layer = next(m for m in module.modules() if not list(m.children()))
    layer.register_forward_hook(lambda *_: runs.append(1))
    return runs


def logits_of(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Logits of the model with its adapter, without it, and with it again."""
    logits = []
    with torch.no_grad():
        for adapter in ("default", None, "default"):
            with using_adapter(model, adapter):
                logits.append(model(**inputs, use_cache=False).logits)
    return logits


@pytest.mark.parametrize("family", FOUR)
def test_tower_and_projector_are_frozen_unless_adapted_or_trained(family: str) -> None:
    tower, *projector = VISION[family]
    assert tower not in names_of(adapted(family, "language", "tower"))
    if family != "gemma3":  # its projector has no linear layer
        # The projector of the Qwen family is part of the tower.
        assert names_of(adapted(family, "projector")) == ({tower} if projector else set())
    model = adapted(family, "language")
    assert names_of(model) == set(VISION[family])
    next(unwrap_peft(model).get_submodule(VISION[family][-1]).parameters()).requires_grad_(True)
    assert names_of(model) == ({tower} if projector else set())
    assert not frozen_vision(build(family)), "all weights are trained"


@pytest.mark.parametrize("family", FOUR)
def test_the_tower_runs_once_and_results_are_the_same(family: str) -> None:
    model, batch = adapted(family, "language"), prompts_of(family)[0]
    runs = [count_runs(unwrap_peft(model).get_submodule(name)) for name in VISION[family]]
    expected = logits_of(model, batch)
    assert [len(r) for r in runs] == [3] * len(runs), "check of the count"
    assert not torch.allclose(expected[0], expected[1], atol=0.1)
    for _ in range(2):  # each context has its own cache
        for run in runs:
            run.clear()
        with shared_vision(model):
            actual = logits_of(model, batch)
        assert [len(r) for r in runs] == [1] * len(runs)
        for a, b in zip(actual, expected, strict=True):
            assert torch.equal(a, b)
        batch = {n: -v if n == "pixel_values" else v for n, v in batch.items()}
        expected = logits_of(model, batch)


@pytest.mark.parametrize("parts", VISION_PARTS, ids="+".join)
@pytest.mark.parametrize("family", ["llava_clip", "qwen2_5_vl"])
def test_adapters_in_the_vision_keep_their_logits_and_gradients(family: str, parts: tuple[str, ...]) -> None:
    """Gradients of a policy after a pass of the reference, as in preference optimisation."""
    model, batch = adapted(family, *parts), prompts_of(family)[0]

    def gradients() -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        with torch.no_grad(), using_adapter(model, None):
            reference = model(**batch, use_cache=False).logits
        logits = model(**batch, use_cache=False).logits
        (logits.log_softmax(-1) - reference.log_softmax(-1)).square().sum().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    expected, expected_gradients = logits_of(model, batch), gradients()
    assert not torch.allclose(expected[0], expected[1], atol=1e-3)
    reached = {n for n, g in expected_gradients.items() if g is not None and g.abs().max() > 0}
    assert reached
    with shared_vision(model):
        actual, actual_gradients = logits_of(model, batch), gradients()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    for name in reached:
        assert actual_gradients[name] is not None, name
        assert torch.equal(actual_gradients[name], expected_gradients[name]), name


def forwards_of(model: Any) -> dict[str, Any]:
    """Forwards that are attributes of an instance instead of its class."""
    return {n: m.__dict__["forward"] for n, m in model.named_modules() if "forward" in m.__dict__}


def test_a_forward_of_its_own_is_used_and_comes_back() -> None:
    """Such as the forwards that accelerate and bitsandbytes set."""
    model, batch = adapted("llava_clip", "language"), prompts_of("llava_clip")[0]
    projector = unwrap_peft(model).model.multi_modal_projector
    usual, runs = projector.forward, []

    def doubled(features: Tensor) -> Tensor:
        runs.append(1)
        return 2 * usual(features)

    plain = logits_of(model, batch)
    assert not forwards_of(model)
    with shared_vision(model):
        assert {n.removeprefix("base_model.model.") for n in forwards_of(model)} == set(TOWER_AND_PROJECTOR)
    assert not forwards_of(model)
    projector.forward = doubled
    expected = logits_of(model, batch)
    assert not torch.allclose(plain[0], expected[0], atol=0.01)
    before = forwards_of(model)
    runs.clear()
    with shared_vision(model):
        actual = logits_of(model, batch)
    assert len(runs) == 1
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert forwards_of(model) == before
    assert projector.__dict__["forward"] is doubled
    with pytest.raises(RuntimeError, match="stop"), shared_vision(model):
        raise RuntimeError("stop")
    assert projector.__dict__["forward"] is doubled


@pytest.mark.parametrize("family", ["llava_clip", "qwen2_5_vl"])
@pytest.mark.parametrize("other", ["fewer", "of the same shape"])
def test_other_images_are_not_mistaken_for_the_first(family: str, other: str) -> None:
    model, batch = adapted(family, "language"), prompts_of(family)[0]
    same_shape = {**batch, "pixel_values": -batch["pixel_values"]}
    batches = (batch, prompts_of(family, 2)[0] if other == "fewer" else same_shape) * 2
    with torch.no_grad():
        expected = [model(**b, use_cache=False).logits for b in batches]
        with shared_vision(model):
            actual = [model(**b, use_cache=False).logits for b in batches]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
