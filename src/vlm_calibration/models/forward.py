"""A forward pass that evaluates the output head only at selected positions.

With a vocabulary of 150k tokens the logits of a conversation are by far its largest tensor, and only the dozen at the response
are needed. A pre-hook of the head selects those hidden states, so that a family's operations behind the head (scaling,
soft-capping) still apply.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from vlm_calibration.losses.sequence import IGNORE


class LabelledLogits(NamedTuple):
    """Logits at the N positions that predict a label.

    Attributes:
        logits: float [N, V].
        targets: int64 [N], the labels.
        rows: int64 [N], their rows in the batch.
    """

    logits: Tensor
    targets: Tensor
    rows: Tensor


def labelled_logits(model: Any, inputs: Mapping[str, Tensor], labels: Tensor) -> LabelledLogits:
    """Logits that predict the labelled tokens.

    Args:
        model: a transformers or peft model.
        inputs: arguments of its forward.
        labels: int64 [B, L], IGNORE where there is no label; label t is predicted at position t - 1.

    Raises:
        ValueError: the first token of a sequence has a label, which no position predicts.
    """
    if bool((labels[:, 0] != IGNORE).any()):
        raise ValueError("the first token of a sequence has a label, but no earlier position predicts it")
    predicted = labels[:, 1:] != IGNORE
    rows, positions = predicted.nonzero(as_tuple=True)
    return LabelledLogits(logits_at(model, inputs, rows, positions), labels[:, 1:][predicted], rows)


def logits_at(model: Any, inputs: Mapping[str, Tensor], rows: Tensor, positions: Tensor) -> Tensor:
    """Logits at N positions of a batch, float [N, V].

    Args:
        model: a transformers or peft model.
        inputs: arguments of its forward.
        rows: int64 [N]; positions may repeat.
        positions: int64 [N].
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
