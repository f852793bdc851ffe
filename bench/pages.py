"""Figures onto a page of the docs, between two marks, so that the next measurement replaces them."""

from __future__ import annotations

import re
from pathlib import Path


def onto_page(page: Path, text: str, command: str) -> None:
    """Replaces what stands between the marks of `command`; a page without them gets it at its end."""
    start, end = f"<!-- figures: {command} -->", f"<!-- end of figures: {command} -->"
    before = page.read_text(encoding="utf-8") if page.is_file() else ""
    block = f"{start}\n{text.strip()}\n{end}"
    marked = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    after = marked.sub(lambda _: block, before) if marked.search(before) else f"{before.rstrip()}\n\n{block}\n"
    page.write_text(after.lstrip("\n"), encoding="utf-8")
