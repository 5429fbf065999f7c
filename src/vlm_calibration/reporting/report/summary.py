"""What the report says in words: a verdict on the stated confidence, its largest error, and what confidence listens to.

The thresholds of the verdict (`verdict_of`), which the page prints, are this project's choice; there are no established ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from vlm_calibration.estimators.predictions import PREDICTIONS
from vlm_calibration.metrics.probes import SWAPPED
from vlm_calibration.records import DataError
from vlm_calibration.reporting.card import Evaluation
from vlm_calibration.reporting.report.data import BASE, ORACLE, System, read_systems
from vlm_calibration.reporting.report.table import (
    BAND,
    GROUP,
    TOLERANCE,
    parts_of_system,
    plain_rows,
    stated_rows,
)
from vlm_calibration.reporting.runs import CONFIG, RECORD, read_config, read_record, systems_of
from vlm_calibration.reporting.tables import COLUMNS
from vlm_calibration.settings import digest

Verdict = Literal["yes", "partly", "no", "unknown"]
TRUSTED, ROUGH = (0.05, 0.70), (0.10, 0.60)
"""Largest ECE and smallest AUROC of a confidence that can be trusted, and of one that can be trusted in part."""
MIN_CHECKED, MIN_ANSWERS = 100, 30
"""Answers of the smallest group or band that is checked, and of the smallest group that the summary may name."""
MAX_PLACES = 3  # number of groups and bands that the verdict names
PROBES = {
    "image": "Without the image",
    "object": "Without the key object",
    "distractor": "Without another object",
    SWAPPED: "With the likeliest other answer",
}
"""What a probe does, in words."""


def subject_of(systems: Sequence[System]) -> System:
    """The system that a report describes by default: the last one that is not the oracle."""
    return ([s for s in systems if s.name != ORACLE] or list(systems))[-1]


def largest_error(frame: pd.DataFrame, system: str) -> str:
    """The weakest group of a system, in words; empty without one."""
    if (worst := weakest_group(frame, system)) is None:
        return ""
    says = f"it says {worst.says:.0%} and is right {worst.is_right:.0%} of the time"
    return f"largest error is on “{worst.group}”: {says} ({worst.parsed:,} answers)."


def weakest_group(frame: pd.DataFrame, system: str) -> Any:
    """The row of the group of at least `MIN_ANSWERS` answers whose stated confidence and accuracy differ most; None without one."""
    groups = parts_of_system(frame, system, GROUP)
    known = groups[groups.parsed >= MIN_ANSWERS]
    return known.loc[(known.says - known.is_right).abs().idxmax()] if len(known) else None


def checked(parts: pd.DataFrame) -> pd.DataFrame:
    """The bands and groups of at least `MIN_CHECKED` answers, without unclear ones whose interval is wider than `TOLERANCE`."""
    is_narrow = parts.is_right_high - parts.is_right_low <= TOLERANCE
    return parts[(parts.parsed >= MIN_CHECKED) & (is_narrow | (parts.agrees != "unclear"))]


def verdict_of(row: Any, checks: pd.DataFrame) -> Verdict:
    """Judge a stated confidence by its row over all answers and the rows of its checked groups and bands.

    A limit is kept if the whole 95% interval is within it, and broken if all of the interval is beyond it. The limit of groups and bands is
    a difference of `TOLERANCE` between stated confidence and accuracy.

    - "no": no answer states a confidence, every checked band breaks its limit, the ECE breaks 10% or the AUROC 0.60 (`ROUGH`)
    - "partly": else, a checked group or band breaks its limit, the ECE breaks 5% or the AUROC 0.70 (`TRUSTED`)
    - "yes": a band is checked, and all these limits are kept
    - "unknown": all else

    The AUROC is undefined if all answers are correct, and then there is nothing to rank.
    """
    bands = checks[checks.kind == BAND].agrees
    if row.parse_failure_rate == 1 or row.ece_low > ROUGH[0] or row.auroc_high < ROUGH[1]:
        return "no"
    if len(bands) and (bands == "no").all():
        return "no"
    kept = {*_keeps(row), *checks.agrees}
    return "partly" if "no" in kept else "yes" if len(bands) and "unclear" not in kept else "unknown"


def _keeps(row: Any) -> tuple[str, str]:
    """Whether ECE and AUROC keep the limits of `TRUSTED`: "yes", "no", or "unclear" where their intervals leave it open."""
    ece = "yes" if row.ece_high <= TRUSTED[0] else "no" if row.ece_low > TRUSTED[0] else "unclear"
    if math.isnan(row.auroc) or row.auroc_low >= TRUSTED[1]:
        return ece, "yes"
    return ece, "no" if row.auroc_high < TRUSTED[1] else "unclear"


def verdict_sentence(verdict: Verdict, row: Any, checks: pd.DataFrame) -> str:
    """The verdict as one sentence: where stated confidence and accuracy agree, and with numbers where they do not."""
    keeps_ece, keeps_auroc = _keeps(row)
    holds, fails, unclear = (_places(checks, agrees) for agrees in ("yes", "no", "unclear"))
    bands = int((checks.kind == BAND).sum())
    if row.parse_failure_rate == 1:
        return f"No: none of its {row.n:,} answers states a confidence that could be parsed."
    if verdict == "yes":
        where = "in every group and every range of confidence with enough answers to tell"
        counts = f"{len(checks) - bands} groups, {bands} ranges"
        return f"Yes: its stated confidence can be trusted, {where} ({counts})."
    if verdict == "unknown" and not bands:
        return f"It cannot be told: none of its ranges of confidence has enough of the {row.n:,} answers for a check."
    if verdict == "unknown":
        between = f"off by {100 * row.ece_low:.1f} to {100 * row.ece_high:.1f} points on average (ECE)"
        ranking = f"{row.auroc_low:.2f} to {row.auroc_high:.2f}"
        doubts = [
            f"it may be {between}" if keeps_ece == "unclear" else "",
            f"its AUROC may be {ranking}" if keeps_auroc == "unclear" else "",
            f"it may be off by more than {100 * TOLERANCE:.0f} points {unclear}" if unclear else "",
        ]
        return f"It cannot be told from {row.n:,} answers: {'; '.join(filter(None, doubts))}."
    limit = TRUSTED[0] if verdict == "partly" else ROUGH[0]
    ranking = f"it hardly tells right answers from wrong ones (AUROC {row.auroc:.2f})"
    reasons = [
        f"it is off by {100 * row.ece:.1f} points on average (ECE)" if row.ece_low > limit else "",
        f"it does not hold {fails}" if fails else "",
        ranking if keeps_auroc == "no" else "",
    ]
    why = "; ".join(filter(None, reasons))
    if verdict == "partly":
        but = f"not {fails}" if fails else why
        return f"Partly: its stated confidence can be trusted {holds or 'in part'}, but {but}."
    where = f"only {holds}" if holds else "nowhere for certain"
    return f"No: its stated confidence cannot be trusted: {why}; it holds {where}."


def _places(checks: pd.DataFrame, agrees: str) -> str:
    """The first checked groups and bands that agree, do not, or are unclear, in words; empty if there are none."""
    places = list(checks[checks.agrees == agrees].itertuples())
    if agrees == "no":  # coarse groups first, since they explain their parts
        places.sort(key=lambda p: (p.kind == BAND, p.group.count("/"), -abs(p.says - p.is_right)))
    shown = [(p.kind, f"{p.group} ({in_numbers(p)})" if agrees == "no" else p.group) for p in places]
    parts = []
    for kind, start, joint in ((GROUP, "on", "and"), (BAND, "where it says", "or")):
        if names := [name for of_kind, name in shown[:MAX_PLACES] if of_kind == kind]:
            parts.append(f"{start} {listed(names, joint)}")
    return " and ".join(parts)


def in_numbers(row: Any) -> str:
    """Stated confidence and accuracy of a row: "says 80%, is right 65%"."""
    return f"says {row.says:.0%}, is right {row.is_right:.0%}"


def listed(names: Sequence[str], joint: str = "and") -> str:
    """Names as an enumeration: "a, b and c"."""
    *most, last = names
    return f"{', '.join(most)} {joint} {last}" if most else last


def probe_sentences(values: Mapping[str, float]) -> list[str]:
    """A sentence on each probe that applies to an answer of a system, from its metrics `probe_...`."""
    sentences = []
    for probe, start in PROBES.items():
        if not (n := int(values.get(f"probe_{probe}_n", 0))):
            continue
        change = values[f"probe_{probe}_change"]
        way, share = ("falls", "fell") if change <= 0 else ("rises", "rose")
        points = f"{abs(100 * change):.0f}"
        moves = f"{way} by {points} point{'' if points == '1' else 's'}"
        if points == "0":
            moves = "moves by less than a point" if change else "does not move"
        sentence = f"{start}, its confidence {moves} on average (it {way} in {values[f'probe_{probe}_{share}']:.0%} of {n:,} answers)."
        if probe == SWAPPED:
            total = f"{values[f'probe_{probe}_sum']:.0%} on average"
            sentence += f" The confidences in both add up to {total}; more than 100% is inconsistent."
        sentences.append(sentence)
    return sentences


ADAPTERS = "model.init_args.adapters."  # prefix of the inputs in `run.json` that are adapters


def read_evaluation(folder: Path, adapter: str) -> Evaluation:
    """Read the results of an adapter, by the digest of its files, with those of the base model and of other adapters beside it.

    DataError if the run directory holds no finished `vlm-calibration test` of a whole test set, or not of this adapter.
    """
    record, config = read_record(folder), read_config(folder / CONFIG)
    if record is None:
        raise DataError(f"{folder}: no {RECORD}: give the run directory of `vlm-calibration test`")
    if not config or record.command != "test" or not record.finished:
        raise DataError(f"{folder}: not a finished `vlm-calibration test`: evaluate first")
    if ((config.get("trainer") or {}).get("limit_test_batches") or 1.0) != 1.0:
        raise DataError(f"{folder}: a part of the test set: run `vlm-calibration test` without limits")
    inputs = record.inputs
    adapters = {key[len(ADAPTERS) :]: value for key, value in inputs.items() if key.startswith(ADAPTERS)}
    if (system := next((name for name, value in adapters.items() if value == adapter), None)) is None:
        problem = f"was not evaluated there, or has changed since (adapters: {', '.join(adapters) or 'none'})"
        raise DataError(f"{folder}: this adapter {problem}: evaluate it again")
    systems = read_systems([str(folder)])
    if missing := [name for name in systems_of(config) if name not in {s.name for s in systems}]:
        raise DataError(f"{folder / missing[0]}: no {PREDICTIONS}: evaluate again")
    rows = stated_rows(plain_rows([s for s in systems if s.name in (BASE, *adapters)]))
    splits = config["data"]["test"]
    sources = [split["source"] for split in splits.values()]
    kinds = {str(source["class_path"]).rsplit(".", 1)[-1].removesuffix("Source") for source in sources}
    queries = (f"{key} {value}\n" for key, value in sorted(inputs.items()) if key.startswith("data.test"))
    return Evaluation(
        adapter=adapter,
        system=system,
        dataset="+".join(sorted(kind.lower() for kind in kinds)),
        split="+".join(sorted({str((s.get("init_args") or {}).get("split") or "test") for s in sources})),
        revision=digest(queries),
        parts=[
            name if split.get("noise", "none") == "none" else f"{name} (key object perturbed)"
            for name, split in splits.items()
        ],
        results=rows.set_index("system")[["n", *COLUMNS]].to_dict("index"),
    )
