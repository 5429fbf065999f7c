"""`vlm-calibration data fetch`: POPE or AMBER into a data root, where the presets read them.

AMBER's images are on Google Drive, from where programs cannot download them reliably.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from vlm_calibration.benchmarks.files import read_records
from vlm_calibration.errors import CommandError
from vlm_calibration.files import first_line, name_some, replacing, write_rows
from vlm_calibration.records import DataError

KINDS = ("random", "popular", "adversarial")
POPE = "https://raw.githubusercontent.com/AoiDragon/POPE/08d957b917e5a378a2f99d35b6293c536a66298b/output"
AMBER = (
    "https://raw.githubusercontent.com/junyangwang0410/AMBER/534babf6bbfcce2e735c26289dedfb21cef3c939/data"
)
COCO = "http://images.cocodataset.org/val2014"
"""Without TLS: the server's certificate is for another name."""


def fetch(benchmark: Literal["pope", "amber"], *, data_root: Path = Path("data")) -> None:
    """Download the questions and images of POPE or AMBER to the places that the presets eval/pope and eval/amber read.

    POPE comes from its data set on the Hub (lmms-lab/POPE); its questions about A-OKVQA and their images come along, as the
    calibration split of both. Files that are there stay, so official files may be placed by hand and an interrupted download resumes.
    AMBER's images have to be placed by hand; the command says where.

    Args:
        benchmark: pope or amber
        data_root: folder to write to
    """
    if find_spec("datasets") is None:
        raise DataError("data fetch needs the package datasets: pip install 'vlm-calibration[datasets]'")
    addresses = {
        data_root / f"pope/aokvqa_pope_{kind}.json": f"{POPE}/seem/aokvqa/aokvqa_pope_seem_{kind}.json"
        for kind in KINDS
    }
    of_hub = {kind: data_root / f"pope/coco_pope_{kind}.json" for kind in KINDS}
    about_coco = [*addresses, *(of_hub.values() if benchmark == "pope" else ())]
    if benchmark == "amber":
        names = ("annotations.json", "query/query_all.json", "query/query_discriminative.json")
        addresses |= {data_root / f"amber/{name}": f"{AMBER}/{name}" for name in names}
    images = data_root / "coco/val2014"
    try:
        if benchmark == "pope" and not all(path.is_file() for path in of_hub.values()):
            _pope_of_hub(of_hub, images)
        _download(addresses)
        photos = {images / name: f"{COCO}/{name}" for name in sorted(set().union(*map(_images, about_coco)))}
        _download(photos)
    except (OSError, RuntimeError) as error:
        places = ", ".join(str(path) for path in dict.fromkeys([*about_coco, *addresses]))
        advice = f"place the official files {places} and images of val2014 in {images}"
        raise DataError(f"{benchmark} cannot be downloaded: {first_line(error)}: {advice}") from error
    print(f"{benchmark}: {len(photos)} images of COCO and their questions are in {data_root}")
    if benchmark == "amber":
        folder = data_root / "amber/image"
        needed = sorted(_images(data_root / "amber/query/query_all.json"))
        if missing := [name for name in needed if not (folder / name).is_file()]:
            number, first = f"{len(missing)} of {len(needed)}", name_some(missing, len(missing))
            archive = "https://drive.google.com/file/d/1MaCHgtupcZUjf007anNl4_MV0o4DjXvl/view"
            raise CommandError(f"{number} images are not in {folder} ({first}): unpack {archive} there", 1)


def _pope_of_hub(paths: Mapping[str, Path], images: Path) -> None:
    """Write POPE's questions (kind -> file) and images from the Hub where they are missing; the questions come last."""
    from datasets import Image, load_dataset

    rows = load_dataset("lmms-lab/POPE", split="test").cast_column("image", Image(decode=False))
    questions: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for row in rows:
        name = f"{row['image_source']}.jpg"
        image = images / name
        if not image.is_file():
            with replacing(image, sync=False) as temporary:
                temporary.write_bytes(row["image"]["bytes"])
        asked = {"question_id": int(row["question_id"]), "image": name}
        questions[row["category"]].append({**asked, "text": row["question"], "label": row["answer"]})
    for kind, path in paths.items():
        if not path.is_file():
            write_rows(path, questions[kind], lines=True)


def _download(files: Mapping[Path, str]) -> None:
    """Download the files that are missing: path -> address."""
    from datasets import DownloadManager

    missing = {path: address for path, address in files.items() if not path.is_file()}
    for path, cached in zip(missing, DownloadManager().download(list(missing.values())), strict=True):
        with replacing(path, sync=False) as temporary:
            temporary.write_bytes(Path(cached).read_bytes())


def _images(path: Path) -> set[str]:
    """The names of images in a file of questions."""
    return {Path(record.text("image")).name for record in read_records(path)}
