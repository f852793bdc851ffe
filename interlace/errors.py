"""Errors a user can mend. The command line prints them without a traceback and exits with 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something in the input, the configuration or the machine has to change. The message says what was expected,
    what came instead, and the likely fix."""


class Stopped(Exception):
    """A signal ended a long run, and what it had done is kept. `exit_code` is what a shell would report: 143, 130."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def suggest(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'furniture'?"` for the nearest of `known`, or the empty string when nothing is near."""
    near = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


def first_line(error: BaseException) -> str:
    """What another library's error says first; its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def shown(given: object) -> str:
    """`"'shop.csv' (str)"`: what came, short and on one line, and its type."""
    text = " ".join(repr(given).split())  # that of an array or a data frame has many lines
    return f"{text if len(text) <= 60 else text[:60] + '...'} ({type(given).__name__})"
