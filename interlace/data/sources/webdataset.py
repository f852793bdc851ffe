"""WebDataset shards: tar files whose members share a key (00001.jpg, 00001.txt, 00001.json).

The members are indexed by their place in the tar, so a sample is read by seeking instead of streaming a shard, and any
row can be asked for: the order is the sampler's, whoever loads and wherever a run goes on. Nothing is unpacked. The
first opening touches the headers and the texts, not the pictures, and keeps what it found (shard_index.py).
"""

from __future__ import annotations

import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from interlace.data.pictures import SUFFIXES
from interlace.data.rows import Picture, Problems
from interlace.data.sources.build import SHARD, Raw, batched_dicts
from interlace.data.sources.chain import split_in_name
from interlace.data.sources.shard_index import Say, ShardIndex
from interlace.errors import UserError

LOOKED_AT = 1000  # samples whose .json keys become the columns
TEXTS = ("txt", "text", "caption")


def braces(pattern: str) -> list[str]:
    """ "shard-{000..002}.tar" -> three names; "{a,b}" -> two; as a shell would expand them."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    inside = match[1]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if span:
        first, last = int(span[1]), int(span[2])
        width = len(span[1]) if span[1].startswith("0") or len(span[1]) == len(span[2]) else 0
        options = [f"{number:0{width}d}" for number in range(first, last + 1)]
    else:
        options = inside.split(",")
    return [name for option in options for name in braces(pattern[: match.start()] + option + pattern[match.end() :])]


def read_shards(files: list[Path], name: str, where: str) -> Raw:
    """Raises UserError for shards that are missing, compressed, or without a single picture."""
    missing = [file for file in files if not file.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{where}: {len(files)} shards expected, {missing[0]} does not exist{more}.")
    if not files:
        raise UserError(f"{where}: no shards (.tar files).")
    for file in files[:1]:
        with open(file, "rb") as start:
            if start.read(2) in (b"\x1f\x8b", b"BZ", b"\xfd7"):
                raise UserError(
                    f"{file} is compressed, so its members cannot be read by place. Unpack it to a plain .tar."
                )
    first = list(islice(_samples(files, Problems()), LOOKED_AT))
    columns = list(dict.fromkeys(["__key__", "image", "caption", *(key for _, record in first for key in record)]))
    problems = Problems()
    splits = {split_in_name(file.stem) for file in files}
    return Raw(
        name=name,
        where=where,
        columns=columns,
        batches=lambda: batched_dicts(_samples(files, problems), columns),
        root=files[0].parent,
        split=splits.pop() if len(splits) == 1 else None,
        stamp=" ".join(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files),
        problems=problems,
    )


def _samples(files: list[Path], problems: Problems) -> Iterator[tuple[str, dict[str, Any]]]:
    several_splits = len({split_in_name(file.stem) for file in files}) > 1
    for file in files:
        for key, members in _grouped(file, problems):
            record: dict[str, Any] = dict(members.pop("json", {}))
            pictures = [suffix for suffix in members if "." + suffix.lower().split(".")[-1] in SUFFIXES]
            if not pictures:
                found = ", ".join(sorted(members)) or "json"
                problems.add(f"{file.name} {key}", f"no picture: it has only {found}")
                continue
            record["__key__"] = key
            record["image"] = members[pictures[0]]
            text = next((members[suffix] for suffix in TEXTS if suffix in members), None)
            if text is not None:
                record["caption"] = text
            if several_splits and (split := split_in_name(file.stem)):
                record["split"] = split
            yield f"{file.name} {key}", record


def _grouped(file: Path, problems: Problems) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, suffix -> Picture, text or dict) for each run of members that share a key; from the shard's index where it
    has one."""
    index = ShardIndex(file)
    known = index.read()
    if known is not None:
        for place, reason in known[1]:
            problems.add(place, reason)
        yield from known[0]
        return
    told: list[tuple[str, str]] = []

    def say(place: str, reason: str) -> None:
        told.append((place, reason))
        problems.add(place, reason)

    try:
        yield from index.kept(_walked(file, say), told)
    except (tarfile.TarError, OSError) as error:
        problems.add(file.name, f"{SHARD}: {error}")


def _walked(file: Path, say: Say) -> Iterator[tuple[str, dict[str, Any]]]:
    """Raises TarError or OSError at the place where the shard breaks off, after what came before it."""
    current, members = "", dict[str, Any]()
    unknown = Counter[str]()
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header of the shard
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                if not stem:
                    continue
                key = f"{folder}/{stem}" if folder else stem
                if key != current:
                    if members:
                        yield current, members
                    current, members = key, {}
                suffix = suffix.lower()
                if "." + suffix.split(".")[-1] in SUFFIXES:
                    members[suffix] = Picture(path=str(file.absolute()), offset=member.offset_data, length=member.size)
                elif suffix in TEXTS or suffix == "json":
                    _read_text(tar, member, suffix, members, f"{file.name} {key}", say)
                else:
                    unknown[suffix] += 1
                    members.setdefault(suffix, None)
        if members:
            yield current, members
            members = {}
        _check_end(file)
    except (tarfile.TarError, OSError):
        if members:
            yield current, members
        raise


def _check_end(file: Path) -> None:
    """Raises ReadError for a tar without the empty blocks that end one: cut between two members it looks whole."""
    with open(file, "rb") as tar:
        tar.seek(max(0, file.stat().st_size - 2 * tarfile.BLOCKSIZE))
        if any(tar.read()):
            raise tarfile.ReadError("it has no end mark, so it may have been cut off")


def _read_text(
    tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str, members: dict[str, Any], place: str, say: Say
) -> None:
    content = tar.extractfile(member)
    try:
        text = content.read().decode("utf-8-sig").strip() if content else ""
        members[suffix] = json.loads(text) if suffix == "json" else text
        if suffix == "json" and not isinstance(members[suffix], dict):
            members.pop("json")
            say(place, "its .json is not an object")
    except ValueError as error:
        say(place, f"its .{suffix} is not readable: {error}")
