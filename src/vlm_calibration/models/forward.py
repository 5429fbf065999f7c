"""A forward that evaluates the output head only where a token is predicted that matters.

With a vocabulary of 150k tokens the logits of a whole conversation are by far its largest tensor, and all but the dozen at
the response are thrown away. A hook in front of the head keeps just those rows, so whatever a family does behind the head
(scaling, soft-capping) stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from vlm_calibration.losses.sequence import IGNORE


class LabelledLogits(NamedTuple):
    """logits float [N, V] at the N positions that predict a label, targets int64 [N], and their rows int64 [N]."""

    logits: Tensor
    targets: Tensor
    rows: Tensor


def labelled_logits(model: Any, inputs: Mapping[str, Tensor], labels: Tensor) -> LabelledLogits:
    """Logits that predict the labelled tokens.

    Args:
        model: a transformers or peft model. inputs: what its forward takes.
        labels: int64 [B, L], IGNORE where there is no label; label t is predicted at position t - 1.

    Raises:
        ValueError: the first token of a sequence has a label: nothing predicts it.
    """
    if bool((labels[:, 0] != IGNORE).any()):
        raise ValueError(
            "the first token of a sequence has a label, but nothing comes before it to predict it"
        )
    predicted = labels[:, 1:] != IGNORE
    rows, positions = predicted.nonzero(as_tuple=True)
    return LabelledLogits(logits_at(model, inputs, rows, positions), labels[:, 1:][predicted], rows)


def logits_at(model: Any, inputs: Mapping[str, Tensor], rows: Tensor, positions: Tensor) -> Tensor:
    """Logits at N places of a batch, float [N, V].

    Args:
        model: a transformers or peft model. inputs: what its forward takes.
        rows, positions: int64 [N], the places; one may come several times.
    """

    def select(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][rows, positions][None], *args[1:])

    handle = output_head(model).register_forward_pre_hook(select)
    try:
        return model(**inputs, use_cache=False).logits[0]
    finally:
        handle.remove()


def unwrap_peft(model: Any) -> Any:
    """The transformers model below peft's wrappers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def output_head(model: Any) -> nn.Module:
    """The module that maps hidden states to logits."""
    return unwrap_peft(model).get_output_embeddings()
