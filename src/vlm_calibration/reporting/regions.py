"""Summary of a region extraction: how many queries have regions, how large they are, and why the others have none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco
from rich.console import Console
from rich.table import Table

from vlm_calibration.regions.extraction import OUTCOMES

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
            self.shares.append(_union_share(evidence))
        if row["note"] and len(self.notes) < MAX_NOTES:
            self.notes.append(row["note"])

    def to_dict(self) -> dict[str, Any]:
        """The counts without `notes`, and deciles of the share of the image that the regions of a query cover."""
        shares = np.quantile(self.shares, (0.1, 0.5, 0.9)).tolist() if self.shares else [None] * 3
        return {
            "queries": sum(self.outcomes.values()),
            "outcomes": {name: self.outcomes[name] for name in OUTCOMES},
            "phrases": {"named": self.named, "located": self.located},
            "share_of_image": dict(zip(("p10", "median", "p90"), shares, strict=True)),
            "rejected_regions": dict(sorted(self.reasons.items())),
        }


def _union_share(regions: list[Mapping[str, Any]]) -> float:
    """The share of the image, in [0, 1], that the union of the regions' masks covers."""
    masks = [{**r["mask"], "counts": r["mask"]["counts"].encode()} for r in regions if r["mask"] is not None]
    if not masks:
        return 0.0
    height, width = masks[0]["size"]
    return float(coco.area(coco.merge(masks))) / (height * width)


def print_summary(
    summary: RegionSummary, files: Mapping[Path, RegionSummary], complete: Sequence[str]
) -> None:
    """Print the summary, and what each file holds.

    Args:
        summary: of all queries.
        files: the summary of each file that was written.
        complete: the settings of the sources that need no extraction.
    """
    console = Console(soft_wrap=True, highlight=False, markup=False)
    if files:
        n = summary.outcomes.total()
        table = Table(title=f"Regions of {n} queries")
        table.add_column("")
        table.add_column("queries", justify="right")
        table.add_column("share", justify="right")
        for name in OUTCOMES:
            if count := summary.outcomes[name]:
                table.add_row(name, str(count), f"{count / n:.1%}")
        console.print(table)
        if summary.named:
            console.print(f"phrases: {summary.located} of {summary.named} located")
        if summary.shares:
            low, median, high = np.quantile(summary.shares, (0.1, 0.5, 0.9))
            console.print(
                f"share of the image: median {median:.1%}, 80% of queries within {low:.1%} to {high:.1%}"
            )
        for reason, count in sorted(summary.reasons.items()):
            console.print(f"regions left out ({reason}): {count}")
        for note in summary.notes:
            console.print(f"unreadable: {note}")
    for path, of_file in files.items():
        counts = of_file.outcomes
        console.print(
            f"wrote {path}: {counts.total() - counts['unreadable']} queries, {counts['found'] + counts['known']} with regions"
        )
    if complete:
        console.print(
            f"nothing to extract for {', '.join(complete)}: each query has a region, or an answer that says that its object is absent"
        )
