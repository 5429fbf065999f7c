"""The dataset that loads and noises queries when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal, NamedTuple

from torch.utils.data import Dataset

from vlm_calibration.data.noise import NoisePolicy, Sample, perturb_query
from vlm_calibration.data.selection import Selection, select
from vlm_calibration.data.sources.base import LazyQueries, QuerySource
from vlm_calibration.perturbation.levels import LinearLevels
from vlm_calibration.records import DataError, Query
from vlm_calibration.text.labels import answer_is_no


@dataclass(frozen=True)
class EvalSplit:
    """A named part of an evaluation.

    Args:
        source: its queries.
        noise: "none" leaves the images as they are; "drawn" noises each query at the step that the noise policy draws;
            "every_step" asks each query once at every step of the policy's levels.
    """

    source: QuerySource
    noise: Literal["none", "drawn", "every_step"] = "none"


class Drawn(NamedTuple):
    """The samples of a batch.

    samples: of the records that can be loaded. left_out: place in the data set of each other record -> what is wrong with it.
    clipped: places of samples with a region that leaves the image.
    """

    samples: list[Sample]
    left_out: dict[int, str]
    clipped: list[int]


class NothingShownError(DataError):
    """No pixel of the image shows what its query is about, although the answer does not say that it is absent."""


@dataclass(frozen=True)
class _Section:
    """The queries of one part that are asked, each at every one of `steps`."""

    name: str
    part: EvalSplit
    selection: Selection
    steps: Sequence[int | None]

    def __len__(self) -> int:
        return len(self.selection.chosen) * len(self.steps)

    def item(self, index: int) -> tuple[Query, int | None]:
        """The query at this place, by its full name, and its noise step."""
        place, at = divmod(index, len(self.steps))
        query = named(self.selection.queries[int(self.selection.chosen[place])], self.name)
        step = self.steps[at]
        return (replace(query, id=f"{query.id}@{step}") if self.part.noise == "every_step" else query), step


class PerturbedQueries(Dataset[Sample]):
    """Queries of one or several parts; `dataset[epoch, index]` is the query's `Sample` in that epoch.

    Where parts have names, a query's id and category get the part's name in front.

    Args:
        check: raises a DataError for a query that cannot be put to the model, or a wrong answer to it.
        where: the setting that the parts are those of, for messages.

    Raises:
        DataError: a record cannot be used and is not to be left out, or no query is left.
    """

    def __init__(
        self,
        parts: Mapping[str, EvalSplit],
        policy: NoisePolicy,
        image_processor: Any,
        check: Callable[[Query, Sequence[str]], None] = lambda query, wrong: None,
        where: str = "data",
    ) -> None:
        self.parts = dict(parts)
        self.policy = policy
        # Where nothing is noised, nothing need have been measured, and no query is absent.
        levels = LinearLevels(2, policy.schedule.steps)
        self._clean = replace(policy, levels=levels, level_weights=None, absent="clean")
        self.image_processor = image_processor
        self.where = where
        self._check = check
        self._sections = [self._section(name, part) for name, part in parts.items()]
        self._ends = list(accumulate(len(section) for section in self._sections))
        if not len(self):
            raise DataError(
                f"{where}: no query is left: to be noised, a query needs a region of what it asks about, or an answer that "
                "says that it is absent"
            )

    def is_noised(self, query_id: str) -> bool:
        """Whether the policy noises the part that has the query of this id."""
        return any(
            query_id.startswith(f"{name}:" if name else "")
            for name, part in self.parts.items()
            if part.noise != "none"
        )

    @property
    def queries(self) -> Sequence[Query]:
        return LazyQueries(len(self), lambda index: self._item(index)[1])

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _item(self, index: int) -> tuple[EvalSplit, Query, int | None]:
        which = next(i for i, end in enumerate(self._ends) if index < end)
        section = self._sections[which]
        query, step = section.item(index - (self._ends[which] - len(section)))
        return section.part, query, step

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """The sample of (epoch, index).

        Raises:
            DataError: the record cannot be loaded.
        """
        return self._draw(*key)[0]

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> Drawn:
        """The samples of a batch, without those of records that cannot be loaded and are to be left out."""
        drawn = Drawn([], {}, [])
        for epoch, index in keys:
            try:
                sample, clipped = self._draw(epoch, index)
            except DataError as error:
                nothing_shown = isinstance(error, NothingShownError)
                source = self._item(index)[0].source
                if (self.policy.no_region if nothing_shown else source.on_bad_record) == "raise":
                    raise
                drawn.left_out[index] = str(error)
            else:
                drawn.samples.append(sample)
                drawn.clipped.extend([index] if clipped else [])
        return drawn

    def _draw(self, epoch: int, index: int) -> tuple[Sample, bool]:
        """A sample, and whether a region of it leaves the image."""
        part, query, step = self._item(index)
        loaded = part.source.load(query)
        if part.noise != "none" and not loaded.evidence and not answer_is_no(query):
            raise NothingShownError(f"record {query.id!r}: no pixel of its image shows what it asks about")
        policy = self._clean if part.noise == "none" else self.policy
        try:
            wrong = part.source.wrong_answers(query)
            self._check(query, wrong)
            sample = perturb_query(query, loaded, policy, self.image_processor, epoch, step, wrong)
        except ValueError as error:
            raise DataError(f"record {query.id!r}: {error}") from error
        return sample, loaded.clipped

    def _section(self, name: str, part: EvalSplit) -> _Section:
        where = f"{self.where}.{name}" if name else self.where
        policy = None if part.noise == "none" else self.policy
        selection = select(part.source, policy, self._check, where)
        # None: drawn when the query is asked.
        steps: dict[str, Sequence[int | None]] = {
            "every_step": self.policy.levels.steps,
            "drawn": [None],
            "none": [0],
        }
        return _Section(name, part, selection, steps[part.noise])


def named(query: Query, part: str) -> Query:
    """A part's query as an evaluation knows it: id and category with the part's name in front, if it has one."""
    if not part:
        return query
    category = f"{part}/{query.category}" if query.category else part
    return replace(query, id=f"{part}:{query.id}", category=category)
