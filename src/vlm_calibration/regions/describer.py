"""What a describer is: M_desc(q, r) of the method, from a question and its response to the phrases that a detector looks for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from vlm_calibration.records import DataError, Query


class Description(NamedTuple):
    """The key objects of a query, as phrases in lower case.

    Attributes:
        objects: to be located in the image. absent: named, but said not to be there; there is nothing to locate.
    """

    objects: tuple[str, ...]
    absent: tuple[str, ...] = ()


class Describer(ABC):
    """Names the key objects of queries. Made from plain settings; `load` comes before the first description.

    Args:
        max_phrases: at most so many objects a query, the first ones mentioned.
    """

    def __init__(self, max_phrases: int = 8) -> None:
        if max_phrases < 1:
            raise DataError(f"max_phrases must be at least 1, found {max_phrases}")
        self.max_phrases = max_phrases

    def load(self, device: torch.device) -> None:  # noqa: B027  (nothing to load is the rule)
        """Load what describing takes onto this device; a describer by rules loads nothing."""

    @abstractmethod
    def describe(self, queries: Sequence[Query], images: Sequence[np.ndarray]) -> list[Description]:
        """The key objects of each query. images: uint8 [H, W, 3], those that the queries are about."""

    def tidy(self, objects: Iterable[str], absent: Iterable[str] = ()) -> Description:
        """Each phrase once, and not more than `max_phrases` objects."""
        missing = tuple(dict.fromkeys(absent))
        kept = [phrase for phrase in dict.fromkeys(objects) if phrase not in missing]
        return Description(tuple(kept[: self.max_phrases]), missing)
