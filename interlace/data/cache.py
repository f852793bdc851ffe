"""Where downloads and spilled tables live."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$INTERLACE_CACHE`, else `~/.cache/interlace`. Not created here."""
    given = os.environ.get("INTERLACE_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "interlace"
