"""FlexAttention: its masks against the dense ones, log-likelihoods, and what is refused.

FlexAttention runs without compilation here, which evaluates the mask for all pairs of tokens. So the tables of blocks, which only
compiled kernels read, are compared on their own. It has no backward pass on the CPU: gradients are compared on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask

from vlm_calibration.models import loading, shared_prefix
from vlm_calibration.models.base import FLEX
from vlm_calibration.models.forward import unwrap_peft
from vlm_calibration.models.loading import BaseModel, load_base, load_for_training, use_in_language_model
from vlm_calibration.models.shared_prefix import Prompts, score_responses, why_not_shared
from vlm_calibration.records import DataError

from .families import FOUR, Spec, build
from .prefix_cases import Case, assert_equal, gradients_of, new_case, unpadded


@pytest.fixture
def uncompiled() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module", params=FOUR)
def case(request: pytest.FixtureRequest) -> Case:
    return new_case(request.param)


def masks_of(case: Case, attention: str) -> list[Any]:
    """The mask that each layer of the language model gets in a packed row."""
    decoder = unwrap_peft(case.model).get_decoder()
    masks: list[Any] = []

    def record(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        masks.append(kwargs["attention_mask"])

    handles = [
        layer.self_attn.register_forward_pre_hook(record, with_kwargs=True) for layer in decoder.layers
    ]
    before = decoder.config._attn_implementation
    use_in_language_model(unwrap_peft(case.model), attention)
    try:
        assert why_not_shared(case.model, 100) is None
        with torch.no_grad():
            assert_equal(score_responses(case.model, case.batch, case.responses, "shared"), case)
    finally:
        use_in_language_model(unwrap_peft(case.model), before)
        for handle in handles:
            handle.remove()
    return masks


def expanded(mask: BlockMask) -> Tensor:
    """The mask that compiled kernels compute, bool [B, 1, L, L]: all of a full block, the mask function within a partial one."""
    batch, _, n_queries, _ = mask.kv_indices.shape
    size, (length, _) = mask.BLOCK_SIZE[0], mask.seq_lengths
    exact = create_mask(mask.mask_mod, batch, 1, length, length, "cpu")
    result = torch.zeros_like(exact)
    for b in range(batch):
        for q in range(n_queries):
            rows = slice(q * size, (q + 1) * size)
            for k in mask.kv_indices[b, 0, q, : mask.kv_num_blocks[b, 0, q]].tolist():
                columns = slice(k * size, (k + 1) * size)
                result[b, 0, rows, columns] = exact[b, 0, rows, columns]
            assert mask.full_kv_indices is not None
            assert mask.full_kv_num_blocks is not None
            for k in mask.full_kv_indices[b, 0, q, : mask.full_kv_num_blocks[b, 0, q]].tolist():
                result[b, 0, rows, k * size : (k + 1) * size] = True
    return result


def test_block_masks_are_the_dense_masks_and_score_alike(
    case: Case, uncompiled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_prefix, "BLOCK", 4)  # so that rows have several blocks
    blocks, dense = masks_of(case, FLEX), masks_of(case, "eager")
    assert len(blocks) == len(dense) == 2, "layers"
    for mask, expected in zip(blocks, dense, strict=True):
        assert isinstance(mask, BlockMask)
        assert mask.BLOCK_SIZE == (4, 4)
        assert mask.kv_indices.shape[-1] > 4
        assert torch.equal(expanded(mask), expected == 0)
        skipped = mask.kv_num_blocks + mask.full_kv_num_blocks < mask.kv_indices.shape[-1]
        assert skipped.any(), "blocks that no query attends to"


def test_it_is_refused_without_a_gpu(model_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = BaseModel(model_folder, attn_implementation=FLEX)
    monkeypatch.setattr(loading.AutoModelForImageTextToText, "from_pretrained", None)
    for load in (load_base, load_for_training):
        with pytest.raises(DataError, match="attn_implementation: flex_attention needs a GPU"):
            load(base, "cpu")


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_the_language_model_uses_it_and_the_tower_keeps_its_own(family: str, tmp_path: Path) -> None:
    """transformers itself refuses Qwen's models."""
    build(family).save_pretrained(tmp_path)
    model = load_base(
        BaseModel(str(tmp_path), attn_implementation=FLEX), "cuda"
    )  # moved there by the Trainer
    decoder = model.get_decoder()
    assert {layer.self_attn.config._attn_implementation for layer in decoder.layers} == {FLEX}
    assert model.config.vision_config._attn_implementation == "sdpa"


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FOUR)
def test_gradients_are_those_of_dense_masks(family: str, checkpointing: bool, cuda: torch.device) -> None:
    case = new_case(family, spec=Spec(width=64))  # heads of 16, the smallest of the kernels
    base = unwrap_peft(case.model.to(cuda))
    lengths = case.batch.lengths.to(cuda)
    batch = Prompts({name: v.to(cuda) for name, v in case.batch.inputs.items()}, lengths)
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        case.model.train()
    results = []
    for attention in (base.get_decoder().config._attn_implementation, FLEX):
        use_in_language_model(base, attention)
        scores = score_responses(case.model, batch, case.responses, "shared")
        moved = scores._replace(log_likelihood=scores.log_likelihood.cpu())
        results.append((moved.log_likelihood, gradients_of(case.model, unpadded(moved, case.responses))))
    (dense, dense_gradients), (flex, gradients) = results
    assert torch.allclose(flex, dense, atol=1e-4, rtol=0)
    largest = max(float(g.abs().max()) for g in dense_gradients.values())
    for name, expected in dense_gradients.items():
        assert torch.allclose(gradients[name], expected, atol=1e-4 * largest, rtol=0), name
