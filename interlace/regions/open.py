"""Looks at what a path is and opens the regions in it; makes an extractor again from what a store says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from interlace.errors import UserError
from interlace.regions.base import RegionSource, fingerprint
from interlace.regions.extract import Extractor
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


EXTRACTORS = ("grid", "detector")  # those that can be made again from their facts


def extractor_of(facts: dict[str, Any], device: str | None = None) -> Extractor:
    """The extractor with these facts (`RegionSource.facts`), for pictures that came after: a query, an upload.

    Raises UserError when its tower or detector is not where it was, or is another by now, and for features that were
    made elsewhere.
    """
    from interlace.regions.detector import DetectorExtractor
    from interlace.regions.grid import GridExtractor

    made: Extractor
    if facts.get("kind") == "grid":
        made = GridExtractor(facts["name"], facts["size"], facts["fit"], device)
    elif facts.get("kind") == "detector":
        made = DetectorExtractor(facts["name"], facts["regions"], facts["asked_size"], device)
    else:
        raise UserError("these features were made elsewhere: there is nothing here to make those of another picture. "
                        "Rows whose features are stored can be scored: interlace evaluate --regions FOLDER.")
    if (now := fingerprint(made.facts)) != (then := fingerprint(facts)):
        raise UserError(f"{facts['name']} is not what it was: expected fingerprint {then}, got {now}. Put its former "
                        "weights and settings back, or extract and train again.")  # fmt: skip
    return made
