"""Converts images, figures and tables to W&B's types; W&B is imported when something is logged."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

LARGEST_SIDE = 512
"""Longest side of a logged photo, in pixels."""


def data_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Any:
    """A `wandb.Table`."""
    import wandb

    return wandb.Table(columns=list(columns), data=[list(row) for row in rows])


def photo(image: np.ndarray) -> Any:
    """A uint8 [H, W, 3] image as a JPEG-compressed `wandb.Image`."""
    import wandb

    picture = Image.fromarray(np.ascontiguousarray(image))
    picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    return wandb.Image(picture, file_type="jpg")


def drawing(figure: Any) -> Any:
    """A matplotlib figure as a `wandb.Image`; without pyplot, which would keep the figure in memory."""
    import wandb

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return wandb.Image(Image.open(buffer))
