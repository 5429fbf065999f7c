"""Models with prompts and responses, and the log-likelihoods and gradients of one unpadded forward per response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlm_calibration.models.adapters import LoraSettings, attach_lora
from vlm_calibration.models.shared_prefix import Prompts, ResponseScores

from .families import Prompt, build, collated, new_prompts, randomize_adapters, words

Responses = list[list[list[int]]]


def new_responses(seed: int = 11) -> Responses:
    """Responses to three queries: ten that differ late, one, and four that differ in the first token."""
    generator = torch.Generator().manual_seed(seed)
    common = words(generator, 3)
    late = [[*common, 20 + k, *words(generator, k % 4)] for k in range(8)]
    # One ends where the others differ, and one shares a longer prefix with another.
    late += [common, [*late[3][:-1], 19]]
    at_once = [[50 + k, *words(generator, k)] for k in (3, 0, 5, 1)]
    return [late, [words(generator, 6)], at_once]


@dataclass
class Case:
    """A model with the results of one forward per response.

    Attributes:
        model: an adapted model in eval mode.
        prompts: three prompts.
        responses: the responses to each.
        expected: log-likelihoods of each response's tokens, float32 [T].
        gradients: of `preference_loss`, by parameter.
    """

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
    """Log-likelihood of each token of a response, float32 [T], from one unpadded forward over the sequence."""
    image = {
        name: v.to(model.dtype) if v.is_floating_point() else v  # bfloat16 models need bfloat16 images
        for name, v in prompt.image.items()
    }
    logits = model(**prompt.text_inputs(response), **image, use_cache=False).logits[0]
    likelihood = torch.log_softmax(logits.float(), dim=-1)
    first = len(prompt.ids)
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
