"""Open-vocabulary detection of phrases with transformers' detectors (Grounding DINO, OWLv2 and variants)."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

from vlm_calibration.hub import loading
from vlm_calibration.models.base import Dtype
from vlm_calibration.records import DataError

Box = tuple[float, float, float, float]  # (x0, y0, x1, y1) in pixels, inside the image

GROUNDING_DINO = ("grounding-dino", "mm-grounding-dino")
SEPARATOR = ". "  # of phrases in Grounding DINO's text: "dog. red cup."


class Detection(NamedTuple):
    """A detected box with its phrase and its score in [0, 1]."""

    label: str
    box: Box
    score: float


class Detector(ABC):
    """Detects phrases in images. The constructor takes settings only; call `load` before `detect`."""

    @abstractmethod
    def load(self, device: torch.device) -> None:
        """Load the model onto this device; DataError if it does not exist, or this detector does not support its type."""

    @abstractmethod
    def detect(self, images: Sequence[np.ndarray], phrases: Sequence[Sequence[str]]) -> list[list[Detection]]:
        """For each image, uint8 [H, W, 3], the boxes of its phrases (at least one), highest score first."""


@dataclass(eq=False)
class ZeroShotDetector(Detector):
    """A zero-shot object detector from the Hub. A box has the phrase with its highest score.

    Args:
        name_or_path: Grounding DINO (also MM Grounding DINO) or OWLv2 (also OWL-ViT): a name on the Hub or a folder.
        threshold: minimum score of a box for a phrase, exclusive, in [0, 1). OWLv2's scores are lower; use about 0.1.
        max_boxes: maximum number of boxes per phrase and image, the ones with the highest scores.
        dtype: of weights and arithmetic.
        revision: as in `from_pretrained`.
    """

    name_or_path: str = "IDEA-Research/grounding-dino-base"
    threshold: float = 0.3
    max_boxes: int = 16
    dtype: Dtype = "float32"
    revision: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1 or self.max_boxes < 1:
            found = f"found {self.threshold} and {self.max_boxes}"
            raise DataError(f"detector: needs 0 <= threshold < 1 and max_boxes >= 1, {found}")

    def load(self, device: torch.device) -> None:
        known = (*GROUNDING_DINO, "owlv2", "owlvit")
        self.model, self.processor = load_pair(AutoModelForZeroShotObjectDetection, known, self, device)
        self._is_grounding_dino = self.model.config.model_type in GROUNDING_DINO

    @torch.inference_mode()
    def detect(self, images: Sequence[np.ndarray], phrases: Sequence[Sequence[str]]) -> list[list[Detection]]:
        if not images:
            return []
        # As in the detectors' training: lower case, without the dot that separates phrases.
        prompts = [
            [" ".join(p.lower().replace(".", " ").split()) or "object" for p in row] for row in phrases
        ]
        if self._is_grounding_dino:
            texts: dict[str, Any] = {"text": [_join_prompts(row) for row in prompts], "padding": True}
        else:
            texts = {"text": prompts}  # OWL's processor pads texts itself, to its training length
        inputs = self.processor(images=list(images), return_tensors="pt", truncation=True, **texts)
        outputs = self.model(**to_device(inputs, self.model))
        sizes = torch.tensor([image.shape[:2] for image in images])
        # Keep all boxes in order: the threshold is applied per phrase.
        post_process = self.processor.image_processor.post_process_object_detection
        scaled = post_process(outputs, threshold=-1.0, target_sizes=sizes)
        probabilities = outputs.logits.float().sigmoid().cpu()
        detections = []
        for i, row in enumerate(phrases):
            scores = self._phrase_scores(probabilities[i], prompts[i])
            corner = sizes[i].flip(0).repeat(2).float()
            boxes = torch.minimum(scaled[i]["boxes"].float().cpu().clamp(min=0), corner)
            detections.append(self._select_boxes(row, scores, boxes))
        return detections

    def _phrase_scores(self, probabilities: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score of each box for each phrase, float32 [boxes, phrases]: the maximum over the phrase's tokens.

        Grounding DINO's processor joins tokens with a high score into a label, which may be half a phrase or two phrases.
        """
        if not self._is_grounding_dino:
            return probabilities[:, : len(prompts)]  # further columns pad the batch
        encoded = self.processor.tokenizer(_join_prompts(prompts), return_offsets_mapping=True)
        offsets = encoded["offset_mapping"][: probabilities.shape[1]]
        scores = torch.zeros(len(probabilities), len(prompts))
        begin = 0
        for column, prompt in enumerate(prompts):
            end = begin + len(prompt)
            if tokens := [t for t, (a, b) in enumerate(offsets) if begin <= a < b <= end]:
                scores[:, column] = probabilities[:, tokens].amax(dim=1)
            begin = end + len(SEPARATOR)
        return scores

    def _select_boxes(self, phrases: Sequence[str], scores: Tensor, boxes: Tensor) -> list[Detection]:
        """Non-empty boxes above the threshold, highest score first, at most `max_boxes` per phrase."""
        best = torch.arange(scores.shape[1]) == scores.argmax(dim=1, keepdim=True)
        above = (scores > self.threshold) & best
        above &= ((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]))[:, None]
        detections = []
        for column, phrase in enumerate(phrases):
            rows = above[:, column].nonzero()[:, 0]
            order = scores[rows, column].argsort(descending=True, stable=True)[: self.max_boxes]
            for row in rows[order].tolist():
                x0, y0, x1, y1 = boxes[row].tolist()
                detections.append(Detection(phrase, (x0, y0, x1, y1), float(scores[row, column])))
        return sorted(detections, key=lambda d: -d.score)


def _join_prompts(prompts: Sequence[str]) -> str:
    return SEPARATOR.join(prompts) + "."


def load_pair(kind: Any, known: Sequence[str], settings: Any, device: torch.device) -> tuple[Any, Any]:
    """Load a model of the AutoModel class `kind` and its processor; a DataError if it does not exist or is of no `known` type."""
    name, revision = settings.name_or_path, settings.revision
    with loading(kind.__name__, name):
        model = kind.from_pretrained(name, dtype=settings.dtype, revision=revision)
        processor = AutoProcessor.from_pretrained(name, revision=revision)
    if model.config.model_type not in known:
        raise DataError(f"{name!r} is a {model.config.model_type}, expected one of {', '.join(known)}")
    return model.eval().to(device), processor


def to_device(inputs: Any, model: Any) -> dict[str, Tensor]:
    """Move inputs to the model's device, floating-point tensors to its dtype."""
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    return {n: v.to(model.device, model.dtype if v.is_floating_point() else None) for n, v in tensors.items()}
