"""The dataset that loads and perturbs queries on access.

It first selects the queries that can be asked, without opening an image, so that an invalid record stops the run before
training. A perturbation needs a region of the key object. If there is none, the object counts as absent only if the answer says so; any
other query could only be perturbed somewhere else, so it is left out or stops the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import Dataset

from vlm_calibration.data.copies import perturbed_copies
from vlm_calibration.data.noise import (
    CopiedRegion,
    ImageCopy,
    NoisePolicy,
    Sample,
    perturb_query,
    query_rng,
)
from vlm_calibration.data.sources.base import BadRecords, LazyQueries, QuerySource
from vlm_calibration.files import MAX_NAMED, name_some
from vlm_calibration.perturbation.by_kind import region_perturbation
from vlm_calibration.perturbation.levels import CLEAN, LinearLevels, Perturbation
from vlm_calibration.progress import track
from vlm_calibration.records import ANSWER_TYPES, DataError, Query
from vlm_calibration.text.labels import answer_is_no

if TYPE_CHECKING:
    from vlm_calibration.data.augment import Augmentation  # imports albumentations, which is slow

Check = Callable[[Query, Sequence[str]], None]
"""Raises a DataError for a query that cannot be put to the model, or for one of the wrong answers to it."""
FIND_REGIONS = "find regions with `vlm-calibration predict --config regions ...` on the same data, and give --data.regions FOLDER"


@dataclass(frozen=True)
class EvalSplit:
    """A named part of an evaluation.

    Args:
        source: its queries.
        noise: "none" leaves the images untouched; "drawn" perturbs each query as drawn by the noise policy; "every_level" asks
            each query once at every level of each of the policy's kinds of perturbation.
        kinds: kind of perturbation -> relative frequency, instead of the policy's.
    """

    source: QuerySource
    noise: Literal["none", "drawn", "every_level"] = "none"
    kinds: dict[str, float] | None = None

    def __post_init__(self) -> None:
        if self.kinds is not None and self.noise == "none":
            raise DataError(
                f"kinds of a part need `noise: drawn` or `noise: every_level`, found none and {self.kinds}"
            )

    def policy(self, policy: NoisePolicy) -> NoisePolicy:
        """The noise policy of this part, given that of the data.

        Raises:
            DataError: the levels are not known for a kind.
        """
        if self.noise == "none":
            # On untouched images, levels need not be measured and no query is left out for an absent object.
            return replace(policy, levels=LinearLevels(), absent="clean")
        return policy if self.kinds is None else replace(policy, kinds=self.kinds)


class SampleBatch(NamedTuple):
    """The samples of a batch, and the problems of its records.

    Attributes:
        samples: samples of the records that can be loaded.
        left_out: index in the dataset -> message, for each other record.
        clipped: indices of samples with a region that is partly outside the image.
    """

    samples: list[Sample]
    left_out: dict[int, str]
    clipped: list[int]


class NoEvidenceError(DataError):
    """No pixel of the image shows the key object, although the answer does not say that it is absent."""


@dataclass(frozen=True)
class _SplitQueries:
    """The selected queries of one split, each under every one of `perturbations`; None: drawn when the sample is loaded.

    Those that are not `perturbed`, because no perturbation touches their image, are asked once.
    """

    name: str
    split: EvalSplit
    policy: NoisePolicy
    queries: Sequence[Query]
    selected: np.ndarray
    perturbed: np.ndarray
    perturbations: Sequence[Perturbation | None]

    def __len__(self) -> int:
        return len(self.selected) + len(self.perturbed) * (len(self.perturbations) - 1)

    def item(self, index: int) -> tuple[Query, Perturbation | None]:
        """The query at an index, with the split's name, and its perturbation."""
        level, position, asked = 0, index, self.selected
        if index >= len(asked):
            level, position = divmod(index - len(asked), len(self.perturbed))
            level, asked = level + 1, self.perturbed
        query = with_split_name(self.queries[int(asked[position])], self.name)
        perturbation = self.perturbations[level]
        if self.split.noise == "every_level" and perturbation is not None:
            query = replace(query, id=level_id(query.id, perturbation))
        return query, perturbation


class PerturbedQueries(Dataset[Sample]):
    """The queries of one or several splits; `dataset[epoch, index]` is a query's `Sample` in an epoch.

    The name of a split is put in front of the ids and categories of its queries.

    Args:
        splits: name -> split; "" adds no name.
        policy: how queries are perturbed.
        image_processor: defines the size at which the model sees an image.
        check: refuses queries that cannot be put to the model.
        where: the setting that holds the splits, for messages.
        named: whether the name of a split is a part of its setting: "data.test.clean".
        augmentation: what is done to images before they are perturbed.
        taught: whether the queries teach a model or measure its levels, so that those with regions must stand for all.

    Raises:
        DataError: a record is invalid and is not to be left out, no query is left, or the others do not stand for all.
    """

    def __init__(
        self,
        splits: Mapping[str, EvalSplit],
        policy: NoisePolicy,
        image_processor: Any,
        check: Check = lambda query, wrong: None,
        where: str = "data",
        named: bool = True,
        augmentation: Augmentation | None = None,
        taught: bool = False,
    ) -> None:
        self.splits = dict(splits)
        self.policy = policy
        self.image_processor = image_processor
        self.where = where
        self._named = named
        self._check = check
        self._augmentation = augmentation
        self._taught = taught
        self._copies: Sequence[ImageCopy] = ()
        self._parts = [self._select(name, split) for name, split in splits.items()]
        self._ends = list(accumulate(len(part) for part in self._parts))
        if not len(self):
            raise DataError(
                f"{where}: no query is left: to be perturbed, a query needs a region of what it asks about, or an answer that "
                "says that it is absent"
            )
        for part in self._parts:
            if part.split.noise != "none":
                for kind in part.policy.used_kinds:
                    region_perturbation(kind, policy.schedule)  # imported once here, not in every worker

    def make_copies(self, copies: Sequence[ImageCopy]) -> None:
        """Give each sample these perturbed copies of its image from now on.

        Raises:
            DataError: a copy perturbs a region that no query of a split has.
        """
        for part in self._parts:
            for region in dict.fromkeys(copy.region for copy in copies):
                self._check_regions(part, region)
        for copy in copies:
            # Imported once here, not in every worker.
            region_perturbation(copy.perturbation.kind, self.policy.schedule)
        self._copies = tuple(copies)

    def _check_regions(self, part: _SplitQueries, region: CopiedRegion) -> None:
        if region == "image":
            return
        source, what = part.split.source, "its key object"
        has_region: Callable[[Query], bool] = source.has_evidence
        if region == "distractor":
            what, has_region = "an object that it does not ask about", source.has_distractor
        if not any(has_region(part.queries[int(index)]) for index in part.selected):
            raise DataError(
                f"{self._setting(part.name)}: no query has a region of {what}, which model.probes or an estimator is to perturb: "
                f"take {region!r} out of model.probes (`region: image` for Stability), or give records with such regions"
            )

    def _setting(self, name: str) -> str:
        """The setting of a split."""
        return f"{self.where}.{name}" if name and self._named else self.where

    def is_noised(self, query_id: str) -> bool:
        """Whether the policy perturbs the split that contains a query."""
        return any(
            query_id.startswith(f"{name}:" if name else "")
            for name, split in self.splits.items()
            if split.noise != "none"
        )

    @property
    def queries(self) -> Sequence[Query]:
        return LazyQueries(len(self), lambda index: self._item(index)[1])

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _item(self, index: int) -> tuple[_SplitQueries, Query, Perturbation | None]:
        number = next(i for i, end in enumerate(self._ends) if index < end)
        part = self._parts[number]
        query, perturbation = part.item(index - (self._ends[number] - len(part)))
        return part, query, perturbation

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """The sample at (epoch, index).

        Raises:
            DataError: the record cannot be loaded.
        """
        return self._load(*key)[0]

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> SampleBatch:
        """The samples of a batch, without records that cannot be loaded and are to be left out."""
        batch = SampleBatch([], {}, [])
        for epoch, index in keys:
            try:
                sample, clipped = self._load(epoch, index)
            except DataError as error:
                source = self._item(index)[0].split.source
                policy = self.policy.no_region if isinstance(error, NoEvidenceError) else source.on_bad_record
                if policy == "raise":
                    raise
                batch.left_out[index] = str(error)
            else:
                batch.samples.append(sample)
                batch.clipped.extend([index] if clipped else [])
        return batch

    def _load(self, epoch: int, index: int) -> tuple[Sample, bool]:
        """A sample, and whether one of its regions is partly outside the image."""
        part, query, perturbation = self._item(index)
        split, policy = part.split, part.policy
        loaded = split.source.load(query)
        if split.noise != "none" and not loaded.evidence and not answer_is_no(query):
            raise NoEvidenceError(f"record {query.id!r}: no pixel of its image shows what it asks about")
        if self._augmentation is not None:
            seed = query_rng(policy.seed, epoch, query.id, "augment").integers(2**32)
            loaded = self._augmentation(loaded, int(seed))
        try:
            wrong = split.source.wrong_answers(query)
            self._check(query, wrong)
            sample = perturb_query(query, loaded, policy, self.image_processor, epoch, perturbation, wrong)
            if self._copies:
                copies = perturbed_copies(sample, loaded, self._copies, policy, self.image_processor)
                sample = sample._replace(copies=copies)
        except ValueError as error:
            raise DataError(f"record {query.id!r}: {error}") from error
        return sample, loaded.clipped

    def _select(self, name: str, split: EvalSplit) -> _SplitQueries:
        where = self._setting(name)
        try:
            policy = split.policy(self.policy)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        queries = split.source.queries()
        perturbed = None if split.noise == "none" else policy
        selected = select(split.source, queries, perturbed, self._check, where, self._taught)
        perturbations: dict[str, Sequence[Perturbation | None]] = {
            "every_level": policy.perturbations,
            "drawn": [None],
            "none": [CLEAN],
        }
        changed = selected
        if split.noise == "every_level" and policy.absent == "clean":
            changed = np.array(
                [i for i in selected if split.source.has_evidence(queries[int(i)])], dtype=np.int64
            )
        return _SplitQueries(name, split, policy, queries, selected, changed, perturbations[split.noise])


def level_id(query_id: str, perturbation: Perturbation) -> str:
    """The id of a query that is asked at every level: "QUERY@noise-0.3", "QUERY@0" for its untouched image."""
    kind, strength = perturbation
    return f"{query_id}@{kind}-{strength:g}" if strength else f"{query_id}@0"


def query_id_of_level(level_id: str) -> str:
    """The query's own id in an id of `level_id`."""
    return level_id.rpartition("@")[0]


def with_split_name(query: Query, split: str) -> Query:
    """Put the name of a split, if it has one, in front of a query's id and category."""
    if not split:
        return query
    category = f"{split}/{query.category}" if query.category else split
    return replace(query, id=f"{split}:{query.id}", category=category)


def select(
    source: QuerySource,
    queries: Sequence[Query],
    policy: NoisePolicy | None,
    check: Check,
    where: str,
    taught: bool = False,
) -> np.ndarray:
    """Select the queries of a source that are asked, and report how many are left out, with the first ids.

    Args:
        source: the source.
        queries: all its queries.
        policy: how they are perturbed; None: not at all, so they need no region.
        check: refuses queries that cannot be put to the model.
        where: the setting that names the source, for messages.
        taught: as for `PerturbedQueries`.

    Returns:
        Indices of the selected queries, int64, ascending.

    Raises:
        DataError: a record is invalid or needs a region that it does not have, and is not to be left out; see `_check_taught`.
    """
    bad = BadRecords(source.on_bad_record)
    indices: dict[str, list[int]] = {"present": [], "absent": [], "unlocated": []}
    for index, query in enumerate(track(queries, f"reading {where}", len(queries), "queries")):
        try:
            check(query, ())
            if policy is not None:
                _check_levels(policy, source, query)
        except DataError as error:
            bad.add(f"{where}: {error}", error)
            continue
        indices["present" if policy is None else source.presence(query)].append(index)
    bad.report(len(queries) - len(bad.messages))
    if taught and indices["unlocated"]:
        _check_taught(queries, indices["unlocated"], indices["present"] + indices["absent"], where)
    if policy is not None:
        _report_regions(policy, queries, indices["absent"], indices["unlocated"], where)
    absent = [] if policy is None or policy.absent == "skip" else indices["absent"]
    return np.array(sorted(indices["present"] + absent), dtype=np.int64)


def _check_levels(policy: NoisePolicy, source: QuerySource, query: Query) -> None:
    """Make sure that there are levels for a query, of its own question and image."""
    try:
        policy.levels.confidence(CLEAN, query.answer_type, query.id)
        policy.levels.check_content(query.id, lambda: source.content_digest(query))
    except ValueError as error:
        raise DataError(f"record {query.id!r}: {error}") from error


def _check_taught(queries: Sequence[Query], unlocated: list[int], located: list[int], where: str) -> None:
    """Make sure that queries with regions stand for all.

    Raises:
        DataError: most queries have no region, or one answer is left of an answer type that had several.
    """

    def answers(indices: list[int]) -> dict[str, set[str]]:
        """Answer type -> its answers."""
        found: dict[str, set[str]] = {kind: set() for kind in ANSWER_TYPES}
        for query in map(queries.__getitem__, indices):
            answer = "No" if answer_is_no(query) else "Yes" if query.answer_type == "yes_no" else query.answer
            found[query.answer_type].add(answer)
        return found

    lost, left = answers(unlocated), answers(located)
    only = [repr(*left[kind]) for kind in ANSWER_TYPES if len(left[kind]) == 1 and lost[kind] - left[kind]]
    if only or len(unlocated) > len(located):
        counts = f"{len(unlocated)} of {len(unlocated) + len(located)} queries have no region of what they ask about"
        alone = f", and all others of their type have the answer {' or '.join(only)}" if only else ""
        raise DataError(f"{where}: {counts}{alone}: {FIND_REGIONS}, or leave such queries out of the data")


def _report_regions(
    policy: NoisePolicy, queries: Sequence[Query], absent: list[int], unlocated: list[int], where: str
) -> None:
    """Report the queries without a region of the key object.

    Args:
        absent: indices of the queries about an absent object.
        unlocated: indices of the queries that need a region and have none.

    Raises:
        DataError: there are such queries as `unlocated`, and they are not to be left out.
    """

    def ids(indices: list[int]) -> str:
        return name_some((queries[i].id for i in indices[:MAX_NAMED]), len(indices))

    about_absent = ""
    if absent:
        about_absent = (
            f"{len(absent)} ask about an object that is absent (`absent: {policy.absent}`): {ids(absent)}"
        )
    if not unlocated:
        if about_absent:
            counts = f"{len(absent)} of {len(queries)} queries"
            rank_zero_info(f"{where}: absent object in {counts} (`absent: {policy.absent}`)")
        return
    missing = (
        f"{len(unlocated)} of {len(queries)} queries need a region of what they ask about and have none: "
        f"{ids(unlocated)}"
    )
    if policy.no_region == "raise":
        raise DataError(
            f"{where}: {missing}: {FIND_REGIONS}, or leave such queries out with `data.noise.no_region: skip`"
        )
    rank_zero_warn(f"{where}: left out: {missing}" + (f"; {about_absent}" if about_absent else ""))
