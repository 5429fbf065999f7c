"""Log-likelihoods and gradients of packed rows against one unpadded forward per response; models whose prefix cannot be shared."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from vlm_calibration.models import shared_prefix
from vlm_calibration.models.forward import unwrap_peft
from vlm_calibration.models.shared_prefix import Packed, Prompts, pack, score_responses, why_not_shared

from .families import FOUR, build, collated, new_prompts
from .prefix_cases import (
    Case,
    Responses,
    assert_equal,
    gradients_of,
    likelihood_alone,
    new_case,
    new_responses,
    unpadded,
)

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
    inner = unwrap_peft(case.model).get_decoder().layers[0].self_attn
    handle = inner.register_forward_pre_hook(lambda *_: passes.append(1))
    scores = score_responses(case.model, case.batch, case.responses, scoring)
    gradients = gradients_of(case.model, unpadded(scores, case.responses))
    handle.remove()
    assert len(passes) == (10 if scoring == "plain" else 2 if checkpointing else 1)

    assert_equal(scores, case)
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


def _joined(likelihood: Sequence[Sequence[Tensor]]) -> Tensor:
    return torch.cat([tokens.detach() for row in likelihood for tokens in row])


def _flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradient.float().flatten() for gradient in gradients.values()])


@pytest.mark.parametrize(
    ("family", "attention"), [("llava_clip", "eager"), ("qwen2_5_vl", "sdpa"), ("gemma3", "sdpa")]
)
def test_in_bfloat16_packed_is_as_near_to_float32_as_plain_is(family: str, attention: str) -> None:
    """Log-likelihoods and gradients under gradient checkpointing, as in training.

    Measured maxima. Log-likelihoods: packed against plain 0.004 (eager) and 0.017 (sdpa), both against float32 0.058 with a
    root mean square of 0.014. Gradients, relative to their norm: packed against plain 0.011, both against float32 0.036.
    """
    case, exact = new_case(family, attention, dtype=torch.bfloat16), new_case(family, attention)
    exact.model.load_state_dict(case.model.state_dict())
    expected = [
        [likelihood_alone(exact.model, prompt, response) for response in row]
        for prompt, row in zip(case.prompts, case.responses, strict=True)
    ]
    exact_gradients = _flat(gradients_of(exact.model, expected))

    case.model.gradient_checkpointing_enable({"use_reentrant": False})
    case.model.train()
    scores = unpadded(score_responses(case.model, case.batch, case.responses, "shared"), case.responses)
    gradients, plain_gradients = _flat(gradients_of(case.model, scores)), _flat(case.gradients)
    packed, plain, truth = (_joined(rows) for rows in (scores, case.expected, expected))

    assert packed.dtype == torch.float32
    assert torch.allclose(packed, plain, atol=0.03 if attention == "sdpa" else 0.01, rtol=0)
    assert (packed - truth).abs().max() < 0.1
    assert (packed - truth).square().mean() < 1.5 * (plain - truth).square().mean()
    assert (gradients - plain_gradients).norm() < 0.02 * exact_gradients.norm()
    assert (gradients - exact_gradients).norm() < 1.2 * (plain_gradients - exact_gradients).norm()


@pytest.mark.parametrize(
    "responses",
    [
        [[[5]], [], [[6]]],
        [[[5]], [[6], []], [[7]]],
        [[[5]], [[6]]],
    ],
    ids=["no response", "no token", "too few"],
)
@pytest.mark.parametrize("scoring", ["auto", "shared", "plain"])
def test_empty_responses_are_refused(responses: Responses, scoring: Any) -> None:
    batch = Prompts({"input_ids": torch.ones(3, 4).long()}, torch.tensor([4, 3, 2]))
    with pytest.raises(ValueError, match="at least one"):
        score_responses(None, batch, responses, scoring)


def test_hooks_are_gone_and_inputs_untouched_even_after_an_error() -> None:
    case = new_case("gemma3", "sdpa")
    base, batch = unwrap_peft(case.model), case.batch
    before = {name: values.clone() for name, values in batch.inputs.items()}
    with torch.no_grad():
        plain = base(**before, use_cache=False).logits
        score_responses(case.model, batch, case.responses, "shared")
        with pytest.raises((RuntimeError, ValueError)):
            broken = {**batch.inputs, "pixel_values": torch.zeros(1, 3, 7, 7)}
            score_responses(case.model, batch._replace(inputs=broken), case.responses, "shared")
        for module in base.modules():
            assert not module._forward_pre_hooks
        assert torch.equal(base(**before, use_cache=False).logits, plain)
    assert before.keys() == batch.inputs.keys()
    for name, values in batch.inputs.items():
        assert torch.equal(values, before[name])


# --- Models whose prefix cannot be shared ----------------------------------------------------------------------------


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


def test_each_reason_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    shared_prefix._warn_once.cache_clear()
    for make, _ in (REFUSED["layers"], REFUSED["mistral"], REFUSED["attention"], REFUSED["mistral"]):
        case = make()
        with torch.no_grad():
            score_responses(case.model, case.batch, case.responses)
    messages = [r.getMessage() for r in caplog.records if r.name == shared_prefix.__name__]
    assert len(messages) == 3


@pytest.mark.parametrize("family", ["gemma3", "llava_mistral"])
def test_a_window_as_long_as_the_row_is_long_enough(family: str) -> None:
    prompts = new_prompts(family)
    lengths = torch.tensor([len(p.ids) for p in prompts])
    row = pack(Prompts(collated(prompts), lengths), new_responses()).inputs["input_ids"].shape[1]
    case = new_case(family, "eager", window=row)
    assert why_not_shared(case.model, row) is None
    assert "rows are longer" in str(why_not_shared(case.model, row + 1))
    with torch.no_grad():
        assert_equal(score_responses(case.model, case.batch, case.responses, "shared"), case)


# --- Packed rows -----------------------------------------------------------------------------------------------------


RESPONSE = st.lists(st.integers(1, 3), min_size=1, max_size=6)
QUERY = st.tuples(
    st.lists(st.integers(4, 9), min_size=1, max_size=5), st.lists(RESPONSE, min_size=1, max_size=6)
)
QUERIES = st.lists(QUERY, min_size=1, max_size=3)
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
    assert packed.predictions.shape[1:] == (
        max(len(r) for _, r in queries),
        max(len(c) for _, r in queries for c in r),
    )
    assert sorted(set(packed.predictions[packed.predictions >= 0].tolist())) == list(
        range(len(packed.targets))
    )
    for b, (prompt, responses) in enumerate(queries):
        first, *others = (prompt + response for response in responses)
        prefix = next(first[:n] for n in range(len(first), 0, -1) if all(o[:n] == first[:n] for o in others))
        assert ids[b, segment[b] == 0].tolist() == prefix
        assert position[b, segment[b] == 0].tolist() == list(range(len(prefix)))
        assert packed.inputs["token_type_ids"][b].tolist() == [2] * len(prompt) + [0] * (
            ids.shape[1] - len(prompt)
        )
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


@pytest.mark.parametrize("attention", ["flash_attention_2", "paged|sdpa"])
def test_attention_without_a_mask_of_its_own_is_refused(attention: str) -> None:
    model = build("qwen2_5_vl", "sdpa")
    assert why_not_shared(model, 10_000) is None
    model.config.get_text_config()._attn_implementation = attention
    assert f"attention {attention!r} takes no custom mask" in str(why_not_shared(model, 5))
