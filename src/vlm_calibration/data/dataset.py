"""The dataset: selects the queries that can be asked without opening an image, then loads and perturbs them on access."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
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
from vlm_calibration.perturbation.levels import CLEAN, LinearLevels, Perturbation
from vlm_calibration.records import ANSWER_TYPES, AnswerType, DataError, LoadedImage, Query
from vlm_calibration.text.grading import grade
from vlm_calibration.text.labels import answer_is_no, asked_existence, question_form

if TYPE_CHECKING:
    from vlm_calibration.data.augment import Augmentation  # imports albumentations, which is slow

Check = Callable[[Query, Sequence[str]], None]
"""Raises a DataError if a query, or one of the wrong answers to it, cannot be put to the model."""
FIND_REGIONS = "find regions with `vlm-calibration predict --config regions ...` on the same data, and give --data.regions FOLDER"


def accept(query: Query, answers: Sequence[str]) -> None:
    """Accept every query: without a processor there is no image token that a text could contain."""


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
            raise DataError(f"kinds need `noise: drawn` or `noise: every_level`, found none and {self.kinds}")

    def policy(self, policy: NoisePolicy) -> NoisePolicy:
        """The noise policy of this part, given that of the data; a DataError if the levels are not known for a kind."""
        if self.noise == "none":
            # Untouched images need no measured levels, and none is left out for an absent object.
            return replace(policy, levels=LinearLevels(), absent="clean")
        return policy if self.kinds is None else replace(policy, kinds=self.kinds)


class SampleBatch(NamedTuple):
    """The samples of a batch that can be loaded, messages about the others, and the samples with other problems, by their index.

    `clipped` have a region that is partly outside the image, `empty` show no pixel of the key object, so that they stay untouched.
    """

    samples: list[Sample]
    left_out: dict[int, str]
    clipped: list[int]
    empty: list[int]


class NoEvidenceError(DataError):
    """No pixel of the image shows the key object, although nothing says that it is absent."""


class _Part:
    """The queries of one split that are asked, untouched or drawn, then those that can be perturbed under every other perturbation."""

    def __init__(
        self,
        name: str,
        split: EvalSplit,
        where: str,
        policy: NoisePolicy,
        check: Check,
        augmentation: Augmentation | None,
        taught: bool,
    ) -> None:
        self.name, self.where, self.source = name, where, split.source
        self.augmentation = augmentation
        self.is_perturbed = split.noise != "none"
        try:
            self.policy = split.policy(policy)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        # Form of a question -> the gold answers to it, as an ordered set.
        self._golds: dict[str, dict[str, None]] = {}
        asked = self._select(check)
        if self.is_perturbed:
            self._check_regions(asked, taught)
        if self.policy.absent == "skip":
            asked = {index: presence for index, presence in asked.items() if presence != "absent"}
        self.indices = np.array(list(asked), dtype=np.int64)
        """Of the N queries that are asked, int64 [N], ascending."""
        self.presence = list(asked.values())
        kinds = ("present", "absent") if self.policy.absent == "distractor" else ("present",)
        self.perturbed = np.flatnonzero([presence in kinds for presence in self.presence])
        """Positions in `indices` of the queries that can be perturbed, int64."""
        self.perturbations: Sequence[Perturbation | None] = [None if self.is_perturbed else CLEAN]
        if split.noise == "every_level":
            self.perturbations = self.policy.perturbations

    def _select(self, check: Check) -> dict[int, Presence]:
        """The queries that can be asked, with the presence of their key objects."""
        bad = BadRecords(self.source.on_bad_record)
        levels, asked = self.policy.levels, dict[int, Presence]()
        wrongless: list[int] = []
        shown: dict[bool, list[int]] = {True: [], False: []}
        for index, query in enumerate(self.source.scan(f"reading {self.where}")):
            try:
                check(query, ())
                if self.is_perturbed:
                    levels.confidence(CLEAN, query.answer_type, query.id)
                    levels.check_content(query.id, partial(self.source.content_digest, query))
            except ValueError as error:
                reason = error if isinstance(error, DataError) else f"record {query.id!r}: {error}"
                bad.add(f"{self.where}: {reason}", error)
                continue
            asked[index] = self.source.presence(query) if self.is_perturbed else "present"
            if self.is_perturbed and asked[index] == "present":
                shown[asked_existence(query.question) is not None].append(index)
            if self.is_perturbed and self.policy.wrong_answer_rate:
                if query.answer_type == "short" and (form := question_form(query)):
                    self._golds.setdefault(form, {})[query.answer] = None
                if not self.source.wrong_answers(query):
                    wrongless.append(index)
        self.queries = self.source.queries()
        bad.report(len(asked))
        # A question about existence is the one that is answered with no about an absent object, so its objects are of the same kinds.
        indices = [] if self.source.annotates_all else shown[True] or shown[False]
        self.shown = np.array(indices, dtype=np.int64)
        """Indices of queries whose regions give those of absent objects their shapes."""
        candidates = (self.queries[index] for index in wrongless)
        if lacking := [query.id for query in candidates if not self.wrong_answers(query, None)]:
            number = f"{len(lacking)} of {len(asked)} queries have no wrong answer to give in place of the gold one"
            why = "their source has none, and questions of their form have no other answer"
            rank_zero_warn(
                f"{self.where}: {number} (`wrong_answer_rate`): {why}: {name_some(lacking, len(lacking))}"
            )
        return asked

    def _check_regions(self, asked: Mapping[int, Presence], taught: bool) -> None:
        """Report queries without a region; a DataError if they stop the run, or others cannot stand for them."""
        absent = [index for index, presence in asked.items() if presence == "absent"]
        unlocated = [index for index, presence in asked.items() if presence == "unlocated"]
        if unlocated and taught:
            self._check_taught(asked)

        def named(indices: Sequence[int]) -> str:
            return name_some((self.queries[index].id for index in indices), len(indices))

        total, rule = len(self.queries), f"(`absent: {self.policy.absent}`)"
        if unlocated:
            answers = map(self._answer, unlocated)
            kinds = Counter(answer.lower() if kind == "yes_no" else kind for kind, answer in answers)
            counts = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
            some = f"{len(unlocated)} of {total} queries ({counts})"
            missing = f"{some} need a region of what they ask about and have none: {named(unlocated)}"
            if self.policy.no_region == "raise":
                advice = "ask such queries with untouched images with `data.noise.no_region: clean`"
                raise DataError(f"{self.where}: {missing}: {FIND_REGIONS}, or {advice}")
            if absent:
                missing += f"; {len(absent)} ask about an object that is absent {rule}: {named(absent)}"
            rank_zero_warn(f"{self.where}: images stay untouched: {missing}")
        elif absent:
            rank_zero_info(f"{self.where}: absent object in {len(absent)} of {total} queries {rule}")
        shapeless = not len(self.shown) and not self.source.annotates_all
        if absent and shapeless and self.policy.absent == "distractor":
            shapes = f"no query has a region whose shape those of {len(absent)} absent objects could have"
            rank_zero_warn(f"{self.where}: {shapes}: they are random boxes")

    def _answer(self, index: int) -> tuple[AnswerType, str]:
        """The type of a query and its gold answer; "Yes" or "No" however it is written."""
        query = self.queries[index]
        if query.answer_type == "yes_no":
            return "yes_no", "No" if answer_is_no(query) else "Yes"
        return query.answer_type, query.answer

    def _check_taught(self, asked: Mapping[int, Presence]) -> None:
        """A DataError if most queries are unlocated, or if all others of an answer type have one answer, which then goes with noise."""
        lost, kept = ({answer_type: set[str]() for answer_type in ANSWER_TYPES} for _ in range(2))
        for index, presence in asked.items():
            answer_type, answer = self._answer(index)
            (lost if presence == "unlocated" else kept)[answer_type].add(answer)
        only = [repr(*kept[t]) for t in ANSWER_TYPES if len(kept[t]) == 1 and lost[t] - kept[t]]
        unlocated = list(asked.values()).count("unlocated")
        if only or 2 * unlocated > len(asked):
            counts = f"{unlocated} of {len(asked)} queries have no region of what they ask about"
            alone = f", and all others of their type have the answer {' or '.join(only)}" if only else ""
            advice = f"{FIND_REGIONS}, or leave such queries out of the data"
            raise DataError(f"{self.where}: {counts}{alone}: {advice}")

    def nothing_perturbed(self, what: str) -> DataError:
        needed = "a region of what it asks about, or an answer that denies that it exists"
        advice = "find regions with `vlm-calibration predict --config regions`"
        return DataError(f"{self.where}: no {what} can be perturbed, which needs {needed}: {advice}")

    def __len__(self) -> int:
        return len(self.indices) + len(self.perturbed) * (len(self.perturbations) - 1)

    def item(self, index: int) -> tuple[Query, Presence, Perturbation | None]:
        """A query with its split's name, the presence of its key objects, and what happens to its image; None: it is drawn."""
        level, position = 0, index
        if index >= len(self.indices):
            level, position = divmod(index - len(self.indices), len(self.perturbed))
            level, position = level + 1, int(self.perturbed[position])
        query = with_split_name(self.queries[int(self.indices[position])], self.name)
        presence, perturbation = self.presence[position], self.perturbations[level]
        if self.is_perturbed and perturbation is not None:  # asked at every level
            query = replace(query, id=level_id(query.id, perturbation))
        return query, presence, CLEAN if presence == "unlocated" else perturbation

    def augmented(self, query: Query, epoch: int) -> LoadedImage:
        """The image of a query with its regions, as it is before it is perturbed."""
        loaded = self.source.load(query)
        if self.augmentation is None:
            return loaded
        seed = query_rng(self.policy.seed, epoch, query.id, "augment").integers(2**32)
        return self.augmentation(loaded, int(seed))

    def silhouettes(self, query_id: str, epoch: int) -> Sequence[np.ndarray]:
        """The masks of the key objects of a random query about present objects; empty without any."""
        rng = query_rng(self.policy.seed, epoch, query_id, "silhouettes")
        for index in rng.permutation(self.shown):
            try:
                loaded = self.augmented(self.queries[int(index)], epoch)
            except DataError:
                # It is reported where it is asked itself.
                if self.source.on_bad_record == "raise":
                    raise
                continue
            if loaded.evidence:
                return loaded.evidence
        return ()

    def wrong_answers(self, query: Query, epoch: int | None) -> Sequence[str]:
        """The source's wrong answers, or a random (without an epoch, the first) wrong gold answer to a short question of its form."""
        if (wrong := self.source.wrong_answers(query)) or query.answer_type != "short":
            return wrong
        others: Iterable[str] = self._golds.get(question_form(query), ())
        if epoch is not None:
            golds = list(others)
            rng = query_rng(self.policy.seed, epoch, query.id, "form")
            others = (golds[i] for i in rng.permutation(len(golds)))
        return next(((g,) for g in others if not grade(g, query.answer, "short", query.synonyms).correct), ())


class PerturbedQueries(Dataset[Sample]):
    """The queries of one or several splits; `dataset[epoch, index]` is a query's `Sample` in an epoch.

    A DataError if a record is invalid and not to be left out, or no query is left or can be perturbed, or too few (`taught`).

    Args:
        splits: name -> split; a name goes in front of the ids and categories of its queries.
        image_processor: defines the size at which the model sees an image.
        check: refuses queries that cannot be put to the model.
        where: the setting that holds the splits, for messages.
        named: whether the name of a split is a part of its setting: "data.test.clean".
        taught: whether the queries teach a model or measure its levels, so that those with regions must stand for all.
    """

    def __init__(
        self,
        splits: Mapping[str, EvalSplit],
        policy: NoisePolicy,
        image_processor: Any,
        check: Check = accept,
        where: str = "data",
        named: bool = True,
        augmentation: Augmentation | None = None,
        taught: bool = False,
    ) -> None:
        self.policy, self.image_processor = policy, image_processor
        self.where, self._check = where, check
        self._copies: Sequence[ImageCopy] = ()
        self._parts = []
        for name, split in splits.items():
            setting = f"{where}.{name}" if name and named else where
            self._parts.append(_Part(name, split, setting, policy, check, augmentation, taught))
        self._ends = list(accumulate(map(len, self._parts)))
        if not len(self):
            raise DataError(f"{where}: no query is left")
        for part in self._parts:
            if part.is_perturbed and not len(part.perturbed):
                raise part.nothing_perturbed("query")

    def check_answer_types(self) -> None:
        """Raise a DataError if the queries of an answer type cannot be perturbed, so that its levels cannot be measured."""
        for part in self._parts:
            types = np.array([part.queries[int(index)].answer_type for index in part.indices])
            for answer_type in sorted({*types} - {*types[part.perturbed]}):
                raise part.nothing_perturbed(f"{answer_type} query")

    def make_copies(self, copies: Sequence[ImageCopy]) -> None:
        """Give each sample these perturbed copies of its image from now on; a split without such a region is a DataError."""
        regions = {copy.region for copy in copies}
        for part in self._parts:
            for region, what, has_region in (
                ("object", "its key object", part.source.has_evidence),
                ("distractor", "an object that it does not ask about", part.source.has_distractor),
            ):
                queries = (part.queries[int(index)] for index in part.indices)
                if region in regions and not any(map(has_region, queries)):
                    missing = f"no query has a region of {what}, which model.probes or an estimator perturbs"
                    advice = f"take {region!r} out of model.probes (`region: image` for Stability)"
                    raise DataError(f"{part.where}: {missing}: {advice}, or give records with such regions")
        self._copies = tuple(copies)

    def is_noised(self, query_id: str) -> bool:
        """Whether the policy perturbs the split that contains a query."""
        prefixes = (f"{part.name}:" if part.name else "" for part in self._parts if part.is_perturbed)
        return any(map(query_id.startswith, prefixes))

    @property
    def queries(self) -> Sequence[Query]:
        return LazyQueries(len(self), partial(map, lambda index: self._item(index)[1]))

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def _item(self, index: int) -> tuple[_Part, Query, Presence, Perturbation | None]:
        """The part that holds an item, and the item as `_Part.item` returns it."""
        number = bisect_right(self._ends, index)
        part = self._parts[number]
        return part, *part.item(index - (self._ends[number - 1] if number else 0))

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """The sample at (epoch, index); a DataError if the record cannot be loaded."""
        return self._load(*key)[0]

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> SampleBatch:
        """The samples of a batch, without records that cannot be loaded and are to be left out."""
        batch = SampleBatch([], {}, [], [])
        for epoch, index in keys:
            try:
                sample, clipped, is_empty = self._load(epoch, index)
            except DataError as error:
                source = self._item(index)[0].source
                policy = self.policy.no_region if isinstance(error, NoEvidenceError) else source.on_bad_record
                if policy == "raise":
                    raise
                batch.left_out[index] = str(error)
                continue
            batch.samples.append(sample)
            if clipped:
                batch.clipped.append(index)
            if is_empty:
                batch.empty.append(index)
        return batch

    def _load(self, epoch: int, index: int) -> tuple[Sample, bool, bool]:
        """A sample, whether one of its regions is partly outside the image, and whether those of its key objects have no pixel."""
        part, query, presence, perturbation = self._item(index)
        loaded = part.augmented(query, epoch)
        is_empty = part.is_perturbed and presence == "present" and not loaded.evidence
        if is_empty:
            if part.policy.no_region == "raise" or perturbation not in (None, CLEAN):
                raise NoEvidenceError(f"record {query.id!r}: no pixel of its image shows what it asks about")
            perturbation = CLEAN
        silhouettes = None if part.source.annotates_all else partial(part.silhouettes, query.id, epoch)
        wrong = part.wrong_answers(query, epoch)
        self._check(query, wrong)
        how = part.policy, self.image_processor
        try:
            sample = perturb_query(query, loaded, *how, epoch, perturbation, wrong, silhouettes)
            if self._copies:
                sample = sample._replace(copies=perturbed_copies(sample, loaded, self._copies, *how))
        except ValueError as error:
            raise DataError(f"record {query.id!r}: {error}") from error
        return sample, loaded.clipped, is_empty


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
