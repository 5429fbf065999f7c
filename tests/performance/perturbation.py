"""Time of one perturbation of each kind, compared with albumentations on the whole image.

Run with `python -m tests.performance.perturbation`. The contestants take turns in one process on one thread, so that
other load on the machine affects all of them; the table shows medians. The bar: at most 5 ms for ours, of any kind.
"""

import os

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
from tests.performance.machine import setting

from vlm_calibration.perturbation.by_kind import KIND_NAMES
from vlm_calibration.perturbation.kinds import RegionPerturbation

# isort: split
import albumentations as A
import cv2

HEIGHT, WIDTH = 480, 640
STRENGTHS = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
BOXES = {"150 x 150": (slice(165, 315), slice(245, 395)), "400 x 300": (slice(90, 390), slice(120, 520))}
PEERS = {
    "noise": A.GaussNoise(std_range=(0.3, 0.3), p=1),
    "blur": A.GaussianBlur(sigma_limit=(10, 10), p=1),
    "motion_blur": A.MotionBlur(blur_limit=(31, 31), p=1),
    "pixelation": A.Downscale(scale_range=(0.05, 0.05), p=1),
    "occlusion": A.CoarseDropout(num_holes_range=(8, 8), fill="random", p=1),
    "fade": A.RandomFog(p=1),
    "jpeg": A.ImageCompression(quality_range=(5, 5), p=1),
    "darkness": A.ShotNoise(scale_range=(0.3, 0.3), p=1),
    "overexposure": A.RandomBrightnessContrast(brightness_limit=(0.5, 0.5), p=1),
}
"""Albumentations' own transform of a similar kind."""


def contestants() -> dict[str, Callable[[int], object]]:
    """Each kind on a mask of each size, at a strength that changes from call to call, and its peer on the whole image."""
    image = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    runs: dict[str, Callable[[int], object]] = {}
    for kind in KIND_NAMES:
        transform, peer = RegionPerturbation(kind), PEERS[kind]
        for size, box in BOXES.items():
            mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
            mask[box] = True
            runs[f"{kind}, {size}"] = lambda i, transform=transform, mask=mask: transform(
                image=image, mask=mask, strength=STRENGTHS[i % len(STRENGTHS)], seed=i
            )
        runs[f"{kind}, peer"] = lambda i, peer=peer: peer(image=image)
    return runs


def measure(runs: dict[str, Callable[[int], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every round after three warm-up rounds; the order rotates, since each contestant leaves its caches behind."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for i in range(-3, rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            runs[name](i + 3)
            if i >= 0:
                times[name].append(1000 * (time.perf_counter() - start))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=100, help="timed calls of each contestant")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    times = measure(contestants(), arguments.rounds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(
        f"{WIDTH} x {HEIGHT}, one thread, {setting('numpy', 'albumentations')}; ms at strengths {STRENGTHS} in turn\n"
    )
    print(f"| kind | {' | '.join(f'mask of {size}' for size in BOXES)} | albumentations, whole image |")
    print("|---|---|---|---|")
    for kind, peer in PEERS.items():
        ours = " | ".join(f"{medians[f'{kind}, {size}']:.2f}" for size in BOXES)
        print(f"| {kind} | {ours} | `{type(peer).__name__}` {medians[f'{kind}, peer']:.2f} |")


if __name__ == "__main__":
    main()
