"""Packed rows against one unpadded forward for each response, in every family; and how responses are packed."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as token_models
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from vlm_calibration.models import shared_prefix
from vlm_calibration.models.adapters import LoraSettings, attach_lora
from vlm_calibration.models.forward import unwrap_peft
from vlm_calibration.models.shared_prefix import (
    Packed,
    Prompts,
    ResponseScores,
    pack,
    score_responses,
    why_not_shared,
)
from vlm_calibration.text.confidence import render_response

from .families import FAMILIES, Prompt, build, collated, new_prompts, randomize_adapters, words

Responses = list[list[list[int]]]


def new_responses(seed: int = 11) -> Responses:
    """For three queries: ten that differ late, one, and four that differ at once."""
    generator = torch.Generator().manual_seed(seed)
    common = words(generator, 3)
    late = [[*common, 20 + k, *words(generator, k % 4)] for k in range(8)]
    # One ends where the others differ, and one goes on like another for a while.
    late += [common, [*late[3][:-1], 19]]
    at_once = [[50 + k, *words(generator, k)] for k in (3, 0, 5, 1)]
    return [late, [words(generator, 6)], at_once]


# --- Against plain forwards -------------------------------------------------------------------------------------


@dataclass
class Case:
    """A model and what one forward for each response says. expected: of each query's responses, [T] each."""

    model: Any
    prompts: list[Prompt]
    responses: Responses
    expected: list[list[Tensor]]
    gradients: dict[str, Tensor]

    @property
    def batch(self) -> Prompts:
        """The prompts as one padded batch."""
        inputs = collated(self.prompts, self.model.dtype)
        return Prompts(inputs, torch.tensor([len(p.ids) for p in self.prompts]))


def likelihood_alone(model: Any, prompt: Prompt, response: Sequence[int]) -> Tensor:
    """log p of each token of a response, [T], from one forward over the whole sequence and nothing else."""
    image = {
        name: v.to(model.dtype) if v.is_floating_point() else v  # as bfloat16 models want it
        for name, v in prompt.image.items()
    }
    logits = model(**prompt.text_inputs(response), **image, use_cache=False).logits[0]
    likelihood = torch.log_softmax(logits.float(), dim=-1)
    first = len(prompt.ids)
    return torch.stack([likelihood[first + t - 1, token] for t, token in enumerate(response)])


def preference_loss(likelihood: Sequence[Sequence[Tensor]]) -> Tensor:
    """As DPO, with a likelihood term in which the tokens that all responses share do not cancel."""
    loss = torch.zeros(())
    for chosen, *rejected in likelihood:
        loss = loss - chosen.mean()
        for other in rejected:
            loss = loss - torch.nn.functional.logsigmoid(0.5 * (chosen.sum() - other.sum()))
    return loss


def gradients_of(model: Any, likelihood: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    preference_loss(likelihood).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def unpadded(found: ResponseScores, responses: Responses) -> list[list[Tensor]]:
    return [
        [found.log_likelihood[b, k, : len(response)] for k, response in enumerate(row)]
        for b, row in enumerate(responses)
    ]


def new_case(family: str, attention: str | None = None, **settings: Any) -> Case:
    model = randomize_adapters(
        attach_lora(build(family, attention, **settings), LoraSettings(r=4, alpha=8, dropout=0.0))
    ).eval()
    prompts, responses = new_prompts(family), new_responses()
    expected = [
        [likelihood_alone(model, prompt, response) for response in row]
        for prompt, row in zip(prompts, responses, strict=True)
    ]
    gradients = gradients_of(model, expected)
    return Case(model, prompts, responses, [[e.detach() for e in row] for row in expected], gradients)


# Gemma 2, the text model of PaliGemma 2, refuses sdpa, which has no soft-capping: by default transformers gives its tower
# sdpa and its language model eager attention.
CASES = [
    (family, attention)
    for family in FAMILIES
    for attention in (("eager", None) if family == "paligemma2" else ("eager", "sdpa"))
]


@pytest.fixture(scope="module", params=CASES, ids=lambda c: f"{c[0]}-{c[1]}")
def case(request: pytest.FixtureRequest) -> Case:
    family, attention = request.param
    found = new_case(family, attention)
    assert unwrap_peft(found.model).config.get_text_config()._attn_implementation == (attention or "eager")
    return found


@pytest.fixture
def checkpointing(case: Case, request: pytest.FixtureRequest) -> Iterator[bool]:
    if request.param:
        case.model.gradient_checkpointing_enable({"use_reentrant": False})
        case.model.train()
    yield request.param
    case.model.gradient_checkpointing_disable()
    case.model.eval()


def assert_equal(found: ResponseScores, case: Case) -> None:
    """Within 1e-5 (measured: 1e-6), and shaped and masked as documented."""
    lengths = [[len(r) for r in row] for row in case.responses]
    most, longest = max(map(len, lengths)), max(map(max, lengths))
    assert found.log_likelihood.shape == found.tokens.shape == (3, most, longest)
    assert found.lengths.tolist() == [row + [0] * (most - len(row)) for row in lengths]
    assert not found.log_likelihood[~found.tokens].any()
    for mine, theirs in zip(unpadded(found, case.responses), case.expected, strict=True):
        for likelihood, expected in zip(mine, theirs, strict=True):
            assert torch.allclose(likelihood, expected, atol=1e-5, rtol=0)
    assert torch.equal(found.total, found.log_likelihood.sum(-1))


@pytest.mark.parametrize(
    ("scoring", "checkpointing"),
    [("shared", False), ("shared", True), ("plain", False)],
    indirect=["checkpointing"],
    ids=["shared", "shared-checkpointing", "plain"],
)
def test_likelihoods_and_gradients_are_those_of_each_response_alone(
    case: Case, scoring: Any, checkpointing: bool
) -> None:
    passes: list[int] = []
    inner = unwrap_peft(case.model).get_decoder().layers[0].self_attn
    handle = inner.register_forward_pre_hook(lambda *_: passes.append(1))
    found = score_responses(case.model, case.batch, case.responses, scoring)
    gradients = gradients_of(case.model, unpadded(found, case.responses))
    handle.remove()
    assert len(passes) == (10 if scoring == "plain" else 2 if checkpointing else 1)

    assert_equal(found, case)
    assert len(gradients) == 2 * 2 * 7, "A and B in seven linear layers of each of two layers"
    largest = max(float(g.abs().max()) for g in case.gradients.values())
    for name, expected in case.gradients.items():
        assert expected.abs().max() > 1e-4 * largest, name
        assert torch.allclose(gradients[name], expected, atol=1e-5 * largest, rtol=0), name


def test_automatic_scoring_packs(case: Case) -> None:
    with torch.no_grad():
        found, packed = (
            score_responses(case.model, case.batch, case.responses, s) for s in ("auto", "shared")
        )
    assert torch.equal(found.log_likelihood, packed.log_likelihood)


def test_what_stands_behind_a_prompt_is_not_looked_at(case: Case) -> None:
    batch = case.batch
    shape = batch.inputs["input_ids"].shape
    behind = torch.arange(shape[1])[None] >= batch.lengths[:, None]
    filled = {"input_ids": 7, "attention_mask": 1, "token_type_ids": 1, "mm_token_type_ids": 0}
    written = {n: torch.where(behind, filled[n], v) for n, v in batch.inputs.items() if v.shape == shape}
    assert not torch.equal(written["input_ids"], batch.inputs["input_ids"])
    with torch.no_grad():
        for scoring in ("shared", "plain"):
            found, expected = (
                score_responses(case.model, prompts, case.responses, scoring)  # type: ignore[arg-type]
                for prompts in (batch._replace(inputs={**batch.inputs, **written}), batch)
            )
            assert torch.equal(found.log_likelihood, expected.log_likelihood)


def _joined(likelihood: Sequence[Sequence[Tensor]]) -> Tensor:
    return torch.cat([tokens.detach() for row in likelihood for tokens in row])


def _flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradient.float().flatten() for gradient in gradients.values()])


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_in_bfloat16_packed_is_as_near_to_float32_as_plain_is(family: str, attention: str | None) -> None:
    """Likelihoods and gradients, under gradient checkpointing as trained with.

    Measured, at most. Likelihoods: packed against plain 0.004 (eager) and 0.017 (sdpa), either against float32 0.058, with a
    root mean square of 0.014. Gradients, as a share of their norm: packed against plain 0.011, either against float32 0.036.
    """
    case, exact = new_case(family, attention, dtype=torch.bfloat16), new_case(family, attention)
    exact.model.load_state_dict(case.model.state_dict())
    expected = [
        [likelihood_alone(exact.model, prompt, response) for response in row]
        for prompt, row in zip(case.prompts, case.responses, strict=True)
    ]
    right = _flat(gradients_of(exact.model, expected))

    case.model.gradient_checkpointing_enable({"use_reentrant": False})
    case.model.train()
    scores = unpadded(score_responses(case.model, case.batch, case.responses, "shared"), case.responses)
    gradients, plain_gradients = _flat(gradients_of(case.model, scores)), _flat(case.gradients)
    packed, plain, truth = (_joined(rows) for rows in (scores, case.expected, expected))

    assert packed.dtype == torch.float32
    assert torch.allclose(packed, plain, atol=0.03 if attention == "sdpa" else 0.01, rtol=0)
    assert (packed - truth).abs().max() < 0.1
    assert (packed - truth).square().mean() < 1.5 * (plain - truth).square().mean()
    assert (gradients - plain_gradients).norm() < 0.02 * right.norm()
    assert (gradients - right).norm() < 1.2 * (plain_gradients - right).norm()


# --- Where a prefix cannot be shared ----------------------------------------------------------------------------


def _linear_attention() -> Case:
    case = new_case("llava_clip")
    # Set behind the model's back, so that there is still something to run.
    unwrap_peft(case.model).config.text_config.layer_types = ["full_attention", "linear_attention"]
    return case


def _own_attention() -> Case:
    case = new_case("llava_siglip", "sdpa")
    AttentionInterface.register("our_kernel", sdpa_attention_forward)
    AttentionMaskInterface.register("our_kernel", sdpa_mask)
    unwrap_peft(case.model).config.get_text_config()._attn_implementation = "our_kernel"
    return case


WINDOW = r"a row of \d+ tokens is longer than the attention window of 8"
REFUSED = {
    "gemma3": (lambda: new_case("gemma3", "eager", window=8), WINDOW),
    "gemma3-sdpa": (lambda: new_case("gemma3", "sdpa", window=8), WINDOW),
    "mistral": (lambda: new_case("llava_mistral", "sdpa", window=8), WINDOW),
    "paligemma2": (lambda: new_case("paligemma2", "eager", window=8), WINDOW),
    "layers": (_linear_attention, "LlavaForConditionalGeneration has linear_attention layers"),
    "attention": (_own_attention, "attention 'our_kernel' takes no mask"),
}


@pytest.fixture(params=REFUSED)
def refused(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Case, str]:
    monkeypatch.setattr(shared_prefix, "_said", set())
    make, reason = REFUSED[request.param]
    return make(), reason


def test_a_prefix_that_cannot_be_shared_is_scored_plainly_and_said_once(
    refused: tuple[Case, str], caplog: pytest.LogCaptureFixture
) -> None:
    case, reason = refused
    caplog.set_level(logging.INFO, logger=shared_prefix.__name__)
    with torch.no_grad():
        found = score_responses(case.model, case.batch, case.responses)
        assert_equal(found, case)
        plain = score_responses(case.model, case.batch, case.responses, "plain")
        assert torch.equal(found.log_likelihood, plain.log_likelihood)
        for fewer in (1, 2, 3):  # rows of other lengths
            score_responses(case.model, case.batch, [row[:fewer] for row in case.responses])
    (record,) = [r for r in caplog.records if r.name == shared_prefix.__name__]
    assert record.levelno == logging.WARNING
    assert re.search(reason, record.getMessage())


def test_a_prefix_that_cannot_be_shared_is_refused_if_it_has_to_be(refused: tuple[Case, str]) -> None:
    case, reason = refused
    assert re.match(reason, why_not_shared(case.model, 60) or "")
    with pytest.raises(ValueError, match=f"^the prefix cannot be shared: {reason}.*; use `scoring: plain`$"):
        score_responses(case.model, case.batch, case.responses, "shared")


def test_each_reason_is_said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_prefix, "_said", set())
    for make, _ in (REFUSED["layers"], REFUSED["mistral"], REFUSED["attention"], REFUSED["mistral"]):
        case = make()
        with torch.no_grad():
            score_responses(case.model, case.batch, case.responses)
    said = [r.getMessage() for r in caplog.records if r.name == shared_prefix.__name__]
    assert len(said) == 3


@pytest.mark.parametrize("family", ["gemma3", "llava_mistral", "paligemma2"])
def test_a_window_as_long_as_the_row_is_long_enough(family: str) -> None:
    prompts = new_prompts(family)
    lengths = torch.tensor([len(p.ids) for p in prompts])
    row = pack(Prompts(collated(prompts), lengths), new_responses()).inputs["input_ids"].shape[1]
    case = new_case(family, "eager", window=row)
    assert why_not_shared(case.model, row) is None
    assert "a row of" in str(why_not_shared(case.model, row + 1))
    with torch.no_grad():
        assert_equal(score_responses(case.model, case.batch, case.responses, "shared"), case)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention", "paged|sdpa"])
def test_attention_without_a_mask_of_its_own_is_refused(attention: str) -> None:
    model = build("qwen2_5_vl", "sdpa")
    assert why_not_shared(model, 10_000) is None
    model.config.get_text_config()._attn_implementation = attention
    assert f"attention {attention!r} takes no mask" in str(why_not_shared(model, 5))


@pytest.mark.parametrize(
    "responses",
    [
        [[[5]], [], [[6]]],
        [[[5]], [[6], []], [[7]]],
        [[[5]], [[6]]],
        [[[5]], [[6]], [[7]], [[8]]],
        [],
    ],
    ids=["no response", "no token", "too few", "too many", "none"],
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


# --- Packing ----------------------------------------------------------------------------------------------------


def shared_by_all(sequences: Sequence[list[int]]) -> list[int]:
    """The longest sequence with which all begin."""
    return max(
        (
            sequences[0][:n]
            for n in range(len(sequences[0]) + 1)
            if all(s[:n] == sequences[0][:n] for s in sequences)
        ),
        key=len,
    )


def restored(packed: Packed, lengths: Sequence[int]) -> list[list[list[int]]]:
    """Each candidate's whole sequence, as the packed row holds it: the prefix, its own suffix, and its last target."""
    found = []
    for row, (ids, segment, length) in enumerate(
        zip(packed.inputs["input_ids"], packed.segment, lengths, strict=True)
    ):
        found.append([])
        shared = int((segment == 0).sum()) - length
        for k, which in enumerate(packed.which[row], start=1):
            targets = packed.targets[which[which >= 0]].tolist()
            if not targets:
                continue
            sequence = ids[(segment == 0) | (segment == k)].tolist()
            # What a row leaves out is the last token of each suffix, which predicts nothing.
            found[-1].append(sequence + (targets[-1:] if len(targets) > shared else []))
    return found


def _trained_tokenizer(texts: Sequence[str], one_token_a_digit: bool) -> Tokenizer:
    tokenizer = Tokenizer(token_models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if one_token_a_digit:
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    else:
        tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(list(texts) * 3, trainer)
    return tokenizer


ALL_LEVELS = tuple(range(0, 101, 10))


@pytest.mark.parametrize("one_token_a_digit", [True, False], ids=["digits", "numbers"])
@pytest.mark.parametrize(
    ("levels", "shared_by_digits", "shared_by_numbers"),
    [
        (ALL_LEVELS, "Yes. Confidence: ", "Yes. Confidence:"),
        ((80, 100), "Yes. Confidence: ", "Yes. Confidence:"),
        ((100, 10), "Yes. Confidence: 10", "Yes. Confidence:"),
        ((30,), "Yes. Confidence: 30%", "Yes. Confidence: 30%"),
    ],
    ids=["all", "80-100", "100-10", "30"],
)
def test_stated_percentages_part_at_a_token(
    levels: tuple[int, ...], shared_by_digits: str, shared_by_numbers: str, one_token_a_digit: bool
) -> None:
    prompt = "Is there a dog?\n"
    texts = [render_response("Yes", level / 100) for level in levels]
    tokenizer = _trained_tokenizer(
        [prompt + render_response("Yes", level / 100) for level in ALL_LEVELS], one_token_a_digit
    )
    assert len(tokenizer.encode("100").ids) == (
        3 if one_token_a_digit else 2
    )  # " 100" is the word it has learnt
    assert len(tokenizer.encode(" 100").ids) == (4 if one_token_a_digit else 1)

    begin = tokenizer.encode(prompt).ids
    sequences = [tokenizer.encode(prompt + text).ids for text in texts]
    assert all(ids[: len(begin)] == begin for ids in sequences)
    inputs = {"input_ids": torch.tensor([begin]), "attention_mask": torch.ones(1, len(begin)).long()}
    packed = pack(Prompts(inputs, torch.tensor([len(begin)])), [[ids[len(begin) :] for ids in sequences]])

    prefix = packed.inputs["input_ids"][packed.segment == 0].tolist()
    assert prefix == shared_by_all(sequences), "the tokens that all share, and no fewer"
    shared = shared_by_digits if one_token_a_digit else shared_by_numbers
    assert tokenizer.decode(prefix) == prompt + shared
    (found,) = restored(packed, [len(begin)])
    assert found == sequences
    assert [tokenizer.decode(ids) for ids in found] == [prompt + text for text in texts]


RESPONSE = st.lists(st.integers(1, 3), min_size=1, max_size=6)
QUERY = st.tuples(
    st.lists(st.integers(4, 9), min_size=1, max_size=5), st.lists(RESPONSE, min_size=1, max_size=6)
)
QUERIES = st.lists(QUERY, min_size=1, max_size=3)
Queries = list[tuple[list[int], list[list[int]]]]


def packed_queries(queries: Queries) -> Packed:
    """Rows with something behind the prompt, and with an input that is none of text."""
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
def test_packed_rows_hold_every_candidate(queries: Queries) -> None:
    packed = packed_queries(queries)
    ids, segment, shift = packed.inputs["input_ids"], packed.segment, packed.shift
    assert ids.shape == segment.shape == shift.shape
    position = torch.arange(ids.shape[1]) - shift
    wanted = [[prompt + response for response in responses] for prompt, responses in queries]
    assert restored(packed, [len(prompt) for prompt, _ in queries]) == wanted
    assert torch.equal(packed.inputs["attention_mask"], (segment >= 0).long())
    assert not (ids[segment >= 0] == 99).any()
    assert packed.which.shape[1:] == (
        max(len(r) for _, r in queries),
        max(len(c) for _, r in queries for c in r),
    )
    assert sorted(set(packed.which[packed.which >= 0].tolist())) == list(range(len(packed.targets)))
    for b, (prompt, responses) in enumerate(queries):
        prefix = shared_by_all([prompt + r for r in responses])
        assert ids[b, segment[b] == 0].tolist() == prefix
        assert position[b, segment[b] == 0].tolist() == list(range(len(prefix)))
        assert packed.inputs["token_type_ids"][b].tolist() == [2] * len(prompt) + [0] * (
            ids.shape[1] - len(prompt)
        )
        for k, response in enumerate(responses):
            own = segment[b] == k + 1
            assert position[b, own].tolist() == [len(prefix) + i for i in range(int(own.sum()))]
            which = packed.which[b, k]
            assert (which >= 0).tolist() == [t < len(response) for t in range(len(which))]
            which = which[: len(response)]
            assert packed.targets[which].tolist() == response
            assert packed.rows[which].tolist() == [b] * len(response)
            made_at = packed.positions[which]
            assert set(segment[b, made_at].tolist()) <= {0, k + 1}, "in the prefix or in its own suffix"
            assert position[b, made_at].tolist() == [len(prompt) + t - 1 for t in range(len(response))]
            assert ids[b, made_at].tolist() == [prompt[-1], *response[:-1]]
    widest = max(len(prompt) for prompt, _ in queries) + 1
    assert packed.inputs["pixel_values"].shape == (len(queries), widest), "as it was"


@given(QUERIES)
def test_no_prediction_is_made_twice(queries: Queries) -> None:
    packed = packed_queries(queries)
    predictions = list(
        zip(*(x.tolist() for x in (packed.rows, packed.positions, packed.targets)), strict=True)
    )
    assert len(set(predictions)) == len(predictions)
