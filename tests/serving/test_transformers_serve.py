"""`transformers serve` answers an evaluation as the model itself does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from ..endpoint.test_evaluation import lines, metrics
from .served import serving, transformers_serve


def test_transformers_serves_the_merged_demo(
    merged: str, evaluate_served: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    with serving(transformers_serve(merged), tmp_path / "log") as url:
        _, served = evaluate_served(merged, url, merged)
    assert json.loads((served / "notes.json").read_text()) == dict.fromkeys(
        ("expected", "likelihood"), "the server gives no log-probabilities (logprobs)"
    )
    assert {(line["expected"], line["likelihood"]) for line in lines(served)} == {(None, None)}
    assert metrics(served)["ece@expected"] is None
