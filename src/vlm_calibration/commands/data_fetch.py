"""`vlm-calibration data fetch`: download POPE or AMBER into a data root and verify the files, or say what to place where."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from jsonargparse.typing import PositiveInt

from vlm_calibration.errors import CommandError
from vlm_calibration.files import MAX_NAMED


def fetch(
    benchmark: Literal["pope", "amber"],
    *,
    data_root: Path = Path("data"),
    check: bool = False,
    workers: PositiveInt = PositiveInt(8),
) -> None:
    """Download the files and images of POPE or AMBER to the places that the presets eval/pope and eval/amber read, and verify them.

    POPE's questions about A-OKVQA and their images come along, as the calibration split of both. Files that are there are verified
    and not downloaded again, so an interrupted download resumes. AMBER's images have to be placed by hand; without a network all
    files have, and the command says where.

    Args:
        benchmark: pope or amber
        data_root: folder to write to
        check: verify the files that are there and download nothing
        workers: number of downloads at a time

    Raises:
        DataError: a file cannot be written.
        CommandError: a file is missing or not the right one.
    """
    from vlm_calibration.benchmarks.published import digest_list, fetch_benchmark, how_to_place

    report = fetch_benchmark(benchmark, data_root, download=not check, workers=workers)
    listed = f"; digests: {digest_list(benchmark, data_root)}" if report.digests else ""
    print(f"{len(report.digests)} files verified, {report.downloaded} of them downloaded now{listed}")
    for problems, what in ((report.missing, "missing"), (report.wrong, "wrong, delete them and fetch again")):
        if problems:
            print(f"{len(problems)} files {what}:")
        for path, reason in list(problems.items())[:MAX_NAMED]:
            print(f"  {data_root / path}: {reason}")
        if len(problems) > MAX_NAMED:
            print(f"  and {len(problems) - MAX_NAMED} more")
    if lines := how_to_place(benchmark, data_root, report):
        print(
            f"To place them by hand, then verify them with `vlm-calibration data fetch {benchmark} --check`:"
        )
        for line in lines:
            print(f"  {line}")
    if report.missing or report.wrong:
        count = len(report.missing) + len(report.wrong)
        raise CommandError(f"{benchmark}: {count} files in {data_root} are missing or wrong", 1)
