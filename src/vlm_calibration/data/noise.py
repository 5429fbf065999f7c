"""Perturbation of one query, a pure function of (seed, epoch, query id): the same in any worker, on any rank, after any restart."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from vlm_calibration.data.resolution import model_resolution, resize_to_model
from vlm_calibration.perturbation.by_kind import KIND_NAMES, perturb_region
from vlm_calibration.perturbation.levels import CLEAN, NOISE, ConfidenceLevels, LinearLevels, Perturbation
from vlm_calibration.perturbation.masks import BoolMask, choose_region, region_mask, resize_mask
from vlm_calibration.perturbation.noise import CosineSchedule, Schedule
from vlm_calibration.records import DataError, LoadedImage, Query

CopiedRegion = Literal["image", "object", "distractor"]
"""What a copy changes: the whole image; all regions of the key object; one region that the question is not about."""


class ImageCopy(NamedTuple):
    """A perturbed copy of every image; `number` tells apart the copies of one seed, whose random choices differ."""

    perturbation: Perturbation
    region: CopiedRegion = "image"
    seed: int = 0
    number: int = 0


class Sample(NamedTuple):
    """A perturbed query.

    Attributes:
        image: uint8 [H, W, 3]; a perturbed image has the size set by the policy, an untouched image that of the file.
        confidence: the confidence to state, in [0, 1].
        perturbation: what happened to the evidence; `CLEAN` if it is intact.
        noise_step: diffusion step of the noise on the evidence, 0 if the evidence is intact; None for other kinds.
        wrong_answer: a wrong answer for the response to give instead of the gold answer; None: the gold answer.
        wrong: plausible wrong answers.
        copies: perturbed copies of the image, uint8 [H, W, 3] each; None for one whose region the image lacks.
    """

    query: Query
    image: np.ndarray
    confidence: float
    perturbation: Perturbation
    noise_step: int | None
    epoch: int = 0
    wrong_answer: str | None = None
    wrong: tuple[str, ...] = ()
    copies: Mapping[ImageCopy, np.ndarray | None] = {}

    @property
    def answer(self) -> str:
        """The answer of the response: `wrong_answer`, or else the gold answer."""
        return self.query.answer if self.wrong_answer is None else self.wrong_answer


@dataclass(frozen=True)
class NoisePolicy:
    """How queries are perturbed, and the confidence to state after it.

    Args:
        levels: the strengths of each kind of perturbation, and the confidence to state at each. `LinearLevels` is the paper's
            mapping, `AnchoredLevels` states the base model's measured accuracy.
        kinds: kind of perturbation -> its relative frequency, e.g. {noise: 2, blur: 1, occlusion: 1}; the paper's is noise alone.
            All strengths of a kind are equally frequent, untouched images among them.
        schedule: noise schedule of the forward process. Cosine, our choice, spreads the loss of evidence over most of the levels;
            with the linear schedule it is complete by the fourth level.
        clean_fraction: share of samples in [0, 1] that stay untouched, besides those of strength 0.
        absent: what to perturb if the question is about an absent object: another object, or a region with the shape of another
            query's key object ("distractor"), nothing ("clean"), or leave such queries out ("skip"). An object is absent if the
            answer denies that it exists, or the query says so (`absent`), not if a region is missing.
        no_region: what to do with other queries that lack a region of a key object: ask them with untouched images and report
            the number ("clean"), or stop the run ("raise"). Queries on clean images need no region.
        distractor_probability: share of samples in [0, 1] whose perturbation goes to a region that the question is not about;
            their confidence is that of an untouched image.
        resolution: perturb at the size at which the model sees the image ("model"), or at the size of the file ("native", the
            paper's reading).
        shape: perturb the object's pixels ("mask") or its bounding box ("box", which hides the silhouette).
        dilate: growth of the region in each direction, as a fraction of the longer side of its bounding box.
        wrong_answer_rate: in [0, 1]; a training response that states confidence c gives a wrong answer with probability
            `wrong_answer_rate * (1 - c)`. With 1, it is correct with probability c, like the model's own responses; with 0 the
            confidence always follows the gold answer, and the model learns to be sure of any answer. The tokens of wrong
            answers are not trained. A short answer for which the source has no wrong one is replaced by the gold answer to a
            question of the same form; queries without any keep the gold answer and are counted.
        seed: seed of all random choices.
    """

    levels: ConfidenceLevels = field(default_factory=LinearLevels)
    kinds: dict[str, float] = field(default_factory=lambda: {NOISE: 1.0})
    schedule: Schedule = field(default_factory=CosineSchedule)
    clean_fraction: float = 0.0
    absent: Literal["distractor", "clean", "skip"] = "distractor"
    no_region: Literal["clean", "raise"] = "clean"
    distractor_probability: float = 0.1
    resolution: Literal["model", "native"] = "model"
    shape: Literal["mask", "box"] = "mask"
    dilate: float = 0.0
    wrong_answer_rate: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("clean_fraction", "distractor_probability", "wrong_answer_rate"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise DataError(f"noise.{name} must be in [0, 1], found {value}")
        if self.absent not in ("distractor", "clean", "skip"):
            raise DataError(f"noise.absent must be distractor, clean or skip, found {self.absent!r}")
        if unknown := sorted(set(self.kinds) - set(KIND_NAMES)):
            raise DataError(f"noise.kinds: there is no kind {unknown[0]!r}: expected {', '.join(KIND_NAMES)}")
        if not all(0 <= w < math.inf for w in self.kinds.values()) or not sum(self.kinds.values()):
            expected = "frequencies of at least 0, one of them above 0"
            raise DataError(f"noise.kinds must be {expected}, found {dict(self.kinds)}")
        if not 0 <= self.dilate < math.inf:
            raise DataError(f"noise.dilate must be a finite number of at least 0, found {self.dilate}")
        if self.seed < 0:
            raise DataError(f"noise.seed must be at least 0, found {self.seed}")
        try:
            for kind in self.used_kinds:
                self.levels.strengths(kind)
        except ValueError as error:
            raise DataError(f"noise.kinds: {error}") from error

    @property
    def used_kinds(self) -> tuple[str, ...]:
        return tuple(kind for kind, weight in self.kinds.items() if weight)

    @property
    def perturbations(self) -> tuple[Perturbation, ...]:
        """Every level of every kind that is drawn, the untouched image once."""
        levels = [Perturbation(kind, s) for kind in self.used_kinds for s in self.levels.strengths(kind) if s]
        return (CLEAN, *levels)

    def draw(self, epoch: int, query_id: str, rng: np.random.Generator) -> Perturbation:
        """The perturbation of a sample, whose generator is `rng`."""
        if rng.random() < self.clean_fraction:
            return CLEAN
        # The kind has a generator of its own, so that strengths do not depend on the number of kinds.
        weights = np.array([self.kinds[k] for k in self.used_kinds], dtype=np.float64)
        kind_rng = query_rng(self.seed, epoch, query_id, "kind")
        kind = self.used_kinds[int(kind_rng.choice(len(weights), p=weights / weights.sum()))]
        strengths = self.levels.strengths(kind)
        strength = strengths[int(rng.choice(len(strengths), p=np.full(len(strengths), 1 / len(strengths))))]
        return Perturbation(kind, strength) if strength else CLEAN

    def grown(self, masks: Sequence[BoolMask], size: tuple[int, int]) -> list[BoolMask]:
        """The regions of masks at another size (height, width), with the shape and growth of this policy."""
        return [region_mask(resize_mask(m, size), shape=self.shape, dilate=self.dilate) for m in masks]


def query_rng(seed: int, epoch: int, query_id: str, purpose: str = "") -> np.random.Generator:
    """The random generator of a query in an epoch, for one purpose; the same in any process."""
    digest = hashlib.blake2b(query_id.encode(), digest_size=16, person=purpose.encode()).digest()
    return np.random.default_rng([seed, epoch, *np.frombuffer(digest, dtype=np.uint32).tolist()])


def perturb_query(
    query: Query,
    loaded: LoadedImage,
    policy: NoisePolicy,
    image_processor: Any,
    epoch: int,
    perturbation: Perturbation | None = None,
    wrong: Sequence[str] = (),
    silhouettes: Callable[[], Sequence[BoolMask]] | None = None,
) -> Sample:
    """Perturb one query; a DataError if the input size of `image_processor`, unused at native resolution, is unknown.

    Args:
        perturbation: of the evidence, never of a distractor; None: drawn by the policy.
        silhouettes: masks of another query's key objects, of any size, that give the region of an absent object its shape; empty for
            a random box. None: the image's other objects have such shapes.
    """
    rng = query_rng(policy.seed, epoch, query.id)
    drawn = policy.draw(epoch, query.id, rng)
    distractor_probability = policy.distractor_probability if perturbation is None else 0.0
    perturbation = drawn if perturbation is None else perturbation
    image, lost = loaded.image, perturbation
    # Asked for untouched images too, so that one that the processor refuses is named in every epoch.
    size = image.shape[:2]
    if policy.resolution == "model":
        size = model_resolution(image_processor, *size)
    if perturbation.strength > 0:
        # Regions are dilated before one is chosen, so that a distractor's perturbation cannot touch the evidence.
        distractors = policy.grown(loaded.distractors, size)
        if silhouettes is not None:
            needed = policy.absent == "distractor" and not loaded.evidence
            other = policy.grown(silhouettes(), size) if needed else []
            distractors = [np.logical_or.reduce(other)] if other else []
        region, takes_evidence = choose_region(
            policy.grown(loaded.evidence, size),
            distractors,
            perturb_absent=policy.absent == "distractor",
            distractor_probability=distractor_probability,
            rng=rng,
            image_shape=size,
            silhouette=silhouettes is not None,
        )
        if region is not None:
            if policy.resolution == "model":
                image = resize_to_model(image_processor, image)
            image = perturb_region(image, region, perturbation, policy.schedule, int(rng.integers(2**63)))
        if not takes_evidence:
            lost = CLEAN
    confidence = policy.levels.confidence(lost, query.answer_type, query.id)
    noise_step = round(lost.strength * policy.schedule.steps) if lost.kind in ("", NOISE) else None
    wrong_answer = None
    if wrong:
        wrong_rng = query_rng(policy.seed, epoch, query.id, "mistake")
        if wrong_rng.random() < policy.wrong_answer_rate * (1.0 - confidence):
            wrong_answer = wrong[int(wrong_rng.integers(len(wrong)))]
    return Sample(query, image, confidence, lost, noise_step, epoch, wrong_answer, tuple(wrong))


def perturbed_copies(
    sample: Sample,
    loaded: LoadedImage,
    copies: Sequence[ImageCopy],
    policy: NoisePolicy,
    image_processor: Any,
) -> dict[ImageCopy, np.ndarray | None]:
    """The perturbed copies of a sample's image, uint8 [H, W, 3] each; None for a copy whose region the image lacks.

    They are made from the image that the model is asked about, perturbed or not, at the resolution at which the model sees it. A
    distractor is a random one of those that do not touch the key object.
    """
    image = resize_to_model(image_processor, sample.image) if policy.resolution == "model" else sample.image
    size = image.shape[:2]
    made: dict[ImageCopy, np.ndarray | None] = dict.fromkeys(copies)
    target: BoolMask | None = None
    apart: list[BoolMask] = []
    regions = {copy.region for copy in copies}
    if regions - {"image"}:
        evidence = policy.grown([mask for mask in loaded.evidence if mask.any()], size)
        target = np.logical_or.reduce(evidence) if evidence else None
    if "distractor" in regions:
        apart = policy.grown([mask for mask in loaded.distractors if mask.any()], size)
        apart = [mask for mask in apart if target is None or not np.any(mask & target)]
    for copy in copies:
        rng = query_rng(copy.seed, copy.number, sample.query.id, "copy")
        seed = int(rng.integers(2**63))
        region = target
        if copy.region == "image":
            region = np.ones(size, dtype=np.bool_)
        elif copy.region == "distractor":
            region = apart[int(rng.integers(len(apart)))] if apart else None
        if region is not None:
            made[copy] = perturb_region(image, region, copy.perturbation, policy.schedule, seed)
    return made
