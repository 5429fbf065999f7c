"""The part of `vlm-calibration data inspect` about images that splits share."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import TYPE_CHECKING

from vlm_calibration.data.leaks import SplitImages, find_leaks
from vlm_calibration.files import MAX_NAMED

if TYPE_CHECKING:
    from rich.console import Console

    from vlm_calibration.data.sources.base import QuerySource


def print_leaks(sources: Mapping[str, QuerySource], console: Console, named: Container[str]) -> int:
    """Print the images that splits share, if there are at least two splits.

    Args:
        named: `image_id` of the broken images that have been named.

    Returns:
        The number of problems: shared images, and other images that cannot be read.
    """
    from rich.table import Table

    images = SplitImages(sources)
    if len(images.roles) < 2:
        return 0
    report = find_leaks(images)
    table = Table(title="images that splits share", title_justify="left")
    for heading in ("splits", "images", "how", "for example"):
        table.add_column(heading, overflow="fold")
    for kind, first, second, count, examples in report.leaks:
        names = ", ".join(examples).replace("[", "\\[")
        of = f"{count} of {report.images[second]}"
        table.add_row(f"{first}, {second}", of, kind, names)
    if report.leaks:
        console.print(table)
    else:
        console.print(f"no image is in two of {', '.join(report.images)} ({len(images)} images compared)")
    unreadable = {image: reason for image, reason in report.unreadable.items() if image not in named}
    for image, reason in list(unreadable.items())[:MAX_NAMED]:
        console.print(f"not compared: {image}: {reason}", soft_wrap=True, markup=False, highlight=False)
    if len(unreadable) > MAX_NAMED:
        console.print(f"{len(unreadable)} images could not be compared")
    return sum(leak.images for leak in report.leaks) + len(unreadable)
