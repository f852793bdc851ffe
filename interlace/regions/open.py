"""Looks at what a path is and opens the regions in it."""

from __future__ import annotations

from pathlib import Path

from interlace.errors import UserError
from interlace.regions.base import RegionSource
from interlace.regions.lmdb_file import RegionLMDB
from interlace.regions.npz import NpzFolder
from interlace.regions.store import STORE, RegionStore
from interlace.regions.tsv import RegionTSV

FORMS = "a store of `interlace extract`, a folder of .npz files, an LXMERT .tsv, a UNITER .lmdb"


def open_regions(path: str | Path, regions: int | None = None) -> RegionSource:
    """The regions at `path`: a store, a folder of .npz files, the LXMERT release's TSV, the UNITER release's LMDB.
    `regions`: at most so many of a picture, the first (releases and detectors have the surest first).

    Raises UserError for a path that is not there or holds nothing that is read, such as pickles.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"no regions at {path}; expected {FORMS}.")
    if path.is_dir():
        if (path / STORE).is_file():
            return RegionStore.open(path, regions)
        return RegionLMDB(path, regions) if (path / "data.mdb").is_file() else NpzFolder(path, regions)
    if path.suffix == ".tsv":
        return RegionTSV(path, regions)
    if path.suffix in (".lmdb", ".mdb"):
        return RegionLMDB(path, regions)
    if path.suffix in (".pkl", ".pickle", ".pth", ".pt"):
        raise UserError(f"{path} is a pickle, which can run any program, and is not read. Write its arrays as a folder "
                        "of .npz files (features, boxes, width, height), one per picture.")  # fmt: skip
    raise UserError(f"{path} is not a form of regions that is read; expected {FORMS}.")
