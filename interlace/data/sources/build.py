"""From whatever a reader yields to a `Source`: roles, types, groups, splits, the fingerprint, and the rows left out."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from interlace.data.cache import cache_folder
from interlace.data.rows import QUESTION_SCHEMA, SPLITS, Picture, Problems, Source, open_table
from interlace.data.sources.columns import Kind, caption_hint, resolve
from interlace.errors import UserError

BATCH = 32_768  # rows handled at once
SPILL = 200_000  # rows above which the table is written to disk and memory-mapped
SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}
SPLIT_WORDS = {
    "train": 0, "training": 0, "restval": 0,
    "val": 1, "valid": 1, "validation": 1, "dev": 1, "eval": 1,
    "test": 2, "testing": 2,
}  # fmt: skip
# kinds of reasons why a row is left out that have a remedy of their own
SPLIT, ADDRESS, MISSING = "unknown split", "a web address, not a file", "missing file"
BACKSLASH, SHARD = "backslashes in a path", "shard not readable to its end"

Batch = tuple[Sequence[int | str], dict[str, list[Any]]]


@dataclass
class Raw:
    """What a reader of one format hands over. `batches` yields (rows' places in the file, column -> list of cells).

    An image cell is a path or a `Picture`. A column `__label__`, when batches carry one, names rows that have no path.
    `questions` yields dicts with pair_id, question, answers [(text, weight)], and optionally id and kind. Both may be
    called more than once.
    """

    name: str
    where: str
    columns: list[str]
    batches: Callable[[], Iterator[Batch]]
    root: Path
    total: int | None = None
    licence: str = ""
    questions: Callable[[], Iterable[dict[str, Any]]] | None = None
    split: str | None = None  # the file's own split, when its name says so
    stamp: str = ""  # stands in the fingerprint for files that hold many pictures: their sizes and times
    problems: Problems = field(default_factory=Problems)
    roles: dict[str, str] | None = None  # role -> column, where `columns` are not those of the user's table


def hash64(text: str) -> int:
    """64 bits of BLAKE2b: stable across machines and versions, unlike Python's own hash."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def normalised(text: str) -> str:
    """Lower case, letters and digits only, single spaces: equal keys mean the texts say the same."""
    return " ".join(re.sub(r"[\W_]+", " ", text.lower()).split())


def split_of_groups(groups: np.ndarray) -> np.ndarray:
    """(N,) int8 split of each (N,) uint64 group: 80/10/10 by hash: no group straddles, new rows move none."""
    mixed = groups.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)  # group codes may be small given numbers
    mixed ^= mixed >> np.uint64(32)
    mixed *= np.uint64(0xD6E8FEB86659FD93)
    share = (mixed >> np.uint64(11)).astype(np.float64) / 2.0**53
    edges = np.cumsum([SHARES["train"], SHARES["val"]])
    return np.searchsorted(edges, share, side="right").astype(np.int8)


def join_equal(labels: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """(N,) labels merged wherever two rows share a key. Key 0 means "none"."""
    order = np.argsort(keys, kind="stable")
    same = (keys[order][1:] == keys[order][:-1]) & (keys[order][1:] != 0)
    return join_pairs(labels, order[:-1][same], order[1:][same])


def join_pairs(labels: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(N,) labels where rows `first[i]` and `second[i]`, and all that carry their labels, become one group.

    Union-find over the labels that differ, so the cost in Python steps is the number of merges, not of rows. The label
    of a merged group is the least of its labels.
    """
    pairs = np.stack([labels[first], labels[second]], axis=1)
    pairs = np.unique(pairs[pairs[:, 0] != pairs[:, 1]], axis=0)
    if not len(pairs):
        return labels
    parent: dict[int, int] = {}

    def root(x: int) -> int:
        parent.setdefault(x, x)
        while (up := parent[x]) != x:
            parent[x] = x = parent[up]
        return x

    for a, b in pairs.tolist():
        a, b = root(a), root(b)
        parent[max(a, b)] = min(a, b)
    known = np.array(sorted(parent), dtype=np.uint64)
    roots = np.array([root(x) for x in known.tolist()], dtype=np.uint64)
    at = np.minimum(np.searchsorted(known, labels), len(known) - 1)
    return np.where(known[at] == labels, roots[at], labels)


class _Rows:
    """Collects tables; past SPILL rows they go to an arrow file in the cache, which is memory-mapped at the end."""

    def __init__(self) -> None:
        self.tables: list[pa.Table] = []
        self.writer: pa.RecordBatchFileWriter | None = None
        self.file: Path | None = None
        self.count = 0

    def append(self, table: pa.Table) -> None:
        self.count += len(table)
        self.tables.append(table)
        if self.count <= SPILL:
            return
        if self.writer is None:
            folder = cache_folder() / "tables"
            folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(suffix=".arrow", prefix="building-", dir=folder)
            os.close(handle)
            self.file = Path(name)
            self.writer = pa.ipc.new_file(name, table.schema)
        for waiting in self.tables:
            self.writer.write_table(waiting)
        self.tables = []

    def finish(self, fingerprint: str) -> tuple[pa.Table, Path | None]:
        if self.writer is None or self.file is None:
            return pa.concat_tables(self.tables).combine_chunks(), None
        self.writer.close()
        file = self.file.with_name(f"{fingerprint}.arrow")
        os.replace(self.file, file)
        return open_table(file), file


def _text(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)) and all(isinstance(item, (str, int, float)) for item in value):
        return ", ".join(map(str, value))
    if isinstance(value, (dict, list, tuple)):
        return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))  # a pandas column of identifiers with one gap arrives as floats
    return str(value)


def _stripped(value: Any) -> str | None:
    """Without the blanks around it, so that a filter finds what a person sees."""
    text = _text(value)
    return text.strip() if text else text


def _short(caption: str, width: int = 60) -> str:
    return caption if len(caption) <= width else caption[:width].rsplit(" ", 1)[0] + " ..."


class _Roots:
    """Where relative picture paths start: beside the table, in its picture folder, or where the user stands."""

    def __init__(self, root: Path):
        self.candidates = [root, root / "pictures", root / "images", Path.cwd()]
        self.chosen: str | None = None

    def choose(self, cells: Iterable[Any]) -> str:
        if self.chosen is None:
            some = [cell for cell in cells if isinstance(cell, str) and cell][:200]
            # with backslashes they are not found, but it can be said where they would be
            hits = [sum((base / cell.replace("\\", "/")).exists() for cell in some) for base in self.candidates]
            self.chosen = str(self.candidates[int(np.argmax(hits))].absolute())
        return self.chosen


def build(
    raw: Raw,
    columns: dict[str, str] | None = None,
    split: str | None = None,
    pictures: Path | None = None,
) -> Source:
    """Reads everything once. Rows without a usable picture file, or with broken cells, are left out and listed.

    Raises UserError when columns are missing, the table is empty, or no row is left.
    """
    roles = resolve(raw.columns, columns, raw.where)
    extra = [column for column in raw.columns if column not in roles.values()]
    kinds = {column: Kind() for column in extra}
    roots = _Roots(pictures or raw.root)
    if pictures is not None:
        roots.candidates = [pictures]
    rows, problems, digest = _Rows(), raw.problems, hashlib.sha256(raw.stamp.encode())
    id_codes, text_codes, path_codes, split_codes, hashes = [], [], [], [], []
    left_out: set[int] = set()  # hashed ids of the rows dropped here
    read = 0
    progress = tqdm(total=raw.total, desc=f"reading {raw.name}", unit=" rows", disable=None, delay=2, leave=False)
    with progress:
        for places, cells in raw.batches():
            read += len(places)
            progress.update(len(places))
            batch = _batch(places, cells, roles, extra, roots, problems, left_out)
            if not batch["id"]:
                continue
            for column, kind in kinds.items():
                kind.watch(batch["@" + column])
            for key, value in zip(batch["id"], batch["seen"]):
                digest.update(f"{key}\x1f{value}\x1e".encode("utf-8", "surrogatepass"))
            id_codes.append(np.array([hash64(x) for x in batch["id"]], np.uint64))
            text_codes.append(np.array([hash64(x) if x else 0 for x in batch.pop("text_key")], np.uint64))
            path_codes.append(np.array([hash64(x) if x else 0 for x in batch.pop("path_key")], np.uint64))
            split_codes.append(np.array(batch.pop("split"), np.int8))
            hashes.append(np.array(batch.pop("hash"), np.uint64))
            batch.pop("seen")
            rows.append(_table(batch))
    if read == 0 and not problems.count:
        raise UserError(f"{raw.where} is empty: expected at least one row with a picture.")
    if not id_codes:
        raise UserError(_nothing_left(raw, roles if raw.roles is None else raw.roles, roots, problems, read))
    ids, texts, paths = np.concatenate(id_codes), np.concatenate(text_codes), np.concatenate(path_codes)
    given_splits = np.concatenate(split_codes)
    fingerprint = digest.hexdigest()
    table, file = rows.finish(fingerprint)
    table = _unique_ids(table, ids, problems)
    groups = _groups(table, ids, texts, paths, np.concatenate(hashes) if "hash" in roles else None)
    if split is not None:
        splits = np.full(len(groups), SPLITS.index(split), np.int8)
    else:
        own = np.full(len(groups), SPLITS.index(raw.split), np.int8) if raw.split else split_of_groups(groups)
        splits = np.where(given_splits >= 0, given_splits, own).astype(np.int8)
    questions = _questions(raw, table, problems, digest, left_out)
    return Source(
        name=raw.name,
        rows=table,
        groups=groups,
        splits=splits,
        columns={column: kinds[column].name for column in extra},
        fingerprint=digest.hexdigest(),
        licence=raw.licence,
        questions=questions,
        problems=problems,
        file=file,
        roles={raw.name: roles if raw.roles is None else raw.roles},
        hints=caption_hint(raw.columns, columns, roles, raw.name),
    )


def _nothing_left(raw: Raw, roles: dict[str, str], roots: _Roots, problems: Problems, read: int) -> str:
    kinds = problems.kinds.most_common(3)
    common = ", ".join(f"{kind} ({count})" for kind, count in kinds)
    row, reason = next(((row, why) for row, why in problems.first if why.split(":")[0] == kinds[0][0]), ("?", "?"))
    hint = {
        SPLIT: f"The column {roles.get('split')!r} was taken for the splits. If it is one (--column split=NAME names "
        f"another), its cells may be {', '.join(SPLIT_WORDS)} or empty; if it is not, such as numbers of folds, rename "
        "it in the table, for instance to fold_number.",
        ADDRESS: "Web addresses are never opened: download the pictures and write their files' paths into "
        f"{roles.get('image')!r}.",
        BACKSLASH: f"Write the paths in {roles.get('image')!r} with / instead.",
        SHARD: "The shard is cut off or is not a tar: copy it anew, or list it with `tar -tf FILE`.",
        MISSING: f"Relative paths were looked up in {roots.chosen or raw.root}; give their folder with --pictures "
        "FOLDER (data.pictures=FOLDER in a config, pictures= in Python) if they lie elsewhere.",
    }.get(kinds[0][0], "")
    about_pictures = kinds[0][0] in (ADDRESS, BACKSLASH, MISSING, "no picture", "not a path", "a folder, not a picture")
    lacks = "has a readable picture" if about_pictures else "can be used"
    return (
        f"{raw.where}: no row of {max(read, problems.count)} {lacks}. Reasons: {common}. For example row {row}: "
        f"{reason}. {hint}".strip()
    )


def _batch(
    places: Sequence[int | str],
    cells: dict[str, list[Any]],
    roles: dict[str, str],
    extra: list[str],
    roots: _Roots,
    problems: Problems,
    left_out: set[int],
) -> dict[str, list[Any]]:
    """One batch in the stored columns, plus text_key, path_key, split, hash and seen (what the fingerprint covers)."""
    n = len(places)
    role: dict[str, list[Any]] = {key: cells[column] for key, column in roles.items()}
    base = roots.choose(role["image"])
    labels = cells.get("__label__") or [""] * n
    out: dict[str, list[Any]] = {key: [] for key in ("id", "path", "offset", "length", "caption", "name")}
    if "group" in role:
        out["group"] = []
    for key in ("text_key", "path_key", "split", "hash", "seen"):
        out[key] = []
    for column in extra:
        out["@" + column] = []
    for i in range(n):
        try:
            path, offset, length, label, facts = _picture(role["image"][i], base)
            label = labels[i] or label
            split = _split(role["split"][i]) if "split" in role else -1
            bits = int(role["hash"][i], 16) if "hash" in role and role["hash"][i] else 0
        except ValueError as error:
            problems.add(places[i], str(error))
            left_out.add(hash64(_lost_id(role, labels, i)))
            continue
        captions = role["caption"][i] if "caption" in role else ""
        if isinstance(captions, dict):
            captions = _text(captions)
        several = isinstance(captions, (list, tuple)) and len(captions) > 1
        values = list(captions) if isinstance(captions, (list, tuple)) and captions else [captions or ""]
        if isinstance(captions, (list, tuple)) and not captions:
            values = [""]
        for number, caption in enumerate(values):
            caption = " ".join((_text(caption) or "").split())
            given_name = " ".join((_text(role["name"][i]) or "").split()) if "name" in role else ""
            key = (_text(role["id"][i]) if "id" in role else None) or label
            if several:
                key = f"{key}-{number}"
            out["id"].append(key)
            out["path"].append(path)
            out["offset"].append(offset)
            out["length"].append(length)
            out["caption"].append(caption)
            out["name"].append(given_name or _short(caption) or Path(label).stem)
            if "group" in role:
                out["group"].append(_stripped(role["group"][i]) or None)
            out["text_key"].append(normalised(caption) or normalised(given_name))
            out["path_key"].append(path if offset is None else f"{path}:{offset}")
            out["split"].append(split)
            out["hash"].append(bits)
            attributes = [_stripped(cells[column][i]) for column in extra]
            for column, value in zip(extra, attributes):
                out["@" + column].append(value)
            given_group = out["group"][-1] if "group" in role else ""
            out["seen"].append(
                "\x1f".join(map(str, (label, facts, caption, given_name, given_group, split, *attributes)))
            )
    return out


def _lost_id(role: dict[str, list[Any]], labels: Sequence[str], i: int) -> str:
    """The id a dropped row would have had: what its questions point at."""
    given, cell = _text(role["id"][i]) if "id" in role else None, role["image"][i]
    return given or labels[i] or (cell.strip() if isinstance(cell, str) else "")


def _picture(cell: Any, base: str) -> tuple[str, int | None, int | None, str, str]:
    """(path, offset, length, label, facts); facts are the size and time that the fingerprint covers."""
    if isinstance(cell, Picture) and cell.path is not None:
        return cell.path, cell.offset, cell.length, f"{Path(cell.path).name}@{cell.offset}", f"{cell.length}"
    if not isinstance(cell, str) or not cell.strip():
        raise ValueError("no picture: the cell is empty" if cell in (None, "") else f"not a path: {str(cell)[:60]!r}")
    cell = cell.strip()
    if cell.startswith(("http://", "https://", "s3://", "gs://")):
        raise ValueError(f"{ADDRESS}: {cell[:80]} (download the pictures first)")
    path = os.path.join(base, cell)
    try:
        facts = os.stat(path)
    except (OSError, ValueError):
        if "\\" in cell and os.path.exists(os.path.join(base, cell.replace("\\", "/"))):
            raise ValueError(f"{BACKSLASH}: {cell} (write {cell.replace(chr(92), '/')})") from None
        raise ValueError(f"{MISSING}: {cell}") from None
    if stat.S_ISDIR(facts.st_mode):
        raise ValueError(f"a folder, not a picture: {cell}")
    return path, None, None, cell, f"{facts.st_size} {facts.st_mtime_ns}"


def _split(cell: Any) -> int:
    """Position in SPLITS, -1 for an empty cell."""
    word = str(cell or "").strip().lower()
    if not word:
        return -1
    if word not in SPLIT_WORDS:
        raise ValueError(f"{SPLIT}: {cell!r} (expected train, val or test)")
    return SPLIT_WORDS[word]


def _table(batch: dict[str, list[Any]]) -> pa.Table:
    integers = ("offset", "length")
    return pa.table(
        {key: pa.array(value, pa.int64() if key in integers else pa.large_string()) for key, value in batch.items()}
    )


def _unique_ids(table: pa.Table, codes: np.ndarray, problems: Problems) -> pa.Table:
    """Later rows with an id already used get `#2`, `#3`, ...; they are listed but kept."""
    if len(np.unique(codes)) == len(codes):
        return table
    ids = table.column("id").to_pylist()
    taken, seen = set(ids), dict[str, int]()
    renamed = 0
    for i, key in enumerate(ids):
        seen[key] = seen.get(key, 0) + 1
        if seen[key] > 1:
            number = seen[key]
            while f"{key}#{number}" in taken:
                number += 1
            ids[i] = f"{key}#{number}"
            taken.add(ids[i])
            codes[i] = hash64(ids[i])
            renamed += 1
    problems.note = f"{renamed:,} rows repeat an id and were renamed id#2, id#3, ..."
    return table.set_column(0, "id", pa.array(ids, pa.large_string()))


def _groups(
    table: pa.Table, ids: np.ndarray, texts: np.ndarray, paths: np.ndarray, hashes: np.ndarray | None
) -> np.ndarray:
    """(N,) uint64 group codes: the given group, else rows joined by equal text, same file or near-equal picture."""
    labels = np.where(texts != 0, texts, ids)
    labels = join_equal(labels, paths)
    if hashes is not None:
        from interlace.data.duplicates import near_pairs

        some = np.flatnonzero(hashes)
        near = near_pairs(hashes[some])
        labels = join_pairs(labels, some[near[:, 0]], some[near[:, 1]])
    if "group" in table.column_names:
        given = np.array([hash64("given:" + x) if x else 0 for x in table.column("group").to_pylist()], np.uint64)
        labels = np.where(given != 0, given, labels)
    return labels


def _questions(raw: Raw, table: pa.Table, problems: Problems, digest: Any, left_out: set[int]) -> pa.Table:
    """The questions whose pair exists, as a table; those about rows that were left out are counted, others listed."""
    found: dict[str, int] | None = None
    tables: list[pa.Table] = []
    stranger = ""
    for number, group in enumerate(_chunks(raw.questions() if raw.questions is not None else ())):
        if found is None:
            found = {key: i for i, key in enumerate(table.column("id").to_pylist())}
        out: dict[str, list[Any]] = {name: [] for name in QUESTION_SCHEMA.names}
        for position, question in enumerate(group):
            pair_id = str(question["pair_id"])
            name = str(question.get("id") or f"{pair_id}?{number * BATCH + position}")
            row = found.get(pair_id)
            if row is None:
                if hash64(pair_id) in left_out:
                    problems.lose_question(name)
                else:
                    problems.add_question(f"question {name}", f"no pair with id: {pair_id}")
                    stranger = stranger or pair_id
                continue
            out["id"].append(name)
            out["row"].append(row)
            out["question"].append(" ".join(str(question["question"]).split()))
            out["answers"].append([text for text, _ in question["answers"]])
            out["weights"].append([weight for _, weight in question["answers"]])
            out["kind"].append(str(question.get("kind") or ""))
            digest.update(repr((out["id"][-1], out["question"][-1], question["answers"])).encode())
        tables.append(pa.table(out, schema=QUESTION_SCHEMA))
    if stranger and not problems.lost_questions and not any(map(len, tables)):
        known = next(iter(found or {}))
        problems.strangers = (
            f"none is about a row: a question's `pair_id` is such as {stranger[:80]!r}, a row's id such as "
            f"{known[:80]!r}. Ids are the column `id` (or item_id, sku, ...; --column id=NAME), else the picture's path"
        )
    return pa.concat_tables(tables).combine_chunks() if tables else QUESTION_SCHEMA.empty_table()


def _chunks(items: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    for item in items:
        group.append(item)
        if len(group) == BATCH:
            yield group
            group = []
    if group:
        yield group


def batched_dicts(
    records: Iterable[tuple[int | str, dict[str, Any]]], columns: list[str]
) -> Iterator[tuple[list[int | str], dict[str, list[Any]]]]:
    """Records as batches of columns; a cell a record does not have is None."""
    places: list[int | str] = []
    group: list[dict[str, Any]] = []
    for place, record in records:
        places.append(place)
        group.append(record)
        if len(group) == BATCH:
            yield places, {column: [record.get(column) for record in group] for column in columns}
            places, group = [], []
    if group:
        yield places, {column: [record.get(column) for record in group] for column in columns}
