"""One live line of text at the bottom of a terminal, drawn by rich. What others print appears above it."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from rich.text import Text

REFRESHES = 2
"""Redraws a second."""

Render = Callable[[int, str], str]
"""A function of the terminal's width and the character of bars that returns the line."""


def is_terminal() -> bool:
    """Whether stderr is a terminal on which a line can be drawn again."""
    return (
        sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
    )


class LiveText:
    """The line, from now until `stop`; a process draws at most one at a time.

    Args:
        render: returns the line.
        keep: leave the last line on the terminal.
    """

    active: ClassVar[LiveText | None] = None
    """The line that is drawn."""

    def __init__(self, render: Render, *, keep: bool) -> None:
        from rich.console import Console
        from rich.live import Live

        assert LiveText.active is None
        LiveText.active = self
        self._render = render
        self._console = Console(file=sys.stderr)
        self._streams = (sys.stdout, sys.stderr)
        self._live = Live(
            get_renderable=self._text,
            console=self._console,
            refresh_per_second=REFRESHES,
            transient=not keep,
            # Output that goes into a file must not come to the terminal.
            redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),
        )
        self._live.start()
        self._handlers = _stream_handlers(self._streams[1])
        self._log_to(sys.stderr)

    def stop(self, last: Render) -> None:
        """End the line; `last` returns it as it stays, if it stays."""
        # A forked worker has no line any more.
        if LiveText.active is self:
            self._render = last
            self._log_to(self._streams[1])
            self._live.stop()
            LiveText.active = None

    def detach(self) -> None:
        """Let this process write to the streams themselves."""
        LiveText.active = None
        sys.stdout, sys.stderr = self._streams
        self._log_to(self._streams[1])

    def _text(self) -> Text:
        from rich.text import Text

        ascii_only = self._console.options.ascii_only
        line = self._render(self._console.width, "-" if ascii_only else "━")
        if ascii_only:
            line = line.encode("ascii", "replace").decode()
        return Text(line, no_wrap=True, overflow="ellipsis")

    def _log_to(self, stream: Any) -> None:
        for handler in self._handlers:
            # Not `setStream`, which waits for a lock that another thread may have held when this process was forked.
            handler.stream = stream


def _stream_handlers(stream: Any) -> list[Any]:
    """The handlers of all loggers that write to this stream."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    handlers = {h for logger in loggers if isinstance(logger, logging.Logger) for h in logger.handlers}
    return [h for h in handlers if isinstance(h, logging.StreamHandler) and h.stream is stream]


def _detach() -> None:
    if LiveText.active is not None:
        LiveText.active.detach()


# No thread of a forked data worker redraws the line, and the line's lock may have been held.
os.register_at_fork(after_in_child=_detach)
