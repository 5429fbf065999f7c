"""The responses of a server: their validation, and a log from which a killed run takes them instead of asking again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlm_calibration.append_log import AppendLog, LogLine

RESPONSES = ".responses.{}.jsonl"
"""File of an evaluation, by the process that asks."""


CUT_OFF = ("length", "content_filter")
"""Reasons for which a server ends an answer before it has a text."""


class NonsenseError(Exception):
    """A response that is not one of the chat completions API, or not what was asked for."""


class Token(NamedTuple):
    """A generated token.

    Attributes:
        text: its bytes; a token may be a part of a character.
        log_p: its log-probability.
        top: the likeliest tokens at its position with their log-probabilities, itself included or not.
    """

    text: bytes
    log_p: float
    top: tuple[tuple[bytes, float], ...]

    @property
    def alternatives(self) -> dict[bytes, float]:
        """The listed tokens at this position and this one -> log-probability."""
        return {self.text: self.log_p, **dict(self.top)}


class Response(NamedTuple):
    """A response to a request.

    Attributes:
        text: the generated text.
        tokens: its tokens with log-probabilities; None if the server gave none.
        generated: number of generated tokens; 0 if the server does not count them.
        used: number of tokens of prompt and text; 0 if the server does not count them.
    """

    text: str
    tokens: tuple[Token, ...] | None
    generated: int
    used: int

    def to_row(self) -> dict[str, Any]:
        """The response as JSON, bytes as Latin-1."""
        tokens = None
        if self.tokens is not None:
            tokens = [
                [t.text.decode("latin-1"), t.log_p, [[a.decode("latin-1"), p] for a, p in t.top]]
                for t in self.tokens
            ]
        return {**self._asdict(), "tokens": tokens}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Response:
        """The response in a row of `to_row`; LookupError, TypeError or ValueError for any other row."""
        tokens = None
        if row["tokens"] is not None:
            tokens = tuple(
                Token(
                    text.encode("latin-1"), float(p), tuple((a.encode("latin-1"), float(q)) for a, q in top)
                )
                for text, p, top in row["tokens"]
            )
        return cls(row["text"], tokens, int(row["generated"]), int(row["used"]))


def read_response(content: Any, reports_as: str, *, with_tokens: bool) -> Response:
    """Read the body of a response.

    Args:
        content: decoded JSON.
        reports_as: beginning of the name of the model that may have answered.
        with_tokens: whether log-probabilities were asked for and the server gives them.

    Raises:
        NonsenseError: it is no chat completion, another model answered, or it lacks log-probabilities.
    """
    try:
        model, choice = content.get("model"), content["choices"][0]
        text, usage = choice["message"]["content"], content.get("usage") or {}
        listed = (choice.get("logprobs") or {}).get("content")
        counts = [int(usage.get(name) or 0) for name in ("completion_tokens", "total_tokens")]
        tokens = None if not listed else tuple(_token(entry) for entry in listed)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise NonsenseError(f"answers with something other than a chat completion ({error!r})") from error
    if text is None and choice.get("finish_reason") in CUT_OFF:
        text = ""
    if not isinstance(text, str):
        raise NonsenseError(f"answers without a text (finish_reason {choice.get('finish_reason')!r})")
    if model and not str(model).startswith(reports_as):
        raise NonsenseError(f"answers with the model {str(model)!r} instead of {reports_as!r}")
    if with_tokens and tokens is None:
        raise NonsenseError("answers without log-probabilities, which it gave before")
    return Response(text, tokens, *counts)


def _token(entry: Mapping[str, Any]) -> Token:
    top = tuple((_bytes(other), float(other["logprob"])) for other in entry.get("top_logprobs") or ())
    return Token(_bytes(entry), float(entry["logprob"]), top)


def _bytes(entry: Mapping[str, Any]) -> bytes:
    return bytes(entry["bytes"]) if entry.get("bytes") is not None else str(entry["token"]).encode()


class ResponseLog(AppendLog):
    """The responses that have arrived, one a line, by the digest of their request.

    A request with all that decides its response has the same digest in every run, so a response is valid whatever else changes.

    Args:
        path: the file that this process appends to.
        pattern: as in `AppendLog`.
    """

    def __init__(self, path: Path, pattern: str | None = None) -> None:
        super().__init__(path, {}, "remove it, and its requests are sent again", pattern)
        self._lines: dict[str, LogLine] | None = None

    @classmethod
    def of_run(cls, folder: Path, rank: int) -> ResponseLog:
        """The log of a process in a run directory."""
        return cls(folder / RESPONSES.format(rank), RESPONSES.format("*"))

    def find(self, key: str) -> Response | None:
        """The response to a request: one that this process got, or any other before this log was first read; None without one.

        Raises:
            DataError: a line is damaged.
        """
        if self._lines is None:
            self._lines = {}
            for line in self.lines():
                self._lines[str(line.row.get("request"))] = line._replace(row={})
        known = self._lines.get(key)
        if known is None:
            return None
        try:
            return Response.from_row(self.reread(known))
        except (LookupError, TypeError, ValueError) as error:
            raise self.damaged(known.where, error) from error

    def add(self, key: str, response: Response) -> None:
        """Append a response, so that it is not lost with this process.

        Raises:
            DataError: it cannot be written.
        """
        offset = self.append({"request": key, **response.to_row()})
        if self._lines is not None:
            self._lines[key] = LogLine(self.path, offset, f"{self.path} (byte {offset})", {})

    def clear(self) -> None:
        super().clear()
        self._lines = None


def joined(tokens: Sequence[Token]) -> bytes:
    """The bytes of some tokens."""
    return b"".join(token.text for token in tokens)
