"""`vlm-calibration data`: inspect the sources of a configuration, convert published questions, split a file of queries, fetch benchmarks."""

from __future__ import annotations

import warnings
from argparse import ArgumentError
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from jsonargparse.typing import PositiveInt

from vlm_calibration.arguments import ALL_SETTINGS, Forwarded, Subcommands, with_full_help
from vlm_calibration.benchmarks.files import read_records
from vlm_calibration.data.convert.formats import gqa, sharegpt, vqav2
from vlm_calibration.data.convert.hf import hf, rlaif_v
from vlm_calibration.data.convert.reading import Output, Source
from vlm_calibration.errors import CommandError, explained_errors
from vlm_calibration.files import MAX_NAMED, first_line, name_some, replacing, write_rows
from vlm_calibration.presets import CONFIG, VARIABLE_OPTIONS, add_variables, resolve_configs
from vlm_calibration.records import DataError

if TYPE_CHECKING:
    from vlm_calibration.data.sources.base import QuerySource


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


KINDS = ("random", "popular", "adversarial")
POPE = "https://raw.githubusercontent.com/AoiDragon/POPE/08d957b917e5a378a2f99d35b6293c536a66298b/output"
AMBER = (
    "https://raw.githubusercontent.com/junyangwang0410/AMBER/534babf6bbfcce2e735c26289dedfb21cef3c939/data"
)
COCO = "http://images.cocodataset.org/val2014"  # without TLS: the server's certificate is for another name


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
    seem = f"{POPE}/seem/aokvqa/aokvqa_pope_seem"
    addresses = {data_root / f"pope/aokvqa_pope_{kind}.json": f"{seem}_{kind}.json" for kind in KINDS}
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

    questions: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for row in load_dataset("lmms-lab/POPE", split="test").cast_column("image", Image(decode=False)):
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


def _command(convert: Callable[..., Source]) -> Callable[..., None]:
    """The command of a format: the function's own parameters, and those of the output."""

    def command(*, output: Output, **settings: Any) -> None:
        # Imports OpenCV, which the help does not need.
        from vlm_calibration.data.convert.writing import QueryWriter

        writer = QueryWriter(output)
        writer.write(convert(**settings))
        kinds = ", ".join(f"{count} {kind}" for kind, count in writer.answer_types.most_common())
        print(f"{output.out}: {writer.queries} queries about {len(writer.image_names)} images: {kinds}")
        if writer.skipped:
            print(f"left out {sum(count for count, _ in writer.skipped.values())} bad records:")
        for count, first in sorted(writer.skipped.values(), reverse=True):
            print(f"  {count} such as {first}")
        if root := "" if writer.root == output.out.parent else f" --root {writer.root}":
            advice = f"set `root: {writer.root}` in every source that reads them"
            print(f"image paths are relative to {writer.root}: {advice}")
        print(f"next: vlm-calibration data split {output.out}{root}")
        if missing := writer.queries - writer.regions:
            print(f"{missing} queries have no regions; if they ask about objects, find them after the split:")
            command = "vlm-calibration predict --config regions --config data/jsonl"
            print(f"  {command} --data-root {output.out.parent}")

    own = signature(convert, eval_str=True).parameters.values()
    shared = Parameter("output", Parameter.KEYWORD_ONLY, annotation=Output)
    command.__signature__ = Signature([*own, shared])  # type: ignore[attr-defined]
    command.__doc__ = convert.__doc__
    return command


FORMATS: tuple[Any, ...] = (sharegpt, hf, vqav2, gqa, rlaif_v)
CONVERT = Subcommands(
    "Convert published questions about images to a file of queries, as `data split` and all stages read it.",
    {convert.__name__: _command(convert) for convert in FORMATS},
)


SETTINGS = Forwarded(
    {
        **ALL_SETTINGS,
        CONFIG: "a preset or file, of which only the section `data` is read (may be repeated)",
        **VARIABLE_OPTIONS,
    },
    lambda: "Settings of `data` may follow, e.g. --data.train.init_args.path FILE; --help-all\nlists them.",
)


def inspect(
    *settings: Annotated[str, SETTINGS],
    samples: PositiveInt = PositiveInt(200),
    leaks: bool = True,
    strict: bool = False,
) -> None:
    """Print one table: counts, balance, image sizes, how much of an image regions cover, bad records of each source, and shared images.

    Images that train, validation, teacher, levels or calibration, and test share are counted and named: stored in one place, with the same
    content, or nearly the same. For this every image is read, about a millisecond each.

    Args:
        samples: images of each source to open for the counts
        leaks: look for images that splits share
        strict: end with status 1 if splits share images, or a record or image cannot be used
    """
    resolve_configs(settings)  # A preset that does not exist is refused before the imports.
    from rich.console import Console
    from rich.table import Table

    from vlm_calibration.data.near_duplicates import find_leaks
    from vlm_calibration.data.sources.jsonl import MissingFileError
    from vlm_calibration.reporting.inspection import inspect_source

    sources = read_sources(settings)
    console, table = Console(), Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")

    def add_rows(name: str, rows: Iterable[tuple[str, str]]) -> None:
        table.add_row(name, "", style="bold")
        for heading, text in rows:
            table.add_row(heading, text.replace("[", "\\["))
        table.add_section()

    missing: dict[str, MissingFileError] = {}
    problems = 0
    messages: list[str] = []
    unreadable: dict[str, str] = {}
    for name, source in sources.items():
        try:
            rows, bad, unloadable = inspect_source(source, samples)
        except MissingFileError as error:
            missing[name] = error
            continue
        problems += len(bad)
        messages += bad[:MAX_NAMED]
        unreadable = {**unloadable, **unreadable}
        add_rows(name, rows)
    if leaks:
        report = find_leaks({name: source for name, source in sources.items() if name not in missing})
        for kind, first, second, count, examples in report.leaks:
            shared = f"{count} of {report.images[second]}: {', '.join(examples)}"
            add_rows(f"{first}, {second}", [(f"shared images, {kind}", shared)])
            problems += count
        if report.images and not report.leaks:
            add_rows(", ".join(report.images), [("shared images", "none")])
        for image, reason in report.unreadable.items():
            unreadable.setdefault(image, f"not compared: {image}: {reason}")
    problems += len(unreadable)
    console.print(table)
    messages += list(unreadable.values())[:MAX_NAMED]
    if len(unreadable) > MAX_NAMED:
        messages.append(f"and {len(unreadable) - MAX_NAMED} more images that cannot be read")
    for message in (*messages, *(f"{name}: {error}" for name, error in missing.items())):
        console.print(message, soft_wrap=True, markup=False, highlight=False)
    if missing:
        paths = ", ".join(str(absent.path) for absent in missing.values())
        raise DataError(f"{len(missing)} of the files of {len(sources)} sources do not exist: {paths}")
    if strict and problems:
        raise CommandError(f"--strict: {problems} of the problems above", 1)


SUBCOMMANDS = Subcommands(
    "Convert published data to queries, split them, examine them before training, and fetch benchmarks.",
    {"inspect": inspect, "convert": CONVERT, "split": split, "fetch": fetch},
)


def read_sources(settings: Sequence[str]) -> dict[str, QuerySource]:
    """The sources by the names of their settings, e.g. "data.train"; the errors are those of `inspect`."""
    if not settings:
        raise ArgumentError(None, "data inspect: nothing to inspect: give --config FILE")
    from jsonargparse import ArgumentParser

    from vlm_calibration.data.module import PerturbedQueryDataModule, setting_of

    parser = ArgumentParser(prog="vlm-calibration data inspect", exit_on_error=False)
    parser.add_argument("-c", "--config", action="config")
    add_variables(parser)
    parser.add_class_arguments(PerturbedQueryDataModule, "data")
    with explained_errors(parser):
        only_data = resolve_configs(settings, lambda files: [{"data": f.get("data") or {}} for f in files])
        parsed = parser.parse_args(with_full_help(only_data))
    try:
        data: PerturbedQueryDataModule = parser.instantiate_classes(parsed).data
    except (ValueError, OSError) as error:
        raise DataError(f"configuration: {error}") from error
    sources = {
        f"data.{setting_of(name, part)}": split.source
        for name in data.splits
        for part, split in data.read_splits(name).items()
    }
    if data.predict is not None:
        sources["data.predict"] = data.predict
    if not sources:
        raise DataError("nothing to inspect: no source is set below `data`")
    return sources
