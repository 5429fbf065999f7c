"""Summary of a region extraction: how many queries have regions, how large they are, and why the others have none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco
from rich.console import Console

from vlm_calibration.regions.extraction import OUTCOMES
from vlm_calibration.reporting.tables import text_table

MAX_NOTES = 5


class RegionSummary:
    """Counts over the rows of a region extraction."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.named = self.located = 0
        self.shares: list[float] = []
        self.notes: list[str] = []

    def add(self, row: Mapping[str, Any]) -> None:
        """Count one query."""
        self.outcomes[row["outcome"]] += 1
        self.reasons.update(r["reason"] for r in row["rejected"])
        if row["outcome"] in ("found", "rejected", "not detected"):
            self.named += len(row["objects"])
            self.located += len({r["label"] for r in row["regions"]} & set(row["objects"]))
        if row["outcome"] == "found":
            evidence = [r for r in row["regions"] if not row["objects"] or r["label"] in row["objects"]]
            masks = [{**r["mask"], "counts": r["mask"]["counts"].encode()} for r in evidence if r["mask"]]
            pixels = np.prod(masks[0]["size"]) if masks else 1
            self.shares.append(float(coco.area(coco.merge(masks)) / pixels) if masks else 0.0)
        if row["note"] and len(self.notes) < MAX_NOTES:
            self.notes.append(row["note"])

    def to_dict(self) -> dict[str, Any]:
        """The counts, and deciles of the share of the image, in [0, 1], that the regions of a query cover."""
        shares = np.quantile(self.shares, (0.1, 0.5, 0.9)).tolist() if self.shares else [None] * 3
        return {
            "queries": self.outcomes.total(),
            "outcomes": {name: self.outcomes[name] for name in OUTCOMES},
            "phrases": {"named": self.named, "located": self.located},
            "share_of_image": dict(zip(("p10", "median", "p90"), shares, strict=True)),
            "rejected_regions": dict(sorted(self.reasons.items())),
            "unreadable": self.notes,
        }


def print_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Print a summary of all queries, in which `files` has that of each file in `folder`, and `complete` names settings."""
    console = Console(soft_wrap=True, highlight=False, markup=False)
    if n := summary["queries"]:
        rows = [
            (name, str(count), f"{count / n:.1%}") for name, count in summary["outcomes"].items() if count
        ]
        console.print(text_table(f"Regions of {n} queries", ("", "queries", "share"), rows))
        phrases, share = summary["phrases"], summary["share_of_image"]
        if phrases["named"]:
            console.print(f"phrases: {phrases['located']} of {phrases['named']} located")
        if share["median"] is not None:
            within = f"{share['p10']:.1%} to {share['p90']:.1%}"
            console.print(f"share of the image: median {share['median']:.1%}, 80% of queries within {within}")
        for reason, count in summary["rejected_regions"].items():
            console.print(f"regions left out ({reason}): {count}")
        for note in summary["unreadable"]:
            console.print(f"unreadable: {note}")
    for name, of_file in summary["files"].items():
        outcomes = of_file["outcomes"]
        readable = of_file["queries"] - outcomes["unreadable"]
        located = outcomes["found"] + outcomes["known"]
        console.print(f"wrote {folder / name}: {readable} queries, {located} with regions")
    if summary["complete"]:
        console.print(
            f"nothing to extract for {', '.join(summary['complete'])}: each query has a region, or an answer that says that its "
            "object is absent"
        )
