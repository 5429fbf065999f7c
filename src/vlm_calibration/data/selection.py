"""Which queries of a source are asked: what can be told of a record without its image is told before anything is trained.

Noise needs a region of what a query is about. Where there is none, only the answer says that the object is absent; any other
query could only be given noise on something else and the confidence of that noise, so it is left out or stops the run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from vlm_calibration.data.noise import NoisePolicy
from vlm_calibration.data.sources.base import MAX_NAMED, BadRecords, QuerySource, first_of
from vlm_calibration.records import DataError, Query

Check = Callable[[Query, Sequence[str]], None]


@dataclass(frozen=True)
class Selection:
    """Queries of a source, and which of them are asked.

    Attributes:
        queries: all of the source.
        chosen, absent, unlocated: int64 places in `queries`, ascending: of those that are asked; of all about an object that
            is absent; and of all that need a region and have none. The last two are empty where nothing is noised.
    """

    queries: Sequence[Query]
    chosen: np.ndarray
    absent: np.ndarray
    unlocated: np.ndarray


def select(source: QuerySource, policy: NoisePolicy | None, check: Check, where: str) -> Selection:
    """Decide which queries of a source are asked, and say how many are left out, with the first ids.

    Args:
        policy: how they are noised; None: they are not, and so need no region.
        check: raises a DataError for a query that cannot be put to the model.
        where: the setting that names the source, for messages.

    Raises:
        DataError: a record cannot be used, or needs a region and has none, and such are not to be left out.
    """
    queries = source.queries()
    bad = BadRecords(source.on_bad_record)
    usable: list[int] = []
    absent: list[int] = []
    unlocated: list[int] = []
    unmeasured: dict[str, str] = {}
    for place, query in enumerate(queries):
        try:
            check(query, ())
            if policy is not None:
                _check_levels(policy, query, unmeasured)
        except DataError as error:
            bad.add(f"{where}: {error}", error)
            continue
        presence = "present" if policy is None else source.presence(query)
        {"present": usable, "absent": absent, "unlocated": unlocated}[presence].append(place)
    bad.report(len(queries) - len(bad.messages))
    asked = sorted(usable if policy is None or policy.absent == "skip" else usable + absent)
    selection = Selection(
        queries, *(np.array(places, dtype=np.int64) for places in (asked, absent, unlocated))
    )
    if policy is not None:
        _report(selection, policy, where)
    return selection


def _check_levels(policy: NoisePolicy, query: Query, unmeasured: dict[str, str]) -> None:
    """Make sure that there are levels for a query's answer type; what is wrong is kept in `unmeasured`, by type."""
    kind = query.answer_type
    if kind not in unmeasured:
        try:
            policy.levels.confidence(0, kind)
            unmeasured[kind] = ""
        except ValueError as error:
            unmeasured[kind] = f"{error}: measure them with `vlm-calibration levels fit`"
    if unmeasured[kind]:
        raise DataError(f"record {query.id!r}: {unmeasured[kind]}")


def _report(selection: Selection, policy: NoisePolicy, where: str) -> None:
    """Say how many queries have no region.

    Raises:
        DataError: there are such that need one, and they are not to be left out.
    """
    total, absent = len(selection.queries), ""
    if len(selection.absent):
        ids = _ids(selection, selection.absent)
        absent = (
            f"{len(selection.absent)} ask about an object that is absent (`absent: {policy.absent}`): {ids}"
        )
    if not len(selection.unlocated):
        if absent:
            rank_zero_info(f"{where}: of {total} queries, {absent}")
        return
    ids = _ids(selection, selection.unlocated)
    missing = f"{len(selection.unlocated)} of {total} queries need a region of what they ask about and have none: {ids}"
    if policy.no_region == "raise":
        raise DataError(
            f"{where}: {missing}: find regions with `vlm-calibration predict`, or leave such queries out with "
            "`data.noise.no_region: skip`"
        )
    rank_zero_warn(f"{where}: left out: {missing}" + (f"; {absent}" if absent else ""))


def _ids(selection: Selection, places: np.ndarray) -> str:
    return first_of([selection.queries[int(place)].id for place in places[: MAX_NAMED + 1]])
