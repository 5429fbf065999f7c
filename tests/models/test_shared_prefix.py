"""Log-likelihoods and gradients of packed rows against one unpadded forward per response; models whose prefix cannot be shared.

FlexAttention runs without compilation here, which evaluates the mask for all pairs of tokens. So the tables of blocks, which only
compiled kernels read, are compared on their own. It has no backward pass on the CPU: gradients are compared on a GPU.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from vlm_calibration.models import loading, shared_prefix
from vlm_calibration.models.adapters import LoraSettings, attach_lora
from vlm_calibration.models.base import FLEX
from vlm_calibration.models.forward import unwrap_peft
from vlm_calibration.models.loading import BaseModel, load_base, load_for_training, use_in_language_model
from vlm_calibration.models.shared_prefix import (
    Packed,
    Prompts,
    ResponseScores,
    pack,
    score_responses,
    why_not_shared,
)
from vlm_calibration.records import DataError

from .families import FOUR, build, randomize_adapters
from .processors import cached_family, prompts_of, with_response

Responses = list[list[list[int]]]


def new_responses(seed: int = 11) -> Responses:
    """Responses to three queries: ten that differ late, one, and four that differ in the first token."""
    generator = torch.Generator().manual_seed(seed)

    def words(n: int) -> list[int]:
        return torch.randint(20, 90, (n,), generator=generator).tolist()

    common = words(3)
    late = [[*common, 20 + k, *words(k % 4)] for k in range(8)]
    # One ends where the others differ, and one shares a longer prefix with another.
    late += [common, [*late[3][:-1], 19]]
    at_once = [[50 + k, *words(k)] for k in (3, 0, 5, 1)]
    return [late, [words(6)], at_once]


@dataclass
class Case:
    """A model with the results of one forward per response.

    Attributes:
        model: an adapted model in eval mode.
        batch: three prompts.
        responses: the responses to each.
        expected: log-likelihoods of each response's tokens, float32 [T].
        gradients: of `preference_loss`, by parameter.
    """

    model: Any
    batch: Prompts
    responses: Responses
    expected: list[list[Tensor]]
    gradients: dict[str, Tensor]


def likelihood_alone(model: Any, prompt: dict[str, Tensor], response: Sequence[int]) -> Tensor:
    """Log-likelihood of each token of a response, float32 [T], from one unpadded forward over the sequence."""
    logits = model(**with_response(prompt, response), use_cache=False).logits[0]
    likelihood, first = torch.log_softmax(logits, dim=-1), prompt["input_ids"].shape[1]
    return torch.stack([likelihood[first + t - 1, token] for t, token in enumerate(response)])


def preference_loss(likelihood: Sequence[Sequence[Tensor]]) -> Tensor:
    """DPO with a likelihood term in which tokens shared by all responses do not cancel."""
    loss = torch.zeros(())
    for chosen, *rejected in likelihood:
        loss = loss - chosen.mean()
        for tokens in rejected:
            loss = loss - torch.nn.functional.logsigmoid(0.5 * (chosen.sum() - tokens.sum()))
    return loss


def gradients_of(model: Any, likelihood: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    preference_loss(likelihood).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def unpadded(scores: ResponseScores, responses: Responses) -> list[list[Tensor]]:
    return [
        [scores.log_likelihood[b, k, : len(response)] for k, response in enumerate(row)]
        for b, row in enumerate(responses)
    ]


def new_case(family: str, attention: str | None = None, **settings: Any) -> Case:
    like = "llava_clip" if family == "llava_mistral" else family
    model = build(family, attention, spec=cached_family(like).spec, **settings)
    model = randomize_adapters(attach_lora(model, LoraSettings(r=4, alpha=8, dropout=0.0))).eval()
    (inputs, prompts), responses = prompts_of(like), new_responses()
    batch = Prompts(inputs, inputs["attention_mask"].sum(1))
    expected = [
        [likelihood_alone(model, prompt, response) for response in row]
        for prompt, row in zip(prompts, responses, strict=True)
    ]
    gradients = gradients_of(model, expected)
    return Case(model, batch, responses, [[e.detach() for e in row] for row in expected], gradients)


def assert_equal(scores: ResponseScores, case: Case) -> None:
    """Check scores against the case within 1e-5 (measured: 1e-6), and their shapes and masks."""
    lengths = [[len(r) for r in row] for row in case.responses]
    widest, longest = max(map(len, lengths)), max(map(max, lengths))
    assert scores.log_likelihood.shape == scores.tokens.shape == (3, widest, longest)
    assert scores.lengths.tolist() == [row + [0] * (widest - len(row)) for row in lengths]
    assert not scores.log_likelihood[~scores.tokens].any()
    for row, expected_row in zip(unpadded(scores, case.responses), case.expected, strict=True):
        for likelihood, expected in zip(row, expected_row, strict=True):
            assert torch.allclose(likelihood, expected, atol=1e-5, rtol=0)
    assert torch.equal(scores.total, scores.log_likelihood.sum(-1))


CASES = [*((family, "sdpa") for family in FOUR), ("llava_clip", "eager"), ("gemma3", "eager")]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> Case:
    family, attention = request.param
    new = new_case(family, attention)
    assert unwrap_peft(new.model).config.get_text_config()._attn_implementation == attention
    return new


@pytest.fixture
def checkpointing(case: Case, request: pytest.FixtureRequest) -> Iterator[bool]:
    if request.param:
        case.model.gradient_checkpointing_enable({"use_reentrant": False})
        case.model.train()
    yield request.param
    case.model.gradient_checkpointing_disable()
    case.model.eval()


@pytest.mark.parametrize(
    ("scoring", "checkpointing"),
    [("auto", False), ("shared", True), ("plain", False)],
    indirect=["checkpointing"],
    ids=["automatic", "shared-checkpointing", "plain"],
)
def test_likelihoods_and_gradients_are_those_of_each_response_alone(
    case: Case, scoring: Any, checkpointing: bool
) -> None:
    passes: list[int] = []
    before = {name: values.clone() for name, values in case.batch.inputs.items()}
    inner = unwrap_peft(case.model).get_decoder().layers[0].self_attn
    handle = inner.register_forward_pre_hook(lambda *_: passes.append(1))
    scores = score_responses(case.model, case.batch, case.responses, scoring)
    gradients = gradients_of(case.model, unpadded(scores, case.responses))
    handle.remove()
    assert len(passes) == (10 if scoring == "plain" else 2 if checkpointing else 1)

    assert_equal(scores, case)
    assert all(torch.equal(values, before[name]) for name, values in case.batch.inputs.items())
    assert not [m for m in unwrap_peft(case.model).modules() if m._forward_pre_hooks]
    assert len(gradients) == 2 * 2 * 7, "A and B in seven linear layers of each of two layers"
    largest = max(float(g.abs().max()) for g in case.gradients.values())
    for name, expected in case.gradients.items():
        assert expected.abs().max() > 1e-4 * largest, name
        assert torch.allclose(gradients[name], expected, atol=1e-5 * largest, rtol=0), name


def test_what_stands_behind_a_prompt_is_not_looked_at(case: Case) -> None:
    batch = case.batch
    shape = batch.inputs["input_ids"].shape
    behind = torch.arange(shape[1])[None] >= batch.lengths[:, None]
    filled = {"input_ids": 7, "attention_mask": 1, "token_type_ids": 1, "mm_token_type_ids": 0}
    written = {n: torch.where(behind, filled[n], v) for n, v in batch.inputs.items() if v.shape == shape}
    assert not torch.equal(written["input_ids"], batch.inputs["input_ids"])
    with torch.no_grad():
        for scoring in ("shared", "plain"):
            scores, expected = (
                score_responses(case.model, prompts, case.responses, scoring)  # type: ignore[arg-type]
                for prompts in (batch._replace(inputs={**batch.inputs, **written}), batch)
            )
            assert torch.equal(scores.log_likelihood, expected.log_likelihood)


@pytest.mark.parametrize("responses", [[[[5]], [], [[6]]], [[[5]], [[6], []], [[7]]], [[[5]], [[6]]]])
@pytest.mark.parametrize("scoring", ["auto", "shared", "plain"])
def test_no_response_no_token_and_too_few_are_refused(responses: Responses, scoring: Any) -> None:
    batch = Prompts({"input_ids": torch.ones(3, 4).long()}, torch.tensor([4, 3, 2]))
    with pytest.raises(ValueError, match="at least one"):
        score_responses(None, batch, responses, scoring)


# --- Models whose prefix cannot be shared ---


def _linear_attention() -> Case:
    case = new_case("llava_clip")
    # Only the configuration changes, so that the model still runs.
    unwrap_peft(case.model).config.text_config.layer_types = ["full_attention", "linear_attention"]
    return case


def _own_attention() -> Case:
    case = new_case("llava_clip", "sdpa")
    AttentionInterface.register("our_kernel", sdpa_attention_forward)
    AttentionMaskInterface.register("our_kernel", sdpa_mask)
    unwrap_peft(case.model).config.get_text_config()._attn_implementation = "our_kernel"
    return case


WINDOW = "rows are longer than the attention window of 8"
REFUSED = {
    "gemma3": (lambda: new_case("gemma3", "eager", window=8), WINDOW),
    "mistral": (lambda: new_case("llava_mistral", "sdpa", window=8), WINDOW),
    "layers": (_linear_attention, "LlavaForConditionalGeneration has linear_attention layers"),
    "attention": (_own_attention, "attention 'our_kernel' takes no custom mask"),
}


@pytest.fixture(params=REFUSED)
def refused(request: pytest.FixtureRequest) -> tuple[Case, str]:
    shared_prefix._warn_once.cache_clear()
    make, reason = REFUSED[request.param]
    return make(), reason


def test_a_prefix_that_cannot_be_shared_is_scored_plainly_and_logged_once_or_refused(
    refused: tuple[Case, str], caplog: pytest.LogCaptureFixture
) -> None:
    case, reason = refused
    caplog.set_level(logging.INFO, logger=shared_prefix.__name__)
    with torch.no_grad():
        scores = score_responses(case.model, case.batch, case.responses)
        assert_equal(scores, case)
        plain = score_responses(case.model, case.batch, case.responses, "plain")
        assert torch.equal(scores.log_likelihood, plain.log_likelihood)
        for fewer in (1, 2, 3):  # rows of other lengths
            score_responses(case.model, case.batch, [row[:fewer] for row in case.responses])
    (record,) = [r for r in caplog.records if r.name == shared_prefix.__name__]
    assert record.levelno == logging.WARNING
    assert re.search(reason, record.getMessage())
    assert re.match(reason, why_not_shared(case.model, 60) or "")
    with pytest.raises(ValueError, match=f"^the prefix cannot be shared: {reason}.*; use `scoring: plain`$"):
        score_responses(case.model, case.batch, case.responses, "shared")


@pytest.mark.parametrize("family", ["gemma3", "llava_mistral"])
def test_a_window_as_long_as_the_row_is_long_enough(family: str) -> None:
    row = pack(new_case(family).batch, new_responses()).inputs["input_ids"].shape[1]
    case = new_case(family, "eager", window=row)
    assert why_not_shared(case.model, row) is None
    assert "rows are longer" in str(why_not_shared(case.model, row + 1))
    with torch.no_grad():
        assert_equal(score_responses(case.model, case.batch, case.responses, "shared"), case)


# --- FlexAttention ---


def masks_of(case: Case, attention: str) -> list[Any]:
    """The mask that each layer of the language model gets in a packed row."""
    decoder = unwrap_peft(case.model).get_decoder()
    masks: list[Any] = []

    def record(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        masks.append(kwargs["attention_mask"])

    attentions = [layer.self_attn for layer in decoder.layers]
    handles = [a.register_forward_pre_hook(record, with_kwargs=True) for a in attentions]
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


def test_block_masks_are_the_dense_masks_and_score_alike(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_prefix, "BLOCK", 4)  # so that rows have several blocks
    with torch.compiler.set_stance("force_eager"):
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
    # The Trainer moves it to the GPU.
    model = load_base(BaseModel(str(tmp_path), attn_implementation=FLEX), "cuda")
    decoder = model.get_decoder()
    assert {layer.self_attn.config._attn_implementation for layer in decoder.layers} == {FLEX}
    assert model.config.vision_config._attn_implementation == "sdpa"


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FOUR)
def test_gradients_are_those_of_dense_masks(family: str, checkpointing: bool, cuda: torch.device) -> None:
    case = new_case(family)
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


# --- Packed rows ---

RESPONSE = st.lists(st.integers(1, 3), min_size=1, max_size=6)
PROMPT = st.lists(st.integers(4, 9), min_size=1, max_size=5)
QUERIES = st.lists(st.tuples(PROMPT, st.lists(RESPONSE, min_size=1, max_size=6)), min_size=1, max_size=3)
Queries = list[tuple[list[int], list[list[int]]]]


def packed_queries(queries: Queries) -> Packed:
    """Pack rows that have tokens behind the prompt and an input that is not text."""
    widest = max(len(prompt) for prompt, _ in queries) + 1
    rows = [prompt + [99] * (widest - len(prompt)) for prompt, _ in queries]
    inputs = {
        "input_ids": torch.tensor(rows),
        "attention_mask": torch.ones(len(rows), widest).long(),
        "token_type_ids": torch.full((len(rows), widest), 2),
        "pixel_values": torch.arange(float(len(rows) * widest)).view(len(rows), widest),
    }
    lengths = torch.tensor([len(prompt) for prompt, _ in queries])
    return pack(Prompts(inputs, lengths), [responses for _, responses in queries])


@given(QUERIES)
def test_packed_rows_hold_every_candidate_and_no_prediction_twice(queries: Queries) -> None:
    packed = packed_queries(queries)
    made = zip(*(x.tolist() for x in (packed.rows, packed.positions, packed.targets)), strict=True)
    assert len(set(made)) == len(packed.rows)
    ids, segment, shift = packed.inputs["input_ids"], packed.segment, packed.shift
    assert ids.shape == segment.shape == shift.shape
    position = torch.arange(ids.shape[1]) - shift
    assert torch.equal(packed.inputs["attention_mask"], (segment >= 0).long())
    assert not (ids[segment >= 0] == 99).any()
    longest = max(len(c) for _, r in queries for c in r)
    assert packed.predictions.shape[1:] == (max(len(r) for _, r in queries), longest)
    assert set(packed.predictions[packed.predictions >= 0].tolist()) == set(range(len(packed.targets)))
    for b, (prompt, responses) in enumerate(queries):
        first, *others = (prompt + response for response in responses)
        prefix = next(first[:n] for n in range(len(first), 0, -1) if all(o[:n] == first[:n] for o in others))
        assert ids[b, segment[b] == 0].tolist() == prefix
        assert position[b, segment[b] == 0].tolist() == list(range(len(prefix)))
        behind = ids.shape[1] - len(prompt)
        assert packed.inputs["token_type_ids"][b].tolist() == [2] * len(prompt) + [0] * behind
        for k, response in enumerate(responses):
            own = segment[b] == k + 1
            assert position[b, own].tolist() == [len(prefix) + i for i in range(int(own.sum()))]
            predictions = packed.predictions[b, k]
            assert (predictions >= 0).tolist() == [t < len(response) for t in range(len(predictions))]
            predictions = predictions[: len(response)]
            assert packed.targets[predictions].tolist() == response
            assert packed.rows[predictions].tolist() == [b] * len(response)
            columns = packed.positions[predictions]
            assert set(segment[b, columns].tolist()) <= {0, k + 1}, "in the prefix or in its own suffix"
            assert position[b, columns].tolist() == [len(prompt) + t - 1 for t in range(len(response))]
            assert ids[b, columns].tolist() == [prompt[-1], *response[:-1]]
    widest = max(len(prompt) for prompt, _ in queries) + 1
    assert packed.inputs["pixel_values"].shape == (len(queries), widest), "unchanged"
