"""`interlace data check`: what would hurt a training run, found before it starts.

Errors (exit status 1): rows, questions or pictures that cannot be read, the same picture in two splits, all of training
one group, no rows. Everything else is a warning or a number to know. One pass decodes every distinct picture once, at a
fraction of its size, in threads (Pillow lets go of Python's lock while it decodes); what is kept of each is 208 bytes,
on disk when there are many.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from interlace.data.duplicates import THUMB, connected, equal_pairs, near_pairs, perceptual_hash, thumbnail
from interlace.data.pictures import BadPicture, open_picture
from interlace.data.rows import SPLITS, Source, stored_attribute
from interlace.data.sources import open_source
from interlace.data.sources.build import hash64, normalised
from interlace.errors import UserError

CHUNK = 64  # pictures per task
IN_MEMORY = 500_000  # pictures whose thumbnails (192 bytes each) are held in memory
EXAMPLES = 5


@dataclass
class Finding:
    """`level` is "error", "warning" or "note"; `examples` are a few rows, for a person to look up."""

    level: str
    what: str
    count: int
    detail: str = ""
    examples: list[str] = field(default_factory=list)


@dataclass
class Report:
    name: str
    rows: int
    splits: dict[str, int]
    findings: list[Finding] = field(default_factory=list)
    attributes: list[tuple[str, str, str]] = field(default_factory=list)  # (name, kind, summary)
    questions: list[tuple[str, int, int, str, float]] = field(
        default_factory=list
    )  # kind, n, answers, most common, share
    unreadable: list[tuple[str, str]] = field(default_factory=list)  # (id, reason), the first thousand
    columns: list[str] = field(default_factory=list)  # which column was taken for what, a line each
    groups: np.ndarray | None = None  # (N,) rows with equal numbers belong together: same group or same picture

    def add(self, level: str, what: str, count: int, detail: str = "", examples: Sequence[str] = ()) -> None:
        if count:
            self.findings.append(Finding(level, what, count, detail, list(examples[:EXAMPLES])))

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == "error"]

    @property
    def exit_status(self) -> int:
        return 1 if self.errors else 0

    def print(self, console: Console | None = None) -> None:
        console = console or Console(highlight=False)
        counts = ", ".join(f"{split} {count:,}" for split, count in self.splits.items())
        console.print(f"[bold]{self.name}[/bold]: {self.rows:,} rows ({counts})")
        for line in self.columns:
            console.print(_plain(line), style="yellow" if line.startswith("NOTE") else None, soft_wrap=True)
        if self.attributes:
            table = Table("attribute", "type", "values")
            for row in self.attributes:
                table.add_row(*row)
            console.print(table)
        if self.questions:
            table = Table("questions", "count", "answers", "most common answer", "its share")
            for kind, n, answers, common, share in self.questions:
                table.add_row(kind or "(no kind)", f"{n:,}", f"{answers:,}", common, f"{share:.0%}")
            console.print(table)
        table = Table("", "finding", "rows", "what to know")
        colours = {"error": "bold red", "warning": "yellow", "note": "dim"}
        for finding in sorted(self.findings, key=lambda finding: ("error", "warning", "note").index(finding.level)):
            lines = [finding.detail, *(f"  {example}" for example in finding.examples)]
            text = "\n".join(line for line in lines if line)
            colour = colours[finding.level]
            table.add_row(f"[{colour}]{finding.level}[/{colour}]", finding.what, f"{finding.count:,}", _plain(text))
        if self.findings:
            console.print(table)
        warnings = sum(finding.level == "warning" for finding in self.findings)
        console.print(f"kinds of errors: {len(self.errors) or 'none'}, of warnings: {warnings or 'none'}")


def _plain(text: str) -> str:
    return text.replace("[", r"\[")  # captions and paths are not rich markup


def check(
    source: Source | str | Path | list,
    columns: dict[str, str] | None = None,
    max_length: int | None = None,
    tokenizer: Any = None,
    workers: int | None = None,
    write_groups: str | Path | None = None,
) -> Report:
    """Reads everything once, prints a table, and returns it as a `Report` whose `exit_status` is 1 on errors.

    With a `tokenizer`, captions longer than `max_length` tokens (special ones included) are counted. `write_groups`
    writes a CSV of id and group in which duplicates share a group: join it to your table as the column `group`, and no
    duplicate straddles a split any more.

    Raises UserError when the source cannot be opened at all (a missing column, no rows), and for a `max_length` below
    1.
    """
    if max_length is not None and max_length < 1:
        raise UserError(f"max_length: expected at least 1 token, got {max_length}.")
    opened = source if isinstance(source, Source) else open_source(source, columns)
    counts = {split: len(opened.indices(split)) for split in SPLITS}
    report = Report(opened.name, len(opened), counts, columns=opened.describe_columns())
    _check_rows(opened, report)
    _check_groups(opened, report)
    _check_pictures(opened, report, workers or min(8, os.cpu_count() or 1))
    _check_captions(opened, report, max_length, tokenizer)
    _check_attributes(opened, report)
    _check_questions(opened, report)
    if write_groups is not None:
        _write_groups(opened, report, Path(write_groups))
    report.print()
    return report


def _check_rows(source: Source, report: Report) -> None:
    lost = source._problems
    examples = [f"{row}: {reason}" for row, reason in lost.first]
    report.add("error", "rows left out", lost.count, "they could not be read and will not be used", examples)
    report.add("warning", "rows to look at", lost.doubts, "they were kept", lost.doubts_first)
    examples = [f"{place}: {reason}" for place, reason in lost.bad_first]
    report.add("error", "wrong questions", lost.bad_questions, lost.strangers or "they will not be used", examples)
    detail = "questions about rows that were left out"
    report.add("warning", "questions left out", lost.lost_questions, detail, lost.lost_first)
    report.add("warning", "repeated ids", int(bool(source._problems.note)), source._problems.note)
    for split, count in report.splits.items():
        if count == 0:
            report.add("warning", f"no {split} rows", 1, "a score on them is impossible" if split != "train" else "")


def _check_groups(source: Source, report: Report) -> None:
    """An error when the training rows, or all rows where none trains, are one group: none is another's negative."""
    rows = source.indices("train")
    what = f"all {len(rows):,} train rows"
    if not len(rows):
        rows, what = source.indices(), f"all {len(source):,} rows"
    if len(rows) < 2 or len(np.unique(source.group_codes[rows])) > 1:
        return
    first = source.pair(int(rows[0]))
    captions = {normalised(text) for text in source.captions().take(rows).to_pylist()}
    if not first.group.startswith("~"):
        why = f"their `group` is {first.group[:40]!r}; leave the column out, or give different things different groups"
    elif len(captions) == 1 and captions != {""}:
        why = f"they have the same text, {first.caption[:60]!r}; is another column the caption?"
    else:
        why = "they are joined by equal texts, the same file or near-equal `phash`; give groups in a column `group`"
    report.add("error", "one group", len(rows), f"{what} are one group, so nothing can be told apart: {why}")


def _keys(source: Source) -> np.ndarray:
    """(N,) uint64: equal where rows name the same file (or slice of one)."""
    keys = np.zeros(len(source), np.uint64)
    row = 0
    for batch in source._rows.select(["path", "offset"]).to_batches(max_chunksize=65536):
        for path, offset in zip(batch.column(0).to_pylist(), batch.column(1).to_pylist()):
            keys[row] = hash64(f"{path}:{offset}")
            row += 1
    return keys


def _check_pictures(source: Source, report: Report, workers: int) -> None:
    _, first, inverse = np.unique(_keys(source), return_index=True, return_inverse=True)
    inverse = inverse.reshape(-1)
    n = len(first)
    contents, hashes, bad = np.zeros(n, np.uint64), np.zeros(n, np.uint64), np.zeros(n, bool)
    small = 0
    with tempfile.TemporaryFile() as file:
        thumbs: np.ndarray
        if n <= IN_MEMORY:
            thumbs = np.zeros((n, THUMB), np.uint8)
        else:
            file.truncate(n * THUMB)
            thumbs = np.memmap(file, np.uint8, "r+", shape=(n, THUMB))
        progress = tqdm(total=n, desc="reading pictures", unit=" pictures", disable=None, delay=1)
        with progress:
            for start, results in _read_all(source, first, workers):
                for at, result in enumerate(results, start):
                    if isinstance(result, str):
                        bad[at] = True
                        if len(report.unreadable) < 1000:
                            report.unreadable.append((source.pair(int(first[at])).id, result))
                        continue
                    contents[at], hashes[at], thumbs[at], is_small = result
                    small += is_small
                progress.update(len(results))
        examples = [f"{key}: {reason}" for key, reason in report.unreadable]
        report.add("error", "unreadable pictures", int(bad[inverse].sum()), "they will be skipped", examples)
        report.add("warning", "tiny pictures", small, "the short side has fewer than 32 pixels")
        _check_duplicates(source, report, inverse, contents, hashes, thumbs, bad)


def _read_all(source: Source, rows: np.ndarray, workers: int) -> Iterator[tuple[int, list[Any]]]:
    """(start, results) in order; at most four tasks per worker wait, so memory does not grow with the source."""
    starts = iter(range(0, len(rows), CHUNK))
    waiting: list[tuple[int, Future]] = []
    with ThreadPoolExecutor(workers) as pool:
        try:
            while True:
                while len(waiting) < 4 * workers and (start := next(starts, None)) is not None:
                    pictures = [source.picture(int(row)) for row in rows[start : start + CHUNK]]
                    waiting.append((start, pool.submit(_read_some, pictures)))
                if not waiting:
                    return
                start, task = waiting.pop(0)
                yield start, task.result()
        finally:
            for _, task in waiting:
                task.cancel()


def _read_some(pictures: list) -> list[Any]:
    return [_read(picture) for picture in pictures]


def _read(picture: Any) -> str | tuple[int, int, np.ndarray, bool]:
    try:
        data = picture.read()
    except FileNotFoundError:
        return "missing file"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    try:
        image = open_picture(data, size_hint=64)
    except BadPicture as bad:
        return bad.reason
    content = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
    return content, perceptual_hash(image), thumbnail(image), min(image.size) < 32


def _check_duplicates(
    source: Source,
    report: Report,
    inverse: np.ndarray,
    contents: np.ndarray,
    hashes: np.ndarray,
    thumbs: np.ndarray,
    bad: np.ndarray,
) -> None:
    """Groups of distinct files with equal bytes, then of pictures that look the same; leaks of either are errors."""
    good = np.flatnonzero(~bad)
    exact = good[equal_pairs(contents[good])]
    same = connected(len(contents), exact)
    leaders = np.intersect1d(good, np.unique(same))  # one file of each content is enough to look at
    near = leaders[near_pairs(hashes[leaders], thumbs[leaders])]
    alike = connected(len(contents), np.concatenate([exact, near]))
    report.groups = _joined_groups(source, alike[inverse])
    for what, labels in (("exact duplicates", same), ("near duplicates", alike)):
        of_rows = labels[inverse]
        sizes = np.bincount(labels[~bad], minlength=len(labels))  # files per group
        if what == "near duplicates":  # only groups in which contents differ
            contents_in = np.zeros(len(labels), np.int64)
            np.add.at(contents_in, labels[leaders], 1)
            sizes = np.where(contents_in > 1, sizes, 0)
        rows = np.flatnonzero((sizes[of_rows] > 1) & ~bad[inverse])
        report.add(
            "warning", what, len(rows), f"in {len(np.unique(of_rows[rows])):,} groups", _groups(source, rows, of_rows)
        )
    _check_leaks(source, report, same[inverse], "the same picture in two splits")
    _check_leaks(source, report, alike[inverse], "near-identical pictures in two splits", beyond=same[inverse])


def _joined_groups(source: Source, labels: np.ndarray) -> np.ndarray:
    """(N,) the source's own groups, joined wherever pictures look the same."""
    _, own = np.unique(source.group_codes, return_inverse=True)
    own = own.reshape(-1)
    pairs = [equal_pairs(own), equal_pairs(labels)]
    return connected(len(own), np.concatenate(pairs))


def _check_leaks(
    source: Source, report: Report, labels: np.ndarray, what: str, beyond: np.ndarray | None = None
) -> None:
    """Rows of val and test whose picture is also in train, or of test whose picture is in val."""

    def leaked(groups: np.ndarray) -> np.ndarray:
        lowest = np.full(int(groups.max()) + 1, len(SPLITS))
        np.minimum.at(lowest, groups, source.split_codes)
        return source.split_codes > lowest[groups]

    if not len(labels):
        return
    rows = leaked(labels)
    if beyond is not None:
        rows &= ~leaked(beyond)
    found = np.flatnonzero(rows)
    fix = "scores on them are too good; give such rows one `group` (`--write-groups FILE` lists them), or drop them"
    report.add("error", what, len(found), fix, _groups(source, found, labels, whole=True))


def _groups(source: Source, rows: np.ndarray, labels: np.ndarray, whole: bool = False) -> list[str]:
    """A few groups as text: "a.jpg (train) = b.jpg (test)". `whole`: with all rows of the group, not only these."""
    out = []
    for label in list(dict.fromkeys(labels[rows].tolist()))[:EXAMPLES]:
        members = np.flatnonzero(labels == label) if whole else rows[labels[rows] == label]
        if whole:  # one of each split shows the leak
            members = members[np.unique(source.split_codes[members], return_index=True)[1]]
        shown = [f"{source.pair(int(i)).id} ({source.split_of(int(i))})" for i in members[:3]]
        out.append(" = ".join(shown) + (f" and {len(members) - 3} more" if len(members) > 3 else ""))
    return out


def _check_captions(source: Source, report: Report, max_length: int | None, tokenizer: Any) -> None:
    codes = np.zeros(len(source), np.uint64)  # 0 = empty
    cut, longest, row = 0, 0, 0
    examples: list[str] = []
    with tqdm(total=len(source), desc="reading captions", unit=" rows", disable=None, delay=1) as progress:
        for batch in source._rows.select(["caption"]).to_batches(max_chunksize=1024):
            captions = batch.column(0).to_pylist()
            codes[row : row + len(captions)] = [hash64(text) if text else 0 for text in captions]
            if tokenizer is not None and max_length is not None:
                lengths = [len(ids) for ids in tokenizer(captions, truncation=False, verbose=False)["input_ids"]]
                over = [i for i, length in enumerate(lengths) if length > max_length]
                cut, longest = cut + len(over), max(longest, *lengths)
                if len(examples) < EXAMPLES:
                    examples += [f"{source.pair(row + i).id}: {lengths[i]} tokens" for i in over[:EXAMPLES]]
            row += len(captions)
            progress.update(len(captions))
    empty = int((codes == 0).sum())
    if empty == len(source):
        report.add("warning", "no captions", empty, "enough to index and search with pictures, not to train")
    else:
        report.add("warning", "empty captions", empty, f"{empty / len(source):.1%} of the rows")
    detail = f"{cut / len(source):.1%} are cut at {max_length} tokens; the longest has {longest}"
    report.add("warning", "captions cut", cut, detail, examples)
    if longest and not cut:
        report.add("note", "captions all fit", len(source), f"the longest has {longest} tokens of {max_length}")
    _, counts = np.unique(codes[codes != 0], return_counts=True)
    repeated = int(counts[counts > 1].sum())
    report.add("note", "captions used more than once", repeated, "such rows share a group unless you give groups")


def _check_attributes(source: Source, report: Report) -> None:
    for name, kind in source.columns.items():
        tally = source._rows.column("@" + name).value_counts()  # distinct cells only become Python objects
        cells = zip(tally.field("values").to_pylist(), tally.field("counts").to_pylist())
        counts = Counter[Any]()
        for cell, count in cells:
            counts[stored_attribute(cell, kind)] += count
        empty = counts.pop(None, 0)
        missing = f", {empty / len(source):.0%} missing" if empty else ""
        if not counts:
            report.attributes.append((name, kind, "always empty"))
        elif kind == "number":
            numbers = np.array(sorted(counts))
            middle = numbers[np.searchsorted(np.cumsum([counts[x] for x in numbers.tolist()]), counts.total() / 2)]
            report.attributes.append((name, kind, f"{numbers[0]:g} to {numbers[-1]:g}, median {middle:g}{missing}"))
        else:
            value, count = counts.most_common(1)[0]
            common = value if isinstance(value, str) else "yes" if value else "no"
            share = count / counts.total()
            report.attributes.append(
                (name, kind, f"{len(counts):,} values, {_plain(common[:30])!r} {share:.0%}{missing}")
            )
            if share > 0.95 and len(counts) > 1:
                report.add("note", f"{name} is nearly constant", count, f"{common[:40]!r} in {share:.0%} of its rows")


def _check_questions(source: Source, report: Report) -> None:
    kinds: dict[str, Counter[str]] = {}
    train: set[str] = set()
    held_out: Counter[str] = Counter()
    without = 0
    for question in tqdm(source.questions(), total=source.n_questions, desc="reading questions", disable=None, delay=1):
        if not question.answers:
            without += 1
            continue
        best = max(question.answers, key=lambda answer: answer[1])[0]
        kinds.setdefault(question.kind, Counter())[best] += 1
        if question.split == "train":
            train.update(answer for answer, _ in question.answers)
        else:
            held_out[best] += 1
    for kind, counts in sorted(kinds.items()):
        (common, count), n = counts.most_common(1)[0], counts.total()
        report.questions.append((kind, n, len(counts), common, count / n))
    report.add("warning", "questions without an answer", without, "they cannot be trained or scored")
    unknown = {answer: count for answer, count in held_out.items() if answer not in train}
    share = sum(unknown.values()) / max(held_out.total(), 1)
    detail = f"{share:.1%} of the held-out questions: out of reach for a closed list"
    report.add("warning", "answers never seen in train", sum(unknown.values()), detail, sorted(unknown))


def _write_groups(source: Source, report: Report, file: Path) -> None:
    import csv

    assert report.groups is not None
    with open(file, "w", encoding="utf-8", newline="") as out:
        table = csv.writer(out)
        table.writerow(["id", "group"])
        ids = (value.as_py() for value in source._rows.column("id"))
        table.writerows(zip(ids, report.groups.tolist()))
