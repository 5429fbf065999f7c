"""Time to open a million records, and memory of the data module, from JSON lines and from Parquet.

Run with `python -m tests.performance.streaming`. The records share eight images, and each has a region with a mask. Every
measurement is a separate process. The bars: under 30 s to open, at most 1.5 GiB resident, imports and a few samples included.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from tests.performance.machine import peak_bytes, setting

IMAGES = 8
GIB = 2**30


def write_records(folder: Path, count: int) -> dict[str, Path]:
    """Write the same records as JSON lines and as Parquet, and their images."""
    from vlm_calibration.callbacks.regions import write_rows
    from vlm_calibration.perturbation.masks import mask_to_rle

    rng = np.random.default_rng(0)
    masks = []
    y, x = np.mgrid[:96, :96]
    for i in range(IMAGES):
        Image.fromarray(rng.integers(0, 256, (96, 96, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        disc = (y - 48) ** 2 + (x - 40) ** 2 < (10 + 3 * i) ** 2
        masks.append(mask_to_rle(disc & (rng.random((96, 96)) < 0.98)))
    paths = {"JSON lines": folder / "queries.jsonl", "Parquet": folder / "queries.parquet"}

    def row(i: int) -> dict[str, object]:
        region = {"label": "dog", "box": [10.0, 10.0, 80.0, 90.0], "mask": masks[i % IMAGES], "score": 0.5}
        return {
            "id": f"record-{i}",
            "image": f"{i % IMAGES}.png",
            "question": f"Is there a dog in picture {i}?",
            "answer": ("Yes", "No")[i % 2],
            "answer_type": "yes_no",
            "objects": ["dog"],
            "regions": [region],
        }

    with paths["JSON lines"].open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row(i)) + "\n" for i in range(count))
    notes = {"outcome": "found", "rejected": [], "note": None}
    blocks = ([{**row(i), **notes} for i in range(b, min(b + 8192, count))] for b in range(0, count, 8192))
    write_rows(paths["Parquet"], blocks)
    return paths


def measure(path: Path) -> dict[str, float]:
    """Open the training set of this file in the data module, and load random samples."""
    from vlm_calibration.data.module import PerturbedQueryDataModule
    from vlm_calibration.data.sources.jsonl import JsonlSource
    from vlm_calibration.data.sources.parquet import ParquetSource

    kind = ParquetSource if path.suffix == ".parquet" else JsonlSource
    model = Path(__file__).parents[2] / "src/vlm_calibration/demo/model"
    data = PerturbedQueryDataModule(
        str(model), train=kind(str(path)), workers=0, batch_size=8, max_length=400
    )
    start = time.process_time()
    data.setup("fit")
    opened = time.process_time() - start
    dataset = data.train_dataloader().dataset
    picks = np.random.default_rng(1).integers(0, len(dataset), 2000)  # type: ignore[arg-type]
    start = time.perf_counter()
    for index in picks.tolist():
        dataset[0, index]
    each = (time.perf_counter() - start) / len(picks)
    batches = iter(data.train_dataloader())
    next(batches)
    return {
        "records": len(dataset),  # type: ignore[arg-type]
        "seconds": opened,
        "peak": peak_bytes() / GIB,
        "milliseconds": 1000 * each,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--measure", type=Path, help="measure this file in this process, as JSON")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    print(f"{args.records} records of {IMAGES} images, {setting('pyarrow', 'numpy')}\n")
    print("| | CPU seconds to open | peak memory (GiB) | ms a noised sample |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, path in write_records(Path(folder), args.records).items():
            command = [sys.executable, "-m", "tests.performance.streaming", "--measure", str(path)]
            ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            results = json.loads(ran.stdout.splitlines()[-1])
            assert results["records"] == args.records
            seconds, peak, each = (results[key] for key in ("seconds", "peak", "milliseconds"))
            print(f"| {name} | {seconds:.1f} | {peak:.2f} | {each:.1f} |")


if __name__ == "__main__":
    main()
