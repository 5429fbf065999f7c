"""`vlm-calibration data inspect`: what is in the sources of a configuration, before anything is trained on it."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table

from vlm_calibration.arguments import explained_errors
from vlm_calibration.data.module import PerturbedQueryDataModule
from vlm_calibration.data.sources.base import QuerySource
from vlm_calibration.files import MAX_NAMED, name_some
from vlm_calibration.records import DataError, Query
from vlm_calibration.text.grading import parse_answer

MOST_SHOWN = 8


@dataclass
class Inspection:
    """What a source holds.

    Attributes:
        answers: of each answer type, how often each answer is the gold one; of open answers, how often each number of words.
        categories: how often each occurs.
        with_evidence: queries with a region of what they are about, of all of them.
        absent, unlocated: ids of queries about an object that is absent, and of those that need a region and have none.
        sizes: (width, height) of the images that were looked at; shares: which share of them evidence covers, in [0, 1].
        clipped: ids of queries with a region that leaves the image, of those that were looked at.
        bad: what is wrong with records that cannot be used, of all; unloadable: of those that were looked at.
    """

    queries: int = 0
    answers: dict[str, Counter[str]] = field(default_factory=dict)
    categories: Counter[str] = field(default_factory=Counter)
    with_evidence: int = 0
    absent: list[str] = field(default_factory=list)
    unlocated: list[str] = field(default_factory=list)
    looked_at: int = 0
    sizes: list[tuple[int, int]] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    clipped: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    unloadable: list[str] = field(default_factory=list)


def inspect_source(source: QuerySource, sample: int) -> Inspection:
    """Count all queries of a source, and look at the images of `sample` of them, spread evenly.

    Records that cannot be used are collected where the source can leave them out.

    Raises:
        DataError: the source cannot be read at all, or has no usable query.
    """
    found = Inspection()
    source.on_bad_record = "skip"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            queries = source.queries()
        except DataError as error:
            first = "; ".join(getattr(getattr(source, "bad", None), "messages", [])[:MAX_NAMED])
            raise DataError(f"{error}: {first}" if first else str(error)) from error
    found.bad = list(getattr(getattr(source, "bad", None), "messages", []))
    for query in queries:
        _count(found, query)
        presence = source.presence(query)
        found.with_evidence += presence == "present"
        if presence != "present":
            (found.absent if presence == "absent" else found.unlocated).append(query.id)
    chosen = np.unique(np.linspace(0, len(queries) - 1, min(sample, len(queries))).round().astype(int))
    for index in chosen.tolist():
        _look(found, source, queries[index])
    return found


def _count(found: Inspection, query: Query) -> None:
    found.queries += 1
    answer = {
        "yes_no": parse_answer(query.answer, query.answer_type),
        "short": query.answer,
        "open": str(len(query.answer.split())),
    }[query.answer_type]
    found.answers.setdefault(query.answer_type, Counter())[str(answer)] += 1
    if query.category is not None:
        found.categories[query.category] += 1


def _look(found: Inspection, source: QuerySource, query: Query) -> None:
    found.looked_at += 1
    try:
        loaded = source.load(query)
    except DataError as error:
        found.unloadable.append(str(error))
        return
    if loaded.clipped:
        found.clipped.append(query.id)
    height, width = loaded.image.shape[:2]
    found.sizes.append((width, height))
    if loaded.evidence:
        found.shares.append(float(np.logical_or.reduce(loaded.evidence).mean()))


def lines_of(found: Inspection) -> Iterator[tuple[str, str]]:
    """The inspection as pairs of a heading and what there is to say."""
    yield "queries", str(found.queries)
    for kind, answers in found.answers.items():
        total = sum(answers.values())
        if kind == "open":
            words = np.repeat([int(n) for n in answers], list(answers.values()))
            yield "open answers", f"{total}: median {np.median(words):.0f} words, at most {words.max()}"
            continue
        shown = answers.most_common(MOST_SHOWN)
        balance = ", ".join(f"{_short(answer)} {count / total:.1%}" for answer, count in shown)
        others = f", {len(answers) - len(shown)} other answers" if len(answers) > len(shown) else ""
        yield f"{kind} answers", f"{total}: {balance}{others}"
    if found.categories:
        shown = found.categories.most_common(MOST_SHOWN)
        others = (
            f", {len(found.categories) - len(shown)} others" if len(found.categories) > len(shown) else ""
        )
        yield "categories", ", ".join(f"{name} {count}" for name, count in shown) + others
    yield "with a region of their object", f"{found.with_evidence / max(1, found.queries):.1%}"
    if found.absent:
        yield "about an absent object", f"{len(found.absent)}: {name_some(found.absent, len(found.absent))}"
    if found.unlocated:
        ids = name_some(found.unlocated, len(found.unlocated))
        yield "without a region, and cannot be noised", f"{len(found.unlocated)}: {ids}"
    if found.sizes:
        widths, heights = zip(*found.sizes, strict=True)
        yield (
            f"image sizes ({found.looked_at} looked at)",
            f"{min(widths)}..{max(widths)} x {min(heights)}..{max(heights)}, "
            f"median {np.median(widths):.0f} x {np.median(heights):.0f}",
        )
    if found.shares:
        low, middle, high = np.quantile(found.shares, (0.1, 0.5, 0.9))
        yield "regions' share of the image", f"median {middle:.1%}, 80% within {low:.1%} to {high:.1%}"
    if found.clipped:
        yield (
            "with a region that leaves the image",
            f"{len(found.clipped)} of {found.looked_at} looked at: {name_some(found.clipped, len(found.clipped))}",
        )
    yield "bad records", str(len(found.bad))
    if found.unloadable:
        yield "cannot be loaded", f"{len(found.unloadable)} of {found.looked_at} looked at"


def _short(answer: str) -> str:
    return answer if len(answer) <= 30 else f"{answer[:27]}..."


def print_inspection(name: str, found: Inspection, console: Console) -> None:
    table = Table(title=name, show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for heading, text in lines_of(found):
        table.add_row(heading, text.replace("[", "\\["))
    console.print(table)
    for message in (*found.bad[:MAX_NAMED], *found.unloadable[:MAX_NAMED]):
        console.print(message, soft_wrap=True, markup=False, highlight=False)


def inspect_data(configs: Sequence[Path], rest: Sequence[str], sample: int) -> None:
    """Print what is in the sources of configuration files and further settings, looking at `sample` images of each.

    Raises:
        DataError: a configuration file or a source cannot be used.
    """
    sources = list(_sources(read_data(configs, rest)))
    if not sources:
        raise DataError("nothing to inspect: none of data.train, validation, test and predict is set")
    console = Console()
    for name, source in sources:
        print_inspection(name, inspect_source(source, sample), console)


def read_data(configs: Sequence[Path], rest: Sequence[str]) -> PerturbedQueryDataModule:
    """The data module of configuration files, of which only the section `data` counts, and of further settings.

    Raises:
        DataError: a file cannot be read. jsonargparse.ArgumentError: an unknown key, or a value of the wrong kind.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(PerturbedQueryDataModule, "data")
    given: list[str] = []
    for path in configs:
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise DataError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
        section = content.get("data") if isinstance(content, dict) else None
        given += ["--config", json.dumps({"data": section or {}})]
    with explained_errors(parser):
        parsed = parser.parse_args([*given, *rest])
    try:
        data: PerturbedQueryDataModule = parser.instantiate_classes(parsed).data
    except (ValueError, OSError) as error:
        raise DataError(f"configuration: {error}") from error
    return data


def _sources(data: PerturbedQueryDataModule) -> Iterator[tuple[str, QuerySource]]:
    """The sources of a data module by the names of their settings."""
    parts: dict[str, Any] = {
        f"{split}.{name}": part.source
        for split, named_parts in (("test", data.test), ("calibration", data.calibration))
        for name, part in (named_parts or {}).items()
    }
    named = {"train": data.train, "validation": data.validation, **parts, "predict": data.predict}
    for name, source in named.items():
        if source is not None:
            yield f"data.{name}", source
