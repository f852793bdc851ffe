"""Progress bars of long loops: lively on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

SECONDS = 30.0  # between two lines of a bar that goes to a file


def bar(*args: Any, **options: Any) -> tqdm:
    """tqdm on stderr. Where that is no terminal: nothing of what takes seconds, else a line every half minute."""
    if not sys.stderr.isatty():
        options |= {"mininterval": SECONDS, "maxinterval": SECONDS, "delay": 5}
    return tqdm(*args, **options)
