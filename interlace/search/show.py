"""Results and reports as people read them in a terminal, and as plain dicts for programs."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from interlace.search.build import IndexReport
from interlace.search.search import Result


def print_hits(result: Result, console: Console | None = None) -> None:
    """The note, then for each hit its match, score, name and caption, and on a second line where the picture is."""
    console = console or Console()
    if result.note:
        console.print(escape(result.note), style="yellow" if result.hopeless else "")
    if not result.hits:
        return
    matched, worded = any(h.match is not None for h in result), any(h.words is not None for h in result)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("#", justify="right", style="dim")
    if matched:
        table.add_column("match", justify="right")
    table.add_column("score", justify="right")
    if worded:
        table.add_column("words", justify="right")
    table.add_column("picture", ratio=1, overflow="fold")
    for n, hit in enumerate(result, 1):
        cells = [str(n)]
        if matched:
            cells.append("-" if hit.match is None else f"{hit.match:.0%}")
        cells.append(f"{hit.score:.3f}")
        if worded:
            cells.append("-" if hit.words is None else f"{hit.words:.1f}")
        caption = " ".join(hit.caption.split())[:200]
        where = str(hit.picture) if hit.picture.path else f"id {hit.id}"
        table.add_row(*cells, f"[bold]{escape(hit.name)}[/bold]  {escape(caption)}\n[dim]{escape(where)}[/dim]")
    console.print(table)
    console.print(f"{len(result)} hits in {result.seconds * 1000:.0f} ms", style="dim")


def to_dicts(result: Result) -> dict[str, Any]:
    """What `--json` prints: only what JSON can hold. Pictures are given by where they are, not by their bytes."""
    return {
        "hits": [
            {
                "id": h.id,
                "name": h.name,
                "caption": h.caption,
                "score": round(h.score, 6),
                "match": None if h.match is None else round(h.match, 6),
                "words": None if h.words is None else round(h.words, 6),
                "attributes": h.attributes,
                "picture": {"path": h.picture.path, "offset": h.picture.offset, "length": h.picture.length},
            }
            for h in result
        ],
        "note": result.note,
        "hopeless": result.hopeless,
        "seconds": round(result.seconds, 4),
    }


def print_report(report: IndexReport, console: Console | None = None) -> None:
    """What a build did, how searches will run, and which pictures were left out."""
    console = console or Console()
    did = {"new": report.added, "embedded again": report.updated, "only text changed": report.relabelled,
           "unchanged": report.unchanged, "removed": report.removed, "skipped": report.n_skipped}  # fmt: skip
    console.print(f"[bold]{escape(str(report.folder))}[/bold]: {report.rows:,} pictures, {report.megabytes:,.1f} MB")
    console.print(", ".join(f"{count:,} {name}" for name, count in did.items() if count) + f"; {report.seconds:.1f} s")
    if report.partitions is None:
        console.print("Search is exact: each query is compared with every vector.")
    elif report.recall is not None:
        console.print(f"Search is approximate (IVF_SQ, {report.partitions:,} partitions): it finds {report.recall:.1%} "
                      "of the true first ten (recall@10 against exact search).")  # fmt: skip
        if report.recall < 0.95:
            console.print("That is low. Exact search at any size: build with a larger exact_below.", style="yellow")
    if report.n_skipped:
        table = Table(title="skipped", title_justify="left", box=None, pad_edge=False, header_style="bold")
        table.add_column("pictures", justify="right")
        table.add_column("reason")
        table.add_column("for example", overflow="fold", style="dim")
        for reason, count in report.reasons.most_common(8):
            example = next((s.path for s in report.skipped if s.reason == reason), "")
            table.add_row(f"{count:,}", escape(reason), escape(example))
        console.print(table)
        console.print(f"All of them: {escape(str(report.folder / 'skipped.jsonl'))}", style="dim")
