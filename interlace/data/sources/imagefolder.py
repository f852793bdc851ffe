"""Hugging Face image folders: pictures and a metadata.csv, .jsonl or .parquet that names them by `file_name`."""

from __future__ import annotations

from pathlib import Path

from interlace.data.sources.arrow_files import read_parquet
from interlace.data.sources.build import Raw
from interlace.data.sources.chain import chain, split_in_name
from interlace.data.sources.json_files import read_jsonl
from interlace.data.sources.tables import read_csv

METADATA = {"metadata.csv": read_csv, "metadata.jsonl": read_jsonl, "metadata.parquet": read_parquet}


def metadata_files(folder: Path) -> list[Path]:
    """The folder's own metadata, or those of its subfolders (train/metadata.csv)."""
    own = [folder / name for name in METADATA if (folder / name).is_file()]
    if own:
        return own[:1]
    subfolders = sorted(sub for sub in folder.iterdir() if sub.is_dir() and not sub.name.startswith("."))
    return [found[0] for sub in subfolders if (found := [sub / name for name in METADATA if (sub / name).is_file()])]


def read_imagefolder(files: list[Path], folder: Path, wanted: dict[str, str] | None) -> Raw:
    raws = []
    for file in files:
        raw = METADATA[file.name](file, folder.name)
        raw.split = split_in_name(file.parent.name) if file.parent != folder else None
        raws.append(raw)
    return chain(raws, folder.name, folder, wanted)
