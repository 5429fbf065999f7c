"""The dataset that loads and perturbs queries on access.

It first selects the queries that can be asked, without opening an image, so that an invalid record stops the run before
training. A perturbation needs a region of each key object. One without a region counts as absent only if the answer denies that it exists or
the data say so; any other query could only be perturbed somewhere else, so its image stays untouched or it stops the run. If such queries were
left out, those about large and easy objects would stand for all.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate, islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import Dataset

from vlm_calibration.data.noise import (
    ImageCopy,
    NoisePolicy,
    Sample,
    perturb_query,
    perturbed_copies,
    query_rng,
)
from vlm_calibration.data.sources.base import BadRecords, LazyQueries, Presence, QuerySource
from vlm_calibration.files import name_some
from vlm_calibration.perturbation.by_kind import region_perturbation
from vlm_calibration.perturbation.levels import CLEAN, LinearLevels, Perturbation
from vlm_calibration.progress import track
from vlm_calibration.records import ANSWER_TYPES, DataError, LoadedImage, Query
from vlm_calibration.text.grading import grade
from vlm_calibration.text.labels import answer_is_no, asked_existence, question_form

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
    """The samples of a batch, and the problems of its records, by their index in the dataset.

    Attributes:
        samples: samples of the records that can be loaded.
        left_out: index -> message, for each other record.
        clipped: samples with a region that is partly outside the image.
        empty: samples whose image stays untouched, because no pixel of it shows the key object.
    """

    samples: list[Sample]
    left_out: dict[int, str]
    clipped: list[int]
    empty: list[int]


class NoEvidenceError(DataError):
    """No pixel of the image shows the key object, although nothing says that it is absent."""


@dataclass(frozen=True)
class _Part:
    """The queries of one split that are asked, untouched or drawn, then those that can be perturbed under every other perturbation.

    Attributes:
        name: of the split.
        split: its settings.
        policy: how they are perturbed.
        queries: all queries of the source.
        indices: of the N that are asked, int64 [N], ascending.
        presence: of the key objects of each.
        shown: indices of queries about present objects, whose regions give absent ones their shapes, int64.
        answers: form of question -> the gold answers to it, for short answers of which the source has no wrong one.
        perturbations: under which all are asked; None: drawn when a sample is loaded.
    """

    name: str
    split: EvalSplit
    policy: NoisePolicy
    queries: Sequence[Query]
    indices: np.ndarray
    presence: Sequence[Presence]
    shown: np.ndarray
    answers: Mapping[str, Sequence[str]]
    perturbations: Sequence[Perturbation | None]

    @cached_property
    def perturbed(self) -> np.ndarray:
        """Positions in `indices` of the queries that can be perturbed, int64."""
        kinds = ("present", "absent") if self.policy.absent == "distractor" else ("present",)
        return np.flatnonzero([presence in kinds for presence in self.presence])

    def __len__(self) -> int:
        return len(self.indices) + len(self.perturbed) * (len(self.perturbations) - 1)

    def item(self, index: int) -> tuple[Query, Presence, Perturbation | None]:
        """A query with its split's name, the presence of its key objects, and what happens to its image."""
        level, position = 0, index
        if index >= len(self.indices):
            level, position = divmod(index - len(self.indices), len(self.perturbed))
            level, position = level + 1, int(self.perturbed[position])
        query = with_split_name(self.queries[int(self.indices[position])], self.name)
        presence, perturbation = self.presence[position], self.perturbations[level]
        if self.split.noise == "every_level" and perturbation is not None:
            query = replace(query, id=level_id(query.id, perturbation))
        return query, presence, CLEAN if presence == "unlocated" else perturbation

    def augmented(self, query: Query, epoch: int, augmentation: Augmentation | None) -> LoadedImage:
        """The image of a query with its regions, as it is before it is perturbed."""
        loaded = self.split.source.load(query)
        if augmentation is None:
            return loaded
        seed = query_rng(self.policy.seed, epoch, query.id, "augment").integers(2**32)
        return augmentation(loaded, int(seed))

    def silhouettes(
        self, query_id: str, epoch: int, augmentation: Augmentation | None
    ) -> Sequence[np.ndarray]:
        """The masks of the key objects of a random query about present objects, for one about an absent object; empty without any."""
        rng = query_rng(self.policy.seed, epoch, query_id, "silhouettes")
        for index in rng.permutation(self.shown):
            try:
                loaded = self.augmented(self.queries[int(index)], epoch, augmentation)
            except DataError:
                # It is reported where it is asked itself.
                if self.split.source.on_bad_record == "raise":
                    raise
                continue
            if loaded.evidence:
                return loaded.evidence
        return ()

    def wrong_answers(self, query: Query, epoch: int) -> Sequence[str]:
        """The source's wrong answers to a query; if it has none to a short one, the gold answer to another question of its form."""
        wrong = self.split.source.wrong_answers(query)
        if wrong or query.answer_type != "short":
            return wrong
        answers = self.answers.get(question_form(query), ())
        order = query_rng(self.policy.seed, epoch, query.id, "form").permutation(len(answers))
        return _first_wrong((answers[i] for i in order), query.answer, query.synonyms)


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
        DataError: a record is invalid and is not to be left out, no query is left, none can be perturbed, or those that can do not
            stand for all.
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
        self._ends = list(accumulate(map(len, self._parts)))
        if not len(self):
            raise DataError(f"{where}: no query is left")
        for part in self._parts:
            if part.split.noise != "none":
                if not len(part.perturbed):
                    raise self._nothing_perturbed(part, "query")
                for kind in part.policy.used_kinds:
                    region_perturbation(kind, policy.schedule)  # imported once here, not in every worker

    def check_answer_types(self) -> None:
        """Raise a DataError if the queries of an answer type cannot be perturbed, so that its levels cannot be measured."""
        for part in self._parts:
            asked, perturbed = (
                {part.queries[int(index)].answer_type for index in indices}
                for indices in (part.indices, part.indices[part.perturbed])
            )
            for answer_type in sorted(asked - perturbed):
                raise self._nothing_perturbed(part, f"{answer_type} query")

    def _nothing_perturbed(self, part: _Part, what: str) -> DataError:
        return DataError(
            f"{self._setting(part.name)}: no {what} can be perturbed, which needs a region of what it asks about, or an answer that denies "
            "that it exists: find regions with `vlm-calibration predict --config regions`"
        )

    def make_copies(self, copies: Sequence[ImageCopy]) -> None:
        """Give each sample these perturbed copies of its image from now on; a split without such a region is a DataError."""
        for part in self._parts:
            source = part.split.source
            for region in {copy.region: None for copy in copies if copy.region != "image"}:
                what, has_region = "its key object", source.has_evidence
                if region == "distractor":
                    what, has_region = "an object that it does not ask about", source.has_distractor
                if not any(has_region(part.queries[int(index)]) for index in part.indices):
                    raise DataError(
                        f"{self._setting(part.name)}: no query has a region of {what}, which model.probes or an estimator is to "
                        f"perturb: take {region!r} out of model.probes (`region: image` for Stability), or give records with such regions"
                    )
        for copy in copies:
            # Imported once here, not in every worker.
            region_perturbation(copy.perturbation.kind, self.policy.schedule)
        self._copies = tuple(copies)

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
        def query(index: int) -> Query:
            part, own_index = self._part_of(index)
            return part.item(own_index)[0]

        return LazyQueries(len(self), query)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _part_of(self, index: int) -> tuple[_Part, int]:
        """The part that holds an item, and the item's index in it."""
        number = bisect_right(self._ends, index)
        return self._parts[number], index - (self._ends[number - 1] if number else 0)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """The sample at (epoch, index).

        Raises:
            DataError: the record cannot be loaded.
        """
        return self._load(*key)[0]

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> SampleBatch:
        """The samples of a batch, without records that cannot be loaded and are to be left out."""
        batch = SampleBatch([], {}, [], [])
        for epoch, index in keys:
            try:
                sample, clipped, is_empty = self._load(epoch, index)
            except DataError as error:
                source = self._part_of(index)[0].split.source
                policy = self.policy.no_region if isinstance(error, NoEvidenceError) else source.on_bad_record
                if policy == "raise":
                    raise
                batch.left_out[index] = str(error)
            else:
                batch.samples.append(sample)
                batch.clipped.extend([index] if clipped else [])
                batch.empty.extend([index] if is_empty else [])
        return batch

    def _load(self, epoch: int, index: int) -> tuple[Sample, bool, bool]:
        """A sample, whether one of its regions is partly outside the image, and whether those of its key objects have no pixel."""
        part, own_index = self._part_of(index)
        query, presence, perturbation = part.item(own_index)
        policy = part.policy
        loaded = part.augmented(query, epoch, self._augmentation)
        is_empty = part.split.noise != "none" and presence == "present" and not loaded.evidence
        if is_empty:
            if policy.no_region == "raise" or perturbation not in (None, CLEAN):
                raise NoEvidenceError(f"record {query.id!r}: no pixel of its image shows what it asks about")
            perturbation = CLEAN
        silhouettes = None
        if not part.split.source.annotates_all:
            silhouettes = partial(part.silhouettes, query.id, epoch, self._augmentation)
        try:
            wrong = part.wrong_answers(query, epoch)
            self._check(query, wrong)
            sample = perturb_query(
                query, loaded, policy, self.image_processor, epoch, perturbation, wrong, silhouettes
            )
            if self._copies:
                copies = perturbed_copies(sample, loaded, self._copies, policy, self.image_processor)
                sample = sample._replace(copies=copies)
        except ValueError as error:
            raise DataError(f"record {query.id!r}: {error}") from error
        return sample, loaded.clipped, is_empty

    def _select(self, name: str, split: EvalSplit) -> _Part:
        where = self._setting(name)
        try:
            policy = split.policy(self.policy)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        source, queries, is_perturbed = split.source, split.source.queries(), split.noise != "none"
        bad = BadRecords(source.on_bad_record)
        asked: dict[int, Presence] = {}
        shown: dict[bool, list[int]] = {True: [], False: []}
        answers: dict[str, dict[str, None]] = {}
        wrongless: list[tuple[str, str, tuple[str, ...]]] = []
        for index, query in enumerate(track(queries, f"reading {where}", len(queries), "queries")):
            try:
                self._check(query, ())
                if is_perturbed:
                    _check_levels(policy, source, query)
            except DataError as error:
                bad.add(f"{where}: {error}", error)
                continue
            asked[index] = source.presence(query) if is_perturbed else "present"
            if is_perturbed and asked[index] == "present":
                shown[asked_existence(query.question) is not None].append(index)
            if is_perturbed and policy.wrong_answer_rate:
                form = question_form(query) if query.answer_type == "short" else ""
                if form:
                    answers.setdefault(form, {})[query.answer] = None
                if not source.wrong_answers(query):
                    wrongless.append((form, query.answer, query.synonyms))
        bad.report(len(asked))
        # A question about existence is the one that is answered with no about an absent object, so its objects are of the same kinds.
        shapes = [] if source.annotates_all else shown[True] or shown[False]
        if is_perturbed:
            if self._taught and "unlocated" in asked.values():
                _check_taught(queries, asked, where)
            _report_regions(policy, queries, asked, where)
            absent = sum(presence == "absent" for presence in asked.values())
            if absent and policy.absent == "distractor" and not (shapes or source.annotates_all):
                rank_zero_warn(
                    f"{where}: no query has a region whose shape those of {absent} absent objects could have: they are random boxes"
                )
            if count := sum(
                not _first_wrong(answers.get(form, ()), gold, synonyms) for form, gold, synonyms in wrongless
            ):
                rank_zero_warn(
                    f"{where}: {count} of {len(asked)} queries have no wrong answer to give in place of the gold one "
                    "(`wrong_answer_rate`): their source has none, and questions of their form have no other answer"
                )
            if policy.absent == "skip":
                asked = {index: presence for index, presence in asked.items() if presence != "absent"}
        perturbations: dict[str, Sequence[Perturbation | None]] = {
            "every_level": policy.perturbations,
            "drawn": [None],
            "none": [CLEAN],
        }
        return _Part(
            name,
            split,
            policy,
            queries,
            np.array(list(asked), dtype=np.int64),
            list(asked.values()),
            np.array(shapes, dtype=np.int64),
            {form: list(golds) for form, golds in answers.items()},
            perturbations[split.noise],
        )


def _check_levels(policy: NoisePolicy, source: QuerySource, query: Query) -> None:
    """Make sure that there are levels for a query, of its own question and image."""
    try:
        policy.levels.confidence(CLEAN, query.answer_type, query.id)
        policy.levels.check_content(query.id, partial(source.content_digest, query))
    except ValueError as error:
        raise DataError(f"record {query.id!r}: {error}") from error


def _first_wrong(answers: Iterable[str], gold: str, synonyms: Sequence[str]) -> tuple[str, ...]:
    """The first of some short answers that is wrong where `gold` and `synonyms` are correct; empty if none is."""
    return tuple(islice((a for a in answers if not grade(a, gold, "short", synonyms).correct), 1))


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


def _check_taught(queries: Sequence[Query], asked: Mapping[int, Presence], where: str) -> None:
    """Raise a DataError if most queries are unlocated, or if all others of an answer type have one answer, which then goes with noise."""
    unlocated: dict[str, set[str]] = {kind: set() for kind in ANSWER_TYPES}
    located: dict[str, set[str]] = {kind: set() for kind in ANSWER_TYPES}
    for index, presence in asked.items():
        query = queries[index]
        answer = "No" if answer_is_no(query) else "Yes" if query.answer_type == "yes_no" else query.answer
        (unlocated if presence == "unlocated" else located)[query.answer_type].add(answer)
    n_unlocated = sum(presence == "unlocated" for presence in asked.values())
    only = [
        repr(*located[kind])
        for kind in ANSWER_TYPES
        if len(located[kind]) == 1 and unlocated[kind] - located[kind]
    ]
    if only or 2 * n_unlocated > len(asked):
        counts = f"{n_unlocated} of {len(asked)} queries have no region of what they ask about"
        alone = f", and all others of their type have the answer {' or '.join(only)}" if only else ""
        raise DataError(f"{where}: {counts}{alone}: {FIND_REGIONS}, or leave such queries out of the data")


def _report_regions(
    policy: NoisePolicy,
    queries: Sequence[Query],
    asked: Mapping[int, Presence],
    where: str,
) -> None:
    """Report the queries without a region of the key object, with the first ids, or raise a DataError if `no_region` says so."""

    def named(presence: Presence) -> str:
        indices = [index for index, found in asked.items() if found == presence]
        return name_some((queries[index].id for index in indices), len(indices))

    n_absent, n_unlocated = (list(asked.values()).count(presence) for presence in ("absent", "unlocated"))
    if not n_unlocated:
        if n_absent:
            counts = f"{n_absent} of {len(queries)} queries"
            rank_zero_info(f"{where}: absent object in {counts} (`absent: {policy.absent}`)")
        return
    kinds: Counter[str] = Counter()
    for query in (queries[index] for index, presence in asked.items() if presence == "unlocated"):
        yes_or_no = "no" if answer_is_no(query) else "yes"
        kinds[yes_or_no if query.answer_type == "yes_no" else query.answer_type] += 1
    missing = (
        f"{n_unlocated} of {len(queries)} queries ({', '.join(f'{n} {kind}' for kind, n in kinds.most_common())}) need a region of "
        f"what they ask about and have none: {named('unlocated')}"
    )
    if policy.no_region == "raise":
        raise DataError(
            f"{where}: {missing}: {FIND_REGIONS}, or ask such queries with untouched images with `data.noise.no_region: clean`"
        )
    absent = f"; {n_absent} ask about an object that is absent (`absent: {policy.absent}`): {named('absent')}"
    rank_zero_warn(f"{where}: images stay untouched: {missing}" + (absent if n_absent else ""))
