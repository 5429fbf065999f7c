"""RLAIF-V (Yu et al., arXiv 2405.17220; CC BY-NC 4.0): open questions with a preferred and a rejected response."""

from __future__ import annotations

from vlm_calibration.data.convert.hf import hf
from vlm_calibration.data.convert.reading import Source

COLUMNS = {"answer": "chosen", "wrong_answers": "rejected", "category": "origin_dataset"}
"""Key of a query -> the column of it."""


def rlaif_v(path: str = "openbmb/RLAIF-V-Dataset") -> Source:
    """Convert RLAIF-V (not for commercial use; pip install 'vlm-calibration[datasets]').

    The preferred response is the gold answer, the rejected one a wrong answer. Other data sets of pairs: `data convert hf` with
    --columns '{answer: CHOSEN, wrong_answers: REJECTED}' --answer-type open.

    Args:
        path: the folder of its Parquet files, or its name on the Hub
    """
    return hf(path, split="train", columns=COLUMNS, answer_type="open")
