"""`index.json`: what an index is, beside its table. Written whole or not at all."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from interlace.errors import UserError
from interlace.search.filters import Column

NAME = "index.json"
FORMAT = 1
EXACT_BELOW = 50_000  # rows: up to here comparing with every vector takes about 25 ms, and misses nothing


@dataclass
class VectorIndex:
    """How the approximate index above `exact_below` rows is built and asked."""

    partitions: int
    nprobes: int  # partitions looked into per query
    refine: int = 3  # this many times k candidates are compared again by their full vectors
    recall: float | None = None  # recall@10 against exact search, on a sample, when it was built
    kind: str = "IVF_SQ"


@dataclass
class Manifest:
    run: str  # the fingerprint of the run whose vectors these are
    run_folder: str  # for messages only
    dim: int
    columns: list[Column]
    thumbnail: int = 256  # longest side in pixels; 0 stores none
    exact_below: int = EXACT_BELOW
    metric: str = "cosine"
    complete: bool = False  # the last build went through to its end
    source: dict[str, Any] = field(default_factory=dict)  # name, fingerprint, licence, split
    rows: int = 0  # at the end of the last build
    vector_index: VectorIndex | None = None
    similar: dict[str, float] = field(default_factory=dict)  # "text", "picture": see calibrate.py
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        """Beside the old one, then renamed over it, so that a reader sees either."""
        partial = folder / f".{NAME}.{os.getpid()}"
        with open(partial, "w", encoding="utf-8") as file:
            json.dump(asdict(self), file, indent=1, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, folder / NAME)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises UserError for a folder which is no index, or only half of one."""
        path, again = folder / NAME, "Build it again: interlace index RUN SOURCE --rebuild"
        if not folder.is_dir():
            raise UserError(f"No index at {folder}. Build one: interlace index RUN SOURCE")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["format"] > FORMAT:
                raise UserError(f"{path} was written by a newer version of interlace. Update interlace, or rebuild.")
            known = {f.name for f in fields(cls)}
            data = {name: value for name, value in data.items() if name in known}
            data["columns"] = [Column(**c) for c in data["columns"]]
            data["vector_index"] = VectorIndex(**data["vector_index"]) if data["vector_index"] else None
            return cls(**data)
        except FileNotFoundError:
            raise UserError(f"{folder} is not a complete index: it has no {NAME}. {again}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error}). {again}") from None
