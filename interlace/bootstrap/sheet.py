"""The verdicts on one page, pictures beside both texts: a single file that asks nobody for anything."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interlace.bars import bar
from interlace.data.pictures import BadPicture, open_picture
from interlace.data.rows import Source
from interlace.search.rows import jpeg

if TYPE_CHECKING:
    from interlace.bootstrap.bootstrap import Report

SIDE = 176  # pixels of a small picture
# nothing may be loaded, sent or run, whatever a caption says
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
WORDS = {"keep": "kept", "replace": "replaced", "drop": "dropped"}

STYLE = """
:root { color-scheme: light dark; --page: #f6f6f4; --card: #fff; --ink: #1c1c1a; --soft: #66665f; --line: #deded8;
  --keep: #1a6b3c; --replace: #8a5200; --drop: #a32020; --mark: #eef3ee; }
@media (prefers-color-scheme: dark) { :root { --page: #161615; --card: #20201f; --ink: #ecece8; --soft: #a3a39b;
  --line: #383835; --keep: #7fd0a0; --replace: #f0b765; --drop: #ff9a94; --mark: #263029; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 84rem; padding: 1.5rem 1rem 4rem; background: var(--page); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .4rem; } p { margin: .2rem 0; color: var(--soft); } p b { color: var(--ink); }
.choose { display: flex; flex-wrap: wrap; gap: .4rem; margin: 1rem 0; padding: 0; border: 0; }
.choose label { padding: .3rem .8rem; border: 1px solid var(--line); border-radius: 1rem; background: var(--card);
  cursor: pointer; }
.choose input { position: absolute; opacity: 0; }
.choose label:has(:checked) { border-color: var(--ink); font-weight: 600; }
.choose label:has(:focus-visible) { outline: 2px solid currentColor; outline-offset: 2px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(25rem, 1fr)); gap: .8rem; }
@media (max-width: 30rem) { .cards { grid-template-columns: 1fr; } }
article { display: grid; grid-template-columns: 8rem 1fr; gap: .8rem; padding: .7rem; background: var(--card);
  border: 1px solid var(--line); border-radius: .5rem; }
article img { width: 8rem; height: 8rem; object-fit: contain; background: #fff; border-radius: .3rem; }
h2 { display: flex; gap: .6rem; margin: 0 0 .3rem; font-size: .8rem; font-weight: 400;
  color: var(--soft); min-width: 0; }
h2 span { overflow-wrap: anywhere; } h2 b { text-transform: uppercase; letter-spacing: .04em; }
.keep h2 b { color: var(--keep); } .replace h2 b { color: var(--replace); } .drop h2 b { color: var(--drop); }
dl { margin: 0; } dt { font-size: .75rem; color: var(--soft); } dd { margin: 0 0 .35rem; padding: .1rem .35rem;
  overflow-wrap: anywhere; border-radius: .25rem; } dd.chosen { background: var(--mark); }
dd.gone { color: var(--soft); } dd.none { font-style: italic; color: var(--soft); }
body:has(#only-keep:checked) article:not(.keep), body:has(#only-replace:checked) article:not(.replace),
body:has(#only-drop:checked) article:not(.drop) { display: none; }
@media print { .choose { display: none; } article { break-inside: avoid; } }
"""


def write_sheet(file: Path, source: Source, lines: list[dict[str, Any]], report: Report) -> None:
    """`lines`: rows with their texts, scores and verdicts, the most doubtful first; their small pictures are in the
    file. Texts are shown as they are, never read as HTML."""
    with open(file, "w", encoding="utf-8", errors="replace") as page:
        page.write(_head(source, len(lines), report))
        for line in bar(lines, desc="review page", unit=" pictures", leave=False):
            page.write(_card(line, _small(source, line["row"]), report))
        page.write("</div>\n</main>\n</body>\n</html>\n")


def _head(source: Source, shown: int, report: Report) -> str:
    counts = report.verdicts
    all_of_them = sum(counts[v] for v in WORDS)
    first = "all" if shown == all_of_them else f"the {shown:,} most doubtful of {all_of_them:,}"
    said = "".join(f"<p>{escape(line)}</p>\n" for line in report.lines()[:-2])
    buttons = "".join(f'<label><input type="radio" name="only" id="only-{name}">{word} {counts[name]:,}</label>\n'
                      for name, word in WORDS.items())  # fmt: skip
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Texts of {escape(source.name)}: verdicts to review</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>Texts of {escape(source.name)}: verdicts to review</h1>
{said}<p>Shown: {first} rows; the closer the deciding score lies to the threshold, the earlier. Counts are of the whole
table.</p>
<fieldset class="choose" aria-label="Which verdicts to show">
<label><input type="radio" name="only" checked>all {all_of_them:,}</label>
{buttons}</fieldset>
<div class="cards">
"""


def _card(line: dict[str, Any], picture: str, report: Report) -> str:
    verdict, by = line["verdict"], report.threshold["by"]
    web = _text("web", line["web"], line, by, verdict == "keep")
    synthetic = ""
    if report.captioner:
        synthetic = _text("synthetic", line["synthetic"], line, by, verdict == "replace" or "added" in line)
    return (f'<article class="{verdict}">\n<img src="{picture}" alt="">\n<div><h2><b>{WORDS[verdict]}</b>'
            f"<span>{escape(str(line['id']))}</span></h2>\n<dl>{web}{synthetic}</dl></div>\n</article>\n")  # fmt: skip


def _text(kind: str, text: str, line: dict[str, Any], by: str, chosen: bool) -> str:
    score, other = line[f"{by}_{kind}"], "cosine" if by == "match" else "match"
    beside = line[f"{other}_{kind}"]
    scores = "no score" if score is None else f"{by} {score:.3f}"
    if beside is not None:
        scores += f", {other} {beside:.3f}"
    shown = escape(text) if text.strip() else "(no words)"
    how = "none" if not text.strip() else "chosen" if chosen else "gone"
    return f'<dt>{kind}: {scores}</dt><dd class="{how}">{shown}</dd>'


def _small(source: Source, row: int) -> str:
    """The picture as a data address; an empty one where it cannot be read any more."""
    try:
        data = jpeg(open_picture(source.picture(row), size_hint=SIDE), SIDE, quality=70)
    except (BadPicture, OSError):
        return "data:,"
    return "data:image/jpeg;base64," + base64.b64encode(data).decode("ascii")
