"""Interface of a describer, M_desc(q, r): from a question and its response to the phrases to detect."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from vlm_calibration.records import DataError, Query


class Description(NamedTuple):
    """The key objects of a query, as phrases in lower case, and those that the response says are not in the image."""

    objects: tuple[str, ...]
    absent: tuple[str, ...] = ()


class Describer(ABC):
    """Names the key objects of queries. The constructor takes settings only; call `load` before `describe`.

    Args:
        max_phrases: maximum number of objects per query; the first ones mentioned are taken.
    """

    def __init__(self, max_phrases: int = 8) -> None:
        if max_phrases < 1:
            raise DataError(f"max_phrases must be at least 1, found {max_phrases}")
        self.max_phrases = max_phrases

    def load(self, device: torch.device) -> None:  # noqa: B027  (optional)
        """Load the model onto the device."""

    @abstractmethod
    def describe(self, queries: Sequence[Query], images: Sequence[np.ndarray]) -> list[Description]:
        """The key objects of each query. images: uint8 [H, W, 3], one per query."""

    def build_description(self, objects: Iterable[str], absent: Iterable[str] = ()) -> Description:
        """Remove duplicates and objects that are also absent, and keep the first `max_phrases` objects."""
        absent = tuple(dict.fromkeys(absent))
        present = [phrase for phrase in dict.fromkeys(objects) if phrase not in absent]
        return Description(tuple(present[: self.max_phrases]), absent)
