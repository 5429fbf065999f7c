"""`vlm-calibration data split`: make the four files of a data root from one, without an image in two of them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

from vlm_calibration.records import DataError


def split(
    file: Path,
    *,
    out: Path | None = None,
    root: Path | None = None,
    shares: list[float] = [0.8, 0.05, 0.05, 0.1],  # noqa: B006  (never changed)
    seed: int = 0,
    near_identical: bool = True,
    on_bad_record: Literal["raise", "skip"] = "raise",
    overwrite: bool = False,
) -> None:
    """Split a file of queries by image into train, validation, calibration and test, so that no image is in two of them.

    Images with the same content stay together, and so do images that look nearly the same. Records are copied unchanged. For
    the same seed, the order of the lines makes no difference.

    Args:
        file: JSON lines (.jsonl) or Parquet (.parquet), one query a line or row
        out: folder to write to (default: the one that image paths are relative to, so that they stay valid)
        root: folder that image paths are relative to (default: the folder of FILE)
        shares: shares of the images for train, validation, calibration and test, with sum 1
        seed: another seed gives another split
        near_identical: keep images together that look nearly the same, e.g. encoded again or resized
        on_bad_record: "raise" stops at a bad record, "skip" leaves it out and names it
        overwrite: replace existing files
    """
    # The help needs none of these.
    from rich.console import Console

    from vlm_calibration.data.sources.jsonl import SPLITS
    from vlm_calibration.data.split import open_source, output_paths, split_queries
    from vlm_calibration.files import name_some
    from vlm_calibration.reporting.tables import text_table

    folder = root or file.parent
    if len(shares) != len(SPLITS) or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
        expected = f"{len(SPLITS)} numbers above 0 with sum 1, for {', '.join(SPLITS)}"
        raise DataError(f"--shares: expected {expected}, found {shares}")
    source = open_source(file, folder, on_bad_record)
    paths = output_paths(file, out or folder, overwrite)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bad records are printed below, all of them
        queries = source.queries()
    if out is not None and root is None:
        for query in queries:
            if source.image_file(query) is not None and not (out / query.image).is_file():
                advice = f"leave out --out, or say with --root {source.root} what image paths are relative to"
                raise DataError(f"--out {out}: there is no {query.image} in it: {advice}")
    files, bad, largest = split_queries(source, paths, shares, seed, near_identical)
    total = sum(number for _, number, *_ in files)
    rows = [
        (str(path), f"{number} ({number / total:.1%})", str(images), "-" if yes is None else f"{yes:.1%}")
        for path, number, images, yes in files
    ]
    table = text_table("", ("file", "queries", "images", "yes"), rows)
    table.columns[0].overflow = "fold"
    Console().print(table)
    if len(largest) > 1:
        group = f"{len(largest)}: {name_some(largest, len(largest))}"
        print(f"largest group of images that look nearly the same, kept in one file: {group}")
    if bad:
        print("\n  ".join([f"left out {len(bad)} bad records or images:", *bad]))
    if out is not None and out.resolve() != folder.resolve():
        advice = f"set `root: {folder}` in every source that reads these files"
        print(f"image paths are relative to {folder}: {advice}")
