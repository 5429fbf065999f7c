"""Where the files of POPE and AMBER are published, and where they go in a data root.

    pope/coco_pope_{random,popular,adversarial}.json      POPE on COCO
    pope/aokvqa_pope_{random,popular,adversarial}.json    POPE on A-OKVQA: other images, for recalibration of both benchmarks
    coco/val2014/                                         the images of both
    amber/query/query_*.json, amber/annotations.json      AMBER
    amber/image/                                          its images

Files of questions are pinned to a commit and verified by SHA-256. COCO publishes no digests: its images must be complete and
decodable, and their digests are recorded. AMBER's images are on Google Drive, from where programs cannot download them reliably.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from vlm_calibration.benchmarks import amber, pope
from vlm_calibration.benchmarks.download import (
    FetchReport,
    RemoteFile,
    fetch_files,
    read_digests,
    write_digests,
)
from vlm_calibration.files import clear_leftovers
from vlm_calibration.records import DataError

BenchmarkName = Literal["pope", "amber"]

COCO_QUESTIONS = {
    "random": "ac25245170b975a5bdf9080b23fd431dfe6be458bc038259c1f4f09a6bef7994",
    "popular": "72c1a8ad45d0c13514f5f22598261df41d3b533854d29682e924db50ed8aa753",
    "adversarial": "420b3407db1fa9f1187a805dca41cb7b97fd91504e6c2179706188c107fb8ef8",
}
"""POPE's files `output/coco/coco_pope_*.json` -> SHA-256."""
AOKVQA_QUESTIONS = {
    "random": "f06eecde6d6ef4a00b95a7bbb510490708a09a6a67d952b59b8bdd33ac2c7200",
    "popular": "2ae5bedee3450cda52f9b033942c7b04a3917a86a110e859a66c1e41934c6ffd",
    "adversarial": "2ddd3bdfa0df7a77a2cb1765ed06ac5ed190b5a093aa405b96986e862e8cdac1",
}
"""POPE's files `output/seem/aokvqa/aokvqa_pope_seem_*.json` -> SHA-256."""
AMBER_FILES = {
    "annotations.json": "db22a436c4836fbb295e60b4e80d519573077579fb7032f01b193c1bd022b797",
    "query/query_all.json": "127680ae61f7d4a92d2f7f07a8deaec07f0689b194d2c7c0f41ead7bd2c5bcf5",
    "query/query_generative.json": "b7e4c36596126ee36d2c3922638b7fa98743c26efda78fea2315f4425258d087",
    "query/query_discriminative.json": "1502887ac020f4bb7ea564af4e37bddcb030d61b78490d00f9da492a2307abb8",
    "query/query_discriminative-attribute.json": "35c0fe71290789c5eb198e9a3f5732533bcb35f1d963b57539aab5d1b41dd827",
    "query/query_discriminative-existence.json": "657cce3b3ccd02303998d7d27d1ce06bd210a7a55aa6c888b1b86d5a9dfd9849",
    "query/query_discriminative-relation.json": "36e08860653a1562acb657c250604c3d4e26f8a5f99a376fd53c67f9242be20f",
}
"""AMBER's files in `data/` -> SHA-256."""
AMBER_QUERIES = "amber/query/query_all.json"
"""The file that names all images of AMBER."""
COCO_IMAGES, AMBER_IMAGES = "coco/val2014", "amber/image"
AMBER_ARCHIVE = "https://drive.google.com/file/d/1MaCHgtupcZUjf007anNl4_MV0o4DjXvl/view"
COCO_ARCHIVE = "http://images.cocodataset.org/zips/val2014.zip"


@dataclass(frozen=True)
class Addresses:
    """The servers to download from.

    Attributes:
        pope: POPE's repository at a commit.
        amber: AMBER's repository at a commit.
        coco: the images of COCO's val2014, each a file. The server's certificate is not for this name, hence no TLS.
    """

    pope: str = "https://raw.githubusercontent.com/AoiDragon/POPE/08d957b917e5a378a2f99d35b6293c536a66298b"
    amber: str = (
        "https://raw.githubusercontent.com/junyangwang0410/AMBER/534babf6bbfcce2e735c26289dedfb21cef3c939"
    )
    coco: str = "http://images.cocodataset.org/val2014"


class Published(NamedTuple):
    """The files of a benchmark, images aside.

    Attributes:
        questions: files of questions and annotations.
        images_of: paths in `questions` that name the images of COCO to download.
    """

    questions: tuple[RemoteFile, ...]
    images_of: tuple[str, ...]


def published(name: BenchmarkName, addresses: Addresses = Addresses()) -> Published:
    """The files of a benchmark, with those of its calibration questions."""
    aokvqa = tuple(
        RemoteFile(
            f"pope/aokvqa_pope_{kind}.json",
            f"{addresses.pope}/output/seem/aokvqa/aokvqa_pope_seem_{kind}.json",
            sha256,
        )
        for kind, sha256 in AOKVQA_QUESTIONS.items()
    )
    coco = tuple(
        RemoteFile(
            f"pope/coco_pope_{kind}.json", f"{addresses.pope}/output/coco/coco_pope_{kind}.json", sha256
        )
        for kind, sha256 in COCO_QUESTIONS.items()
    )
    if name == "pope":
        return Published((*coco, *aokvqa), tuple(file.path for file in (*coco, *aokvqa)))
    files = tuple(
        RemoteFile(f"amber/{path}", f"{addresses.amber}/data/{path}", sha256)
        for path, sha256 in AMBER_FILES.items()
    )
    return Published((*files, *coco, *aokvqa), tuple(file.path for file in aokvqa))


def digest_list(name: BenchmarkName, root: Path) -> Path:
    """The list of the digests of a benchmark's files; `sha256sum --check` reads it in the data root."""
    return root / name / "SHA256SUMS"


def fetch_benchmark(
    name: BenchmarkName,
    root: Path,
    *,
    download: bool = True,
    addresses: Addresses = Addresses(),
    workers: int = 8,
) -> FetchReport:
    """Download the files of a benchmark that are missing, and verify those that are there.

    Args:
        name: the benchmark.
        root: the data root.
        download: False: verify only.
        addresses: servers to download from.
        workers: number of files at a time.

    Raises:
        DataError: a file cannot be written, or the list of digests cannot be read.
    """
    listed = digest_list(name, root)
    known = read_digests(listed)
    report = FetchReport()
    for folder in {"pope", "amber", "amber/query", COCO_IMAGES}:
        clear_leftovers(root / folder)
    benchmark = published(name, addresses)

    def fetch(files: Sequence[RemoteFile], description: str) -> None:
        if files:
            fetch_files(
                files, root, known, report, download=download, workers=workers, description=description
            )

    try:
        fetch(benchmark.questions, "questions")
        fetch(_images(name, root, benchmark, addresses, report), "images")
    finally:
        if report.digests and {**known, **report.digests} != known:
            write_digests(listed, {**known, **report.digests})
    return report


def _images(
    name: BenchmarkName, root: Path, benchmark: Published, addresses: Addresses, report: FetchReport
) -> list[RemoteFile]:
    """The images that the verified files of questions name."""
    numbered: dict[str, None] = {}
    for path in benchmark.images_of:
        if path in report.digests:
            numbered |= dict.fromkeys(q.image for q in pope.read_questions(root / path).questions)
    files = [
        RemoteFile(f"{COCO_IMAGES}/{image}", f"{addresses.coco}/{image}", is_image=True)
        for image in _plain(numbered)
    ]
    if name == "amber" and AMBER_QUERIES in report.digests:
        images = dict.fromkeys(query.image for query in amber.read_queries(root / AMBER_QUERIES))
        files += [RemoteFile(f"{AMBER_IMAGES}/{image}", None, is_image=True) for image in _plain(images)]
    return files


def _plain(names: Iterable[str]) -> Iterable[str]:
    for name in names:
        if Path(name).name != name:
            raise DataError(f"{name!r}: expected the name of a file in a folder of images")
        yield name


def how_to_place(name: BenchmarkName, root: Path, report: FetchReport) -> list[str]:
    """What to place where for files that could not be downloaded, one line each."""
    lines = []
    questions = [file for file in published(name).questions if file.path in report.missing]
    lines += [f"{root / file.path}: from {file.url}" for file in questions]
    no_questions = any(file.path in published(name).images_of for file in questions)
    if no_questions or any(path.startswith(COCO_IMAGES) for path in report.missing):
        lines.append(
            f"{root / COCO_IMAGES}/: images of COCO's val2014, COCO_val2014_*.jpg, from {COCO_ARCHIVE}"
        )
    no_queries = AMBER_QUERIES in report.missing
    if no_queries or any(path.startswith(AMBER_IMAGES) for path in report.missing):
        lines.append(f"{root / AMBER_IMAGES}/: AMBER_1.jpg to AMBER_1004.jpg, from {AMBER_ARCHIVE}")
    return lines
