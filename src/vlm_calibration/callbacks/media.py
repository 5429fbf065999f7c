"""Images, figures and tables as W&B logs them; W&B is imported when there is something to log."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

LARGEST_SIDE = 512
"""Pixels that a photo is shrunk to, if it is larger."""


def data_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Any:
    """A `wandb.Table`."""
    import wandb

    return wandb.Table(columns=list(columns), data=[list(row) for row in rows])


def photo(image: np.ndarray) -> Any:
    """A uint8 [H, W, 3] image as a `wandb.Image`, compressed."""
    import wandb

    picture = Image.fromarray(np.ascontiguousarray(image))
    picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    return wandb.Image(picture, file_type="jpg")


def drawing(figure: Any) -> Any:
    """A matplotlib figure as a `wandb.Image`, drawn without pyplot, whose figures would stay in memory."""
    import wandb

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return wandb.Image(Image.open(buffer))
