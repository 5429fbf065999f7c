"""What happens after an error that nobody expected: the traceback is printed, and the process is gone."""

from __future__ import annotations

import time
from collections.abc import Callable

from .command_line import LIMIT, Ended, callback


def test_an_unexpected_error_in_validation_ends_the_run(
    run: Callable[..., Ended], start: Callable[..., list[str]]
) -> None:
    """Workers of the training that it interrupts, which leave signals to the process above them, do not keep it."""
    began = time.monotonic()
    ended = run(*start("run", callback("disasters.FailValidation"), workers=1))
    assert ended.status == 1
    assert "RuntimeError: out of memory" in ended.err
    assert time.monotonic() - began < LIMIT, "it was not killed for hanging"
