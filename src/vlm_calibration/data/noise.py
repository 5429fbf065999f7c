"""What noise a query gets: level, region and seed, as a pure function of (seed, epoch, query id).

Nothing here keeps a random stream, so a sample is the same in any worker, on any rank and after any restart.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from vlm_calibration.data.resolution import model_resolution, resize_to_model
from vlm_calibration.perturbation.images import resize_mask
from vlm_calibration.perturbation.levels import ConfidenceLevels, LinearLevels
from vlm_calibration.perturbation.noise import add_region_noise
from vlm_calibration.perturbation.regions import choose_region, region_mask
from vlm_calibration.perturbation.schedules import CosineSchedule, Schedule
from vlm_calibration.records import DataError, LoadedImage, Query


class Sample(NamedTuple):
    """A query as the model meets it.

    image: uint8 [H, W, 3], of the size that the policy names where it is noised, else as in the file. confidence: what to
    state, in [0, 1]. step: diffusion step of the noise on the evidence; 0 where the evidence is intact. epoch: in which this
    is. wrong_answer: a wrong answer that the response gives in place of the gold one, if any. wrong: answers that would be wrong.
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
        """The answer that the response gives."""
        return self.query.answer if self.wrong_answer is None else self.wrong_answer


@dataclass(frozen=True)
class NoisePolicy:
    """How queries are perturbed, and which confidence that earns.

    Args:
        levels: the noise steps and the confidence to state at each. `LinearLevels` is the paper's mapping,
            `AnchoredLevels` states the base model's measured accuracy.
        schedule: noise schedule of the forward process. Cosine, our choice, spreads the loss of evidence over most of the
            levels; with the linear one it is over by the fourth.
        level_weights: relative frequency of each of the levels, as many as there are; None: all alike.
        clean_fraction: share of samples in [0, 1] that are left clean, whatever the weights.
        absent: what to noise where the question is about an object that is not there: another object or else a random
            region ("distractor"), nothing ("clean"), or leave such queries out ("skip"). Only the answer says that it is not
            there (no, to a yes/no question), never a missing region.
        no_region: what happens to any other query without a region of what it is about: it is left out and counted ("skip"),
            or stops the run ("raise"). On images that are not noised, queries need no region.
        distractor_probability: share of samples in [0, 1] in which noise goes to a region the question is not about,
            while the confidence stays that of a clean image.
        resolution: noise at the size the model sees ("model"), or that of the file ("native", the paper's reading).
        shape: noise the object's pixels ("mask") or its bounding box ("box", which hides the silhouette).
        dilate: grow the region in each direction, by this fraction of the longer side of its bounding box.
        wrong_answer_rate: how often the response to be trained gives a wrong answer, in [0, 1] times how often the stated
            confidence says that it is wrong. With 1, a response that states c is right with probability c, as the
            model's own will be; with 0 the confidence follows on the gold answer alone, and a model learns to be sure
            of whatever it names. Wrong answers themselves are not taught. A source may know no wrong answer to a query.
        seed: of all of the above.
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
        # Linear levels state 0% at their last step, which must then be the one without signal.
        if last > steps or (isinstance(self.levels, LinearLevels) and last != steps):
            raise DataError(f"noise.levels goes up to step {last} but noise.schedule has {steps}")

    def draw_step(self, rng: np.random.Generator) -> int:
        """The noise step of one sample."""
        if rng.random() < self.clean_fraction:
            return 0
        weights = np.asarray(self.level_weights or [1.0] * len(self.levels.steps))
        return self.levels.steps[int(rng.choice(len(weights), p=weights / weights.sum()))]


def query_rng(seed: int, epoch: int, query_id: str, purpose: str = "") -> np.random.Generator:
    """The generator that belongs to this query in this epoch, whoever asks for it; another one for each purpose."""
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
    """Noise one query.

    Args:
        wrong: answers that would be wrong.
        image_processor: says at which size the model sees the image; unused at native resolution.
        step: the noise step; None: drawn by the policy. A given step goes to the evidence, never to a distractor.

    Raises:
        DataError: an `image_processor` whose resolution is not known.
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
    # Grown before one is chosen, so that noise on a distractor cannot spill onto the evidence.
    choice = choose_region(
        [region_mask(m, shape=policy.shape, dilate=policy.dilate) for m in evidence],
        [region_mask(m, shape=policy.shape, dilate=policy.dilate) for m in distractors],
        absent=policy.absent,
        distractor_probability=distractor_probability,
        rng=rng,
        image_shape=size,
    )
    # Without noise the image stays that of the file: the processor makes of it what it makes of it in use.
    if choice.mask is not None and step > 0:
        if policy.resolution == "model":
            image = resize_to_model(image_processor, image)
        image = add_region_noise(
            image, choice.mask, step, schedule=policy.schedule, seed=int(rng.integers(2**63))
        )
    evidence_step = 0 if choice.mask is None or choice.kind == "distractor" else step
    confidence = policy.levels.confidence(evidence_step, query.answer_type)
    wrong_answer = _wrong_answer(query, confidence, policy, epoch, wrong) if wrong else None
    return Sample(query, image, confidence, evidence_step, epoch, wrong_answer, tuple(wrong))


def _wrong_answer(
    query: Query, confidence: float, policy: NoisePolicy, epoch: int, wrong: Sequence[str]
) -> str | None:
    """The wrong answer that the response to this query gives in this epoch, if it gives one."""
    rng = query_rng(policy.seed, epoch, query.id, "mistake")
    if rng.random() >= policy.wrong_answer_rate * (1.0 - confidence):
        return None
    return wrong[int(rng.integers(len(wrong)))]
