"""Source for conversations: LLaVA's, ShareGPT's and LLaMA-Factory's files, of which each question about an image becomes a query.

Every question is asked alone, without the turns before it, since a query has one question. `turns` chooses which.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lightning.pytorch.utilities import rank_zero_warn

from vlm_calibration.data.sources.base import (
    BadRecords,
    LazyQueries,
    OnBadRecord,
    QuerySource,
    with_regions,
)
from vlm_calibration.data.sources.images import ImageChecks, ImageFolder
from vlm_calibration.data.sources.shares import ImageShare
from vlm_calibration.data.sources.turns import Conversation, OtherMediaError, Turn, parse_conversation
from vlm_calibration.json_stream import json_records, read_at
from vlm_calibration.perturbation.images import ImageError
from vlm_calibration.records import (
    DataError,
    LoadedImage,
    Query,
    RecordError,
    id_text,
    query_from_dict,
    short_repr,
)
from vlm_calibration.text.conventions import (
    AnswerTypeChoice,
    infer_answer_type,
    strip_format_request,
)
from vlm_calibration.text.labels import check_answer


class ConversationSource(QuerySource):
    """One query a question, with the id "RECORD:TURN".

    The file is a JSON array or has one record a line. It is read record by record when `queries` is first called; after that only
    offsets stay in memory. RECORD is the record's `id`, with "@POSITION" behind it if an earlier record has the same, as in LLaVA's
    mixes; without an `id` it is "record-POSITION", counted from 0. System prompts are not asked. The format request of LLaVA-1.5's
    mix is removed from questions (see `strip_format_request`). A record may have a `category`; other keys are ignored.

    Args:
        path: the JSON or JSONL file.
        root: folder that image paths are relative to; by default the folder of `path`. No image may lie outside it.
        turns: "first" asks the first question about the image, which stands alone; "all" asks every question, for data whose later
            questions do not refer to earlier ones, such as the VQA parts of LLaVA-1.5's mix.
        answer_type: type of all answers, or "infer": see `infer_answer_type`.
        begin: use the images from this share on, in [0, 1]; see `ImageShare`.
        end: use the images up to this share, in [0, 1].
        on_bad_record: "raise" stops at the first invalid record, and at the first that is not about exactly one image; "skip" leaves
            such records out, with a warning that counts them.
    """

    def __init__(
        self,
        path: str,
        root: str | None = None,
        turns: Literal["first", "all"] = "first",
        answer_type: AnswerTypeChoice = "infer",
        begin: float = 0.0,
        end: float = 1.0,
        on_bad_record: OnBadRecord = "raise",
    ) -> None:
        self.path = Path(path)
        self.root = Path(root) if root is not None else self.path.parent
        self.turns = turns
        self.answer_type = answer_type
        self.begin, self.end = begin, end
        self.on_bad_record = on_bad_record
        self.images = ImageFolder(self.root)
        self.bad = BadRecords(on_bad_record)
        self._share = ImageShare(begin, end)
        self._index: _Index | None = None
        self._last: tuple[int, _Record] | None = None

    def queries(self) -> Sequence[Query]:
        if self._index is None:
            self._index = self._check_records()
        return LazyQueries(len(self._index.turns), self._query)

    def _check_records(self) -> _Index:
        """The places of all usable questions about the images of the share."""
        self.bad = BadRecords(self.on_bad_record)
        checks, names = ImageChecks(self.images), set[str]()
        index, other_media, systems, usable = _Index(), Counter[str](), 0, 0
        for position, item in enumerate(json_records(self.path)):

            def convert(value: Any, position: int = position) -> _Record:
                record = _record(value)
                if (name := record.name(position, record.id in names)) in names:
                    raise RecordError(f"the id {name!r} stands for an earlier record")
                checks.check(record.conversation.image)
                return record

            try:
                record = item.read(convert)
            except DataError as error:
                if isinstance(error.__cause__, OtherMediaError):
                    other_media[error.__cause__.kind] += 1
                self.bad.add(str(error), error)
                continue
            is_repeated = record.id in names
            name = record.name(position, is_repeated)
            names.update((name, record.id or name))
            systems += record.conversation.system
            good = list(self._good_turns(record, name, item.where))
            usable += len(good)
            if good and record.conversation.image in self._share:
                index.add(item.offset, item.length, position, is_repeated, good)
        self._report(usable, other_media, systems)
        if not usable:
            raise DataError(f"{self.path}: no usable question in this file")
        if not index.turns:
            raise self._share.nothing_left(self.path, usable)
        return index

    def _good_turns(self, record: _Record, name: str, where: str) -> Iterator[int]:
        for turn in record.conversation.turns[: 1 if self.turns == "first" else None]:
            try:
                self._make(record, name, turn)
            except RecordError as error:
                self.bad.add(f"{where}: record {name!r}, turn {turn.number}: {error}", error)
            else:
                yield turn.number

    def _report(self, usable: int, other_media: Counter[str], systems: int) -> None:
        self.bad.report(usable)
        if other_media:
            kinds = ", ".join(f"{n} about {kind}" for kind, n in other_media.most_common())
            rank_zero_warn(f"{self.path}: of the records that were left out, {kinds}")
        if systems:
            rank_zero_warn(f"{self.path}: {systems} conversations have a system prompt, which is not asked")

    def _make(self, record: _Record, name: str, turn: Turn) -> Query:
        """The query of a turn; RecordError for one that cannot be asked or graded."""
        kind = infer_answer_type(turn.answer) if self.answer_type == "infer" else self.answer_type
        query = query_from_dict(
            {
                "id": f"{name}:{turn.number}",
                "image": record.conversation.image,
                "question": strip_format_request(turn.question),
                "answer": turn.answer,
                "answer_type": kind,
                "category": record.category,
            }
        )
        check_answer(query)
        return query

    def _query(self, index: int) -> Query:
        assert self._index is not None
        number = self._index.record_of[index]
        try:
            if self._last is None or self._last[0] != number:
                place = self._index.offsets[number], self._index.lengths[number]
                self._last = number, _record(read_at(self.path, *place))
            record = self._last[1]
            name = record.name(self._index.positions[number], bool(self._index.repeated[number]))
            [turn] = [t for t in record.conversation.turns if t.number == self._index.turns[index]]
            return self._make(record, name, turn)
        except (OSError, ValueError) as error:
            raise DataError(f"{self.path}: changed while in use, at question {index + 1}: {error}") from error

    def image_file(self, query: Query) -> Path:
        """The file of a query's image, links resolved."""
        return self.images.path(query.image)

    def load(self, query: Query) -> LoadedImage:
        try:
            return with_regions(query, self.images.load(query.image))
        except (RecordError, ImageError) as error:
            raise self.bad.error(f"{self.path}: record {query.id!r}: {error}") from error


class _Record(NamedTuple):
    """A record of the file: its id, None if it has none, its conversation and its category."""

    id: str | None
    conversation: Conversation
    category: str | None

    def name(self, position: int, is_repeated: bool) -> str:
        """The part of ids that stands for the record."""
        if self.id is None:
            return f"record-{position}"
        return f"{self.id}@{position}" if is_repeated else self.id


def _record(value: Any) -> _Record:
    conversation = parse_conversation(value)
    identifier, category = id_text(value.get("id")), value.get("category")
    if identifier is not None and not (isinstance(identifier, str) and identifier.strip()):
        raise RecordError(
            f"'id' must be a non-empty string or a whole number, found {short_repr(identifier)}"
        )
    return _Record(identifier, conversation, category)


class _Index:
    """Where the records are in the file, and which turns of which record are asked."""

    def __init__(self) -> None:
        self.offsets, self.lengths, self.positions = array("q"), array("q"), array("q")
        self.repeated = array("b")
        self.record_of, self.turns = array("q"), array("l")

    def add(self, offset: int, length: int, position: int, is_repeated: bool, turns: Sequence[int]) -> None:
        """Add a record and the numbers of its turns."""
        self.offsets.append(offset)
        self.lengths.append(length)
        self.positions.append(position)
        self.repeated.append(is_repeated)
        self.record_of.extend([len(self.offsets) - 1] * len(turns))
        self.turns.extend(turns)
