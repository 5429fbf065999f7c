"""Segmentation of boxes into masks with transformers' promptable segmenters (SAM, SAM 2)."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import AutoModelForMaskGeneration

from vlm_calibration.models.base import Dtype
from vlm_calibration.regions.detector import Box, load_pair, to_device


class Segmenter(ABC):
    """Segments the object in a box. The constructor takes settings only; call `load` before `segment`."""

    @abstractmethod
    def load(self, device: torch.device) -> None:
        """Load the model onto this device; DataError if it does not exist, or this segmenter does not support its type."""

    @abstractmethod
    def segment(self, images: Sequence[np.ndarray], boxes: Sequence[Sequence[Box]]) -> list[np.ndarray]:
        """For each image, uint8 [H, W, 3], with at least one box: masks bool [boxes, H, W]."""


@dataclass(eq=False)
class PromptedSegmenter(Segmenter):
    """A promptable segmenter from the Hub. A pixel of a mask has a probability above 1/2.

    Args:
        name_or_path: SAM (arXiv 2304.02643) or SAM 2 (arXiv 2408.00714): a name on the Hub or a folder.
        dtype: of weights and arithmetic.
        revision: as in `from_pretrained`.
    """

    name_or_path: str = "facebook/sam2.1-hiera-large"
    dtype: Dtype = "float32"
    revision: str | None = None

    def load(self, device: torch.device) -> None:
        known = ("sam", "sam2", "sam2_video")
        self.model, self.processor = load_pair(AutoModelForMaskGeneration, known, self, device)

    @torch.inference_mode()
    def segment(self, images: Sequence[np.ndarray], boxes: Sequence[Sequence[Box]]) -> list[np.ndarray]:
        if not images:
            return []
        max_boxes = max(len(row) for row in boxes)
        # Boxes are segmented independently, so repeated boxes pad the batch.
        padded = [[list(box) for box in [*row, *[row[-1]] * (max_boxes - len(row))]] for row in boxes]
        inputs = self.processor(images=list(images), input_boxes=padded, return_tensors="pt")
        sizes = inputs.pop("original_sizes").tolist()
        reshaped = inputs.pop("reshaped_input_sizes", None)
        logits = self.model(**to_device(inputs, self.model), multimask_output=False).pred_masks
        masks = []
        for i, row in enumerate(boxes):
            # One image at a time: at full resolution the logits of all boxes may take a gigabyte.
            more = {} if reshaped is None else {"reshaped_input_sizes": reshaped[i : i + 1].tolist()}
            [image_masks] = self.processor.image_processor.post_process_masks(
                [logits[i, : len(row)].float()], original_sizes=sizes[i : i + 1], **more
            )
            masks.append(image_masks[:, 0].cpu().numpy())
        return masks
