"""What a query costs before it reaches the model, part by part: reading, resizing, perturbing, processing, collating, copying.

Run with `python -m tests.performance.data_path`; prints a Markdown table. The image is a photograph of 1 and of 12 megapixels as a
JPEG, the processor that of Qwen2.5-VL with `data.max_pixels` of 1 megapixel. Parts are measured in CPU time of one thread, which
other load on the machine changes little. The bar: resizing the image and resizing a mask take at most 10 ms for each megapixel of the
file; otherwise the script ends with status 1.
"""

from __future__ import annotations

import os

os.environ.update(HF_HUB_OFFLINE="1", NO_ALBUMENTATIONS_UPDATE="1", TOKENIZERS_PARALLELISM="false")

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from matplotlib import cbook
from PIL import Image
from tests.models.processors import cached_family
from tests.performance.machine import processor as cpu
from tests.performance.machine import setting
from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

from vlm_calibration.data.candidates import CandidateCollator, CandidateSettings, tokenize_responses
from vlm_calibration.data.collate import ChatFormat, SFTCollator
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.data.noise import Sample
from vlm_calibration.data.resolution import resize_to_model
from vlm_calibration.perturbation.by_kind import KIND_NAMES, region_perturbation
from vlm_calibration.perturbation.images import load_image
from vlm_calibration.perturbation.levels import CLEAN, LinearLevels
from vlm_calibration.perturbation.masks import resize_mask
from vlm_calibration.perturbation.noise import CosineSchedule
from vlm_calibration.records import Query

SIZES = {"1 MP": (900, 1120), "12 MP": (3000, 4000)}
"""Name -> height and width of the file."""
MAX_PIXELS, MAX_LENGTH = 1_000_000, 4096
STRENGTH, SHARE = 0.5, 0.5  # the region's share of each side
BAR = 10.0
"""Milliseconds for each megapixel of the file."""
BARRED = ("resize to the model's size", "resize a mask")
LEVELS = LinearLevels(n_levels=11)
QUESTION, ANSWER = "Is there a woman in the picture?", "Yes"


def write_photograph(path: Path, height: int, width: int) -> None:
    """A portrait, enlarged or shrunk, with the grain of a sensor, as a JPEG."""
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        portrait = Image.open(file).convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    grain = np.random.default_rng(0).normal(0, 6, (height, width, 3))
    pixels = np.clip(np.asarray(portrait) + grain, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path, quality=90)


def save_processor(folder: Path) -> str:
    """Save Qwen2.5-VL's processor with the published sizes and a small tokenizer."""
    small = cached_family("qwen2_5_vl").processor
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(),
        tokenizer=small.tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=small.chat_template,
    ).save_pretrained(folder)
    return str(folder)


def parts_of(chat: ChatFormat, file: Path) -> dict[str, Callable[[], object]]:
    """Each part of the way of one query, with the results of those before it at hand."""
    image_processor = chat.processor.image_processor
    image = load_image(file)
    height, width = image.shape[:2]
    mask = np.zeros((height, width), dtype=np.bool_)
    top, left = (round(side * (1 - SHARE) / 2) for side in (height, width))
    mask[top : height - top, left : width - left] = True
    seen = resize_to_model(image_processor, image)
    region = resize_mask(mask, seen.shape[:2])
    parts: dict[str, Callable[[], object]] = {
        "read and decode": lambda: load_image(file),
        "resize to the model's size": lambda: resize_to_model(image_processor, image),
        "resize a mask": lambda: resize_mask(mask, seen.shape[:2]),
    }
    for kind in KIND_NAMES:
        transform = region_perturbation(kind, CosineSchedule())
        parts[f"perturb: {kind}"] = lambda transform=transform: transform(
            image=seen, mask=region, strength=STRENGTH, seed=0
        )
    sample = Sample(Query("q", "x", QUESTION, ANSWER, "yes_no"), seen, 0.5, CLEAN, 0)
    sft = SFTCollator(chat, MAX_LENGTH)
    gold = CandidateCollator(chat, LEVELS, CandidateSettings(), MAX_LENGTH)
    stored = chat.inputs([chat.render(QUESTION)], [seen], "right")["pixel_values"].untyped_storage()
    return {
        **parts,
        "image processor, perturbed image": lambda: image_processor(images=[seen], return_tensors="pt"),
        "image processor, untouched image": lambda: image_processor(images=[image], return_tensors="pt"),
        "collate stage 1": lambda: sft([sample]),
        "collate stage 2, 11 candidates": lambda: gold([sample]),
        "tokenize 11 candidates alone": lambda: tokenize_responses(chat, sample.query, [ANSWER], LEVELS),
        # What a worker does with each tensor of a batch; the other process maps the same pages.
        "copy to shared memory": lambda: torch.UntypedStorage._new_shared(stored.nbytes()).copy_(stored),
    }


def milliseconds(parts: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median CPU time of each part, taking turns, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in parts}
    for i in range(rounds + 1):
        for name, part in parts.items():
            start = time.process_time()
            part()
            if i:
                times[name].append(1000 * (time.process_time() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    parts = {}
    with tempfile.TemporaryDirectory() as folder:
        processor = save_processor(Path(folder) / "processor")
        data = PerturbedQueryDataModule(processor, max_pixels=MAX_PIXELS, max_length=MAX_LENGTH)
        for name, (height, width) in SIZES.items():
            file = Path(folder) / f"{height}.jpg"
            write_photograph(file, height, width)
            parts[name] = milliseconds(parts_of(data.chat, file), args.rounds)
    print(f"{cpu()}; {setting('torch', 'torchvision', 'transformers', 'pillow', 'numpy')}\n")
    print(f"| CPU time of a query (ms), file of | {' | '.join(SIZES)} |")
    print("|---|---|---|")
    for part in next(iter(parts.values())):
        print(f"| {part} | {' | '.join(f'{parts[name][part]:.1f}' for name in SIZES)} |")
    megapixels = {name: height * width / 1e6 for name, (height, width) in SIZES.items()}
    slow = [
        f"{part} at {name}" for name in SIZES for part in BARRED if parts[name][part] > BAR * megapixels[name]
    ]
    if slow:
        raise SystemExit(f"the bar is missed: {', '.join(slow)}")


if __name__ == "__main__":
    main()
