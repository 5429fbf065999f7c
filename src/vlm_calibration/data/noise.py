"""Perturbation of one query: its noise level, region and seed are a pure function of (seed, epoch, query id).

There is no random stream, so a sample is the same in any worker, on any rank and after any restart. The noise itself is the
albumentations transform `RegionNoise`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from vlm_calibration.data.resolution import model_resolution, resize_to_model
from vlm_calibration.perturbation.images import resize_mask
from vlm_calibration.perturbation.levels import ConfidenceLevels, LinearLevels
from vlm_calibration.perturbation.regions import choose_region, region_mask
from vlm_calibration.perturbation.schedules import CosineSchedule, Schedule
from vlm_calibration.records import DataError, LoadedImage, Query

if TYPE_CHECKING:
    from vlm_calibration.perturbation.transform import RegionNoise


class Sample(NamedTuple):
    """A perturbed query.

    Attributes:
        query: the query.
        image: uint8 [H, W, 3]; a noised image has the size set by the policy, a clean image that of the file.
        confidence: the confidence to state, in [0, 1].
        step: diffusion step of the noise on the evidence; 0 if the evidence is intact.
        epoch: the epoch that the sample is drawn for.
        wrong_answer: a wrong answer for the response to give instead of the gold answer; None: the gold answer.
        wrong: plausible wrong answers.
    """

    query: Query
    image: np.ndarray
    confidence: float
    step: int
    epoch: int = 0
    wrong_answer: str | None = None
    wrong: tuple[str, ...] = ()

    @property
    def answer(self) -> str:
        """The answer of the response: `wrong_answer`, or else the gold answer."""
        return self.query.answer if self.wrong_answer is None else self.wrong_answer


@dataclass(frozen=True)
class NoisePolicy:
    """How queries are perturbed, and the confidence to state after it.

    Args:
        levels: the noise steps, and the confidence to state at each. `LinearLevels` is the paper's mapping,
            `AnchoredLevels` states the base model's measured accuracy.
        schedule: noise schedule of the forward process. Cosine, our choice, spreads the loss of evidence over most of the
            levels; with the linear schedule it is complete by the fourth level.
        level_weights: relative frequency of each level; None: uniform.
        clean_fraction: share of samples in [0, 1] that stay clean, in addition to the weights.
        absent: what to noise if the question is about an absent object: another object or else a random region
            ("distractor"), nothing ("clean"), or leave such queries out ("skip"). An object is absent if the answer says so
            (no, to a yes/no question), not if a region is missing.
        no_region: what to do with other queries without a region of the key object: leave them out and report the number
            ("skip"), or stop the run ("raise"). Queries on clean images need no region.
        distractor_probability: share of samples in [0, 1] whose noise goes to a region that the question is not about; their
            confidence is that of a clean image.
        resolution: noise at the size at which the model sees the image ("model"), or at the size of the file ("native", the
            paper's reading).
        shape: noise the object's pixels ("mask") or its bounding box ("box", which hides the silhouette).
        dilate: growth of the region in each direction, as a fraction of the longer side of its bounding box.
        wrong_answer_rate: in [0, 1]; a training response that states confidence c gives a wrong answer with probability
            `wrong_answer_rate * (1 - c)`. With 1, it is correct with probability c, like the model's own responses; with 0 the
            confidence always follows the gold answer, and the model learns to be sure of any answer. The tokens of wrong
            answers are not trained. Queries for which the source has no wrong answer keep the gold answer.
        seed: seed of all random choices.
    """

    levels: ConfidenceLevels = field(default_factory=LinearLevels)
    schedule: Schedule = field(default_factory=CosineSchedule)
    level_weights: list[float] | None = None
    clean_fraction: float = 0.0
    absent: Literal["distractor", "clean", "skip"] = "distractor"
    no_region: Literal["skip", "raise"] = "skip"
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
        weights = self.level_weights
        if weights is not None and (
            len(weights) != len(self.levels.steps)
            or not all(0 <= w < math.inf for w in weights)
            or sum(weights) == 0
        ):
            raise DataError(
                f"noise.level_weights must be {len(self.levels.steps)} numbers of at least 0, one a level and not all "
                f"0, found {weights}"
            )
        if not 0 <= self.dilate < math.inf:
            raise DataError(f"noise.dilate must be a finite number of at least 0, found {self.dilate}")
        if self.seed < 0:
            raise DataError(f"noise.seed must be at least 0, found {self.seed}")
        last, steps = self.levels.steps[-1], self.schedule.steps
        # Linear levels state 0% at their last step, so it must be the last step of the schedule.
        if last > steps or (isinstance(self.levels, LinearLevels) and last != steps):
            raise DataError(f"noise.levels goes up to step {last} but noise.schedule has {steps}")

    def draw_step(self, rng: np.random.Generator) -> int:
        """Draw the noise step of one sample."""
        if rng.random() < self.clean_fraction:
            return 0
        weights = np.asarray(self.level_weights or [1.0] * len(self.levels.steps))
        return self.levels.steps[int(rng.choice(len(weights), p=weights / weights.sum()))]


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
    step: int | None = None,
    wrong: Sequence[str] = (),
) -> Sample:
    """Perturb one query.

    Args:
        query: the query.
        loaded: its image and region masks.
        policy: the noise policy.
        image_processor: defines the size at which the model sees the image; unused at native resolution.
        epoch: with the policy's seed and the query's id, decides all random choices.
        step: noise step of the evidence, never of a distractor; None: drawn by the policy.
        wrong: plausible wrong answers.

    Raises:
        DataError: the input size of `image_processor` is unknown.
    """
    rng = query_rng(policy.seed, epoch, query.id)
    drawn = policy.draw_step(rng)
    distractor_probability = policy.distractor_probability if step is None else 0.0
    step = drawn if step is None else step
    image, evidence, distractors, _ = loaded
    size = image.shape[:2]
    if policy.resolution == "model":
        size = model_resolution(image_processor, *size)
        evidence = tuple(resize_mask(m, size) for m in evidence)
        distractors = tuple(resize_mask(m, size) for m in distractors)
    # Regions are dilated before one is chosen, so that noise on a distractor cannot touch the evidence.
    choice = choose_region(
        [region_mask(m, shape=policy.shape, dilate=policy.dilate) for m in evidence],
        [region_mask(m, shape=policy.shape, dilate=policy.dilate) for m in distractors],
        absent=policy.absent,
        distractor_probability=distractor_probability,
        rng=rng,
        image_shape=size,
    )
    # A clean image keeps the size of the file, so that the processor resizes it as in use.
    if choice.mask is not None and step > 0:
        if policy.resolution == "model":
            image = resize_to_model(image_processor, image)
        image = region_noise(policy.schedule)(
            image=image, mask=choice.mask, step=step, seed=int(rng.integers(2**63))
        )["image"]
    evidence_step = 0 if choice.mask is None or choice.kind == "distractor" else step
    confidence = policy.levels.confidence(evidence_step, query.answer_type)
    wrong_answer = _wrong_answer(query, confidence, policy, epoch, wrong) if wrong else None
    return Sample(query, image, confidence, evidence_step, epoch, wrong_answer, tuple(wrong))


@lru_cache(maxsize=8)
def region_noise(schedule: Schedule) -> RegionNoise:
    """The albumentations transform for a schedule; the first call imports albumentations."""
    from vlm_calibration.perturbation.transform import RegionNoise  # deferred: slow to import

    return RegionNoise(schedule)


def _wrong_answer(
    query: Query, confidence: float, policy: NoisePolicy, epoch: int, wrong: Sequence[str]
) -> str | None:
    """The wrong answer of the response in this epoch; None: the gold answer."""
    rng = query_rng(policy.seed, epoch, query.id, "mistake")
    if rng.random() >= policy.wrong_answer_rate * (1.0 - confidence):
        return None
    return wrong[int(rng.integers(len(wrong)))]
