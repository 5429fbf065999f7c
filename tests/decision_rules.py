"""A decision rule beside an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlm_calibration.estimators.decision import DecisionRule, write_rule
from vlm_calibration.models.base import DEMO_MODEL, adapter_weights_digest
from vlm_calibration.text.confidence import DEFAULT_TEMPLATE


def write_decision_rule(folder: Path, threshold: float | None = 0.5, **changed: Any) -> DecisionRule:
    """Write a rule of the stated confidence for the adapter in a folder, with some fields changed."""
    rule: dict[str, Any] = {"base": str(DEMO_MODEL), "weights": adapter_weights_digest(folder)}
    rule |= {"quantization": "none", "dtype": "auto", "prompt": DEFAULT_TEMPLATE, "estimator": "verbalized"}
    rule |= {"by": None, "groups": {"": {"threshold": threshold}}, "limits": {}, "correction": ""}
    rule |= {"guarantee": "At most 5% ...", "assumptions": [], "answers": {}}
    written = DecisionRule(**{**rule, **changed})
    write_rule(written, folder)
    return written
