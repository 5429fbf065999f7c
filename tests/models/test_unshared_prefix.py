"""Models whose prefix cannot be shared: the reason is logged or raised, and responses are scored separately."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from vlm_calibration.models import shared_prefix
from vlm_calibration.models.forward import unwrap_peft
from vlm_calibration.models.shared_prefix import Prompts, pack, score_responses, why_not_shared

from .families import build, collated, new_prompts
from .prefix_cases import Case, assert_equal, new_case, new_responses


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


@pytest.mark.parametrize("attention", ["flash_attention_2", "paged|sdpa"])
def test_attention_without_a_mask_of_its_own_is_refused(attention: str) -> None:
    model = build("qwen2_5_vl", "sdpa")
    assert why_not_shared(model, 10_000) is None
    model.config.get_text_config()._attn_implementation = attention
    assert f"attention {attention!r} takes no custom mask" in str(why_not_shared(model, 5))
